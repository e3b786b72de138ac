"""One rank, which steps an optimizer together with others. ranks.py starts it.

The job comes as JSON in the only argument. Rank 0 prints a JSON list: the mean seconds of a
step in each round, for each rank.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist

from torch_ext import OffloadedAdamW


def main() -> None:
    job = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    parameter = torch.nn.Parameter(torch.empty(job["parameters"]).normal_())
    parameter.grad = torch.empty_like(parameter).normal_()
    with OffloadedAdamW(
        [parameter],
        nvme_path=job["nvme_path"],
        host_memory=job["host_memory"],
        aio=job["aio"],
        engine=job["engine"],
    ) as optimizer:
        together(optimizer)  # This makes the state, and writes it for the first time.
        together(optimizer)
        seconds = [
            sum(together(optimizer) for _ in range(job["burst"])) / job["burst"]
            for _ in range(job["rounds"])
        ]
        dist.barrier()
    of_all: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_all, seconds)
    if dist.get_rank() == 0:
        print(json.dumps(of_all), flush=True)
    dist.destroy_process_group()
    # A thread of gloo may still drop a tensor. If Python is being taken down at that moment,
    # that ends in std::terminate() (torch 2.11).
    os._exit(0)


def together(optimizer: OffloadedAdamW) -> float:
    """Makes a step that all ranks begin at once. Returns the seconds of this rank's."""
    dist.barrier()
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
