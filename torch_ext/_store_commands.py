"""The commands about stores: `python -m torch_ext verify`, `info PATH`, `export`, `remove`."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any, TextIO

from torch_ext import _stores
from torch_ext._size import size
from torch_ext._stores import Problem, StoreFiles

WHOLE, DAMAGED, NOTHING = 0, 1, 2


def add_parsers(commands: Any) -> None:
    """Adds ``verify``, ``export`` and ``remove``. ``info`` is in __main__."""
    verify = commands.add_parser(
        "verify",
        help="compare all checksums of committed stores",
        description="Reads all of the stores in PATH and compares every checksum. It takes no "
        "lock, so a training may go on meanwhile. Exit status: 0 if all is whole, 1 if "
        "something is damaged, 2 if a PATH has no store or one cannot be read.",
    )
    _add_paths(verify)
    verify.add_argument("--json", action="store_true", help="print JSON")
    verify.set_defaults(run=run_verify)
    export = commands.add_parser(
        "export",
        help="write a commit as safetensors, for torch.distributed.checkpoint or torch.load",
        description="Writes a commit of the stores in PATH to OUT, in a form that other tools "
        "read. It takes no lock, so a training may go on meanwhile. Exit status: 0 if OUT is "
        "written, 1 if something is damaged or OUT cannot be written, 2 if there is no such "
        "commit, shards are missing, or OUT is there already.",
    )
    _add_paths(export)
    export.add_argument(
        "out", metavar="OUT", help="what is made: a file, or a directory for dcp"
    )
    export.add_argument(
        "--format",
        choices=("safetensors", "dcp", "torch"),
        default="safetensors",
        help="safetensors (default), dcp for dcp.load, torch for torch.load",
    )
    export.add_argument(
        "--step", type=int, metavar="N", help="the commit of that step (default: the newest)"
    )
    export.add_argument("--force", action="store_true", help="replace what is at OUT")
    export.set_defaults(run=run_export)
    remove = commands.add_parser(
        "remove",
        help="remove committed stores",
        description="Removes the stores in PATH, with all their commits. A store in use stays. "
        "Exit status: 0 if all were removed, 1 if one was not, 2 if a PATH has none.",
    )
    _add_paths(remove)
    remove.add_argument("--yes", action="store_true", help="do not ask")
    remove.set_defaults(run=run_remove)


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a directory with stores, or a store's file; for a store on several drives, the "
        "directories of all",
    )


class _Progress:
    """Says how far it is: a bar on a terminal, and elsewhere a line now and then."""

    _LINE_SECONDS = 10.0

    def __init__(self, path: str, stream: TextIO | None = None) -> None:
        self._path = path
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._next = time.monotonic() + self._LINE_SECONDS
        self._drawn = 0

    def __call__(self, done: int, total: int) -> None:
        share = done / max(total, 1)
        text = f"{share:4.0%} of {size(total)}  {_printable(self._path)}"
        if self._is_terminal:
            filled = int(share * 30)
            line = f"[{'#' * filled}{'.' * (30 - filled)}] {text}"
            line = line[: _columns(self._stream) - 1]
            self._stream.write("\r" + line.ljust(self._drawn))
            self._drawn = len(line)
            self._stream.flush()
        elif time.monotonic() >= self._next:
            print(text.strip(), file=self._stream, flush=True)
            self._next = time.monotonic() + self._LINE_SECONDS

    def close(self) -> None:
        if self._drawn:
            self._stream.write("\r" + " " * self._drawn + "\r")
            self._stream.flush()


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def run_verify(options: argparse.Namespace) -> int:
    stores, problems = _stores.find_stores(options.paths)
    results = []
    for store in stores:
        result = _verify(store)
        results.append(result)
        if not options.json:
            _print("\n".join(_render_verified(result)))
    _show(problems, bool(stores))
    if options.json:
        listed = [{"path": p.path, "text": p.text, "damage": p.is_damage} for p in problems]
        _print(json.dumps({"stores": results, "problems": listed}, indent=2))
    for text in _other_shards(stores):
        _complain(text)
    states = [result["status"] for result in results]
    return _status(states, problems)


def _other_shards(stores: list[StoreFiles]) -> Iterator[str]:
    """Says which shards were not looked at. They may be on other machines."""
    seen: dict[tuple[int, int], set[int]] = {}
    for store in stores:
        place = store.division["epoch"], store.division["world"]
        seen.setdefault(place, set()).add(store.division["rank"])
    for (epoch, world), ranks in seen.items():
        # There may be more ranks than could be listed, in a hostile header.
        if len(ranks) < world:
            yield (
                f"note: of the {world} shards of epoch {epoch}, {len(ranks)} "
                f"{'is' if len(ranks) == 1 else 'are'} here (rank "
                f"{', '.join(map(str, sorted(ranks)))}); the state needs them all"
            )


def _verify(store: StoreFiles) -> dict[str, Any]:
    result: dict[str, Any] = {"path": store.path, "files": store.paths, "damage": []}
    if (missing := store.missing()) is not None:
        status = DAMAGED if missing.is_damage else NOTHING
        return result | {"status": status, "error": missing.text}
    progress = _Progress(store.path)
    try:
        report = _stores.read(store, extents=True, progress=progress)
    except OSError as error:
        status = DAMAGED if error.errno == errno.EIO else NOTHING
        return result | {"status": status, "error": str(error)}
    except ValueError as error:
        return result | {"status": NOTHING, "error": str(error)}
    finally:
        progress.close()
    return result | {
        "status": DAMAGED if report["damage"] else WHOLE,
        "damage": report["damage"],
        "steps": [commit["step"] for commit in report["commits"]],
        "checked_bytes": report["checked"],
    }


def _render_verified(result: dict[str, Any]) -> list[str]:
    path = result["path"]
    if "error" in result:
        state = "damaged" if result["status"] == DAMAGED else "not checked"
        return [f"{path}: {state}: {result['error']}"]
    steps = result["steps"]
    of = f"{len(steps)} commit{'s' if len(steps) != 1 else ''}"
    if steps:
        of += f" (step {', '.join(map(str, steps))})"
    of += f", {size(result['checked_bytes'])} of state and values checked"
    if result["status"] == WHOLE:
        return [f"{path}: whole: {of}"]
    lines = [f"  {_stores.describe(damage)}" for damage in result["damage"]]
    return [f"{path}: damaged: {of}", *lines]


def run_info(paths: list[str], as_json: bool) -> int:
    """Shows the stores in ``paths``."""
    stores, problems = _stores.find_stores(paths)
    reports, states = [], []
    for store in stores:
        try:
            report = _stores.info(store)
        except (OSError, ValueError) as error:
            is_damage = isinstance(error, OSError) and error.errno == errno.EIO
            problems.append(Problem(store.path, str(error), is_damage))
            continue
        reports.append(report)
        states.append(DAMAGED if report["damage"] else WHOLE)
        if not as_json:
            _print(_render_info(report))
    if as_json:
        _print(json.dumps({"stores": reports}, indent=2))
    _show(problems, bool(reports))
    return _status(states, problems)


def _render_info(report: dict[str, Any]) -> str:
    lines = [("file", file) for file in report["files"]]
    lines += [
        ("rank", f"{report['rank']} of {report['world']}, epoch {report['epoch']}"),
        ("owner", report["owner"] or "none that can be seen from here"),
    ]
    optimizer = report.get("optimizer")
    if optimizer:
        kinds = optimizer["class"] or "another program's"
        kinds += f" of {optimizer['optimizer']}" if optimizer["optimizer"] else ""
        state_format = optimizer["state_format"]
        lines.append(("optimizer", kinds + (f", state {state_format}" if state_format else "")))
        text = f"{optimizer['parameters']}, {optimizer['elements']} elements"
        if optimizer["dtypes"]:
            text += " (" + ", ".join(f"{n} {d}" for d, n in optimizer["dtypes"].items()) + ")"
        if optimizer["without_values"]:
            text += "; the newest commit has no values of them, only state"
        if optimizer["frozen"]:
            text += f"; {optimizer['frozen']} of them frozen, and not kept"
        lines.append(("parameters", text))
    for commit in report["commits"]:
        text = f"step {commit['step']}, generation {commit['generation']}"
        text += f", {_date(commit['time'])}" if commit["time"] else ""
        fault = f"; it cannot be read: {commit['fault']}" if commit["fault"] else ""
        lines.append(("commit", f"{text}, {size(commit['bytes'])}{fault}"))
    space = f"{size(report['disk_bytes'])} on the drive"
    if "committed_bytes" in report:
        space += f", of which commits need {size(report['committed_bytes'])}"
    lines.append(("space", space))
    lines += [("damaged", text) for text in report["damage"]]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines) + "\n"


def _date(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s since 1970"


def run_export(options: argparse.Namespace) -> int:
    folder = os.path.dirname(os.path.abspath(options.out))
    if not os.path.isdir(folder):
        _complain(f"{options.out} cannot be written: {folder} is no directory")
        return DAMAGED
    try:
        from torch_ext._export import export
    except ImportError as error:
        _complain(str(error))
        return NOTHING
    progress = _Progress(options.out)
    try:
        try:
            export(
                options.paths,
                options.out,
                options.format,
                step=options.step,
                overwrite=options.force,
                progress=progress,
            )
        finally:
            progress.close()
    except FileExistsError as error:
        _complain(str(error).replace("overwrite=True", "--force"))
        return NOTHING
    except (OSError, ValueError, TypeError) as error:
        _complain(str(error))
        # There is nothing to export, or something is wrong with it.
        is_nothing = isinstance(error, ValueError) or (
            isinstance(error, OSError) and error.errno in (errno.ENXIO, errno.ENOENT)
        )
        return NOTHING if is_nothing else DAMAGED
    _print(f"{options.out}: written ({options.format})")
    return WHOLE


def run_remove(options: argparse.Namespace) -> int:
    links = [path for path in options.paths if os.path.islink(path.rstrip("/"))]
    for path in links:
        _complain(f"{path}: it is a link, and links are not followed: give what it leads to")
    stores, problems = _stores.find_stores([p for p in options.paths if p not in links])
    _show(problems, bool(stores))
    if not stores:
        return DAMAGED if any(p.is_damage for p in problems) else NOTHING
    states = [_remove(store, options.yes) for store in stores]
    states += [DAMAGED for _ in links]
    return _status(states, problems)


def _remove(store: StoreFiles, yes: bool) -> int:
    missing = store.missing()
    if missing is not None and not missing.is_damage:
        _complain(f"{missing}; nothing was removed")
        return DAMAGED
    taken = store.disk_bytes()
    files = "\n".join(f"  {path}" for path in store.paths)
    if not yes:
        _print(f"{files}\n  {size(taken)} on the drive, {_contents(store)}")
        if not _confirmed():
            return DAMAGED
    try:
        _stores.remove(store)
    except (OSError, ValueError) as error:
        left = [path for path in store.paths if os.path.lexists(path)]
        gone = "nothing was removed" if len(left) == len(store.paths) else f"left: {left}"
        _complain(f"{error}; {gone}")
        return DAMAGED
    _print(f"removed, {size(taken)} are free:\n{files}")
    return WHOLE


def _contents(store: StoreFiles) -> str:
    try:
        commits = _stores.info(store)["commits"]
    except (OSError, ValueError):
        commits = []
    steps = ", ".join(str(commit["step"]) for commit in commits)
    return f"with the commits of step {steps}" if steps else "without a commit that can be read"


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        _complain("nobody can be asked here, so nothing was removed: give --yes")
        return False
    try:
        answer = input("Remove this store? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() in ("y", "yes"):
        return True
    _complain("nothing was removed")
    return False


def _status(states: list[int], problems: list[Problem]) -> int:
    """Damage is the worst. What merely stands beside a store does not count."""
    if DAMAGED in states or any(problem.is_damage for problem in problems):
        return DAMAGED
    if not states or NOTHING in states or any(not p.is_foreign for p in problems):
        return NOTHING
    return WHOLE


def _show(problems: list[Problem], any_store: bool) -> None:
    for problem in problems:
        skipped = " (left out)" if problem.is_foreign and any_store else ""
        _complain(f"{problem}{skipped}")


def _complain(text: str) -> None:
    _print(f"torch_ext: {text}", sys.stderr)


def _print(text: str, stream: TextIO | None = None) -> None:
    print(_printable(text), file=stream or sys.stdout)


def _printable(text: str) -> str:
    text = text.encode(errors="backslashreplace").decode()  # A path may not be UTF-8.
    # A path may have what a terminal obeys.
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
