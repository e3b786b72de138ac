"""Stores on the drive, for people: which files belong together, and what they hold.

Nothing here takes a lock or writes, but for ``remove()``. A store is known by its header, and
not by the names of its files. Only names that end in ".store" are looked at in a directory.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

#: What a store's files are called: see StoreName in C++.
_NAME = re.compile(r".+\.r\d+-of-\d+\.e\d+\.d\d+\.store")
_MAGIC = b"txSTORE\n"
#: The most that a tensor of torch has.
_MOST_DIMENSIONS = 64

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Problem:
    """A path of which nothing can be said, but this."""

    path: str
    text: str
    #: It is a file of a store, and damaged.
    is_damage: bool = False
    #: It stands in a directory among others, and is nobody's store.
    is_foreign: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass
class StoreFiles:
    """The files of a store, as far as they were found."""

    id: bytes
    drives: int
    division: dict[str, int]  #: rank, world and epoch.
    files: dict[int, str] = field(default_factory=dict)  #: By drive.
    directories: int = 0  #: How many were given.

    @property
    def path(self) -> str:
        """The first drive's file, or the first that there is."""
        return self.files[min(self.files)]

    @property
    def paths(self) -> list[str]:
        return [self.files[drive] for drive in sorted(self.files)]

    def missing(self) -> Problem | None:
        """Says which files were not found. They may be in directories that were not given."""
        lost = [drive for drive in range(self.drives) if drive not in self.files]
        if not lost:
            return None
        numbers = ", ".join(map(str, lost))
        text = f"the store has {self.drives} files, and that of drive {numbers} is not there"
        if self.directories < self.drives:
            return Problem(self.path, f"{text}: give the directories of all its drives")
        return Problem(self.path, text, is_damage=True)

    def disk_bytes(self) -> int:
        """Bytes that the files take of the drives."""
        return sum(os.lstat(path).st_blocks * 512 for path in self.paths)


def holds_stores(path: str) -> bool:
    """Whether there is something at ``path`` for ``find_stores()`` to look at."""
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return any(name.endswith(".store") for name in os.listdir(path))
        return path.endswith(".store") or _begins_as_store(path)
    except OSError:
        return False


def _begins_as_store(path: str) -> bool:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def find_stores(paths: Iterable[str]) -> tuple[list[StoreFiles], list[Problem]]:
    """Returns the stores with files in ``paths``, which are directories or files of stores."""
    stores: list[StoreFiles] = []
    problems: list[Problem] = []
    seen: set[tuple[int, int]] = set()
    directories: set[tuple[int, int]] = set()
    for path in paths:
        try:
            status = os.stat(path)
            is_directory = stat.S_ISDIR(status.st_mode)
            names = sorted(os.listdir(path)) if is_directory else []
        except OSError as error:
            problems.append(Problem(path, _reason(error)))
            continue
        files = [path]
        if is_directory:
            files = [os.path.join(path, name) for name in names if name.endswith(".store")]
            if not files:
                problems.append(Problem(path, "no file of a store is in this directory"))
        else:
            status = os.stat(os.path.dirname(os.path.abspath(path)))
        directories.add((status.st_dev, status.st_ino))
        for file in files:
            status = os.lstat(file)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            found = _header(file, is_named=not is_directory)
            if isinstance(found, Problem):
                problems.append(found)
            else:
                _add(stores, found, file)
    for store in stores:
        store.directories = len(directories)
    return sorted(stores, key=lambda store: store.path), problems


def _header(path: str, is_named: bool) -> dict[str, Any] | Problem:
    from torch_ext._native import _C

    is_ours = _NAME.fullmatch(os.path.basename(path)) is not None
    is_foreign = not (is_named or is_ours)
    try:
        header = _C.store_header(path)
    except OSError as error:
        is_damage = error.errno == errno.EIO
        return Problem(path, _reason(error), is_damage, is_foreign and not is_damage)
    except ValueError as error:
        return Problem(path, str(error).removeprefix(f"{os.path.abspath(path)}: "))
    if header is not None:
        return header
    if is_ours:
        return Problem(
            path,
            "it has the name of a store's file, but does not begin as one: its header is lost, "
            "or it is somebody else's",
            is_damage=True,
        )
    return Problem(path, "it is not a store of torch_ext", is_foreign=is_foreign)


def _add(stores: list[StoreFiles], header: dict[str, Any], path: str) -> None:
    # A copy has the same id. It is a store of its own.
    for store in stores:
        if store.id == header["id"] and header["drive"] not in store.files:
            store.files[header["drive"]] = path
            return
    division = {name: header[name] for name in ("rank", "world", "epoch")}
    store = StoreFiles(header["id"], header["drives"], division)
    store.files[header["drive"]] = path
    stores.append(store)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def read(
    store: StoreFiles, *, extents: bool, progress: Progress | None = None
) -> dict[str, Any]:
    """Returns what a store holds, as the compiled module says it, and the names of damage.

    ``extents`` tells whether everything is read and checked. ``damage`` gets a list of texts.

    Raises:
        OSError: A file cannot be read (EIO: its header is damaged), or the store was committed
            to twice meanwhile (EBUSY).
        ValueError: The files do not belong together, or cannot be read here.
    """
    from torch_ext._native import _C

    report = _C.read_store(store.paths, extents, progress)
    layouts = {c["generation"]: (c["step"], Layout(c["document"])) for c in report["commits"]}
    for damage in report["damage"]:
        if damage["generation"] in layouts:
            step, layout = layouts[damage["generation"]]
            begin = damage["extent_offset"]
            parts = layout.parts(damage["extent"], begin, begin + damage["length"])
            damage["parts"] = parts
            shown = ", ".join(parts[:5]) + (f" and {len(parts) - 5} more" if parts[5:] else "")
            damage["what"] += f" ({shown or 'an extent'}, in the commit of step {step})"
    return report


