"""Finds out whether a class may be run on pieces of parameters.

It makes two runs of some steps: the class itself on whole parameters, and the class on pieces
of the same parameters. After each step all bits of parameters, states, gradients and groups
must agree, and the class may have written nothing else. Sizes of gradients and values, rates,
and which parameters have a gradient differ from step to step, so that bounds, norms and
counters show.
"""

from __future__ import annotations

import itertools
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torch_ext._bytes import bytes_view
from torch_ext._modes import on_the_cpu, plain_modes
from torch_ext.optim._pieces import (
    CARRIED,
    Kept,
    Piece,
    PieceError,
    PieceOptimizer,
    State,
    attributes_of,
    call,
    check_state_keys,
    options_of,
)
from torch_ext.optim._values import bits, copied, described, differing, same

_STEPS = 12  # Some classes change their ways after 5 or 10.
#: How large gradients and parameters are in each step, and by what the given rates are
#: multiplied. The norm of the largest parameter is eight times that of its first piece. So a
#: bound for a norm, from 1 to 1e6, lies between the two in one step. (In the sixth and the
#: eighth step that parameter has no gradient.)
_GRADIENTS = tuple(7.0**i for i in (0, -1, 3, 2, 1, -4, 6, 7, -2, 4, -3, 5))
_VALUES = tuple(7.0**i for i in (0, 1, -2, -1, 3, -4, 4, 7, -3, 5, 2, 6))
_RATES = (1.0, 0.5, 1.0, 1.0, 0.3, 1.0, 1.0, 0.7, 1.0, 1.0, 0.2, 1.0)
#: The sizes of the first group's parameters, and of the other groups'. The largest is for
#: classes that treat matrices, or large parameters, in another way.
_SIZES = ((130, 150), (7, 83), (300,), (2, 3, 5, 7), ())
_OTHER_SIZES = ((40, 9), (77,))
_CUT = 256
#: For each step, the parameters without a gradient, by group and by place in it.
_WITHOUT = {0: {(0, 1), (0, 2)}, 1: {(0, 1)}, 3: {(0, 2), (1, 0)}, 5: {(0, 0), (0, 1)}}
_GROUP_WITHOUT = 6  # The step in which the last of several groups has no gradients.
_ALL_WITHOUT = 7
_MODES_AFTER = 4
_SCHEDULED = ("betas", "momentum", "weight_decay")
_AT_ONCE = 7  # The most groups of a trial, besides the first.


class Trials:
    """What a class keeps with which options. It is tried with each kind of options."""

    def __init__(self, pieces: PieceOptimizer) -> None:
        self._pieces = pieces
        #: What is kept in groups, by signature, for each set of groups that form one optimizer.
        self._kept: dict[Any, dict[Any, Kept]] = {}
        #: Keys of groups that the class itself writes.
        self._written: set[str] = set()

    def kept(self, groups: list[State]) -> list[Kept]:
        """Returns what is kept of the parameters of each of an optimizer's groups.

        Raises:
            ValueError: The class cannot be run piece by piece with these groups.
        """
        signatures = [self._signature(group) for group in groups]
        if _together(signatures) not in self._kept:
            self._try(groups, signatures)
            # The trial may have found more keys that the class writes.
            signatures = [self._signature(group) for group in groups]
        found = self._kept[_together(signatures)]
        return [found[signature] for signature in signatures]

    def _try(self, groups: list[State], signatures: list[Any]) -> None:
        # One group of each kind is tried, and two groups where there are two.
        firsts = {signature: i for i, signature in reversed(list(enumerate(signatures)))}
        chosen = sorted({*firsts.values(), *range(len(groups))[:2]})
        found: list[tuple[State, Kept]] = []
        for start in range(1, max(len(chosen), 2), _AT_ONCE):
            some = [groups[i] for i in (chosen[0], *chosen[start : start + _AT_ONCE])]
            kept, written = tried(self._pieces, some)
            found += zip(some, kept, strict=True)
            self._written |= written
        by_signature = {self._signature(group): kept for group, kept in reversed(found)}
        self._kept[_together([self._signature(group) for group in groups])] = by_signature

    def _signature(self, group: State) -> Any:
        """Returns the part of the options that may decide the outcome of a trial.

        What the class itself writes does not decide it. Nor does the size of options that
        schedules change.
        """
        entries = []
        for key, value in group.items():
            if key in self._written or key in ("params", "initial_lr"):
                continue
            if key == "lr":
                value = type(value)
            elif key in _SCHEDULED:
                value = _coarse(value)
            elif key == "param_names":
                value = _some_names(value)
            entries.append((key, described(value)))
        return frozenset(entries)


