"""A step of OffloadedAdamW beside DeepSpeed's, torch's in memory, and the disk's limit.

Each contender is a process, so that it has a peak of memory of its own. In every round each of
them makes a burst of steps while the others rest. fio's mixed rate is taken before and after
every burst that uses the disk.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import common
import contenders
from common import GIB, MIB, Json
from contenders import Contender, Limit, Worker

# The promise: peak memory over the in-memory run stays below this.
PEAK_FACTOR, PEAK_SLACK = 1.05, 16 * MIB
#: The shares of the state that stay in memory. All of it shows what the update costs without
#: I/O.
SHARES = {"nothing resident": 0.0, "half resident": 0.5, "all resident": 1.0}
HIDDEN = 2048  # The size of the layers that DeepSpeed gets.


@dataclass
class Group:
    """The contenders with parameters of one type."""

    dtype: str
    memory: Contender
    deepspeed: Contender | None
    #: By state format and share.
    ours: dict[tuple[str, str], Contender]

    @property
    def all(self) -> list[Contender]:
        # torch's own contender needs its memory only when its turn comes.
        others = [self.deepspeed] if self.deepspeed else []
        return [self.memory, *others, *self.ours.values()]

    def limits(self, state: str, contender: Contender) -> list[float]:
        """Returns for each round the larger of its bytes at fio's rate and its update alone."""
        alone = self.ours.get((state, "all resident"), self.memory)
        return [max(pair) for pair in zip(contender.moving(), alone.seconds(), strict=False)]


