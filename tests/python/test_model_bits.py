"""What a program computes with an offloaded model, beside the same program in memory.

Each workload is an ordinary program. It runs with a model in memory and with an equal one
whose parameters are on the drive, in host memory that holds a third of them at most. All that
it returns, and all parameters afterwards, have the same bits.
"""

from __future__ import annotations

import copy
import io
import itertools
import sys
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torch_ext

# A weight has 256 KiB, and each kind of workload more of them than fit.
WIDTH = 256
WORKLOADS = {}


def workload(make, budget="1MiB"):
    def register(run):
        WORKLOADS[run.__name__] = (make, run, budget)
        return run

    return register


def perceptron():
    layers = [(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)) for _ in range(8)]
    return nn.Sequential(*itertools.chain(*layers), nn.Linear(WIDTH, 16))


class Tied(nn.Module):
    """A small language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(300, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.head = nn.Linear(WIDTH, 300, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return self.head(hidden)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 8)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, place = (chosen == i).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def batch(rows=8):
    return torch.randn(rows, WIDTH)


def train(model, optimizer, steps=3, loss_of=None):
    losses = []
    for _ in range(steps):
        loss = (loss_of or (lambda m: m(batch()).square().mean()))(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


@workload(perceptron)
def forward(model):
    return [model(batch())]


@workload(perceptron)
def no_grad_and_inference_mode(model):
    with torch.no_grad():
        first = model(batch())
    with torch.inference_mode():
        return [first, model(batch()).clone()]


@workload(perceptron)
def adamw(model):
    return train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False))


@workload(perceptron, budget="32MiB")
def adamw_foreach_where_all_fit(model):
    return train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True))


@workload(perceptron, budget="32MiB")
def adamw_fused_where_all_fit(model):
    return train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))


@workload(perceptron)
def sgd_with_momentum(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, foreach=False)
    return train(model, optimizer)


@workload(perceptron)
def sgd_in_a_hook(model):
    def update(parameter):
        with torch.no_grad():
            parameter.add_(parameter.grad, alpha=-0.1)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    for _ in range(3):
        model(batch()).square().mean().backward()
    return []


@workload(perceptron, budget="32MiB")
def lbfgs(model):
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    x = batch()

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return [optimizer.step(closure).detach(), optimizer.step(closure).detach()]


@workload(perceptron)
def clipping_and_accumulation(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    norms = []
    for _ in range(2):
        for _ in range(3):
            model(batch()).square().mean().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=False))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@workload(perceptron)
def evaluation_between_steps(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, foreach=False)
    seen = []
    for _ in range(3):
        seen += train(model, optimizer, steps=1)
        model.eval()
        with torch.no_grad():
            seen.append(model(batch()))
        model.train()
    return seen


@workload(perceptron)
def functional_call(model):
    return [torch.func.functional_call(model, dict(model.named_parameters()), (batch(),))]


@workload(perceptron)
def func_grad(model):
    x = batch()

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    found = torch.func.grad(loss)({k: v.detach() for k, v in model.named_parameters()})
    return list(found.values())


@workload(perceptron)
def vmap(model):
    return [torch.vmap(model)(batch())]


@workload(perceptron)
def jvp(model):
    x = batch()
    return list(torch.func.jvp(model, (x,), (x + 1,)))


@workload(perceptron)
def double_backward(model):
    x = batch().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    gradient.square().sum().backward()
    return gradients(model)


@workload(perceptron)
def autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch()).float().square().mean()
    loss.backward()
    return [loss.detach(), *gradients(model)]


@workload(perceptron)
def checkpointing(model):
    def run(x, reentrant):
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x

    for reentrant in (True, False):
        run(batch().requires_grad_(), reentrant).square().mean().backward()
    return gradients(model)


@workload(lambda: nn.MultiheadAttention(WIDTH, 4, batch_first=True), budget="2MiB")
def attention(model):
    q = torch.randn(2, 5, WIDTH)
    out, weights = model(q, q, q)
    out.sum().backward()
    return [out, weights, *gradients(model)]


@workload(
    lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 4, 512, dropout=0.0, batch_first=True), 3
    ),
    budget="4MiB",
)
def transformer_encoder(model):
    x = torch.randn(2, 5, WIDTH)
    slow = model(x)
    slow.sum().backward()
    model.eval()
    with torch.no_grad():
        return [slow, model(x), *gradients(model)]  # The second takes the fast path.


@workload(Tied)
def tied_embedding(model):
    tokens = torch.randint(0, 300, (4, 7))

    def loss(m):
        return functional.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten())

    return train(model, torch.optim.AdamW(model.parameters(), foreach=False), loss_of=loss)


@workload(lambda: nn.Embedding(400, WIDTH, sparse=True))
def sparse_gradients(model):
    optimizer = torch.optim.SparseAdam(model.parameters())
    tokens = torch.tensor([1, 5, 5, 399])
    return train(model, optimizer, loss_of=lambda m: m(tokens).square().sum())


@workload(
    lambda: nn.Sequential(
        nn.Conv1d(64, 256, 5, padding=2), nn.BatchNorm1d(256), nn.Conv1d(256, 64, 5, padding=2)
    )
)
def convolutions(model):
    out = model(torch.randn(3, 64, 20))
    out.sum().backward()
    return [out, *gradients(model)]


@workload(lambda: nn.LSTM(64, 128, num_layers=2, batch_first=True), budget="2MiB")
def lstm(model):
    out, _ = model(torch.randn(2, 6, 64))
    out.sum().backward()
    return [out, *gradients(model)]


@workload(Experts)
def mixture_of_experts(model):
    return train(model, torch.optim.SGD(model.parameters(), lr=1e-2, foreach=False))


@workload(lambda: nn.Sequential(*(LowRank(nn.Linear(WIDTH, WIDTH)) for _ in range(8))))
def low_rank_adapters(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return train(model, torch.optim.AdamW(trained, foreach=False))


@workload(
    lambda: nn.Sequential(
        nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)),
        nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    )
)
def parametrizations(model):
    return train(model, torch.optim.SGD(model.parameters(), lr=1e-3, foreach=False))


@workload(perceptron)
def averaged_model(model):
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, foreach=False)
    for _ in range(2):
        train(model, optimizer, steps=1)
        average.update_parameters(model)
    return [p.detach().clone() for p in average.parameters()]


@workload(perceptron)
def load_state_dict(model):
    changed = {k: v + 1 for k, v in model.state_dict().items()}
    model.load_state_dict(changed)
    return [model(batch()), *(v.clone() for v in model.state_dict().values())]


@workload(perceptron)
def deep_copy(model):
    other = copy.deepcopy(model)
    train(other, torch.optim.SGD(other.parameters(), lr=1e-2))
    return [model(batch()), other(batch())]


@workload(perceptron)
def initialization(model):
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model[0].weight, std=0.1)
    return [model(batch())]


@workload(perceptron)
def casts(model):
    weight = model[0].weight
    return [weight.to(torch.bfloat16), weight.double(), weight.float(), weight.half().float()]


@workload(perceptron)
def reductions_and_indexing(model):
    weight = model[3].weight
    rows = torch.tensor([3, 200, 7])
    with torch.no_grad():
        weight[rows] += 1
        weight[:, 5].mul_(2)
        weight.t()[0].zero_()
        weight.view(-1)[::7].add_(0.5)
        model[0].weight.data.copy_(weight.t())
    return [weight.norm(), weight.sum(0), weight[rows], weight.flatten()[::1000], weight.max()]


@workload(perceptron)
def in_place_of_itself(model):
    weight = model[0].weight
    with torch.no_grad():
        weight.copy_(weight)
        weight.add_(weight.t().clone(), alpha=2).mul_(weight)
    return [weight.clone()]


@workload(perceptron)
def views_made_before(model):
    weight = model[0].weight
    flat, transposed = weight.view(-1), weight.detach().t()
    outer = model(batch())
    with torch.no_grad():
        model[0].weight.mul_(2)
    return [flat[:10].clone(), transposed.sum(), outer.detach()]


@workload(perceptron)
def script_and_trace(model):
    x = batch()
    return [torch.jit.trace(model, x)(x), torch.jit.script(model)(x)]


@workload(perceptron)
def data_parallel_of_one(model):
    # With a device, a simulated one too, it would move the model there.
    module = sys.modules[nn.DataParallel.__module__]
    with mock.patch.object(module, "_get_available_device_type", return_value=None):
        return [nn.DataParallel(model)(batch())]


@workload(perceptron)
def a_thread_beside(model):
    from concurrent.futures import ThreadPoolExecutor

    inputs = [batch() for _ in range(8)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda x: model(x).detach(), inputs))


@workload(perceptron)
def composite_operators_with_a_kernel(model):
    functional.silu(model[0].weight).sum().backward()
    functional.mish(model[3].weight).sum().backward()
    images = model[6].weight.view(1, WIDTH, 16, 16)
    return [*gradients(model), torch.native_channel_shuffle(images, 4)]


class Watches(TorchDispatchMode):
    """Looks at what is zeroed, and leaves out what is initialized."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.normal_.default:
            return args[0]
        if operator is torch.ops.aten.zero_.default:
            self.seen.append(args[0].sum())
        return operator(*args, **(kwargs or {}))


