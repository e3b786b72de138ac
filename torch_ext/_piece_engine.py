"""State of parameters in tiles, which a PieceOptimizer updates.

The compiled StateEngine brings tiles into memory and calls back with segments: runs of one
parameter's elements with their state. ``_cut`` makes pieces of them that fit the processor's
cache. ``_run`` hands batches of pieces to the class: each with its values in float32, its
gradient, its fields in the tile and copies of its numbers. Then the new values go to the
parameter, and the numbers of the last piece are the parameter's. What the class writes to its
group must be the same for all pieces; it reaches the group when the step has succeeded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_ext._elementwise import Kept, Piece, PieceError, PieceOptimizer, State
from torch_ext._native import _C
from torch_ext._undisturbed import one_thread
from torch_ext._values import copied, differing, same
from torch_ext.config import AioConfig

#: The name of the float32 master of a 16-bit parameter in a state_dict().
MASTER = "master_param"
#: The bytes of the budget that an element of a piece takes: float32 copies of the parameter and
#: the gradient, and four tensors for what a class computes in between.
_PIECE_BYTES = 24
_CUT = 256  # Parameters are cut only at multiples of it.
#: The most elements of a call. What is computed in between then stays in the processor's cache.
_MOST = 128 * _CUT


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
    """A parameter's place in the engine, and what its state was made for."""

    number: int | None = None
    kind: tuple[Any, ...] = ()
    kept: Kept | None = None
    #: State that is no field. None if there is no state.
    scalars: State | None = None


@dataclass
class _Work:
    """A parameter while its tiles pass by."""

    slot: _Slot
    parameter: Tensor
    kept: Kept
    group: int = 0
    gradient: Any = None
    #: Whether pieces are copies of the gradient's elements.
    gradient_is_copied: bool = False
    #: The gradient to write to, if the class does that and pieces are copies.
    written_gradient: Tensor | None = None
    sources: dict[str, Any] = field(default_factory=dict)
    scalars: State | None = None

    def __post_init__(self) -> None:
        self.reader = _C.OrderedReader(self.parameter, self.parameter)


