"""What wraps an optimizer of torch, or writes to its state, around ours and around torch's."""

import copy

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from optim_support import SMALL, equal, parameters, twins
from ranks import Ranks
from torch.distributed.optim import ZeroRedundancyOptimizer

from torch_ext import OffloadedAdamW, OffloadedOptimizer


def adamw(params, nvme_dir, **options):
    return OffloadedAdamW(params, nvme_path=nvme_dir, host_memory=SMALL, **options)


def generic(params, nvme_dir, **options):
    return OffloadedOptimizer(
        torch.optim.AdamW,
        params,
        nvme_path=nvme_dir,
        host_memory=SMALL,
        fused=True,
        **options,
    )


def in_memory(params, nvme_dir, **options):
    return torch.optim.AdamW(params, fused=True, **options)


class Lookahead:
    """As many have written it: slow weights in the state of the optimizer inside."""

    def __init__(self, base, k=3, alpha=0.5):
        self.base, self.k, self.alpha = base, k, alpha
        self.param_groups, self.defaults = base.param_groups, base.defaults
        self.state = base.state
        for group in self.param_groups:
            group["lookahead_step"] = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.base.step(closure)
        for group in self.param_groups:
            group["lookahead_step"] += 1
            if group["lookahead_step"] % self.k:
                continue
            for fast in group["params"]:
                state = self.state[fast]
                if "slow_buffer" not in state:
                    state["slow_buffer"] = torch.empty_like(fast)
                    state["slow_buffer"].copy_(fast)
                slow = state["slow_buffer"]
                slow.add_(fast - slow, alpha=self.alpha)
                fast.copy_(slow)
        return loss

    def zero_grad(self):
        self.base.zero_grad()

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state_dict):
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups
        self.state = self.base.state


def run(optimizer, params, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        sum((p * torch.randn(p.shape, generator=generator)).sum() for p in params).backward()
        optimizer.step()


@pytest.mark.parametrize("make", [adamw, generic])
def test_lookahead_keeps_its_slow_weights_in_our_state(nvme_dir, make):
    ours = parameters(9000, 17)
    theirs = twins(ours)
    a = Lookahead(make(ours, nvme_dir, lr=1e-2))
    b = Lookahead(in_memory(theirs, nvme_dir, lr=1e-2))
    run(a, ours, range(7))
    run(b, theirs, range(7))
    assert equal(ours, theirs)
    rest = twins(ours)
    c = Lookahead(make(rest, nvme_dir, lr=1e-2))
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    run(c, rest, range(7, 14))
    run(b, theirs, range(7, 14))
    assert equal(rest, theirs)
    for lookahead in (a, c):
        lookahead.base.close()


def zero_redundancy(make, nvme_dir):
    """Trains, moves the state to other optimizers, goes on."""
    params = parameters(9000, 17, 300, 5)
    first = ZeroRedundancyOptimizer(params, make, lr=1e-2, nvme_dir=nvme_dir)
    run(first, params, range(3))
    for group in first.param_groups:
        group["lr"] = 5e-3
    run(first, params, range(3, 5))
    first.consolidate_state_dict(to=0)
    state = [None]
    if torch.distributed.get_rank() == 0:
        state = [first.state_dict()]
    torch.distributed.broadcast_object_list(state, src=0)
    second = ZeroRedundancyOptimizer(params, make, lr=1.0, nvme_dir=nvme_dir)
    second.load_state_dict(state[0])
    run(second, params, range(5, 8))
    found = [p.detach() for p in params]
    for optimizer in (first.optim, second.optim):
        if hasattr(optimizer, "close"):
            optimizer.close()
    return [p.tolist() for p in found]


def test_zero_redundancy_optimizer_is_as_with_torchs(nvme_dir):
    ranks = Ranks(2)
    try:
        theirs = ranks.run(zero_redundancy, in_memory, nvme_dir)
        for make in (adamw, generic):
            ours = ranks.run(zero_redundancy, make, nvme_dir)
            assert ours == theirs
            assert ours[0] == ours[1]
    finally:
        ranks.close()


@pytest.mark.parametrize("make", [adamw, generic])
def test_averaged_models_schedules_and_scalers_go_beside_resets(nvme_dir, make):
    def train(make):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 30), torch.nn.Linear(30, 8))
        optimizer = make(model.parameters(), nvme_dir, lr=1e-2)
        average = torch.optim.swa_utils.AveragedModel(model)
        schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=1e-3, anneal_epochs=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            optimizer.zero_grad()
            x = torch.randn(4, 8, generator=generator)
            scaler.scale(model(x).square().mean()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            average.update_parameters(model)
            if seed == 3:
                optimizer.state.clear()
        return [*model.parameters(), *average.parameters()]

    assert equal(train(make), train(in_memory))


@pytest.mark.parametrize("make", [adamw, generic])
def test_distributed_checkpoints_carry_what_was_written_to_the_state(nvme_dir, make):
    def train(make):
        torch.manual_seed(0)
        source, target = (torch.nn.Linear(30, 20) for _ in range(2))
        a, b = (make(m.parameters(), nvme_dir, lr=1e-2) for m in (source, target))
        run(a, list(source.parameters()), range(3))
        del a.state[source.weight]
        a.state[source.bias]["exp_avg"].fill_(0.5)
        a.zero_grad()
        a.step()
        run(a, list(source.parameters()), range(3, 4))
        a.state[source.weight]["exp_avg_sq"] *= 2
        a.zero_grad()
        options = dcp.StateDictOptions(full_state_dict=True)
        state = dcp.get_optimizer_state_dict(source, a, options=options)
        dcp.set_optimizer_state_dict(target, b, state, options=options)
        target.load_state_dict(source.state_dict())
        run(b, list(target.parameters()), range(4, 6))
        return list(target.parameters())

    assert equal(train(make), train(in_memory))
