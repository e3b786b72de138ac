"""One training run of a small GPT on Python source text, in a process of its own.

`train_gpt.py` starts this file for each run, which so has a peak of memory of its own. The job
comes as JSON in the only argument. Each line of output is one JSON object: "started", a "step"
for every step, then "result" or "error". A run that commits also says "goes on" with the step
after which it begins, and "commit" for each commit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# This comes before CUDA starts. Only then are its matrix products the same in every run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from torch_ext import OffloadedAdamW

VOCABULARY = 256  # Bytes.
WARMUP_STEPS = 10
VALIDATION_BATCHES = 4
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "encodings"}


@dataclass
class Job:
    """What a run does. The first two differ in ``offloaded`` only."""

    offloaded: bool
    nvme_path: str
    host_memory: int
    device: str
    steps: int
    layers: int
    width: int
    heads: int
    batch: int
    context: int
    lr: float
    seed: int
    overlap_backward: str = ""  # "update": nothing is clipped, in neither run.
    commit_every: int = 0  # Steps; 0: nothing outlives the process.
    last_step: int = 0  # The run ends after it; 0: after all.
    killed_in: int = 0  # The step in the midst of which the process is killed.


def read_text() -> tuple[bytes, dict[str, Any]]:
    """Returns the source of this Python's standard library, and what it was read from.

    Tests, installed packages and the tables of `encodings` are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        file for file in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(file.parts[:-1])
    )
    text = b"".join(file.read_bytes() for file in files)
    return text, {
        "directory": str(root),
        "files": len(files),
        "bytes": len(text),
        "sha256": hashlib.sha256(text).hexdigest(),
    }


class ProductIn32Bits(torch.autograd.Function):
    """The product of a Linear in float32. Only one layer's copies exist at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight = ctx.saved_tensors
        rows = gradients[0].flatten(0, -2).float()
        of_x = (rows @ weight.float()).view(x.shape).to(x.dtype)
        of_weight = (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype)
        return of_x, of_weight, rows.sum(0).to(weight.dtype)


class LinearIn32Bits(nn.Linear):
    """A Linear for bfloat16 parameters.

    Their products take minutes on CPUs that have no instructions for them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ProductIn32Bits.apply(x, self.weight, self.bias)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = linear(width, 3 * width)
        self.projection = linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time_, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, time_, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, time_, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """A decoder-only transformer over bytes."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        context: int,
        linear: type[nn.Linear] = nn.Linear,
    ) -> None:
        super().__init__()
        self.context = context
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, linear) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, VOCABULARY)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_block = name.endswith(("projection.weight", "down.weight"))
                scale = math.sqrt(2 * layers) if ends_block else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Batches:
    """Random windows of a text; the seed decides which."""

    def __init__(self, text: bytes, job: Job, seed: int) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.shape = (job.batch, job.context)
        self.device = job.device
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch, context = self.shape
        last = len(self.text) - context
        starts = torch.randint(last, (batch,), generator=self.generator).tolist()
        windows = torch.stack([self.text[s : s + context + 1] for s in starts])
        windows = windows.to(self.device, torch.long)
        return windows[:, :-1], windows[:, 1:]


def make_optimizer(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    """Makes an AdamW with weight decay for the matrices only. State is where the job says.

    If a killed run has committed, this goes on from there.
    """
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    arguments = {"lr": job.lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if not job.offloaded:
        return torch.optim.AdamW(groups, **arguments, fused=True)
    of_run = {
        "host_memory": job.host_memory,
        "overlap_backward": job.overlap_backward or False,
    }
    if job.commit_every:
        try:
            return OffloadedAdamW.resume(job.nvme_path, groups, **of_run)
        except FileNotFoundError:
            pass  # Nothing was committed yet.
    return OffloadedAdamW(groups, **arguments, nvme_path=job.nvme_path, **of_run)


def resume(
    optimizer: OffloadedAdamW,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    batches: Batches,
) -> int:
    """Brings what else decides a step to where the commit was made. Returns its step."""
    if optimizer.committed_step is None:
        return 0
    scheduler.load_state_dict(optimizer.committed_extra["scheduler"])
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    batches.generator.set_state(optimizer.committed_extra["batches"])
    return optimizer.committed_step


def learning_rate(step: int, steps: int) -> float:
    """Returns the factor of the learning rate: a warm-up, then half a cosine down to 0.1."""
    warmup = min(WARMUP_STEPS, steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return 0.55 + 0.45 * math.cos(math.pi * done)


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


@torch.no_grad()
def sample(model: GPT, prompt: bytes, length: int, job: Job) -> str:
    """Returns the text with which the model continues ``prompt``, byte by byte."""
    generator = torch.Generator().manual_seed(job.seed)
    tokens = list(prompt)
    for _ in range(length):
        window = torch.tensor([tokens[-min(model.context, 64) :]], device=job.device)
        chances = torch.softmax(model(window)[0, -1].double().cpu() / 0.7, 0)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
    return bytes(tokens).decode(errors="replace")


def digest(parameter: torch.Tensor) -> str:
    """Returns a digest that is equal for two parameters if and only if their bits are."""
    return hashlib.sha256(
        parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def memory(field: str) -> int:
    """Returns the bytes of this process: VmRSS (now) or VmHWM (its peak)."""
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) * 1024
        for line in status.splitlines()
        if line.startswith(f"{field}:")
    )


def synchronize(device: str) -> None:
    """Waits for the device, so that a clock read next to it means something."""
    if not device.startswith("cpu"):
        torch.accelerator.synchronize()


class Recorder:
    """What the run's result says about each step, and about its I/O."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.lanes: list[list[tuple[str, int, float, float]]] = []
        self.gradient: float | None = None  # When this step's first one came.

    def on_gradient(self, parameter: torch.Tensor) -> None:
        if self.gradient is None:
            self.gradient = time.perf_counter()

    def add_lanes(self, optimizer: torch.optim.Optimizer) -> None:
        """Adds the lanes of the last step. Called late, when its last writes have ended."""
        if not isinstance(optimizer, OffloadedAdamW) or not self.steps:
            return
        begin = self.steps[-1]["lanes_start"]
        self.lanes.append(
            [
                (lane, tile, begin + start, begin + end)
                for lane, tile, start, end in optimizer.timeline()
            ]
        )


