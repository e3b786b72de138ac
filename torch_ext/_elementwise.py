"""An optimizer class of torch, run on pieces of parameters if it can be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_ext._modes import on_the_cpu, plain_modes

State = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """What a class keeps of each parameter."""

    #: Tensors with something for every element: one of no elements for each.
    fields: dict[str, Tensor]
    #: All names in the class's order, with a value where it is no field.
    names: dict[str, Any]
    #: Whether it is there before the first step.
    from_start: bool
    #: Torch's default dtype then, in which a class may make tensors.
    default_dtype: torch.dtype

    def same(self, other: Kept) -> bool:
        dtypes = [{k: f.dtype for k, f in kept.fields.items()} for kept in (self, other)]
        return dtypes[0] == dtypes[1] and self.names.keys() == other.names.keys()

    def goes_on_as(self, other: Kept) -> bool:
        """Whether a step finds in this state what it expects, ``other``. A state that was
        made in another default dtype stays in it.
        """
        if self.default_dtype == other.default_dtype:
            return self.same(other)
        return (self.fields.keys(), self.names.keys()) == (
            other.fields.keys(),
            other.names.keys(),
        )


class Piece:
    """Elements of one parameter, in float32 on the CPU, with their gradient and state."""

    __slots__ = ("parameter", "state", "values")

    def __init__(self, values: Tensor, gradient: Tensor | None, state: State | None) -> None:
        self.values = values
        self.parameter = values.detach().requires_grad_()
        self.parameter.grad = gradient
        #: None before the first step.
        self.state = state

    def finish(self, state: State) -> None:
        self.state = state
        if self.parameter.data_ptr() != self.values.data_ptr():
            self.values.copy_(self.parameter)  # It was given other memory: p.data = ...


class PieceOptimizer:
    """One optimizer for pieces of parameters that come and go."""

    def __init__(self, optimizer_class: type[torch.optim.Optimizer], options: State) -> None:
        self._class = optimizer_class
        self._options = options
        with plain_modes(), on_the_cpu():
            some = torch.zeros(1, 1, dtype=torch.float32, device="cpu", requires_grad=True)
            self._optimizer = optimizer_class([some], **options)
        self._kept: dict[Any, Kept] = {}
        self.name = optimizer_class.__name__
        self.defaults = dict(self._optimizer.defaults)

    def update(self, options: State, pieces: list[Piece]) -> None:
        """A step of pieces that all have state or all have none."""
        parameters = [piece.parameter for piece in pieces]
        if pieces[0].state is None:
            optimizer = self._made(options, parameters)
        else:
            optimizer = self._optimizer
            optimizer.param_groups = [{**options, "params": parameters}]
            optimizer.state = defaultdict(dict, {p.parameter: p.state for p in pieces})
        try:
            with on_the_cpu():
                _step_without_hooks(optimizer)
            for piece in pieces:
                piece.finish(optimizer.state.get(piece.parameter, {}))
        finally:
            # Nothing of a tile may be held when its memory is used for another.
            optimizer.param_groups = []
            optimizer.state = defaultdict(dict)

    def first_state(self, options: State, values: Tensor) -> State:
        """What the class keeps of these elements before a step."""
        piece = Piece(values, None, None)
        return dict(self._made(options, [piece.parameter]).state.get(piece.parameter, {}))

    def kept(self, options: State) -> Kept:
        """What is kept with such options, found by a trial.

        Raises:
            ValueError: The class cannot be run piece by piece with them.
        """
        # A class may make its tensors in the default dtype.
        key = (torch.get_default_dtype(), _signature(options))
        if key not in self._kept:
            with plain_modes():
                self._kept[key] = self._try(_with_some_rate(options))
        return self._kept[key]

    def _made(self, options: State, parameters: list[Tensor]) -> torch.optim.Optimizer:
        with on_the_cpu():
            return self._class([{**options, "params": parameters}], **self._options)

    def _try(self, options: State) -> Kept:
        try:
            # Classes that draw numbers must not change what others draw.
            with torch.random.fork_rng(devices=[]):
                whole = self._trial(options, [_TRIAL])
                parts = self._trial(options, [_TRIAL.flatten()[:64], *_REST])
                from_start = bool(self.first_state(options, _TRIAL.clone()))
        except Exception as error:
            raise ValueError(
                f"{self.name} cannot be run piece by piece with these options: a trial on a "
                f"small parameter ended with {type(error).__name__}: {error}"
            ) from error
        (one,) = whole
        fields, names = {}, {}
        for name, value in (one.state or {}).items():
            if isinstance(value, Tensor) and value.shape == _TRIAL.shape:
                fields[name] = torch.empty(0, dtype=value.dtype, device="cpu")
                names[name] = None
            else:
                names[name] = value
        self._compare("the parameter", one.values, [piece.values for piece in parts])
        for name in names:
            of_parts = [(piece.state or {}).get(name, _MISSING) for piece in parts]
            if name in fields:
                self._compare(f"the state {name!r}", one.state[name], of_parts)
            else:
                self._compare_scalars(name, names[name], of_parts)
        return Kept(fields, names, from_start, torch.get_default_dtype())

    def _trial(self, options: State, values: list[Tensor]) -> list[Piece]:
        """Three steps of a parameter in pieces, of which the first is on its own."""
        pieces = [Piece(v.clone(), None, None) for v in values]
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            gradient = torch.randn(
                _TRIAL.numel(), generator=generator, dtype=torch.float32, device="cpu"
            )
            first = 0
            for piece in pieces:
                n = piece.values.numel()
                piece.parameter.grad = gradient[first : first + n].view(piece.values.shape)
                first += n
            for batch in (pieces[:1], pieces[1:]):
                if batch:
                    self.update(options, batch)
                for piece in batch:
                    piece.parameter = piece.values.detach().requires_grad_()
        return pieces

    def _compare(self, what: str, whole: Tensor, parts: list[Any]) -> None:
        fits = all(isinstance(p, Tensor) and p.dtype == whole.dtype for p in parts)
        fits = fits and [p.numel() for p in parts] == [64, *(r.numel() for r in _REST)]
        if not whole.dtype.is_floating_point:
            raise ValueError(f"{self.name} keeps {what} in {whole.dtype}, not in floats")
        # Bits: NaN is as good as any other.
        if not fits or not torch.equal(_bits(whole), _bits(torch.cat(parts))):
            self._refuse(what)

    def _compare_scalars(self, name: str, whole: Any, parts: list[Any]) -> None:
        tensor = isinstance(whole, Tensor)
        if not (whole is None or isinstance(whole, bool | int | float) or tensor):
            raise ValueError(
                f"{self.name} keeps {name!r}, a {type(whole).__name__}; allowed are numbers "
                f"and tensors"
            )
        for part in parts:
            same = type(part) is type(whole)
            if same and tensor:
                same = whole.numel() == 1 and whole.shape == part.shape
                same = same and torch.equal(_bits(whole), _bits(part))
            elif same:
                same = part == whole
            if not same:
                self._refuse(f"the state {name!r}")

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"{self.name} is not elementwise with these options, so it cannot be run piece by "
            f"piece: after 3 steps of one parameter, whole and cut at 64 elements, {what} did "
            f"not agree bit for bit"
        )


def options_of(group: State) -> State:
    """A group's options for pieces, which are on the CPU."""
    return {
        key: value.cpu() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def _step_without_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Hooks are for steps of the user's optimizer, and each piece is only part of one."""
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer)