def describe(damage: dict[str, Any]) -> str:
    """Returns a line about bytes that are damaged."""
    place = f"offset={damage['offset']} length={damage['length']}"
    return f"{damage['path']} {place}: {damage['what']}"


class Layout:
    """What the extents of a commit are, as far as its document can be read.

    A document may be anybody's. What it does not say in the way of docs/file_format.md, has
    no name.
    """

    def __init__(self, document: str) -> None:
        lines = (document + "\n").split("\n")
        layout, changing = _json(lines[0]), _json(lines[1])
        self.caller = _json(changing.get("caller"))
        self._state = _list(layout.get("tiles"))
        self._values = _list(layout.get("value_tiles"))
        self._numbers = _list(changing.get("parameters"))
        parameters = self.caller.get("parameters")
        self.parameters = parameters if isinstance(parameters, dict) else {}
        self._of_slot: dict[int, str] = {}
        self._of_value: dict[int, str] = {}
        for name, entry in self.parameters.items():
            if isinstance(entry, dict):
                self._of_slot[_whole(entry.get("slot"))] = str(_text(name))
                self._of_value[_whole(entry.get("value"))] = str(_text(name))

    def parts(self, extent: int, begin: int, end: int) -> list[str]:
        """Returns what bytes of an extent are, such as "state of layer.weight"."""
        is_state = extent < len(self._state)
        tiles, index = (
            (self._state, extent) if is_state else (self._values, extent - len(self._state))
        )
        if index >= len(tiles):
            return []
        return [
            self._called(number, is_state)
            for number, first, last in _segments(tiles[index])
            if first < end and begin < last
        ]

    def _called(self, number: int, is_state: bool) -> str:
        if is_state:
            name = self._of_slot.get(number)
            return f"state of {name}" if name else f"state of parameter {number}"
        name = self._of_value.get(number)
        return f"values of {name}" if name else f"values of tensor {number}, which has no name"

    def summary(self) -> dict[str, Any]:
        """Returns class, format, and how many parameters with how many elements."""
        dtypes: Counter[str] = Counter()
        elements = without_values = 0
        for entry in self.parameters.values():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if (
                isinstance(shape, list)
                and len(shape) <= _MOST_DIMENSIONS
                and all(_whole(n) >= 0 for n in shape)
            ):
                elements += math.prod(shape)
                without_values += entry.get("value") is None
                dtypes[str(_text(entry.get("dtype")))] += 1
        if not self.parameters:
            elements = sum(_whole(p[1]) for p in self._numbers if isinstance(p, list) and p[1:])
        return {
            "class": _text(self.caller.get("class")),
            "optimizer": _text(self.caller.get("optimizer")),  # The class that it runs, if any.
            "state_format": _text(self.caller.get("state_format")),
            "parameters": len(self.parameters) or len(self._numbers),
            "without_values": without_values,
            "frozen": len(self.parameters) - dtypes.total() if self.parameters else 0,
            "elements": elements,
            "dtypes": dict(sorted(dtypes.items())),
        }


def _segments(tile: Any) -> Iterator[tuple[int, int, int]]:
    """Yields (number, first byte, byte behind the last one) of the parts of a tile."""
    try:
        size, segments = tile
        starts = sorted((_whole(offset), _whole(number)) for number, _, _, offset in segments)
    except (TypeError, ValueError):
        return
    ends = [offset for offset, _ in starts[1:]] + [_whole(size)]
    # A reader of the padding behind the last part has met that part.
    if ends:
        ends[-1] = max(ends[-1], 1 << 62)
    for (offset, number), end in zip(starts, ends, strict=False):
        yield number, offset, end


def _json(text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value < 1 << 63 else -1


def _text(value: Any) -> str | None:
    """Returns a text of a document as a terminal may show it, in one line."""
    if not isinstance(value, str):
        return None
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in value)


def info(store: StoreFiles) -> dict[str, Any]:
    """Returns what ``info`` shows of a store. Errors: as ``read()``."""
    from torch_ext._native import _C

    owner = _C.store_owner(store.path) if 0 in store.files else ""
    report = {
        "files": store.paths,
        "id": store.id.hex(),
        **store.division,
        "drives": store.drives,
        "owner": owner or None,
        "disk_bytes": store.disk_bytes(),
    }
    if (missing := store.missing()) is not None:
        return report | {"damage": [missing.text], "commits": []}
    found = read(store, extents=False)
    newest = found["commits"][-1] if found["commits"] else None
    return report | {
        "committed_bytes": found["committed"],
        "commits": [{k: v for k, v in c.items() if k != "document"} for c in found["commits"]],
        "optimizer": Layout(newest["document"]).summary() if newest else None,
        "damage": [describe(damage) for damage in found["damage"]],
    }


def remove(store: StoreFiles) -> None:
    """Removes all files of a store that nobody owns. Errors: OSError, ValueError."""
    from torch_ext._native import _C

    _C.remove_store(store.paths, store.id)
