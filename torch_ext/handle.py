"""aio_handle: tensors to and from files by name, with DeepSpeed's calls."""

from __future__ import annotations

import collections
import errno
import logging
import os
import threading
import time
import warnings
import weakref
from types import TracebackType
from typing import Any

import torch

from torch_ext import _C
from torch_ext._checks import Life, close_quietly, directory_of, engine_of
from torch_ext.config import parse_size

_logger = logging.getLogger("torch_ext")

# What a call that cannot be carried out may raise.
_Failure = (OSError, ValueError)

_PIECE = 1 << 24


class aio_handle:  # noqa: N801 - DeepSpeed's name
    """Moves tensors to and from files, with the calls of DeepSpeed's aio_handle.

    Names, argument names, defaults and return values are DeepSpeed's, so that
    code written for it runs unchanged. Different is what happens when
    something fails, for there everything is looked at: with ``strict`` the
    call, or ``wait()``, raises; without, it returns -1 and the exception is
    added to ``errors``. Nothing is printed and nothing aborts.

    Tensors are dense and strided, on the CPU or an accelerator, of any dtype,
    shape and length; views move as exactly their elements. Files are opened
    without following links, made 0600 where there is none, and never
    truncated, so a shorter rewrite keeps the old tail. Written bytes are not
    durable until the file is synced.

    Between an ``async_`` call and ``wait()`` a tensor may not be changed, nor
    read from if it is the target. Operations have no order among each other.

    Threads may share a handle; a forked child may not use it (RuntimeError).

    Args:
        block_size: Bytes of one request to the disk.
        queue_depth: Requests in flight per thread.
        single_submit: One system call per request.
        overlap_events: Refill the queue as requests end, not when all have.
        intra_op_parallelism: I/O threads.
        strict: Raise instead of returning -1.
        host_memory: Most bytes of page-locked buffers, for tensors whose
            memory direct I/O cannot take.
        engine: "auto", or one that ``python -m torch_ext info`` lists.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> handle = aio_handle(strict=True)
        >>> handle.async_pwrite(tensor, "/mnt/nvme/layer.0")
        0
        >>> handle.wait()
        1
    """

    #: What failed, oldest first: OSError or ValueError; clear it as you like.
    errors: list[Exception]

    def __init__(
        self,
        block_size: int = 1024 * 1024,
        queue_depth: int = 128,
        single_submit: bool = False,
        overlap_events: bool = False,
        intra_op_parallelism: int = 1,
        *,
        strict: bool = False,
        host_memory: int | str = "256MiB",
        engine: str = "auto",
    ) -> None:
        self._life = Life("aio_handle")
        self._config = _C.AioConfig(
            block_size=block_size,
            queue_depth=queue_depth,
            single_submit=single_submit,
            overlap_events=overlap_events,
            thread_count=intra_op_parallelism,
        )
        self._strict = bool(strict)
        self.errors = []
        self._files = _C.TensorFileSwapper(
            self._config,
            max(parse_size(host_memory), self._config.block_size),
            engine_of(engine),
        )
        # Ticket, and for `validate` the tensor, the file and the offset.
        self._pending: collections.deque[tuple[Any, tuple[Any, Any, int] | None]] = (
            collections.deque()
        )
        self._waiting = threading.Lock()
        self._notes_logged = 0
        # At exit the I/O must have ended before the interpreter is taken down.
        self._finalizer = weakref.finalize(
            self, close_quietly, self._files, os.getpid(), "an aio_handle"
        )

    def get_block_size(self) -> int:
        return self._config.block_size

    def get_queue_depth(self) -> int:
        return self._config.queue_depth

    def get_single_submit(self) -> bool:
        return self._config.single_submit

    def get_overlap_events(self) -> bool:
        return self._config.overlap_events

    def get_intra_op_parallelism(self) -> int:
        return self._config.thread_count

    def get_alignment(self) -> int:
        """``intra_op_parallelism * 512``, as DeepSpeed; no call here needs any."""
        return 512 * self._config.thread_count

    def read(
        self, buffer: torch.Tensor, filename: str, validate: bool, file_offset: int = 0
    ) -> int:
        """Fills the buffer from the file and returns 0, or -1.

        With offset 0 the file has to have exactly the buffer's size.
        """
        try:
            if file_offset == 0:
                _check_size(buffer, filename)
            self._wait_for(self._start_read(buffer, filename, file_offset, validate))
        except _Failure as error:
            return self._failed(error)
        return 0

    def write(
        self, buffer: torch.Tensor, filename: str, validate: bool, file_offset: int = 0
    ) -> int:
        """Writes the buffer and returns 0, or -1."""
        try:
            self._wait_for(self._start_write(buffer, filename, file_offset, validate))
        except _Failure as error:
            return self._failed(error)
        return 0

    # `async` is a keyword of Python, so it can only be given by position or as
    # pread(..., **{"async": True}), which DeepSpeed allows as well.
    def pread(
        self, buffer: torch.Tensor, filename: str, validate: bool, *rest: Any, **named: Any
    ):
        """pread(buffer, filename, validate, async, file_offset=0)

        Starts to fill the buffer. With ``async`` returns 0, else what
        ``wait()`` does; -1 if it failed. ``validate`` reads the bytes again
        and compares them.
        """
        wait, offset = _async_and_offset("pread", rest, named)
        return self._queue(self._start_read, buffer, filename, offset, validate, wait)

    def pwrite(
        self, buffer: torch.Tensor, filename: str, validate: bool, *rest: Any, **named: Any
    ):
        """pwrite(buffer, filename, validate, async, file_offset=0)

        Starts to write the buffer; otherwise as ``pread``.
        """
        wait, offset = _async_and_offset("pwrite", rest, named)
        return self._queue(self._start_write, buffer, filename, offset, validate, wait)

    def sync_pread(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """``async_pread``, then ``wait()``: counts all that was pending."""
        return self._queue(self._start_read, buffer, filename, file_offset, False, True)

    def sync_pwrite(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """``async_pwrite``, then ``wait()``: counts all that was pending."""
        return self._queue(self._start_write, buffer, filename, file_offset, False, True)

    def async_pread(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """Starts to fill the buffer; returns 0, or -1 if that cannot work."""
        return self._queue(self._start_read, buffer, filename, file_offset, False, False)

    def async_pwrite(
        self,
        buffer: torch.Tensor,
        filename: str | int | None = None,
        file_offset: int = 0,
        *,
        fd: int | None = None,
    ) -> int:
        """Starts to write the buffer; returns 0, or -1 if that cannot work.

        A descriptor in place of the file's name, or as ``fd``, stays the
        caller's, who keeps it open until ``wait()``.
        """
        if (filename is None) == (fd is None):
            raise TypeError("async_pwrite() needs a filename or an fd")
        target = fd if filename is None else filename
        return self._queue(self._start_write, buffer, target, file_offset, False, False)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for all that is pending and returns how many operations it was.

        0 if nothing is. If any has failed, returns -1 and adds to ``errors``,
        or raises the first one if the handle is strict. After ``timeout``
        seconds raises TimeoutError, and on Ctrl-C KeyboardInterrupt: what has
        not ended stays pending, and goes on.
        """
        self._life.check()
        self._log_notes()
        deadline = None if timeout is None else time.monotonic() + timeout
        count = 0
        failures: list[Exception] = []
        with self._waiting:
            while self._pending:
                ticket, check = self._pending[0]
                try:
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    ticket.wait(timeout=left)
                    if check is not None:
                        _validate(*check)
                except TimeoutError as error:
                    # Of this wait; what the system calls so is an operation's.
                    if error.errno is None:
                        self.errors.extend(failures)
                        raise
                    failures.append(error)
                except _Failure as error:
                    failures.append(error)
                self._pending.popleft()
                count += 1
        self.errors.extend(failures)
        if not failures:
            return count
        if self._strict:
            raise failures[0]
        return -1

    def new_cpu_locked_tensor(
        self, num_elem: int, example_tenosr: torch.Tensor
    ) -> torch.Tensor:
        """A 1-D CPU tensor of the example's dtype, page aligned and, where there
        is a GPU, page-locked. Its memory goes with its last reference.
        """
        return _C.pinned_zeros(num_elem, example_tenosr)

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Forgets a tensor that ``new_cpu_locked_tensor`` made; False if it did
        not. I/O in flight and other views keep the memory until they are gone.
        """
        return free_cpu_locked_tensor(tensor)

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        """Whether the buffer lies in one tensor of any handle's
        ``new_cpu_locked_tensor``, or is page-locked by PyTorch.
        """
        return is_pinned(buffer)

    def stats(self) -> dict[str, int]:
        """Counters since the handle was made: ``bytes_read``, ``bytes_written``
        (of operations that ended well), ``operations``, ``failures``,
        ``in_flight``, ``host_bytes`` (of buffers), ``host_bytes_peak``,
        ``descriptors`` (open now).
        """
        self._life.check_process()
        return self._files.stats()

    def close(self) -> None:
        """Waits for all operations and frees memory and descriptors. Idempotent.

        Raises:
            OSError: The first error that nobody has seen; all is closed then.
        """
        self._life.check_process()
        self._life.closed = True
        self._log_notes()
        self._files.close()

    def __enter__(self) -> aio_handle:
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
            _logger.exception("closing an aio_handle after another error")

    def __reduce__(self) -> Any:
        raise TypeError("an aio_handle belongs to its process and cannot be copied or pickled")

    def _start_read(
        self, buffer: torch.Tensor, filename: str, offset: int, validate: bool
    ) -> tuple[Any, Any]:
        path = _checked(buffer, filename, offset)
        ticket = self._files.read(path, offset, buffer)
        return ticket, (buffer, path, offset) if validate else None

    def _start_write(
        self, buffer: torch.Tensor, target: str | int, offset: int, validate: bool
    ) -> tuple[Any, Any]:
        if isinstance(target, int) and not isinstance(target, bool):
            _check_offset(offset)
            return self._files.write_fd(target, offset, buffer), None
        path = _checked(buffer, target, offset)
        ticket = self._files.write(path, offset, buffer)
        return ticket, (buffer, path, offset) if validate else None

    def _queue(
        self,
        start: Any,
        buffer: torch.Tensor,
        target: str | int,
        offset: int,
        validate: bool,
        wait: bool,
    ) -> int:
        self._life.check()
        try:
            self._pending.append(start(buffer, target, offset, validate))
        except _Failure as error:
            return self._failed(error)
        return self.wait() if wait else 0

    def _wait_for(self, started: tuple[Any, Any]) -> None:
        ticket, check = started
        ticket.wait()
        if check is not None:
            _validate(*check)

    def _failed(self, error: Exception) -> int:
        self.errors.append(error)
        if self._strict:
            raise error
        return -1

    def _log_notes(self) -> None:
        notes = self._files.notes()
        for note in notes[self._notes_logged :]:
            _logger.warning("%s", note)
        self._notes_logged = len(notes)


class gds_handle(aio_handle):  # noqa: N801
    """An ``aio_handle`` under the name of DeepSpeed's GPUDirect Storage handle.

    There is no direct path between GPU and drive here: the bytes go through
    page-locked host memory, as they do where GPUDirect is not installed.
    """

    _warned = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not gds_handle._warned:
            gds_handle._warned = True
            warnings.warn(
                "gds_handle moves the bytes through host memory: torch_ext does not use "
                "GPUDirect Storage",
                UserWarning,
                stacklevel=2,
            )
        super().__init__(*args, **kwargs)

    def new_pinned_device_tensor(
        self, num_elem: int, example_tenosr: torch.Tensor
    ) -> torch.Tensor:
        """A 1-D tensor of the example's dtype and device."""
        return torch.empty(num_elem, dtype=example_tenosr.dtype, device=example_tenosr.device)

    def free_pinned_device_tensor(self, tensor: torch.Tensor) -> bool:
        """True: the memory goes with the tensor."""
        return True

    def pin_device_tensor(self, tensor: torch.Tensor) -> bool:
        """True: device memory needs no pinning here."""
        return True

    def unpin_device_tensor(self, tensor: torch.Tensor) -> bool:
        """True: see ``pin_device_tensor``."""
        return True


class pin_handle:  # noqa: N801
    """DeepSpeed's allocator of page-locked CPU tensors."""

    def new_cpu_locked_tensor(
        self, num_elem: int, example_tensor: torch.Tensor
    ) -> torch.Tensor:
        """See ``aio_handle.new_cpu_locked_tensor``."""
        return _C.pinned_zeros(num_elem, example_tensor)

    def free_cpu_locked_tensor(self, locked_tensor: torch.Tensor) -> bool:
        """See ``aio_handle.free_cpu_locked_tensor``."""
        return free_cpu_locked_tensor(locked_tensor)

    def free_cpu_locked_tensor_by_ptr(self, address: int) -> bool:
        """The same for the tensor whose first byte is at ``address``."""
        return _C.disown_pinned(address)

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        """See ``aio_handle.is_pinned``."""
        return is_pinned(buffer)


def free_cpu_locked_tensor(tensor: torch.Tensor) -> bool:
    """See ``aio_handle.free_cpu_locked_tensor``."""
    return tensor.is_cpu and _C.disown_pinned(tensor.data_ptr())


def is_pinned(buffer: torch.Tensor) -> bool:
    """See ``aio_handle.is_pinned``."""
    return _C.is_pinned(buffer) or buffer.is_pinned()


def _async_and_offset(
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


def _check_offset(offset: int) -> None:
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise TypeError(f"file_offset must be an int, not {type(offset).__name__}")
    if not 0 <= offset < 2**63:
        raise ValueError(f"file_offset must be from 0 to 2^63 - 1, got {offset}")


def _checked(buffer: torch.Tensor, filename: str, offset: int) -> str | bytes:
    if not isinstance(buffer, torch.Tensor):
        raise TypeError(f"buffer must be a torch.Tensor, not {type(buffer).__name__}")
    _check_offset(offset)
    return directory_of(filename, "filename")


def _check_size(buffer: torch.Tensor, filename: str) -> None:
    path = _checked(buffer, filename, 0)
    size = os.stat(path, follow_symlinks=False).st_size
    if size != buffer.nbytes:
        raise ValueError(
            f"{os.fsdecode(path)} has {size} bytes, the buffer {buffer.nbytes}: read() takes "
            f"whole files; for a part of one use pread()"
        )


def _validate(buffer: torch.Tensor, path: str | bytes, offset: int) -> None:
    """Raises OSError unless the file holds the buffer's bytes."""
    bytes_ = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    with open(path, "rb") as file:
        for first in range(0, bytes_.numel(), _PIECE):
            expected = bytes_[first : first + _PIECE]
            file.seek(offset + first)
            found = bytearray(file.read(expected.numel()))
            if len(found) != expected.numel() or not torch.equal(
                torch.frombuffer(found, dtype=torch.uint8), expected
            ):
                raise OSError(
                    errno.EIO,
                    f"validate: bytes {offset + first} to {offset + first + expected.numel()} "
                    f"are not those of the buffer",
                    os.fsdecode(path),
                )
