"""OffloadedAdamW computes what torch.optim.AdamW(fused=True) computes."""

import pytest
import torch
from optim_support import (
    SMALL,
    HalfReference,
    Pair,
    equal,
    equal_states,
    parameters,
    set_gradients,
    twins,
)
from torch.optim import lr_scheduler

from torch_ext import OffloadedAdamW

SIZES = [1, 17, 63, 64, 65, 127, 1000, 8192, 8193, (300, 7), 100_003, 0, ()]


@pytest.fixture(autouse=True)
def one_thread():
    """Many small kernel calls are slow on threads that others compete for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_fifty_steps_with_groups_schedule_and_clipping_are_bit_identical(nvme_dir):
    first, second = parameters(*SIZES), parameters(2_000_003, 5000, 3, seed=1)
    pair = Pair(
        [{"params": first, "lr": 3e-3}, {"params": second, "weight_decay": 0.1}],
        nvme_dir,
        host_memory="4MiB",
    )
    schedules = [
        lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10),
                lr_scheduler.CosineAnnealingLR(optimizer, 40),
            ],
            milestones=[10],
        )
        for optimizer in (pair.a, pair.b)
    ]
    for seed in range(50):
        set_gradients(pair.ours, pair.theirs, seed=seed)
        for own in (pair.ours, pair.theirs):
            torch.nn.utils.clip_grad_norm_(own, 1.0)
        pair.a.step()
        pair.b.step()
        for schedule in schedules:
            schedule.step()
    assert pair.a.stats()["tiles"] > 30
    assert pair.equal()
    assert equal_states(pair.a.state_dict(), pair.b.state_dict())


@pytest.mark.parametrize("host_memory", [SMALL, "300KiB", "1MiB", "64MiB"])
def test_the_budget_does_not_change_the_result(nvme_dir, host_memory):
    pair = Pair(parameters(*SIZES), nvme_dir, host_memory)
    pair.steps(4)
    assert pair.equal()
    stats = pair.a.stats()
    assert stats["host_bytes_peak"] <= stats["host_memory"]


@pytest.mark.parametrize("engine", ["libaio", "io_uring", "threads", "memory"])
def test_the_engine_does_not_change_the_result(nvme_dir, engine):
    try:
        pair = Pair(parameters(*SIZES), nvme_dir, engine=engine)
    except OSError as error:
        pytest.skip(f"{engine}: {error}")
    pair.steps(3)
    assert pair.equal()
    assert pair.a.engine == engine


@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"lr": torch.tensor(0.01)},
        {"betas": (0.5, 0.75), "eps": 1e-3, "weight_decay": 0.0},
        {"lr": 0.0},
        {"betas": (0.0, 0.0)},
    ],
    ids=str,
)
def test_hyper_parameters_mean_what_they_do_in_torch(nvme_dir, options):
    pair = Pair(parameters(100, 20_000), nvme_dir, **options)
    pair.steps(5)
    assert pair.equal()


def test_parameters_without_gradient_stay_as_they_are(nvme_dir):
    pair = Pair(parameters(*[10_000] * 6), nvme_dir)
    for seed, which in enumerate([[0, 1], [1], [], [4, 1], [0, 1, 2, 3, 4], [2], [0, 5]]):
        pair.step(seed, which)
    assert pair.equal()
    assert equal_states(pair.a.state_dict(), pair.b.state_dict())


def test_a_frozen_parameter_takes_neither_space_nor_transfers(nvme_dir):
    frozen, trained = parameters(1_000_000, 100)
    frozen.requires_grad_(False)
    pair = Pair([frozen, trained], nvme_dir)
    for seed in range(3):
        pair.step(seed, [1])
    pair.a.close()
    assert pair.a.stats()["bytes_written"] == 0  # One tile, that stays in memory.
    assert pair.a.stats()["state_bytes"] == 2 * 448
    assert pair.equal()


@pytest.mark.parametrize("before", [0, 2])
def test_a_group_may_join_late(nvme_dir, before):
    pair = Pair(parameters(5000), nvme_dir)
    pair.steps(before)
    late = parameters(7000, 3, seed=9)
    pair.theirs += (other := twins(late))
    pair.ours += late
    pair.a.add_param_group({"params": late, "lr": 0.1})
    pair.b.add_param_group({"params": other, "lr": 0.1})
    for seed in range(3):
        pair.step(10 + seed)
    assert pair.equal()


def test_layers_in_any_dense_memory_format(nvme_dir):
    weight = torch.randn(8, 5, 3, 3).to(memory_format=torch.channels_last)
    pair = Pair([weight.requires_grad_(), torch.randn(30, 500).t().requires_grad_()], nvme_dir)
    assert not pair.ours[0].is_contiguous()
    pair.steps(4)
    assert pair.equal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_other_strides_is_read_element_by_element(nvme_dir, dtype):
    weight = torch.randn(40, 5, 30, 1, 3).permute(4, 2, 0, 3, 1).to(dtype)
    ours = [weight.clone().requires_grad_()]
    theirs = twins(ours)
    assert not ours[0].is_contiguous()
    a = OffloadedAdamW(ours, nvme_path=nvme_dir, host_memory=SMALL)
    b = OffloadedAdamW(theirs, nvme_path=nvme_dir, host_memory=SMALL)
    for _ in range(3):
        gradient = torch.randn(weight.shape).to(dtype)
        ours[0].grad = gradient.contiguous()
        theirs[0].grad = torch.empty_like(theirs[0]).copy_(gradient)
        assert ours[0].grad.stride() != theirs[0].grad.stride()
        a.step()
        b.step()
    assert equal(ours, theirs)


def test_state_in_any_strides_is_loaded_element_by_element(nvme_dir):
    pair = Pair([torch.randn(50, 400).t().requires_grad_()], nvme_dir)
    pair.steps(2)
    state = pair.b.state_dict()
    entry = dict(state["state"][0])
    for name in ("exp_avg", "exp_avg_sq"):
        entry[name] = entry[name].contiguous().double()
    assert entry["exp_avg"].stride() != pair.ours[0].stride()
    pair.a.load_state_dict({**state, "state": {0: entry}})
    pair.steps(2, first=5)
    assert pair.equal()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_are_rounded_from_a_float_master(nvme_dir, dtype):
    ours = parameters(1, 65, 30_000, (50, 60), dtype=dtype)
    halves = twins(ours)
    a = OffloadedAdamW(ours, lr=1e-3, nvme_path=nvme_dir, host_memory=SMALL)
    reference = HalfReference(halves, lr=1e-3)
    for seed in range(8):
        set_gradients(ours, seed=seed, scale=0.1)
        if seed == 4:  # The user has the last word about parameters.
            for p in (*ours, *halves):
                p.data.clamp_(-0.5, 0.5)
        if seed == 6:
            ours[2].data.zero_()
            halves[2].data.zero_()
        a.step()
        reference.step([p.grad for p in ours])
        assert equal(ours, halves)
    saved = a.state_dict()["state"]
    for i, master in enumerate(reference.masters):
        assert torch.equal(saved[i]["master_param"], master)
        state = reference.optimizer.state[master]
        assert torch.equal(saved[i]["exp_avg"], state["exp_avg"])
        assert torch.equal(saved[i]["exp_avg_sq"], state["exp_avg_sq"])


def test_a_master_keeps_what_the_parameter_cannot_hold(nvme_dir):
    weight = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    optimizer = OffloadedAdamW(
        [weight], lr=1e-4, weight_decay=0.0, nvme_path=nvme_dir, host_memory=SMALL
    )
    for _ in range(100):  # Each step is far below the spacing of bfloat16 at 1.
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.all(weight < 0.995)


def test_float_and_half_parameters_share_an_optimizer(nvme_dir):
    wide, narrow = parameters(9000, 100), parameters(9000, 7, dtype=torch.bfloat16)
    mixed = [wide[0], narrow[0], wide[1], narrow[1]]
    alone = [twins(wide), twins(narrow)]
    a = OffloadedAdamW(mixed, nvme_path=nvme_dir, host_memory=SMALL)
    others = [OffloadedAdamW(p, nvme_path=nvme_dir, host_memory=SMALL) for p in alone]
    for seed in range(3):
        set_gradients(wide, alone[0], seed=seed)
        set_gradients(narrow, alone[1], seed=seed)
        for optimizer in (a, *others):
            optimizer.step()
    assert equal(wide, alone[0])
    assert equal(narrow, alone[1])


def test_what_is_not_finite_comes_out_as_in_torch(nvme_dir):
    pair = Pair(parameters(1000), nvme_dir)
    for value in (float("nan"), float("inf"), -float("inf"), 1e-42):
        set_gradients(pair.ours, pair.theirs, seed=0)
        for p in (*pair.ours, *pair.theirs):
            p.grad[::7] = value
        pair.a.step()
        pair.b.step()
    ours, theirs = pair.ours[0].detach(), pair.theirs[0].detach()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_closures_hooks_and_zero_grad_work(nvme_dir):
    model = torch.nn.Linear(20, 3)
    optimizer = OffloadedAdamW(model.named_parameters(), nvme_path=nvme_dir, host_memory=SMALL)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(torch.ones(4, 20)).square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert calls == ["pre", "post"] * 20
    optimizer.zero_grad(set_to_none=False)
    assert not model.weight.grad.any()
    optimizer.zero_grad()
    assert model.weight.grad is None


def test_autograd_notices_that_a_parameter_has_changed(nvme_dir):
    weight = torch.randn(10, requires_grad=True)
    optimizer = OffloadedAdamW([weight], nvme_path=nvme_dir, host_memory=SMALL)
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_grad_scaler_unscales_and_skips(nvme_dir):
    pair = Pair(parameters(3000), nvme_dir)
    scalers = [torch.amp.GradScaler("cpu", init_scale=128.0) for _ in range(2)]
    for seed in range(6):
        for own, optimizer, scaler in zip(
            (pair.ours, pair.theirs), (pair.a, pair.b), scalers, strict=True
        ):
            optimizer.zero_grad()
            factor = float("inf") if seed == 3 else 1.0 + seed
            scaler.scale((own[0] * own[0]).sum() * factor).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(own, 0.5)
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() < 128.0
    assert pair.equal()
    assert pair.a.stats()["steps"] == 5


def test_a_model_trains_like_in_memory(nvme_dir):
    def train(make):
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 200), torch.nn.GELU(), torch.nn.Linear(200, 8)
        )
        optimizer = make(model.parameters())
        losses = []
        for _ in range(15):
            x = torch.randn(32, 64)
            loss = torch.nn.functional.mse_loss(model(x), x[:, :8])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours = train(lambda p: OffloadedAdamW(p, nvme_path=nvme_dir, host_memory=SMALL))
    assert ours == train(lambda p: torch.optim.AdamW(p, fused=True))
    assert ours[-1] < ours[0]


def test_stats_and_timeline_tell_what_a_step_did(nvme_dir):
    pair = Pair(parameters(100_000), nvme_dir)
    pair.steps(3)
    pair.a.close()
    stats = pair.a.stats()
    assert stats["steps"] == 3
    assert 3 * 800_000 <= stats["bytes_written"] < 3 * 800_000 * 1.02
    lanes = {
        lane: [t for name, t, *_ in pair.a.timeline() if name == lane]
        for lane in ("read", "update", "write")
    }
    assert lanes["update"] == list(range(stats["tiles"]))
    assert sorted(lanes["read"]) == sorted(lanes["write"]) == lanes["update"]
    for lane in ("read", "update", "write"):
        assert stats[f"{lane}_seconds"] > 0


@pytest.mark.slow
def test_a_parameter_of_a_hundred_million_elements(nvme_dir):
    torch.set_num_threads(2)
    pair = Pair(parameters(100_000_000), nvme_dir, host_memory="64MiB")
    for seed in range(2):
        pair.step(seed)
    assert pair.equal()


def test_state_on_several_drives_is_bit_identical(nvme_dir, tmp_path):
    pair = Pair(
        parameters(*SIZES), {nvme_dir: 2, tmp_path: 1}, "1MiB", aio={"block_size": 4096}
    )
    pair.steps(4)
    assert pair.equal()
    assert equal_states(pair.a.state_dict(), pair.b.state_dict())
