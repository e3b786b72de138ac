"""Updates while backward goes on, with activation checkpointing.

Checkpointing runs parts of forward again in backward, and those read parameters. The right
values are torch.optim.AdamW's."""

import copy
import gc
from itertools import product

import pytest
import torch
from optim_support import SMALL
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_ext import OffloadedAdamW

STEPS = 3


class Net(nn.Module):
    """Layers, each a segment; ``shared`` is a layer of several segments and of none."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.head = self.layers[0] if tied else nn.Linear(64, 64)

    def forward(self, x, segment):
        for layer in self.layers:
            x = segment(lambda h, layer=layer: torch.tanh(layer(h)), x)
        return self.head(x).square().mean()


def segments(reentrant):
    return lambda function, x: checkpoint(function, x, use_reentrant=reentrant)


def whole(function, x):
    """All layers in one segment each of which is one, too."""
    return checkpoint(
        lambda h: checkpoint(function, h, use_reentrant=True), x, use_reentrant=True
    )


class OwnSegment(torch.autograd.Function):
    """Reentrant, and nobody would know it by its name."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 64, generator=generator).requires_grad_()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def updating(model, nvme_dir):
    return OffloadedAdamW(
        model.parameters(),
        lr=1e-2,
        nvme_path=nvme_dir,
        host_memory=SMALL,
        overlap_backward="update",
    )


def train(model, optimizer, segment, steps=STEPS, seen=None):
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step), segment).backward()
        if seen is not None:
            seen.append(sum(type(p) is nn.Parameter for p in model.parameters()))
        optimizer.step()


def same(ours, theirs):
    return all(
        torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("kind", "tied"),
    [
        *product(["none", "not reentrant", "reentrant", "nested"], [False, True]),
        ("own", False),  # Tied it is refused: see below.
    ],
)
def test_every_checkpointing_of_layers_equals_adamw(nvme_dir, kind, tied):
    segment = {
        "none": lambda function, x: function(x),
        "not reentrant": segments(False),
        "reentrant": segments(True),
        "nested": whole,
        "own": OwnSegment.apply,
    }[kind]
    ours, theirs = Net(tied), Net(tied)
    optimizer = updating(ours, nvme_dir)
    left = []
    train(ours, optimizer, segment, seen=left)
    train(theirs, adamw(theirs), segment)
    assert same(ours, theirs)
    assert {entry["step"] for entry in optimizer.state.values()} == {STEPS}
    # Whether all were updated before step().
    if kind in ("none", "not reentrant"):
        assert left == [0] * STEPS
    elif kind != "own":
        assert left == [len(list(ours.parameters()))] * STEPS


def test_a_reentrant_segment_is_noticed_though_nothing_outside_of_it_is_trained(nvme_dir):
    """Its backward pass is then the first that a gradient comes in."""
    ours = nn.Linear(64, 64)
    theirs = copy.deepcopy(ours)
    optimizer = updating(ours, nvme_dir)

    def train_one(layer, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            x = batch(step)
            for _ in range(3):
                x = OwnSegment.apply(lambda h: torch.tanh(layer(h)), x)
            x.square().mean().backward()
            optimizer.step()

    train_one(ours, optimizer)
    train_one(theirs, adamw(theirs))
    assert same(ours, theirs)


def test_what_costs_overlap_is_logged_once_with_the_remedy(nvme_dir, caplog):
    model = Net()
    train(model, updating(model, nvme_dir), segments(True))
    assert caplog.text.count("use_reentrant=False") == 1


def stop_gradient(weight):
    """Reads a weight without a gradient for it, as in distillation."""
    return lambda h: torch.tanh(h @ weight.detach())


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.w = nn.Parameter(torch.randn(64, 64) / 8)
        self.v = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x, segment):
        h = segment(stop_gradient(self.w), x @ self.v)
        return (h @ self.w).square().mean()


def test_a_reentrant_segment_that_reads_a_weight_without_its_gradient_equals_adamw(nvme_dir):
    ours, theirs = Detached(), Detached()
    train(ours, updating(ours, nvme_dir), segments(True))
    train(theirs, adamw(theirs), segments(True))
    assert same(ours, theirs)


@pytest.mark.parametrize("own", [False, True])
def test_a_segment_that_would_read_a_weight_while_it_is_updated_is_refused(nvme_dir, own):
    model = Detached()
    optimizer = updating(model, nvme_dir)
    with pytest.raises(RuntimeError, match=r'checkpointing.*overlap_backward="prefetch"'):
        train(model, optimizer, OwnSegment.apply if own else segments(False))
    # The way out.
    optimizer.step()
    assert type(model.w) is nn.Parameter


def test_gradients_in_parts_that_nobody_foresees_are_refused(nvme_dir):
    model = Net(tied=True)
    with pytest.raises(RuntimeError, match=r'checkpointing.*overlap_backward="prefetch"'):
        train(model, updating(model, nvme_dir), OwnSegment.apply)


USES = {
    "matmul": lambda p: batch(0) @ p,
    "linear": lambda p: nn.functional.linear(batch(0), p),
    "detach": lambda p: p.detach(),
    "data": lambda p: p.data,
    "item": lambda p: p[0, 0].item(),
    "in place": lambda p: p.requires_grad_(False).add_(1),
    "state_dict": lambda p: nn.ParameterList([p]).state_dict(),
    "copy": copy.deepcopy,
    "numpy": lambda p: p.numpy(),
    "data_ptr": lambda p: p.data_ptr(),
    "stack": lambda p: torch.stack([p, p]),
    "set data": lambda p: setattr(p, "data", torch.zeros(64, 64)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("plain", [False, True])
def test_a_parameter_that_is_being_updated_cannot_be_used(nvme_dir, use, plain):
    p = torch.ones(64, 64)
    p = p.requires_grad_() if plain else nn.Parameter(p)
    optimizer = OffloadedAdamW([p], nvme_path=nvme_dir, overlap_backward="update")
    for _ in range(2):
        (batch(0) @ p).sum().backward()
        with pytest.raises(RuntimeError, match=r"half updated. Use it after step\(\)"):
            use(p)
        # Neither its shape nor its gradient is.
        assert (p.shape, p.numel(), p.dtype) == ((64, 64), 4096, torch.float32)
        assert p.grad is not None
        assert p.is_leaf
        assert isinstance(p, nn.Parameter) != plain
        p.requires_grad_()
        optimizer.step()
        assert type(p) is (torch.Tensor if plain else nn.Parameter)
        optimizer.zero_grad()


@pytest.mark.parametrize("end", ["close", "drop", "load"])
def test_parameters_can_be_used_when_a_step_was_given_up(nvme_dir, end):
    model = Net()
    optimizer = updating(model, nvme_dir)
    state = optimizer.state_dict()
    model(batch(0), segments(False)).backward()
    assert all(type(p) is not nn.Parameter for p in model.parameters())
    if end == "close":
        optimizer.close()
    elif end == "load":
        optimizer.load_state_dict(state)
    del optimizer
    gc.collect()
    assert all(type(p) is nn.Parameter for p in model.parameters())
    model(batch(0), segments(False))
