"""Blocks whose parameters are kept while they run: ``offload(..., hold=...)``.

A kernel that takes addresses itself, such as one of torch.compile, is no operator that brings
what it needs. Hooks bring it for a whole block instead. They are on the block's forward, and on
the gradients of what it returned, which come just before its backward. Autograd runs first what
was recorded last. So a block's backward is over when that of another block begins.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch.utils.hooks import RemovableHandle

from torch_ext._native import _C

#: A tensor, and the node of the graph that has made it.
_Graph: TypeAlias = "tuple[int, torch.autograd.graph.Node | None]"

#: Smaller parameters are not offloaded.
_SMALLEST = 64 << 10
#: What ``hold`` may name: a class of modules, its name, or the name of a module in the model.
Blocks: TypeAlias = "type[torch.nn.Module] | str"


def blocks_of(
    model: torch.nn.Module, hold: Blocks | Iterable[Blocks] | None
) -> list[torch.nn.Module]:
    """The modules that ``hold`` names, each once.

    Raises:
        TypeError: It names something that is neither a class of modules nor a string.
        ValueError: It names what the model does not have.
    """
    if hold is None:
        return []
    wanted = [hold] if isinstance(hold, (str, type)) else list(hold)
    modules = dict(model.named_modules())
    blocks: dict[torch.nn.Module, None] = {}
    for each in wanted:
        if isinstance(each, str):
            found = [
                module
                for name, module in modules.items()
                if each in (name, type(module).__name__)
            ]
        elif isinstance(each, type) and issubclass(each, torch.nn.Module):
            found = [module for module in modules.values() if isinstance(module, each)]
        else:
            raise TypeError(
                f"hold must name modules or be classes of modules, not {each!r} "
                f"({type(each).__name__})"
            )
        if not found:
            name = each if isinstance(each, str) else each.__name__
            raise ValueError(
                f"hold: the model has no module, nor a class of one, named {name!r}"
            )
        blocks.update(dict.fromkeys(found))
    return list(blocks)


def check_room(model: torch.nn.Module, blocks: list[torch.nn.Module], host_memory: int) -> None:
    """Raises ValueError if the parameters of a block do not fit into host memory."""
    for name, block in model.named_modules():
        if block not in blocks:
            continue
        sizes = [parameter.nbytes for parameter in block.parameters()]
        needed = sum(size for size in sizes if size >= _SMALLEST)
        if needed > host_memory:
            raise ValueError(
                f"host_memory must be at least {needed:,}, since hold= keeps all parameters of "
                f"{name or 'the model'!r} together; got {host_memory:,}"
            )


class HeldBlocks:
    """The hooks of one model, and what they keep now.

    Args:
        blocks: The modules.
        gather: Returns a context manager that keeps the parameters of a module in a pass.

    Threads: any; two threads may use the model.
    """

    def __init__(
        self,
        blocks: Sequence[torch.nn.Module],
        gather: Callable[[torch.nn.Module, _C.ModelPass], AbstractContextManager[None]],
    ) -> None:
        self._gather = gather
        self._mutex = threading.Lock()
        #: What a backward pass keeps, by the number that autograd gave the pass.
        self._backward: dict[int, _Kept] = {}
        self._forward = threading.local()
        self._handles: list[RemovableHandle] = []
        if not blocks:
            return
        begin, end = (_Hook(torch.compiler.disable(hook)) for hook in (self._begin, self._end))
        for block in blocks:
            self._handles.append(
                block.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
            )
            self._handles.append(block.register_forward_hook(end, always_call=True))

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def drop_failed(self) -> None:
        """Lets go of what backward passes have kept that ended by an error."""
        if _backward_pass() >= 0:
            return
        here = threading.current_thread()
        with self._mutex:
            failed = [
                number
                for number, kept in self._backward.items()
                if kept.thread is here or not kept.thread.is_alive()
            ]
            kept = [self._backward.pop(number) for number in failed]
        for each in kept:
            each.release()

    def _begin(self, block: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self.drop_failed()
        if self._is_inside_another(block):
            return
        recomputes = _backward_pass() >= 0
        in_pass = _C.ModelPass.BACKWARD if recomputes else _C.ModelPass.FORWARD
        kept = _Kept(self._gather(block, in_pass))
        inputs = [_graph_of(tensor) for tensor in _tensors_in([args, kwargs])]
        self._running().append(_Call(block, kept, inputs))

    def _end(self, block: torch.nn.Module, args: Any, output: Any) -> None:
        running = self._running()
        # Called after an error too, which may be that of _begin().
        if not running or running[-1].block is not block:
            return
        call = running.pop()
        call.kept.release()
        this = object()
        for tensor in _tensors_in(output):
            # The gradient of what the block passes on unchanged comes after its backward.
            if tensor.grad_fn is not None and _graph_of(tensor) not in call.inputs:
                tensor.register_hook(functools.partial(self._begin_backward, block, this))

    def _is_inside_another(self, block: torch.nn.Module) -> bool:
        """The outer block keeps its parameters until its own end, also on the way back."""
        return any(inner is block for call in self._running() for inner in call.block.modules())

    def _running(self) -> list[_Call]:
        """Blocks whose forward runs on this thread, the innermost last."""
        if not hasattr(self._forward, "running"):
            self._forward.running = []
        running: list[_Call] = self._forward.running
        return running

    def _begin_backward(self, block: torch.nn.Module, call: object, gradient: Any) -> None:
        number = _backward_pass()
        with self._mutex:
            before = self._backward.get(number)
            if before is not None and before.call is call:
                return
            self._backward.pop(number, None)
        if before is None:
            # When the pass ends. After an error it is not called.
            torch.autograd.Variable._execution_engine.queue_callback(
                functools.partial(self._end_backward, number)
            )
        else:
            before.release()
        kept = _Kept(self._gather(block, _C.ModelPass.BACKWARD), call)
        with self._mutex:
            self._backward[number] = kept

    def _end_backward(self, number: int) -> None:
        with self._mutex:
            kept = self._backward.pop(number, None)
        if kept is not None:
            kept.release()


class _Kept:
    """Parameters that are kept from now until release()."""

    def __init__(self, gathered: AbstractContextManager[None], call: object = None) -> None:
        self._gathered = gathered
        #: The call of the block whose backward needs them.
        self.call = call
        self.thread = threading.current_thread()
        gathered.__enter__()

    def release(self) -> None:
        self._gathered.__exit__(None, None, None)


@dataclass
class _Call:
    """A call of a block's forward that runs."""

    block: torch.nn.Module
    kept: _Kept
    inputs: list[_Graph]


class _Hook:
    """A hook of a module. A copy of the model, which is not offloaded, gets an idle one."""

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> None:
        self._run(*args)

    @property
    def __name__(self) -> str:
        # What torch.jit.script asks for first.
        raise AttributeError(
            "a model that was offloaded with hold= has hooks, which torch.jit.script cannot "
            "take: offload it without hold="
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        idle = contextlib.nullcontext().__exit__
        return functools.partial, (idle,), (idle, (), {}, None)


def _backward_pass() -> int:
    """The number of the backward pass that this thread is in; -1 if it is in none."""
    return torch._C._current_graph_task_id()


def _graph_of(tensor: torch.Tensor) -> _Graph:
    """Differs for a tensor that was changed in place meanwhile."""
    return id(tensor), tensor.grad_fn


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors_in(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_in(getattr(value, field.name, None))
