"""Updates while backward goes on."""

import gc
import time

import pytest
import torch
import torch.distributed as dist
from optim_support import SMALL, equal_states
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from torch_ext import OffloadedAdamW
from torch_ext.optim._overlap import TakenGradient

OVERLAPS = [False, "prefetch", "update"]


def make_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = []
    for width in (24, 300, 300, 300, 24):
        layers += [nn.Linear(layers[-2].out_features if layers else 24, width), nn.GELU()]
    return nn.Sequential(*layers).to(dtype)


def updating(model, nvme_dir, host_memory=SMALL):
    return OffloadedAdamW(
        model.parameters(),
        nvme_path=nvme_dir,
        host_memory=host_memory,
        overlap_backward="update",
    )


def batch(seed, dtype=torch.float32):
    return torch.randn(8, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(model, seed):
    x = batch(seed, next(model.parameters()).dtype)
    return (model(x) - x).float().square().mean()


def train(model, optimizer, steps, accumulate=1):
    for step in range(steps):
        for i in range(accumulate - 1):
            with getattr(optimizer, "accumulate", torch.enable_grad)():
                loss_of(model, 100 * step + i).backward()
        loss_of(model, 100 * step + 99).backward()
        optimizer.step()
        optimizer.zero_grad()


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_may_have_got_another_dtype_by_its_data(nvme_dir, set_to_none):
    """As loops do that accumulate in 32 bits."""
    trained = []
    for mode in OVERLAPS:
        p = torch.linspace(-1, 1, 300).bfloat16().requires_grad_()
        optimizer = OffloadedAdamW(
            [p], lr=1e-2, nvme_path=nvme_dir, host_memory=SMALL, overlap_backward=mode
        )
        for _ in range(3):
            with optimizer.accumulate():
                p.float().square().sum().backward()
            p.grad.data = p.grad.data.float()
            p.float().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        trained.append(p.detach())
    assert all(torch.equal(trained[0], other) for other in trained[1:])


@pytest.mark.parametrize("host_memory", [SMALL, "1MiB", "64MiB"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_update_during_backward_equals_adamw_bit_for_bit(nvme_dir, host_memory, accumulate):
    ours, theirs = make_model(), make_model()
    optimizer = OffloadedAdamW(
        ours.parameters(),
        lr=1e-2,
        nvme_path=nvme_dir,
        host_memory=host_memory,
        overlap_backward="update",
    )
    other = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True)
    train(ours, optimizer, 12, accumulate)
    train(theirs, other, 12, accumulate)
    assert same_parameters(ours, theirs)
    assert equal_states(optimizer.state_dict(), other.state_dict())
    assert {entry["step"] for entry in optimizer.state.values()} == {12}


@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_mode_changes_the_result(nvme_dir, state_format, dtype):
    models = [make_model(dtype=dtype) for _ in OVERLAPS]
    for model, overlap in zip(models, OVERLAPS, strict=True):
        optimizer = OffloadedAdamW(
            model.parameters(),
            lr=1e-2,
            nvme_path=nvme_dir,
            host_memory="512KiB",
            state_format=state_format,
            overlap_backward=overlap,
        )
        train(model, optimizer, 6)
    assert same_parameters(models[0], models[1])
    assert same_parameters(models[0], models[2])


def test_tiles_are_updated_before_step_is_called(nvme_dir):
    model = make_model()
    optimizer = updating(model, nvme_dir, host_memory="64MiB")
    train(model, optimizer, 2)
    before = [p.detach().clone() for p in model.parameters()]
    now = [p.detach() for p in model.parameters()]  # The same memory, and not guarded.
    loss_of(model, 7).backward()
    deadline = time.monotonic() + 60
    while any(torch.equal(p, q) for p, q in zip(now, before, strict=True)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    optimizer.step()


def test_the_io_of_a_step_does_not_wait_for_step(nvme_dir):
    model = make_model()
    optimizer = updating(model, nvme_dir)
    train(model, optimizer, 2)

    def moved():
        stats = optimizer.stats()
        return stats["bytes_read"] + stats["bytes_written"]

    before = moved()
    loss_of(model, 2).backward()
    deadline = time.monotonic() + 60
    # All of it but what the lanes had read before; the goal is half.
    while moved() - before < 0.9 * 2 * optimizer.stats()["state_bytes"]:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    optimizer.step()


def test_a_taken_gradient_is_freed(nvme_dir):
    model = make_model()
    storages = []
    for parameter in model.parameters():  # These hooks come first.
        parameter.register_post_accumulate_grad_hook(
            lambda p: storages.append(StorageWeakRef(p.grad.untyped_storage()))
        )
    optimizer = updating(model, nvme_dir, host_memory="64MiB")
    for step in range(2):  # Also in the first one.
        storages.clear()
        loss_of(model, step).backward()
        assert len(storages) == len(list(model.parameters()))
        deadline = time.monotonic() + 60
        while not all(storage.expired() for storage in storages):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        optimizer.step()
        if step == 0:
            optimizer.zero_grad()
    assert all(isinstance(p.grad, TakenGradient) for p in model.parameters())


def unscale(optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    scaler.unscale_(optimizer)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        lambda model, optimizer: unscale(optimizer),
        lambda model, optimizer: model[0].weight.grad.norm(),
        lambda model, optimizer: model[0].weight.grad + 1,
        lambda model, optimizer: model[0].weight.grad.mul_(0.5),
        lambda model, optimizer: loss_of(model, 5).backward(),
        lambda model, optimizer: model[0].weight.grad.tolist(),
        lambda model, optimizer: model[0].weight.grad.data_ptr(),
    ],
    ids=["clip", "scaler", "norm", "add", "mul_", "backward", "tolist", "data_ptr"],
)
def test_any_use_of_a_taken_gradient_raises(nvme_dir, use):
    model = make_model()
    optimizer = updating(model, nvme_dir)
    train(model, optimizer, 1)
    loss_of(model, 4).backward()
    with pytest.raises(RuntimeError, match="accumulate|taken|subclass"):
        use(model, optimizer)
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_gradients_may_also_be_zeroed_in_place(nvme_dir):
    ours, theirs = make_model(), make_model()
    optimizer = updating(ours, nvme_dir)
    other = torch.optim.AdamW(theirs.parameters(), fused=True)
    for step in range(6):
        for model, o in ((ours, optimizer), (theirs, other)):
            # Those that are not used have a gradient all the same, of zeros.
            layer = model[: 4 if step % 2 else 8]
            (layer(batch(step)) ** 2).mean().backward()
            o.step()
            o.zero_grad(set_to_none=False)
    assert same_parameters(ours, theirs)
    assert equal_states(optimizer.state_dict(), other.state_dict())


class Interrupted(BaseException):
    pass


def test_step_keeps_what_an_interrupted_backward_has_left(nvme_dir, caplog):
    model = make_model()
    middle = model[4].weight
    ends = iter([False, True] + 9 * [False])

    def interrupt(_):
        if next(ends):
            raise Interrupted

    optimizer = updating(model, nvme_dir)
    middle.register_post_accumulate_grad_hook(interrupt)
    train(model, optimizer, 1)
    with pytest.raises(Interrupted):
        loss_of(model, 4).backward()
    with pytest.raises(RuntimeError, match="Call step.. first"):
        optimizer.state_dict()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="If backward was interrupted, step"):
            loss_of(model, 4).backward()
        optimizer.zero_grad()
    model[8].weight.grad = torch.zeros(24, 300)
    with pytest.raises(RuntimeError, match=r"groups\[0\].*zero_grad.. drops it"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert {e["step"].item() for e in optimizer.state_dict()["state"].values()} == {1, 2}
    train(model, optimizer, 1)
    loss_of(model, 4).backward()
    optimizer.close()
    assert "closed between backward() and step()" in caplog.text


def test_a_second_backward_before_step_raises_even_if_gradients_were_zeroed(nvme_dir):
    model = make_model()
    optimizer = updating(model, nvme_dir)
    loss_of(model, 4).backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="accumulate"):
        loss_of(model, 5).backward()


def test_a_step_with_gradients_that_an_earlier_one_has_taken_raises(nvme_dir):
    model = make_model()
    optimizer = updating(model, nvme_dir)
    loss_of(model, 0).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"params'\]\[0\] has had its gradient taken"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.stats()["steps"] == 2


def test_changed_options_between_backward_and_step_raise(nvme_dir):
    model = make_model()
    optimizer = updating(model, nvme_dir)
    loss_of(model, 4).backward()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="options.*between backward"):
        optimizer.step()
    # The step has been made.
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert {entry["step"] for entry in optimizer.state.values()} == {2}


