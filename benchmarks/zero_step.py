"""DeepSpeed's optimizer step on its own I/O op and on ours, side by side.

It is ZeRO-3 in bf16 with parameters and optimizer state on NVMe, on DeepSpeed's CPU
accelerator: tests/deepspeed/train.py. Each run is a process of its own. Its figure is the
median of its steps without the first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys

import common
from common import ROOT, Json

TRAIN = ROOT / "tests/deepspeed/train.py"
MODES = {"pipelined": ["--pipeline"], "not pipelined": []}


def main() -> None:
    options = parse()
    if importlib.util.find_spec("deepspeed") is None:
        common.say(
            "zero_step: skipped, DeepSpeed is not installed (make test-deepspeed does it)"
        )
        return
    machine = common.machine(options.directory)
    samples: dict[str, list[Json]] = {mode: [] for mode in MODES}
    for round_ in range(options.rounds):
        common.say(f"zero_step: round {round_ + 1} of {options.rounds}")
        for mode, rows in samples.items():
            ops = ["own", "ours"] if round_ % 2 == 0 else ["ours", "own"]
            rows.append({op: train(options, op, MODES[mode]) for op in ops})
    for rows in samples.values():
        if any(row["own"]["losses"] != row["ours"]["losses"] for row in rows):
            raise RuntimeError("the losses differ")
    result = {
        "machine": machine,
        "measurements": samples,
        "tables": [tabulate(options, samples)],
    }
    common.publish("zero_step", options, result)


def parse() -> argparse.Namespace:
    options = common.parser(__doc__).parse_args()
    options.hidden, options.layers, options.steps = 4096, 4, 6
    if options.quick:
        options.rounds, options.hidden, options.steps = 1, 256, 3
    return options


def train(options: argparse.Namespace, op: str, mode: list[str]) -> Json:
    with common.work_folder(options.directory) as folder:
        sizes = {"steps": options.steps, "hidden": options.hidden, "layers": options.layers}
        arguments = [f"--{name}={value}" for name, value in sizes.items()]
        done = subprocess.run(
            [sys.executable, TRAIN, folder, op, *arguments, *mode],
            capture_output=True,
            text=True,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"training on {op}: {done.stdout}{done.stderr}")
    return json.loads(lines[-1])


def seconds(run: Json) -> float:
    return statistics.median(run["step_seconds"][1:])


def tabulate(options: argparse.Namespace, samples: dict[str, list[Json]]) -> Json:
    rows = []
    for mode, runs in samples.items():
        own, ours = ([seconds(run[op]) for run in runs] for op in ("own", "ours"))
        ratios = [a / b for a, b in zip(ours, own, strict=True)]
        rows.append([mode, *map(common.cell, (own, ours, ratios))])
    parameters = options.layers * options.hidden * (options.hidden + 1)
    title = f"DeepSpeed's optimizer step, {parameters:.1e} parameters"
    return common.table(title, ["", "s, its own op", "s, our op", "our time / its own"], rows)


if __name__ == "__main__":
    main()
