"""OffloadedAdamW beside torch's AdamW in memory, and beside the disk's limit.

Each contender is a process of its own, so that its peak memory is. In every
round each of them makes a burst of steps while the others rest; fio's mixed
rate is taken before and after every burst of the offloaded ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import common
from common import GIB, MIB, Json

# As promised: peak memory over the in-memory run stays below this.
PEAK_FACTOR, PEAK_SLACK = 1.05, 16 * MIB


class Worker:
    """A process with one optimizer, and what it has measured."""

    def __init__(self, **job: object) -> None:
        program = Path(__file__).with_name("optimizer_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, program, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.bursts: list[Json] = []
        self.first_peak = 0

    def await_start(self) -> None:
        self.first_peak = self._answer()["peak"]

    def burst(self, steps: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.bursts.append(self._answer())

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Json:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker has ended early; see above")
        return json.loads(line)


@dataclass
class Offloaded:
    """A contender with a budget of host memory."""

    host_memory: int
    worker: Worker
    #: fio's mixed rate around each burst, in GiB/s.
    limits: list[float] = field(default_factory=list)


@dataclass
class Group:
    """The contenders with parameters of one type."""

    dtype: str
    memory: Worker
    offloaded: list[Offloaded]

    @property
    def workers(self) -> list[Worker]:
        return [self.memory, *(o.worker for o in self.offloaded)]


def main() -> None:
    options = parse()
    result: Json = {"machine": common.machine(options.directory), "options": {}}
    result["options"] = {k: getattr(options, k) for k in ("parameters", "tensors", "burst")}
    fio = common.have_fio()
    with common.work_folder(options.directory) as folder:
        groups = [run_group(options, dtype, folder, fio) for dtype in options.dtypes]
    result["measurements"] = [record(group) for group in groups]
    result["tables"] = [
        speed_table(groups, options.parameters),
        lanes_table(groups, options.parameters),
        memory_table(groups),
    ]
    common.publish("optimizer", options, result)


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--parameters", type=lambda text: int(float(text)), default="2.5e8")
    parser.add_argument("--tensors", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--host-memory", nargs="+", type=common.size, default=[512 * MIB, 2 * GIB]
    )
    parser.add_argument(
        "--burst", type=int, default=2, help="timed steps a round (%(default)s)"
    )
    parser.add_argument("--fio-size", type=common.size, default=2 * GIB)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.burst, options.parameters = 1, 1, 1_000_000
        options.host_memory, options.dtypes = [8 * MIB], ["bfloat16"]
        options.fio_size = 8 * MIB
    return options


def run_group(options: argparse.Namespace, dtype: str, folder: Path, fio: bool) -> Group:
    job = {"parameters": options.parameters, "tensors": options.tensors, "dtype": dtype}
    place = {"nvme_path": str(folder), "aio": common.AIO, "engine": options.engine}
    group = Group(
        dtype,
        Worker(kind="memory", **job),
        [
            Offloaded(budget, Worker(kind="offloaded", host_memory=budget, **place, **job))
            for budget in options.host_memory
        ],
    )
    for worker in group.workers:
        worker.await_start()
    limit = Limit(folder / "fio", options.fio_size, fio)
    for worker in group.workers:  # State is made, and written for the first time.
        worker.burst(1)
        worker.bursts.clear()
    for round_ in range(options.rounds):
        common.say(f"{dtype}: round {round_ + 1} of {options.rounds}")
        run_round(group, options.burst, limit)
    for worker in group.workers:
        worker.close()
    return group


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


def run_round(group: Group, steps: int, limit: Limit) -> None:
    group.memory.burst(steps)
    before = limit.rate()
    for contender in group.offloaded:
        contender.worker.burst(steps)
        after = limit.rate()
        if before is not None and after is not None:
            contender.limits.append((before + after) / 2)
        before = after


def ratios(group: Group, contender: Offloaded) -> list[float]:
    """Step time over the larger of its bytes at fio's rate and the update alone."""
    return [
        burst["seconds"] / max(timed_bytes(burst) / GIB / limit, alone["seconds"])
        for burst, limit, alone in zip(
            contender.worker.bursts, contender.limits, group.memory.bursts, strict=False
        )
    ]


def timed_bytes(burst: Json) -> float:
    """Of a step, while the clock ran."""
    return burst["moved"]["bytes_read"] + burst["moved"]["bytes_written"]


def record(group: Group) -> Json:
    return {
        "dtype": group.dtype,
        "in_memory": {"first_peak": group.memory.first_peak, "bursts": group.memory.bursts},
        "offloaded": [
            {
                "host_memory": o.host_memory,
                "first_peak": o.worker.first_peak,
                "bursts": o.worker.bursts,
                "fio_gib_per_second": o.limits,
                "ratio": ratios(group, o),
            }
            for o in group.offloaded
        ],
    }


def label(group: Group, contender: Offloaded) -> str:
    return f"{group.dtype}, {common.size_text(contender.host_memory)}"


def speed_table(groups: list[Group], parameters: int) -> Json:
    billions = parameters / 1e9
    rows = []
    for group in groups:
        alone = [burst["seconds"] / billions for burst in group.memory.bursts]
        rows.append([f"{group.dtype}, in memory", common.cell(alone), "0", "-", "-"])
        for o in group.offloaded:
            bursts = o.worker.bursts
            rows.append(
                [
                    label(group, o),
                    common.cell([b["seconds"] / billions for b in bursts]),
                    common.cell([b["bytes_per_step"] / parameters for b in bursts], 1),
                    common.cell(o.limits),
                    common.cell(ratios(group, o)),
                ]
            )
    header = ["parameters, host_memory", "step, s per 10^9", "bytes per parameter"]
    header += ["fio mixed, GiB/s", "step / limit"]
    return common.table(f"step() of AdamW, {parameters:.3g} parameters", header, rows)


def lanes_table(groups: list[Group], parameters: int) -> Json:
    billions = parameters / 1e9
    rows = []
    for group in groups:
        for o in group.offloaded:
            bursts = o.worker.bursts
            busy = [
                common.cell([b["moved"][f"{lane}_seconds"] / billions for b in bursts])
                for lane in ("read", "update", "write")
            ]
            waited = [b["moved"]["wait_seconds"] / b["seconds"] for b in bursts]
            rows.append([label(group, o), *busy, common.cell(waited)])
    header = ["parameters, host_memory", "reading", "updating", "writing", "waiting / step"]
    return common.table("Lanes: busy seconds of a step per 10^9 parameters", header, rows)


def memory_table(groups: list[Group]) -> Json:
    rows = []
    for group in groups:
        for o in group.offloaded:
            last = o.worker.bursts[-1]
            over = last["peak"] - group.memory.first_peak
            allowed = o.host_memory * PEAK_FACTOR + PEAK_SLACK
            figures = (o.host_memory, last["host_bytes_peak"], over, allowed)
            rows.append([label(group, o), *(str(round(f / MIB)) for f in figures)])
    header = ["parameters, host_memory", "host_memory", "host_bytes_peak"]
    header += ["VmHWM over the in-memory run without its state", "allowed"]
    return common.table("Host memory of the optimizer, MiB", header, rows)


if __name__ == "__main__":
    main()