class PieceEngine:
    """Does for any class what ``_C.AdamWEngine`` does for AdamW. Holds no parameter.

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
    ) -> None:
        scratch = min(max(host_memory // 16 // 4096 * 4096, 48 << 10), _MOST * _PIECE_BYTES)
        self._state = _C.StateEngine(directories, aio, host_memory, scratch, engine, verify)
        self._directory = os.path.abspath(os.fsencode(directories[0][0]))
        self._mode = state_dict_mode
        self._optimizer = optimizer
        self._most = scratch // _PIECE_BYTES // _CUT * _CUT
        self._slots: dict[int, _Slot] = {}
        self._next = 0

    def add(self, parameter: Tensor, trained: bool) -> int:
        """Gives a parameter a slot. Takes no space yet.

        The parameter is checked if it is trained, else when it has a gradient: frozen ones may
        be anything.
        """
        if trained:
            _C.check_trained(parameter)
        self._slots[self._next] = _Slot()
        self._next += 1
        return self._next - 1

    def remove(self, slot: int) -> None:
        """Takes a slot back, with its state."""
        if (own := self._slots.pop(slot, None)) is not None and own.number is not None:
            self._state.remove(own.number)

    def forget(self, slots: list[int]) -> None:
        """Takes state and space from slots. Their next step is the first."""
        own = [self._slots[slot] for slot in slots]
        self._state.forget([o.number for o in own if o.number is not None])
        for o in own:
            o.scalars = None

    def has_state(self, slot: int) -> bool:
        return self._slots[slot].scalars is not None

    def fits(self, slot: int, parameter: Tensor, kept: Kept) -> bool:
        """Whether the slot's state fits the parameter as it is now."""
        own = self._slots[slot]
        return (
            own.kind == _kind_of(parameter)
            and own.kept is not None
            and own.kept.goes_on_as(kept)
        )

    def expect(self, slot: int, parameter: Tensor, kept: Kept, anew: bool = False) -> None:
        """Prepares the slot for the parameter as it is now, unless it has a state that fits.

        Raises:
            RuntimeError, ValueError: It has a state that does not fit.
        """
        _C.check_trained(parameter)
        own = self._slots[slot]
        kind = _kind_of(parameter)
        if own.scalars is not None and not anew:
            self._check_same(own, kind, kept)
            return
        if own.number is None or own.kind != kind or not own.kept.same(kept):
            if own.number is not None:
                self._state.remove(own.number)
            sizes = [f.itemsize for f in kept.fields.values()]
            own.number = self._state.add(parameter.numel(), sizes + _master_size(parameter))
        own.kind, own.kept = kind, kept

    def _check_same(self, own: _Slot, kind: tuple[Any, ...], kept: Kept) -> None:
        names = ("dtype", "sizes", "strides")
        if own.kind != kind:
            was, now = (
                ", ".join(f"{n} {v}" for n, v in zip(names, k, strict=True))
                for k in (own.kind, kind)
            )
            raise RuntimeError(
                f"OffloadedOptimizer: the state was made for a parameter with {was}; it has "
                f"now {now}. Load a state to go on, or delete it from the optimizer's state"
            )
        if not own.kept.goes_on_as(kept):
            raise ValueError(
                f"{self._optimizer.name} keeps {list(kept.names)} with these options, but the "
                f"state was made for {list(own.kept.names)}: load a state that has them, or "
                f"delete it from the optimizer's state"
            )

    def check(self, trained: Trained, kept: Kept) -> None:
        """Checks one parameter. A step begins with this."""
        self.expect(trained.slot, trained.parameter, kept)
        if trained.gradient is not None:
            _C.check_gradient(trained.gradient, trained.parameter)

    def names(self, slot: int) -> list[str]:
        """Returns the names of what is kept, fields and others."""
        return list(self._slots[slot].kept.names)

    def scalars(self, slot: int) -> State:
        """Returns what is kept in memory."""
        return self._slots[slot].scalars or {}

    # Steps ------------------------------------------------------------------------------

    def step(self, groups: list[Group], method: str = "step") -> None:
        """Calls a method of the class for the groups.

        Raises:
            RuntimeError: The class does something that it cannot do to pieces.
        """
        for group in groups:
            for trained in group.trained:
                self.check(trained, group.kept)
        works = {}
        for i, group in enumerate(groups):
            for slot, parameter, gradient in group.trained:
                own = self._slots[slot]
                work = works[own.number] = _Work(own, parameter, own.kept, i)
                # Autograd must see that a tensor that it saved has changed.
                if not parameter.is_inference():
                    torch.autograd.graph.increment_version(parameter)
                if gradient is not None:
                    work.gradient = _C.OrderedReader(gradient, parameter)
                    work.gradient_is_copied = _is_copied(gradient, parameter)
                    if work.gradient_is_copied and group.kept.writes_gradients:
                        work.written_gradient = gradient
        try:
            with one_thread():
                self._optimizer.begin()
                self._run_idle(groups, method)
                self._state.step(
                    list(works),
                    lambda segments: self._update(segments, works, groups, method),
                )
                for work in works.values():
                    if work.parameter.numel() == 0:
                        fields = [f.view(torch.uint8) for f in _no_elements(work)]
                        empty = [(work.slot.number, 0, 0, fields)]
                        self._update(empty, works, groups, method)
                for work in works.values():
                    work.slot.scalars = work.scalars
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
        self,
        segments: list[Any],
        works: dict[int, _Work],
        groups: list[Group],
        method: str,
    ) -> None:
        batch: list[_TilePiece] = []
        elements = 0
        for tile_piece in self._cut(segments, works):
            elements += tile_piece.count
            if batch and (elements > self._most or not batch[-1].joins(tile_piece)):
                self._run(batch, groups, method)
                batch = []
                elements = tile_piece.count
            batch.append(tile_piece)
        if batch:
            self._run(batch, groups, method)
        self._optimizer.check_attributes()

    def _run(self, batch: list[_TilePiece], groups: list[Group], method: str) -> None:
        pieces = [tile_piece.loaded() for tile_piece in batch]
        group = groups[batch[0].work.group]
        after = self._optimizer.run(group.options, pieces, group.kept.from_start, method)
        group.take(after)
        for tile_piece, piece in zip(batch, pieces, strict=True):
            tile_piece.store(piece, self._optimizer.name)

    def _cut(self, segments: list[Any], works: dict[int, _Work]) -> Iterator[_TilePiece]:
        for number, first, count, raw in segments:
            work = works.get(number)
            if work is None:
                continue  # Its parameter is in no group any more.
            dtypes = [like.dtype for like in _no_elements(work)]
            views = [r.view(dtype) for r, dtype in zip(raw, dtypes, strict=True)]
            for done in range(0, max(count, 1), self._most):
                n = min(self._most, count - done)
                fields = [v.narrow(0, done, n) for v in views]
                yield _TilePiece(work, first + done, n, fields)

    # Saved states -----------------------------------------------------------------------

    def save(self, parameters: list[tuple[int, Tensor, Kept, State]]) -> list[State | None]:
        """Returns the state of each parameter, or None where there is none.

        Each is given with its slot, what is kept, and options. After an error all is as before.
        """
        works: dict[int, _Work] = {}
        shown: list[tuple[_Work, State] | None] = []
        for slot, parameter, kept, options in parameters:
            own = self._slots[slot]
            if own.scalars is None and not kept.from_start:
                shown.append(None)
                continue
            self.expect(slot, parameter, kept)
            work = _Work(own, parameter, own.kept)
            work.scalars = own.scalars
            shown.append((work, options))
            if own.scalars is not None:
                works[own.number] = work
        snapshot = _C.Snapshot(self._mode, self._directory)
        places = _places([entry[0] for entry in shown if entry], snapshot)
        snapshot.open()
        with one_thread():
            self._state.read(
                list(works), lambda segments: self._show(segments, works, places, snapshot)
            )
        for entry in shown:
            if entry and entry[0].scalars is None:
                self._show_first(*entry, places, snapshot)
        tensors = snapshot.finish()
        states: list[State | None] = []
        for entry in shown:
            if entry is None:
                states.append(None)
                continue
            work = entry[0]
            found = {name: tensors[number] for name, number in places[id(work)].items()}
            state = {
                name: found[name] if name in found else copied(work.scalars[name])
                for name in work.kept.names
            }
            states.append(state | {n: t for n, t in found.items() if n == MASTER})
        return states

    def _show(
        self, segments: list[Any], works: dict[int, _Work], places: Any, snapshot: Any
    ) -> None:
        for piece in self._cut(segments, works):
            place = places[id(piece.work)]
            for name, values in piece.shown().items():
                snapshot.write(place[name], piece.first, values)

    def _show_first(self, work: _Work, options: State, places: Any, snapshot: Any) -> None:
        """Saves the state that the class makes before the first step."""
        total = work.parameter.numel()
        for first in range(0, max(total, 1), self._most):
            n = min(self._most, total - first)
            values = work.reader.read(first, n).float()
            state = self._optimizer.first_state(options, values) | {MASTER: values}
            work.scalars = {k: state[k] for k in state if k not in (*work.kept.fields, MASTER)}
            for name, number in places[id(work)].items():
                snapshot.write(number, first, state[name].detach().contiguous())

    def read(self, slot: int, parameter: Tensor, name: str) -> Tensor:
        """Returns one tensor of a parameter's state, in memory of its own."""
        own = self._slots[slot]
        if own.kind != _kind_of(parameter) and name != MASTER:
            # Rows are being cut off the parameter first, and then off its state.
            dtype, sizes, strides = own.kind
            strides = strides or torch.empty(sizes, dtype=dtype, device="meta").stride()
            parameter = torch.empty_strided(sizes, strides, dtype=dtype, device="cpu")
        self.expect(slot, parameter, own.kept)
        work = _Work(own, parameter, own.kept)
        like = (
            torch.empty(0, dtype=torch.float32, device="cpu")
            if name == MASTER
            else own.kept.fields[name]
        )
        tensor = torch.empty_strided(
            parameter.size(), parameter.stride(), dtype=like.dtype, device="cpu"
        )
        flat = tensor.as_strided((tensor.numel(),), (1,))

        def show(segments: list[Any]) -> None:
            for piece in self._cut(segments, {own.number: work}):
                flat[piece.first : piece.first + piece.count] = piece.shown()[name]

        with one_thread():
            self._state.read([own.number], show)
        return tensor

    def change(self, states: list[Loaded]) -> None:
        """Changes what is given of these states. The rest of a state stays."""
        works, scalars = {}, {}
        for slot, parameter, kept, state in states:
            own = self._slots[slot]
            fresh = own.scalars is None
            self.expect(slot, parameter, kept)
            work = works[own.number] = _Work(own, parameter, kept)
            names = [*kept.fields, *([MASTER] if _master_dtype(parameter) else [])]
            for name in names:
                source = state.get(name, parameter if fresh and name == MASTER else None)
                reader = None if source is None else _C.OrderedReader(source, parameter)
                work.sources[name] = reader
            numbers = {k: state[k] for k in kept.names if k in state and k not in kept.fields}
            scalars[own.number] = (own.scalars or {}) | numbers
        with one_thread():
            self._state.change(list(works), lambda segments: self._fill(segments, works))
            for number, work in works.items():
                work.slot.scalars = scalars[number]

    def load(self, states: list[Loaded]) -> None:
        """Forgets all state and takes this. It works after an error too."""
        works = {}
        for slot, parameter, kept, state in states:
            self.expect(slot, parameter, kept, anew=True)
            own = self._slots[slot]
            work = _Work(own, parameter, kept)
            work.scalars = {k: state[k] for k in kept.names if k not in kept.fields}
            names = [*kept.fields, *([MASTER] if _master_dtype(parameter) else [])]
            for name in names:
                source = state.get(name, parameter)
                work.sources[name] = _C.OrderedReader(source, parameter)
            works[own.number] = work
        for own in self._slots.values():
            own.scalars = None
        with one_thread():
            self._state.write(list(works), lambda segments: self._fill(segments, works))
            for work in works.values():
                work.slot.scalars = work.scalars

    def _fill(self, segments: list[Any], works: dict[int, _Work]) -> None:
        for piece in self._cut(segments, works):
            for (name, source), values in zip(
                piece.work.sources.items(), piece.fields, strict=True
            ):
                if source is None:
                    continue
                given = source.read(piece.first, piece.count)
                if name == MASTER and values.dtype == torch.int16:
                    _C.split_master(given.float(), None, values)
                else:
                    values.copy_(given)

    # The rest ---------------------------------------------------------------------------

    def plan(self, parameters: Iterable[tuple[int, Tensor]]) -> dict[str, int]:
        return self._state.plan([self._slots[slot].number for slot, _ in parameters])

    def stats(self) -> dict[str, int | float]:
        return self._state.stats()

    def timeline(self) -> list[tuple[str, int, float, float]]:
        return self._state.timeline()

    def notes(self) -> list[str]:
        return self._state.notes()

    @property
    def engine(self) -> str:
        return self._state.engine

    def close(self) -> None:
        self._state.close()


