"""What keeps signals and threads away from work on tiles."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch


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


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Runs the handlers of signals that come in the meantime at the end.

    For what is written in Python and must not be left half done, as Ctrl-C would.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Handlers run in the main thread.
        return
    came: list[tuple[int, FrameType | None]] = []
    handlers = {}
    try:
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, lambda n, frame: came.append((n, frame)))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in came:
            handlers[number](number, frame)
