"""Groups and loaded states, as all optimizers here take them."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

#: The key under which a state_dict() refers to a commit.
COMMIT = "torch_ext_commit"

#: These say how torch computes, not what. They are this process's own, whatever is loaded.
WAYS = ("foreach", "capturable", "differentiable", "fused")


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