class _TilePiece:
    """Elements of a parameter whose state is in a tile."""

    __slots__ = ("count", "fields", "first", "gradient", "here", "version", "work")

    def __init__(self, work: _Work, first: int, count: int, fields: list[Tensor]) -> None:
        self.work = work
        self.first = first
        self.count = count
        self.fields = fields
        self.here: Tensor | None = None
        self.gradient: Tensor | None = None
        self.version = 0

    def joins(self, other: _TilePiece) -> bool:
        """Whether one call may update this piece and the other."""
        own, others = self.work, other.work
        fresh = own.slot.scalars is None
        return own.group == others.group and fresh == (others.slot.scalars is None)

    def loaded(self) -> Piece:
        work = self.work
        if work.gradient is not None:
            self.gradient = work.gradient.read(self.first, self.count).float()
            self.version = self.gradient._version
        own = work.slot.scalars
        state = None
        if own is not None:
            named = dict(zip(work.kept.fields, self.fields, strict=False))
            state = {
                name: named[name] if name in named else copied(own[name])
                for name in work.kept.names
            }
        return Piece(self._values(), self.gradient, state, work.parameter.__dict__)

    def _values(self) -> Tensor:
        """Returns the values in float32: the parameter's own memory, if that is possible."""
        self.here = here = self.work.reader.read(self.first, self.count)
        if here.dtype == torch.float32:
            return here
        kept = self.fields[-1]
        if here.dtype == torch.bfloat16:
            return _C.join_master(here, kept)
        # A master that does not round to the parameter is replaced by the parameter.
        same = kept.half().view(torch.int16) == here.view(torch.int16)
        return torch.where(same, kept, here.float())

    def store(self, piece: Piece, name: str) -> None:
        work = self.work
        state = piece.state
        if state.keys() != work.kept.names.keys():
            raise RuntimeError(
                f"{name} keeps {list(state)} but {list(work.kept.names)} in the trial"
            )
        moved = []
        for key, values in zip(work.kept.fields, self.fields, strict=False):
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
        self._store_numbers({k: v for k, v in state.items() if k not in work.kept.fields})
        if work.written_gradient is not None:
            _write(work.written_gradient, work.parameter, self.first, self.gradient)
        elif work.gradient_is_copied and self.gradient._version != self.version:
            raise PieceError("it writes to gradients, which it did not in the trial")
        here = self.here
        if here.dtype == torch.bfloat16:
            _C.split_master(piece.values, here, self.fields[-1])
        elif here.dtype == torch.float16:
            self.fields[-1].copy_(piece.values)
            here.copy_(piece.values)
        if not work.parameter.is_cpu:
            there = work.parameter.detach()
            first = there.storage_offset() + self.first
            with torch.inference_mode(there.is_inference()):
                there.as_strided((self.count,), (1,), first).copy_(here)

    def _store_numbers(self, numbers: State) -> None:
        """All pieces of a parameter must have the same."""
        before = self.work.scalars
        for name in numbers if before is not None else ():
            if _agree(numbers[name], before[name]):
                continue
            raise PieceError(
                f"it has written something else to the state {name!r} with other pieces of a "
                f"parameter, which it did not in the trial"
            )
        self.work.scalars = numbers

    def shown(self) -> dict[str, Tensor]:
        """Returns what a state_dict() has of the piece, by name."""
        shown = dict(zip(self.work.kept.fields, self.fields, strict=False))
        if _master_dtype(self.work.parameter):
            shown[MASTER] = self._values()
        return shown


