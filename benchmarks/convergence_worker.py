"""Trains the demo's GPT with one seed, once with each optimizer. convergence.py starts it.

The job comes as JSON in the only argument. The losses go out as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from common import ROOT
from optimizer_worker import in_memory
from torch import nn

from torch_ext import OffloadedAdamW

sys.path.insert(0, str(ROOT / "examples"))

from gpt_training import (  # noqa: E402
    GPT,
    Batches,
    Job,
    LinearIn32Bits,
    learning_rate,
    loss_of,
    read_text,
)

VALIDATION_BATCHES = 16


def main() -> None:
    job = json.loads(sys.argv[1])
    cases = job.pop("cases")
    # Several of these run at once, on few cores.
    torch.set_num_threads(1)
    text = read_text()[0]
    curves = [train(Job(**job), text, *case) for case in cases]
    print(json.dumps(curves))


def train(job: Job, text: bytes, dtype: str, state: str) -> dict[str, Any]:
    """Trains once. ``state`` is "memory", or a format of OffloadedAdamW."""
    torch.manual_seed(job.seed)
    cut = len(text) * 19 // 20
    batches = Batches(text[:cut], job, job.seed)
    validation = Batches(text[cut:], job, 0)
    model = make_model(job, getattr(torch, dtype))
    parameters = list(model.parameters())
    step, close = make_step(job, parameters, state)
    losses = []
    for number in range(job.steps):
        model.zero_grad()
        loss = loss_of(model, batches.next())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        step(job.lr * learning_rate(number, job.steps))
        losses.append(loss.item())
    close()
    with torch.no_grad():
        held_out = [loss_of(model, validation.next()).item() for _ in range(VALIDATION_BATCHES)]
    return {"losses": losses, "validation_loss": sum(held_out) / len(held_out)}


def make_model(job: Job, dtype: torch.dtype) -> nn.Module:
    """Makes a model. For each dtype it has the same values, but for their rounding."""
    linear = nn.Linear if dtype == torch.float32 else LinearIn32Bits
    model = GPT(job.layers, job.width, job.heads, job.context, linear).to(dtype)
    if dtype != torch.float32:
        # A loss in bfloat16 would be rounded to a hundredth.
        model.head.register_forward_hook(lambda module, inputs, output: output.float())
    return model


def make_step(
    job: Job, parameters: list[nn.Parameter], state: str
) -> tuple[Callable[[float], None], Callable[[], None]]:
    """Returns a function that makes a step with a learning rate, and one that ends all."""
    arguments = {"lr": job.lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if state == "memory":
        return in_memory(parameters, **arguments), lambda: None
    optimizer = OffloadedAdamW(
        parameters,
        **arguments,
        nvme_path=job.nvme_path,
        host_memory=job.host_memory,
        state_format=state,
        seed=job.seed,
    )

    def step(lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

    return step, optimizer.close


if __name__ == "__main__":
    main()
