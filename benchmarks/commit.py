"""What a commit costs, beside its bytes at the drive's rate and beside torch.save.

Each round makes three steps, and a commit after each. An optimizer that never commits makes as
many steps beside them. Then there is a commit when nothing has changed. `state_dict()` is saved
with `torch.save` and fsync. A new optimizer resumes, in the same division and in another place.
fio writes and reads as many bytes as the commit wrote, and as many as go from one place to the
other.

Then there are two iterations: some computing, in place of forward and backward, and a step.
Before the second one, a commit begins that nobody waits for.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import AIO, MIB, Json

import torch_ext


def main() -> None:
    options = parse()
    machine = common.machine(options.directory)
    cases: dict[str, list[Json]] = {}
    with common.work_folder(options.directory) as folder:
        for name, dtype, state_format in (
            ("fp32, exact", torch.float32, "exact"),
            ("bf16, int8", torch.bfloat16, "int8"),
        ):
            place = folder / state_format
            place.mkdir()
            cases[name] = measure(options, place, dtype, state_format)
    tables = [tabulate(options, cases), tabulate_beside(cases)]
    common.publish(
        "commit", options, {"machine": machine, "measurements": cases, "tables": tables}
    )


def parse() -> argparse.Namespace:
    options = common.parser(__doc__).parse_args()
    options.tensors, options.elements, options.host_memory = 24, 4 * MIB, 64 * MIB
    if options.quick:
        options.rounds, options.tensors, options.elements = 1, 2, 2**16
    return options


def measure(
    options: argparse.Namespace, folder: Path, dtype: torch.dtype, state_format: str
) -> list[Json]:
    parameters = [
        torch.nn.Parameter(torch.randn(options.elements).to(dtype))
        for _ in range(options.tensors)
    ]
    for p in parameters:
        p.grad = torch.randn_like(p)
    run = {"host_memory": options.host_memory, "aio": AIO, "engine": options.engine}
    optimizer = torch_ext.OffloadedAdamW(
        parameters, nvme_path=folder, state_format=state_format, **run
    )
    optimizer.step()
    optimizer.commit()  # Takes the space, which later ones have.
    (folder / "scratch").mkdir()
    scratch = torch_ext.OffloadedAdamW(
        parameters, nvme_path=folder / "scratch", state_format=state_format, **run
    )
    scratch.step()
    size = sum(p.nbytes for p in parameters)
    samples = []
    for round_ in range(options.rounds):
        common.say(f"commit: {state_format}, round {round_ + 1} of {options.rounds}")
        sample: Json = {"step": [], "scratch step": []}
        for i in range(3):
            for turn in (i, i + 1):  # Either is the first one in turn.
                if turn % 2 == round_ % 2:
                    sample["step"].append(seconds_of(optimizer.step))
                else:
                    sample["scratch step"].append(seconds_of(scratch.step))
            done = optimizer.commit()
        sample |= {"commit": done.seconds, "bytes": done.bytes_written, "parameters": size}
        sample["nothing changed"] = optimizer.commit(include_parameters=False).seconds
        optimizer.commit()
        sample["without"] = iteration(optimizer, 1.2 * done.seconds)
        start = time.perf_counter()
        begun = optimizer.commit(wait=False)
        called = time.perf_counter() - start
        sample["beside"] = {"call": called} | iteration(optimizer, 1.2 * done.seconds)
        begun.wait()
        sample["beside"]["commit"] = begun.seconds
        sample["torch.save"] = seconds_of(partial(save, optimizer, folder / "saved"))
        state = optimizer.stats()["state_bytes"]
        optimizer.close()
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        start = time.perf_counter()
        torch_ext.OffloadedAdamW.resume(folder, parameters, nvme_path=elsewhere, **run).close()
        sample["divided anew"] = time.perf_counter() - start
        elsewhere.rmdir()
        start = time.perf_counter()
        optimizer = torch_ext.OffloadedAdamW.resume(folder, parameters, **run)
        sample["resume"] = time.perf_counter() - start
        if common.have_fio():
            file, block = folder / "fio", AIO["block_size"]
            total = -(-done.bytes_written // block) * block
            rates = {kind: common.fio(kind, file, total, block) for kind in ("write", "read")}
            sample |= {
                f"fio {kind}": total / 2**30 / rate.gib_per_second
                for kind, rate in rates.items()
            }
            # All state is read and written, and parameters are read.
            moved = -(-(2 * state + size) // block) * block
            mixed = common.fio("rw", file, moved, block)
            sample["fio mixed"] = moved / 2**30 / mixed.gib_per_second
        samples.append(sample)
    optimizer.close()
    scratch.close()
    return samples


def iteration(optimizer: Any, seconds: float) -> Json:
    """Computes for so long, and makes a step."""
    a = torch.randn(128, 128)

    def compute() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            a @ a

    return {"compute": seconds_of(compute), "step": seconds_of(optimizer.step)}


def save(optimizer: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(optimizer.state_dict(), file)
        file.flush()
        os.fsync(file.fileno())


def seconds_of(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def tabulate(options: argparse.Namespace, cases: dict[str, list[Json]]) -> Json:
    rows = []
    for name, samples in cases.items():

        def column(
            of: Callable[[Json], float | None], digits: int = 0, samples: list[Json] = samples
        ) -> str:
            values = [value for s in samples if (value := of(s)) is not None]
            return common.cell(values, digits) if values else "-"

        rows.append(
            [
                name,
                column(lambda s: 1e3 * s["commit"]),
                column(
                    lambda s: (
                        (s["commit"] - 0.03) / s["fio write"] if "fio write" in s else None
                    ),
                    2,
                ),
                column(lambda s: 1e3 * s["nothing changed"]),
                column(lambda s: s["torch.save"] / s["commit"], 1),
                column(lambda s: 1e3 * s["resume"]),
                column(
                    lambda s: s["fio mixed"] / s["divided anew"] if "fio mixed" in s else None,
                    2,
                ),
                column(lambda s: 1e3 * sum(s["step"]) / len(s["step"])),
                column(lambda s: sum(s["step"]) / sum(s["scratch step"]), 2),
            ]
        )
    millions, memory = options.tensors * options.elements / 1e6, options.host_memory
    return common.table(
        f"{millions:.0f} x 10^6 parameters, host_memory {common.size_text(memory)}",
        [
            "parameters, state",
            "commit, ms",
            "less 30 ms, of its bytes' time",
            "nothing changed, ms",
            "torch.save / commit",
            "resume, ms",
            "divided anew, of fio's mixed rate",
            "step, ms",
            "step / step without commits",
        ],
        rows,
    )


def tabulate_beside(cases: dict[str, list[Json]]) -> Json:
    rows = []
    for name, samples in cases.items():
        beside, without = [s["beside"] for s in samples], [s["without"] for s in samples]
        pairs = list(zip(beside, without, strict=True))
        rows.append(
            [
                name,
                common.cell([1e3 * b["call"] for b in beside], 1),
                common.cell([1e3 * b["commit"] for b in beside], 0),
                common.cell([1e3 * w["step"] for w in without], 0),
                common.cell([1e3 * b["step"] for b in beside], 0),
                common.cell([(b["step"] - w["step"]) / b["commit"] for b, w in pairs], 2),
                common.cell([sum_of(b) / sum_of(w) for b, w in pairs], 2),
            ]
        )
    return common.table(
        "commit(wait=False), then computing for 1.2 times a commit, and a step",
        [
            "parameters, state",
            "the call, ms",
            "the commit, ms",
            "step without, ms",
            "step, ms",
            "step waits, of the commit",
            "iteration / without",
        ],
        rows,
    )


def sum_of(sample: Json) -> float:
    return sum(sample.get(part, 0.0) for part in ("call", "compute", "step"))


if __name__ == "__main__":
    main()
