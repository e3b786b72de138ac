"""Draws the ratios of the tables in a folder: how many times as fast as the others."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from common import Json

NUMBER = r"(\d+(?:\.\d+)?)"
CELL = re.compile(rf"{NUMBER}(?: \({NUMBER} to {NUMBER}\))?")
TITLE = re.compile(r"(?P<what>ours|step|iteration) / (?P<other>.+?)(?:'s)?")
NOT_OURS = re.compile("in memory|alone|^forward and backward|DeepSpeed$")


@dataclass
class Ratio:
    """The median over rounds and its extremes."""

    name: str
    other: str
    median: float
    least: float
    most: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder with the JSON files")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args()
    results = [json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))]
    ratios = [ratio for result in results for ratio in ratios_of(result)]
    if not ratios:
        raise SystemExit(f"no table in {options.results} compares with anything")
    draw(ratios, options.picture)


def ratios_of(result: Json) -> list[Ratio]:
    """Returns the ratios of all columns named "ours / OTHER", which are rates.

    Columns named "step / OTHER" and "iteration / OTHER" are times, so they are inverted.
    """
    found = []
    for table in result.get("tables", []):
        for column, title in enumerate(table["header"]):
            named = TITLE.fullmatch(title)
            if not named:
                continue
            for row in table["rows"]:
                numbers = CELL.fullmatch(row[column])
                if not numbers or NOT_OURS.search(row[0]):
                    continue
                median = float(numbers[1])
                low, high = (float(n) if n else median for n in numbers.groups()[1:])
                if named["what"] != "ours":
                    median, low, high = 1 / median, 1 / high, 1 / low
                name = f"{table['title'].partition(';')[0]}: {row[0]}"
                found.append(Ratio(name, named["other"], median, low, high))
    return found


def draw(ratios: list[Ratio], path: Path) -> None:
    """Draws a line for each row and a colour for each contender, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(ratio.name for ratio in ratios))
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.27 * len(names)), layout="constrained")
    for other in dict.fromkeys(ratio.other for ratio in ratios):
        of_other = [ratio for ratio in ratios if ratio.other == other]
        axes.errorbar(
            [ratio.median for ratio in of_other],
            [names.index(ratio.name) for ratio in of_other],
            xerr=[
                [ratio.median - ratio.least for ratio in of_other],
                [ratio.most - ratio.median for ratio in of_other],
            ],
            fmt="o",
            capsize=2,
            label=other,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [f"{tick:g} x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_title("Our rate over that of others (median of rounds, extremes)")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
