"""aio_handle beside fio, DeepSpeed's own handle and torch.save: existing files and new ones.

In every round each contender reads, or overwrites, the same files once, one right after the
other. Another one goes first in each round. DeepSpeed takes part where it is installed and has
a compiler.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch
from common import AIO, GIB, KIB, MIB, Json, Rate

import torch_ext

OURS = "ours"
HANDLES = (OURS, "DeepSpeed")


def main() -> None:
    options = parse()
    machine = common.machine(options.directory)
    own = deepspeed_handle()
    cases: dict[str, dict[str, list[Json]]] = {}
    with common.work_folder(options.directory) as folder:
        for count, size in options.shapes:
            name = f"{count} x {common.size_text(size)}"
            cases[name] = measure(options, folder / name.replace(" ", ""), count, size, own)
    result = {
        "machine": machine,
        "measurements": cases,
        "tables": [tabulate(cases, options.engine)],
    }
    common.publish("files", options, result)


def parse() -> argparse.Namespace:
    options = common.parser(__doc__).parse_args()
    options.shapes = [(1, GIB), (512, MIB), (1024, 64 * KIB)]
    if options.quick:
        options.rounds, options.shapes = 1, [(1, 4 * MIB), (16, 64 * KIB)]
    return options


def deepspeed_handle() -> Any:
    """Returns DeepSpeed's handle, with its op compiled, or None."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        return AsyncIOBuilder().load().aio_handle(*handle_arguments())
    except ImportError:
        common.say("DeepSpeed is not installed (pip install deepspeed): it is left out")
    except (OSError, RuntimeError) as error:
        common.say(f"DeepSpeed's op cannot be had, so it is left out: {error}")
    return None


def handle_arguments() -> tuple[Any, ...]:
    return AIO["block_size"], AIO["queue_depth"], False, True, AIO["thread_count"]


def measure(
    options: argparse.Namespace, folder: Path, count: int, size: int, own: Any
) -> dict[str, list[Json]]:
    folder.mkdir()
    paths = [str(folder / f"{i}.0") for i in range(count)]
    with torch_ext.aio_handle(
        *handle_arguments(), strict=True, engine=options.engine
    ) as handle:
        like = torch.zeros(0, dtype=torch.uint8)
        sources = [handle.new_cpu_locked_tensor(size, like).random_() for _ in paths]
        targets = [handle.new_cpu_locked_tensor(size, like) for _ in paths]
        pairs = {"write": sources, "read": targets}
        runs: dict[str, Callable[[str], Rate]] = {
            OURS: lambda operation: transfer(handle, operation, pairs[operation], paths)
        }
        if own is not None:
            runs["DeepSpeed"] = lambda operation: transfer(
                own, operation, pairs[operation], paths
            )
        if common.have_fio():
            runs["fio"] = lambda operation: fio(operation, folder, count, size)
        if count == 1:
            runs["torch.save"] = lambda operation: saved(
                operation, folder / "saved", sources[0]
            )
        # From here on every file is written throughout.
        transfer(handle, "write", sources, paths)
        samples: dict[str, list[Json]] = {"write": [], "read": [], "write new files": []}
        for round_ in range(options.rounds):
            common.say(f"{folder.name}: round {round_ + 1} of {options.rounds}")
            first = round_ % len(runs)
            order = [*runs][first:] + [*runs][:first]
            for operation in ("write", "read"):
                samples[operation].append({who: asdict(runs[who](operation)) for who in order})
                if operation == "write" and "fio" in runs:
                    transfer(handle, "write", sources, paths)  # fio wrote bytes of its own
            samples["write new files"].append(
                {who: asdict(anew(paths, runs[who])) for who in order if who in HANDLES}
            )
        transfer(handle, "read", targets, paths)
        if not all(torch.equal(a, b) for a, b in zip(sources, targets, strict=True)):
            raise RuntimeError(f"{folder.name}: other bytes came back")
    return samples


def transfer(
    handle: Any, operation: str, tensors: list[torch.Tensor], paths: list[str]
) -> Rate:
    start = handle.async_pwrite if operation == "write" else handle.async_pread

    def run() -> None:
        for tensor, path in zip(tensors, paths, strict=True):
            if start(tensor, path, 0) != 0:
                raise RuntimeError(f"{operation} of {path} was refused")
        if handle.wait() != len(paths):
            raise RuntimeError(f"{operation}: not all were waited for")

    return common.rate_of(run, sum(tensor.nbytes for tensor in tensors))


def anew(paths: list[str], run: Callable[[str], Rate]) -> Rate:
    for path in paths:
        os.unlink(path)
    return run("write")


def fio(operation: str, folder: Path, count: int, size: int) -> Rate:
    """Has fio move the same files, one after the other, each from its beginning."""
    return common.fio(
        operation,
        folder / "0.0",
        count * size,
        min(size, AIO["block_size"]),
        directory=folder,
        filename_format="$filenum.$jobnum",
        nrfiles=count,
        openfiles=count,
        file_service_type="sequential",
    )


def saved(operation: str, path: Path, tensor: torch.Tensor) -> Rate:
    """Times torch.save with an fsync, since it goes through the page cache, and torch.load."""

    def write() -> None:
        with path.open("wb") as file:
            torch.save(tensor, file)
            file.flush()
            os.fsync(file.fileno())

    if operation == "write":
        return common.rate_of(write, tensor.nbytes)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return common.rate_of(lambda: torch.load(path), tensor.nbytes)


def tabulate(cases: dict[str, dict[str, list[Json]]], engine: str) -> Json:
    others = ["fio", "DeepSpeed", "torch.save"]
    header = ["", "GiB/s ours", *[f"ours / {who}" for who in others]]
    header += ["CPU s/GiB ours", "CPU s/GiB DeepSpeed"]
    rows = []
    for name, operations in cases.items():
        for operation, samples in operations.items():
            cells = [f"{name}, {operation}", common.cell(column(samples, OURS))]
            cells += [common.cell(ratios(samples, who)) for who in others]
            for who in (OURS, "DeepSpeed"):
                cells.append(common.cell(column(samples, who, "cpu_seconds_per_gib")))
            rows.append(cells)
    return common.table(f"aio_handle ({engine}) on existing files", header, rows)


def column(samples: list[Json], who: str, what: str = "gib_per_second") -> list[float]:
    return [sample[who][what] for sample in samples if who in sample]


def ratios(samples: list[Json], who: str) -> list[float]:
    there = [sample for sample in samples if who in sample]
    return [s[OURS]["gib_per_second"] / s[who]["gib_per_second"] for s in there]


if __name__ == "__main__":
    main()
