"""Checks the arguments of aio_handle's calls."""

from __future__ import annotations

import operator
import os
import stat
from typing import Any

import torch

from torch_ext._checks import directory_of
from torch_ext._native import _C
from torch_ext.config import AioConfig


def async_and_offset(
    name: str, rest: tuple[Any, ...], named: dict[str, Any]
) -> tuple[bool, int]:
    """Returns what follows ``validate``: whether to wait, and the offset in the file."""
    values = dict(zip(("async", "file_offset"), rest, strict=False))
    twice = values.keys() & named.keys()
    unknown = named.keys() - {"async", "file_offset"}
    if len(rest) > 2 or twice or unknown or "async" not in values | named:
        raise TypeError(f"{name}() takes buffer, filename, validate, async and file_offset=0")
    values |= named
    return not values["async"], values.get("file_offset", 0)


def handle_config(**settings: Any) -> AioConfig:
    """Returns the settings as an AioConfig. Errors have the handle's own names.

    A flag may be anything that equals 0 or 1: DeepSpeed's configurations have such.
    """
    for name, value in settings.items():
        if value is None:
            raise TypeError(f"{name} must not be None")
    for name in ("single_submit", "overlap_events"):
        if _is_flag(settings[name]):
            settings[name] = bool(settings[name])
    return _C.read_aio_config({}, settings, False)[0]


def _is_flag(value: Any) -> bool:
    try:
        return operator.index(value) in (0, 1)
    except TypeError:
        # numpy's bool is not an integer.
        return getattr(value, "ndim", None) == 0 and str(value.dtype) == "bool"


def checked_offset(offset: int) -> int:
    """Returns the offset as an int. Anything with ``__index__`` will do, except bool."""
    try:
        value = operator.index(offset)
    except TypeError:
        value = None
    if value is None or isinstance(offset, bool):
        raise TypeError(f"file_offset must be an int, not {type(offset).__name__}")
    if not 0 <= value < 2**63:
        raise ValueError(f"file_offset must be from 0 to 2^63 - 1, got {value}")
    return value


def checked_target(
    buffer: torch.Tensor, filename: str, offset: int, absolute: bool = False
) -> tuple[str | bytes, int]:
    """Returns the file's path and the offset.

    ``absolute``: the path holds whatever the working directory is later."""
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"buffer must be a torch.Tensor, not {type(buffer).__name__}")
    offset = checked_offset(offset)
    path = directory_of(filename, "filename")
    if absolute:
        path = os.path.join(os.getcwd(), os.fsdecode(path))
    return path, offset


def check_size(buffer: torch.Tensor, filename: str) -> None:
    path, _ = checked_target(buffer, filename, 0)
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return  # Reading reports it, with all details.
    if stat.S_ISREG(found.st_mode) and found.st_size != buffer.nbytes:
        raise ValueError(
            f"{os.fsdecode(path)} has {found.st_size} bytes, the buffer {buffer.nbytes}: "
            f"read() takes whole files; for a part of one use pread()"
        )
