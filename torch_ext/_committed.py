"""A commit as a state dict, for whoever does not own the store.

The state dict has the form that ``torch.distributed.checkpoint`` gives to a model and its
``torch.optim.AdamW``. Its large tensors are meta tensors: each stands for elements that are
read when somebody asks for a box of them, from whatever shards have it. Small ones, such as
steps, are in the commit's document, and so they are real.

No lock is taken. The store's owner may go on, and overwrites the commit once it has made a
later one. That is an OSError (ESTALE), unless the reader can begin again.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torch_ext._checks import Directories, directories_of
from torch_ext._modes import plain_modes
from torch_ext._native import _C
from torch_ext.config import resolve_aio_config
from torch_ext.optim._commit import (
    read_document,
    unpack,
    whole_document,
    whole_number,
)
from torch_ext.optim._division import (
    ADAMW_FIELDS,
    Box,
    Source,
    check_run,
    committed_box,
    common_elements,
    find_divisions,
    find_source,
    look_in_newest,
    place_in_whole,
)
from torch_ext.optim._together import Together

_logger = logging.getLogger("torch_ext")

MASTER = "master_param"
VALUE = "value"

#: Elements that are read in one call. Between calls Ctrl-C takes effect.
_PIECE = 1 << 24

#: What reading fails with if the owner has overwritten the commit, among other reasons.
LOST = (errno.ESTALE, errno.EIO, errno.ENOENT)

Make = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass(frozen=True)
class _Shard:
    """A part of a tensor, and the store that has it."""

    rank: int
    slot: int
    value: int | None
    begin: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor whose elements lie in the commit."""

    what: str  #: "value", or the name of a field.
    dtype: torch.dtype
    shape: tuple[int, ...]
    of_parameter: torch.dtype  #: The dtype of the parameter whose it is.
    shards: tuple[_Shard, ...]
    #: The fields of the state with their dtypes, and its format.
    layout: Any = field(compare=False)
    group: int = 0  #: Tensors of one parameter lie near each other.

    @property
    def boxes(self) -> list[Box]:
        return [(shard.begin, shard.sizes) for shard in self.shards]