def tried(pieces: PieceOptimizer, groups: list[State]) -> tuple[list[Kept], set[str]]:
    """Returns what a class keeps in each of the groups, and the keys of groups that it writes.

    Raises:
        ValueError: The class does not do the same to pieces as to whole parameters, or this
            cannot be found out.
    """
    try:
        # Nothing that the class does may be noticed outside.
        with _generators_kept(), warnings.catch_warnings(), plain_modes():
            warnings.simplefilter("ignore")
            try:
                return _Trial(pieces, groups).run()
            except _ClassError:
                # Some classes cannot do without a gradient in memory either.
                return _Trial(pieces, groups, all_gradients=True).run()
    except PieceError as error:
        raise ValueError(
            f"{pieces.name} cannot be run piece by piece with these options: {error}"
        ) from None
    except _DifferenceError as error:
        raise ValueError(
            f"{pieces.name} is not elementwise with these options, so it cannot be run piece "
            f"by piece: {error}"
        ) from None
    except Exception as raised:
        error = raised.__cause__ if isinstance(raised, _ClassError) else raised
        raise ValueError(
            f"{pieces.name} cannot be run piece by piece with these options: a trial on small "
            f"parameters ended with {type(error).__name__}: {error}"
        ) from error


class _DifferenceError(Exception):
    """The pieces have become something else than the whole."""


class _ClassError(Exception):
    """The class has raised an exception with whole parameters. That is the cause."""


class _Parameter:
    """A parameter that is updated twice: whole by the class itself, and in pieces."""

    def __init__(self, sizes: tuple[int, ...], generator: Any) -> None:
        values = torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu")
        self._first = values
        self.whole = values.clone().requires_grad_()
        self.values = values.flatten().clone()
        self.gradient: Tensor | None = None
        n = self.values.numel()
        # The offload also cuts at multiples of it.
        places = [*range(0, min(n, 3 * _CUT), _CUT), *range(32 * _CUT, n, 32 * _CUT), n]
        self.cuts = [(first, end - first) for first, end in itertools.pairwise(places)]
        #: The states of the pieces. None before the first step.
        self.states: list[State] | None = None

    def set_size(self, factor: float) -> None:
        self.whole.copy_(self._first * factor)
        self.values.copy_(self.whole.flatten())

    def set_gradient(self, gradient: Tensor | None) -> None:
        self.gradient = None if gradient is None else gradient.flatten()
        self.whole.grad = None if gradient is None else gradient.clone()

    def pieces(self) -> list[Piece]:
        made = []
        for i, (first, n) in enumerate(self.cuts):
            gradient = None if self.gradient is None else self.gradient.narrow(0, first, n)
            state = None
            if self.states:
                # Each by itself, as the offload keeps them.
                state = {name: copied(value) for name, value in self.states[i].items()}
            made.append(Piece(self.values.narrow(0, first, n), gradient, state))
        return made


