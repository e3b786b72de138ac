"""Keeps the caller's torch settings from changing a result.

Two settings are met where tensors are made. Each new tensor names its dtype and its device, so
neither the default dtype nor a ``torch.device`` context decides (tests/repo holds that).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from torch_ext._native import _C


@contextlib.contextmanager
def plain_modes() -> Iterator[None]:
    """Runs a call without autograd, inference mode and autocast, whatever the caller has set.

    Raises:
        RuntimeError: As ``check_no_fake_mode``.
    """
    check_no_fake_mode()
    with _C.PlainModes():
        yield


def check_no_fake_mode() -> None:
    """Raises RuntimeError in a FakeTensorMode, in which no tensor has memory."""
    if not _len_torch_dispatch_stack():  # Nearly always, and quick.
        return
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if fake and any(
        isinstance(mode, fake.FakeTensorMode) for mode in _get_current_dispatch_mode_stack()
    ):
        raise RuntimeError(
            "torch_ext moves real bytes, and a FakeTensorMode is active, in which tensors "
            "have none: call it outside of that mode"
        )


def on_the_cpu() -> AbstractContextManager[object]:
    """Lets an optimizer class make its tensors where the pieces that it updates are.

    Whole parameters may be on the default device. Pieces of them are on the CPU.
    """
    cpu = torch.device("cpu")
    return nullcontext() if torch.get_default_device() == cpu else cpu
