"""DeepSpeed's NVMe optimizer in a process of its own, as optimizer_worker.py is.

It is ZeRO-3 in bf16 on the CPU accelerator, with its own I/O op. The optimizer's state is on
NVMe, parameters are in memory, reads and writes are pipelined. A step needs gradients that a
backward has handed over, so each step has a forward and a backward before it. "seconds" are
those of `engine.step()` alone, or of all three where the job says "iteration".
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

import torch  # noqa: E402 - it reads what is set above
from iteration_model import Model, random_rows  # noqa: E402
from optimizer_worker import (  # noqa: E402
    LEARNING_RATE,
    cpu_seconds,
    import_what_a_step_imports,
    peak_memory,
    tell,
)


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.manual_seed(0)
    import_what_a_step_imports()
    first_peak = peak_memory()
    engine = make_engine(job)
    tell(peak=first_peak, parameters=job["parameters"])
    x = random_rows(job)
    for line in sys.stdin:
        burst(engine, x, 1)
        tell(**burst(engine, x, int(line), whole=job.get("iteration", False)))
    # DeepSpeed's handles abort at exit if anything is left to do.
    sys.stdout.flush()
    os._exit(0)


def settings(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "torch_adam": True, "fused": True},
        },
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            # There must be several, or there would be nothing to overlap.
            "sub_group_size": max(job["hidden"] ** 2, job["parameters"] // 6),
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": job["nvme_path"],
                "pipeline_read": True,
                "pipeline_write": True,
                # A pipeline holds three, each with parameter, gradient and two moments.
                "buffer_count": 12,
            },
        },
        # fio and ours have the same.
        "aio": {
            "block_size": job["aio"]["block_size"],
            "queue_depth": job["aio"]["queue_depth"],
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        },
    }


def make_engine(job: dict[str, Any]) -> Any:
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    with deepspeed.zero.Init(config_dict_or_path=settings(job), dtype=torch.bfloat16):
        model = Model(job["hidden"], job["layers"])
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=settings(job)
    )
    return engine


def burst(engine: Any, x: torch.Tensor, steps: int, whole: bool = False) -> dict[str, Any]:
    """Returns means over ``steps``: of the optimizer's time, and of forward and backward."""
    before, computing, stepping, cpu, moved = file_bytes(), 0.0, 0.0, 0.0, 0
    for _ in range(steps):
        begin, cpu_begin = time.perf_counter(), cpu_seconds()
        engine.backward(engine(x))
        middle, cpu_middle, read = time.perf_counter(), cpu_seconds(), file_bytes()
        engine.step()
        end, cpu_end = time.perf_counter(), cpu_seconds()
        moved += file_bytes() - read
        computing += middle - begin
        stepping += end - middle
        cpu += cpu_end - (cpu_begin if whole else cpu_middle)
    total = file_bytes() - before
    return {
        "seconds": ((computing if whole else 0.0) + stepping) / steps,
        "compute_seconds": computing / steps,
        "step_seconds": stepping / steps,
        "cpu_seconds": cpu / steps,
        "bytes_per_step": (total if whole else moved) / steps,
        "peak": peak_memory(),
    }


def file_bytes() -> int:
    """Returns the bytes that this process has read and written, at the block layer."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = dict(line.split(": ") for line in lines)
    return int(counts["read_bytes"]) + int(counts["write_bytes"])


if __name__ == "__main__":
    main()
