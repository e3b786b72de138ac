"""What the benchmarks share: options, fio, clocks, statistics, tables, JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_ext import parse_size
from torch_ext.__main__ import collect

GIB = 1 << 30
MIB = 1 << 20
KIB = 1 << 10
ROOT = Path(__file__).resolve().parent.parent
#: The settings of every swapper and optimizer that is measured. fio gets the same block and
#: depth.
AIO = {"block_size": MIB, "queue_depth": 32, "thread_count": 1}

Json = dict[str, Any]


@dataclass
class Rate:
    """One timed transfer."""

    gib_per_second: float
    cpu_seconds_per_gib: float


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--directory", default="/var/tmp", help="on the disk to measure (%(default)s)"
    )
    options.add_argument("--rounds", type=int, default=7, help="(%(default)s)")
    options.add_argument("--engine", default="auto", help="of torch_ext (%(default)s)")
    options.add_argument("--output", type=Path, metavar="DIR", help="write JSON into DIR")
    options.add_argument(
        "--quick", action="store_true", help="small sizes, one round: figures mean nothing"
    )
    return options


def size(text: str) -> int:
    """Reads an option such as "1GiB". Returns bytes."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size_text(count: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:g} {name}"
    return f"{count} bytes"


@contextmanager
def work_folder(directory: str) -> Iterator[Path]:
    """Makes an empty folder, and removes it in the end."""
    folder = tempfile.mkdtemp(prefix="torch_ext_bench.", dir=directory)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def say(text: str) -> None:
    """Prints progress to standard error. Standard output is for tables."""
    print(text, file=sys.stderr, flush=True)


# Clocks.


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Returns wall seconds, and CPU seconds of all threads of this process."""
    cpu = _cpu_seconds()
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    return seconds, _cpu_seconds() - cpu


def rate_of(action: Callable[[], Any], count: int) -> Rate:
    """Returns the rate of an action that moves ``count`` bytes."""
    seconds, cpu = timed(action)
    return Rate(count / GIB / seconds, cpu / (count / GIB))


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# fio.


def have_fio() -> bool:
    """Whether fio is installed. Says so if it is not."""
    found = shutil.which("fio") is not None
    if not found:
        say("fio is not installed (apt-get install fio): only our own figures follow")
    return found


def fio(rw: str, path: Path, total: int, block: int, **more: Any) -> Rate:
    """Returns what fio reaches by its own clock, which excludes its start.

    ``more``: further options of fio, added or in place of ours. With ``directory`` the path is
    left out.
    """
    options = {
        "name": "limit",
        "filename": path,
        "rw": rw,
        "bs": block,
        "size": total,
        "iodepth": AIO["queue_depth"],
        "ioengine": "libaio",
        "direct": 1,
        "randrepeat": 0,
        "output-format": "json",
    } | more
    if "directory" in more:
        del options["filename"]
    command = ["fio", *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr or done.stdout}")
    # Notes may stand before the JSON.
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    moved = (job["read"]["io_bytes"] + job["write"]["io_bytes"]) / GIB
    milliseconds = max(job["read"]["runtime"], job["write"]["runtime"], 1)
    busy = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    return Rate(moved / (milliseconds / 1000), busy / moved)


# Statistics and tables.


def spread(values: list[float]) -> Json:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cell(values: list[float] | Json | None, digits: int = 2) -> str:
    """Returns the median, and the extremes where there is more than one value."""
    if not values:
        return "-"
    s = values if isinstance(values, dict) else spread(values)
    text = f"{s['median']:.{digits}f}"
    if s["min"] == s["max"]:
        return text
    return f"{text} ({s['min']:.{digits}f} to {s['max']:.{digits}f})"


def table(title: str, header: list[str], rows: list[list[str]]) -> Json:
    return {"title": title, "header": header, "rows": rows}


def markdown(tables: list[Json]) -> str:
    lines = []
    for t in tables:
        widths = [max(map(len, column)) for column in zip(t["header"], *t["rows"], strict=True)]
        lines += [f"**{t['title']}**", ""]
        lines += [_line(t["header"], widths), f"|{'|'.join('-' * (w + 2) for w in widths)}|"]
        lines += [_line(row, widths) for row in t["rows"]]
        lines.append("")
    return "\n".join(lines)


def _line(cells: list[str], widths: list[int]) -> str:
    return f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |"


# Results.


def publish(name: str, options: argparse.Namespace, result: Json) -> None:
    """Prints the tables. Writes all to ``name``.json where --output says."""
    result = {
        "benchmark": name,
        "command": " ".join([f"benchmarks/{name}.py", *_arguments()]),
        "quick": options.quick,
        "rounds": options.rounds,
        **result,
    }
    print(describe(result["machine"]), markdown(result["tables"]), sep="\n\n")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def _arguments() -> list[str]:
    """Returns the arguments that have a say in the figures."""
    arguments = sys.argv[1:]
    if "--output" in arguments:
        at = arguments.index("--output")
        del arguments[at : at + 2]
    return arguments


# The machine.


def machine(directory: str) -> Json:
    """Names the machine that was measured. Call it before the benchmark's load begins."""
    found = collect(directory)
    place = found["directory"]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": [d["model"] for d in found["devices"] if d["name"] != "cpu"],
        "file_system": place["file_system"],
        "direct_io": place["direct"],
        "memory_alignment": place["memory_alignment"],
        "disk": _disk(directory),
        "aio": AIO,
        **found["versions"],
    }


def describe(m: Json) -> str:
    accelerators = "".join(f", {model}" for model in m["accelerators"])
    direct = "" if m["direct_io"] else " (buffered I/O)"
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['memory'] / GIB:.0f} GiB{accelerators}; "
        f"{m['file_system']}{direct} on {m['disk']}; Linux {m['kernel']}, torch {m['torch']}, "
        f"torch_ext {m['torch_ext']} at {m['commit']}; {m['date']}, load {m['load']:.1f} before"
    )


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "safe.directory=*", "-C", os.fspath(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        name = git("rev-parse", "--short=10", "HEAD").strip()
        return name + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown commit"


def _cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text()
    named = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return named[1] if named else os.uname().machine


def _disk(directory: str) -> str:
    """Returns name, model and size of the block device. File systems on several have none."""
    number = os.stat(directory).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if (device / "partition").exists():
        device = device.parent
    if not (device / "size").exists():
        return "no block device of its own"
    model = device / "device/model"
    named = model.read_text().strip() if model.exists() else "no model name"
    return f"{device.name} ({named}, {int((device / 'size').read_text()) * 512 / GIB:.0f} GiB)"
