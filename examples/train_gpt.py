"""Trains a small GPT twice: AdamW in memory, and AdamW with its state on NVMe.

Both runs have the same seed, text and hyper-parameters. Each has a process of its own. A table
and a picture stand at the end. They say whether both gave the same losses and parameters, bit
for bit. Then the first steps are made again, with commits. The process is killed in the midst
of a step, and another one goes on from the last commit.

Exit status: 0 if all gave the same, 1 if they did not or if a run failed, 2 for wrong input. On
another device than the CPU, equal bits are not promised, and nearly equal losses are enough.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "demo-out"
IN_RAM = {"tmpfs", "ramfs"}
NAMES = {False: "AdamW in memory", True: "OffloadedAdamW"}
#: How many steps the run that is killed makes, if there are as many.
KILLED_STEPS = 12

Run = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def whole_number(least: int, most: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not an integer from {least} to {most}"
            )
        return value

    return parse


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return value


def make_parser() -> Parser:
    parser = Parser(
        prog="train_gpt.py",
        description="Trains a small GPT on the source text of Python's standard library, "
        "twice with the same seed: with torch.optim.AdamW(fused=True), and with "
        "torch_ext.OffloadedAdamW, whose state is on NVMe. Compares the two bit for bit.",
        epilog="A third run is killed in the midst of a step, and goes on from its last "
        "commit. Exit status: 0 if losses and parameters are equal to the bit (on another "
        "device than the CPU: nearly), 1 if they are not or a run failed, 2 for wrong input.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    offload = parser.add_argument_group("offloading")
    offload.add_argument(
        "--nvme-path",
        metavar="DIR",
        help="existing directory on the drive that shall hold the optimizer state "
        "(default: the output folder if it is on a disk, else the first that is on one of "
        "the current directory and /var/tmp)",
        default=argparse.SUPPRESS,
    )
    offload.add_argument(
        "--host-memory",
        metavar="SIZE",
        default="48MiB",
        help="host memory for state on its way, such as 48MiB",
    )
    offload.add_argument(
        "--device", default="cpu", help="where the model trains: cpu, cuda, cuda:1, ..."
    )
    offload.add_argument(
        "--overlap-backward",
        choices=("off", "update"),
        default="off",
        help="update: each parameter during backward, as soon as its gradient is there; "
        "gradients are clipped in neither run then",
    )
    model = parser.add_argument_group("model and training")
    for name, default, least, most, text in (
        ("steps", 120, 1, 1_000_000, "optimizer steps of each run"),
        ("layers", 4, 1, 1000, "transformer blocks"),
        ("width", 512, 1, 65536, "elements of a token's vector; a multiple of --heads"),
        ("heads", 8, 1, 65536, "attention heads"),
        ("batch", 4, 1, 65536, "sequences in a step"),
        ("context", 128, 2, 65536, "bytes of text in a sequence"),
        ("seed", 0, 0, 2**63 - 1, "of parameters and batches"),
    ):
        model.add_argument(
            f"--{name}", type=whole_number(least, most), default=default, metavar="N", help=text
        )
    model.add_argument(
        "--lr", type=rate, default=5e-4, metavar="RATE", help="peak of the learning rate"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=OUTPUT,
        help="folder for train_gpt.png and train_gpt.json; made if missing",
    )
    return parser


def make_job(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the runs' job, after it was tried out on a tiny optimizer.

    Raises:
        ValueError, OSError, RuntimeError: Something cannot work; the text says what.
    """
    if options.width % options.heads:
        raise ValueError(
            f"--width {options.width} is not a multiple of --heads {options.heads}"
        )
    # torch is slow to import, so what needs no torch is checked first.
    try:
        import torch

        import torch_ext
    except ImportError as error:
        raise RuntimeError(f"{error}; `make demo` sets up all that is needed") from None

    try:
        host_memory = torch_ext.parse_size(options.host_memory)
    except ValueError as error:
        raise ValueError(f"--host-memory: {error}") from None
    try:
        weight = torch.zeros(64, device=torch.device(options.device), requires_grad=True)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"--device {options.device}: {first_line}") from None
    options.output.mkdir(parents=True, exist_ok=True)
    if not os.access(options.output, os.W_OK):
        raise ValueError(f"--output {options.output} is not writable")
    nvme_path = choose_directory(getattr(options, "nvme_path", None), options.output)
    check_space(options, nvme_path)
    with torch_ext.OffloadedAdamW(
        [weight], nvme_path=nvme_path, host_memory=host_memory
    ) as optimizer:
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    model = ("steps", "layers", "width", "heads", "batch", "context", "lr", "seed", "device")
    return {
        "nvme_path": nvme_path,
        "host_memory": host_memory,
        "overlap_backward": "update" if options.overlap_backward == "update" else "",
        **{name: getattr(options, name) for name in model},
    }


def check_space(options: argparse.Namespace, nvme_path: str) -> None:
    import torch
    from gpt_training import GPT

    with torch.device("meta"):
        model = GPT(options.layers, options.width, options.heads, options.context)
    needed = 8 * sum(p.numel() for p in model.parameters())
    free = describe(nvme_path)["free_bytes"]
    if needed > free:
        raise ValueError(
            f"the optimizer state needs {needed / 1e9:.1f} GB and {nvme_path} has "
            f"{free / 1e9:.1f} GB: choose another with --nvme-path, or a smaller model"
        )


