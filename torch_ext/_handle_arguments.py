"""Arguments of aio_handle's calls."""

from __future__ import annotations

import os
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


def check_offset(offset: int) -> None:
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"file_offset must be an int, not {type(offset).__name__}")
    if not 0 <= offset < 2**63:
        raise ValueError(f"file_offset must be from 0 to 2^63 - 1, got {offset}")


def checked_path(
    buffer: torch.Tensor, filename: str, offset: int, absolute: bool = False
) -> str | bytes:
    """The file's path; ``absolute``: whatever the working directory is later."""
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"buffer must be a torch.Tensor, not {type(buffer).__name__}")
    check_offset(offset)
    path = directory_of(filename, "filename")
    return os.path.join(os.getcwd(), os.fsdecode(path)) if absolute else path


def check_size(buffer: torch.Tensor, filename: str) -> None:
    path = checked_path(buffer, filename, 0)
    size = os.stat(path, follow_symlinks=False).st_size
    if size != buffer.nbytes:
        raise ValueError(
            f"{os.fsdecode(path)} has {size} bytes, the buffer {buffer.nbytes}: read() takes "
            f"whole files; for a part of one use pread()"
        )
