"""The groups of OffloadedAdamW's parameters, and loaded states of the parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor

from torch_ext._native import _C
from torch_ext.optim._dtensor import any_nonzero, local_of, local_state
from torch_ext.optim._state_dict import WAYS, check_saved_tensor, check_ways


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
    """Returns the numbers of a group as the offload takes them."""
    check_group(group)
    beta1, beta2 = group["betas"]
    numbers = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
    return _C.AdamWHyper(*map(float, numbers), bool(group["maximize"]))


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
