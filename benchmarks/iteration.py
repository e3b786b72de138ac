"""Forward, backward and step with OffloadedAdamW beside DeepSpeed's NVMe optimizer.

No state stays in memory. --rows decides how long forward and backward take. The title of the
table has their share of DeepSpeed's step; 0.35 to 0.45 is what is asked for. Rounds and fio are
as in optimizer.py. With --device cuda the model is on a GPU. DeepSpeed has no turn then, since
we run it on its CPU accelerator.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
from pathlib import Path

import common
import contenders
import optimizer
from common import GIB, MIB, Json
from contenders import Contender, Limit, Worker

from torch_ext import OffloadedAdamW


def main() -> None:
    options = parse()
    machine = common.machine(options.directory)
    fio = common.have_fio()
    on_cpu = options.device == "cpu"
    deepspeed = on_cpu and contenders.have_deepspeed("iteration")
    shape = optimizer.shape(options)
    with common.work_folder(options.directory) as folder:
        field = make_contenders(options, folder, shape, deepspeed)
        limit = Limit(folder / "fio", options.fio_size, fio)
        contenders.run(list(field.values()), options.rounds, options.burst, limit, "iteration")
    result: Json = {
        "machine": machine,
        "options": {
            "rows": options.rows,
            "hidden": options.hidden,
            "device": options.device,
            **shape,
        },
        "measurements": [c.record() for c in field.values()],
        "tables": [tabulate(field, shape["parameters"], options)],
    }
    common.publish("iteration", options, result)


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--parameters", type=lambda text: int(float(text)), default="1e8")
    parser.add_argument("--rows", type=int, default=100, help="of the batch (%(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of the model (%(default)s)"
    )
    parser.add_argument("--formats", nargs="+", default=["exact", "bf16", "int8"])
    parser.add_argument("--least-memory", type=common.size, default=16 * MIB)
    parser.add_argument("--burst", type=int, default=2, help="iterations (%(default)s)")
    parser.add_argument("--fio-size", type=common.size, default=GIB)
    options = parser.parse_args()
    options.hidden = optimizer.HIDDEN
    if options.quick:
        options.rounds, options.burst, options.parameters, options.rows = 1, 1, 1_000_000, 4
        options.formats, options.least_memory = ["exact"], MIB
        options.hidden, options.fio_size = 256, 8 * MIB
    return options


def overlaps() -> list[str]:
    """Returns what the installed optimizer can do while backward runs."""
    known = "overlap_backward" in inspect.signature(OffloadedAdamW).parameters
    return ["", "update"] if known else [""]


def make_contenders(
    options: argparse.Namespace, folder: Path, shape: Json, deepspeed: bool
) -> dict[str, Contender]:
    place = {"nvme_path": str(folder), "aio": common.AIO, "engine": options.engine}
    model = {"hidden": options.hidden, "rows": options.rows, "device": options.device}
    job = {**model, **shape, **place}
    compute = Worker("iteration_worker.py", kind="compute", **job)
    field = {"compute": Contender("forward and backward", compute, offloaded=False)}
    if deepspeed:
        worker = Worker("optimizer_deepspeed.py", iteration=True, **job)
        field["deepspeed"] = Contender("DeepSpeed", worker)
    job |= {"kind": "offloaded", "least_memory": options.least_memory}
    variants = [(state, {"state_format": state}) for state in options.formats]
    if options.device != "cpu":
        on_device = {"state_format": "exact", "update_on": "cuda"}
        variants.append(("exact on the device", on_device))
    for variant, how in variants:
        alone = Worker(
            "optimizer_worker.py",
            **job | how | {"tensors": shape["layers"], "dtype": "bfloat16"},
            resident=1.0,
        )
        title = f"{variant}, update alone"
        field[f"{variant} alone"] = Contender(title, alone, offloaded=False)
        for overlap in overlaps():
            worker = Worker(
                "iteration_worker.py", resident=0.0, overlap_backward=overlap, **job | how
            )
            name = f"{variant}, overlap {overlap or 'off'}"
            field[name] = Contender(name, worker)
    return field


def tabulate(field: dict[str, Contender], parameters: int, options: argparse.Namespace) -> Json:
    """Makes the table. "limit" is the larger of the compute and update alone, and of the
    bytes."""
    theirs, compute = field.get("deepspeed"), field["compute"].seconds()
    rows = []
    for name, c in field.items():
        variant, ratios = name.partition(",")[0], []
        if f"{variant} alone" in field:
            alone = field[f"{variant} alone"].seconds()
            ratios = [
                seconds / max(computing + updating, moving)
                for seconds, computing, updating, moving in zip(
                    c.seconds(), compute, alone, c.moving(), strict=False
                )
            ]
        rows.append(
            [
                c.name,
                common.cell([s / (parameters / 1e9) for s in c.seconds()]),
                common.cell([b["bytes_per_step"] / parameters for b in c.bursts]),
                common.cell(c.limits),
                common.cell(ratios),
                common.cell(c.beside(theirs)),
                common.cell(c.beside(field.get(f"{variant}, overlap off"))),
                common.cell([b["cpu_seconds"] / (parameters / 1e9) for b in c.bursts]),
            ]
        )
    title = f"A whole iteration, {parameters:.3g} bfloat16 parameters, {options.rows} rows"
    if options.device != "cpu":
        title += f", on {options.device}"
    if theirs:
        share = statistics.median(
            b["compute_seconds"] / b["step_seconds"] for b in theirs.bursts
        )
        title += f"; DeepSpeed's forward and backward take {share:.2f} of its step"
    header = ["", "s per 10^9", "bytes per parameter", "fio mixed, GiB/s"]
    header += ["iteration / limit", "iteration / DeepSpeed's"]
    header += ["with / without overlap", "CPU s per 10^9"]
    return common.table(title, header, rows)


if __name__ == "__main__":
    main()
