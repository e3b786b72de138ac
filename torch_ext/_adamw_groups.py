"""The groups of OffloadedAdamW's parameters, and loaded states of the parameters."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from torch_ext._local import any_nonzero, local_of, local_state
from torch_ext._native import _C

#: These say how torch computes, not what. They are this process's own, whatever is loaded.
WAYS = ("foreach", "capturable", "differentiable", "fused")


def as_lists(params: Any) -> Any:
    """Returns ``params`` with lists in place of iterators, which can be read only once."""
    if not isinstance(params, (Iterator, list, tuple)):
        return params
    return [
        {**entry, "params": list(entry["params"])}
        if isinstance(entry, dict) and isinstance(entry.get("params"), Iterator)
        else entry
        for entry in params
    ]


def early_bytes_of(params: Any) -> int:
    """Returns the bytes that copies of gradients on accelerators take.

    ``params`` need not be well-formed.
    """
    if isinstance(params, Tensor):
        return _C.early_bytes(params, local_of(params))
    if isinstance(params, dict):
        return early_bytes_of(params.get("params", ()))
    if isinstance(params, Iterable) and not isinstance(params, (str, Iterator)):
        return sum(map(early_bytes_of, params))
    return 0


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for a group that cannot be used, in torch.optim.AdamW's words."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not float(lr) >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not group["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas}")
    for i, beta in enumerate(betas):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    if group["amsgrad"]:
        raise ValueError("amsgrad=True is not supported by OffloadedAdamW")
    check_ways("OffloadedAdamW", group)
    if not group["decoupled_weight_decay"]:
        raise ValueError(
            "OffloadedAdamW has decoupled weight decay only; this is the state of a "
            "torch.optim.Adam without it"
        )


def check_ways(name: str, group: dict[str, Any]) -> None:
    """Raises ValueError for a way of computing that an update on a drive cannot have.

    ``fused`` and ``foreach`` would give the same, so they are let through.
    """
    if group.get("capturable"):
        raise ValueError(
            f"capturable=True is not supported by {name}: its step reads and writes files, "
            f"which no graph of a device can hold"
        )
    if group.get("differentiable"):
        raise ValueError(
            f"differentiable=True is not supported by {name}: autograd does not follow a "
            f"state that is on a drive"
        )


def check_foreach(options: dict[str, Any]) -> None:
    """Raises what torch.optim.AdamW raises for keywords that exclude each other."""
    if options["foreach"] and isinstance(options["lr"], Tensor):
        raise ValueError(
            "lr as a Tensor is not supported for capturable=False and foreach=True"
        )
    for i, beta in enumerate(options["betas"]):
        if options["foreach"] and isinstance(beta, Tensor):
            raise ValueError(
                f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True"
            )
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def hyper(group: dict[str, Any]) -> _C.AdamWHyper:
    """Returns the numbers of a group as the engine takes them."""
    check_group(group)
    beta1, beta2 = group["betas"]
    numbers = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
    return _C.AdamWHyper(*map(float, numbers), bool(group["maximize"]))


def check_state_dict(state_dict: Any) -> None:
    """Raises TypeError or ValueError for what is no optimizer's state at all."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"a state_dict must be a dict, as state_dict() returns it, "
            f"not {type(state_dict).__name__}"
        )
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict.get(key), kind):
            keys = reprlib.repr(list(state_dict))
            raise ValueError(
                f"the loaded state_dict has no {key!r} of an optimizer; its keys are {keys}"
            )
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), Sequence):
            raise ValueError(f"the loaded param_groups[{i}] has no list 'params'")


