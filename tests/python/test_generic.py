"""OffloadedOptimizer computes what the class itself computes, bit for bit."""

import pytest
import torch
from generic_support import GenericPair, Lion, equal_states
from optim_support import SMALL, equal, parameters, set_gradients, split_master, twins
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torch_ext import OffloadedOptimizer

SIZES = [1, 17, 64, 65, 1000, 8193, (300, 7), 40_003, 0, ()]

CLASSES = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"foreach": True, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"fused": True, "amsgrad": True}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"amsgrad": True, "maximize": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    (torch.optim.RMSprop, {}),
    (torch.optim.RMSprop, {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    (torch.optim.Adamax, {"weight_decay": 0.1}),
    (torch.optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (torch.optim.RAdam, {}),
    (torch.optim.Adadelta, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.Rprop, {}),
    (Lion, {"weight_decay": 0.1}),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Torch itself rounds the last elements of a thread's share differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cls", "options"), CLASSES, ids=lambda v: getattr(v, "__name__", str(v))
)
@pytest.mark.parametrize("host_memory", [SMALL, "64MiB"])
def test_twelve_steps_are_bit_identical(nvme_dir, cls, options, host_memory):
    pair = GenericPair(cls, parameters(*SIZES), nvme_dir, host_memory, **options)
    pair.steps(12)
    stats = pair.a.stats()
    assert stats["tiles"] > 3 or host_memory != SMALL
    assert (stats["resident_bytes"] == stats["state_bytes"]) == (host_memory != SMALL)
    assert stats["host_bytes_peak"] <= stats["host_memory"]
    assert pair.equal()
    assert equal_states(pair.a.state_dict(), pair.b.state_dict())


def test_groups_and_a_schedule_count_in_every_step(nvme_dir):
    first, second = parameters(*SIZES), parameters(30_003, 3, seed=1)
    pair = GenericPair(
        torch.optim.RMSprop,
        [{"params": first, "lr": 3e-3}, {"params": second, "momentum": 0.5}],
        nvme_dir,
    )
    schedules = [lr_scheduler.LambdaLR(o, lambda t: t / 10) for o in (pair.a, pair.b)]
    for seed in range(20):
        pair.step(seed)
        for schedule in schedules:
            schedule.step()
    assert pair.equal()
    assert equal_states(pair.a.state_dict(), pair.b.state_dict())


def test_a_rate_may_be_a_tensor_that_changes(nvme_dir):
    pair = GenericPair(torch.optim.Adam, parameters(9000), nvme_dir, lr=torch.tensor(0.01))
    for seed in range(4):
        for optimizer in (pair.a, pair.b):
            optimizer.param_groups[0]["lr"].fill_(0.1 / (seed + 1))
        pair.step(seed)
    assert pair.equal()


def test_parameters_without_gradient_stay_as_they_are(nvme_dir):
    pair = GenericPair(torch.optim.NAdam, parameters(*[10_000] * 6), nvme_dir)
    for seed, which in enumerate([[0, 1], [1], [], [4, 1], [0, 1, 2, 3, 4], [2], [0, 5]]):
        pair.step(seed, which)
    assert pair.equal()
    assert equal_states(pair.a.state_dict(), pair.b.state_dict())


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.Adagrad])
@pytest.mark.parametrize("before", [0, 2])
def test_a_group_may_join_late(nvme_dir, cls, before):
    pair = GenericPair(cls, parameters(5000), nvme_dir)
    pair.steps(before)
    late = parameters(7000, 3, seed=9)
    pair.theirs += (other := twins(late))
    pair.ours += late
    pair.a.add_param_group({"params": late, "lr": 0.1})
    if cls is torch.optim.Adagrad:  # It makes state for what it is constructed with only.
        for p in other:
            pair.b.state[p].update(step=torch.tensor(0.0), sum=torch.zeros_like(p))
    pair.b.add_param_group({"params": other, "lr": 0.1})
    pair.steps(3, first=10)
    assert pair.equal()


def test_layers_in_any_dense_memory_format_and_gradients_in_any_strides(nvme_dir):
    weight = torch.randn(8, 50, 3, 3).to(memory_format=torch.channels_last)
    pair = GenericPair(
        torch.optim.RMSprop,
        [weight.requires_grad_(), torch.randn(30, 500).t().requires_grad_()],
        nvme_dir,
    )
    assert not pair.ours[0].is_contiguous()
    for seed in range(3):
        set_gradients(pair.ours, pair.theirs, seed=seed)
        for p in pair.ours:
            p.grad = p.grad.contiguous()
            assert p.grad.stride() != p.stride()
        pair.a.step()
        pair.b.step()
    assert pair.equal()
    assert equal_states(pair.a.state_dict(), pair.b.state_dict())


