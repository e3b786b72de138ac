"""Arguments of aio_handle's calls."""

from __future__ import annotations

import operator
import os
import stat
from typing import Any

import torch

from torch_ext._checks import directory_of


def async_and_offset(
    name: str, rest: tuple[Any, ...], named: dict[str, Any]
) -> tuple[bool, int]:
    """What follows ``validate``: whether to wait, and the offset in the file."""
    values = dict(zip(("async", "file_offset"), rest, strict=False))
    twice = values.keys() & named.keys()
    unknown = named.keys() - {"async", "file_offset"}
    if len(rest) > 2 or twice or unknown or "async" not in values | named:
        raise TypeError(f"{name}() takes buffer, filename, validate, async and file_offset=0")
    values |= named
    return not values["async"], values.get("file_offset", 0)


def checked_offset(offset: int) -> int:
    """As an int: anything that is one by ``__index__`` will do, but for bool."""
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
    """The file's path and the offset; ``absolute``: whatever the working directory is later."""
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
        return  # Reading says it with all that belongs to it.
    if stat.S_ISREG(found.st_mode) and found.st_size != buffer.nbytes:
        raise ValueError(
            f"{os.fsdecode(path)} has {found.st_size} bytes, the buffer {buffer.nbytes}: "
            f"read() takes whole files; for a part of one use pread()"
        )