class Committed:
    """A commit, in whatever shards it lies."""

    def __init__(
        self,
        path: Directories,
        step: int | None = None,
        *,
        generation: int | None = None,
        model: str = "model",
        optimizer: str = "optim",
    ) -> None:
        """Finds the newest commit in ``path``, or that of ``step`` or ``generation``.

        ``model`` and ``optimizer`` are the names of the two in the state dict.

        Raises:
            FileNotFoundError: Nothing was committed there.
            ValueError: There is no such commit. The text says which there are.
            OSError: Shards are missing (ENXIO), or something is damaged (EIO).
        """
        if step is not None:
            step = whole_number(step, "step", 0)
        self._directories = directories_of(path, "path")
        for directory, _ in self._directories:
            os.listdir(directory)  # Whoever looks for stores in it passes errors by.
        self._names = (model, optimizer)
        self._how = (resolve_aio_config(None), "auto")
        source = self._newest()
        self.division = source.division
        self._stores = source.stores
        self._open: dict[int, _C.CommitSource] = {}
        self._documents: dict[int, dict[str, Any]] = {}
        self.on_read: Callable[[int], None] | None = None  #: Told how many bytes were read.
        self._choose(source, step, generation)
        with whole_document():
            self._stored: dict[int, Stored] = {}
            self._kept: list[Tensor] = []  # So that no other tensor gets their ids.
            self.state_dict = self._make()

    def _newest(self) -> Source:
        """Returns what ``resume()`` would find."""
        alone = Together().alone()
        divisions = find_divisions(alone, self._directories)
        if not divisions:
            raise FileNotFoundError(
                errno.ENOENT, "nothing was committed here", os.fsdecode(self._directories[0][0])
            )
        return look_in_newest(
            alone,
            divisions,
            lambda division: find_source(alone, division, self._directories, *self._how),
        )

    @classmethod
    def find(cls, path: Directories, step: int | None = None, **more: Any) -> Committed:
        """Returns what the constructor makes.

        An owner that goes on may overwrite what is looked at. So this begins again once.
        """
        try:
            return cls(path, step, **more)
        except OSError as error:
            if error.errno not in LOST:
                raise
        return cls(path, step, **more)

    def _choose(self, source: Source, step: int | None, generation: int | None) -> None:
        commits = source.commits
        for found, of_step, time, _ in reversed(commits[0]):
            if step in (None, of_step) and generation in (None, found):
                self.generation, self.step, self.time = found, of_step, time
                break
        else:
            there = ", ".join(str(of_step) for _, of_step, *_ in commits[0])
            wanted = f"step {step}" if generation is None else f"generation {generation}"
            raise ValueError(
                f"there is no commit of {wanted}; the steps of those kept are {there}"
            )
        for rank, kept in commits.items():
            text = next((t for g, _, _, t in kept if g == self.generation), None)
            if text is None:
                raise OSError(
                    errno.EIO,
                    f"generation {self.generation} is not there on rank {rank}",
                    self._stores[rank].path,
                )
            with whole_document():
                kind = json.loads(text)["class"]
            self._documents[rank] = read_document(text, kind)
        check_run(Together().alone(), self._documents.values())

    # The state dict -----------------------------------------------------------------------

    def _make(self) -> dict[str, Any]:
        first = self._documents[0]
        self._steps, self._values = {}, {}
        for rank in self._documents:  # One at a time, since each store has its own queue.
            source = self._source(rank)
            self._steps[rank], self._values[rank] = source.steps, source.values
            self.close()
        model, state, unknown = {}, {}, []
        names = dict.fromkeys(n for d in self._documents.values() for n in d["parameters"])
        for group, name in enumerate(names):
            entries = {
                rank: document["parameters"][name]
                for rank, document in self._documents.items()
                if "shape" in document["parameters"].get(name, {})
            }
            if not entries:
                continue  # It is frozen, and the caller's.
            entry = entries[min(entries)]
            make = _Maker(
                self,
                tuple(place_in_whole(entry)[0]),
                _dtype_of(entry["dtype"]),
                self._shards_of(name, entries),
                group,
            )
            has_values = all(shard.value is not None for shard in make.shards)
            if has_values:
                model[name] = make(VALUE, make.dtype)
            if (step := self._step_of(name, make.shards)) is None:
                continue
            state[name] = self._state_of(entry, step, make)
            if make.dtype == torch.float16 or (make.dtype == torch.bfloat16 and has_values):
                state[name][MASTER] = make(MASTER, torch.float32)
            elif make.dtype == torch.bfloat16:
                unknown.append(name)
        if unknown:
            _logger.warning(
                "the commit has no parameters (include_parameters=False), so the float32 "
                "masters of %s cannot be told",
                ", ".join(unknown[:10]) + (" and others" if unknown[10:] else ""),
            )
        foreign, others, extra = (
            self._unpacked(first[key]) for key in ("foreign", "others", "extra")
        )
        for name, values in foreign.items():
            state.setdefault(name, {}).update(values)
        called_model, called_optimizer = self._names
        result = {called_model: model} if model else {}
        result[called_optimizer] = {"state": state | others, "param_groups": self._groups()}
        if extra is not None:
            result["extra"] = extra
        return result

    def _groups(self) -> list[dict[str, Any]]:
        groups = []
        for i, group in enumerate(self._documents[0]["groups"]):
            # A process may have a part of the model only.
            all_of = [d["groups"][i : i + 1] for d in self._documents.values()]
            names = list(dict.fromkeys(n for of in all_of for g in of for n in g["params"]))
            options = unpack(group["options"], {})
            groups.append({"params": names, "param_names": list(names)} | options)
        return groups

    def _step_of(self, name: str, shards: tuple[_Shard, ...]) -> int | None:
        steps = {self._steps[shard.rank][shard.slot] for shard in shards}
        if len(steps) > 1:
            raise OSError(errno.EIO, f"the shards of {name} are at different steps: {steps}")
        return steps.pop()

    def _state_of(self, entry: Mapping[str, Any], step: int, make: _Maker) -> dict[str, Any]:
        if "fields" not in entry:
            make.layout = (ADAMW_FIELDS, self._documents[0]["state_format"])
            counted = torch.tensor(float(step), dtype=torch.float32, device="cpu")
            return {"step": counted} | {n: make(n, dtype) for n, dtype in ADAMW_FIELDS}
        fields = {name: _dtype_of(dtype) for name, dtype in entry["fields"]}
        make.layout = (list(fields.items()), "exact")
        numbers = unpack(entry["numbers"], {})
        return {
            name: make(name, fields[name]) if name in fields else numbers[name]
            for name in entry["names"]
        }

    def _shards_of(
        self, name: str, entries: Mapping[int, Mapping[str, Any]]
    ) -> tuple[_Shard, ...]:
        """Returns the parts of a parameter. What several processes have is one of them."""
        shards: dict[Box, _Shard] = {}
        for rank, entry in entries.items():
            whole, _ = place_in_whole(entry)
            (begin, sizes), order = committed_box(name, entry)
            for size, first, part in zip(whole, begin, sizes, strict=True):
                if not 0 <= first <= first + part <= size:
                    raise KeyError("begin")
            value = entry["value"]
            item = _dtype_of(entry["dtype"]).itemsize
            if value is not None and self._values[rank][value] != (math.prod(sizes), item):
                raise KeyError("value")
            shard = _Shard(rank, entry["slot"], value, begin, sizes, order)
            shards.setdefault((shard.begin, sizes), shard)
        there = sum(math.prod(sizes) for _, sizes in shards)
        if there != (needed := math.prod(whole)):
            raise OSError(
                errno.EIO, f"the shards have {there} elements of {name}, which has {needed}"
            )
        full = [shard for shard in shards.values() if math.prod(shard.sizes)]
        return tuple(full or list(shards.values())[:1])

    def _unpacked(self, packed: Any) -> Any:
        return unpack(packed, _StandIns(packed, self._of_number))

    def _of_number(self, number: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if self._values[0][number] != (math.prod(shape), dtype.itemsize):
            raise KeyError("tensor")  # Before memory is taken for it.
        begin = (0,) * len(shape)
        shard = _Shard(0, 0, number, begin, shape, tuple(range(len(shape))))
        return self._stand_in(Stored(VALUE, dtype, shape, dtype, (shard,), ([], "exact"), -1))

    def _stand_in(self, stored: Stored) -> Tensor:
        try:
            meta = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        except RuntimeError as error:  # There are no such sizes.
            raise KeyError("shape") from error
        self._kept.append(meta)
        self._stored[id(meta)] = stored
        return meta

    def stored(self, tensor: Any) -> Stored | None:
        """Returns what a tensor of the state dict stands for, or None if it is real."""
        return self._stored.get(id(tensor))

    # Reading ------------------------------------------------------------------------------

    def _source(self, rank: int) -> _C.CommitSource:
        if rank not in self._open:
            self._open[rank] = _C.CommitSource(
                self._stores[rank].paths, *self._how, self.generation
            )
        return self._open[rank]

    def close(self) -> None:
        """Frees the memory of what was read last."""
        self._open.clear()

    def shards(self, stored: Stored) -> list[Any]:
        """Returns a tensor's parts, as the compiled module takes them."""
        return [
            (self._source(s.rank), s.slot, s.value, list(s.begin), list(s.sizes), list(s.order))
            for s in stored.shards
        ]

    def read(
        self, stored: Stored, begin: tuple[int, ...], out: Tensor, box: Box | None = None
    ) -> None:
        """Fills ``out``, of any device and dtype, with the box of its sizes at ``begin``.

        ``box``: the part that has it, if it is one part.
        """
        shards = [
            shard
            for shard in stored.shards
            if common_elements((shard.begin, shard.sizes), (begin, tuple(out.shape)))
            and box in (None, (shard.begin, shard.sizes))
        ]
        parts = self.shards(replace(stored, shards=tuple(shards)))
        with plain_modes():
            for place, piece in _pieces(begin, out):
                self._read_piece(stored, parts, place, piece)
                if self.on_read is not None:
                    self.on_read(piece.numel() * stored.dtype.itemsize)

    def _read_piece(
        self, stored: Stored, parts: list[Any], begin: tuple[int, ...], out: Tensor
    ) -> None:
        plain = (
            out.device.type == "cpu"
            and out.dtype == stored.dtype
            and not (out.is_neg() or out.is_conj())
        )
        to = out if plain else torch.empty(out.shape, dtype=stored.dtype, device="cpu")
        _C.read_committed(
            stored.what, parts, stored.layout, stored.of_parameter, list(begin), to
        )
        if not plain:
            out.copy_(to)
        elif not out.is_inference():
            torch.autograd.graph.increment_version(out)

    def whole(self, value: Any, make: Make | None = None) -> Any:
        """Returns a value, with real tensors in place of those that stand for others.

        ``make`` returns memory for a tensor on the CPU, by shape and dtype.
        """
        if isinstance(value, Tensor):
            stored = self.stored(value)
            if stored is None:
                return value
            with plain_modes():
                real = (make or _empty)(stored.shape, stored.dtype)
            self.read(stored, (0,) * real.dim(), real)
            return real
        if isinstance(value, (list, tuple)):
            return type(value)(self.whole(each, make) for each in value)
        if isinstance(value, dict):
            whole = value.copy()
            for key, each in value.items():  # update() of a Counter would add.
                whole[key] = self.whole(each, make)
            return whole
        return value

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are to be read."""
        return sum(tensor.nbytes for tensor in self._kept)

    def moved_on(self) -> bool:
        """Whether the store's owner has made other commits in place of this one."""
        try:
            found = self._newest()
        except (OSError, ValueError):
            return False
        if found.division != self.division:
            return True
        ids = {rank: store.id for rank, store in found.stores.items()}
        if ids != {rank: store.id for rank, store in self._stores.items()}:
            return True
        return any(
            self.generation not in (g for g, *_ in kept) for kept in found.commits.values()
        )

    def stale(self) -> OSError:
        return OSError(
            errno.ESTALE,
            f"its owner has made other commits in place of that of step {self.step} while it "
            f"was read: read it again, or let commit(keep=2) keep more of them",
            self._stores[0].path,
        )


class _Maker:
    """Makes the stand-ins of one parameter."""

    def __init__(
        self,
        committed: Committed,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        shards: tuple[_Shard, ...],
        group: int,
    ) -> None:
        self.dtype, self.shards = dtype, shards
        self.layout: Any = ([], "exact")
        self._committed, self._shape, self._group = committed, shape, group

    def __call__(self, what: str, dtype: torch.dtype) -> Tensor:
        place = (self._shape, self.dtype, self.shards, self.layout, self._group)
        return self._committed._stand_in(Stored(what, dtype, *place))


class _StandIns(Mapping[int, Tensor]):
    """The tensors of a packed value, which ``unpack()`` asks for by number."""

    def __init__(self, packed: Any, make: Any) -> None:
        self._made: dict[int, Tensor] = {}
        left = [packed]
        while left:
            part = left.pop()
            if isinstance(part, dict) and "tensor" in part:
                shape = tuple(part["shape"])
                number = part["tensor"]
                self._made[number] = make(number, _dtype_of(part["dtype"]), shape)
            elif isinstance(part, (dict, list)):
                left += part.values() if isinstance(part, dict) else part

    def __getitem__(self, number: int) -> Tensor:
        return self._made[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise KeyError("dtype")
    return dtype


def _pieces(begin: tuple[int, ...], out: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yields a box in parts that are read in one call each, first elements first."""
    if out.numel() <= _PIECE:
        if out.numel():
            yield begin, out
        return
    dim = next(i for i, size in enumerate(out.shape) if size > 1)
    half = out.shape[dim] // 2
    yield from _pieces(begin, out.narrow(dim, 0, half))
    further = (*begin[:dim], begin[dim] + half, *begin[dim + 1 :])
    yield from _pieces(further, out.narrow(dim, half, out.shape[dim] - half))