def _with_some_rate(options: State) -> State:
    """With a rate of 0, as schedules begin, all classes would agree."""
    rate = options.get("lr")
    if isinstance(rate, Tensor):
        return {**options, "lr": torch.full_like(rate, 1e-3)} if not rate.any() else options
    return {**options, "lr": 1e-3} if rate == 0 else options


def _signature(value: Any) -> Any:
    """What in options may decide which state is kept and whether the class is elementwise:
    all but how large those are that schedules change in each step.
    """
    if isinstance(value, dict):
        rest = {k: v for k, v in value.items() if k not in ("lr", "initial_lr")}
        kept = tuple(
            (str(k), _coarse(v) if k in _SCHEDULED else _signature(v)) for k, v in rest.items()
        )
        return (type(value.get("lr")), *kept)
    if isinstance(value, Tensor):
        return (Tensor, value.dtype, tuple(value.shape), tuple(value.flatten().tolist()))
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(map(_signature, value))
    return repr(value)


def _coarse(value: Any) -> Any:
    """Of numbers, whether they are 0."""
    if isinstance(value, Tensor):
        return (Tensor, bool(value.any()))
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(map(_coarse, value))
    return (type(value), value != 0)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().contiguous().view(torch.uint8)


class _Missing:
    """What a piece does not keep, though the whole does."""


_MISSING = _Missing()
_SCHEDULED = ("betas", "momentum", "weight_decay")
# Two dimensions, since some classes treat matrices differently; no multiple of 64.
_TRIAL = torch.randn(
    5, 67, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
)
_REST = list(_TRIAL.flatten()[64:].split(64))
