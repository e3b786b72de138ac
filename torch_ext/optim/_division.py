"""How state is divided among processes and drives, and how a commit is divided anew.

Each process commits the boxes of parameters that it has. A run that goes on in the same
division takes its store as it is. Any other run reads the old stores. For each of its own boxes
it finds the old boxes that meet it, in whatever stores they are. It makes new state of them, in
a store of the next epoch. Its first commit makes the old stores needless: they are removed.

So files of several epochs may lie side by side after a crash. The newest epoch counts of which
there are the stores of all processes, with a commit that all have.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_ext import _stores
from torch_ext._native import _C
from torch_ext.optim._commit import Commit, chosen, described, read_document, whole_document
from torch_ext.optim._dtensor import first_element, is_distributed, local_of
from torch_ext.optim._together import Together

_logger = logging.getLogger("torch_ext")

T = TypeVar("T")

_FILE = re.compile(r"state\.r(\d+)-of-(\d+)\.e(\d+)\.d(\d+)\.store")

#: What AdamW keeps, beside a master.
ADAMW_FIELDS = [("exp_avg", torch.float32), ("exp_avg_sq", torch.float32)]


# Boxes -----------------------------------------------------------------------------------


def box_of(parameter: Tensor) -> dict[str, Any]:
    """Returns what a commit says of the place that this process's part has in the whole.

    A parameter that is no DTensor is the whole itself, and nothing is said of it. ``begin`` is
    None where the place cannot be told.
    """
    if not is_distributed(parameter):
        return {}
    begin = None
    with suppress(ImportError, AttributeError, TypeError, ValueError, NotImplementedError):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if tuple(shape) == tuple(local_of(parameter).shape) and len(offset) == len(shape):
            begin = [int(number) for number in offset]
    return {"whole": list(parameter.shape), "begin": begin}


class _Groups(torch.optim.Optimizer):
    """Groups of parameters, as every optimizer takes them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


def groups_of(params: Any) -> list[dict[str, Any]]:
    """Returns the groups that ``params`` are. Raises: as an optimizer does."""
    return _Groups(params).param_groups


def place_in_whole(entry: Mapping[str, Any]) -> tuple[list[int], list[int] | None]:
    """Returns the sizes of the whole, and where a committed part begins in it."""
    shape = entry["shape"]
    return entry.get("whole", shape), entry.get("begin", [0] * len(shape))


Box = tuple[tuple[int, ...], tuple[int, ...]]  #: Where it begins in the whole, and its sizes.


def committed_box(name: str, entry: Mapping[str, Any]) -> tuple[Box, tuple[int, ...]]:
    """Returns the box that a committed part is, and the order of its dimensions in memory.

    Raises:
        ValueError: The commit does not say where the part of the parameter ``name`` begins.
    """
    _, begin = place_in_whole(entry)
    if begin is None:
        raise ValueError(
            f"the commit does not say which part of {name} each process has, so it can be "
            f"resumed only by as many processes in the same division"
        )
    sizes = tuple(entry["shape"])
    # Dimensions of size 1 are left out, and may stand anywhere.
    order = [*entry["order"], *(dim for dim in range(len(sizes)) if dim not in entry["order"])]
    return (tuple(begin), sizes), tuple(order)


def common_elements(box: Box, other: Box) -> int:
    """Returns how many elements two boxes have in common."""
    return math.prod(
        max(0, min(a + n, b + m) - max(a, b)) for a, n, b, m in zip(*box, *other, strict=True)
    )


# Stores ----------------------------------------------------------------------------------

#: By a store's id: what keeps others from going on with it.
Locks = dict[bytes, _C.StoreLock]


def release(locks: Locks) -> None:
    """Gives up all of them. Errors: none."""
    while locks:
        locks.popitem()[1].release()


@dataclass(frozen=True)
class Division:
    """Stores that were committed together, as far as their names tell."""

    epoch: int
    world: int


def _files_in(directory: Any) -> Iterator[tuple[tuple[int, int, int], int, str]]:
    """Returns (epoch, world, rank), drive and path of the files of stores in a directory."""
    try:
        names = os.listdir(directory)
    except OSError:
        return  # Whoever opens it says what is wrong.
    for name in map(os.fsdecode, names):
        if match := _FILE.fullmatch(name):
            rank, world, epoch, drive = map(int, match.groups())
            yield (epoch, world, rank), drive, os.path.join(os.fsdecode(directory), name)