def test_a_group_keeps_the_options_that_its_first_gradient_found(nvme_dir):
    ours, theirs = make_model(), make_model()
    ours[4].weight.register_post_accumulate_grad_hook(
        lambda _: optimizer.param_groups[0].update(lr=0.5)
    )
    optimizer = updating(ours, nvme_dir)
    other = torch.optim.AdamW(theirs.parameters(), fused=True)
    loss_of(ours, 4).backward()
    with pytest.raises(RuntimeError, match=r"options of param_groups\[0\] were changed"):
        optimizer.step()
    loss_of(theirs, 4).backward()
    other.step()
    assert same_parameters(ours, theirs)


def test_parameters_changed_between_backward_and_step_raise(nvme_dir):
    model = make_model()
    optimizer = updating(model, nvme_dir)
    bias = model[4].bias.detach()
    loss_of(model, 4).backward()
    with torch.no_grad(), pytest.raises(RuntimeError, match="half updated"):
        model[4].bias.clamp_(-0.01, 0.01)
    bias.clamp_(-0.01, 0.01)
    with pytest.raises(RuntimeError, match="was changed between backward"):
        optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 1)


def test_schedules_and_groups_equal_those_of_adamw(nvme_dir):
    models = make_model(), make_model()
    optimizers = []
    for model, kind in zip(models, (OffloadedAdamW, torch.optim.AdamW), strict=True):
        groups = [
            {"params": model[0].parameters(), "lr": 1e-3},
            {"params": model[2:].parameters(), "weight_decay": 0.1, "betas": (0.8, 0.9)},
        ]
        more = {"nvme_path": nvme_dir, "host_memory": SMALL, "overlap_backward": "update"}
        options = more if kind is OffloadedAdamW else {"fused": True}
        optimizers.append(kind(groups, lr=1e-2, **options))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in optimizers]
    for _ in range(10):
        for model, optimizer, schedule in zip(models, optimizers, schedules, strict=True):
            train(model, optimizer, 1)
            schedule.step()
    assert same_parameters(*models)


