"""OffloadedAdamW in the loops that people write, beside AdamW(fused=True) in memory."""

import pytest
import torch
from optim_support import SMALL, Pair, equal, equal_states, parameters
from torch.optim import lr_scheduler

from torch_ext import OffloadedAdamW

SIZES = [(300, 70), 5000, 17, 1]


def in_memory(params, **options):
    return torch.optim.AdamW(params, fused=True, **options)


@pytest.fixture
def offloaded(nvme_dir):
    def make(params, **options):
        return OffloadedAdamW(params, nvme_path=nvme_dir, host_memory=SMALL, **options)

    return make


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 200), torch.nn.GELU(), torch.nn.Linear(200, 64)
    )


def batches(count):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(16, 64, generator=generator) for _ in range(count)]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_scaled_loop_with_accumulation_skips_the_same_steps(offloaded, dtype):
    """Without unscale_(): the scaler's step does it."""

    def train(make):
        model = network()
        optimizer = make(model.parameters(), lr=1e-2)
        schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
        seen = []
        for number, x in enumerate(batches(24)):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = torch.nn.functional.mse_loss(model(x), x)
            spoilt = float("inf") if number == 12 else 1.0
            scaler.scale(loss * spoilt / 2).backward()
            if number % 2:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                schedule.step()
            seen += [loss.item(), scaler.get_scale()]
        return model, optimizer, seen

    ours, optimizer, seen = train(offloaded)
    theirs, other, expected = train(in_memory)
    assert seen == expected
    assert equal(ours.parameters(), theirs.parameters())
    assert optimizer.stats()["steps"] == other.state[theirs[0].weight]["step"] < 12


SCHEDULES = {
    # Cycles betas too.
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=12),
    "warm-up from 0": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: epoch / 4),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
def test_schedules_change_what_the_step_takes(nvme_dir, name, kind):
    pair = Pair(parameters(*SIZES), nvme_dir)
    for group in (*pair.a.param_groups, *pair.b.param_groups):
        group["lr"] = kind(1e-3)
    schedules = [SCHEDULES[name](optimizer) for optimizer in (pair.a, pair.b)]
    rates = set()
    for seed in range(12):
        pair.step(seed)
        for schedule in schedules:
            schedule.step(*([1.0] if name == "plateau" else []))
        rates.add(float(pair.a.param_groups[0]["lr"]))
    assert len(rates) > 2
    assert pair.equal()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_leaves_what_it_leaves_in_memory(nvme_dir, set_to_none):
    """A gradient of zeros decays its parameter, a missing one leaves it alone."""
    pair = Pair(parameters(*SIZES), nvme_dir, weight_decay=0.1)
    for number in range(8):
        for own, optimizer in ((pair.ours, pair.a), (pair.theirs, pair.b)):
            optimizer.zero_grad(set_to_none=set_to_none)
            # Each parameter every other step.
            sum((p**2).sum() for p in own[number % 2 :: 2]).backward()
            optimizer.step()
    steps = [pair.a.state[p]["step"] for p in pair.ours]
    assert steps == ([4, 4, 4, 4] if set_to_none else [8, 7, 8, 7])
    assert pair.equal()
    assert equal_states(pair.a.state_dict(), pair.b.state_dict())


def test_groups_that_ask_for_foreach_are_computed_as_by_the_fused_kernel(nvme_dir):
    first, second = parameters(*SIZES), parameters(*SIZES, seed=1)
    groups = [{"params": first, "foreach": True}, {"params": second, "foreach": False}]
    ours = OffloadedAdamW(groups, nvme_path=nvme_dir, host_memory=SMALL)
    twins = [p.detach().clone().requires_grad_() for p in first + second]
    theirs = in_memory(twins)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        for a, b in zip(first + second, twins, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for own in (first + second, twins):
            torch.nn.utils.clip_grad_norm_(own, 1.0, foreach=True)
            torch.nn.utils.clip_grad_value_(own, 0.01, foreach=True)
        ours.step()
        theirs.step()
    assert equal(first + second, twins)
    # A state that the foreach implementation has saved, and the other way round.
    foreach = torch.optim.AdamW([t.detach().clone() for t in twins], foreach=True)
    foreach.load_state_dict(theirs.state_dict())
    single = OffloadedAdamW(twins, nvme_path=nvme_dir, host_memory=SMALL)
    single.load_state_dict(foreach.state_dict())
    assert equal_states(single.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("whole", [False, True], ids=["the model", "the whole step"])
def test_what_torch_compile_made_trains_alike(offloaded, whole):
    """The backend is of no matter to the optimizer; this one needs no compiler."""

    def train(make):
        torch._dynamo.reset()
        model = network()
        optimizer = make(model.parameters(), lr=1e-2)
        schedule = lr_scheduler.StepLR(optimizer, 3)
        called = model if whole else torch.compile(model, backend="aot_eager")

        def step(x):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(called(x), x)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            return loss.detach()

        step = torch.compile(step, backend="aot_eager") if whole else step
        losses = []
        for x in batches(8):
            losses.append(step(x).item())
            schedule.step()
        return losses, list(model.parameters())

    ours, theirs = train(offloaded), train(in_memory)
    assert ours[0] == theirs[0]
    assert len(set(ours[0])) == 8
    assert equal(ours[1], theirs[1])
