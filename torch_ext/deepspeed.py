"""An unmodified DeepSpeed on torch_ext's I/O.

``install()`` makes DeepSpeed use ``torch_ext.aio_handle`` wherever it would
compile and load its own ``async_io``, ``gds`` and ``pin_memory``::

    import torch_ext.deepspeed

    torch_ext.deepspeed.install()
    engine, *_ = deepspeed.initialize(...)

It holds for the process. Call it at the top level of the script, not below
``if __name__ == "__main__"``. Then spawned processes, which run the script again, have it too.
Processes that the ``deepspeed`` launcher or ``torchrun`` starts run the script anyway.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from torch_ext._bytes import bytes_view
from torch_ext.handle import aio_handle, gds_handle, pin_handle

__all__ = ["install", "uninstall"]

# DeepSpeed keeps its one pin_memory module here.
_PIN_MEMORY = "_deepspeed_pin_memory_op_module"
# The package has its op_builder twice. Each has a cache of loaded ops.
_BUILDERS = ("deepspeed.ops.op_builder.builder", "op_builder.builder")
_MISSING = object()

_saved: list[tuple[Any, str, Any]] = []


class _StrictHandle(aio_handle):
    """A handle that raises where DeepSpeed's would have lost bytes in silence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"strict": True, **kwargs})


class _StrictGdsHandle(gds_handle):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"strict": True, **kwargs})


def aio_read(
    buffer: torch.Tensor,
    filename: str,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Fills the buffer from a file of exactly its size. Returns 0."""
    with _StrictHandle(block_size, queue_depth, single_submit, overlap_events) as handle:
        return handle.read(buffer, filename, validate)


def aio_write(
    buffer: torch.Tensor,
    filename: str,
    block_size: int,
    queue_depth: int,
    single_submit: bool,
    overlap_events: bool,
    validate: bool,
) -> int:
    """Writes the buffer. Returns 0."""
    with _StrictHandle(block_size, queue_depth, single_submit, overlap_events) as handle:
        return handle.write(buffer, filename, validate)


def deepspeed_memcpy(dest: torch.Tensor, src: torch.Tensor) -> int:
    """Copies the bytes of one CPU tensor to another of the same size. Returns 0.

    Raises:
        ValueError: The sizes differ, or a tensor is not contiguous on the CPU.
    """
    for name, tensor in (("dest", dest), ("src", src)):
        if not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(f"deepspeed_memcpy: {name} is not a contiguous CPU tensor")
    if dest.nbytes != src.nbytes:
        raise ValueError(f"deepspeed_memcpy: {src.nbytes} bytes do not fit into {dest.nbytes}")
    with torch.no_grad():
        bytes_view(dest).copy_(bytes_view(src))
    return 0


def install() -> None:
    """Makes DeepSpeed use torch_ext from the next handle on. A second call changes nothing.

    Raises:
        ImportError: There is no DeepSpeed.
    """
    if _saved:
        return
    builders = _loaded_ops()
    async_io = _module(
        "async_io",
        aio_handle=_StrictHandle,
        aio_read=aio_read,
        aio_write=aio_write,
        deepspeed_memcpy=deepspeed_memcpy,
    )
    gds = _module("gds", gds_handle=_StrictGdsHandle)
    pin_memory = _module("pin_memory", pin_handle=pin_handle)
    _saved.append((sys, _PIN_MEMORY, getattr(sys, _PIN_MEMORY, _MISSING)))
    setattr(sys, _PIN_MEMORY, pin_memory)
    for loaded in builders:
        for name, module in (("async_io", async_io), ("gds", gds), ("pin_memory", pin_memory)):
            _saved.append((loaded, name, loaded.get(name, _MISSING)))
            loaded[name] = module


def uninstall() -> None:
    """Undoes install(). Handles that exist stay what they are."""
    while _saved:
        where, name, old = _saved.pop()
        if isinstance(where, dict):
            where.pop(name, None) if old is _MISSING else where.update({name: old})
        elif old is _MISSING:
            delattr(where, name)
        else:
            setattr(where, name, old)


def _module(name: str, **members: Any) -> ModuleType:
    # It has no __file__, which DeepSpeed would open as a shared library.
    module = ModuleType(f"torch_ext.deepspeed.{name}")
    module.__dict__.update(members)
    return module


def _loaded_ops() -> list[dict[str, Any]]:
    """Returns DeepSpeed's caches of the ops that it has loaded, by name."""
    found = []
    for name in _BUILDERS:
        try:
            builder = importlib.import_module(name)
        except ImportError:
            continue
        found.append(builder.OpBuilder._loaded_ops)
    if not found:
        raise ImportError(
            "torch_ext.deepspeed.install() needs DeepSpeed: pip install deepspeed"
        )
    return found