def test_parameters_without_a_gradient_are_left_alone(nvme_dir):
    ours, theirs = make_model(), make_model()
    optimizer = updating(ours, nvme_dir)
    other = torch.optim.AdamW(theirs.parameters(), fused=True)
    for step in range(8):
        for model, o in ((ours, optimizer), (theirs, other)):
            # Another half of the layers each time.
            layer = model[: 4 if step % 2 else 8]
            (layer(batch(step)) ** 2).mean().backward()
            o.step()
            o.zero_grad()
    assert same_parameters(ours, theirs)
    assert equal_states(optimizer.state_dict(), other.state_dict())


def test_gradients_set_by_hand_are_taken_by_step(nvme_dir):
    ours, theirs = make_model(), make_model()
    optimizer = updating(ours, nvme_dir)
    other = torch.optim.AdamW(theirs.parameters(), fused=True)
    for step in range(3):
        for model, o in ((ours, optimizer), (theirs, other)):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1 * (step + 1))
            o.step()
    assert same_parameters(ours, theirs)


def test_a_closure_may_call_backward(nvme_dir):
    ours, theirs = make_model(), make_model()
    optimizer = updating(ours, nvme_dir)
    other = torch.optim.AdamW(theirs.parameters(), fused=True)
    for step in range(3):
        for model, o in ((ours, optimizer), (theirs, other)):

            def closure(model=model, o=o, step=step):
                o.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            o.step(closure)
    assert same_parameters(ours, theirs)


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_max_grad_norm_clips_as_torch_does(nvme_dir, overlap):
    ours, theirs = make_model(), make_model()
    optimizer = OffloadedAdamW(
        ours.parameters(),
        nvme_path=nvme_dir,
        host_memory=SMALL,
        overlap_backward=overlap,
        max_grad_norm=0.05,
    )
    other = torch.optim.AdamW(theirs.parameters(), fused=True)
    for step in range(5):
        loss_of(ours, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(theirs, step).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        other.step()
        other.zero_grad()
        assert torch.equal(optimizer.grad_norm, norm)
    assert same_parameters(ours, theirs)


def test_clipping_scaling_and_skipping_work_unchanged(nvme_dir):
    ours, theirs = make_model(), make_model()
    optimizer = OffloadedAdamW(ours.parameters(), nvme_path=nvme_dir, host_memory=SMALL)
    other = torch.optim.AdamW(theirs.parameters(), fused=True)
    for model, o in ((ours, optimizer), (theirs, other)):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(6):
            scaler.scale(loss_of(model, step)).backward()
            if step == 3:
                next(model.parameters()).grad[0, 0] = float("inf")
            scaler.unscale_(o)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(o)
            scaler.update()
            o.zero_grad()
    assert same_parameters(ours, theirs)
    assert optimizer.stats()["steps"] == 5


def test_a_state_may_be_loaded_in_the_middle_of_a_step(nvme_dir):
    model = make_model()
    optimizer = updating(model, nvme_dir)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    loss_of(model, 4).backward()
    with pytest.raises(RuntimeError, match="step"):
        optimizer.state_dict()
    optimizer.load_state_dict(state)
    optimizer.zero_grad()
    assert equal_states(optimizer.state_dict(), state)
    train(model, optimizer, 1)
    assert {entry["step"] for entry in optimizer.state.values()} == {3}


def test_an_optimizer_may_be_closed_or_dropped_in_the_middle_of_a_step(nvme_dir):
    for close in (True, False):
        model = make_model()
        optimizer = OffloadedAdamW(
            model.parameters(),
            nvme_path=nvme_dir,
            host_memory=SMALL,
            overlap_backward="update",
        )
        train(model, optimizer, 2)
        loss_of(model, 4).backward()
        if close:
            optimizer.close()
        else:
            del optimizer
            gc.collect()
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        model.zero_grad()
        loss_of(model, 5).backward()  # Nobody takes gradients any more.
        assert all(type(p.grad) is torch.Tensor for p in model.parameters())


@pytest.mark.parametrize("value", [True, None, "on", "updates", 1, []])
def test_an_unknown_mode_is_refused(nvme_dir, value):
    with pytest.raises(ValueError, match="overlap_backward"):
        OffloadedAdamW(make_model().parameters(), nvme_path=nvme_dir, overlap_backward=value)


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)],
)
def test_a_norm_that_is_none_is_refused(nvme_dir, value, error):
    with pytest.raises(error, match="max_grad_norm"):
        OffloadedAdamW(make_model().parameters(), nvme_path=nvme_dir, max_grad_norm=value)


