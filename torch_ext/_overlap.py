"""Gradients that an optimizer takes while backward goes on."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torch_ext._local import local_of
from torch_ext._native import _C

_MODES = (False, "prefetch", "update")

_TAKEN = (
    "{} on a gradient that OffloadedAdamW has taken during backward, with "
    'overlap_backward="update". Call backward once before step() and zero_grad(), '
    "earlier ones inside `with optimizer.accumulate():`. To clip, pass "
    "max_grad_norm to the optimizer; with a GradScaler, or to look at gradients, use "
    'overlap_backward="prefetch". If backward was interrupted, step() ends the step'
)


def overlap_of(value: bool | str) -> bool | str:
    """Returns the argument ``overlap_backward``.

    Raises:
        ValueError: It is none of the modes.
    """
    if value is False or (isinstance(value, str) and value in _MODES):
        return value
    raise ValueError(f'overlap_backward must be False, "prefetch" or "update", got {value!r}')


class TakenGradient(Tensor):
    """Stands where a gradient was that the optimizer has taken: any use raises.

    Without it ``clip_grad_norm_`` would find no gradient, return 0 and clip nothing.
    """

    @staticmethod
    def __new__(cls, parameter: Tensor) -> TakenGradient:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            parameter.size(),
            strides=parameter.stride(),
            dtype=_assignable_dtype(parameter),
            device=parameter.device,
        )

    def __init__(self, parameter: Tensor) -> None:
        pass

    @staticmethod
    def zeros_instead(parameter: Tensor) -> Tensor:
        """A gradient of zeros."""
        dtype = _assignable_dtype(parameter)
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)

    def data_ptr(self) -> int:
        raise RuntimeError(_TAKEN.format("data_ptr()"))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"TakenGradient(size={tuple(self.size())})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(_TAKEN.format(function))


class Overlap:
    """Calls ``take(parameter)`` for each gradient that is final in a backward pass.

    A hook that comes later may change it still, as ``DistributedDataParallel``'s do: then
    ``take`` is not called, and with ``must`` backward raises RuntimeError. Nor is it called
    for a gradient in page-locked memory, to which its copy from a device may be on its way
    until backward ends, as with FSDP2's ``CPUOffloadPolicy``: ``step()`` takes it.
    """

    def __init__(self, take: Callable[[Tensor], None], must: bool) -> None:
        # Parameters hold their hooks, and may outlive the optimizer.
        self._take = weakref.WeakMethod(take)
        self._must = must
        # PyTorch calls hooks on a thread for each device.
        self._lock = threading.Lock()
        self._handles: list[Any] = []
        # Parameters may outlive the optimizer.
        weakref.finalize(self, _remove, self._handles).atexit = False
        self._accumulating = 0
        self.taken: set[Tensor] = set()

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Hooks those that are trained; ``step()`` finds the gradients of others."""
        hook = _Hook(self)
        for parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf:
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def stop(self) -> None:
        _remove(self._handles)

    def on_gradient(self, parameter: Tensor) -> None:
        if self._accumulating:
            return
        take = self._take()
        if take is None:
            return
        if _C.may_change_later(parameter):
            if not self._must:
                return
            raise RuntimeError(
                "a hook, such as DistributedDataParallel's, changes gradients after backward "
                'has accumulated them, which overlap_backward="update" would not see: take '
                '"prefetch" or False, or FSDP2'
            )
        if parameter in self.taken:
            raise RuntimeError(
                "a second backward pass before step(): its gradient would not be counted. "
                "All but the last go inside `with optimizer.accumulate():`. If backward was "
                "interrupted, step() ends the step with what it had taken, and zero_grad() "
                "drops the rest"
            )
        if parameter.is_cpu and local_of(parameter.grad).is_pinned():
            return
        with self._lock:
            take(parameter)


def _assignable_dtype(parameter: Tensor) -> torch.dtype:
    """Of a gradient; the one that is there may have another, by ``.data``."""
    if not parameter.is_leaf:
        return parameter.dtype
    return parameter.grad_dtype or parameter.grad.dtype


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


class _Hook:
    """Keeps neither the optimizer nor what it owns alive."""

    def __init__(self, overlap: Overlap) -> None:
        self._overlap = weakref.ref(overlap)

    def __call__(self, parameter: Tensor) -> None:
        overlap = self._overlap()
        if overlap is not None:
            overlap.on_gradient(parameter)


def version_of(parameter: Tensor) -> int:
    """What grows when others than the update write to it; on the CPU, where one can tell."""
    return parameter._version if parameter.is_cpu and not parameter.is_inference() else 0


def with_gradient(group: dict[str, Any]) -> list[Tensor]:
    """The parameters of a group that have a gradient which was not taken."""
    return [
        p
        for p in group["params"]
        if p.grad is not None and not isinstance(p.grad, TakenGradient)
    ]