@workload(perceptron)
def modes_that_watch_and_leave_out(model):
    weights = [module.weight.detach() for module in model if isinstance(module, nn.Linear)]
    with Watches() as watches:
        for weight in weights[:4]:
            weight.zero_()
        for weight in weights[4:8]:
            weight.normal_()
    return watches.seen


@workload(perceptron)
def statistics_that_are_parameters(model):
    mean, variance = model[0].weight.detach()[:2]
    variance.abs_()
    for _ in range(3):
        functional.batch_norm(batch(), mean, variance, training=True)
        model(batch())
    return [mean, variance]


@workload(perceptron)
def storage_that_another_tensor_gets(model):
    other = torch.empty(0).set_(model[0].weight.detach())
    model(batch())
    other.mul_(2)
    model(batch())
    return [other.sum(), model(batch())]


def run_seeded(run, model):
    torch.manual_seed(7)
    return [value.detach().clone() for value in run(model)]


def same(a, b):
    return a.dtype == b.dtype and torch.equal(
        a.to_dense() if a.is_sparse else a, b.to_dense() if b.is_sparse else b
    )


def layers_of(model):
    return {type(module) for module in model.modules() if module._parameters}


# torch.jit.script takes no hooks in Python.
WITH_HOLD = [name for name in WORKLOADS if name != "script_and_trace"]
RUNS = [(name, False) for name in WORKLOADS] + [(name, True) for name in WITH_HOLD]


@pytest.mark.parametrize(("name", "held"), RUNS)
def test_it_computes_the_same_bits(name, held, tmp_path):
    make, run, budget = WORKLOADS[name]
    torch.manual_seed(0)
    in_memory = make()
    torch.manual_seed(0)
    model = make()
    hold = layers_of(model) if held else None
    offload = torch_ext.offload(model, tmp_path, host_memory=budget, hold=hold)
    expected = run_seeded(run, in_memory)
    found = run_seeded(run, model)
    assert len(found) == len(expected)
    assert all(map(same, found, expected))
    before = [parameter.detach().clone() for parameter in in_memory.parameters()]
    assert all(map(same, (p.detach() for p in model.parameters()), before))
    stats = offload.stats()
    assert stats["touches"] > 0
    assert stats["host_bytes_peak"] <= torch_ext.parse_size(budget)
    offload.close()
    assert all(map(same, (p.detach() for p in model.parameters()), before))


def test_parameters_round_trip_through_torch_save(tmp_path):
    model = perceptron()
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    torch_ext.offload(model, tmp_path, host_memory="1MiB")
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    loaded = torch.load(saved)
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
