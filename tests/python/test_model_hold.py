"""Blocks whose parameters are kept while they run: ``offload(..., hold=...)``.

test_model_bits.py runs its programs with it too. Here are kernels that take addresses.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_ext

WIDTH = 256  # A weight has 256 KiB.


class ByAddress(torch.autograd.Function):
    """A linear layer that reads its weight through NumPy, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.from_numpy(x.detach().numpy() @ weight.detach().numpy().T)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        before = gradient.numpy() @ weight.detach().numpy()
        return torch.from_numpy(before), gradient.T @ x


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    more: dict


class Block(nn.Module):
    def __init__(self, returns="tensor"):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 16)
        self.returns = returns

    def forward(self, x):
        y = x + ByAddress.apply(self.norm(x), self.weight)
        if self.returns == "dataclass":
            return Output(x, {"hidden": [y]})
        return y


class Stack(nn.Module):
    def __init__(self, returns="tensor", checkpoints=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(returns) for _ in range(6))
        self.checkpoints = checkpoints

    def forward(self, x):
        for block in [*self.blocks, self.blocks[0]]:
            if self.checkpoints is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpoints)
            if isinstance(x, Output):
                x = x.more["hidden"][0]
        return x


def make(*args):
    torch.manual_seed(0)
    return Stack(*args)


def offloaded(tmp_path, *args, hold=Block, host_memory="768KiB"):
    model = make(*args)
    return model, torch_ext.offload(model, tmp_path, host_memory=host_memory, hold=hold)


def batch():
    torch.manual_seed(1)
    return torch.randn(4, WIDTH, requires_grad=True)


def train(model, run=None):
    """Returns what three steps of training compute."""
    found = []
    for _ in range(3):
        x = batch()
        loss = (run or model)(x).square().mean()
        loss.backward()
        found += [loss.detach(), x.grad]
        with torch.no_grad():
            for parameter in model.parameters():
                found.append(parameter.grad.clone())
                parameter.sub_(parameter.grad, alpha=0.01)
                parameter.grad = None
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def assert_nothing_is_kept(model, offload):
    with pytest.raises(RuntimeError, match="is offloaded"):
        model.blocks[2].weight.data_ptr()
    offload.close()
    assert model.blocks[2].weight.data_ptr() != 0
    assert not any(block._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("returns", ["tensor", "dataclass"])
@pytest.mark.parametrize("hold", [Block, "Block", [f"blocks.{i}" for i in range(6)]])
def test_a_kernel_that_takes_addresses_computes_the_same_bits(hold, returns, tmp_path):
    expected = train(make(returns))
    model, offload = offloaded(tmp_path, returns, hold=hold)
    assert_same(train(model), expected)
    assert_nothing_is_kept(model, offload)


def test_a_block_within_another_is_a_part_of_it(tmp_path):
    class Inner(Block):
        pass

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 16)

        def forward(self, x):
            y = ByAddress.apply(x, self.weight)
            return ByAddress.apply(self.inner(y), self.weight)

    def make_nested():
        torch.manual_seed(0)
        return nn.Sequential(*(Outer() for _ in range(4)))

    expected = train(make_nested())
    model = make_nested()
    torch_ext.offload(model, tmp_path, host_memory="1MiB", hold=[Inner, Outer])
    assert_same(train(model), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_bits(reentrant, tmp_path):
    expected = train(make("tensor", reentrant))
    model, offload = offloaded(tmp_path, "tensor", reentrant)
    assert_same(train(model), expected)
    assert_nothing_is_kept(model, offload)


def test_without_hold_such_a_kernel_gets_an_error(tmp_path):
    model, _ = offloaded(tmp_path, hold=None)
    with pytest.raises(RuntimeError, match=r"'blocks\.0\.weight' is offloaded"):
        model(batch())


def test_the_order_is_foreseen(tmp_path):
    model, offload = offloaded(tmp_path)
    for _ in range(8):
        model(batch()).sum().backward()
    stats = offload.stats()
    assert stats["foreseen"] > stats["touches"] / 2


def test_a_forward_pass_without_a_backward_keeps_nothing(tmp_path):
    model, offload = offloaded(tmp_path)
    output = model(batch())
    assert_nothing_is_kept(model, offload)
    output.sum().backward()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_a_block_keeps_nothing(where, tmp_path):
    model, offload = offloaded(tmp_path)
    expected = train(make())

    def fail(*args):
        raise ValueError("on purpose")

    block = model.blocks[3]
    if where == "forward":
        handle = block.norm.register_forward_hook(fail)
    else:
        handle = block.weight.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        model(batch()).sum().backward()
    handle.remove()
    model.zero_grad()
    assert_same(train(model), expected)
    assert_nothing_is_kept(model, offload)


def test_close_after_a_backward_that_failed_in_a_thread_that_ended(tmp_path):
    model, offload = offloaded(tmp_path)
    model.blocks[3].weight.register_hook(lambda gradient: 1 / 0)

    def run():
        with pytest.raises(ZeroDivisionError):
            model(batch()).sum().backward()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    offload.close()


def test_close_within_a_block_is_refused(tmp_path):
    model, offload = offloaded(tmp_path)
    closing = lambda *args: offload.close()  # noqa: E731
    handle = model.blocks[3].norm.register_forward_hook(closing)
    with pytest.raises(RuntimeError, match="parameters are gathered"):
        model(batch())
    handle.remove()
    handle = model.blocks[3].weight.register_hook(closing)
    with pytest.raises(RuntimeError, match="parameters are gathered"):
        model(batch()).sum().backward()
    handle.remove()
    offload.close()


def test_two_threads_use_one_model(tmp_path):
    expected = make()(batch())
    model, _ = offloaded(tmp_path, host_memory="2MiB")
    found = []

    def run():
        for _ in range(4):
            found.append(model(batch()))
            found[-1].sum().backward()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(each, expected) for each in found)


