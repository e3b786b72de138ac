"""A limit on the memory of a process: a memory cgroup of its own, else RLIMIT_DATA.

RLIMIT_AS would count address space. torch reserves gigabytes of that, and never touches them.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: For each version of cgroups: the limit, what else must not grow, and the peak.
FILES = {
    1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes"),
    2: ("memory.max", "memory.swap.max", "memory.peak"),
}


@dataclass
class Limit:
    """A limit. The child calls ``enter`` between fork and exec."""

    bytes: int
    kind: str
    enter: Callable[[], None]
    #: The most that the group held, page cache included. None where nobody counts.
    peak: Callable[[], int | None]
    close: Callable[[], None]


def make_limit(count: int, kind: str = "auto") -> Limit:
    """Makes a limit. ``kind`` is "auto", "cgroup" or "rlimit".

    Raises:
        OSError: No cgroup can be made, and ``kind`` asks for one.
    """
    refusals = []
    for version, parent in parents() if kind != "rlimit" else []:
        try:
            return cgroup(version, parent, count)
        except OSError as error:
            refusals.append(f"{error.filename or parent}: {error.strerror}")
    if kind == "cgroup":
        raise OSError(f"no memory cgroup can be made ({'; '.join(refusals) or 'none found'})")
    why = f"; no cgroup: {refusals[0]}" if refusals else ""
    return Limit(
        count,
        f"RLIMIT_DATA{why}",
        lambda: resource.setrlimit(resource.RLIMIT_DATA, (count, count)),
        lambda: None,
        lambda: None,
    )


def parents() -> list[tuple[int, Path]]:
    """Returns groups in which one for the child may be made, inside our own if possible."""
    own = {}
    for line in read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.lstrip("/")
    found = []
    for line in read("/proc/self/mounts").splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            name = next((n for n in own if "memory" in n.split(",")), "")
            # In a container the mount may begin at our own group.
            found += [(1, path) for path in (Path(mount, own.get(name, "")), Path(mount))]
        elif kind == "cgroup2":
            # A group with processes may not share out memory. The one above it may.
            path = Path(mount, own.get("", ""))
            found += [(2, path)] + ([(2, path.parent)] if path != Path(mount) else [])
    return found


def read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cgroup(version: int, parent: Path, count: int) -> Limit:
    limit, swap, peak = FILES[version]
    group = parent / f"torch_ext_demo.{os.getpid()}.{time.monotonic_ns()}"
    group.mkdir()
    try:
        # The open must not create it: a group without the controller has no such file.
        write(group / limit, count)
        if (group / swap).exists():
            write(group / swap, count if version == 1 else 0)
    except OSError:
        group.rmdir()
        raise
    procs = str(group / "cgroup.procs")

    def held() -> int | None:
        text = read(str(group / peak))
        return int(text) if text else None

    return Limit(
        count, f"memory cgroup v{version}", lambda: write(procs, 0), held, lambda: remove(group)
    )


def write(path: str | Path, number: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, str(number).encode())
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def remove(group: Path) -> None:
    """Removes a group. The kernel lets go of a process some time after it was waited for."""
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.05)
