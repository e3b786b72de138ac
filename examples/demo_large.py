"""Trains a model whose optimizer state is larger than the memory of the process.

It runs twice under the same limit. With float32 masters and torch.optim.AdamW in memory it
must fail. With torch_ext.OffloadedAdamW it must train.

Exit status: 0 if that is so, 1 if not, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory_limit import Limit, make_limit
from train_gpt import OUTPUT, Parser, choose_directory, describe, rate, whole_number

HERE = Path(__file__).resolve().parent
#: A float32 master and two float32 moments.
STATE_BYTES = 12
MIB, GB = 1 << 20, 1e9
#: A tenth of the parameters, and a limit under which they can train.
QUICK = {"layers": 8, "width": 768, "context": 16, "batch": 1, "steps": 2}
QUICK_LIMIT = 1000 * MIB

Run = dict[str, Any]


def make_parser() -> Parser:
    parser = Parser(
        prog="demo_large.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nvme-path", metavar="DIR", help="as for train_gpt.py")
    parser.add_argument("--host-memory", metavar="SIZE", default="128MiB", help="(%(default)s)")
    parser.add_argument(
        "--state-format", choices=["exact", "bf16", "int8"], default="exact", help="(exact)"
    )
    parser.add_argument(
        "--overlap-backward",
        choices=["prefetch", "update"],
        help="what OffloadedAdamW does while backward runs (nothing); with update, "
        "gradients are freed there",
    )
    parser.add_argument(
        "--times-limit",
        type=whole_number(1, 100),
        metavar="N",
        help="masters and moments are N times the limit (2; 3 with --overlap-backward update)",
    )
    parser.add_argument(
        "--limit-by",
        choices=["auto", "cgroup", "rlimit"],
        default="auto",
        help="memory cgroup or RLIMIT_DATA (auto: a cgroup if one can be made)",
    )
    for name, default, text in (
        ("steps", 4, "optimizer steps"),
        ("layers", 40, "transformer blocks"),
        ("width", 1024, "elements of a token's vector; a multiple of 64"),
        ("batch", 1, "sequences in a step"),
        ("context", 64, "bytes of text in a sequence"),
        ("seed", 0, "of parameters and batches"),
    ):
        parser.add_argument(
            f"--{name}",
            type=whole_number(0 if name == "seed" else 1, 1 << 16),
            default=default,
            metavar="N",
            help=f"{text} (%(default)s)",
        )
    parser.add_argument("--lr", type=rate, default=3e-5, help="learning rate (%(default)s)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a small model under {QUICK_LIMIT // MIB} MiB: shows that all of this works",
    )
    parser.add_argument("--output", metavar="DIR", type=Path, default=OUTPUT)
    return parser


def make_job(options: argparse.Namespace) -> Run:
    """Returns what both runs do, and the limit in bytes.

    Raises:
        ValueError, OSError: Something cannot work; the text says what.
    """
    if options.quick:
        vars(options).update(QUICK)
    if options.width % 64:
        raise ValueError(f"--width {options.width} is not a multiple of 64")
    import torch
    from gpt_training import GPT

    import torch_ext

    with torch.device("meta"):
        model = GPT(options.layers, options.width, options.width // 64, options.context)
    parameters = sum(p.numel() for p in model.parameters())
    options.output.mkdir(parents=True, exist_ok=True)
    nvme_path = choose_directory(options.nvme_path, options.output)
    free = describe(nvme_path)["free_bytes"]
    if STATE_BYTES * parameters > free:
        raise ValueError(
            f"up to {STATE_BYTES * parameters / GB:.1f} GB of state are to be written, and "
            f"{nvme_path} has {free / GB:.1f} GB: choose another with --nvme-path"
        )
    times = options.times_limit or (3 if options.overlap_backward == "update" else 2)
    limit = STATE_BYTES * parameters // times // MIB * MIB
    names = ("steps", "layers", "width", "batch", "context", "seed", "lr")
    return {
        "limit": QUICK_LIMIT if options.quick else limit,
        "parameters": parameters,
        "job": {name: getattr(options, name) for name in names}
        | {
            "heads": options.width // 64,
            "device": "cpu",
            "nvme_path": nvme_path,
            "host_memory": torch_ext.parse_size(options.host_memory),
        },
        "offload": {"state_format": options.state_format}
        | ({"overlap_backward": options.overlap_backward} if options.overlap_backward else {}),
    }


def run(task: Run, offloaded: bool, limit: Limit) -> Run:
    """Runs under the limit. Returns all that was reported until the process ended."""
    command = [sys.executable, str(HERE / "large_training.py")]
    command.append(json.dumps([task["job"] | {"offloaded": offloaded}, task["offload"]]))
    result: Run = {"steps": [], "stage": "starting", "error": None}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # Without this, freed blocks of megabytes stay with the process, in pieces.
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB // 4)},
            preexec_fn=limit.enter,
        ) as process,
    ):
        try:
            for line in process.stdout:
                take(json.loads(line), result)
        except BaseException:
            process.kill()
            raise
        result["status"] = process.wait()
        errors.seek(0)
        result["stderr"] = errors.read().decode(errors="replace").strip()
    result["limit_peak"] = limit.peak()
    return result


def take(message: Run, result: Run) -> None:
    event = message.pop("event")
    if event == "stage":
        result["stage"] = message["text"]
    elif event == "step":
        result["steps"].append(message)
        print(
            f"  step {len(result['steps'])}: loss {message['loss']:.4f}, "
            f"forward and backward {message['backward_seconds']:.1f} s, "
            f"optimizer {message['optimizer_seconds']:.1f} s, "
            f"peak RSS {message['peak'] / GB:.2f} GB",
            flush=True,
        )
    elif event == "error":
        result["error"] = f"{message['kind']}: {message['text']}"
    else:
        result |= message


def ended(result: Run) -> str:
    """Says in words how a run ended."""
    if result["status"] == 0:
        return "trained"
    if result["status"] == -signal.SIGKILL:
        how = "killed by the kernel, out of memory"
    else:
        last = result["stderr"].splitlines()[-1:] or [f"status {result['status']}"]
        how = result["error"] or last[0]
    return f"FAILED while {result['stage']}: {how}"


def lacked_memory(result: Run) -> bool:
    said = f"{result['error']} {result['stderr']}".lower()
    return result["status"] != 0 and (
        result["status"] == -signal.SIGKILL
        or any(word in said for word in ("memory", "bad_alloc"))
    )


def summary(task: Run, kind: str, memory: Run, nvme: Run) -> str:
    limit, state = task["limit"], STATE_BYTES * task["parameters"]
    rows = [("", "in memory", "OffloadedAdamW")]
    rows += [
        ("limit of the process", *[f"{limit / GB:.2f} GB"] * 2),
        ("masters and moments / limit", *[f"{state / limit:.2f}"] * 2),
        ("peak RSS, files of libraries included", *(peak(r) for r in (memory, nvme))),
        ("peak of the cgroup, page cache included", *(group_peak(r) for r in (memory, nvme))),
        ("steps done", *(str(len(r["steps"])) for r in (memory, nvme))),
        ("losses", *(losses(r) for r in (memory, nvme))),
    ]
    if nvme.get("stats"):
        stats = nvme["stats"]
        rows += [
            ("state on the drive", "-", f"{stats['state_bytes'] / GB:.2f} GB"),
            ("host memory of the optimizer", "-", f"{stats['host_bytes_peak'] / 1e6:.0f} MB"),
            ("read and written", "-", f"{moved(stats) / GB:.1f} GB"),
        ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
    return "\n".join([f"limited by {kind}", *lines])


def peak(result: Run) -> str:
    """Returns the peak at the last step that was told: a killed process cannot tell more."""
    seen = [step["peak"] for step in result["steps"]]
    found = result.get("peak") or max(seen, default=0)
    return f"{found / GB:.2f} GB" if found else "unknown: it ended early"


def group_peak(result: Run) -> str:
    return f"{result['limit_peak'] / GB:.2f} GB" if result["limit_peak"] else "not counted"


def losses(result: Run) -> str:
    return ", ".join(f"{step['loss']:.3f}" for step in result["steps"]) or "-"


def moved(stats: Run) -> int:
    return stats["bytes_read"] + stats["bytes_written"]


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        task = make_job(options)
        runs, kind = run_both(task, options.limit_by)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    memory, nvme = runs
    print(f"\n{summary(task, kind, memory, nvme)}\n")
    print(f"in memory:      {ended(memory)}\nOffloadedAdamW: {ended(nvme)}")
    if nvme.get("plan"):
        print(f"\n{nvme['plan']}")
    figures = task | {"limited_by": kind, "in_memory": memory, "offloaded": nvme}
    (options.output / "demo_large.json").write_text(json.dumps(figures, indent=1))
    return 0 if lacked_memory(memory) and nvme["status"] == 0 else 1


def run_both(task: Run, limit_by: str) -> tuple[list[Run], str]:
    state = STATE_BYTES * task["parameters"]
    runs = []
    for offloaded in (False, True):
        limit = make_limit(task["limit"], limit_by)
        if not offloaded:
            print(
                f"{task['parameters'] / 1e6:.1f} M bfloat16 parameters; their float32 masters "
                f"and moments are {state / GB:.2f} GB ({STATE_BYTES} bytes each),\n"
                f"the limit is {task['limit'] / GB:.2f} GB ({limit.kind}); parameters and "
                f"gradients take up to {4 * task['parameters'] / GB:.2f} GB of it",
                flush=True,
            )
        print("OffloadedAdamW:" if offloaded else "AdamW in memory:", flush=True)
        try:
            runs.append(run(task, offloaded, limit))
        finally:
            limit.close()
        print(f"  {ended(runs[-1])}", flush=True)
    return runs, limit.kind


if __name__ == "__main__":
    # A run that is stopped shall remove its group too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
