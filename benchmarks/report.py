"""Makes tables of all results in a folder: those of *.py, and Google Benchmark's JSON."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import common
from common import Json

FIGURES = "figures"  # The name of the marks around the tables.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder with the JSON files")
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help=f"replace what stands between <!-- {FIGURES} --> and <!-- /{FIGURES} -->",
    )
    options = parser.parse_args()
    text = "\n".join(
        section(json.loads(p.read_text())) for p in sorted(options.results.glob("*.json"))
    )
    if options.into is None:
        print(text)
    else:
        replace(options.into, text)


def section(result: Json) -> str:
    if "context" in result:
        return micro_benchmarks(result)
    quick = "Of `--quick`: these figures mean nothing. " if result["quick"] else ""
    head = f"{quick}`{result['command']}`, rounds: {result['rounds']}. "
    return f"{head}{common.describe(result['machine'])}\n\n{common.markdown(result['tables'])}"


def micro_benchmarks(result: Json) -> str:
    """Makes the table of programs that count `operations` and the CPU time of all threads."""
    runs: dict[str, list[Json]] = {}
    for run in result["benchmarks"]:
        if run["run_type"] == "iteration":
            runs.setdefault(run["run_name"], []).append(run)
    rows = [
        [
            title(name),
            *(
                common.cell([microseconds(run, key) for run in of_name])
                for key in ("cpu_time", "real_time")
            ),
        ]
        for name, of_name in runs.items()
    ]
    context = result["context"]
    program, repetitions = Path(context["executable"]).name, max(map(len, runs.values()))
    head = (
        f"`{program}`, repetitions: {repetitions}. {context['num_cpus']} cores of "
        f"{context['mhz_per_cpu']} MHz; torch_ext at {context.get('commit', 'some commit')}; "
        f"{context['date'][:16]}, load {context['load_avg'][0]:.1f} before"
    )
    header = ["per operation", "us of CPU, all threads", "us"]
    return f"{head}\n\n{common.markdown([common.table('Our own cost', header, rows)])}"


def microseconds(run: Json, key: str) -> float:
    factor = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}[run["time_unit"]]
    return run[key] * factor / run["operations"]


def title(name: str) -> str:
    return re.sub(r"^BM_|/(process_time|real_time)\b", "", name)


def replace(file: Path, text: str, name: str = FIGURES) -> None:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = file.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"{file} has no lines {begin} and {end}")
    file.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
