"""Takes gradients for an optimizer while backward goes on."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward

from torch_ext._quiet import undisturbed

_MODES = (False, "prefetch", "update")

_TAKEN = (
    "{} on a gradient that OffloadedAdamW has taken during backward, with "
    'overlap_backward="update". Call backward once before step() and zero_grad(), '
    "earlier ones inside `with optimizer.accumulate():`. To clip, pass "
    "max_grad_norm to the optimizer; with a GradScaler, or to look at gradients, or where "
    "gradients come in parts, as with activation checkpointing of your own, use "
    'overlap_backward="prefetch". If backward was interrupted, step() ends the step'
)

_READ = (
    "{} on a parameter that OffloadedAdamW is updating, as it does from its gradient in "
    'backward to the end of step() with overlap_backward="update": its values may be half '
    "updated. Use it after step(); all passes of a step but the last go inside `with "
    "optimizer.accumulate():`. If activation checkpointing (or a Function of your own) "
    "recomputes in backward what reads a parameter but needs no gradient for it, as "
    'weight.detach(), use overlap_backward="prefetch". If backward was interrupted, step() '
    "ends the step, and rollback(), load_state_dict() or close() of the optimizer gives it up"
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
    """Stands in place of a gradient that the optimizer has taken. Any use raises.

    Without it, ``clip_grad_norm_`` would find no gradient, return 0 and clip nothing.
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
        """Returns a gradient of zeros."""
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


# These do not touch the values of a parameter. ``.data``, ``.T`` and the like lead to them.
_HARMLESS = {
    accessor
    for name, attribute in vars(torch._C.TensorBase).items()
    if isinstance(attribute, GetSetDescriptorType)
    and name not in ("data", "real", "imag", "T", "mT", "H", "mH")
    for accessor in (attribute.__get__, attribute.__set__, attribute.__delete__)
} | {
    *(Tensor.dim, Tensor.ndimension, Tensor.size, Tensor.stride, Tensor.numel, Tensor.nelement),
    *(Tensor.__len__, Tensor.storage_offset, Tensor.element_size, Tensor.is_contiguous),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_inference, Tensor.get_device),
    *(Tensor.register_hook, Tensor.register_post_accumulate_grad_hook),
    *(Tensor.requires_grad_, Tensor.retain_grad),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_inference),
    *(torch.empty_like, torch.zeros_like, torch.ones_like),
}


def _refuse(
    cls: type[Tensor], function: Any, types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    if function not in _HARMLESS:
        name = torch.overrides.resolve_name(function) or function
        raise RuntimeError(_READ.format(name))
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **(kwargs or {}))


def _guarded(kind: Any) -> Any:
    return type(kind)(
        f"Taken{kind.__name__}", (kind,), {"__torch_function__": classmethod(_refuse)}
    )


# A parameter becomes one of these while it is updated: any use of its values in Python raises.
_GUARDED = {kind: _guarded(kind) for kind in (Tensor, torch.nn.Parameter)}


def is_nested() -> bool:
    """Whether the backward of a ``Function`` has begun a backward pass."""
    # The thread that calls a hook is not always the one that began the pass.
    for frame in sys._current_frames().values():
        runs = False
        while frame is not None:
            if runs and frame.f_code in _WITHIN:
                return True
            runs = runs or frame.f_code is _RUN
            frame = frame.f_back
    return False


_RUN = _engine_run_backward.__code__
_WITHIN = {_RUN} | {  # The second came with torch 2.15.
    getattr(BackwardCFunction, name).__code__
    for name in ("apply", "apply_boxed")
    if hasattr(BackwardCFunction, name)
}


class Overlap:
    """Calls ``hook(parameter)`` for each gradient that a backward pass accumulates.

    csrc/tensor/backward_step.h says what becomes of it.
    """

    def __init__(self, hook: Callable[[Tensor], None], backward: Any) -> None:
        self._hook = _weak(hook)
        # PyTorch calls hooks on a thread for each device.
        self._lock = threading.Lock()
        self._handles: dict[int, Any] = {}  # By id, which its parameter keeps in use.
        self._accumulating = 0
        # Parameters may outlive the optimizer.
        weakref.finalize(self, _let_go, self._handles, backward).atexit = False

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Hooks the parameters that are trained. ``step()`` finds the gradients of others."""
        hook = _weak(self.on_gradient)
        for parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf:
                handle = parameter.register_post_accumulate_grad_hook(hook)
                self._handles[id(parameter)] = handle

    def unwatch(self, parameter: Tensor) -> None:
        if (handle := self._handles.pop(id(parameter), None)) is not None:
            handle.remove()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def stop(self) -> None:
        _remove(self._handles)

    @staticmethod
    def mark(parameter: Tensor) -> None:
        """Puts a mark in place of a gradient that was taken, and guards its parameter."""
        parameter.grad = TakenGradient(parameter)
        # Parameters of other classes are left as they are.
        parameter.__class__ = _GUARDED.get(type(parameter), type(parameter))

    @staticmethod
    def release(taken: Iterable[Tensor]) -> None:
        """Takes the guards away."""
        for parameter in taken:
            if type(parameter) in _GUARDED.values():
                parameter.__class__ = type(parameter).__base__

    @undisturbed  # The offload and the marks have to agree.
    def on_gradient(self, parameter: Tensor) -> None:
        if not self._accumulating:
            with self._lock:
                self._hook(parameter)


def _assignable_dtype(parameter: Tensor) -> torch.dtype:
    """Returns the dtype that a gradient may have. By ``.data`` it may have got another one."""
    if not parameter.is_leaf:
        return parameter.dtype
    return parameter.grad_dtype or parameter.grad.dtype


def _remove(handles: dict[int, Any]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()


def _let_go(handles: dict[int, Any], backward: Any) -> None:
    _remove(handles)
    Overlap.release(backward.reset())


def _weak(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Makes a hook that keeps nothing alive. Parameters hold it, and may outlive the rest."""
    known = weakref.WeakMethod(method)

    def hook(parameter: Tensor) -> None:
        if (found := known()) is not None:
            found(parameter)

    return hook


def with_gradient(group: dict[str, Any]) -> list[Tensor]:
    """Returns the parameters of a group that have a gradient which was not taken."""
    return [
        p
        for p in group["params"]
        if p.grad is not None and not isinstance(p.grad, TakenGradient)
    ]
