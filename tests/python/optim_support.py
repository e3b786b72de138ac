"""A model trained twice: with OffloadedAdamW and with torch's own AdamW."""

import copy

import torch

from torch_ext import OffloadedAdamW

# Three buffers of 64 KiB, each for 8192 float32 parameters.
SMALL = "256KiB"


def parameters(*sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def twins(tensors):
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


def set_gradients(*lists, seed, scale=1.0):
    """The same random gradients for the parameters of each list.

    With the parameters' strides, as autograd makes them: torch's kernel goes by
    the order in memory.
    """
    generator = torch.Generator().manual_seed(seed)
    for same in zip(*lists, strict=True):
        gradient = torch.randn(same[0].shape, generator=generator) * scale
        for p in same:
            p.grad = torch.empty_like(p).copy_(gradient)


def equal(ours, theirs):
    return all(
        a.dtype == b.dtype and torch.equal(a.detach().cpu(), b.detach().cpu())
        for a, b in zip(ours, theirs, strict=True)
    )


def equal_states(ours, theirs):
    """Whether two state dicts hold the same, bit for bit."""
    a, b = ours["state"], theirs["state"]
    return a.keys() == b.keys() and all(
        torch.equal(a[key][name], b[key][name])
        for key in a
        for name in ("step", "exp_avg", "exp_avg_sq")
    )


def split_master(master):
    """A float32 master as bfloat16, to nearest and ties away from zero, and its low 16 bits."""
    bits = master.detach().view(torch.int32)
    rounded = ((bits & 0x7FFFFFFF) + 0x8000 >> 16) | (bits >> 16 & 0x8000)
    return rounded.to(torch.int16).view(torch.bfloat16), bits & 0xFFFF


def join_master(half, low):
    """The master that split_master() took apart; where it cannot have, the half itself."""
    bits = half.detach().view(torch.int16).to(torch.int32) & 0xFFFF
    joined = ((bits - (low >> 15)) << 16) | low
    magnitude = bits & 0x7FFF
    impossible = (magnitude == 0) & (low >= 0x8000)
    impossible |= (magnitude == 0x7F80) & (low > 0) & (low < 0x8000)
    return torch.where(impossible, bits << 16, joined).view(torch.float32)


class HalfReference:
    """AdamW(fused=True) on float32 masters, which are rounded to the parameters.

    The parameters have the last word: what they lack of their masters is kept,
    for bfloat16; a float16 parameter that its master does not round to replaces it.
    """

    def __init__(self, halves, **options):
        self.halves = halves
        self.masters = [h.detach().float().requires_grad_() for h in halves]
        self.lows = [torch.zeros(h.shape, dtype=torch.int32) for h in halves]
        self.optimizer = torch.optim.AdamW(self.masters, fused=True, **options)

    def refresh(self):
        for half, master, low in zip(self.halves, self.masters, self.lows, strict=True):
            if half.dtype == torch.bfloat16:
                master.data.copy_(join_master(half, low))
            else:
                differs = half != master.detach().to(half.dtype)
                master.data[differs] = half.detach()[differs].float()

    def step(self, gradients):
        self.refresh()
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.float()
        self.optimizer.step()
        for i, (half, master) in enumerate(zip(self.halves, self.masters, strict=True)):
            if half.dtype == torch.bfloat16:
                rounded, self.lows[i] = split_master(master)
                half.data.copy_(rounded)
            else:
                half.data.copy_(master)


class Pair:
    """Both optimizers over equal parameters, or groups of them."""

    def __init__(self, groups, nvme_path, host_memory=SMALL, **options):
        own = ("aio", "engine", "verify", "state_dict_mode")
        offload = {k: options.pop(k) for k in own if k in options}
        if isinstance(groups[0], torch.Tensor):
            groups = [{"params": groups}]
        self.ours = [p for group in groups for p in group["params"]]
        self.theirs = twins(self.ours)
        rest = iter(self.theirs)
        other = [
            {**copy.copy(group), "params": [next(rest) for _ in group["params"]]}
            for group in groups
        ]
        self.a = OffloadedAdamW(
            groups, nvme_path=nvme_path, host_memory=host_memory, **options, **offload
        )
        self.b = torch.optim.AdamW(other, fused=True, **options)

    def step(self, seed, which=None, scale=1.0):
        which = range(len(self.ours)) if which is None else which
        for p in (*self.ours, *self.theirs):
            p.grad = None
        ours = [self.ours[i] for i in which]
        theirs = [self.theirs[i] for i in which]
        set_gradients(ours, theirs, seed=seed, scale=scale)
        self.a.step()
        self.b.step()

    def steps(self, count, first=0):
        for seed in range(first, first + count):
            self.step(seed)

    def equal(self):
        return equal(self.ours, self.theirs)