@pytest.fixture
def alone():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_gradients_that_ddp_changes_later_are_not_taken(nvme_dir, alone, overlap):
    ours, theirs = make_model(), make_model()
    wrapped = nn.parallel.DistributedDataParallel(ours)
    optimizer = OffloadedAdamW(
        ours.parameters(), nvme_path=nvme_dir, host_memory=SMALL, overlap_backward=overlap
    )
    reference = torch.optim.AdamW(theirs.parameters(), fused=True)
    if overlap == "update":
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            wrapped(batch(0)).sum().backward()
        return
    for _ in range(2):
        for model, own in ((wrapped, optimizer), (theirs, reference)):
            own.zero_grad()
            (model(batch(0)) ** 2).sum().backward()
            own.step()
    assert same_parameters(ours, theirs)


@pytest.mark.parametrize("hooked", [False, True], ids=["left to step", "in a hook"])
def test_groups_that_move_up_keep_their_own_options(nvme_dir, hooked):
    ps = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(ps, (1.0, 0.5, 0.001), strict=True)]
    optimizer = OffloadedAdamW(
        groups,
        weight_decay=0.0,
        overlap_backward="update",
        nvme_path=nvme_dir,
        host_memory=SMALL,
    )
    ps[0].sum().backward()
    optimizer.param_groups.pop(0)
    if hooked:
        ps[1].sum().backward()
    else:
        ps[1].grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="taken out of param_groups"):
        optimizer.step()
    assert torch.allclose(ps[0], torch.zeros(4), atol=1e-6)
    assert torch.allclose(ps[1], torch.full((4,), 0.5))
    assert torch.equal(ps[2], torch.ones(4))


def test_a_parameter_resized_between_backward_and_step_is_named(nvme_dir):
    ps = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = OffloadedAdamW(
        ps, overlap_backward="update", nvme_path=nvme_dir, host_memory=SMALL
    )
    ps[0].sum().backward()
    ps[1].data = torch.ones(2)
    ps[1].grad = torch.ones(2)
    with pytest.raises(
        RuntimeError, match=r"params'\]\[1\].*between backward\(\) and step\(\)"
    ):
        optimizer.step()
    ps[1].grad = None
    optimizer.step()
    optimizer.zero_grad()
    ps[1].grad = torch.ones(2)
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in ps] == [1, 1]