def _seen(directories: Iterable[tuple[Any, int]]) -> set[tuple[int, int, int]]:
    """Returns (epoch, world, rank) of the stores with files in ``directories``."""
    return {store for directory, _ in directories for store, *_ in _files_in(directory)}


def next_epoch(directories: list[tuple[Any, int]]) -> int:
    """Returns the least epoch of which no store is seen here."""
    return max((epoch + 1 for epoch, *_ in _seen(directories)), default=0)


def another_run_in(
    directories: list[tuple[Any, int]], epoch: int, world: int, rank: int
) -> str | None:
    """Returns a file of a store that would count, or be in doubt, beside a new one.

    The new one is that of ``rank`` in ``epoch`` and ``world``. Files of its own names are not
    looked for.
    """
    for number, (directory, _) in enumerate(directories):
        for store, drive, path in _files_in(directory):
            is_other = store[0] >= epoch and store[:2] != (epoch, world)
            if is_other or (store == (epoch, world, rank) and drive != number):
                return path
    return None


#: What a directory is known by, whatever it is called.
Place = tuple[str, int, int]


def place_of_directory(directory: Any) -> Place:
    """Raises OSError if there is none."""
    found = os.stat(directory)
    return socket.gethostname(), found.st_dev, found.st_ino


def check_is_free(directories: list[tuple[Any, int]], old: list[tuple[Any, int]]) -> None:
    """Raises FileExistsError if a store is in ``directories`` that are not among ``old``."""
    known = {place_of_directory(directory) for directory, _ in old}
    for directory, _ in directories:
        files = [path for *_, path in _files_in(directory)]
        if not files or place_of_directory(directory) in known:
            continue
        raise FileExistsError(
            errno.EEXIST,
            "the state cannot move here, where a store is already: resume that one, remove it, "
            "or give another directory",
            max(files),
        )


def newest_epoch(directories: list[tuple[Any, int]]) -> int:
    """Returns the newest epoch of a store of one process that is seen here, or 0."""
    return max((e for e, world, _ in _seen(directories) if world == 1), default=0)


def find_divisions(together: Together, directories: list[tuple[Any, int]]) -> list[Division]:
    """Returns the divisions to go on from, the newest first. An older one counts only if the
    newer ones have no commit.

    Raises:
        ValueError: There are two of an epoch, so that neither is newer.
        OSError: Stores of processes are missing (ENXIO).
    """
    seen: set[tuple[int, int, int]] = set().union(*together.exchange(_seen(directories)))
    ranks: dict[Division, set[int]] = defaultdict(set)
    for epoch, world, rank in seen:
        ranks[Division(epoch, world)].add(rank)
    if not ranks:
        return []
    whole = sorted(
        (d for d, there in ranks.items() if there >= set(range(d.world))),
        key=lambda d: (-d.epoch, d.world),
    )
    if not whole:
        newest = max(ranks, key=lambda d: (d.world == together.world, d.epoch, d.world))
        if newest.world == together.world:
            return [newest]  # find_common() says what is missing.
        raise _missing(newest, ranks[newest])
    if len(whole) > 1 and whole[0].epoch == whole[1].epoch:
        raise ValueError(
            f"there are commits of {whole[0].world} and of {whole[1].world} processes, and "
            f"nothing says which is the newer: remove the stores that do not count "
            f"(python -m torch_ext remove)"
        )
    last = max(division.epoch for division in ranks)
    if whole[0].epoch < last:
        _warn_of_unfinished(together, last, whole[0].epoch)
    return whole


def _warn_of_unfinished(together: Together, epoch: int, taken: int) -> None:
    """Logs, once, that a division was cut off in its first commit."""
    if together.rank > 0:
        return
    _logger.warning(
        "epoch %d of the state was cut off before all processes had committed; the commits of "
        "epoch %d are taken. Remove the files of the other (*.e%d.*.store)",
        epoch,
        taken,
        epoch,
    )


class UnfinishedError(OSError):
    """A first commit of several processes was cut off, or failed."""


def look_in_newest(
    together: Together, divisions: list[Division], look: Callable[[Division], T]
) -> T:
    """Returns what ``look`` returns for the newest of the divisions that has a commit.

    Raises:
        Exception: What it raises, unless a newer division has no commit of all processes.
    """
    for division, older in zip(divisions, divisions[1:], strict=False):
        try:
            return look(division)
        except (FileNotFoundError, UnfinishedError):
            _warn_of_unfinished(together, division.epoch, older.epoch)
    return look(divisions[-1])


