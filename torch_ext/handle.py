"""aio_handle: tensors to and from files by name, with DeepSpeed's calls."""

from __future__ import annotations

import logging
import reprlib
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from torch_ext._checks import engine_of
from torch_ext._closable import Closable
from torch_ext._handle_arguments import (
    async_and_offset,
    check_size,
    checked_offset,
    checked_target,
    handle_config,
)
from torch_ext._handle_operations import Operation, Pending, without_frames
from torch_ext._native import _C
from torch_ext._quiet import undisturbed
from torch_ext.config import parse_size

_logger = logging.getLogger("torch_ext")

# The errors that a file, or a value that it cannot take, gives the start of an operation.
_Refusal = (OSError, ValueError)


class aio_handle(Closable):  # noqa: N801 - DeepSpeed's name
    """Moves tensors to and from files, with the calls of DeepSpeed's aio_handle.

    Names, argument names, defaults and return values are DeepSpeed's, so code written for it
    runs unchanged. Failures are different, since every result is looked at. With ``strict`` the
    call, or ``wait()``, raises. Without, it returns -1 and adds the exception to ``errors``. No
    failure is lost: what a call that was cut short (a timeout, Ctrl-C) has found is reported by
    the next ``wait()``, or by ``close()``. Nothing is printed and nothing aborts.

    Tensors are dense and strided, on the CPU or an accelerator, of any dtype, shape and length.
    A view moves exactly its elements. Files are opened without following links (pass
    ``os.path.realpath(name)``). A file that is missing is made, with mode 0600. Files are never
    truncated, so a shorter rewrite keeps the old tail. Written bytes are not durable until the
    file is synced.

    Between an ``async_`` call and ``wait()`` a tensor may not be changed. If it is the target,
    it may not be read either. Operations on the same bytes of a file (the same path) take
    effect in the order of the calls. Others have no order.

    Threads may share a handle. A forked child may not use it (RuntimeError).

    Args:
        block_size: Bytes of one request to the disk; any number up to 1 GiB.
        queue_depth: Requests in flight for each thread.
        single_submit: Whether each request has a system call of its own.
        overlap_events: Whether the queue is refilled as requests end, not when all have ended.
        intra_op_parallelism: I/O threads.
        strict: Whether failures are raised instead of returning -1.
        host_memory: The most bytes of page-locked buffers, for tensors whose memory direct I/O
            cannot take. Less than ``block_size`` counts as ``block_size``, which one buffer
            needs.
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

    #: Failures that were not raised, oldest first. Clear the list as you like. Without
    #: ``strict``, it gets every failure but the one that close() raised. With ``strict``, it
    #: gets what a call found besides the one that it raised. The failures have no tracebacks,
    #: which would keep tensors alive.
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
        self._config = handle_config(
            block_size=block_size,
            queue_depth=queue_depth,
            single_submit=single_submit,
            overlap_events=overlap_events,
            intra_op_parallelism=intra_op_parallelism,
        )
        self._strict = bool(strict)
        self.errors = []
        self._files = _C.TensorFileTransfer(
            self._config,
            parse_size(host_memory),
            engine_of(engine),
        )
        self._pending = Pending(self._files)
        self._own(self._files, "aio_handle", self._pending)

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
        """Returns ``intra_op_parallelism * 512``, as DeepSpeed does. No call here needs it."""
        return 512 * self._config.thread_count

    def read(
        self, buffer: torch.Tensor, filename: str, validate: bool, file_offset: int = 0
    ) -> int:
        """Fills the buffer from the file. Returns 0, or -1.

        With offset 0, the file must have exactly the buffer's size.
        """
        start = self._start_read_of_all if file_offset == 0 else self._start_read
        return self._run(start, buffer, filename, file_offset, validate, self._finish_alone)

    def write(
        self, buffer: torch.Tensor, filename: str, validate: bool, file_offset: int = 0
    ) -> int:
        """Writes the buffer. Returns 0, or -1."""
        start, then = self._start_write, self._finish_alone
        return self._run(start, buffer, filename, file_offset, validate, then)

    # `async` is a keyword of Python. So it can only be given by position, or as pread(...,
    # **{"async": True}), which DeepSpeed allows as well.
    def pread(
        self, buffer: torch.Tensor, filename: str, validate: bool, *rest: Any, **named: Any
    ):
        """pread(buffer, filename, validate, async, file_offset=0)

        Starts to fill the buffer. Returns 0 with ``async``, else what ``wait()`` returns; -1 if
        it failed. With ``validate``, the bytes are read again and compared when the operation
        is waited for.
        """
        wait, offset = async_and_offset("pread", rest, named)
        then = self._finish if wait else self._leave
        return self._run(self._start_read, buffer, filename, offset, validate, then)

    def pwrite(
        self, buffer: torch.Tensor, filename: str, validate: bool, *rest: Any, **named: Any
    ):
        """pwrite(buffer, filename, validate, async, file_offset=0)

        Starts to write the buffer. Otherwise as ``pread``.
        """
        wait, offset = async_and_offset("pwrite", rest, named)
        then = self._finish if wait else self._leave
        return self._run(self._start_write, buffer, filename, offset, validate, then)

    def sync_pread(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """``async_pread``, then ``wait()``, whose count and failures are all of both."""
        start, then = self._start_read, self._finish
        return self._run(start, buffer, filename, file_offset, False, then)

    def sync_pwrite(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """``async_pwrite``, then ``wait()``, whose count and failures are all of both."""
        start, then = self._start_write, self._finish
        return self._run(start, buffer, filename, file_offset, False, then)

    def async_pread(self, buffer: torch.Tensor, filename: str, file_offset: int = 0) -> int:
        """Starts to fill the buffer. Returns 0, or -1 if that cannot work."""
        start, then = self._start_read, self._leave
        return self._run(start, buffer, filename, file_offset, False, then)

    def async_pwrite(
        self,
        buffer: torch.Tensor,
        filename: str | int | None = None,
        file_offset: int = 0,
        *,
        fd: int | None = None,
    ) -> int:
        """Starts to write the buffer. Returns 0, or -1 if that cannot work.

        A descriptor may stand in place of the file's name, or be given as ``fd``. It stays the
        caller's, who keeps it open until ``wait()``.
        """
        if (filename is None) == (fd is None):
            raise TypeError("async_pwrite() needs a filename or an fd")
        target = fd if filename is None else filename
        is_fd = isinstance(target, int) and not isinstance(target, bool)
        start = self._start_write_fd if is_fd else self._start_write
        return self._run(start, buffer, target, file_offset, False, self._leave)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for all that is pending. Returns how many operations that was, or 0.

        Operations that start meanwhile belong to the next call. If an operation has failed, it
        returns -1 and adds to ``errors``. A strict handle raises the first failure and adds the
        others.

        It raises TimeoutError after ``timeout`` seconds, and KeyboardInterrupt on Ctrl-C. Then
        everything stays pending and goes on. The next call also counts what had ended, and
        reports what had failed. A file that ``validate`` compares is read to its end, whatever
        the timeout. If several threads wait at the same time, only one of them counts and
        reports an operation.

        Raises:
            TypeError, ValueError: ``timeout`` is neither None nor a number >= 0.
        """
        self._life.check()
        seconds = _C.to_seconds(timeout)
        self._log_notes()
        ended = self._pending.wait(seconds)
        try:
            return self._report(ended)
        finally:
            self._files.drop_deleted()

    def new_cpu_locked_tensor(
        self, num_elem: int, example_tenosr: torch.Tensor
    ) -> torch.Tensor:
        """Returns a 1-D CPU tensor of the example's dtype, aligned to a page.

        It is page-locked where there is a GPU. Its memory goes with its last reference.
        """
        return new_cpu_locked_tensor(num_elem, example_tenosr)

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Forgets a tensor that ``new_cpu_locked_tensor`` made. False if it is none.

        I/O in flight and other views keep the memory until they are gone.
        """
        return free_cpu_locked_tensor(tensor)

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        """Whether the buffer is page-locked by PyTorch, or lies in a tensor that
        ``new_cpu_locked_tensor`` of any handle made.
        """
        return is_pinned(buffer)

    def stats(self) -> dict[str, int]:
        """Returns counters since the handle was made.

        They are ``bytes_read`` and ``bytes_written`` (of operations that ended well),
        ``operations``, ``failures``, ``in_flight``, ``host_bytes`` (of buffers),
        ``host_bytes_peak``, and ``descriptors`` (open now).
        """
        self._life.check_process()
        return self._files.stats()

    @undisturbed
    def close(self) -> None:
        """Waits for all operations, then frees memory and descriptors. May be called again.

        Raises:
            Exception: The first failure that no call has reported, strict or not. The others
                are added to ``errors``. Everything is closed then.
        """
        self._life.check_process()
        self._life.closed = True
        self._log_notes()
        failures = self._pending.close()
        if failures:
            self._raise_first(failures)

    def _start_read_of_all(
        self,
        operation: Operation,
        buffer: torch.Tensor,
        filename: str,
        offset: int,
        validate: bool,
    ) -> None:
        check_size(buffer, filename)
        self._start_read(operation, buffer, filename, offset, validate)

    def _start_read(
        self,
        operation: Operation,
        buffer: torch.Tensor,
        filename: str,
        offset: int,
        validate: bool,
    ) -> None:
        path, offset = checked_target(buffer, filename, offset, validate)
        check = (buffer, path, offset) if validate else None
        operation.start(self._files.read, path, offset, buffer, check)

    def _start_write(
        self,
        operation: Operation,
        buffer: torch.Tensor,
        filename: str,
        offset: int,
        validate: bool,
    ) -> None:
        path, offset = checked_target(buffer, filename, offset, validate)
        check = (buffer, path, offset) if validate else None
        operation.start(self._files.write, path, offset, buffer, check)

    def _start_write_fd(
        self, operation: Operation, buffer: torch.Tensor, fd: int, offset: int, _validate: bool
    ) -> None:
        operation.start(self._files.write_fd, fd, checked_offset(offset), buffer)

    def _run(
        self,
        start: Callable[..., None],
        buffer: torch.Tensor,
        target: str | int,
        offset: int,
        validate: bool,
        then: Callable[[Operation], int],
    ) -> int:
        self._life.check()
        operation = Operation()
        try:
            if not self._begin(operation, start, buffer, target, offset, validate):
                return -1
            return then(operation)
        except BaseException:
            if operation.started and not operation.reported:
                # A signal's handler raised. The next wait() has to know of what goes on.
                self._pending.add(operation)
            raise

    @undisturbed  # A handler's exception is no refusal.
    def _begin(self, operation: Operation, start: Callable[..., None], *arguments: Any) -> bool:
        """Returns whether it has started. If not, its failure is reported."""
        try:
            start(operation, *arguments)
        except _Refusal as error:
            if self._strict or operation.started:
                raise
            self.errors.append(without_frames(error))
        return operation.started

    def _leave(self, operation: Operation) -> int:
        self._pending.add(operation)
        return 0

    def _finish_alone(self, operation: Operation) -> int:
        operation.wait()
        return min(0, self._report([], operation))

    def _finish(self, operation: Operation) -> int:
        operation.wait()
        return self._report(self._pending.wait(), operation)

    @undisturbed  # What is taken must be reported.
    def _report(self, ended: list[Operation], own: Operation | None = None) -> int:
        count, failures = self._pending.take(ended, own)
        if not failures:
            return count
        if self._strict:
            self._raise_first(failures)
        self.errors.extend(failures)
        return -1

    def _raise_first(self, failures: list[Exception]) -> NoReturn:
        error = failures.pop(0)
        self.errors.extend(failures)
        try:
            raise error
        finally:
            # Frames that its traceback leads to lead back to it. They would keep the caller's
            # tensors until the collector finds them.
            del error


class gds_handle(aio_handle):  # noqa: N801
    """An ``aio_handle`` under the name of DeepSpeed's GPUDirect Storage handle.

    There is no direct path between GPU and drive here. The bytes go through page-locked host
    memory, as they do where GPUDirect is not installed.
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
        """Returns a 1-D tensor of the example's dtype and device."""
        return torch.empty(num_elem, dtype=example_tenosr.dtype, device=example_tenosr.device)

    def free_pinned_device_tensor(self, tensor: torch.Tensor) -> bool:
        """Returns True. The memory goes with the tensor."""
        return True

    def pin_device_tensor(self, tensor: torch.Tensor) -> bool:
        """Returns True. Device memory needs no pinning here."""
        return True

    def unpin_device_tensor(self, tensor: torch.Tensor) -> bool:
        """Returns True. See ``pin_device_tensor``."""
        return True


