"""What the examples of training loops share."""

from __future__ import annotations

import argparse

SEED = 1


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--nvme-path", metavar="DIR", default="/var/tmp", help="on the drive (%(default)s)"
    )
    parser.add_argument("--host-memory", default="2MiB", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="(%(default)s)")
    return parser.parse_args()


def compare(columns: dict[str, list[float]]) -> int:
    """Prints the losses side by side. Returns the exit status: 0 if all are equal."""
    width = max(map(len, columns))
    print("step", *(name.rjust(width) for name in columns), sep="  ")
    for step, losses in enumerate(zip(*columns.values(), strict=True), start=1):
        print(f"{step:4}", *(f"{loss:{width}.6f}" for loss in losses), sep="  ")
    first, *others = columns.values()
    equal = all(losses == first for losses in others)
    print("equal to the bit:", "yes" if equal else "no")
    return 0 if equal else 1
