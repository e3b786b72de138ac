"""TensorSwapper with tensors on the GPU, beside the same tensors on the CPU.

In every round the two take turns on the same disk. Both overwrite space that has been written
before. The CPU's tensors are written and read in place. The GPU's go through page-locked host
buffers.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import common
import torch
from common import GIB, KIB, MIB, Json
from transfers import Buffers, Transfer


def main() -> None:
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        common.say("no GPU: torch.cuda.is_available() is False, so there is nothing to measure")
        return
    result: Json = {"machine": common.machine(options.directory), "measurements": {}}
    rows = []
    with common.work_folder(options.directory) as folder:
        for count, size in ((1, options.size), (options.keys, 64 * KIB)):
            name = f"{count} x {common.size_text(size)}"
            samples = measure(options, folder, count, size)
            result["measurements"][name] = samples
            rows += rows_of(name, samples)
    header = ["", "GiB/s device", "GiB/s CPU", "device / CPU"]
    header += ["CPU s/GiB device", "CPU s/GiB CPU"]
    title = f"TensorSwapper with tensors on {options.device} and on the CPU"
    result["tables"] = [common.table(title, header, rows)]
    common.publish("cuda", options, result)


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=common.size, default=GIB, help="of the large tensor")
    parser.add_argument("--keys", type=int, default=1024, help="small tensors (%(default)s)")
    parser.add_argument("--device", default="cuda", help="(%(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.size, options.keys = 1, 4 * MIB, 16
    return options


def measure(options: argparse.Namespace, folder: Path, count: int, size: int) -> Json:
    """Returns the rates of both by operation, as a list with one entry for each round."""
    buffers = {
        "device": Buffers(count, size, options.device),
        "cpu": Buffers(count, size),
    }
    transfers = {who: Transfer(folder, b, engine=options.engine) for who, b in buffers.items()}
    for transfer in transfers.values():
        transfer.fill()
    samples: Json = {"write": [], "read": []}
    for round_ in range(options.rounds):
        common.say(
            f"{count} x {common.size_text(size)}: round {round_ + 1} of {options.rounds}"
        )
        order = ("device", "cpu") if round_ % 2 else ("cpu", "device")
        for operation in samples:
            samples[operation].append(
                {
                    who: asdict(
                        common.rate_of(getattr(transfers[who], operation), count * size)
                    )
                    for who in order
                }
            )
    for transfer in transfers.values():
        transfer.check()
        transfer.close()
    return samples


def rows_of(name: str, samples: Json) -> list[list[str]]:
    rows = []
    for operation, pairs in samples.items():
        device, cpu = (
            [pair[who]["gib_per_second"] for pair in pairs] for who in ("device", "cpu")
        )
        work = [
            common.cell([pair[who]["cpu_seconds_per_gib"] for pair in pairs])
            for who in ("device", "cpu")
        ]
        quotients = [a / b for a, b in zip(device, cpu, strict=True)]
        rates = [common.cell(values) for values in (device, cpu, quotients)]
        rows.append([f"{name}, {operation}", *rates, *work])
    return rows


if __name__ == "__main__":
    main()
