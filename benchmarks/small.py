"""100,000 tensors of 4 KiB through the C++ API, beside fio's random requests.

fio makes up to 16 requests with one system call, since we make as many as there are. The
tensors have the size of a file system's block, so that direct I/O needs no padding.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import common
from common import AIO, GIB, KIB, MIB, Json, Rate

BUILD = Path(os.environ.get("TORCH_EXT_BUILD_DIR", common.ROOT / "build" / "release"))
PROGRAM = BUILD / "benchmarks" / "small_operations"
SIZE = 4 * KIB
#: The kinds of the program, and what the table calls them.
OURS = {
    "checked-keys": "keys of a Swapper",
    "keys": "keys, verify=False",
    "file": "ranges of one file",
}


def main() -> None:
    options = common.parser(__doc__).parse_args()
    options.count = 1000 if options.quick else 100_000
    options.rounds = 1 if options.quick else options.rounds
    machine = common.machine(options.directory)
    with common.work_folder(options.directory) as folder:
        samples = measure(options, folder)
    result = {
        "machine": machine,
        "measurements": samples,
        "tables": [tabulate(options, samples)],
    }
    common.publish("small", options, result)


class Program:
    """A small_operations of one kind, which has written everything once."""

    def __init__(self, process: subprocess.Popen[str], count: int) -> None:
        self._process, self._gib = process, count * SIZE / GIB
        self._answer()  # It says that it is ready.
        self.run("write")

    def run(self, operation: str) -> Rate:
        seconds, cpu = map(float, self._ask(operation).split())
        return Rate(self._gib / seconds, cpu / self._gib)

    def check(self) -> None:
        self.run("read")
        if self._ask("check") != "same":
            raise RuntimeError("what was read is not what was written")

    def _ask(self, line: str) -> str:
        print(line, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{PROGRAM.name} ended")
        return answer.strip()


@contextmanager
def program(kind: str, options: argparse.Namespace, folder: Path) -> Iterator[Program]:
    arguments = [options.count, SIZE, *AIO.values(), options.engine]
    command = [PROGRAM, kind, folder, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield Program(process, options.count)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[Json]]:
    total = options.count * SIZE
    path = folder / "fio"
    fio = common.have_fio()
    if fio:
        common.fio("write", path, total, MIB)
    samples: dict[str, list[Json]] = {"write": [], "read": []}
    with ExitStack() as stack:
        runs = {kind: stack.enter_context(program(kind, options, folder)).run for kind in OURS}
        programs = [run.__self__ for run in runs.values()]
        if fio:
            runs["fio"] = lambda operation: common.fio(
                f"rand{operation}",
                path,
                total,
                SIZE,
                iodepth_batch=16,
                iodepth_batch_complete_max=16,
            )
        for round_ in range(options.rounds):
            common.say(f"small: round {round_ + 1} of {options.rounds}")
            first = round_ % len(runs)
            order = [*runs][first:] + [*runs][:first]
            for operation, rows in samples.items():
                rows.append({who: asdict(runs[who](operation)) for who in order})
        for each in programs:
            each.check()
    return samples


def tabulate(options: argparse.Namespace, samples: dict[str, list[Json]]) -> Json:
    header = ["", "GiB/s ours", "GiB/s fio", "ours / fio", "CPU s/GiB ours", "CPU s/GiB fio"]
    rows = []
    for kind, title in OURS.items():
        for operation, rounds in samples.items():
            beside = [sample for sample in rounds if "fio" in sample]
            rows.append(
                [
                    f"{title}, {operation}",
                    common.cell(column(rounds, kind)),
                    common.cell(column(beside, "fio")),
                    common.cell(
                        [
                            ours / fio
                            for ours, fio in zip(
                                column(beside, kind), column(beside, "fio"), strict=True
                            )
                        ]
                    ),
                    common.cell(column(rounds, kind, "cpu_seconds_per_gib")),
                    common.cell(column(beside, "fio", "cpu_seconds_per_gib")),
                ]
            )
    return common.table(f"{options.count} x 4 KiB through the C++ API", header, rows)


def column(samples: list[Json], who: str, what: str = "gib_per_second") -> list[float]:
    return [sample[who][what] for sample in samples]


if __name__ == "__main__":
    main()
