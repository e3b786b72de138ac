"""Operations of an aio_handle, from their start until a call has reported them."""

from __future__ import annotations

import errno
import os
import queue
import stat
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from torch_ext._bytes import bytes_view
from torch_ext._quiet import undisturbed

_PIECE = 1 << 24


class Operation:
    """One operation, from before its start until it is reported. Threads: any.

    Signal handlers may raise anything at any line of Python. What they raise must neither pass
    for the operation's failure nor lose the operation. So the compiled module puts tickets into
    a list, and returns failures. And handlers wait while operations are started, and while they
    are taken and reported.
    """

    __slots__ = ("_check", "_ended", "_tickets", "error", "reported")

    def __init__(self) -> None:
        self._check: tuple[torch.Tensor, str, int] | None = None
        self._ended = False
        self._tickets: list[Any] = []
        #: Its failure, from when wait() has returned until it is reported.
        self.error: Exception | None = None
        #: Whether a call has taken it to report it.
        self.reported = False

    def start(
        self,
        call: Callable[..., None],
        target: str | bytes | int,
        offset: int,
        buffer: torch.Tensor,
        check: tuple[torch.Tensor, str, int] | None = None,
    ) -> None:
        """Starts the operation by a call of the compiled module.

        Args:
            check: For ``validate``: the tensor, the file's absolute path and the offset.
        """
        self._check = check
        call(target, offset, buffer, self._tickets)

    @property
    def started(self) -> bool:
        return bool(self._tickets)

    def wait(self, deadline: float | None = None) -> None:
        """Returns when the operation has ended, well or not.

        Raises:
            TimeoutError: At the deadline, which is of the monotonic clock.
            BaseException: What the handler of a signal raised, such as KeyboardInterrupt. The
                operation goes on.
        """
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        # This is called even if it has ended: the current stream has to wait for the bytes.
        error = self._tickets[0].outcome(timeout=left)
        if self._ended:
            return
        # Threads that wait at the same time may each compare. Nothing may write to the file
        # before one of them has returned.
        if error is None and self._check is not None:
            error = _difference(*self._check)
        if error is not None:
            self.error = without_frames(error)
        self._ended = True


class Pending:
    """Operations that no call has reported yet, oldest first. Threads: any."""

    def __init__(self, files: Any) -> None:
        self._files = files
        self._operations: dict[Operation, None] = {}
        self._lock = threading.Lock()

    @undisturbed  # An exception where the lock is given back would keep it.
    def add(self, operation: Operation) -> None:
        """Adds an operation. Adding it twice changes nothing."""
        with self._lock:
            self._operations[operation] = None

    def wait(self, timeout: float | None = None) -> list[Operation]:
        """Waits for what is pending now, and returns it. See Operation.wait."""
        deadline = None if timeout is None else time.monotonic() + timeout
        operations = self._all()
        for operation in operations:
            operation.wait(deadline)
        return operations

    @undisturbed  # As in add().
    def _all(self) -> list[Operation]:
        with self._lock:
            return list(self._operations)

    def take(
        self, ended: list[Operation], own: Operation | None = None
    ) -> tuple[int, list[Exception]]:
        """Takes those that no other thread has taken, and ``own``, which never was pending.

        Returns how many there are, and their failures, which nobody else reports.
        """
        wanted = set(ended)
        with self._lock:
            taken = [operation for operation in self._operations if operation in wanted]
            self._operations = {
                operation: None for operation in self._operations if operation not in wanted
            }
        if own is not None:
            taken.append(own)
        failures = [operation.error for operation in taken if operation.error is not None]
        for operation in taken:
            operation.reported = True
            operation.error = None  # Frames behind a failure hold the operation.
        return len(taken), failures

    def close(self) -> list[Exception]:
        """Ends everything. Returns the failures that nobody has seen."""
        unseen = []
        try:
            self._files.close()
        except Exception as error:
            unseen = [without_frames(error)]
        _, failures = self.take(self.wait())
        # The error of close() is one of the failures, unless its ticket was lost on Ctrl-C.
        return failures or unseen


def without_frames(error: Exception) -> Exception:
    """Returns the exception without what leads to stack frames, and so to tensors."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def _difference(buffer: torch.Tensor, path: str, offset: int) -> Exception | None:
    """Compares the file with the buffer's bytes. Returns what is wrong, or None."""
    found: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    stream = None if buffer.is_cpu else torch.accelerator.current_stream(buffer.device)

    def compare() -> None:
        try:
            if stream is not None:
                torch.accelerator.set_stream(stream)
            _compare(buffer, path, offset)
        except Exception as error:
            found.put(error)
        else:
            found.put(None)

    # Handlers of signals run only on the main thread. So what is raised on another thread comes
    # from the comparison.
    threading.Thread(target=compare, daemon=True).start()
    return found.get()


def _compare(buffer: torch.Tensor, path: str, offset: int) -> None:
    elements = buffer.detach().resolve_conj().resolve_neg().cpu().contiguous()
    bytes_ = bytes_view(elements)
    with open(path, "rb", opener=_open) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "validate: not a regular file", path)
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
                    path,
                )


def _open(path: str, _flags: int) -> int:
    # Opens the file as the operation did. Without O_NONBLOCK a FIFO would wait for its writer.
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        # It was no link before, or the operation would have been refused.
        text = "validate: the file has been replaced by a link, which is not followed"
        raise OSError(errno.ELOOP, text, path) from None