class pin_handle:  # noqa: N801
    """DeepSpeed's allocator of page-locked CPU tensors."""

    def new_cpu_locked_tensor(
        self, num_elem: int, example_tensor: torch.Tensor
    ) -> torch.Tensor:
        """See ``aio_handle.new_cpu_locked_tensor``."""
        return new_cpu_locked_tensor(num_elem, example_tensor)

    def free_cpu_locked_tensor(self, locked_tensor: torch.Tensor) -> bool:
        """See ``aio_handle.free_cpu_locked_tensor``."""
        return free_cpu_locked_tensor(locked_tensor)

    def free_cpu_locked_tensor_by_ptr(self, address: int) -> bool:
        """As ``free_cpu_locked_tensor``, for the tensor whose first byte is at ``address``."""
        return _C.disown_pinned(address)

    def is_pinned(self, buffer: torch.Tensor) -> bool:
        """See ``aio_handle.is_pinned``."""
        return is_pinned(buffer)


def new_cpu_locked_tensor(num_elem: int, example: torch.Tensor) -> torch.Tensor:
    """See ``aio_handle.new_cpu_locked_tensor``."""
    if not isinstance(example, torch.Tensor):
        raise TypeError(
            f"new_cpu_locked_tensor() takes the dtype from a tensor, such as "
            f"torch.empty(0, dtype=torch.bfloat16), not from {reprlib.repr(example)}"
        )
    return _C.pinned_zeros(num_elem, example)


def free_cpu_locked_tensor(tensor: torch.Tensor) -> bool:
    """See ``aio_handle.free_cpu_locked_tensor``."""
    return tensor.is_cpu and _C.disown_pinned(tensor.data_ptr())


def is_pinned(buffer: torch.Tensor) -> bool:
    """See ``aio_handle.is_pinned``."""
    return _C.is_pinned(buffer) or buffer.is_pinned()
