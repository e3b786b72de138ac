"""TensorSwapper beside fio: one large tensor, and many small ones.

In every round each case has its own runs, ours and fio's, one right after the other. Who goes
first alternates. fio runs with each of its engines that works here, and the better of a round
counts. All overwrite space that has been written before, except in the rows of new space.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import common
from common import GIB, KIB, MIB, Json, Rate
from transfers import Buffers, Transfer

NEW_SPACE = ", new space"
FIO_ENGINES = ("libaio", "io_uring")


@dataclass
class Case:
    """A row of the table for writing, and one for reading."""

    name: str
    buffers: Buffers
    transfer: Transfer
    fio_file: Path
    new_space: bool = False
    samples: dict[str, list[Json]] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        return self.buffers.count > 1

    def fio(self, operation: str, engine: str) -> Rate:
        rw = f"rand{operation}" if self.small else operation
        block = self.buffers.size if self.small else common.AIO["block_size"]
        if self.new_space:
            self.fio_file.unlink(missing_ok=True)
        return common.fio(rw, self.fio_file, self.buffers.nbytes, block, ioengine=engine)

    def ours(self, operation: str) -> Rate:
        action = self.transfer.write if operation == "write" else self.transfer.read
        return common.rate_of(action, self.buffers.nbytes)


def main() -> None:
    options = parse()
    machine = common.machine(options.directory)
    with common.work_folder(options.directory) as folder:
        cases = make_cases(options, folder, machine["memory_alignment"] // 2)
        fio = engines_of_fio(folder) if common.have_fio() else []
        prepare(cases, bool(fio))
        for round_ in range(options.rounds):
            common.say(f"round {round_ + 1} of {options.rounds}")
            for case in cases:
                for pair in range(options.small_pairs if case.small else 1):
                    measure(case, ours_first=(round_ + pair) % 2 == 1, fio=fio)
        finish(cases)
        engine = cases[0].transfer.engine
        result = {
            "machine": machine,
            "engine": engine,
            "fio_engines": fio,
            "measurements": {case.name: case.samples for case in cases},
            "tables": [tabulate(cases, engine)],
        }
    common.publish("io", options, result)


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--size", type=common.size, default=GIB, help="of the large tensor")
    parser.add_argument("--keys", type=int, default=1024, help="small tensors (%(default)s)")
    options = parser.parse_args()
    # A small transfer takes a tenth of a second, so there are more, for the same spread.
    options.small_pairs = 3
    if options.quick:
        options.rounds, options.size, options.keys, options.small_pairs = 1, 4 * MIB, 16, 1
    return options


def make_cases(options: argparse.Namespace, folder: Path, shift: int) -> list[Case]:
    """Makes the cases. ``shift``: bytes into a page, where direct I/O cannot write from."""
    size, keys = options.size, options.keys
    shapes = [
        (f"{common.size_text(size)} tensor", Buffers(1, size)),
        (f"{keys} x 64 KiB", Buffers(keys, 64 * KIB)),
    ]
    cases = []
    for shape, buffers in shapes:
        for name, arguments in (
            ("", {}),
            (", verify=False", {"verify": False}),
            (", unaligned", {"shift": shift}),
            (NEW_SPACE, {}),
        ):
            cases.append(
                Case(
                    shape + name,
                    buffers,
                    Transfer(folder, buffers, engine=options.engine, **arguments),
                    folder / f"fio.{buffers.count}{'.new' if name == NEW_SPACE else ''}",
                    new_space=name == NEW_SPACE,
                )
            )
    return cases


def engines_of_fio(folder: Path) -> list[str]:
    """Returns libaio, and what else this fio and this kernel have."""
    found = [FIO_ENGINES[0]]
    for engine in FIO_ENGINES[1:]:
        try:
            common.fio("write", folder / "fio.probe", MIB, MIB, ioengine=engine)
            found.append(engine)
        except RuntimeError:
            common.say(f"fio's engine {engine} does not work here: beside {found[0]} only")
    return found


def prepare(cases: list[Case], fio: bool) -> None:
    """Makes files of their final length, which are written throughout."""
    for case in cases:
        if case.new_space:
            continue
        case.transfer.fill()
        if fio and not case.fio_file.exists():
            common.fio("write", case.fio_file, case.buffers.nbytes, MIB)


def measure(case: Case, ours_first: bool, fio: list[str]) -> None:
    for operation in ["write"] if case.new_space else ["write", "read"]:
        if case.new_space:
            case.transfer.renew()
        runs: dict[str, Callable[[str], Rate]] = {
            f"fio, {engine}": partial(case.fio, engine=engine) for engine in fio
        }
        runs["ours"] = case.ours
        order = list(runs) if not ours_first else list(reversed(runs))
        sample = {who: asdict(runs[who](operation)) for who in order}
        if fio:
            sample["fio"] = max(
                (sample[f"fio, {engine}"] for engine in fio),
                key=lambda rate: rate["gib_per_second"],
            )
        case.samples.setdefault(operation, []).append(sample)


def finish(cases: list[Case]) -> None:
    for case in cases:
        case.transfer.check()
        if not case.new_space and case.transfer.grew():
            raise RuntimeError(f"{case.name}: rewriting took new space")
        case.transfer.close()


def tabulate(cases: list[Case], engine: str) -> Json:
    header = ["", "GiB/s ours", "GiB/s fio", "ours / fio", "CPU s/GiB ours", "CPU s/GiB fio"]
    rows = []
    for case in cases:
        for operation, samples in case.samples.items():
            ours, limit = column(samples, "ours"), column(samples, "fio")
            ratios = [a / b for a, b in zip(ours, limit, strict=False)]
            rows.append(
                [
                    f"{case.name}, {operation}",
                    *[common.cell(values) for values in (ours, limit, ratios)],
                    common.cell(column(samples, "ours", "cpu_seconds_per_gib")),
                    common.cell(column(samples, "fio", "cpu_seconds_per_gib")),
                ]
            )
    return common.table(f"TensorSwapper ({engine}) beside fio", header, rows)


def column(samples: list[Json], who: str, what: str = "gib_per_second") -> list[float]:
    return [sample[who][what] for sample in samples if who in sample]


if __name__ == "__main__":
    main()
