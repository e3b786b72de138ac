"""State of parameters in tiles, which a PieceOptimizer updates.

The compiled PieceOffload brings tiles into memory and cuts them into pieces. ``_update`` gets
batches of them: each with the place of its parameter, its values and gradient in float32, and
its tensors in the tile. The class gets them with copies of the parameter's numbers. Then the
numbers of the last piece are the parameter's. What the class writes to its group must be the
same for all pieces; it reaches the group when the step has succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_ext._native import _C
from torch_ext._quiet import one_thread
from torch_ext.config import AioConfig
from torch_ext.optim._pieces import Kept, Piece, PieceError, PieceOptimizer, State
from torch_ext.optim._values import copied, differing, same

#: The name of the float32 master of a 16-bit parameter in a state_dict().
MASTER = "master_param"


class Trained(NamedTuple):
    """A parameter of a step."""

    slot: int
    parameter: Tensor
    #: None if another method than ``step`` is called.
    gradient: Tensor | None


@dataclass
class Group:
    """Parameters of a step that have options in common."""

    #: The group itself.
    own: State
    #: The options before the step. Each batch of pieces begins with them.
    options: State
    kept: Kept
    trained: list[Trained]
    #: The options as the class has left them.
    after: State | None = None

    def take(self, after: State) -> None:
        """Takes what the class has written to the group. It must be the same each time."""
        for key in differing(self.after, after) if self.after is not None else ():
            raise PieceError(
                f"it has written something else to group[{key!r}] with other pieces of the "
                f"parameters, which it did not in the trial"
            )
        self.after = after

    def finish(self) -> None:
        """Writes to the group what the class wrote. Called when the step has succeeded."""
        for key in differing(self.options, self.after) if self.after is not None else ():
            if key not in self.after:
                del self.own[key]
                continue
            value, old = self.after[key], self.own.get(key)
            both = isinstance(value, Tensor) and isinstance(old, Tensor)
            self.own[key] = value.to(old.device) if both else value


class Loaded(NamedTuple):
    """State for a parameter."""

    slot: int
    parameter: Tensor
    kept: Kept
    #: Tensors for the fields, and perhaps a master. Values for the rest.
    state: State


@dataclass
class _Slot:
    """What is kept of a parameter."""

    kept: Kept | None = None
    #: State that is no field.
    numbers: State | None = None


@dataclass
class _Work:
    """A parameter during a step."""

    slot: int
    parameter: Tensor
    kept: Kept
    group: int
    #: The state that is no field, before the step. None if there is no state.
    before: State | None
    after: State | None = None


class PieceState:
    """What ``_C.AdamWOffload`` is for AdamW, for any class. Holds no parameter.

    One call at a time. The caller keeps handlers of signals away: see undisturbed().
    """

    def __init__(
        self,
        directories: list[tuple[str | bytes, int]],
        aio: AioConfig,
        host_memory: int,
        engine: str,
        verify: bool,
        optimizer: PieceOptimizer,
        state_dict_mode: str,
        place: _C.StorePlace | None = None,
    ) -> None:
        self._offload = _C.PieceOffload(
            directories,
            aio,
            host_memory,
            engine,
            verify,
            state_dict_mode,
            place or _C.StorePlace(),
        )
        self._optimizer = optimizer
        self._slots: dict[int, _Slot] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._offload, name)  # What needs no knowledge of the class.

    def add(self, parameter: Tensor, trained: bool) -> int:
        """Gives a parameter a slot. Takes no space yet.

        The parameter is checked if it is trained, else when it has a gradient: frozen ones may
        be anything.
        """
        slot = self._offload.add(parameter, trained)
        self._slots[slot] = _Slot()
        return slot

    def remove(self, slot: int) -> None:
        """Takes a slot back, with its state."""
        self._offload.remove(slot)
        self._slots.pop(slot, None)

    def fits(self, slot: int, parameter: Tensor, kept: Kept) -> bool:
        """Whether the slot's state fits the parameter as it is now."""
        own = self._slots[slot].kept
        return own is not None and own.goes_on_as(kept) and self._offload.fits(slot, parameter)

    def expect(self, slot: int, parameter: Tensor, kept: Kept) -> None:
        """Says what is kept of a parameter, unless it has a state that fits.

        Raises:
            RuntimeError, ValueError: It has a state that does not fit.
        """
        self._offload.check(slot, parameter)
        own = self._slots[slot]
        if not self._offload.has_state(slot):
            self._describe(slot, kept)
        elif not own.kept.goes_on_as(kept):
            raise ValueError(
                f"{self._optimizer.name} keeps {list(kept.names)} with these options, but the "
                f"state was made for {list(own.kept.names)}: load a state that has them, or "
                f"delete it from the optimizer's state"
            )

    def _describe(self, slot: int, kept: Kept) -> None:
        self._describe_fields(slot, kept)
        self._slots[slot].kept = kept

    def _describe_fields(self, slot: int, kept: Kept) -> None:
        self._offload.describe(slot, [(name, f.dtype) for name, f in kept.fields.items()])

    def check(self, trained: Trained, kept: Kept) -> None:
        """Checks one parameter. A step begins with this."""
        self.expect(trained.slot, trained.parameter, kept)
        self._offload.check(*trained)

    def take_commit(
        self,
        take: Callable[[Any, list[tuple[int, Tensor, int]]], None],
        parts: list[tuple[int, Tensor, Kept | None, State | None]],
    ) -> None:
        """Takes a commit. A part is a slot, its parameter, and its state, if any."""
        try:
            for slot, _, kept, _ in parts:
                if kept is not None:
                    self._describe_fields(slot, kept)
            given = [(slot, parameter, 0) for slot, parameter, *_ in parts]
            take(self._offload, given)
        except BaseException:
            for slot, own in self._slots.items():
                if own.kept is not None:
                    self._describe_fields(slot, own.kept)
            raise
        self._slots = {slot: _Slot(kept, numbers) for slot, _, kept, numbers in parts}

    def kept(self, slot: int) -> Kept:
        """Returns what is kept of a parameter that has state."""
        return self._slots[slot].kept

    def names(self, slot: int) -> list[str]:
        """Returns the names of what is kept, fields and others."""
        return list(self._slots[slot].kept.names)

    def numbers(self, slot: int) -> State:
        """Returns what is kept in memory."""
        return self._slots[slot].numbers or {}

    # Steps ------------------------------------------------------------------------------

    def step(self, groups: list[Group], method: str = "step") -> None:
        """Calls a method of the class for the groups.

        Raises:
            RuntimeError: The class does something that it cannot do to pieces.
        """
        works, targets = [], []
        for i, group in enumerate(groups):
            writes = group.kept.writes_gradients
            for trained in group.trained:
                self.check(trained, group.kept)
                slot, p, gradient = trained
                own = self._slots[slot]
                before = (own.numbers or {}) if self._offload.has_state(slot) else None
                works.append(_Work(slot, p, own.kept, i, before))
                targets.append((slot, p, gradient, i, writes))
        try:
            with one_thread():
                self._optimizer.begin()
                self._run_idle(groups, method)
                self._offload.step(targets, lambda b: self._update(b, works, groups, method))
                for work in works:
                    self._slots[work.slot].numbers = work.after
                for group in groups:
                    group.finish()
        except PieceError as error:
            raise RuntimeError(
                f"{self._optimizer.name} cannot be run piece by piece: {error}"
            ) from None

    def _run_idle(self, groups: list[Group], method: str) -> None:
        """Runs the class for groups in which nothing has a gradient. It may count, for example.

        A class with modes is run so in each step, before anything changes: it raises if it is
        in the wrong mode.
        """
        for group in groups:
            if group.kept.writes_group and (not group.trained or self._optimizer.modes):
                after = self._optimizer.run_idle(group.options, method)
                self._optimizer.check_attributes()
                if not group.trained:
                    group.after = after

    def _update(
        self, batch: list[Any], works: list[_Work], groups: list[Group], method: str
    ) -> None:
        """Updates pieces of one group, which all have state or all have none.

        An empty batch ends a tile.
        """
        if not batch:
            self._optimizer.check_attributes()
            return
        pieces, versions = [], []
        for place, values, gradient, _, fields in batch:
            work = works[place]
            state = None
            if work.before is not None:
                tensors = dict(zip(work.kept.fields, fields, strict=True))
                state = {
                    name: tensors[name] if name in tensors else copied(work.before[name])
                    for name in work.kept.names
                }
            pieces.append(Piece(values, gradient, state, work.parameter.__dict__))
            versions.append(0 if gradient is None else gradient._version)
        group = groups[works[batch[0][0]].group]
        after = self._optimizer.run(group.options, pieces, group.kept.from_start, method)
        group.take(after)
        for entry, piece, version in zip(batch, pieces, versions, strict=True):
            place, _, gradient, is_copy, fields = entry
            work = works[place]
            if is_copy and not group.kept.writes_gradients and gradient._version != version:
                raise PieceError("it writes to gradients, which it did not in the trial")
            self._store(work, piece.state, fields)

    def _check_names(self, state: State, kept: Kept) -> None:
        if state.keys() != kept.names.keys():
            raise RuntimeError(
                f"{self._optimizer.name} keeps {list(state)} but {list(kept.names)} in the "
                f"trial"
            )

    def _store(self, work: _Work, state: State, fields: list[Tensor]) -> None:
        """Takes a piece's state as the class has left it."""
        name = self._optimizer.name
        self._check_names(state, work.kept)
        moved = []
        for key, values in zip(work.kept.fields, fields, strict=True):
            if state[key].dtype != values.dtype:
                raise RuntimeError(
                    f"{name} has made the state {key!r} of dtype {state[key].dtype} from one "
                    f"of dtype {values.dtype}"
                )
            if state[key].data_ptr() != values.data_ptr():
                moved.append((values, state[key]))
        # A class may have swapped them: each is read before any is written.
        places = {values.data_ptr() for values, _ in moved} if len(moved) > 1 else ()
        read = [made.clone() if made.data_ptr() in places else made for _, made in moved]
        for (values, _), made in zip(moved, read, strict=True):
            values.copy_(made)
        # All pieces of a parameter must have the same numbers.
        numbers = {k: v for k, v in state.items() if k not in work.kept.fields}
        for key in numbers if work.after is not None else ():
            if _agree(numbers[key], work.after[key]):
                continue
            raise PieceError(
                f"it has written something else to the state {key!r} with other pieces of a "
                f"parameter, which it did not in the trial"
            )
        work.after = numbers

    # Saved states -----------------------------------------------------------------------

    def save(self, parameters: list[tuple[int, Tensor, Kept, State]]) -> list[State | None]:
        """Returns the state of each parameter, or None where there is none.

        Each is given with its slot, what is kept, and options. After an error all is as before.
        """
        options_of, numbers_of = {}, {}
        for slot, parameter, kept, options in parameters:
            if self._offload.has_state(slot):
                numbers_of[slot] = self._slots[slot].numbers or {}
            elif kept.from_start:
                options_of[slot] = options
            else:
                continue
            self.expect(slot, parameter, kept)

        def first_state(part: tuple[int, Tensor]) -> list[Tensor]:
            slot, values = part
            state = self._optimizer.first_state(options_of[slot], values)
            self._check_names(state, self._slots[slot].kept)
            fields = self._slots[slot].kept.fields
            numbers_of[slot] = {k: v for k, v in state.items() if k not in fields}
            return [state[name].detach() for name in fields]

        asked = [
            (slot, p) for slot, p, *_ in parameters if slot in options_of or slot in numbers_of
        ]
        with one_thread():
            saved = self._offload.save(asked, first_state if options_of else None)
        states: dict[int, State] = {}
        for slot, _, tensors in saved:
            kept = self._slots[slot].kept
            named = dict(zip((*kept.fields, MASTER), tensors, strict=False))
            state = {
                name: named[name] if name in named else copied(numbers_of[slot][name])
                for name in kept.names
            }
            states[slot] = state | {n: t for n, t in named.items() if n == MASTER}
        return [states.get(slot) for slot, *_ in parameters]

    def read(self, slot: int, parameter: Tensor, name: str) -> Tensor:
        """Returns one tensor of a parameter's state, in memory of its own."""
        names = [*self._slots[slot].kept.fields, MASTER]
        return self._offload.read(slot, parameter, names.index(name))

    def change(self, states: list[Loaded]) -> None:
        """Changes what is given of these states. The rest of a state stays."""
        for slot, parameter, kept, _ in states:
            self.expect(slot, parameter, kept)
        numbers = [
            (self._slots[slot].numbers or {} if self._offload.has_state(slot) else {})
            | _numbers(kept, state)
            for slot, _, kept, state in states
        ]
        self._offload.change([self._given(entry) for entry in states])
        for entry, own in zip(states, numbers, strict=True):
            self._slots[entry.slot].numbers = own

    def load(self, states: list[Loaded]) -> None:
        """Forgets all state and takes this. It works after an error too."""
        before = {entry.slot: self._slots[entry.slot].kept for entry in states}
        given = []
        for entry in states:
            self._describe(entry.slot, entry.kept)
            given.append(self._given(entry))
        try:
            self._offload.load(given)
        except (TypeError, ValueError):  # Nothing has changed.
            for slot, kept in before.items():
                if kept is not None:
                    self._describe(slot, kept)
            raise
        for slot, _, kept, state in states:
            self._slots[slot].numbers = _numbers(kept, state)

    def _given(self, entry: Loaded) -> tuple[int, Tensor, int, list[Tensor | None]]:
        slot, parameter, _, state = entry
        names = [*self._slots[slot].kept.fields, MASTER]
        return slot, parameter, 0, [state.get(name) for name in names]

    def plan(self, parameters: Iterable[tuple[int, Tensor]]) -> dict[str, int]:
        return self._offload.plan(list(parameters))


def _numbers(kept: Kept, state: State) -> State:
    """Returns the part of a state that is no field."""
    return {k: state[k] for k in kept.names if k in state and k not in kept.fields}


def _agree(one: Any, other: Any) -> bool:
    """As ``same``, which takes long: this runs for each piece."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        equal = one.dtype == other.dtype and torch.equal(one, other)
    else:
        equal = type(one) is type(other) and one == other
    return equal or same(one, other)
