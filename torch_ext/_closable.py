"""What swapper, handle and optimizers have in common: a process, notes and an end."""

from __future__ import annotations

import logging
import os
import weakref
from types import TracebackType
from typing import Any, TypeVar

_logger = logging.getLogger("torch_ext")
_Self = TypeVar("_Self", bound="Closable")


class Life:
    """Which process an object belongs to, and whether it is closed."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._process = os.getpid()
        self.closed = False

    def check_process(self) -> None:
        """Raises RuntimeError in a forked child."""
        if self._process != os.getpid():
            raise RuntimeError(
                f"this {self._what} was created in process {self._process} and cannot be "
                f"used in a forked child; create one in the child. There PyTorch's own "
                f"operators wait for threads of the parent for ever: call "
                f"torch.set_num_threads(1) first, or start it with the method 'spawn'"
            )

    def check(self) -> None:
        """Raises RuntimeError in a forked child and once closed."""
        self.check_process()
        if self.closed:
            raise RuntimeError(f"this {self._what} is closed")


class Closable:
    """An object around one of ``_C``, which has notes for the log.

    It belongs to its process until ``close()``, which a subclass has. It is a context manager.
    """

    _life: Life
    #: Said when somebody wants to copy or pickle it.
    _instead = ""

    def _own(self, compiled: Any, what: str, closable: Any = None) -> None:
        """Called at construction. ``closable`` is closed at the end, or else ``compiled``."""
        self._life = Life(what)
        self._notes_of = compiled.notes
        self._notes_logged = 0
        self._log_notes()
        # At exit, the I/O must have ended before the interpreter is taken down.
        self._finalizer = weakref.finalize(
            self, close_quietly, closable or compiled, os.getpid(), _named(self)
        )

    def _log_notes(self) -> None:
        notes = self._notes_of()
        log_notes(notes[self._notes_logged :])
        self._notes_logged = len(notes)

    def __enter__(self: _Self) -> _Self:
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
            # The body's own exception says more than one that followed from it.
            if error is None:
                raise
            _logger.exception("closing %s after another error", _named(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{_named(self)} belongs to its process and cannot be copied or "
            f"pickled{self._instead}"
        )


def _named(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


_engines_logged: set[str] = set()


def log_notes(notes: list[str]) -> None:
    """Logs what the library notes, as warnings.

    The engine that was chosen is logged once, at the level INFO if it is the first choice.
    """
    for note in notes:
        if not note.startswith("I/O engine "):
            _logger.warning("%s", note)
        elif note not in _engines_logged:
            _engines_logged.add(note)
            level = logging.WARNING if " instead of " in note else logging.INFO
            _logger.log(level, "%s", note)


def close_quietly(closable: Any, pid: int, what: str) -> None:
    """Closes what was dropped or is left at exit. Errors go to the log.

    ``closable.close()`` raises an error, or returns several.
    """
    if pid != os.getpid():
        return
    try:
        errors = closable.close() or ()
    except Exception as error:
        errors = (error,)
    for error in errors:
        _logger.error(
            "an error that nobody waited for, found when %s was dropped", what, exc_info=error
        )
