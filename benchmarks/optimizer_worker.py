"""A process that steps one optimizer when told to. optimizer.py starts it.

The job comes as JSON in the only argument. Each line of input is a number of steps. Each line
of output is a JSON object. The first says what is there before any optimizer state, and then
there is one for each line of input.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torch_ext import OffloadedAdamW

LEARNING_RATE = 1e-4
MOVED = ("bytes_read", "bytes_written")


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.manual_seed(0)
    parameters = make_parameters(job)
    import_what_a_step_imports()
    first_peak = peak_memory()
    if job["kind"] == "memory":
        tell(peak=first_peak)
        alone = in_memory(parameters, lr=LEARNING_RATE)
        serve(lambda: alone(LEARNING_RATE), dict)
        return
    optimizer = make_offloaded(parameters, job)
    tell(peak=first_peak, host_memory=optimizer.plan().host_memory)
    serve(optimizer.step, optimizer.stats)


def make_offloaded(parameters: list[torch.nn.Parameter], job: dict[str, Any]) -> OffloadedAdamW:
    """Makes an OffloadedAdamW with a budget in which the job's share of the state stays."""

    def make(host_memory: int) -> OffloadedAdamW:
        given = {name: job[name] for name in ("overlap_backward", "update_on") if job.get(name)}
        return OffloadedAdamW(
            parameters,
            lr=LEARNING_RATE,
            nvme_path=job["nvme_path"],
            host_memory=host_memory,
            aio=job["aio"],
            engine=job["engine"],
            state_format=job["state_format"],
            **given,
        )

    wanted, least = job["resident"], job["least_memory"]
    optimizer = make(least)
    most = optimizer.plan().host_memory_for_all
    # More memory may mean larger tiles, so there is no formula for half of the state.
    for _ in range(10 if wanted else 0):
        budget = most if wanted == 1 else (least + most) // 2
        optimizer.close()
        optimizer = make(budget)
        plan = optimizer.plan()
        missing = wanted * plan.state_bytes - plan.resident_bytes
        if abs(missing) <= plan.state_bytes / 100:
            break
        if missing > 0:
            least, most = budget, max(most, plan.host_memory_for_all)
        else:
            most = budget
    return optimizer


def serve(step: Callable[[], Any], stats: Callable[[], dict[str, Any]]) -> None:
    """Answers each line of input with a burst of steps."""
    settled = settle(stats)
    for line in sys.stdin:
        steps = int(line)
        result = burst(steps, step, stats)
        before, settled = settled, settle(stats)
        # Nothing moves at these two moments, so all bytes of the steps lie between them.
        moved = [(b - a) / (steps + 1) for a, b in zip(before, settled, strict=True)]
        tell(bytes_per_step=sum(moved), **result)


def make_parameters(job: dict[str, Any]) -> list[torch.nn.Parameter]:
    """Makes parameters of about equal sizes, with random values and gradients."""
    how = {"dtype": getattr(torch, job["dtype"]), "device": job.get("device", "cpu")}
    count, tensors = job["parameters"], job["tensors"]
    sizes = [count // tensors] * (tensors - 1)
    sizes.append(count - sum(sizes))
    parameters = []
    for size in sizes:
        parameter = torch.nn.Parameter(torch.empty(size, **how).normal_())
        parameter.grad = torch.empty(size, **how).normal_()
        parameters.append(parameter)
    return parameters


def import_what_a_step_imports() -> None:
    """Imports what the first step would import: 100 MB that no optimizer is to blame for."""
    parameter = torch.nn.Parameter(torch.zeros(64))
    parameter.grad = torch.zeros(64)
    torch.optim.AdamW([parameter], fused=True).step()


def in_memory(
    parameters: list[torch.nn.Parameter], **arguments: Any
) -> Callable[[float], None]:
    """Returns a function that makes a step of torch's own AdamW with a learning rate.

    Below fp32 it has a master copy, as the offloaded one has."""
    exact = parameters[0].dtype == torch.float32
    masters = (
        parameters if exact else [torch.nn.Parameter(p.detach().float()) for p in parameters]
    )
    optimizer = torch.optim.AdamW(masters, **arguments, fused=True)
    if not exact:
        for master in masters:
            master.grad = torch.empty_like(master)

    @torch.no_grad()
    def step(lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        if exact:
            optimizer.step()
            return
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad.copy_(parameter.grad)
        optimizer.step()
        for master, parameter in zip(masters, parameters, strict=True):
            parameter.copy_(master)

    return step


def burst(
    steps: int, step: Callable[[], Any], stats: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Makes one step that is not timed, then ``steps`` that are.

    The first one finds tiles that were read since the last burst. The last one's writes are in
    flight when it returns. So as many bytes are in flight at both ends of what is timed.
    """
    step()
    synchronize()
    before = stats()
    cpu = cpu_seconds()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    seconds = time.perf_counter() - start
    cpu = cpu_seconds() - cpu
    after = stats()
    return {
        "seconds": seconds / steps,
        "cpu_seconds": cpu / steps,
        "moved": {
            name: (after[name] - before[name]) / steps
            for name in after
            if name.endswith("_seconds") or name in MOVED
        },
        "host_bytes_peak": after.get("host_bytes_peak", 0),
        "state_bytes": after.get("state_bytes", 0),
        "resident_bytes": after.get("resident_bytes", 0),
        "peak": peak_memory(),
    }


def synchronize() -> None:
    """Waits for the device, if this process has used one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """Returns the CPU seconds of all threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def settle(stats: Callable[[], dict[str, Any]]) -> list[int]:
    """Waits until nothing has moved for a while, since the disk is another's now.

    Returns how many bytes have been read and written."""
    last: list[int] = []
    while (now := [stats().get(name, 0) for name in MOVED]) != last:
        last = now
        time.sleep(0.25)
    return now


def peak_memory() -> int:
    """Returns VmHWM in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")
    )


def tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main()