def newest_common(roots: Mapping[int, list[int]], world: int) -> int:
    """Returns the newest generation that all processes have. ``roots`` has what each has.

    Raises:
        OSError: Shards are missing (ENXIO, and UnfinishedError after a first commit that did
            not end), or the processes have no commit in common (EIO).
    """
    there = [roots.get(rank, []) for rank in range(world)]
    without = [str(rank) for rank, generations in enumerate(there) if not generations]
    if without:
        unfinished = all(generations in ([], [1]) for generations in there)
        raise (UnfinishedError if unfinished else OSError)(
            errno.ENXIO,
            f"the shards of rank {', '.join(without)} of {world} are missing: give "
            f"each process the directories that it had"
            + (
                ". Or the first commit was cut off: then remove the files" if unfinished else ""
            ),
        )
    common = set(there[0]).intersection(*there[1:])
    if not common:
        raise OSError(
            errno.EIO,
            f"the processes have no commit in common; by rank, their last generations are "
            f"{', '.join(str(generations[0]) for generations in there)}",
        )
    return max(common)


def _missing(division: Division, there: Iterable[int], more: str = "") -> OSError:
    lost = sorted(set(range(division.world)) - set(there))
    return OSError(
        errno.ENXIO,
        f"the commit is of {division.world} processes, and the shards of rank "
        f"{', '.join(map(str, lost))} are missing: give directories that have them all{more}",
    )


def _stores_in(
    directories: list[tuple[Any, int]],
) -> tuple[list[_stores.StoreFiles], list[_stores.Problem]]:
    """Returns the stores that count. A copy under another name is somebody's backup."""
    found, problems = _stores.find_stores(
        [os.fsdecode(directory) for directory, _ in directories]
    )
    stores = [
        store
        for store in found
        if all(
            os.path.basename(path) == _C.StorePlace(**store.division).file_of(drive)
            for drive, path in store.files.items()
        )
    ]
    return stores, problems


def needless_stores(
    directories: list[tuple[Any, int]], document: Mapping[str, Any]
) -> tuple[_stores.StoreFiles, ...]:
    """Returns the stores in whose place a commit says to be."""
    replaces = document.get("replaces")
    if not replaces:
        return ()
    stores, _ = _stores_in(directories)
    return tuple(store for store in stores if store.id.hex() in replaces)


def remove_stores(stores: Iterable[_stores.StoreFiles], locks: Locks | None = None) -> None:
    """Removes stores whose state lies elsewhere now. ``locks``: only those that it has."""
    for store in stores:
        if locks is not None:
            if (lock := locks.pop(store.id, None)) is None:
                continue  # Another process's.
            lock.release()
        try:
            _stores.remove(store)
        except FileNotFoundError:
            pass  # Another process was first.
        except (OSError, ValueError) as error:
            _logger.warning("%s is not needed any more, and stays: %s", store.path, error)


# Commits of another division ---------------------------------------------------------------