def kill_soon(recorder: Recorder) -> None:
    """Kills this process when about half of an optimizer's step has passed."""
    last = recorder.steps[-1] if recorder.steps else {"optimizer_start": 0.0, "end": 0.0}
    half = (last["end"] - last["optimizer_start"]) / 2
    threading.Timer(half, os.kill, (os.getpid(), signal.SIGKILL)).start()


def train(job: Job) -> dict[str, Any]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # It is slow.
    torch.manual_seed(job.seed)
    text, source = read_text()
    if len(text) < 20 * (job.context + 1):
        raise ValueError(f"{source['directory']} holds {len(text)} bytes of Python: too few")
    cut = len(text) * 19 // 20
    batches = Batches(text[:cut], job, job.seed)
    validation = Batches(text[cut:], job, job.seed + 1)
    model = GPT(job.layers, job.width, job.heads, job.context).to(job.device)
    recorder = Recorder()
    overlaps = job.overlap_backward == "update"
    if overlaps and job.offloaded:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(recorder.on_gradient)
    optimizer = make_optimizer(model, job)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, job.steps)
    )
    parameters = sum(p.numel() for p in model.parameters())
    tell("started", parameters_count=parameters, text=source)

    first = 0
    if job.commit_every:
        first = resume(optimizer, scheduler, batches)
        tell("goes on", after=first)
    memory_before = memory("VmRSS")
    begin = time.perf_counter()
    for number in range(first + 1, (job.last_step or job.steps) + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(model, batches.next())
        if overlaps:  # The next step begins in backward.
            recorder.add_lanes(optimizer)
        loss.backward()
        if not overlaps:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            recorder.add_lanes(optimizer)
        synchronize(job.device)
        middle = time.perf_counter()
        if number == job.killed_in:
            kill_soon(recorder)
        optimizer.step()
        if number == job.killed_in:
            signal.pause()  # It was a short one. The kill comes.
        synchronize(job.device)
        end = time.perf_counter()
        scheduler.step()
        step = {
            "loss": loss.item(),
            "start": start - begin,
            "optimizer_start": middle - begin,
            "lanes_start": (recorder.gradient or middle) - begin,
            "end": end - begin,
        }
        recorder.gradient = None
        recorder.steps.append(step)
        tell("step", loss=step["loss"])
        if job.commit_every and number % job.commit_every == 0:
            kept = {
                "scheduler": scheduler.state_dict(),
                "batches": batches.generator.get_state(),
            }
            done = optimizer.commit(number, extra=kept)
            tell("commit", step=number, seconds=done.seconds, bytes=done.bytes_written)
    peak = memory("VmHWM")

    with torch.no_grad():
        losses = [loss_of(model, validation.next()).item() for _ in range(VALIDATION_BATCHES)]
    recorder.add_lanes(optimizer)
    if job.offloaded:
        optimizer.close()  # What is still being written belongs to the figures.
    return {
        "steps": recorder.steps,
        "lanes": recorder.lanes,
        "stats": optimizer.stats() if job.offloaded else None,
        "validation_loss": sum(losses) / len(losses),
        "digests": {name: digest(p) for name, p in model.named_parameters()},
        "memory_before": memory_before,
        "memory_peak": peak,
        "threads": torch.get_num_threads(),
        "sample": sample(model, b"def ", 120, job) if job.offloaded else "",
    }


def tell(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event} | fields), flush=True)


def main() -> int:
    try:
        tell("result", **train(Job(**json.loads(sys.argv[1]))))
    except (ValueError, OSError, RuntimeError) as error:
        tell("error", text=str(error), kind=type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
