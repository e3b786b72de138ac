"""Keeps signals and threads away from work on tiles."""

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
    """Keeps torch's other threads out of this thread's calls.

    Pieces are small. Where the threads compete with I/O and data loaders, waiting for them
    takes ten times as long as the work. Nor do the bits then depend on how many threads there
    are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def undisturbed(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a function during which no handler of a signal runs. They run when it has ended.

    It is for what must not be left half done by Ctrl-C, nor be seen half done by a handler that
    saves. All handlers of the signals that came run, as Python itself runs them.
    """

    @functools.wraps(function)
    def held(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _held:
            return function(*args, **kwargs)

    return held