def paired(
    groups: list[dict[str, Any]],
    saved: list[dict[str, Any]],
    state: Mapping[Any, Any],
    fields: Collection[str],
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs each group with the saved one. ``fields``: a state has some of these tensors.

    Raises:
        ValueError: There are more or fewer groups or parameters, or a state belongs to none of
            the parameters.
    """
    if len(groups) != len(saved):
        raise ValueError("loaded state dict has a different number of parameter groups")
    for group, other in zip(groups, saved, strict=True):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group "
                "that doesn't match the size of optimizer's group"
            )
    ids = set(chain.from_iterable(group["params"] for group in saved))
    if strangers := [
        key
        for key, value in state.items()
        if key not in ids and not _is_foreign(key, value, fields)
    ]:
        raise ValueError(
            f"the loaded state_dict has a state of {reprlib.repr(strangers)}, which no "
            f"parameter group has"
        )
    return list(zip(groups, saved, strict=True))


def merged(
    group: dict[str, Any], saved: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, Any]:
    """Returns the saved group, with this optimizer's parameters and way of computing."""
    for key in ("lr", "betas", "eps", "weight_decay"):
        if key not in saved:
            raise ValueError(
                f"a loaded parameter group has no {key!r}: it is not of an AdamW or Adam"
            )
    merged = defaults | {
        key: deepcopy(value) for key, value in saved.items() if key != "params"
    }
    for key in WAYS:
        merged[key] = group.get(key, defaults[key])
    check_group(merged)
    if "param_names" in group:
        merged.setdefault("param_names", group["param_names"])
    merged["params"] = group["params"]
    return merged


def labelled_parameters(groups: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yields each parameter with words by which a reader finds it, for messages."""
    for i, group in enumerate(groups):
        names = group.get("param_names")
        for j, parameter in enumerate(group["params"]):
            name = f" ({names[j]!r})" if names and j < len(names) else ""
            yield f"param_groups[{i}]['params'][{j}]{name}", parameter


def _is_foreign(key: Any, value: Any, fields: Collection[str]) -> bool:
    """Whether a key of a saved state is somebody else's, and not that of a lost parameter."""
    is_state = isinstance(value, Mapping) and any(name in value for name in fields)
    return not isinstance(key, int) and not is_state


def others_of(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """Returns what a saved state has under keys that are no parameters."""
    ids = set(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
    return {key: value for key, value in state_dict["state"].items() if key not in ids}


def foreign_of(
    parameter: Tensor, entry: Any, own: Collection[str]
) -> tuple[Any, dict[str, Any]]:
    """Splits a parameter's loaded state into the optimizer's part and what others keep in it.

    The others' tensors come to the parameter's device and dtype, as torch.optim puts them.
    """
    if not isinstance(entry, Mapping):
        return entry, {}
    foreign = {
        name: _placed(value, parameter) for name, value in entry.items() if name not in own
    }
    return {name: value for name, value in entry.items() if name in own}, foreign


def _placed(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    dtype = parameter.dtype if parameter.is_floating_point() else value.dtype
    return value.to(dtype=dtype, device=parameter.device)


def read_entry(label: str, parameter: Tensor, entry: Any) -> tuple[int, list[Tensor | None]]:
    """Returns the step of a parameter's loaded state, its exp_avg, exp_avg_sq and master.

    If the parameter is a DTensor, they are this process's part.

    Raises:
        ValueError, TypeError: The state does not fit. The text has ``label``.
    """
    return _read(f"the loaded state of {label}", parameter, entry, {"master_param"})


def read_change(
    label: str, parameter: Tensor, entry: dict[str, Any], step: int | None
) -> tuple[int, list[Tensor | None]]:
    """Returns the same for what was assigned to a state with ``step`` steps, or to none."""
    may_lack = {"exp_avg", "exp_avg_sq", "master_param"} - entry.keys()
    if step is None:
        may_lack &= {"master_param"}
    else:
        entry = {"step": step} | entry
    return _read(f"the state of {label}", parameter, entry, may_lack)


def _read(
    state: str, parameter: Tensor, entry: Any, may_lack: Collection[str]
) -> tuple[int, list[Tensor | None]]:
    if not isinstance(entry, Mapping):
        raise TypeError(f"{state} must be a dict, not {type(entry).__name__}")
    tensors: dict[str, Tensor] = {}
    names = ("exp_avg", "exp_avg_sq", "master_param")
    for name in names:
        tensor = entry.get(name)
        if tensor is None and name in may_lack:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{state} has no tensor {name!r}")
        what = f"{state}: {name}"
        tensors[name] = local_state(what, tensor, parameter)
        check_saved_tensor(what, tensors[name], local_of(parameter))
    return _read_step(state, entry.get("step")), [tensors.get(name) for name in names]


def check_saved_tensor(what: str, tensor: Tensor, parameter: Tensor) -> None:
    """Raises TypeError or ValueError if a loaded tensor cannot be a parameter's state."""
    if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
        kind = "meta" if tensor.is_meta else f"{tensor.layout} of dtype {tensor.dtype}"
        raise TypeError(f"{what} is {kind}; allowed: dense strided tensors that have memory")
    if not tensor.dtype.is_floating_point:
        raise TypeError(
            f"{what} has dtype {tensor.dtype}; allowed: float64, float32, bfloat16, float16 "
            f"and the float8 ones"
        )
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"{what} has sizes {list(tensor.shape)}, its parameter {list(parameter.shape)}"
        )


def _read_step(state: str, value: Any) -> int:
    if value is None:
        raise ValueError(f"{state} has no 'step'")
    try:
        step = float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: several elements.
        raise ValueError(f"{state} has the step {value!r}, which is no number") from None
    # float32, in which torch keeps it, counts to 2^24. The library counts to 2^64.
    if not (0 <= step < 2**63 and step.is_integer()):
        raise ValueError(f"{state} has the step {step:g}; allowed: whole, from 0 to 2^63 - 1")
    return int(step)


def asks_for_state_only(trained: list[tuple[dict[str, Any], list[Tensor]]]) -> bool:
    """Whether this is the step by which DCP makes an optimizer get state."""
    gradients = [p.grad for _, parameters in trained for p in parameters]
    return (
        bool(gradients)
        and all(float(group["lr"]) == 0.0 for group, _ in trained)
        and not any(g.is_sparse for g in gradients)
        and not any_nonzero(gradients)
    )