class _Trial:
    """Two runs of some steps: of the class itself, and of the class on pieces."""

    def __init__(
        self, pieces: PieceOptimizer, groups: list[State], all_gradients: bool = False
    ) -> None:
        self._pieces = pieces
        self._all_gradients = all_gradients
        #: The options before the next step, as pieces get them. What groups share, these share.
        own = copied([options_of(group) for group in groups])
        self._options = [_varied(options, i) for i, options in enumerate(own)]
        self._random = torch.Generator().manual_seed(0)
        self._parameters = [
            [_Parameter(size, self._random) for size in (_OTHER_SIZES if i else _SIZES)]
            for i in range(len(groups))
        ]
        self._native = pieces.made(
            [
                {**options, "params": [p.whole for p in parameters]}
                for options, parameters in zip(self._options, self._parameters, strict=True)
            ]
        )
        for group, given in zip(self._native.param_groups, groups, strict=True):
            if names := _some_names(given.get("param_names", ())):
                n = len(group["params"])
                group["param_names"] = (names * n)[:n]
        self._rates = [options.get("lr") for options in self._options]
        self._attributes: State | None = None
        self._kept: list[Kept] = []
        self._when = "at construction"
        #: The keys of groups that the class has written.
        self._written: set[str] = set()
        self._writes_gradients = False

    def run(self) -> tuple[list[Kept], set[str]]:
        self._begin()
        for number in range(_STEPS):
            self._set_rates(_RATES[number])
            self._set_sizes(number)
            self._do("step", f"in step {number + 1} of a trial")
            if number == 0:
                self._attributes = attributes_of(self._native)
            if number == _MODES_AFTER:
                for mode in [m for m in ("eval", "eval", "train") if m in self._pieces.modes]:
                    self._do(mode, f"after {mode}()")
        if type(self._native).zero_grad is not torch.optim.Optimizer.zero_grad:
            self._check_zero_grad()
        kept = [
            replace(
                kept,
                writes_group=bool(self._written or self._pieces.modes),
                writes_gradients=self._writes_gradients,
            )
            for kept in self._kept
        ]
        return kept, self._written

    def _begin(self) -> None:
        """Compares what the class's constructor makes of groups. Then calls ``train()``."""
        self._options = [self._pieces.prepared(options) for options in self._options]
        self._compare_groups()
        state = self._native.state
        self._from_start = [bool(state.get(ps[0].whole)) for ps in self._parameters]
        self._numbers = _generators()
        if "train" in self._pieces.modes:
            self._do("train", "after train()")

    def _set_rates(self, factor: float) -> None:
        if "lr" in self._written:
            return
        for i, (options, rate) in enumerate(zip(self._options, self._rates, strict=True)):
            if isinstance(rate, int | float | Tensor) and not isinstance(rate, bool):
                options["lr"] = rate * factor
                self._native.param_groups[i]["lr"] = copied(options["lr"])

    def _set_sizes(self, number: int) -> None:
        without = _WITHOUT.get(number, set())
        last = len(self._parameters) - 1
        for i, parameters in enumerate(self._parameters):
            for j, parameter in enumerate(parameters):
                parameter.set_size(_VALUES[number])
                none = number == _ALL_WITHOUT or (i, j) in without
                none = none or (number == _GROUP_WITHOUT and 0 < i == last)
                none = none and not self._all_gradients
                gradient = torch.randn(
                    parameter.whole.shape,
                    generator=self._random,
                    dtype=torch.float32,
                    device="cpu",
                )
                parameter.set_gradient(None if none else gradient * _GRADIENTS[number])

    def _do(self, method: str, when: str) -> None:
        self._when = when
        given = [
            p.whole.grad.clone() if p.whole.grad is not None else None
            for parameters in self._parameters
            for p in parameters
        ]
        before = [copied(options) for options in self._options]
        try:
            with on_the_cpu():
                call(self._native, method)
        except Exception as error:
            raise _ClassError from error
        self._look_around()
        for i in range(len(self._options)):
            self._run_pieces(i, method)
        for options, earlier in zip(self._options, before, strict=True):
            self._written.update(differing(earlier, options))
        self._compare_groups()
        rest = iter(given)
        for i, parameters in enumerate(self._parameters):
            for parameter in parameters:
                self._compare(i, parameter, next(rest))

    def _check_zero_grad(self) -> None:
        """Checks that ``zero_grad()`` does what torch's does, which OffloadedOptimizer has."""
        self._when = "after zero_grad()"
        self._native.zero_grad()
        self._look_around()
        self._compare_groups()
        for i, parameters in enumerate(self._parameters):
            for parameter in parameters:
                if parameter.whole.grad is not None:
                    raise PieceError("its zero_grad() does something else than torch's")
                parameter.gradient = None
                self._compare(i, parameter, None)

    def _look_around(self) -> None:
        """Raises PieceError if the class has written to anything but parameters and groups."""
        for name, state in _generators().items():
            if state != self._numbers.get(name):
                raise PieceError(
                    f"it draws numbers from {name}'s generator, of which each piece of a "
                    f"parameter would get others"
                )
        if self._attributes is not None:
            for name in differing(self._attributes, attributes_of(self._native)):
                raise PieceError(f"it changes {name} in its steps. {CARRIED}")
        whole = [p.whole for parameters in self._parameters for p in parameters]
        check_state_keys(self._native, whole)

    def _run_pieces(self, i: int, method: str) -> None:
        """Runs one group's pieces, in batches such as the offload makes."""
        from_start = self._from_start[i]
        chosen = []
        for parameter in self._parameters[i]:
            if method == "step":
                chosen.append(parameter.gradient is not None)
            else:
                chosen.append(parameter.states is not None or from_start)
        parameters = list(itertools.compress(self._parameters[i], chosen))
        after: State | None = None
        for batch in _batches(parameters):
            pieces = [piece for _, _, piece in batch]
            written = self._pieces.run(self._options[i], pieces, from_start, method)
            if after is not None:
                for key in differing(after, written):
                    raise _DifferenceError(self._written_by_pieces(key))
            after = written
            for parameter, k, piece in batch:
                if parameter.states is None:
                    parameter.states = [{} for _ in parameter.cuts]
                parameter.states[k] = piece.state or {}
        if after is None:
            after = self._pieces.run_idle(self._options[i], method)
        self._options[i] = after

    def _compare_groups(self) -> None:
        for group, options in zip(self._native.param_groups, self._options, strict=True):
            for key in differing(options_of(group), options):
                raise _DifferenceError(self._written_by_pieces(key))

    def _written_by_pieces(self, key: str) -> str:
        return (
            f"{self._when} it wrote something else to group[{key!r}] with pieces of the "
            f"parameters than with whole ones"
        )

    def _compare(self, i: int, parameter: _Parameter, given: Tensor | None) -> None:
        whole = parameter.whole
        if (whole.grad is None) != (parameter.gradient is None):
            raise PieceError("it takes gradients away, or gives some: p.grad = ...")
        if whole.grad is not None:
            self._writes_gradients |= not torch.equal(_as_bits(whole.grad), _as_bits(given))
            self._compare_bits("a gradient", whole.grad, parameter.gradient)
        if parameter.states is not None:
            self._compare_states(i, parameter)
        self._compare_bits("a parameter", whole, parameter.values)

    def _compare_states(self, i: int, parameter: _Parameter) -> None:
        state = self._native.state.get(parameter.whole, {})
        if i == len(self._kept):
            self._kept.append(self._kept_of(parameter.whole, state, self._from_start[i]))
        kept = self._kept[i]
        if state.keys() != kept.names.keys():
            raise PieceError(
                f"{self._when} it keeps {list(state)}, but {list(kept.names)} at first"
            )
        for name, value in state.items():
            of_pieces = [piece.get(name) for piece in parameter.states]
            if name in kept.fields:
                self._compare_fields(name, value, parameter, of_pieces, kept.fields[name])
            else:
                self._compare_numbers(name, value, of_pieces)
        if any(piece.keys() != state.keys() for piece in parameter.states):
            raise _DifferenceError(f"{self._when} pieces keep other state than the whole")

    def _kept_of(self, whole: Tensor, state: State, from_start: bool) -> Kept:
        fields = {}
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == whole.shape:
                if not value.dtype.is_floating_point:
                    raise PieceError(f"it keeps {name!r} in {value.dtype}, not in floats")
                fields[name] = torch.empty(0, dtype=value.dtype, device="cpu")
        names = {name: None if name in fields else state[name] for name in state}
        return Kept(fields, names, from_start, torch.get_default_dtype())

    def _compare_fields(
        self, name: str, value: Any, parameter: _Parameter, of_pieces: list[Any], like: Tensor
    ) -> None:
        if not isinstance(value, Tensor) or value.shape != parameter.whole.shape:
            raise PieceError(f"{self._when} its {name!r} has not the parameter's shape")
        for (_, n), field in zip(parameter.cuts, of_pieces, strict=True):
            fits = isinstance(field, Tensor) and field.dtype == value.dtype == like.dtype
            if not fits or field.numel() != n:
                self._refuse(f"the state {name!r}")
        self._compare_bits(f"the state {name!r}", value, torch.cat(of_pieces))

    def _compare_numbers(self, name: str, value: Any, of_pieces: list[Any]) -> None:
        if not (value is None or isinstance(value, bool | int | float | Tensor)):
            raise PieceError(
                f"it keeps {name!r}, a {type(value).__name__}; allowed are numbers and tensors"
            )
        one = not isinstance(value, Tensor) or value.numel() == 1
        if not one or not all(same(value, piece) for piece in of_pieces):
            self._refuse(f"the state {name!r}")

    def _compare_bits(self, what: str, whole: Tensor, pieces: Tensor) -> None:
        # NaN equals NaN.
        if not torch.equal(_as_bits(whole), _as_bits(pieces)):
            self._refuse(what)

    def _refuse(self, what: str) -> None:
        raise _DifferenceError(
            f"{self._when} with small parameters, whole and cut into pieces, {what} did not "
            f"agree bit for bit"
        )


