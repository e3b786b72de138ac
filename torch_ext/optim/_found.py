"""What ``resume()`` goes on from: the commit that it finds in a run's directories.

A run that divides its state as the commit does takes the store of its rank as it is. Any other
gets the stores of all ranks, to divide them anew (``_division``). Either way the processes
agree on the newest generation that all have.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_ext._checks import Directories, directories_of, engine_of
from torch_ext._native import _C
from torch_ext._stores import StoreFiles
from torch_ext.config import resolve_aio_config
from torch_ext.optim._commit import Commit, chosen, described, names_of, whole_document
from torch_ext.optim._division import (
    Division,
    Source,
    another_run_in,
    box_of,
    check_is_free,
    check_run,
    find_divisions,
    find_source,
    groups_of,
    look_in_newest,
    needless_stores,
    newest_common,
    next_epoch,
    place_in_whole,
    place_of_directory,
)
from torch_ext.optim._dtensor import local_of
from torch_ext.optim._together import Together

_logger = logging.getLogger("torch_ext")


def absolute(directories: list[tuple[Any, int]]) -> list[tuple[Any, int]]:
    """Returns directories that stay the same when the current one is another."""
    try:
        return [(os.path.abspath(path), weight) for path, weight in directories]
    except FileNotFoundError:  # The store, which is made next, says so in words.
        return directories


@dataclass(frozen=True)
class Found:
    """A commit that an optimizer goes on from. It takes the place of ``nvme_path``."""

    directories: Directories
    commit: Commit
    document: dict[str, Any]
    #: The newest generation that all processes have.
    root: int
    together: Together
    epoch: int = 0
    #: The stores that have the commit, if its state is to be divided anew. It keeps others from
    #: going on with them.
    source: Source | None = None
    #: Stores that are needless after the next commit.
    needless: tuple[StoreFiles, ...] = ()


def find(
    path: Directories,
    step: int | None,
    params: Any,
    options: dict[str, Any],
    *,
    kind: str,
    of_commit: frozenset[str],
    anew: bool = False,
) -> Found:
    """Returns the commit in ``path`` that ``resume(path, params, step=step, **options)`` takes.

    ``kind`` is the class that commits are of. ``of_commit`` names options that they have.
    ``anew``: the state is to be divided anew, whatever the division was.
    """
    together = Together(options.get("process_group"))

    def check() -> tuple[Any, ...]:
        for name in sorted(options.keys() & of_commit):
            raise TypeError(f"resume() takes no {name!r}: the commit has it")
        old = absolute(directories_of(path, "path"))
        new = options.get("nvme_path")
        new = old if new is None else absolute(directories_of(new, "nvme_path"))
        check_is_free(new, old)
        aio = resolve_aio_config(options.get("aio"), stacklevel=8)
        places = [[(place_of_directory(d), w) for d, w in each] for each in (old, new)]
        return old, new, places, aio, engine_of(options.get("engine", "auto"))

    old, new, places, *how = together.agreed(check)
    all_places = together.exchange(places)
    moves = any(before != after for before, after in all_places)
    before, after = ({place for two in all_places for place, _ in two[i]} for i in (0, 1))
    # Where a directory of the old stores is a new one too, the new store outranks them.
    takes_them = bool(before & after)

    def look_in(division: Division) -> Found:
        if division.world == together.world and not (moves or anew):
            place = _C.StorePlace(together.rank, division.world, epoch=division.epoch)
            commit, document, root = _find_common(
                together, lambda: _C.find_commits(old, *how, place), step, kind
            )
            same = together.agreed(lambda: _is_divided_as(document, params, options))
            if all(together.exchange(same)):
                needless = needless_stores(old, document)
                return Found(
                    path, commit, document, root, together, division.epoch, None, needless
                )
        source = find_source(together, division, old, *how, takes_them=takes_them)
        try:
            if takes_them:
                _check_is_last(together, divisions, old)
            commit, document = source.choose(step, kind)
            epoch = max(together.exchange(next_epoch(new)))
        except BaseException:
            source.close()
            raise
        needless = tuple(source.stores.values()) if takes_them else ()
        where = path if options.get("nvme_path") is None else options["nvme_path"]
        return Found(where, commit, document, 0, together, epoch, source, needless)

    divisions = find_divisions(together, old)
    if not divisions:
        raise FileNotFoundError(
            errno.ENOENT, "nothing was committed here", os.fsdecode(old[0][0])
        )
    found = look_in_newest(together, divisions, look_in)
    entries = found.document.get("parameters", {}).values()
    if any(map(lacks_values, entries)) and together.rank == 0:
        _logger.warning(
            "the commit of step %d has no parameters (include_parameters=False, or a "
            "trainer's): those that resume() was given stay, and must be the commit's",
            found.commit.step,
        )
    return found


def _check_is_last(
    together: Together, divisions: list[Division], directories: list[tuple[Any, int]]
) -> None:
    """Raises OSError if others have gone on before their stores could be kept from them."""
    if find_divisions(together, directories) != divisions:
        raise OSError(
            errno.EAGAIN,
            "another run has divided this state meanwhile, and goes on with it",
            os.fsdecode(directories[0][0]),
        )


def _find_common(
    together: Together, look: Callable[[], list[list[Any]]], step: int | None, kind: str
) -> tuple[Commit, dict[str, Any], int]:
    """Returns the newest commit that all processes have, and what it says here.

    ``look`` returns what this process has, a list for each root, the newest first: the commits
    that the root keeps, oldest first. The last of a list is the root's own.
    """
    missing: FileNotFoundError | None = None

    def look_here() -> list[list[Any]]:
        nonlocal missing
        try:
            return look()
        except FileNotFoundError as error:
            missing = error
            return []

    found = together.agreed(look_here)
    roots = dict(enumerate(together.exchange([kept[-1][0] for kept in found])))
    if missing is not None and not any(roots.values()):
        raise missing
    root = newest_common(roots, together.world)
    commits = next(kept for kept in found if kept[-1][0] == root)
    commit, document = together.agreed(lambda: chosen(commits, step, kind))
    together.same(commit.generation, "resume(): the generation of the commit")
    check_run(together, [document])
    return commit, document, root


def _is_divided_as(
    document: Mapping[str, Any], params: Any, options: Mapping[str, Any]
) -> bool:
    """Whether a run with these parameters divides state as a commit of this process does.

    Parameters that are no parts of the same whole are left for others to refuse.
    """
    wanted = options.get("state_format")
    with whole_document():
        if wanted is not None and wanted != document.get("state_format"):
            return False
        committed = document["parameters"]
        try:
            named_parameters = names_of(groups_of(params)).items()
        except (TypeError, ValueError):
            return True
        for parameter, name in named_parameters:
            entry = committed.get(name, {})
            if "shape" not in entry:
                continue
            mine = described(local_of(parameter)) | box_of(parameter)
            here, there = place_in_whole(mine), place_in_whole(entry)
            parts = [
                (place[1], e["shape"], e["order"])
                for place, e in ((here, mine), (there, entry))
            ]
            if here[0] == there[0] and parts[0] != parts[1]:
                return False
    return True


def place_of(
    nvme_path: Directories | Found, together: Together, warns: bool = True
) -> tuple[Directories, _C.StorePlace]:
    """Returns the directories, and which store is there. Warns of another run's."""
    if isinstance(nvme_path, Found):
        found = nvme_path
        is_new = found.source is not None
        place = _C.StorePlace(
            together.rank,
            together.world,
            newest=0 if is_new else found.root,
            generation=0 if is_new else found.commit.generation,
            epoch=found.epoch,
        )
        return found.directories, place
    directories = directories_of(nvme_path, "nvme_path")
    directory = os.fsdecode(directories[0][0])
    place = _C.StorePlace(together.rank, together.world)
    first = Path(directory, place.file)
    if warns and first.exists():
        _logger.warning(
            "%s was committed by another run. resume() goes on from it; this optimizer cannot "
            "commit as long as it is there",
            first,
        )
    elif warns and another_run_in(directories, 0, together.world, together.rank):
        _logger.warning(
            "another run has committed in %s. resume() goes on from it; this optimizer cannot "
            "commit as long as its stores are there",
            directory,
        )
    return nvme_path, place


def lacks_values(entry: Any) -> bool:
    """Whether a commit has a parameter without its values."""
    return isinstance(entry, dict) and "shape" in entry and entry.get("value") is None