class Source:
    """Commits that other stores have, to be divided anew. They are only read."""

    def __init__(
        self,
        together: Together,
        division: Division,
        stores: dict[int, _stores.StoreFiles],
        commits: dict[int, list[tuple[int, int, int, str]]],
        how: tuple[Any, str],
        locks: Locks,
    ) -> None:
        """``stores`` and ``commits`` go by rank, as far as they are seen here."""
        self.together, self.division, self.stores = together, division, stores
        self.generation = 0
        #: Of the old stores that this process keeps others from.
        self.locks = locks
        self.documents: dict[int, dict[str, Any]] = {}
        self.commits, self._how = commits, how
        self._open: dict[int, _C.CommitSource] = {}
        #: By slot: steps, where this process's part begins, its shards, their layout.
        self._shards: dict[int, tuple[int | None, list[int], list[Any], Any]] = {}
        self._sizes: dict[int, int] = {}  #: By slot, the elements of the part.
        self._slots: dict[int, int] = {}  #: By the number of a parameter's values.

    @property
    def base(self) -> int:
        """The rank whose document this process goes on from."""
        seen = sorted(self.stores)
        wanted = self.together.rank % self.division.world
        return wanted if wanted in seen else seen[wanted % len(seen)]

    def choose(self, step: int | None, kind: str) -> tuple[Commit, dict[str, Any]]:
        """Chooses the newest commit, or that of ``step``."""

        def choose_here() -> Commit:
            commit, _ = chosen(self.commits[self.base], step, kind)
            for rank, commits in self.commits.items():
                texts = [t for g, _, _, t in commits if g == commit.generation]
                if not texts:
                    raise OSError(
                        errno.EIO,
                        f"commit {commit.generation} of rank {rank} is lost or damaged, and "
                        f"the others have it: take another one with step=",
                        self.stores[rank].path,
                    )
                self.documents[rank] = read_document(texts[0], kind)
            return commit

        commit = self.together.agreed(choose_here)
        self.together.same(commit.generation, "resume(): the generation of the commit")
        check_run(self.together, list(self.documents.values()))
        self._warn_of_extra()
        self.generation = commit.generation
        return commit, self.documents[self.base]

    def _warn_of_extra(self) -> None:
        """Logs that processes which are more than before have the extra of others."""
        before, now = self.division.world, self.together.world
        if self.together.rank > 0 or now <= before:
            return
        _logger.warning(
            "the commit is of %d process%s and %d go on: committed_extra of rank %d is that of "
            "rank 0, and so on. Random numbers that it sets would repeat",
            before,
            "" if before == 1 else "es",
            now,
            before,
        )

    def close(self) -> None:
        """Lets others go on with the stores."""
        release(self.locks)

    def store(self, rank: int) -> _C.CommitSource:
        if rank not in self._open:
            self._open[rank] = _C.CommitSource(
                self.stores[rank].paths, *self._how, self.generation
            )
        return self._open[rank]

    def committed_values(self, generation: int) -> list[tuple[int, int]]:
        """Returns elements and their bytes of all values, as the parameters here have them."""
        values = list(self.store(self.base).values)
        for number, slot in self._slots.items():
            values[number] = (self._sizes[slot], values[number][1])
        return values

    def document_for(self, by_name: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns the document that these parameters would have had in such a commit.

        What each part is made of is kept for ``take()``.
        """
        with whole_document():
            document = dict(self.documents[self.base])
            entries = dict(document["parameters"])
            for name, entry in entries.items():
                if "shape" not in entry or (parameter := by_name.get(name)) is None:
                    continue
                whole, _ = place_in_whole(entry)
                here = described(local_of(parameter))
                mine = box_of(parameter)
                fits = whole == mine.get("whole", here["shape"])
                place = {k: here[k] for k in ("shape", "order")} if fits else {"shape": whole}
                entries[name] = {**entry, **place, "first": first_element(parameter)}
                if fits:
                    self._gather(name, entry, parameter, here["shape"], mine)
            return document | {"parameters": entries}

    def _gather(
        self,
        name: str,
        entry: dict[str, Any],
        parameter: Tensor,
        sizes: list[int],
        mine: dict[str, Any],
    ) -> None:
        """Finds the parts of which this process's part of a parameter is made."""
        begin = mine.get("begin", [0] * len(sizes))
        if begin is None:
            raise ValueError(f"{name} is distributed in a way whose places cannot be told")
        ranks_of: dict[Box, list[int]] = defaultdict(list)
        for rank, document in self.documents.items():
            box, _ = committed_box(name, document["parameters"][name])
            ranks_of[box].append(rank)
        shards, there, steps = [], 0, set()
        needed = math.prod(sizes)
        for box, ranks in ranks_of.items():
            common = common_elements((tuple(begin), tuple(sizes)), box)
            if common == 0 and needed > 0:
                continue
            rank = ranks[self.together.rank % len(ranks)]  # All have the same.
            theirs = self.documents[rank]["parameters"][name]
            source, slot = self.store(rank), theirs["slot"]
            steps.add(source.steps[slot])
            there += common
            if common:
                _, order = committed_box(name, theirs)
                shards.append((source, slot, theirs["value"], *map(list, (*box, order))))
        if there < needed:
            raise _missing(self.division, self.stores, f" (for {name})")
        if len(steps) > 1:
            raise ValueError(f"the shards of {name} are at different steps: {steps}")
        layout: Any = (ADAMW_FIELDS, self.documents[self.base].get("state_format", "exact"))
        if "fields" in entry:
            fields = [(field, getattr(torch, dtype)) for field, dtype in entry["fields"]]
            layout = (fields, "exact")
        self._shards[entry["slot"]] = (steps.pop(), begin, shards, layout)
        if entry["value"] is not None:
            self._slots[entry["value"]] = entry["slot"]
            self._sizes[entry["slot"]] = needed

    def take(
        self,
        offload: _C.TensorOffload,
        parts: list[tuple[int, Tensor, int]],
        tensors: list[Tensor],
        next_slot: int,
    ) -> None:
        """Makes state of what the old stores have, and fills ``tensors``."""
        base = self.store(self.base)
        if not 0 <= next_slot <= len(base.steps):
            raise KeyError("next")
        divided = []
        for slot, tensor, first in parts:
            step, begin, shards, layout = self._shards.get(
                slot, (None, [], [], (ADAMW_FIELDS, "exact"))
            )
            divided.append((slot, tensor, first, step, begin, shards, layout))
        _C.take_divided(offload, divided, next_slot)
        for number, tensor in enumerate(tensors):
            if number in self._slots:
                _, begin, shards, layout = self._shards[self._slots[number]]
            else:
                shape = list(tensor.shape)
                begin, layout = [0] * len(shape), ([], "exact")
                shards = [(base, 0, number, begin, shape, list(range(len(shape))))]
            _C.read_committed("value", shards, layout, tensor.dtype, begin, tensor)
        self._open.clear()
        self._shards.clear()


def check_run(together: Together, documents: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError if the commits of several processes are not all of one run."""
    runs = {document.get("run") for document in documents}
    runs = set().union(*together.exchange(runs))
    if len(runs) > 1:
        raise ValueError(
            "the shards are of different runs, so they are no parts of one state: give the "
            "directories of one run only"
        )


def _commits_of(store: _stores.StoreFiles, aio: Any, engine: str) -> list[list[Any]]:
    try:
        return _C.list_commits(store.paths, aio, engine)
    except FileNotFoundError:
        if not os.path.exists(store.path):
            raise
        return []  # It has a tombstone.


def _lock_all(together: Together, stores: Iterable[_stores.StoreFiles]) -> Locks:
    """Keeps others from going on with stores. Each is locked by one of those who see it."""
    seen = together.exchange([store.id for store in stores])
    before = {each for ids in seen[: together.rank] for each in ids}
    locks: Locks = {}

    def lock_mine() -> None:
        for store in stores:
            if store.id in before:
                continue
            try:
                locks[store.id] = _C.StoreLock(store.path)
            except FileNotFoundError:  # Not "nothing was committed".
                raise OSError(
                    errno.EAGAIN, "another run has gone on from it and removed it", store.path
                ) from None

    try:
        together.agreed(lock_mine)
    except BaseException:
        release(locks)
        raise
    return locks


def find_source(
    together: Together,
    division: Division,
    directories: list[tuple[Any, int]],
    aio: Any,
    engine: str,
    takes_them: bool = False,
) -> Source:
    """Returns the newest commits that all stores of a division have.

    ``takes_them`` keeps others from going on with the stores, before their commits are read.

    Raises:
        OSError: Stores are missing (ENXIO) or damaged, or have no commit in common (EIO).
            Somebody goes on with one (EAGAIN).
    """

    def look() -> tuple[dict[int, _stores.StoreFiles], str]:
        found, problems = _stores_in(directories)
        stores: dict[int, _stores.StoreFiles] = {}
        for store in found:
            rank, *place = (store.division[key] for key in ("rank", "epoch", "world"))
            if Division(*place) != division or store.missing() is not None:
                continue
            if rank in stores:
                raise FileExistsError(
                    errno.EEXIST,
                    f"{store.path} is a store of rank {rank} too: give the directories of one "
                    f"run only",
                    stores[rank].path,
                )
            stores[rank] = store
        problems += [p for store in found if (p := store.missing()) is not None]
        return stores, "; ".join(map(str, problems))

    stores, problems = together.agreed(look)
    locks = _lock_all(together, stores.values()) if takes_them else {}
    try:
        commits = _newest_in(together, division, stores, problems, (aio, engine))
    except BaseException:
        release(locks)
        raise
    return Source(together, division, stores, commits, (aio, engine), locks)


def _newest_in(
    together: Together,
    division: Division,
    stores: dict[int, _stores.StoreFiles],
    problems: str,
    how: tuple[Any, str],
) -> dict[int, Any]:
    """Returns the commits of the newest root that all have, by rank, of those seen here."""
    lists = together.agreed(
        lambda: {rank: _commits_of(store, *how) for rank, store in stores.items()}
    )
    roots: dict[int, list[int]] = {}
    for seen in together.exchange({r: [c[-1][0] for c in kept] for r, kept in lists.items()}):
        roots |= seen
    if len(roots) < division.world:
        raise _missing(division, roots, problems and f" ({problems})")
    root = newest_common(roots, division.world)

    def seen_here() -> None:
        if not stores:
            raise _missing(division, ())

    together.agreed(seen_here)
    return {r: next(k for k in kept if k[-1][0] == root) for r, kept in lists.items()}
