"""An optimizer class of torch, run on pieces of parameters if it can be."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_ext._modes import on_the_cpu, plain_modes
from torch_ext.optim._values import copied, described, differing

State = dict[str, Any]

#: Some classes want these methods called before steps and before evaluation.
MODES = ("train", "eval")


class PieceError(RuntimeError):
    """A class has done what it cannot do to pieces of parameters."""


@dataclass(frozen=True)
class Kept:
    """What a class keeps of each parameter, and what else it writes."""

    #: Tensors with something for every element. Each stands here without elements.
    fields: dict[str, Tensor]
    #: All names in the class's order, with the value of each that is no field.
    names: dict[str, Any]
    #: Whether the state exists before the first step.
    from_start: bool
    #: Torch's default dtype at that time. A class may make tensors in it.
    default_dtype: torch.dtype
    writes_group: bool = False
    writes_gradients: bool = False

    def same(self, other: Kept) -> bool:
        dtypes = [{k: f.dtype for k, f in kept.fields.items()} for kept in (self, other)]
        return dtypes[0] == dtypes[1] and self.names.keys() == other.names.keys()

    def goes_on_as(self, other: Kept) -> bool:
        """Whether a step that expects ``other`` can go on with this state.

        A state that was made in another default dtype stays in that dtype.
        """
        if self.default_dtype == other.default_dtype:
            return self.same(other)
        return (self.fields.keys(), self.names.keys()) == (
            other.fields.keys(),
            other.names.keys(),
        )


class Piece:
    """Elements of one parameter, in float32 on the CPU, with their gradient and state.

    ``attributes`` are those that somebody has set on the parameter.
    """

    __slots__ = ("_attributes", "gradient", "parameter", "state", "values")

    def __init__(
        self,
        values: Tensor,
        gradient: Tensor | None,
        state: State | None,
        attributes: State | None = None,
    ) -> None:
        self.values = values
        self.gradient = gradient
        self.parameter = values.detach().requires_grad_()
        self.parameter.grad = gradient
        self._attributes = dict(attributes or {})
        self.parameter.__dict__.update(self._attributes)
        #: None before the first step.
        self.state = state

    def finish(self, state: State) -> None:
        self.state = state
        now, before = self.parameter.__dict__, self._attributes
        for name in {**now, **before}:
            if name not in now or name not in before or now[name] is not before[name]:
                raise PieceError(f"it changes p.{name} of its parameters. {CARRIED}")
        gradient = self.parameter.grad
        if (gradient is None) != (self.gradient is None):
            raise PieceError("it takes gradients away, or gives some: p.grad = ...")
        # They may have been given other memory: p.data = ... That may be each other's, or
        # a state's, as of a class that swaps averages with values.
        moved = []
        if self.parameter.data_ptr() != self.values.data_ptr():
            moved.append((self.values, self.parameter.detach()))
        if gradient is not self.gradient:
            moved.append((self.gradient, gradient))
        several = len(moved) > 1
        for there, values in [(there, v.clone() if several else v) for there, v in moved]:
            for name, value in state.items():
                if isinstance(value, Tensor) and value.data_ptr() == there.data_ptr():
                    state[name] = value.clone()
            there.copy_(values)


class PieceOptimizer:
    """One optimizer of a class, for pieces of parameters that come and go."""

    def __init__(self, optimizer_class: type[torch.optim.Optimizer], options: State) -> None:
        self.optimizer_class = optimizer_class
        self.options = options
        with plain_modes(), on_the_cpu():
            self._optimizer = optimizer_class([some_parameter()], **options)
        self._attributes: State = {}
        self.name = optimizer_class.__name__
        self.defaults = dict(self._optimizer.defaults)
        self.modes = [m for m in MODES if callable(getattr(optimizer_class, m, None))]

    def run(
        self,
        options: State,
        pieces: list[Piece],
        from_start: bool = False,
        method: str = "step",
    ) -> State:
        """Runs a step, or another method, for pieces that all have state or all have none.

        Returns the options of their group as the class has left them. ``options`` are not
        changed, since all pieces of a group have the same ones before a step.

        Raises:
            PieceError: The class has kept something that belongs to no piece.
        """
        optimizer = self._optimizer
        parameters = [piece.parameter for piece in pieces]
        states = {p.parameter: p.state for p in pieces if p.state is not None}
        if from_start and not states:
            states = self.made([{**options, "params": parameters}]).state
        group = {**copied(options), "params": parameters}
        optimizer.param_groups = [group]
        optimizer.state = defaultdict(dict, states)
        try:
            with on_the_cpu():
                call(optimizer, method)
            for piece in pieces:
                piece.finish(optimizer.state.get(piece.parameter, {}))
            check_state_keys(optimizer, parameters)
            return {key: value for key, value in group.items() if key != "params"}
        finally:
            # No tensor of a tile may be held when its memory is used for another tile.
            optimizer.param_groups = []
            optimizer.state = defaultdict(dict)

    def run_idle(self, options: State, method: str = "step") -> State:
        """Returns the options that a step leaves in a group in which nothing has a gradient."""
        return self.run(options, [Piece(some_parameter().detach(), None, {})], False, method)

    def begin(self) -> None:
        """Begins a step. Called before its pieces."""
        self._attributes = attributes_of(self._optimizer)

    def check_attributes(self) -> None:
        """Raises PieceError if the class has kept something in itself since ``begin``."""
        for name in differing(self._attributes, attributes_of(self._optimizer)):
            raise PieceError(f"it has changed {name}, which it did not in the trial. {CARRIED}")

    def first_state(self, options: State, values: Tensor) -> State:
        """Returns what the class keeps of these elements before a step."""
        parameter = values.detach().requires_grad_()
        return dict(self.made([{**options, "params": [parameter]}]).state.get(parameter, {}))

    def prepared(self, options: State) -> State:
        """Returns the options of a group as the class's constructor leaves them."""
        (group,) = self.made([{**options, "params": [some_parameter()]}]).param_groups
        return options_of(group)

    def made(self, groups: list[State]) -> torch.optim.Optimizer:
        """Returns a new instance of the class, with a copy of the groups' options."""
        memo: dict[int, Any] = {id(p): p for group in groups for p in group["params"]}
        with on_the_cpu():
            return self.optimizer_class(copied(groups, memo), **copied(self.options, memo))