def _places(works: list[_Work], snapshot: Any) -> dict[int, dict[str, int]]:
    """Adds each tensor to the snapshot. Returns their numbers there."""
    places = {}
    for work in works:
        dtypes = dict(work.kept.fields)
        if _master_dtype(work.parameter):
            dtypes[MASTER] = torch.empty(0, dtype=torch.float32, device="cpu")
        like = work.parameter.detach()
        places[id(work)] = {name: snapshot.add(like, of) for name, of in dtypes.items()}
    return places


def _no_elements(work: _Work) -> list[Tensor]:
    """Returns the fields, without elements."""
    return [
        *work.kept.fields.values(),
        *(torch.empty(0, dtype=d, device="cpu") for d in _master_dtype(work.parameter)),
    ]


def _master_dtype(parameter: Tensor) -> list[torch.dtype]:
    """Returns the dtype of what is kept of the parameter itself. See docs/formats.md."""
    return {torch.bfloat16: [torch.int16], torch.float16: [torch.float32]}.get(
        parameter.dtype, []
    )


def _master_size(parameter: Tensor) -> list[int]:
    return [dtype.itemsize for dtype in _master_dtype(parameter)]


def _kind_of(parameter: Tensor) -> tuple[Any, ...]:
    """Returns the dtype, the sizes, and the strides that matter."""
    sizes = list(parameter.shape)
    strides = [s if n != 1 else 0 for n, s in zip(sizes, parameter.stride(), strict=True)]
    return parameter.dtype, sizes, strides if parameter.numel() else []


def _agree(one: Any, other: Any) -> bool:
    """As ``same``, which takes long: this runs for each piece."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        equal = one.dtype == other.dtype and torch.equal(one, other)
    else:
        equal = type(one) is type(other) and one == other
    return equal or same(one, other)


def _is_copied(gradient: Tensor, parameter: Tensor) -> bool:
    """Returns whether pieces of a gradient cannot be views of it."""
    same_order = _kind_of(gradient)[2] == _kind_of(parameter)[2]
    return not (gradient.is_cpu and gradient.dtype == torch.float32 and same_order)


def _write(tensor: Tensor, like: Tensor, first: int, values: Tensor) -> None:
    """Writes elements to ``tensor``. They come in the order that ``like`` has in memory."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    ordered = tensor.detach().permute(order)
    places = torch.arange(first, first + values.numel(), dtype=torch.int64, device="cpu")
    where = torch.unravel_index(places.to(tensor.device), ordered.shape) if order else ()
    ordered[where] = values.to(tensor.device, tensor.dtype).view(-1 if order else ())