def choose_directory(given: str | None, output: Path) -> str:
    if given is not None:
        if not os.path.isdir(given):
            raise ValueError(f"--nvme-path {given} is not an existing directory")
        return os.path.abspath(given)
    candidates = [path for path in (output, Path.cwd(), Path("/var/tmp")) if path.is_dir()]
    on_disk = [
        path
        for path in candidates
        if os.access(path, os.W_OK) and describe(path)["file_system"] not in IN_RAM
    ]
    return str((on_disk or candidates)[0].resolve())


def describe(directory: str | Path) -> dict[str, Any]:
    """Returns the file system, its source, and the way of I/O there."""
    from torch_ext.__main__ import collect

    return collect(directory)["directory"]


class Progress:
    """A bar for each run where rich and a terminal are there, else lines."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.bars: Any = None
        if not sys.stdout.isatty():
            return
        try:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
        except ImportError:
            return
        self.bars = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]:<24}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )

    @contextmanager
    def run(self, name: str) -> Iterator[Any]:
        """Yields a function. It is called with each step's loss."""
        if self.bars is None:
            yield self._lines(name)
            return
        with self.bars:
            task = self.bars.add_task(name, total=self.steps, text="starting")

            def show(loss: float) -> None:
                self.bars.update(task, advance=1, text=f"loss {loss:.4f}")

            yield show

    def _lines(self, name: str) -> Any:
        begin = time.monotonic()
        done = 0
        print(f"{name}: starting", flush=True)

        def show(loss: float) -> None:
            nonlocal done
            done += 1
            if done == 1 or done == self.steps or done % max(self.steps // 10, 1) == 0:
                seconds = time.monotonic() - begin
                print(
                    f"{name}: step {done}/{self.steps}, loss {loss:.4f}, {seconds:.0f} s",
                    flush=True,
                )

        return show


class RunError(Exception):
    """A run ended without a result."""


def run(job: dict[str, Any], offloaded: bool, progress: Progress) -> Run:
    """Runs the job in a process of its own. Returns all that it reported."""
    command = [sys.executable, str(HERE / "gpt_training.py")]
    command.append(json.dumps(job | {"offloaded": offloaded}))
    result: Run = {}
    with (
        tempfile.TemporaryFile() as errors,
        progress.run(NAMES[offloaded]) as show,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            for line in process.stdout:
                message = json.loads(line)
                event = message.pop("event")
                if event == "step":
                    show(message["loss"])
                elif event == "error":
                    raise RunError(f"{NAMES[offloaded]}: {message['kind']}: {message['text']}")
                else:
                    result |= message
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise RunError(
                f"{NAMES[offloaded]} ended with status {process.returncode}: {' '.join(last)}"
            )
    return result


def run_killed(job: dict[str, Any]) -> Run:
    """Makes the first steps with commits, is killed in the midst of one, and goes on.

    Returns the losses, by step, and what happened.
    """
    last = min(job["steps"], KILLED_STEPS)
    every = max(last // 4, 1)
    killed_in = min(2 * every + 1 + every // 2, last)
    found: Run = {"steps": last, "killed_in": killed_in, "losses": {}, "commits": []}
    with tempfile.TemporaryDirectory(prefix="train_gpt.", dir=job["nvme_path"]) as directory:
        more = {"nvme_path": directory, "commit_every": every, "last_step": last}
        run_until_the_end(job | more | {"killed_in": killed_in}, found)
        run_until_the_end(job | more, found)
    return found


def run_until_the_end(job: dict[str, Any], found: Run) -> None:
    """Runs a process that commits, and adds what it says until it ends or is killed."""
    command = [sys.executable, str(HERE / "gpt_training.py")]
    command.append(json.dumps(job | {"offloaded": True}))
    number = 0
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        for line in process.stdout:
            message = json.loads(line)
            event = message.pop("event")
            if event == "goes on":
                found["resumed_after"] = number = message["after"]
            elif event == "step":
                number += 1
                found["losses"].setdefault(number, []).append(message["loss"])
            elif event == "commit":
                found["commits"].append(message)
            elif event == "error":
                raise RunError(f"the killed run: {message['kind']}: {message['text']}")
        if process.wait() != (-signal.SIGKILL if "killed_in" in job else 0):
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise RunError(f"the killed run ended with {process.returncode}: {' '.join(last)}")


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        job = make_job(options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        parser.error(str(error))
    place = describe(job["nvme_path"])
    way = "direct I/O" if place["direct"] else place["buffered_reason"]
    print(f"state on {place['path']}: {place['file_system']} on {place['source']}, {way}")
    if place["file_system"] in IN_RAM:
        print("this is memory, not a disk: choose another with --nvme-path")

    progress = Progress(job["steps"])
    begin = time.monotonic()
    try:
        runs = [run(job, offloaded, progress) for offloaded in (False, True)]
        seconds = time.monotonic() - begin
        print("once more with commits, and a kill", flush=True)
        killed = run_killed(job)
    except RunError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1

    import gpt_report

    figures = gpt_report.summarize(job, runs, place, seconds)
    figures["killed"] = gpt_report.summarize_killed(killed, runs[1])
    json_path = options.output / "train_gpt.json"
    json_path.write_text(json.dumps(figures, indent=1))
    print()
    print(gpt_report.table(figures))
    print()
    print(gpt_report.plot(figures, options.output / "train_gpt.png"))
    print(f"all figures: {json_path}")
    return 0 if gpt_report.is_good(figures) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
