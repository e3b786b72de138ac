"""A state_dict() that refers to a commit, for trainers that save and load in their own way.

The state is on the drive already. So ``state_dict()`` commits it, without the parameters,
which the trainer saves, and says where it is: the store, the generation and the directories.
That is a kilobyte, whatever the model. ``load_state_dict()`` goes back to that generation. An
optimizer that has just been made has a store of its own by then, without names and without
anything in it. It leaves that and becomes the owner of the one that is meant, or nothing
changes.

A trainer's folder refers to a generation from outside, where the store cannot see it. It is
there before the folder is complete, and the folder before is the one to go back to if it
never becomes so. That can happen again and again. So the last ``keep_commits`` generations
stay, and one that was loaded counts as the newest: it goes after as many further ones.

Under DistributedDataParallel several processes have the same parameters. Trainers then ask rank
0 only, where a vote would hang. So rank 0 commits alone. All load: rank 0 sends the others what
it has found.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from torch_ext._checks import (
    Directories,
    directories_of,
    keep_commits_of,
    state_dict_mode_of,
)
from torch_ext._closable import close_quietly
from torch_ext._native import _C
from torch_ext._quiet import undisturbed
from torch_ext.optim._commit import described, names_of, read_document
from torch_ext.optim._committing import Commit, CommittingOptimizer
from torch_ext.optim._division import newest_epoch
from torch_ext.optim._dtensor import is_distributed, local_of
from torch_ext.optim._found import Found, absolute, place_of
from torch_ext.optim._state_dict import COMMIT, foreign_of, labelled_parameters, others_of
from torch_ext.optim._together import Together
from torch_ext.optim._values import copied

_logger = logging.getLogger("torch_ext")

_Places = list[tuple[str | bytes, int]]


@dataclass(frozen=True)
class Reference:
    """What a ``state_dict()`` says of a commit."""

    store: str
    generation: int
    step: int
    directories: _Places

    def packed(self) -> dict[str, Any]:
        return {
            "version": 1,
            "store": self.store,
            "generation": self.generation,
            "step": self.step,
            "directories": [[os.fsdecode(path), weight] for path, weight in self.directories],
        }

    @classmethod
    def read(cls, packed: Any) -> Reference:
        """Raises ValueError for anything else than ``packed()`` makes."""
        what = f"the loaded state_dict's {COMMIT!r}"
        if not isinstance(packed, Mapping):
            raise ValueError(f"{what} is no dict: {packed!r:.80}")
        if "rank" in packed:
            raise ValueError(
                f"the loaded state_dict is of rank {packed['rank']!r}. Rank 0 alone has the "
                f"commit: save and load the state_dict() of rank 0"
            )
        if packed.get("version") != 1:
            raise ValueError(
                f"{what} has version {packed.get('version')!r:.80}; this torch_ext reads "
                f"version 1"
            )
        store, numbers = packed.get("store"), [packed.get(n) for n in ("generation", "step")]
        directories = packed.get("directories")
        try:
            places = directories_of(dict(directories), what)
        except (TypeError, ValueError):
            places = []
        if (
            not isinstance(store, str)
            or not places
            or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers)
        ):
            raise ValueError(f"{what} is damaged: {dict(packed)!r:.200}")
        return cls(store, *numbers, places)


class ReferringOptimizer(CommittingOptimizer):
    """An optimizer whose ``state_dict()`` may refer to a commit.

    A subclass sets ``_make_offload`` before it calls ``_start``.
    """

    #: Makes an offload, given ``directories`` and ``place``.
    _make_offload: partial[Any]
    #: This process among those that have the same parameters.
    _replicas: Together
    _refers: bool
    _directories: _Places
    #: Another run's store, which is where this one's would be.
    _in_the_way: Path | None = None

    def _place(
        self,
        nvme_path: Directories | Found,
        process_group: Any,
        state_dict_mode: str,
        keep_commits: int | None,
        verify: bool,
    ) -> tuple[_Places, _C.StorePlace]:
        """Returns the directories and the place of the store. Checks what concerns commits."""
        self._refers = state_dict_mode_of(state_dict_mode) == "commit"
        self._keep_commits = keep_commits_of(keep_commits, state_dict_mode)
        if self._refers and not verify:
            raise ValueError(
                'state_dict_mode="commit" needs checksums, without which a commit could not be '
                "trusted: leave out verify=False"
            )
        self._replicas = self._together = Together(process_group)
        if self._refers:
            self._together = self._replicas.alone()
            if isinstance(nvme_path, Found) and self._replicas.world > 1:
                raise ValueError(
                    f"resume() in {self._replicas.world} processes takes no "
                    f'state_dict_mode="commit": make the optimizer, and load_state_dict() the '
                    f"one that was saved"
                )
        self._number = self._together.count()
        given, place = place_of(nvme_path, self._together, warns=not self._refers)
        directories = directories_of(given, "nvme_path")
        # The current directory may be another one later.
        self._directories = absolute(directories)
        if self._refers and self._replicas.rank == 0 and not isinstance(nvme_path, Found):
            self._in_the_way = self._first_file(self._directories)
        return directories, place

    def _check_replicated(self, parameter: Tensor) -> None:
        """Raises ValueError for a parameter of which this process has a part only."""
        if self._refers and self._replicas.world > 1 and is_distributed(parameter):
            raise ValueError(
                'state_dict_mode="commit" is for processes that all have the same parameters, '
                "and this one is a DTensor: call commit() in all processes instead"
            )

    def _check_may_step(self) -> None:
        if self._in_the_way is None:
            return
        if not self._in_the_way.exists():
            self._in_the_way = None
            return
        raise FileExistsError(
            errno.EEXIST,
            "another run has committed there, so this one could not: load_state_dict() its "
            "state_dict() to go on from it, or `python -m torch_ext remove` it, or give "
            "another nvme_path",
            str(self._in_the_way),
        )

    # Saving -----------------------------------------------------------------------------

    @undisturbed
    def _saved(self) -> dict[str, Any]:
        if not self._refers:
            return super()._saved()
        self._state.flush()
        number_of = {p: i for i, p in enumerate(self._parameters())}
        if not any(map(self._has_state, number_of)):
            state = self._with_foreign({}, number_of)
            return {"state": state, "param_groups": self._packed_groups(number_of)}
        if self._replicas.rank == 0:
            reference = self._committed_reference().packed()
        else:
            reference = {"rank": self._replicas.rank}
        groups = [copied(group) for group in self._packed_groups(number_of)]
        for group in groups:
            group.pop("param_names", None)  # The commit has them: they would be most of it.
        return {"state": {}, "param_groups": groups, COMMIT: reference}

    def _committed_reference(self) -> Reference:
        done = self._same_commit()
        if done is None:
            done = self.commit(include_parameters=False, keep=self._keep_commits)
        return Reference(self._own_store(), done.generation, done.step, self._directories)

    def _same_commit(self) -> Commit | None:
        """Returns the commit that is of the state as it is now, if there is one.

        A trainer may save two checkpoints of a step: of one more commit, an older one would go.
        """
        self._check_to_commit()
        tensors: list[Tensor] = []
        document = self._document(tensors, include_parameters=False, extra=None)
        if tensors:
            return None
        generation = self._offload.same_commit(json.dumps(document))
        for found in self.commits() if generation else ():
            if found.generation == generation and found.step == self._steps():
                self._offload.renew(generation)
                self._committed = found.step, None
                return found
        return None

    def _own_store(self) -> str | None:
        """Returns the id of the store with this optimizer's commits, if it has any."""
        if not self._offload.commits():
            return None
        # Newer stores there would be somebody else's.
        file = _C.StorePlace(epoch=self._epoch).file
        return _store_in(Path(os.fsdecode(self._directories[0][0]), file))

    @staticmethod
    def _first_file(directories: _Places) -> Path:
        place = _C.StorePlace(epoch=newest_epoch(directories))
        return Path(os.fsdecode(directories[0][0]), place.file)

    # Loading ----------------------------------------------------------------------------

    @undisturbed
    def _load_reference(self, state_dict: dict[str, Any]) -> None:
        reference = Reference.read(state_dict[COMMIT])
        if self._replicas.world == 1:
            self._take_reference(reference, state_dict)
            return
        if not self._refers:
            raise ValueError(
                f"the loaded state_dict refers to a commit: in one of {self._replicas.world} "
                f'processes it takes an optimizer with state_dict_mode="commit"'
            )
        self._load_together(reference, state_dict)

    def _take_reference(self, reference: Reference, state_dict: dict[str, Any]) -> None:
        groups = self._merged_groups(state_dict)
        foreign = self._foreign_beside(state_dict)
        if self._own_store() == reference.store:
            commits = self._offload.commits()
            commit, document = self._find(commits, reference, self._directories)
            self._take_commit(commit, document, groups)
        else:
            self._move_to(reference, groups)
        self._offload.renew(reference.generation)
        for parameter, values in foreign.items():
            self._state[parameter].update(values)
        for key, value in others_of(state_dict).items():
            self._state[key] = value
        self._let_go()

    def _move_to(self, reference: Reference, groups: list[dict[str, Any]]) -> None:
        """Becomes the owner of a store that was found, or stays as it is."""
        directories = self._directories_of(reference)
        epoch = newest_epoch(directories)
        place = _C.StorePlace(epoch=epoch)
        made = self._make_offload.keywords
        kept = _C.find_commits(directories, made["aio"], made["engine"], place)[0]
        commit, document = self._find(kept, reference, directories)
        newest = kept[-1][0]
        place = _C.StorePlace(newest=newest, generation=commit.generation, epoch=epoch)
        self._let_go_of_source()  # It may be the store that is taken.
        offload = self._make_offload(directories=directories, place=place)
        before = dict(self.__dict__)
        self._bind(offload)
        self._directories, self._epoch = directories, epoch
        self._needless = ()
        try:
            self._take_commit(commit, document, groups)
        except BaseException:
            self._finalizer.detach()
            self._unbind()
            offload.close()
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        self._in_the_way = None
        self._leave(before)

    def _leave(self, before: Mapping[str, Any]) -> None:
        """Closes the store that this optimizer had before."""
        before["_finalizer"].detach()
        close_quietly(before["_offload"], os.getpid(), "an optimizer's store")

    def _unbind(self) -> None:
        """Takes back what ``_bind`` has done outside of the object."""

    def _find(
        self, commits: list[tuple[int, int, int, str]], reference: Reference, where: _Places
    ) -> tuple[Commit, dict[str, Any]]:
        """Returns the commit that is meant, and no other, and what it says."""
        for generation, step, time, text in commits:
            if generation == reference.generation:
                document = read_document(text, self._kind())
                self._check_same_kind(document)
                return Commit(generation, step, time), document
        there = ", ".join(f"{number} (step {step})" for number, step, *_ in commits)
        raise ValueError(
            f"the loaded state_dict refers to generation {reference.generation} (step "
            f"{reference.step}) of {self._first_file(where)}, which is gone; there are "
            f"{there}. keep_commits says how many are kept"
        )

    def _directories_of(self, reference: Reference) -> _Places:
        """Returns where the store is: in this optimizer's directories, or where it was."""
        own, was = map(self._first_file, (self._directories, reference.directories))
        there = _store_in(own)
        if there == reference.store:
            return self._directories
        if there is not None:
            raise ValueError(
                f"the loaded state_dict refers to the store {reference.store}, which was "
                f"{was}; {own} is another one, {there}. Give nvme_path the directory of the "
                f"first"
            )
        if _store_in(was) != reference.store:
            raise FileNotFoundError(
                errno.ENOENT,
                f"the loaded state_dict refers to the store {reference.store}. It is neither "
                f"there nor where it was, {was}: give nvme_path the directory where it is",
                str(own),
            )
        _logger.warning(
            "the loaded state_dict refers to %s, and %s is not there: the optimizer goes on in "
            "the directory of the first, not in its nvme_path",
            was,
            own,
        )
        return reference.directories

    def _foreign_beside(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """Returns what others have put into a state that a commit has the rest of.

        Raises:
            ValueError: There is more state of the optimizer's own.
        """
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        foreign = {}
        for key, (label, p) in zip(ids, labelled_parameters(self.param_groups), strict=True):
            if entry := state_dict["state"].get(key):
                own, foreign[p] = foreign_of(p, entry, self._own_names(p))
                if own:
                    raise ValueError(
                        f"the loaded state_dict refers to a commit, and has the state "
                        f"{list(own)} of parameter {key!r}, {label}, too: one of them must go"
                    )
        return foreign

    def _merged_groups(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the groups of a loaded state, with this optimizer's parameters."""
        raise NotImplementedError

    def _check_same_kind(self, document: dict[str, Any]) -> None:
        """Raises ValueError if the commit was made with other options than this optimizer."""

    # Several processes -----------------------------------------------------------------------

    def _load_together(self, reference: Reference, state_dict: dict[str, Any]) -> None:
        """Takes the commit in rank 0, and hands its state to the others, one by one."""
        first = self._replicas.rank == 0
        names = names_of(self.param_groups)
        own = [(name, described(local_of(p))) for p, name in names.items()]
        theirs = self._replicas.from_first(lambda: own)
        self._replicas.agreed(lambda: self._check_replica(own, theirs))

        def take() -> None:
            if first:
                self._take_reference(reference, state_dict)
            else:
                self._merged_groups(state_dict)

        self._replicas.agreed(take)
        nothing = {"state": {}, "param_groups": state_dict["param_groups"]}
        self._replicas.agreed(lambda: first or self._load(nothing))
        for p in names:
            entry = self._replicas.from_first(lambda p=p: self._entry_of(p))
            self._replicas.agreed(lambda p=p, e=entry: first or self._take_entry(p, e))
        rest = self._replicas.from_first(
            lambda: (
                [self._state.foreign(p) for p in names],
                self._state.others(),
                self.committed_extra,
            )
        )
        if first:
            return
        for p, values in zip(names, rest[0], strict=True):
            if values:
                self._state[p].update(values)
        for key, value in rest[1].items():
            self._state[key] = value
        self._first_step = reference.step - int(self.stats()["steps"])
        self._committed = reference.step, rest[2]

    def _check_replica(self, own: list[Any], first: list[Any]) -> None:
        for mine, other in zip(own, first, strict=False):
            if mine != other:
                raise ValueError(
                    f"the parameter {mine} is {other} on rank 0: all processes must have the "
                    f'same parameters with state_dict_mode="commit"'
                )
        if len(own) != len(first):
            raise ValueError(
                f"there are {len(own)} parameters here and {len(first)} on rank 0: all "
                f'processes must have the same with state_dict_mode="commit"'
            )

    def _entry_of(self, parameter: Tensor) -> dict[str, Any] | None:
        if not self._has_state(parameter):
            return None
        return {
            name: self._read_state(parameter, name).cpu() if number is None else number
            for name, number in self._shown_state(parameter).items()
        }

    def _take_entry(self, parameter: Tensor, entry: dict[str, Any] | None) -> None:
        if entry is not None:
            self._change_states([(parameter, entry)])


def _store_in(path: Path) -> str | None:
    """Returns the id of a file's store. None: there is no file. "": it is somebody else's."""
    try:
        header = _C.store_header(path)
    except FileNotFoundError:
        return None
    return "" if header is None else header["id"].hex()
