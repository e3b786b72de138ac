"""Operations of an aio_handle, from their start until a call has reported them."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from typing import Any

import torch

_PIECE = 1 << 24

# What operations fail with. While one is in flight, an exception of another class
# is what the handler of a signal raised.
_Failure = (OSError, ValueError, RuntimeError, MemoryError)


class Operation:
    """One that has been started. Threads: any.

    Args:
        ticket: Of the operation; it can be waited for more than once.
        check: For ``validate`` the tensor, the file's absolute path and the offset.
    """

    __slots__ = ("_check", "_ended", "_ticket", "error")

    def __init__(self, ticket: Any, check: tuple[torch.Tensor, str, int] | None) -> None:
        self._ticket = ticket
        self._check = check
        self._ended = False
        #: What it failed with, once wait() has returned.
        self.error: Exception | None = None

    def wait(self, deadline: float | None = None) -> None:
        """Returns when it has ended, well or not.

        Raises:
            TimeoutError: At the deadline (of the monotonic clock).
            BaseException: What the handler of a signal raised, KeyboardInterrupt
                for one; the operation goes on.
        """
        # Ended or not: the current stream is to wait for the bytes.
        error = self._wait_for_ticket(deadline)
        if self._ended:
            return
        # Threads that wait at the same time may each compare: nothing may have
        # written to the file before one of them has returned.
        if error is None and self._check is not None:
            error = _difference(*self._check)
        if error is not None:
            self.error = without_frames(error)
        self._ended = True

    def _wait_for_ticket(self, deadline: float | None) -> Exception | None:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            self._ticket.wait(timeout=left)
        except TimeoutError as error:
            # Of this wait; what the system calls so is the operation's.
            if error.errno is None:
                raise
            return error
        except _Failure as error:
            return error
        except Exception as error:
            if not self._ticket.done():
                raise
            return error
        return None


class Pending:
    """Operations that no call has reported yet, oldest first. Threads: any."""

    def __init__(self, files: Any) -> None:
        self._files = files
        self._operations: list[Operation] = []
        self._lock = threading.Lock()

    def add(self, operation: Operation) -> None:
        with self._lock:
            self._operations.append(operation)

    def take(self, deadline: float | None = None) -> tuple[int, list[Exception]]:
        """Waits for what is pending now, and takes what no other thread has taken.

        Returns how many that are, and what failed of them. Cut short by an
        exception (see Operation.wait), it takes nothing.
        """
        with self._lock:
            operations = list(self._operations)
        for operation in operations:
            operation.wait(deadline)
        ended = set(operations)
        with self._lock:
            taken = [operation for operation in self._operations if operation in ended]
            failures = [operation.error for operation in taken if operation.error is not None]
            # One assignment, so that Ctrl-C leaves all of them or none.
            self._operations = [
                operation for operation in self._operations if operation not in ended
            ]
        return len(taken), failures

    def close(self) -> list[Exception]:
        """Ends everything and returns the failures that nobody has seen."""
        unseen = []
        try:
            self._files.close()
        except Exception as error:
            unseen = [without_frames(error)]
        _, failures = self.take()
        # The former is one of the latter, unless its ticket was lost on Ctrl-C.
        return failures or unseen


def without_frames(error: Exception) -> Exception:
    """The exception without what leads to stack frames, and so to tensors."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def _difference(buffer: torch.Tensor, path: str, offset: int) -> Exception | None:
    """What keeps the file from holding the buffer's bytes."""
    try:
        _compare(buffer, path, offset)
    except Exception as error:
        return error
    return None


def _compare(buffer: torch.Tensor, path: str, offset: int) -> None:
    elements = buffer.detach().resolve_conj().resolve_neg().cpu().contiguous()
    bytes_ = elements.reshape(-1).view(torch.uint8)
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
    # As the operation did. Without O_NONBLOCK a FIFO would wait for its writer.
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