def test_copies_of_the_model_are_plain(tmp_path):
    model, _ = offloaded(tmp_path)
    expected = make()(batch())
    assert torch.equal(copy.deepcopy(model)(batch()), expected)
    saved = io.BytesIO()
    torch.save(copy.deepcopy(model), saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(batch()), expected)


def compiled(model, way, backend):
    torch._dynamo.reset()
    if way == "whole":
        return torch.compile(model, backend=backend)
    for layer in model:
        layer.compile(backend=backend)
    return model


@pytest.mark.parametrize(
    ("way", "backend"),
    [("blocks", "aot_eager"), ("whole", "aot_eager"), ("blocks", "inductor")],
)
def test_torch_compile_computes_the_same_bits(way, backend, tmp_path):
    def perceptron():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(6))
        )

    in_memory = perceptron()
    expected = train(in_memory, compiled(in_memory, way, backend))
    model = perceptron()
    offload = torch_ext.offload(
        model, tmp_path, host_memory="768KiB", hold=[f"{i}" for i in range(6)]
    )
    assert_same(train(model, compiled(model, way, backend)), expected)
    offload.close()


@pytest.mark.parametrize(
    ("hold", "error", "text"),
    [
        ("Blocks", ValueError, "named 'Blocks'"),
        (nn.Conv2d, ValueError, "named 'Conv2d'"),
        (int, TypeError, "must name modules or be classes of modules"),
        ([3], TypeError, r"not 3 \(int\)"),
        ("Stack", ValueError, r"at least 1,572,864.* of 'the model'"),
    ],
)
def test_what_cannot_be_held_is_refused_and_changes_nothing(hold, error, text, tmp_path):
    model = make()
    with pytest.raises(error, match=text):
        torch_ext.offload(model, tmp_path, host_memory="1MiB", hold=hold)
    assert model.blocks[0].weight.data_ptr() != 0
    assert not any(module._forward_hooks for module in model.modules())


def test_torch_jit_script_says_what_to_do(tmp_path):
    model, _ = offloaded(tmp_path)
    with pytest.raises(AttributeError, match="offload it without hold="):
        torch.jit.script(model.blocks[0])