def options_of(group: State) -> State:
    """Returns a group's options for pieces, which are on the CPU."""
    return {
        key: value.cpu() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def call(optimizer: torch.optim.Optimizer, method: str) -> None:
    """Calls a method without its hooks: each piece is only part of the user's step."""
    if method != "step":
        getattr(optimizer, method)()
        return
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer)


def check_state_keys(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    if strangers := optimizer.state.keys() - set(parameters):
        key = next(iter(strangers))
        raise PieceError(f"it keeps state under {key!r:.80}, which is no parameter. {CARRIED}")


def attributes_of(optimizer: torch.optim.Optimizer) -> State:
    """Describes what an optimizer keeps in itself and in its class."""
    found = {
        f"self.{name}": described(value)
        for name, value in vars(optimizer).items()
        if name not in _OF_TORCH and not name.startswith("_optimizer_")
    }
    for cls in type(optimizer).__mro__:
        if cls is torch.optim.Optimizer:
            break
        for name, value in vars(cls).items():
            if not (name.startswith("__") or callable(value) or hasattr(value, "__get__")):
                found[f"{cls.__name__}.{name}"] = described(value)
    return found


def some_parameter() -> Tensor:
    return torch.zeros(1, 1, dtype=torch.float32, device="cpu", requires_grad=True)


CARRIED = (
    "What belongs to no parameter is carried from step to step in param_groups only "
    "(group['k'] += 1)"
)
_OF_TORCH = (
    "param_groups",
    "state",
    "_warned_capturable_if_run_uncaptured",
    "_zero_grad_profile_name",
)
