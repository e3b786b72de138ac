"""A model trained twice: with OffloadedOptimizer around a class and with the class itself."""

import torch
from optim_support import SMALL, equal, set_gradients, twins

from torch_ext import OffloadedOptimizer


class Lion(torch.optim.Optimizer):
    """As a user writes it; the state is made anew in each step, not changed in place."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                average = state["exp_avg"]
                update = (average * beta1 + p.grad * (1 - beta1)).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                state["exp_avg"] = average * beta2 + p.grad * (1 - beta2)


class Normalized(torch.optim.SGD):
    """Divides gradients by the norm of all: what a piece cannot know."""

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        gradients = [g for g in gradients if g is not None]
        if not gradients:
            return super().step(closure)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for gradient in gradients:
            gradient.div_(norm)
        return super().step(closure)


def equal_states(ours, theirs):
    """Whether two state dicts hold the same, bit for bit."""
    a, b = ours["state"], theirs["state"]
    return a.keys() == b.keys() and all(
        list(a[key]) == list(b[key]) and all(_same(a[key][n], b[key][n]) for n in a[key])
        for key in a
    )


def _without_empty(state_dict):
    """A class makes an empty entry where it only looks whether there is a state."""
    return {**state_dict, "state": {k: v for k, v in state_dict["state"].items() if v}}


def _same(a, b):
    if not isinstance(a, torch.Tensor):
        return type(a) is type(b) and a == b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


class GenericPair:
    """Both optimizers over equal parameters, or groups of them."""

    def __init__(self, cls, groups, nvme_path, host_memory=SMALL, offload=None, **options):
        if isinstance(groups[0], torch.Tensor):
            groups = [{"params": groups}]
        self.ours = [p for group in groups for p in group["params"]]
        self.theirs = twins(self.ours)
        rest = iter(self.theirs)
        other = [{**group, "params": [next(rest) for _ in group["params"]]} for group in groups]
        self.a = OffloadedOptimizer(
            cls,
            groups,
            nvme_path=nvme_path,
            host_memory=host_memory,
            **(offload or {}),
            **options,
        )
        self.b = cls(other, **options)

    def step(self, seed, which=None):
        which = range(len(self.ours)) if which is None else which
        for p in (*self.ours, *self.theirs):
            p.grad = None
        set_gradients([self.ours[i] for i in which], [self.theirs[i] for i in which], seed=seed)
        self.a.step()
        self.b.step()

    def steps(self, count, first=0):
        for seed in range(first, first + count):
            self.step(seed)

    def equal(self):
        return equal(self.ours, self.theirs)

    def equal_in_all(self):
        """Parameters, gradients, states and groups."""
        groups = [[{**g, "params": 0} for g in o.param_groups] for o in (self.a, self.b)]
        gradients = [
            [p.grad for p in ps if p.grad is not None] for ps in (self.ours, self.theirs)
        ]
        return (
            self.equal()
            and len(gradients[0]) == len(gradients[1])
            and equal(*gradients)
            and equal_states(self.a.state_dict(), _without_empty(self.b.state_dict()))
            and [list(g) for g in groups[0]] == [list(g) for g in groups[1]]
            and all(_same(a[k], b[k]) for a, b in zip(*groups, strict=True) for k in a)
        )