def _batches(
    parameters: list[_Parameter],
) -> Iterator[list[tuple[_Parameter, int, Piece]]]:
    """Yields pieces with their numbers, some at a time: all with state, or all without."""
    sizes = itertools.cycle((1, 3, 2, 4))
    for _, some in itertools.groupby(parameters, lambda p: p.states is None):
        pieces = [(p, k, piece) for p in some for k, piece in enumerate(p.pieces())]
        while pieces:
            size = next(sizes)
            yield pieces[:size]
            del pieces[:size]


def _together(signatures: list[Any]) -> Any:
    # A class may make its tensors in the default dtype.
    return torch.get_default_dtype(), len(signatures) > 1, frozenset(signatures)


def _coarse(value: Any) -> Any:
    """Returns only whether numbers are 0."""
    if isinstance(value, Tensor):
        return Tensor, bool(value.any())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return tuple(map(_coarse, value))
    return type(value), value != 0


def _some_names(names: Iterable[str]) -> list[str]:
    """Returns one name for each ending, such as "bias" of "layers.0.bias". Five at most."""
    return list({name.rpartition(".")[2]: name for name in names}.values())[:5]


def _varied(options: State, number: int) -> State:
    """Gives options a rate that shows. Options that schedules change differ between groups."""
    rate = options.get("lr")
    if isinstance(rate, Tensor):
        options["lr"] = rate.clamp(min=1e-3) / (1 + number)
    elif isinstance(rate, int | float) and not isinstance(rate, bool):
        options["lr"] = max(rate, 1e-3) / (1 + number)
    if number:
        for key in options.keys() & set(_SCHEDULED):
            options[key] = _scaled(options[key], 1 - 0.05 * number)
    return options


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_scaled(entry, factor) for entry in value)
    return value * factor if isinstance(value, float | Tensor) else value


def _as_bits(tensor: Tensor) -> Tensor:
    return bytes_view(tensor.detach().contiguous())


def _generators() -> dict[str, Any]:
    """Returns the state of each generator that a class may draw from."""
    states: dict[str, Any] = {
        "torch": bits(torch.get_rng_state()),
        "Python": random.getstate(),
    }
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        states["NumPy"] = (kind, keys.tobytes(), *rest)
    return states


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Sets the generators back, as if nothing had been drawn."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        if random.getstate() != python_state:
            random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