def main() -> None:
    options = parse()
    result: Json = {"machine": common.machine(options.directory), "options": {}}
    result["options"] = {k: getattr(options, k) for k in ("parameters", "tensors", "burst")}
    fio = common.have_fio()
    deepspeed = "bfloat16" in options.dtypes and contenders.have_deepspeed("optimizer")
    groups = []
    for dtype in options.dtypes:
        with common.work_folder(options.directory) as folder:
            group = make_group(options, dtype, folder, deepspeed)
            limit = Limit(folder / "fio", options.fio_size, fio)
            contenders.run(group.all, options.rounds, options.burst, limit, dtype)
            groups.append(group)
    result["measurements"] = [
        {"dtype": group.dtype, "contenders": [c.record() for c in group.all]}
        for group in groups
    ]
    result["tables"] = [
        speed_table(groups, options.parameters),
        lanes_table(groups, options.parameters),
        memory_table(groups),
    ]
    common.publish("optimizer", options, result)


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--parameters", type=lambda text: int(float(text)), default="1e8")
    parser.add_argument("--tensors", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--formats", nargs="+", default=["exact", "bf16", "int8"])
    parser.add_argument(
        "--least-memory",
        type=common.size,
        default=16 * MIB,
        help="host_memory with nothing resident (16MiB)",
    )
    parser.add_argument(
        "--burst", type=int, default=2, help="timed steps a round (%(default)s)"
    )
    parser.add_argument("--fio-size", type=common.size, default=GIB)
    options = parser.parse_args()
    options.hidden = HIDDEN
    if options.quick:
        options.rounds, options.burst, options.parameters = 1, 1, 8_000_000
        options.dtypes, options.formats = ["bfloat16"], ["int8"]
        options.least_memory, options.fio_size, options.hidden = MIB, 8 * MIB, 256
    return options


def make_group(options: argparse.Namespace, dtype: str, folder: Path, deepspeed: bool) -> Group:
    job = {"parameters": options.parameters, "tensors": options.tensors, "dtype": dtype}
    place = {"nvme_path": str(folder), "aio": common.AIO, "engine": options.engine}
    memory = Contender(
        "in memory", Worker("optimizer_worker.py", kind="memory", **job), offloaded=False
    )
    theirs = None
    low = dtype != "float32"  # Only these have DeepSpeed and all formats.
    if deepspeed and low:
        model = {"hidden": options.hidden, "rows": 16, **place}
        theirs = Contender(
            "DeepSpeed", Worker("optimizer_deepspeed.py", **model, **shape(options))
        )
    ours = {}
    for state in options.formats if low else ["exact"]:
        for name, share in SHARES.items() if low else [("nothing resident", 0.0)]:
            worker = Worker(
                "optimizer_worker.py",
                kind="offloaded",
                state_format=state,
                resident=share,
                least_memory=options.least_memory,
                **place,
                **job,
            )
            ours[state, name] = Contender(f"{state}, {name}", worker, offloaded=share < 1)
    return Group(dtype, memory, theirs, ours)


def shape(options: argparse.Namespace) -> Json:
    """Returns the square layers that have about that many parameters."""
    layer = options.hidden * (options.hidden + 1)
    layers = max(1, round(options.parameters / layer))
    return {"layers": layers, "parameters": layers * layer}


def label(group: Group, contender: Contender) -> str:
    return f"{group.dtype}, {contender.name}"


def parameters_of(contender: Contender, parameters: int) -> int:
    """Returns the number of parameters. DeepSpeed's are those of whole layers."""
    return contender.worker.start.get("parameters", parameters)


def resident(contender: Contender) -> str:
    last = contender.bursts[-1]
    if not last.get("state_bytes"):
        return "-"
    return f"{last['resident_bytes'] / last['state_bytes']:.1%}"


def speed_table(groups: list[Group], parameters: int) -> Json:
    rows = []
    for group in groups:
        states = {id(c): state for (state, _), c in group.ours.items()}
        for c in group.all:
            count = parameters_of(c, parameters)
            per_billion = [seconds / (count / 1e9) for seconds in c.seconds()]
            limits = group.limits(states[id(c)], c) if id(c) in states else c.moving()
            ratios = [s / limit for s, limit in zip(c.seconds(), limits, strict=False)]
            rows.append(
                [
                    label(group, c),
                    resident(c),
                    common.cell(per_billion),
                    common.cell([b["bytes_per_step"] / count for b in c.bursts]),
                    common.cell(c.limits),
                    common.cell(ratios),
                    common.cell(beside_deepspeed(group, c, parameters)),
                ]
            )
    header = ["parameters, state", "resident", "step, s per 10^9", "bytes per parameter"]
    header += ["fio mixed, GiB/s", "step / limit", "step / DeepSpeed's"]
    return common.table(f"step() of AdamW, {parameters:.3g} parameters", header, rows)


def beside_deepspeed(group: Group, contender: Contender, parameters: int) -> list[float]:
    """Compares the time for each parameter with DeepSpeed's, round by round."""
    if group.deepspeed is None:
        return []
    scale = parameters_of(group.deepspeed, parameters) / parameters_of(contender, parameters)
    return [ratio * scale for ratio in contender.beside(group.deepspeed)]


def lanes_table(groups: list[Group], parameters: int) -> Json:
    """Makes the table of lanes. Overlap: the share of a step without waiting for I/O."""
    rows = []
    for group in groups:
        for c in group.all:
            billions = parameters_of(c, parameters) / 1e9
            lanes = [
                common.cell([b["moved"][f"{lane}_seconds"] / billions for b in c.bursts])
                if c in group.ours.values()
                else "-"
                for lane in ("read", "update", "write")
            ]
            overlap = [
                1 - b["moved"]["wait_seconds"] / b["seconds"]
                for b in c.bursts
                if b.get("moved")
            ]
            cpu = [b["cpu_seconds"] / billions for b in c.bursts]
            rows.append([label(group, c), *lanes, common.cell(overlap), common.cell(cpu)])
    header = ["parameters, state", "reading", "updating", "writing", "overlap", "CPU s"]
    return common.table("Lanes: busy seconds of a step per 10^9 parameters", header, rows)


def memory_table(groups: list[Group]) -> Json:
    rows = []
    for group in groups:
        first_peak = group.memory.worker.start["peak"]
        for c in group.all:
            last = c.bursts[-1]
            over = last["peak"] - first_peak
            figures = [str(round(over / MIB))]
            if c.budget:
                allowed = c.budget * PEAK_FACTOR + PEAK_SLACK
                sizes = (c.budget, last["host_bytes_peak"], over, allowed)
                figures = [str(round(f / MIB)) for f in sizes]
            else:
                figures = ["-", "-", *figures, "-"]
            rows.append([label(group, c), *figures])
    header = ["parameters, state", "host_memory", "host_bytes_peak"]
    header += ["VmHWM over the in-memory run without its state", "allowed"]
    return common.table("Host memory of the optimizer, MiB", header, rows)


if __name__ == "__main__":
    main()
