"""Copies what optimizers keep outside parameters, and compares it bit for bit."""

from __future__ import annotations

import copy
import ctypes
from collections import deque
from typing import Any

import torch
from torch import Tensor

#: Tensors of more elements are compared by identity, and by whether they were written to.
_MANY = 1 << 16
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes))
_NO_VALUE = object()


def copied(value: Any, memo: dict[int, Any] | None = None) -> Any:
    """Returns a copy of tensors, and of containers with all in them. Anything else is shared.

    One object in a value is one object in the copy. With a common ``memo`` that holds for
    several values, which must live as long as the ``memo``.
    """
    if _cannot_change(value):
        return value
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        made = value.detach().clone()
    elif type(value) is tuple:
        made = tuple(copied(entry, memo) for entry in value)
    elif isinstance(value, dict):
        made = copy.copy(value)
        made.update((key, copied(entry, memo)) for key, entry in value.items())
    elif isinstance(value, list | deque):
        made = copy.copy(value)
        for i, entry in enumerate(value):
            made[i] = copied(entry, memo)
    elif isinstance(value, set):
        made = copy.copy(value)
    else:
        return value
    memo[id(value)] = made
    return made


def described(value: Any, within: tuple[int, ...] = ()) -> Any:
    """Returns something hashable. It is equal for values of one type with the same bits."""
    if type(value) in _PLAIN:
        return type(value), repr(value)  # -0.0 is not 0.0, and NaN equals NaN.
    if isinstance(value, Tensor):
        if value.is_meta or value.numel() > _MANY:
            return Tensor, id(value), 0 if value.is_inference() else value._version
        return Tensor, value.dtype, value.device, tuple(value.shape), bits(value)
    if id(value) in within or isinstance(value, type | torch.nn.Module):
        return type(value), id(value)
    within = (*within, id(value))
    if isinstance(value, dict):
        entries = ((described(k, within), described(v, within)) for k, v in value.items())
        return type(value), frozenset(entries)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(described(entry, within) for entry in value)
    if isinstance(value, list | tuple | deque):
        return type(value), tuple(described(entry, within) for entry in value)
    if isinstance(value, torch.Generator):
        return torch.Generator, bits(value.get_state())
    if hasattr(value, "tobytes"):  # NumPy's arrays and numbers.
        return type(value), str(value.dtype), value.shape, value.tobytes()
    if callable(value) or not hasattr(value, "__dict__"):
        return type(value), repr(value)
    return type(value), id(value), described(vars(value), within)


def differing(some: dict[Any, Any], others: dict[Any, Any]) -> list[Any]:
    """Returns the keys under which two dicts do not hold the same."""
    return [
        key
        for key in {**some, **others}
        if not same(some.get(key, _NO_VALUE), others.get(key, _NO_VALUE))
    ]


def same(one: Any, other: Any) -> bool:
    """Whether two values have the same type and the same bits."""
    if one is other and _cannot_change(one):
        return True
    return described(one) == described(other)


def _cannot_change(value: Any) -> bool:
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and all(type(entry) in _PLAIN for entry in value))


def bits(tensor: Tensor) -> bytes:
    """Returns the elements in order, as they are in memory."""
    flat = tensor.detach().cpu().flatten().contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.nbytes)
