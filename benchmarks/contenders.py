"""Processes that step one optimizer each, in turn, and fio's rate between their turns."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import common
from common import GIB, MIB, Json


class Worker:
    """A process with one optimizer, and what it has measured."""

    def __init__(self, program: str, **job: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name(program), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.bursts: list[Json] = []
        #: What the process said before its first step.
        self.start: Json = {}

    def await_start(self) -> None:
        self.start = self._answer()

    def burst(self, steps: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.bursts.append(self._answer())

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Json:
        assert self._process.stdout is not None
        # DeepSpeed prints what it likes.
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("a worker has ended early; see above")


@dataclass
class Contender:
    """One row of the tables."""

    name: str
    worker: Worker
    #: Whether fio runs before and after each of its bursts.
    offloaded: bool = True
    #: fio's mixed rate around each burst, in GiB/s.
    limits: list[float] = field(default_factory=list)

    @property
    def bursts(self) -> list[Json]:
        return self.worker.bursts

    @property
    def budget(self) -> int:
        """Returns the bytes of host memory of an OffloadedAdamW; 0 for others."""
        return self.worker.start.get("host_memory", 0)

    def seconds(self) -> list[float]:
        return [burst["seconds"] for burst in self.bursts]

    def beside(self, other: Contender | None) -> list[float]:
        """Returns its time over another's, round by round."""
        if other is None or other is self:
            return []
        pairs = zip(self.seconds(), other.seconds(), strict=True)
        return [mine / theirs for mine, theirs in pairs]

    def moving(self) -> list[float]:
        """Returns the seconds that the bytes of a step take at fio's mixed rate."""
        return [
            timed_bytes(burst) / GIB / limit
            for burst, limit in zip(self.bursts, self.limits, strict=False)
        ]

    def record(self) -> Json:
        return {
            "name": self.name,
            "host_memory": self.budget,
            "first_peak": self.worker.start["peak"],
            "bursts": self.bursts,
            "fio_gib_per_second": self.limits,
        }


def timed_bytes(burst: Json) -> float:
    """Returns the bytes that a step moved while the clock ran."""
    moved = burst.get("moved")
    return moved["bytes_read"] + moved["bytes_written"] if moved else burst["bytes_per_step"]


class Limit:
    """What the disk can do with as many reads as writes, by fio."""

    def __init__(self, path: Path, total: int, fio: bool) -> None:
        self._path, self._total, self._fio = path, total, fio
        if fio:
            common.fio("write", path, total, MIB)

    def rate(self) -> float | None:
        if not self._fio:
            return None
        return common.fio("rw", self._path, self._total, MIB).gib_per_second


def have_deepspeed(program: str) -> bool:
    """Whether DeepSpeed is installed. Says so if it is not."""
    found = importlib.util.find_spec("deepspeed") is not None
    if not found:
        common.say(
            f"{program}: without DeepSpeed, it is not installed (make test-deepspeed does it)"
        )
    return found


def run(contenders: list[Contender], rounds: int, steps: int, limit: Limit, name: str) -> None:
    """Runs all rounds. Then the processes end."""
    for contender in contenders:
        contender.worker.await_start()
    for contender in contenders:  # This makes the state, and writes it for the first time.
        contender.worker.burst(1)
        contender.bursts.clear()
    for round_ in range(rounds):
        common.say(f"{name}: round {round_ + 1} of {rounds}")
        before = None
        for contender in contenders:
            if contender.offloaded and before is None:
                before = limit.rate()
            contender.worker.burst(steps)
            # This is for a run that is stopped before its tables.
            common.say(f"  {contender.name}: {contender.seconds()[-1]:.3f} s")
            if not contender.offloaded:
                continue
            after = limit.rate()
            if before is not None and after is not None:
                contender.limits.append((before + after) / 2)
            before = after
    for contender in contenders:
        contender.worker.close()
