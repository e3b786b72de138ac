"""What keeps signals and threads away from work on tiles."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from torch_ext._native import _C

_P = ParamSpec("_P")
_R = TypeVar("_R")
_held = _C.HeldSignals()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch's other threads out of the calls of this one.

    Pieces are small: where the threads compete with I/O and data loaders, waiting for them
    takes ten times as long as the work. And the bits do not depend on how many there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def undisturbed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function during which no handler of a signal runs; they do when it has ended.

    For what must not be left half done, as Ctrl-C would, nor be seen so by a handler that
    saves. All handlers of the signals that came run, as Python itself runs them.
    """

    @functools.wraps(function)
    def held(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _held:
            return function(*args, **kwargs)

    return held
