"""Tensors on NVMe under a name."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch

from torch_ext._checks import (
    Directories,
    Life,
    close_quietly,
    directories_of,
    engine_of,
    log_notes,
)
from torch_ext._modes import check_no_fake_mode
from torch_ext._native import _C
from torch_ext.config import AioConfig, parse_size, resolve_aio_config

_logger = logging.getLogger("torch_ext")

#: What swap_out() and swap_in() return; see TensorSwapper.
SwapTicket = _C.SwapTicket


class TensorSwapper:
    """Moves tensors between CPU or accelerator memory and a scratch file.

    ``swap_out`` and ``swap_in`` return a ticket at once; copies and I/O run
    behind the computation, in the order of the current stream:

    * ``ticket.wait_source(timeout=None)``: the tensor that was swapped out may
      be overwritten by work queued from now on. Dropping it is always safe.
    * ``ticket.wait(timeout=None)``: its bytes are on disk; for a swap-in, work
      queued from now on sees the bytes.
    * ``ticket.result(timeout=None)``: ``wait()``, then the tensor swapped in.
    * ``ticket.done()``: whether the bytes are in place; never blocks.

    The waits raise what the operation met: OSError with errno, filename, offset
    and length; TimeoutError after ``timeout`` seconds, while the operation goes
    on; KeyboardInterrupt on Ctrl-C. An error that no ticket has raised is raised
    by the next ``swap_out`` or ``swap_in`` of that key, which then does nothing,
    and else by ``close()``.

    Operations on one key take effect in the order of the calls. A rewrite that
    fails leaves the old value. A key can be read many times. The file has no
    name and is gone when the swapper is closed or the process ends, however it
    ends. Every block carries a checksum in memory that is compared on reading.

    Threads may share a swapper. A forked child may not use it (RuntimeError).

    Args:
        directory: Where the scratch file is made, on the drive to be used. For
            several drives, a list with a directory on each, or a dict of
            directories and weights: the blocks of each tensor go to them in
            turn, in proportion to the weights (1 to 100; all 1 for a list).
            Each drive has I/O threads of its own. One that fails or is full
            is an error that names its directory.
        config: What ``get_aio_config`` takes or returns; None: the defaults.
        host_memory: Bytes of page-locked host buffers, such as 2**28 or
            "256MiB"; at least ``block_size``.
        engine: "auto", or one that ``python -m torch_ext info`` lists.
        verify: Whether blocks carry checksums.

    Raises:
        OSError: The directory cannot be used.
        ValueError: A value is out of range; the text says which and the range.

    Example:
        >>> with TensorSwapper("/mnt/nvme") as swapper:
        ...     swapper.swap_out("layer.0", tensor).wait_source()
        ...     tensor = swapper.swap_in("layer.0").result()
    """

    def __init__(
        self,
        directory: Directories,
        config: AioConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        host_memory: int | str = "256MiB",
        engine: str = "auto",
        verify: bool = True,
    ) -> None:
        self._life = Life("swapper")
        self._swapper = _C.TensorSwapper(
            directories_of(directory, "directory"),
            resolve_aio_config(config, stacklevel=3),
            parse_size(host_memory),
            engine_of(engine),
            bool(verify),
        )
        self._notes_logged = 0
        self._log_notes()
        # At exit the I/O must have ended before the interpreter is taken down.
        self._finalizer = weakref.finalize(
            self, close_quietly, self._swapper, os.getpid(), "a TensorSwapper"
        )

    def swap_out(self, key: str, tensor: torch.Tensor) -> SwapTicket:
        """Stores the tensor's elements under ``key``; returns a ticket at once.

        Any dtype and shape; of a view exactly its elements; a tensor that is
        not contiguous is packed first. The key's old value is replaced once the
        new one is complete.

        Raises:
            TypeError: The tensor has no plain memory: sparse, meta, quantized,
                nested, or a subclass such as DTensor.
            RuntimeError: The swapper is closed, or belongs to another process,
                or the current stream is being captured into a graph, or a
                FakeTensorMode is active.
        """
        check_no_fake_mode()
        try:
            return self._swapper.swap_out(key, tensor)
        except TypeError:
            _check_arguments(key, "tensor", tensor)
            raise

    def swap_in(
        self,
        key: str,
        out: torch.Tensor | None = None,
        device: torch.device | str | int | None = None,
        *,
        prefetch: bool = False,
    ) -> SwapTicket:
        """Brings the key's tensor back; returns a ticket at once.

        Args:
            key: As given to ``swap_out``.
            out: Where the elements go, outside autograd; any view with the
                stored shape and dtype, but on a device no lazily conjugate or
                negative one. It belongs to the swapper until the ticket's
                ``wait()``. None: a new tensor.
            device: Where the new tensor is made; None: where the old one was.
            prefetch: It is needed later only. What is needed now goes first,
                though it be called afterwards: of any 16 requests, one is for
                what is prefetched and one for what is written, if they wait.

        Raises:
            KeyError: There is no such key.
            ValueError: Shape, dtype or device of ``out`` are not as asked for,
                or its elements share memory.
            TypeError, RuntimeError: As for ``swap_out``.
        """
        check_no_fake_mode()
        if device is not None:
            device = torch.device(device)
            if device.type == "cpu":
                device = torch.device("cpu")  # "cpu:0" is the same, and unequal.
            elif device.index is None:
                device = torch.empty(0, dtype=torch.uint8, device=device).device
        try:
            return self._swapper.swap_in(key, out, device, prefetch)
        except TypeError:
            _check_arguments(key, "out", out)
            raise

    def remove(self, key: str) -> None:
        """Forgets the key at once, whatever became of its operations.

        Operations already called still end; then its space is used again. An
        error of theirs that nobody has seen is not raised here, nor by later
        calls for the key, but by ``close()``.

        Raises:
            KeyError: There is no such key.
        """
        try:
            self._swapper.remove(key)
        except TypeError:
            _check_arguments(key)
            raise

    #: The former name of ``remove``.
    delete = remove

    def keys(self) -> list[str]:
        """The keys that have a value, or will have once their write ends."""
        return self._swapper.keys()

    def __contains__(self, key: object) -> bool:
        return key in set(self._swapper.keys())

    def __len__(self) -> int:
        return len(self._swapper.keys())

    def stats(self) -> dict[str, int]:
        """Counters since the swapper was made; bytes unless said otherwise.

        ``bytes_out``, ``bytes_in`` (of tensors, of operations that ended well),
        ``operations``, ``failures``, ``in_flight`` (counts), ``host_bytes`` (of
        buffers), ``host_bytes_peak`` (most in use at once),
        ``disk_bytes_written``, ``disk_bytes_read`` (padded),
        ``disk_bytes_allocated``, ``disk_file_size``. Also of a closed swapper.

        Raises:
            RuntimeError: The swapper belongs to another process.
        """
        self._life.check_process()
        self._log_notes()
        return self._swapper.stats()

    @property
    def engine(self) -> str:
        """The I/O engine in use. RuntimeError as for ``stats``."""
        self._life.check_process()
        return self._swapper.engine

    def close(self) -> None:
        """Waits for all operations and frees memory and disk space.

        Idempotent. Later calls of anything but ``stats`` and ``engine`` raise
        RuntimeError.

        Raises:
            OSError: The first error that nobody has seen; all is closed then.
            RuntimeError: The swapper belongs to another process.
        """
        self._life.check_process()
        self._life.closed = True
        self._log_notes()
        self._swapper.close()

    def __enter__(self) -> TensorSwapper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception:
            # The body's own exception says more than what followed from it.
            if error is None:
                raise
            _logger.exception("closing a TensorSwapper after another error")

    def __reduce__(self) -> Any:
        raise TypeError(
            "a TensorSwapper belongs to its process and cannot be copied or pickled"
        )

    def _log_notes(self) -> None:
        notes = self._swapper.notes()
        log_notes(notes[self._notes_logged :])
        self._notes_logged = len(notes)


def _check_arguments(key: Any, name: str = "", tensor: Any = None) -> None:
    """Says in plain words what the compiled module has refused."""
    if not isinstance(key, str):
        raise TypeError(f"a key must be a str, not {type(key).__name__}") from None
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the key {key!r} cannot be written in UTF-8") from None
    if not isinstance(tensor, torch.Tensor) and (tensor is not None or name == "tensor"):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}") from None
