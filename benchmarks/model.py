"""What a model whose parameters are on the drive costs, beside the same model in memory.

The model is blocks of LayerNorm, Linear, GELU and Linear in fp32, with a fifth of its bytes in
host memory. Each round times a forward pass of each number of rows, and a training step that
updates in a hook, of both. Then fio reads as many bytes as the passes read, in requests of the
same size, and moves as many in both directions as the step did.

Two more models are read from a checkpoint where it lies, for a forward pass of one row. One is
by torch_ext.save(), whose tensors begin at multiples of 64. In the other, by the safetensors
library, they do not, so their bytes have to move. A handle reads the file to a locked tensor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from common import AIO, GIB, Json
from safetensors.torch import save_file
from torch import nn

import torch_ext

ROWS = (1, 64, 256)
ROWS_OF_A_STEP = 128
FILES = ("aligned file", "other file")
BYTES = torch.empty(0, dtype=torch.uint8)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    options = common.parser(__doc__).parse_args()
    options.blocks, options.width = (8, 256) if options.quick else (8, 2048)
    if options.quick:
        options.rounds = 1
    machine = common.machine(options.directory)
    with common.work_folder(options.directory) as folder:
        samples = measure(options, folder)
    tables = [tabulate(samples), tabulate_files(samples)]
    common.publish(
        "model", options, {"machine": machine, "measurements": samples, "tables": tables}
    )


def make(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(options.width) for _ in range(options.blocks)))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    return model


@torch.no_grad()
def update(parameter: torch.Tensor) -> None:
    parameter.add_(parameter.grad, alpha=-1e-4)
    parameter.grad = None


def measure(options: argparse.Namespace, folder: Path) -> list[Json]:
    in_memory, model = make(options), make(options)
    size = sum(p.nbytes for p in model.parameters())
    offload = torch_ext.offload(
        model, folder, host_memory=size // 5, aio=AIO, engine=options.engine
    )
    from_file = {name: from_checkpoint(options, folder, name) for name in FILES}
    handle = torch_ext.aio_handle(
        block_size=AIO["block_size"],
        queue_depth=AIO["queue_depth"],
        intra_op_parallelism=AIO["thread_count"],
    )
    locked = handle.new_cpu_locked_tensor(size // AIO["block_size"] * AIO["block_size"], BYTES)
    inputs = {rows: torch.randn(rows, options.width) for rows in (*ROWS, ROWS_OF_A_STEP)}

    def forward(of: nn.Module, rows: int) -> torch.Tensor:
        with torch.no_grad():
            return of(inputs[rows])

    def step(of: nn.Module) -> None:
        of(inputs[ROWS_OF_A_STEP]).square().mean().backward()

    samples = []
    for round_ in range(options.rounds + 1):
        if round_ > 0:
            common.say(f"model: round {round_} of {options.rounds}")
        sample: Json = {"bytes": size}
        for rows in ROWS:
            seconds = seconds_of(lambda rows=rows: forward(in_memory, rows))
            sample[f"forward {rows}"] = {"memory": seconds} | moved(
                offload, lambda rows=rows: forward(model, rows)
            )
        for name, (model_of_file, offload_of_file) in from_file.items():
            sample[name] = {"memory": sample["forward 1"]["memory"]} | moved(
                offload_of_file, lambda of=model_of_file: forward(of, 1)
            )
            handle.sync_pread(locked, path_of(folder, name))  # Opens it.
            read = seconds_of(lambda of=name: handle.sync_pread(locked, path_of(folder, of)))
            sample[name]["handle"] = locked.nbytes / GIB / read
        sample["step"] = {"memory": seconds_of(lambda: step(in_memory))}
        sample["step"] |= moved(offload, lambda: step(model))
        if common.have_fio():
            file, block = folder / "fio", AIO["block_size"]
            total = max(size // block, 1) * block
            for kind in ("write", "read", "rw"):
                sample[f"fio {kind}"] = common.fio(kind, file, total, block).gib_per_second
        same = all(map(torch.equal, in_memory.parameters(), model.parameters()))
        first = make(options)
        first = forward(first, 1)
        same &= all(torch.equal(forward(of, 1), first) for of, _ in from_file.values())
        sample["same bits"] = bool(same)
        if round_ > 0:  # The first one finds the order of touches.
            samples.append(sample)
    sample = samples[-1]
    sample["host bytes peak"] = offload.stats()["host_bytes_peak"]
    return samples


def from_checkpoint(
    options: argparse.Namespace, folder: Path, name: str
) -> tuple[nn.Module, torch_ext.ModelOffload]:
    """A model, with a fifth of it in memory, whose parameters are read from a file."""
    path = path_of(folder, name)
    state = make(options).state_dict()
    if name == "aligned file":
        torch_ext.save(state, path)
    else:
        save_file(state, path)
    with torch.device("meta"):
        model = make(options)
    size = sum(p.nbytes for p in model.parameters())
    offload = torch_ext.offload(
        model,
        folder,
        host_memory=size // 5,
        checkpoint=path,
        aio=AIO,
        engine=options.engine,
    )
    return model, offload


def path_of(folder: Path, name: str) -> str:
    return str(folder / f"{name}.safetensors")


def moved(offload: torch_ext.ModelOffload, action: Callable[[], object]) -> Json:
    before = offload.stats()
    seconds = seconds_of(action)
    after = offload.stats()
    return {
        "offloaded": seconds,
        "read": after["bytes_read"] - before["bytes_read"],
        "written": after["bytes_written"] - before["bytes_written"],
        "waited": after["wait_seconds"] - before["wait_seconds"],
    }


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def tabulate(samples: list[Json]) -> Json:
    rows = []
    for name in (*(f"forward {rows}" for rows in ROWS), *FILES, "step"):
        found = [s[name] | {"of": s} for s in samples]
        kind = "fio rw" if name == "step" else "fio read"

        def limit(s: Json, kind: str = kind) -> float:
            return (s["read"] + s["written"]) / GIB / s["of"][kind]

        with_fio = [s for s in found if kind in s["of"]]
        rows.append(
            [
                name,
                common.cell([s["memory"] for s in found]),
                common.cell([s["offloaded"] for s in found]),
                common.cell([s["offloaded"] / s["memory"] for s in found]),
                common.cell([s["offloaded"] / max(limit(s), s["memory"]) for s in with_fio]),
                common.cell([s["read"] / s["of"]["bytes"] for s in found]),
                common.cell([s["written"] / s["of"]["bytes"] for s in found]),
                common.cell([s["waited"] for s in found]),
            ]
        )
    size = samples[0]["bytes"]
    peak = samples[-1]["host bytes peak"]
    same = all(s["same bits"] for s in samples)
    return common.table(
        f"{common.size_text(size)} of parameters, {common.size_text(peak)} of them in host "
        f"memory at most; {'the same' if same else 'OTHER'} bits after every round",
        ["rows", "in memory, s", "offloaded, s", "offloaded / in memory"]
        + ["offloaded / the longer of memory and its bytes at fio's rate"]
        + ["read, of the model", "written, of the model", "waited, s"],
        rows,
    )


def tabulate_files(samples: list[Json]) -> Json:
    rows = []
    for name in FILES:
        found = [s[name] for s in samples]
        rates = [s["read"] / GIB / s["offloaded"] for s in found]
        handle = [s["handle"] for s in found]
        ratios = [rate / other for rate, other in zip(rates, handle, strict=True)]
        rows.append([name, *map(common.cell, (rates, handle, ratios))])
    return common.table(
        "A pass of one row, from a checkpoint",
        ["file", "pass, GiB/s", "aio_handle, GiB/s", "pass / aio_handle"],
        rows,
    )


if __name__ == "__main__":
    main()
