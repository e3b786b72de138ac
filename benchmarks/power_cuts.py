"""What a power cut leaves of saves: torch_ext, torch.save, safetensors, DCP and DeepSpeed.

Each contender saves twice into one place, as its documentation says. The first save is given
the time to reach the drive, as minutes of training would. The power is cut at one of three
moments: when the first save has just returned, when the second has, and while the second is
under way. Then the file system is mounted again, the contender's own reader looks, and all
values are compared with those of both saves.

The cut is a shutdown of the file system without its log, ext4 and xfs, in a file that is
mounted by a loop device. What was in the page cache is lost then, and so are names and sizes
that were not synced. Whether the drive was asked to flush does not show: direct writes count as
durable. VolatileDriveFaults (tests/fault) has a drive that forgets.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import common
from common import MIB, Json

CONTENDERS = {
    "commit": "commit()",
    "ours": "torch_ext.save",
    "torch.save": "torch.save",
    "safetensors": "safetensors",
    "dcp": "DCP",
    "dcp_safetensors": "DCP, safetensors",
    "deepspeed": "FastFileWriter",
}
#: Moments of a cut, as the tables call them. The first is no cut: what a reader finds anyway.
MOMENTS = {
    "none": "no power cut",
    "first": "the first save has returned",
    "second": "the second has returned",
    "under way": "the second is under way",
}
#: What may be there, and how a cell calls it.
OUTCOMES = {"new": "new", "old": "old", "lost": "lost", "damaged": "damaged"}


def main() -> None:
    options = parse()
    if (reason := why_not()) is not None:
        common.say(f"power_cuts: {reason}")
        return
    # What ends this process ends the worker and removes the files too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    machine = common.machine(options.directory)
    measurements: list[Json] = []
    with common.work_folder(options.directory) as folder:
        for file_system in options.file_systems:
            for contender in options.contenders:
                common.say(f"power_cuts: {file_system}, {CONTENDERS[contender]}")
                measurements += cuts_of(contender, file_system, folder, options)
    tables = [tabulate(fs, options, measurements) for fs in options.file_systems]
    tables = [t for t in tables if t["rows"]]
    common.publish(
        "power_cuts",
        options,
        {"machine": machine, "measurements": measurements, "tables": tables},
    )


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.set_defaults(rounds=20)
    parser.add_argument(
        "--size", type=common.size, default=16 * MIB, help="of what is saved (16 MiB)"
    )
    parser.add_argument("--file-systems", nargs="+", default=["ext4", "xfs"])
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS)
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.size, options.file_systems = 1, 4 * MIB, ["ext4"]
    return options


def why_not() -> str | None:
    """Returns why no power can be cut here, or None."""
    return None if os.geteuid() == 0 else "only root can mount and shut down a file system"


def cuts_of(
    contender: str, file_system: str, folder: Path, options: argparse.Namespace
) -> list[Json]:
    """Returns what each cut has left. One process makes all of a contender's."""
    job = {
        "contender": contender,
        "file_system": file_system,
        "folder": str(folder),
        "bytes": options.size,
        "cuts": options.rounds,
        "moments": list(MOMENTS),
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("power_cuts_worker.py"), json.dumps(job)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    # Libraries print what they like.
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0:
        raise RuntimeError(f"the worker of {contender} on {file_system} has failed; see above")
    for each in found:
        if "absent" in each:
            common.say(f"  left out: {each['absent']}")
    return [each | {"contender": contender, "file_system": file_system} for each in found]


def tabulate(file_system: str, options: argparse.Namespace, measurements: list[Json]) -> Json:
    rows = []
    for contender in options.contenders:
        mine = [
            m
            for m in measurements
            if (m["contender"], m["file_system"]) == (contender, file_system)
        ]
        if any("absent" in m for m in mine):
            # There is no table of a file system that cannot be had.
            if not any(m.get("no_file_system") for m in mine):
                reason = next(m["absent"] for m in mine if "absent" in m)
                text = "not installed" if "is not installed" in reason else "does not load here"
                rows.append([CONTENDERS[contender], *[text] * len(MOMENTS)])
            continue
        cells = []
        for moment in MOMENTS:
            counts = Counter(m["outcome"] for m in mine if m["moment"] == moment)
            texts = [f"{name} {counts[key]}" for key, name in OUTCOMES.items() if counts[key]]
            cells.append(", ".join(texts) or "-")
        rows.append([CONTENDERS[contender], *cells])
    title = f"What is there after a power cut, of {options.rounds} each, on {file_system}"
    return common.table(title, ["", *MOMENTS.values()], rows)


if __name__ == "__main__":
    main()
