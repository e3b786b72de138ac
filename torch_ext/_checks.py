"""What the swapper, the handle and the optimizer have in common."""

from __future__ import annotations

import logging
import os
from typing import Any

_logger = logging.getLogger("torch_ext")


def directory_of(value: str | os.PathLike[str], name: str) -> str | bytes:
    """Returns the argument ``name`` as a path that the system can be asked for.

    Raises:
        TypeError: It is no path.
        ValueError: No path can look like this.
    """
    try:
        path = os.fspath(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a str or os.PathLike, not {type(value).__name__}"
        ) from None
    if not path:
        raise ValueError(f"{name} is empty; '.' is the current directory")
    if (b"\0" if isinstance(path, bytes) else "\0") in path:
        raise ValueError(f"{name} has a NUL character: {path!r}")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} has a character that no file name can have: {path!r}"
        ) from None
    return path


def engine_of(value: str) -> str:
    """Returns the argument ``engine``; the library knows the names."""
    if not isinstance(value, str):
        raise TypeError(
            f"engine must be a str such as 'auto' or 'libaio', not {type(value).__name__}"
        )
    return value.encode("utf-8", "backslashreplace").decode()


class Life:
    """Whose an object is, and whether it is closed."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._process = os.getpid()
        self.closed = False

    def check_process(self) -> None:
        """Raises RuntimeError in a forked child."""
        if self._process != os.getpid():
            raise RuntimeError(
                f"this {self._what} was created in process {self._process} and cannot be "
                f"used in a forked child; create one in the child"
            )

    def check(self) -> None:
        """Raises RuntimeError in a forked child and once closed."""
        self.check_process()
        if self.closed:
            raise RuntimeError(f"this {self._what} is closed")


def close_quietly(closable: Any, pid: int, what: str) -> None:
    """Closes what was dropped or is left at exit; errors go to the log."""
    if pid != os.getpid():
        return
    try:
        closable.close()
    except Exception:
        _logger.exception("an error that nobody waited for, found when %s was dropped", what)
