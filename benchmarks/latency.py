"""How long one needed tensor takes while another is prefetched, beside DeepSpeed.

The bound is the tensor's own time, measured in the same round, and the time of twice the bytes
that the kernel may have already. Those are queue_depth * block_size * thread_count, at the rate
at which the other tensor is read alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from common import AIO, GIB, MIB, Json
from files import deepspeed_handle

import torch_ext

ALONE, REST = "alone", "the other tensor alone"
PREFETCHED, CALLED_FIRST = "behind a prefetch", "behind a plain swap_in"


def main() -> None:
    options = parse()
    machine = common.machine(options.directory)
    with common.work_folder(options.directory) as folder:
        samples = measure(options, folder)
    table = tabulate(options, samples)
    result = {"machine": machine, "measurements": samples, "tables": [table]}
    common.publish("latency", options, result)


def parse() -> argparse.Namespace:
    options = common.parser(__doc__).parse_args()
    options.needed, options.other = 16 * MIB, GIB
    if options.quick:
        options.rounds, options.needed, options.other = 1, MIB, 8 * MIB
    return options


def measure(options: argparse.Namespace, folder: Path) -> list[Json]:
    with torch_ext.TensorSwapper(folder, AIO, engine=options.engine) as swapper:
        sizes = {"needed": options.needed, "other": options.other}
        sources = {key: random(size) for key, size in sizes.items()}
        targets = {key: torch.zeros_like(source) for key, source in sources.items()}
        for key, source in sources.items():
            swapper.swap_out(key, source).wait()
        runs = ours(swapper, targets) | deepspeeds(folder, sources, targets)
        samples = []
        for round_ in range(options.rounds):
            common.say(f"latency: round {round_ + 1} of {options.rounds}")
            first = round_ % len(runs)
            order = [*runs][first:] + [*runs][:first]
            samples.append({name: runs[name]() for name in order})
            for key, source in sources.items():
                if not torch.equal(source, targets[key]):
                    raise RuntimeError("what was read is not what was written")
                targets[key].zero_()
    return samples


def random(size: int) -> torch.Tensor:
    """Returns random bytes in memory that direct I/O can take."""
    memory = torch.empty(size + 4096, dtype=torch.uint8)
    first = -memory.data_ptr() % 4096
    return memory[first : first + size].random_()


Runs = dict[str, Callable[[], float]]


def ours(swapper: Any, targets: dict[str, torch.Tensor]) -> Runs:
    def read(key: str, **more: bool) -> Any:
        return swapper.swap_in(key, targets[key], **more)

    def needed(**more: bool) -> float:
        other = read("other", **more)
        seconds = seconds_of(lambda: read("needed").wait())
        other.wait()
        return seconds

    return {
        ALONE: lambda: seconds_of(lambda: read("needed").wait()),
        REST: lambda: seconds_of(lambda: read("other").wait()),
        PREFETCHED: lambda: needed(prefetch=True),
        CALLED_FIRST: needed,
    }


def deepspeeds(
    folder: Path, sources: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]
) -> Runs:
    """Times DeepSpeed on one handle and on two: its wait() waits for all that was called."""
    handles = [deepspeed_handle(), deepspeed_handle()]
    if handles[0] is None:
        return {}
    paths = {key: str(folder / key) for key in sources}
    for key, source in sources.items():
        handles[0].sync_pwrite(source, paths[key], 0)

    def needed(second: Any) -> float:
        first = handles[0]
        first.async_pread(targets["other"], paths["other"], 0)

        def read() -> None:
            second.async_pread(targets["needed"], paths["needed"], 0)
            second.wait()

        seconds = seconds_of(read)
        if second is not first:
            first.wait()
        return seconds

    return {
        "DeepSpeed, one handle": lambda: needed(handles[0]),
        "DeepSpeed, a handle for each": lambda: needed(handles[1]),
    }


def seconds_of(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def bound(options: argparse.Namespace, sample: Json) -> float:
    ahead = AIO["queue_depth"] * AIO["block_size"] * AIO["thread_count"]
    return sample[ALONE] + 2 * ahead * sample[REST] / options.other


def tabulate(options: argparse.Namespace, samples: list[Json]) -> Json:
    rows = [
        [
            name,
            common.cell([1e3 * sample[name] for sample in samples], 1),
            common.cell([sample[name] / bound(options, sample) for sample in samples]),
        ]
        for name in samples[0]
        if name != REST
    ]
    sizes = [common.size_text(count) for count in (options.needed, options.other)]
    title = f"{sizes[0]} needed while {sizes[1]} are read"
    return common.table(title, ["", "ms", "/ bound"], sorted(rows))


if __name__ == "__main__":
    main()
