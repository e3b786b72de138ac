"""Does forward, backward and step when told to. iteration.py starts it.

The protocol is that of optimizer_worker.py. "kind" is "compute" for forward and backward alone,
and "offloaded" for all three.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from iteration_model import Model, random_rows
from optimizer_worker import (
    import_what_a_step_imports,
    make_offloaded,
    peak_memory,
    serve,
    tell,
)


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Model(job["hidden"], job["layers"]).to(job["device"])
    torch.set_default_dtype(torch.float32)
    import_what_a_step_imports()
    first_peak = peak_memory()
    x = random_rows(job).to(job["device"])
    if job["kind"] == "compute":
        tell(peak=first_peak)
        serve(lambda: compute(model, x), dict)
        return
    optimizer = make_offloaded(list(model.parameters()), job)
    tell(peak=first_peak, host_memory=optimizer.plan().host_memory)

    def iterate() -> None:
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    serve(iterate, optimizer.stats)


def compute(model: Any, x: torch.Tensor) -> None:
    model(x).backward()
    model.zero_grad()


if __name__ == "__main__":
    main()
