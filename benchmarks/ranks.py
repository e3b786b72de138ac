"""Whether the ranks of one node share the drive fairly.

torchrun starts 2 and 4 ranks. Each has an OffloadedAdamW for its part of the parameters, all in
one directory. They begin every step together, as training does, and each takes its own time. A
step is over when the slowest is done.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import common
from common import MIB, Json

#: The promise: no rank takes longer than this times the mean.
UNFAIR = 1.3


def main() -> None:
    options = parse()
    result: Json = {"machine": common.machine(options.directory)}
    runs = {world: run(options, world) for world in options.worlds}
    result["measurements"] = {str(world): seconds for world, seconds in runs.items()}
    result["slowest_over_mean"] = {
        str(world): max(statistics.median(ratios) for ratios in over_mean(seconds))
        for world, seconds in runs.items()
    }
    result["promised"] = UNFAIR
    result["tables"] = [tabulate(options, runs)]
    common.publish("ranks", options, result)


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--parameters",
        type=lambda text: int(float(text)),
        default="1e8",
        help="float32, of all ranks together (%(default)s)",
    )
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4], help="(%(default)s)")
    parser.add_argument(
        "--host-memory", type=common.size, default=64 * MIB, help="of a rank (64 MiB)"
    )
    parser.add_argument("--burst", type=int, default=3, help="steps a round (%(default)s)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.burst, options.parameters = 1, 1, 400_000
        options.worlds, options.host_memory = [2], MIB // 2
    return options


def run(options: argparse.Namespace, world: int) -> list[list[float]]:
    """Returns the seconds of a step in each round, for each rank."""
    common.say(f"ranks: {world} of them, {options.rounds} rounds")
    with common.work_folder(options.directory) as folder:
        job = {
            "parameters": options.parameters // world,
            "rounds": options.rounds,
            "burst": options.burst,
            "nvme_path": str(folder),
            "host_memory": options.host_memory,
            "aio": common.AIO,
            "engine": options.engine,
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}"]
        command += [str(Path(__file__).with_name("ranks_worker.py")), json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{world} ranks: {done.stdout}{done.stderr}")
    return json.loads(lines[-1])


def over_mean(seconds: list[list[float]]) -> list[list[float]]:
    """Returns, for each rank, its time over the mean of all ranks in each round."""
    means = [statistics.mean(of_all) for of_all in zip(*seconds, strict=True)]
    return [[s / mean for s, mean in zip(own, means, strict=True)] for own in seconds]


def tabulate(options: argparse.Namespace, runs: dict[int, list[list[float]]]) -> Json:
    rows = []
    for world, seconds in runs.items():
        ratios = over_mean(seconds)
        for rank, (own, ratio) in enumerate(zip(seconds, ratios, strict=True)):
            name = f"{world} ranks, rank {rank}"
            rows.append([name, common.cell(own, 3), common.cell(ratio)])
        slowest = [max(of_all) for of_all in zip(*seconds, strict=True)]
        worst = [max(of_all) for of_all in zip(*ratios, strict=True)]
        rows.append(
            [f"{world} ranks, the slowest", common.cell(slowest, 3), common.cell(worst)]
        )
    title = f"Ranks on one directory, {options.parameters:.3g} parameters of all together"
    return common.table(title, ["", "step, s", "step / mean of the ranks"], rows)


if __name__ == "__main__":
    main()
