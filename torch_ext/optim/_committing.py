"""Commits of both optimizers: the state on the drive is the checkpoint.

``commit()`` hands the offload the parameters and a document that says what everything is
(``_commit``). To take a commit, ``resume()`` makes an optimizer on the store that it found, and
``rollback()`` uses the one that there is. From then on both are the same: the parameters must
be those of the commit, they get the numbers that they had, and their values are read.

Several processes commit together (``_together``). They agree on a generation, each makes its
part durable, and a vote makes it count. They resume the newest generation that all have.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_ext._checks import Directories, directories_of
from torch_ext._modes import plain_modes
from torch_ext._native import _C
from torch_ext._quiet import undisturbed
from torch_ext._stores import StoreFiles
from torch_ext.optim._adamw_groups import as_lists
from torch_ext.optim._base import OffloadedBase
from torch_ext.optim._commit import (
    Commit,
    Packer,
    check_parameters,
    chosen,
    described,
    find_tensors,
    named,
    names_of,
    sizes_of,
    unpack,
    ways_of,
    whole_document,
    whole_number,
)
from torch_ext.optim._division import (
    Locks,
    Source,
    another_run_in,
    box_of,
    release,
    remove_stores,
)
from torch_ext.optim._dtensor import first_element, local_of
from torch_ext.optim._found import Found, find, lacks_values
from torch_ext.optim._together import Together, Vote

_logger = logging.getLogger("torch_ext")

T = TypeVar("T")


#: Takes a commit's state and values: what has the state, and (slot, parameter, first element).
Take = Callable[[Any, list[tuple[int, Tensor, int]]], None]


@dataclass(frozen=True)
class Snapshot:
    """A commit that was made a store of its own.

    ``step`` is the commit's. ``way`` is "reflink" if the snapshot shares blocks with the
    original, or "copied". ``bytes`` are those of state and parameters, padded, and ``seconds``
    is the call's wall time.
    """

    step: int
    way: str
    bytes: int
    seconds: float

    @classmethod
    def of(cls, step: int, reflink: bool, count: int, seconds: float) -> Snapshot:
        return cls(step, "reflink" if reflink else "copied", count, seconds)


class CommittingOptimizer(OffloadedBase):
    """An optimizer whose state can outlive the process."""

    _together: Together
    #: How many optimizers of these processes this one has made, with this.
    _number: int
    _directories: list[tuple[str | bytes, int]]
    _epoch = 0
    #: ``commit()`` keeps at least so many.
    _keep_commits = 1
    #: See committed_step and committed_extra.
    _committed: tuple[int | None, Any]
    #: What commit(wait=False) has begun, and its extra.
    #: One at most. It is a list so that one thread alone takes it out, without a lock: an
    #: interrupt may come between locking and unlocking.
    _begun: list[tuple[Commit, Any]]

    def _start(self, offload: Any) -> None:
        super()._start(offload)
        # The number of the step before the first of this object.
        self._first_step = 0
        self._committed = None, None
        self._begun = []
        self._needless: tuple[StoreFiles, ...] = ()
        self._locks: Locks | None = None
        #: The same in all processes, and in all commits that follow each other.
        self._run_id: str | None = None

    @property
    def committed_step(self) -> int | None:
        """The caller's number of the commit that was made, resumed or rolled back to last.

        One that ``commit(wait=False)`` has begun counts once it is durable.
        """
        self._note_begun()
        return self._committed[0]

    @property
    def committed_extra(self) -> Any:
        """What was kept with it."""
        self._note_begun()
        return self._committed[1]

    def _note_begun(self) -> None:
        begun = self._begun
        if not any(commit.done() for commit, _ in list(begun)):
            return
        try:
            commit, extra = begun.pop()
        except IndexError:
            return  # Another thread has taken it.
        if commit.time is not None:
            self._has_committed(commit, extra)

    def _has_committed(self, commit: Commit, extra: Any) -> None:
        self._committed = commit.step, extra
        remove_stores(self._needless, self._locks)
        self._needless, self._locks = (), None

    @undisturbed
    @plain_modes()
    def commit(
        self,
        step: int | None = None,
        *,
        include_parameters: bool = True,
        extra: Any = None,
        keep: int = 1,
        wait: bool = True,
    ) -> Commit:
        """Makes the state durable, as it is now, and the parameters with it.

        The state stays where it is: only the parameters are written, and what host memory holds
        of the state. A crash, a kill or a power cut at any time leaves this commit, or a later
        one, for ``resume()``. The first commit gives the files in ``nvme_path`` names, and
        takes space for a second copy of state and parameters.

        Several processes commit together: each calls this, at the same step. Either all have
        the commit then, or none.

        Args:
            step: The caller's number, from 0. None: how many steps this optimizer has made,
                counted on from the step of the commit that it resumed or rolled back to.
            include_parameters: Whether the parameters are kept too. A 16-bit parameter and what
                the state has of its master are one number: without it, ``resume()`` must find
                the parameters as they are now.
            extra: What else shall be kept, such as the state of a scheduler and
                ``torch_ext.rng_state()``: dict, list, tuple, str, bytes, numbers, bool, None
                and tensors, nested up to 100 levels. ``committed_extra`` is this object then,
                with what is written to it later.
            keep: How many of the newest commits stay on the drive, from 1; not fewer than
                ``keep_commits``.
            wait: False returns before the commit is durable. It goes on behind the next forward
                and backward pass. Until the ``wait_source()`` of what is returned, only this
                optimizer may change the parameters and the tensors in ``extra``. The next
                ``step()`` waits until they have been copied, and the first gradient with
                "update" does. An error of the drive is raised by the ``wait()`` of what is
                returned, or else by the next ``commit()`` or by ``close()``. Several processes
                vote over gloo connections of their own, on a thread of this optimizer's.

        Returns:
            What was committed: its ``generation``, ``step``, ``time``, ``bytes_written`` and
            ``seconds``. See ``Commit``.

        Raises:
            OSError: There is no room (before a byte is written), the drive failed, or another
                run's store is in ``nvme_path`` (FileExistsError). The commit before is as it
                was, and steps go on, unless the text says otherwise.
            TypeError: ``extra`` cannot be kept. Nothing has changed then.
            ValueError: So too, if it is nested deeper or a tensor has lost its memory. ``step``
                or ``keep`` is out of range, two parameters have one name, a group has options
                that ``step()`` would refuse, or the processes are at different steps.
            RuntimeError: Between backward and ``step()`` with "update", after a failed step,
                with ``verify=False``, or if a parameter no longer fits its state.

        What one process raises, all raise: the text names its rank.
        """
        tensors: list[Tensor] = []

        def prepare() -> tuple[int, int, str]:
            self._life.check()
            self._together.check("commit()")
            for begun, _ in list(self._begun):
                begun._wait_unseen()
            self._check_between_steps("commit()")
            at = self._steps() if step is None else whole_number(step, "step", 0)
            kept = max(whole_number(keep, "keep", 1), self._keep_commits)
            self._state.flush()
            self._check_to_commit()
            self._check_is_alone()
            self._numbers_of_saved("commit()")  # Warns of state that it leaves out.
            return at, kept, json.dumps(self._document(tensors, include_parameters, extra))

        if self._together.world > 1:
            self._agree_on_run()
        at, kept, document = self._together.agreed(prepare)
        self._together.same((at, kept, bool(wait)), "commit(): (step, keep, wait)")
        self._note_begun()
        if wait:
            done = Commit(*self._make(at, document, tensors, kept))
            self._has_committed(done, extra)
        else:
            done = self._start_commit(at, document, tensors, kept)
            self._begun = [(done, extra)]
        self._log_notes()
        return done

    def _agree_on_run(self) -> None:
        """Raises ValueError if other processes commit another optimizer than this one.

        Processes may have other directories for the same one. And one that has made an
        optimizer for itself has another number. If both differ, they do not mean the same.
        """
        paths = [path for path, _ in self._directories]
        told = self._together.exchange((self._number, paths, self._run_id or uuid.uuid4().hex))
        number, there, run = told[0]
        for rank, (other, path, _) in enumerate(told):
            if other != number and path != there:
                raise ValueError(
                    f"commit() is of the optimizer in {there[0]!r:.200} on rank 0, and of that "
                    f"in {path[0]!r:.200} on rank {rank}: make and commit optimizers in the "
                    f"same order in all processes, and give one that fewer have a process_group"
                )
        self._run_id = run

    def _check_is_alone(self) -> None:
        """Raises FileExistsError if a first commit would stand beside another run's."""
        if self._offload.next_generation() > 1:
            return
        together = self._together
        other = another_run_in(self._directories, self._epoch, together.world, together.rank)
        if other is not None:
            raise FileExistsError(
                errno.EEXIST,
                "a store of another run is there: resume it, remove it, or give another "
                "directory",
                other,
            )

    def _make(
        self, step: int, document: str, tensors: list[Tensor], keep: int
    ) -> tuple[int, int, int, int, float]:
        """Makes the commit, in all processes or in none."""
        together = self._together
        if together.world == 1:
            return self._offload.commit(step, document, tensors, keep)
        generation = max(together.exchange(self._offload.next_generation()))
        return self._voted(
            lambda vote: self._offload.commit(step, document, tensors, keep, generation, vote)
        )

    def _start_commit(
        self, step: int, document: str, tensors: list[Tensor], keep: int
    ) -> Commit:
        """Begins the commit, in all processes or in none."""
        together, offload = self._together, self._offload
        what = step, document, tensors, keep
        if together.world == 1:
            ticket = offload.start_commit(*what)
            return Commit(ticket.generation, step, None, _ticket=ticket)
        vote = Vote(together.beside())
        generation = max(together.exchange(offload.next_generation()))
        begun: list[Commit] = []

        def begin() -> None:
            ticket = offload.start_commit(*what, generation, vote)
            begun.append(Commit(ticket.generation, step, None, _ticket=ticket, _vote=vote))

        try:
            together.agreed(begin)
        except Exception:
            for commit in begun:
                with suppress(Exception):  # It is the one that is raised here.
                    commit.wait()
            raise
        return begun[0]

    def _voted(self, call: Callable[[Vote], T]) -> T:
        """Returns what ``call`` returns, which asks all processes with the vote it is given."""
        vote = Vote(self._together)
        try:
            return call(vote)
        except Exception as error:
            vote.explain(error)
            raise

    def close(self) -> None:
        commit = next((commit for commit, _ in list(self._begun)), None)
        with nullcontext() if commit is None else commit._explained(commit._ticket):
            try:
                super().close()
            finally:
                if self._life.closed:  # Not by a forked child, whose locks they are not.
                    self._note_begun()  # It may have made the source needless.
                    self._let_go_of_source()
                    self._together.leave()

    def _let_go_of_source(self) -> None:
        """Lets others go on with the stores that ``resume()`` has divided anew."""
        release(self._locks or {})

    @undisturbed
    @plain_modes()
    def snapshot(self, path: Directories) -> Snapshot:
        """Makes the last commit a store of its own in ``path``, which ``resume(path)`` takes.

        It is durable when this returns. Nothing that happens to one of the two stores changes
        the other: the snapshot can be moved, or removed. It has what the last commit has, and
        not the steps since then.

        On xfs and btrfs it takes no space at first, if ``path`` is on the file system of
        ``nvme_path``: both stores share blocks until one of them is written there. Later steps
        then need space that nobody has reserved. Elsewhere all bytes are read, checked and
        written. Either way there must be space for a copy.

        Several processes call this together: each makes its own, and all have one, or none.

        Args:
            path: A directory that has no store, or as many as ``nvme_path``, with the same
                weights.

        Returns:
            What was made: the ``step`` of the commit, whether it was by ``"reflink"`` or
            ``"copied"`` (``way``), its ``bytes`` and ``seconds``.

        Raises:
            FileExistsError: There is a store in ``path``, which the text names.
            OSError: There is no room (before much is written), the drive failed, or the commit
                is damaged. Nothing is in ``path`` then, and this store is as it was.
            ValueError: ``path`` has another number of directories, or other weights.
            RuntimeError: Nothing was committed, or the optimizer is closed or belongs to
                another process.

        What one process raises, all raise: the text names its rank.
        """
        together, offload = self._together, self._offload

        def look() -> tuple[list[tuple[str | bytes, int]], list[tuple[int, int]]]:
            self._life.check()
            together.check("snapshot()")
            directories = directories_of(path, "path")
            offload.look_at_snapshot(directories)  # Raises what is wrong with them.
            found = [os.stat(directory) for directory, _ in directories]
            return directories, [(each.st_dev, each.st_ino) for each in found]

        directories, places = together.agreed(look)
        if together.world == 1:
            return Snapshot.of(*offload.snapshot(directories))
        # A snapshot of a call that was killed is known by where all of it should be.
        place = json.dumps(together.exchange(places))
        together.agreed(lambda: offload.refuse_others_at_snapshot(directories, place))
        there = together.exchange(
            together.agreed(lambda: offload.look_at_snapshot(directories, place))
        )

        def refuse() -> None:
            if set(there) == {"snapshot"}:
                raise FileExistsError(
                    errno.EEXIST,
                    "snapshot: a store is there already: remove it, or give another directory",
                    os.fspath(directories[0][0]),
                )

        together.agreed(refuse)
        generation = offload.commits()[-1][0]
        together.same(generation, "snapshot(): the generation of the last commit")
        return self._voted(
            # Where some have theirs and others none, a call was killed in between.
            lambda vote: Snapshot.of(*offload.snapshot(directories, place, True, vote))
        )

    @undisturbed
    def commits(self) -> list[Commit]:
        """Returns the commits that are kept on the drive, oldest first.

        Raises:
            OSError: One is damaged.
            RuntimeError: The optimizer is closed or belongs to another process.
        """
        self._life.check()
        return [Commit(*found[:3]) for found in self._offload.commits()]

    @undisturbed
    @plain_modes()
    def rollback(self, step: int | None = None) -> None:
        """Goes back to a commit that is kept: state, parameters, groups and their options.

        It works after a failed step too, and between backward and ``step()``. Gradients stay:
        call ``zero_grad()``. Later commits stay on the drive, until newer ones take their
        places. Whoever needs random numbers and a scheduler as they were finds them in
        ``committed_extra``.

        Args:
            step: The caller's number of the commit; the newest one that has it. None: the last
                commit.

        Raises:
            ValueError: There is no such commit; the text says which there are. It has no
                parameters (``include_parameters=False``). Or the groups have other parameters
                than it. Nothing has changed then.
            OSError: Reading failed. Parameters may be half read then, and each later call
                raises the error until ``rollback()`` or ``load_state_dict()`` has succeeded.
                Other processes have gone back then.
            RuntimeError: Nothing was committed, or the optimizer is closed or belongs to
                another process.
        """
        together = self._together

        def choose() -> tuple[Commit, dict[str, Any]]:
            self._life.check()
            if not (commits := self._offload.commits()):
                raise RuntimeError("rollback(): nothing was committed yet")
            commit, document = chosen(commits, step, self._kind())
            with whole_document():
                if any(map(lacks_values, document["parameters"].values())):
                    raise ValueError(
                        f"the commit of step {commit.step} has no parameters "
                        f"(include_parameters=False), so its state would meet other ones: load "
                        f"the parameters that belong to it, and resume()"
                    )
            return commit, document

        commit, document = together.agreed(choose)
        together.same(commit.generation, "rollback(): the generation of the commit")
        together.agreed(lambda: self._take_commit(commit, document))

    @classmethod
    def _resumed(
        cls,
        path: Directories,
        step: int | None,
        params: Any,
        options: dict[str, Any],
        make: Callable[[Found, Any], Any],
    ) -> Any:
        """Returns the optimizer that ``make`` returns for a commit and parameters."""
        params = as_lists(params)  # They are looked at more than once.
        commit_has = {"kind": cls._kind(), "of_commit": cls._of_commit}
        look = partial(find, path, step, params, options, **commit_has)
        found = look()
        try:
            return cls._made(found, lambda: make(found, params))
        except ValueError as error:
            # Its tiles are too large for this run's host_memory.
            if found.source is not None or _C.HOST_MEMORY_TOO_SMALL not in str(error):
                raise
        found = look(anew=True)
        return cls._made(found, lambda: make(found, params))

    @staticmethod
    def _made(found: Found, make: Callable[[], Any]) -> Any:
        """Returns the optimizer that ``make`` returns, if all processes can have theirs."""
        made: list[CommittingOptimizer] = []
        try:
            found.together.agreed(lambda: made.append(make()))
        except BaseException:
            for optimizer in made:
                optimizer.close()
            if found.source is not None:
                found.source.close()
            raise
        return made[0]

    #: What a commit says, and so ``resume()`` does not take.
    _of_commit: frozenset[str] = frozenset()

    @classmethod
    def _kind(cls) -> str:
        """Returns the class that commits are of: subclasses may read each other's."""
        raise NotImplementedError

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """Closes a store whose optimizer could not be made: it has one owner."""
        try:
            yield
        except BaseException:
            self._offload.close()
            raise

    def _steps(self) -> int:
        """Returns how many steps there have been, in this process and before."""
        return self._first_step + int(self.stats()["steps"])

    # The document -----------------------------------------------------------------------

    def _document(
        self, tensors: list[Tensor], include_parameters: bool, extra: Any
    ) -> dict[str, Any]:
        """Returns what a commit says besides the state. Adds the tensors that it refers to."""
        packer, small = Packer(tensors), Packer(None)
        names = names_of(self.param_groups)
        parameters = {}
        for parameter, name in names.items():
            slot, part = self._own_part(parameter)
            entry = {"slot": slot, "first": 0, "value": None}
            if self._is_kept(parameter):  # Frozen ones are the caller's.
                entry |= {"first": first_element(parameter)} | described(part)
                entry |= box_of(parameter)
                if include_parameters:
                    entry["value"] = len(tensors)
                    tensors.append(part.detach())
            if self._has_state(parameter):
                entry |= self._said_of_state(slot, small, f"the state of {name}")
            parameters[name] = entry
        groups = [
            {
                "params": [names[p] for p in group["params"]],
                "options": small.pack(
                    {k: v for k, v in group.items() if k not in ("params", "param_names")},
                    f"param_groups[{i}]",
                ),
            }
            for i, group in enumerate(self.param_groups)
        ]
        foreign = {name: self._state.foreign(p) for p, name in names.items()}
        return self._said(small) | {
            "format": 1,
            "class": self._kind(),
            "defaults": small.pack(self.defaults, "defaults"),
            "next": self._offload.next_slot(),
            "run": self._run_id,
            "replaces": [store.id.hex() for store in self._needless],
            "parameters": parameters,
            "groups": groups,
            "foreign": packer.pack({n: f for n, f in foreign.items() if f}, "state"),
            "others": packer.pack(self._state.others(), "state"),
            "extra": packer.pack(extra, "extra"),
        }

    def _check_to_commit(self) -> None:
        """Raises what ``resume()`` would: a commit must not take a good one's place."""
        raise NotImplementedError

    def _said(self, packer: Packer) -> dict[str, Any]:
        """Returns what a commit says of this class."""
        raise NotImplementedError

    def _said_of_state(self, slot: int, packer: Packer, where: str) -> dict[str, Any]:
        """Returns what a commit says of a parameter's state, besides what the drive has."""
        return {}

    def _take_found(self, found: Found) -> None:
        """Becomes what ``resume()`` has found."""
        self._needless, self._epoch = found.needless, found.epoch
        self._locks = found.source.locks if found.source is not None else None
        self._run_id = found.document.get("run")
        self._take_commit(found.commit, found.document, source=found.source)

    def _take_commit(
        self,
        commit: Commit,
        document: dict[str, Any],
        groups: list[dict[str, Any]] | None = None,
        source: Source | None = None,
    ) -> None:
        """Becomes what was committed. Nothing changes before everything has been checked.

        ``groups``: those to have, in place of the commit's. ``source``: the stores that have
        it, if they are not this optimizer's.
        """
        by_name = {name: p for p, name in names_of(self.param_groups).items()}
        if source is not None:
            document = source.document_for(by_name)
        local = {name: local_of(p) for name, p in by_name.items()}
        with whole_document():
            committed = document["parameters"]
            check_parameters(committed, local)
            for name, parameter in by_name.items():
                first = first_element(parameter) if "shape" in committed[name] else 0
                if committed[name]["first"] != first:
                    raise ValueError(
                        f"{name} is another part of a parameter than in the commit"
                    )
            defaults = self.defaults
            if groups is None:
                defaults = defaults | unpack(document["defaults"], {}) | ways_of(defaults)
                groups = self._committed_groups(document, by_name, ways_of(defaults))
            values = {
                entry["value"]: local[name]
                for name, entry in committed.items()
                if entry["value"] is not None
            }
            packed = [document[key] for key in ("foreign", "others", "extra")]
            sizes = sizes_of(packed, values)
            there = source or self._offload
            if sizes != there.committed_values(commit.generation):
                raise KeyError("values")  # Before memory is taken for them.
            # Their contents come below.
            tensors = find_tensors(packed) | values
            foreign, others, extra = (unpack(each, tensors) for each in packed)
            entries = {by_name[name]: entry for name, entry in committed.items()}
            foreign = {by_name[name]: entry for name, entry in foreign.items()}
            next_slot = document["next"]
        ordered = [tensors[i] for i in range(len(sizes))]

        def take(offload: Any, parts: list[tuple[int, Tensor, int]]) -> None:
            with whole_document(), _with_a_way_on(commit):
                if source is not None:
                    source.take(offload, parts, ordered, next_slot)
                else:
                    offload.take_commit(commit.generation, parts, ordered, next_slot)

        self._take(take, entries, groups)
        for parameter, entry in entries.items():
            if entry["value"] is not None and not parameter.is_inference():
                torch.autograd.graph.increment_version(parameter)
        for gone in self._slots.keys() - entries.keys():
            self._unwatch(gone)
        joined = [p for p in entries if p not in self._slots]
        self._slots.clear()
        self._slots.update((p, entry["slot"]) for p, entry in entries.items())
        self._watch(joined)
        self.defaults.update(defaults)
        self.param_groups = groups
        self._state.loaded(foreign, others)
        self._first_step = commit.step - int(self.stats()["steps"])
        self._begun, self._committed = [], (commit.step, extra)

    def _committed_groups(
        self, document: Mapping[str, Any], by_name: Mapping[str, Tensor], ways: dict[str, Any]
    ) -> list[dict[str, Any]]:
        given = {p: raw for g in self.param_groups for p, raw in named(g)}
        groups = []
        for saved in document["groups"]:
            group = unpack(saved["options"], {}) | ways
            group["params"] = [by_name[name] for name in saved["params"]]
            if given:
                group["param_names"] = [given[p] for p in group["params"]]
            groups.append(group)
        if sorted(n for g in document["groups"] for n in g["params"]) != sorted(by_name):
            raise KeyError("groups")
        return groups

    def _take(
        self,
        take: Take,
        entries: dict[Tensor, dict[str, Any]],
        groups: list[dict[str, Any]],
    ) -> None:
        """Checks the groups. Then the offload takes the commit's state and values."""
        with whole_document():
            parts = [(e["slot"], local_of(p), e["first"]) for p, e in entries.items()]
        take(self._offload, parts)


@contextmanager
def _with_a_way_on(commit: Commit) -> Iterator[None]:
    """Says of damage how to find out more, and what may help."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            error.strerror = (
                f"{error.strerror}; the commit is of step {commit.step}: python -m torch_ext "
                f"verify names the parameters that are damaged, and step= takes another "
                f"commit, if one is kept"
            )
        raise