@pytest.mark.parametrize("cls", [torch.optim.Adam, Lion, torch.optim.Adagrad])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_are_rounded_from_a_float_master(nvme_dir, cls, dtype):
    ours = parameters(1, 65, 30_000, (50, 60), dtype=dtype)
    masters = [p.detach().float().requires_grad_() for p in ours]
    a = OffloadedOptimizer(cls, ours, nvme_path=nvme_dir, host_memory=SMALL)
    b = cls(masters)
    for seed in range(8):
        set_gradients(ours, seed=seed)
        for p, master in zip(ours, masters, strict=True):
            master.grad = p.grad.float()
        a.step()
        b.step()
    rounded = [split_master(m)[0] if dtype == torch.bfloat16 else m.half() for m in masters]
    assert equal(ours, rounded)
    saved = a.state_dict()["state"]
    assert equal([saved[i]["master_param"] for i in saved], masters)
    for i, master in enumerate(masters):
        for name, value in b.state[master].items():
            assert torch.equal(saved[i][name], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whatever_is_written_to_a_half_parameter_counts(nvme_dir, dtype):
    ours = parameters(9000, dtype=dtype)
    a = OffloadedOptimizer(
        torch.optim.SGD, ours, lr=0.1, momentum=0.9, nvme_path=nvme_dir, host_memory=SMALL
    )
    set_gradients(ours, seed=0)
    a.step()
    ours[0].data.zero_()
    assert not a.state_dict()["state"][0]["master_param"].abs().max() > 1e-30
    a.param_groups[0]["lr"] = 0.0
    a.step()
    assert not ours[0].any()


def test_half_parameters_of_a_class_without_state_have_a_master(nvme_dir):
    ours = [torch.ones(64, dtype=torch.bfloat16, requires_grad=True)]
    a = OffloadedOptimizer(torch.optim.SGD, ours, lr=1e-4, nvme_path=nvme_dir)
    for _ in range(100):  # Each step is far below the spacing of bfloat16 at 1.
        ours[0].grad = torch.ones_like(ours[0])
        a.step()
    assert torch.all(ours[0] < 1)


def test_a_closure_and_hooks_run_once_for_a_step(nvme_dir):
    (weight,) = parameters(50_000)
    a = OffloadedOptimizer(torch.optim.Adam, [weight], nvme_path=nvme_dir, host_memory=SMALL)
    calls = []
    a.register_step_pre_hook(lambda *_: calls.append("pre"))
    a.register_step_post_hook(lambda *_: calls.append("post"))
    every = register_optimizer_step_pre_hook(lambda *_: calls.append("all"))

    def closure():
        a.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    before = weight.detach().square().sum()
    assert torch.equal(a.step(closure), before)
    every.remove()
    assert a.stats()["tiles"] > 3
    assert sorted(calls) == ["all", "post", "pre"]


def test_autograd_sees_that_parameters_have_changed(nvme_dir):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = parameters(100, dtype=dtype)
        a = OffloadedOptimizer(torch.optim.Adam, ours, nvme_path=nvme_dir)
        loss = ours[0].square().sum()
        set_gradients(ours, seed=0)
        a.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_class_may_give_its_parameters_other_memory(nvme_dir):
    class Rebinding(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.data = p.data * 0.5

    pair = GenericPair(Rebinding, parameters(9000), nvme_dir, lr=0.1, momentum=0.9)
    pair.steps(3)
    assert pair.equal()


def test_the_class_cannot_disturb_random_numbers(nvme_dir):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    OffloadedOptimizer(torch.optim.Adam, parameters(10), nvme_path=nvme_dir)
    assert torch.equal(torch.rand(4), expected)


def test_grad_scaler_and_clipping_work_as_in_memory(nvme_dir):
    pair = GenericPair(torch.optim.RMSprop, parameters(9000, 20), nvme_dir)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    for seed in range(4):
        set_gradients(pair.ours, pair.theirs, seed=seed)
        for own, optimizer, scaler in zip(
            (pair.ours, pair.theirs), (pair.a, pair.b), scalers, strict=True
        ):
            scaler.scale(torch.zeros(()))
            if seed == 2:
                own[0].grad[5] = float("inf")
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            scaler.step(optimizer)
            scaler.update()
    assert pair.a.stats()["steps"] == 3
    assert pair.equal()


def test_pieces_keep_to_one_thread_whatever_torch_has(nvme_dir):
    seen = []

    class Counting(torch.optim.RMSprop):
        def step(self, closure=None):
            seen.append(torch.get_num_threads())
            return super().step(closure)

    ours = parameters(100_003)
    a = OffloadedOptimizer(Counting, ours, nvme_path=nvme_dir)
    torch.set_num_threads(3)
    seen.clear()
    set_gradients(ours, seed=0)
    a.step()
    assert set(seen) == {1}
    assert torch.get_num_threads() == 3
