"""One run of `demo_large.py`, in a process whose memory is limited.

The job comes as JSON in the only argument. Each line of output is one JSON object: a "stage"
before each thing that takes memory, a "step" for every step, then "result" or "error".
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from gpt_training import GPT, Batches, Job, LinearIn32Bits, memory, read_text, tell

from torch_ext import OffloadedAdamW

#: How many steps it takes until the learning rate is as asked for. The first steps of Adam move
#: each weight by the whole rate, whatever the gradient. With 40 blocks the loss would rise.
WARM_UP = 10


def make_model(job: Job) -> GPT:
    """Makes the model in bfloat16 from the start: no float32 copy of it ever exists."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return GPT(job.layers, job.width, job.heads, job.context, LinearIn32Bits)
    finally:
        torch.set_default_dtype(torch.float32)


def in_memory(
    parameters: list[torch.nn.Parameter], lr: float
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """Does what everybody does: float32 masters, and torch's AdamW on them."""
    masters = [torch.nn.Parameter(p.detach().float()) for p in parameters]
    optimizer = torch.optim.AdamW(masters, lr=lr, fused=True)

    @torch.no_grad()
    def step() -> None:
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        for master, parameter in zip(masters, parameters, strict=True):
            parameter.copy_(master)

    return optimizer, step


def train(job: Job, offload: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(job.seed)
    tell("stage", text="making the model")
    model = make_model(job)
    parameters = list(model.parameters())
    tell("started", parameters=sum(p.numel() for p in parameters), resident=memory("VmRSS"))
    batches = Batches(read_text()[0], job, job.seed)
    if job.offloaded:
        tell("stage", text="making OffloadedAdamW")
        optimizer = OffloadedAdamW(
            parameters,
            lr=job.lr,
            nvme_path=job.nvme_path,
            host_memory=job.host_memory,
            **offload,
        )
        step = optimizer.step
    else:
        tell("stage", text="making float32 masters")
        optimizer, step = in_memory(parameters, job.lr)
    for number in range(1, job.steps + 1):
        start = time.perf_counter()
        tell("stage", text=f"backward of step {number}")
        # Set before backward, which uses it already with overlap_backward="update".
        for group in optimizer.param_groups:
            group["lr"] = job.lr * min(1.0, number / WARM_UP)
        tokens, targets = batches.next()
        loss = F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())
        loss.backward()
        middle = time.perf_counter()
        tell("stage", text=f"optimizer's step {number}")
        step()
        model.zero_grad()
        end = time.perf_counter()
        tell(
            "step",
            loss=loss.item(),
            backward_seconds=middle - start,
            optimizer_seconds=end - middle,
            peak=memory("VmHWM"),
        )
    result = {"plan": "", "stats": None}
    if job.offloaded:
        result["plan"] = str(optimizer.plan())
        optimizer.close()
        result["stats"] = optimizer.stats()
    return result | {"peak": memory("VmHWM"), "threads": torch.get_num_threads()}


def main() -> int:
    job, offload = json.loads(sys.argv[1])
    try:
        tell("result", **train(Job(**job), offload))
    except (MemoryError, ValueError, TypeError, OSError, RuntimeError) as error:
        tell("error", text=str(error).partition("\n")[0], kind=type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
