"""Losses of the demo's GPT with each state format, beside AdamW in memory.

A round has a seed, for the parameters, the batches and the stochastic rounding. Each seed
trains the same model once with each optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import report
from common import MIB, Json

LAST = 20  # The losses of single steps are noise.
NAMES = {"memory": "in memory", "exact": "exact", "bf16": "bf16", "int8": "int8"}
COLOURS = {"memory": "#9a9a9a", "exact": "#0072b2", "bf16": "#009e73", "int8": "#d55e00"}
CASES = [(dtype, state) for dtype in ("float32", "bfloat16") for state in NAMES]


def main() -> None:
    options = parse()
    machine = common.machine(options.directory)
    with (
        common.work_folder(options.directory) as folder,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        seeds = list(pool.map(lambda seed: run(options, folder, seed), range(options.rounds)))
    runs = {case: [seed[i] for seed in seeds] for i, case in enumerate(CASES)}
    result = {
        "machine": machine,
        "options": {name: getattr(options, name) for name in MODEL},
        "measurements": [
            {"parameters": dtype, "state": state, "seeds": of_case}
            for (dtype, state), of_case in runs.items()
        ],
        "tables": [tabulate(options, runs)],
    }
    common.publish("convergence", options, result)
    if options.picture:
        draw(runs, options.picture)
    if options.into:
        text = f"{common.describe(machine)}\n\n{common.markdown(result['tables'])}"
        report.replace(options.into, text, "convergence")


MODEL = {"steps": 200, "layers": 2, "width": 128, "heads": 4, "batch": 8, "context": 64}


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time (%(default)s)")
    for name, default in MODEL.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="at its peak (%(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="the PNG to write")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="that gets the table")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.layers = 2, 3, 1
        options.width, options.context, options.batch = 32, 8, 1
    return options


def run(options: argparse.Namespace, folder: Path, seed: int) -> list[Json]:
    job = {name: getattr(options, name) for name in (*MODEL, "lr")}
    job |= {"offloaded": True, "nvme_path": str(folder), "host_memory": MIB, "device": "cpu"}
    program = Path(__file__).with_name("convergence_worker.py")
    done = subprocess.run(
        [sys.executable, program, json.dumps(job | {"seed": seed, "cases": CASES})],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError("a training has failed; see above")
    common.say(f"convergence: seed {seed} is done")
    return json.loads(done.stdout)


def last(of_case: list[Json]) -> list[float]:
    return [statistics.mean(seed["losses"][-LAST:]) for seed in of_case]


def held_out(of_case: list[Json]) -> list[float]:
    return [seed["validation_loss"] for seed in of_case]


def tabulate(options: argparse.Namespace, runs: dict[tuple[str, str], list[Json]]) -> Json:
    header = ["parameters, state", f"loss, last {LAST} steps", "beside in memory, same seed"]
    header += ["loss on other text", "beside in memory, same seed"]
    rows = []
    for (dtype, state), of_case in runs.items():
        cells = []
        for figure in (last, held_out):
            values, alone = figure(of_case), figure(runs[dtype, "memory"])
            cells.append(mean_and_spread(values, ".4f"))
            differences = [a - b for a, b in zip(values, alone, strict=True)]
            cells.append("-" if state == "memory" else mean_and_spread(differences, "+.5f"))
        rows.append([f"{dtype}, {NAMES[state]}", *cells])
    title = (
        f"Losses (nats per byte) after {options.steps} steps, {options.rounds} seeds: "
        f"mean, standard deviation, extremes"
    )
    return common.table(title, header, rows)


def mean_and_spread(values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return (
        f"{statistics.mean(values):{form}}, {deviation:{form.lstrip('+')}} "
        f"({min(values):{form}} to {max(values):{form}})"
    )


def smooth(values: list[float]) -> list[float]:
    return [statistics.mean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]


def draw(runs: dict[tuple[str, str], list[Json]], path: Path) -> None:
    """Draws the losses, and below them their distance from those in memory with the same
    seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    for column, dtype in enumerate(("float32", "bfloat16")):
        alone = [smooth(seed["losses"]) for seed in runs[dtype, "memory"]]
        for state, name in NAMES.items():
            curves = [smooth(seed["losses"]) for seed in runs[dtype, state]]
            draw_band(axes[0, column], curves, name, state)
            differences = [
                [a - b for a, b in zip(curve, other, strict=True)]
                for curve, other in zip(curves, alone, strict=True)
            ]
            draw_band(axes[1, column], differences, name, state)
        axes[0, column].set_title(f"{dtype} parameters, {len(alone)} seeds: mean and extremes")
        axes[1, column].set_xlabel("step")
        axes[0, column].legend()
        for row in axes[:, column]:
            row.grid(alpha=0.3)
    axes[0, 0].set_ylabel("loss, nats per byte (10 steps)")
    axes[1, 0].set_ylabel("loss - loss in memory, same seed")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_band(axes: Any, curves: list[list[float]], name: str, state: str) -> None:
    steps = range(1, len(curves[0]) + 1)
    at_step = list(zip(*curves, strict=True))
    width = 3.5 if state == "memory" else 1.2
    axes.plot(
        steps, list(map(statistics.mean, at_step)), COLOURS[state], label=name, linewidth=width
    )
    axes.fill_between(
        steps,
        list(map(min, at_step)),
        list(map(max, at_step)),
        color=COLOURS[state],
        alpha=0.15,
        linewidth=0,
    )


if __name__ == "__main__":
    main()
