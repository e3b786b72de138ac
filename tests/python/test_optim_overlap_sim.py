"""Updates while backward goes on, of parameters on a device, which is simulated."""

import threading

import pytest
import torch
from optim_support import SMALL, equal
from test_optim_sim import is_all, on_sim, released_by

from torch_ext import OffloadedAdamW

SIZES = [(40, 50), (3000,), (20_000,), (7,)]


def make(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
    return on_sim(tensors) if device == "sim" else [t.requires_grad_() for t in tensors]


def backward(parameters, step):
    """Gradients that differ from step to step, one parameter after the other."""
    for i, p in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * step + i)
        p.backward(torch.randn(p.shape, generator=generator).to(p.dtype).to(p.device))


@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_result_is_that_of_step_alone(sim, nvme_dir, dtype, state_format):
    trained = []
    for device, overlap in (("cpu", False), ("sim", False), ("sim", "update")):
        parameters = make(device, dtype)
        optimizer = OffloadedAdamW(
            parameters,
            lr=1e-2,
            nvme_path=nvme_dir,
            host_memory=SMALL,
            state_format=state_format,
            overlap_backward=overlap,
        )
        for step in range(5):
            backward(parameters, step)
            optimizer.step()
            optimizer.zero_grad()
        trained.append([p.detach().cpu() for p in parameters])
        optimizer.close()
    for other in trained[1:]:
        assert all(torch.equal(p, q) for p, q in zip(trained[0], other, strict=True))


@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("overlap", ["prefetch", "update"])
@pytest.mark.parametrize("of_gradient", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_may_have_another_dtype(
    sim, nvme_dir, dtype, of_gradient, overlap, state_format
):
    trained = []
    for device, mode in (("cpu", False), ("cpu", overlap), ("sim", overlap)):
        parameters = make(device, dtype)
        for p in parameters:
            p.grad_dtype = of_gradient
        optimizer = OffloadedAdamW(
            parameters,
            lr=1e-2,
            nvme_path=nvme_dir,
            host_memory="1MiB",
            state_format=state_format,
            overlap_backward=mode,
        )
        for step in range(3):
            sim.reset()
            backward(parameters, step)
            assert parameters[0].grad.dtype == of_gradient
            if device == "sim" and mode == "prefetch":  # All are on their way.
                elements = sum(p.numel() for p in parameters)
                assert sim.counts()["async_bytes"] == elements * of_gradient.itemsize
            optimizer.step()
            optimizer.zero_grad(set_to_none=step == 1)
        trained.append([p.detach().cpu() for p in parameters])
        optimizer.close()
    for other in trained[1:]:
        assert all(torch.equal(p, q) for p, q in zip(trained[0], other, strict=True))


def test_a_gradient_in_page_locked_memory_is_left_to_step(sim, nvme_dir):
    """As with FSDP2's CPUOffloadPolicy, whose copies from the GPU end with backward."""
    ours, theirs = make("cpu"), make("cpu")

    def copy_later(p):
        p.grad = torch.full(p.shape, float("nan")).pin_memory()

    for p in ours:
        p.register_post_accumulate_grad_hook(copy_later)
    optimizer = OffloadedAdamW(
        ours, nvme_path=nvme_dir, host_memory=SMALL, overlap_backward="update"
    )
    other = torch.optim.AdamW(theirs, fused=True)
    for step in range(3):
        for parameters in (ours, theirs):
            backward(parameters, step)
        for p, q in zip(ours, theirs, strict=True):
            assert p.grad.is_pinned()
            p.grad.copy_(q.grad)
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    assert equal(ours, theirs)


def one(sim, nvme_dir):
    """A parameter of zeros whose next step, with gradient 1, makes it -1."""
    weight = torch.zeros(1000).to("sim").requires_grad_()
    optimizer = OffloadedAdamW(
        [weight],
        lr=0.0,
        weight_decay=0.0,
        nvme_path=nvme_dir,
        host_memory=SMALL,
        overlap_backward="update",
    )
    weight.backward(torch.ones(1000).to("sim"))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1.0
    sim.settle()
    return weight, optimizer


def test_the_update_waits_for_the_work_that_makes_the_gradient(sim, nvme_dir):
    weight, optimizer = one(sim, nvme_dir)
    weight.grad = torch.full((1000,), -1.0).to("sim")
    sim.settle()
    sim.reset()
    sim.hold()
    weight.grad.fill_(1.0)  # Queued; the device is late.
    with released_by(sim, threading.Thread(target=optimizer.step)):
        sim.await_copies(2)
    assert is_all(weight, -1.0)


def test_work_after_the_step_sees_the_parameters(sim, nvme_dir):
    weight, optimizer = one(sim, nvme_dir)
    sim.reset()
    sim.hold_copies_after(2)  # To the host; what comes back is late.
    weight.grad = torch.ones(1000).to("sim")
    optimizer.step()
    seen = weight.detach().clone()
    sim.release_copies()
    assert is_all(seen, -1.0)
    assert is_all(weight, -1.0)


ROOMY = "2MiB"


def pair(nvme_dir, dtype=torch.float32, **options):
    """Parameters and optimizer on the CPU, and on the device with "prefetch"."""
    cpu, device = make("cpu", dtype), make("sim", dtype)
    options = {"lr": 1e-2, "nvme_path": nvme_dir, "host_memory": ROOMY} | options
    return (
        (cpu, OffloadedAdamW(cpu, **options)),
        (device, OffloadedAdamW(device, overlap_backward="prefetch", **options)),
    )


def same(cpu, device):
    return all(
        torch.equal(p.detach(), q.detach().cpu()) for p, q in zip(cpu, device, strict=True)
    )


def copies_of(sim, function, *args):
    before = sim.counts()["async_copies"]
    function(*args)
    return sim.counts()["async_copies"] - before


@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_copied_while_backward_runs(sim, nvme_dir, dtype, state_format):
    (cpu, a), (device, b) = pair(nvme_dir, dtype, state_format=state_format)
    for step in range(4):
        backward(cpu, step)
        assert copies_of(sim, backward, device, step) == len(SIZES)
        a.step()
        in_step = copies_of(sim, b.step)
        assert in_step % 2 == 0  # Parameters, there and back.
        a.zero_grad()
        b.zero_grad()
        assert same(cpu, device)
    # Without copies made before it: gradients too.
    for p in device:
        p.grad = torch.zeros_like(p)
    assert copies_of(sim, b.step) * 2 == in_step * 3
    assert b.stats()["host_bytes_peak"] <= b.stats()["host_memory"]


def halve(p):
    p.grad.mul_(0.5)


def halve_unseen(p):
    p.grad.data.mul_(0.5)


def negate_unseen(p):
    p.grad.data.neg_()


def replace(p):
    p.grad = p.grad * 0.5


def add_another(p):
    p.backward(torch.ones(p.shape).to(p.device))


def unscale_unseen(p):
    """As a GradScaler does on CUDA: only exponents change, and no version."""
    p.grad.data.mul_(2.0**-16)


def flip_unseen(p):
    p.grad.data.copy_(p.grad.data.cpu().flip(0).to(p.device))


CHANGES = [
    *[halve, replace, add_another],
    *[halve_unseen, negate_unseen, unscale_unseen, flip_unseen],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_gradients_after_backward_counts(sim, nvme_dir, change, dtype):
    cpu = [torch.ones(256, 128, dtype=dtype).requires_grad_()]
    device = on_sim(cpu)
    options = {"lr": 1e-2, "eps": 1e-3, "nvme_path": nvme_dir, "host_memory": ROOMY}
    a = OffloadedAdamW(cpu, **options)
    b = OffloadedAdamW(device, overlap_backward="prefetch", **options)
    for step in range(3):
        for parameters, optimizer in ((cpu, a), (device, b)):
            optimizer.zero_grad()
            backward(parameters, step)
            # As many of each sign, none of them zero.
            parameters[0].grad.data.abs_().add_(0.5)[::2].neg_()
            if optimizer is b:
                b._on_gradient(device[0])
            change(parameters[0])
            optimizer.step()
        assert same(cpu, device)


def test_a_loop_that_accumulates_clips_scales_and_skips_works_unchanged(sim, nvme_dir):
    (cpu, a), (device, b) = pair(nvme_dir)
    for step in range(8):
        for parameters, optimizer in ((cpu, a), (device, b)):
            with optimizer.accumulate():
                backward(parameters, 100 + step)
            backward(parameters, step)
            for p in parameters:
                p.grad.div_(4.0)  # As a GradScaler unscales.
            torch.nn.utils.clip_grad_norm_(parameters, 0.5 if step % 3 else 1e9)
            if step != 5:  # As it skips what has overflowed.
                optimizer.step()
            optimizer.zero_grad()
    assert same(cpu, device)
    assert b.stats()["steps"] == 7


def test_a_step_that_is_skipped_or_repeated_uses_no_old_copy(sim, nvme_dir):
    (cpu, a), (device, b) = pair(nvme_dir)
    for parameters, optimizer in ((cpu, a), (device, b)):
        backward(parameters, 0)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        optimizer.zero_grad()
        backward(parameters, 1)  # Skipped, as a GradScaler does.
        optimizer.zero_grad()
        backward(parameters, 2)
        optimizer.step()
        optimizer.step()
    assert same(cpu, device)


def test_clipping_by_the_optimizer_is_that_of_the_cpu(sim, nvme_dir):
    for norm in (1e9, 0.5):  # Nothing to clip, much to clip.
        (cpu, a), (device, b) = pair(nvme_dir, max_grad_norm=norm)
        for step in range(3):
            for parameters, optimizer in ((cpu, a), (device, b)):
                optimizer.zero_grad()
                backward(parameters, step)
                optimizer.step()
            assert same(cpu, device)


def test_a_copy_waits_for_the_gradient(sim, nvme_dir):
    (cpu, a), (device, b) = pair(nvme_dir)
    gradient = torch.zeros(3000).to("sim")
    sim.settle()
    sim.reset()
    sim.hold()
    gradient.fill_(2.0)  # Queued; the device is late.
    device[1].grad = gradient
    # Backward itself waits for this device.
    with released_by(sim, threading.Thread(target=b._on_gradient, args=(device[1],))):
        sim.await_copies(1)
    cpu[1].grad = torch.full((3000,), 2.0)
    a.step()
    assert copies_of(sim, b.step) == 2  # The parameter, there and back.
    assert same(cpu, device)


def test_copies_have_a_quarter_of_the_budget(sim, nvme_dir):
    generator = torch.Generator().manual_seed(1)
    # The elements have 4 bytes, so the last two have room in a quarter of 2 MiB.
    start = [torch.randn(60_000, generator=generator) for _ in range(5)]
    trained = []
    for device in ("cpu", "sim"):
        parameters = [t.clone().to(device).requires_grad_() for t in start]
        optimizer = OffloadedAdamW(
            parameters, nvme_path=nvme_dir, host_memory=ROOMY, overlap_backward="prefetch"
        )
        for _ in range(3):
            optimizer.zero_grad()
            before = sim.counts()["async_copies"]
            sum((p * p).sum() for p in parameters).backward()
            copies = sim.counts()["async_copies"] - before
            optimizer.step()
        assert copies == (2 if device == "sim" else 0)
        assert optimizer.stats()["host_bytes_peak"] <= 2 << 20
        trained.append(parameters)
    assert same(*trained)


def test_nothing_is_copied_while_gradients_are_accumulated(sim, nvme_dir):
    (cpu, a), (device, b) = pair(nvme_dir)
    for parameters, optimizer in ((cpu, a), (device, b)):
        with optimizer.accumulate():
            assert copies_of(sim, backward, parameters, 0) == 0
        backward(parameters, 1)
        optimizer.step()
    assert same(cpu, device)


def test_a_copy_that_fails_is_an_error_of_the_step(sim, nvme_dir):
    _, (device, b) = pair(nvme_dir)
    sim.fail_copy()
    backward(device, 0)
    with pytest.raises(RuntimeError, match="sim"):
        b.step()


def test_parameters_may_come_from_an_iterator_in_a_group(sim, nvme_dir):
    parameters = make("sim")
    optimizer = OffloadedAdamW(
        iter([{"params": iter(parameters)}]),
        nvme_path=nvme_dir,
        host_memory=ROOMY,
        overlap_backward="prefetch",
    )
    assert copies_of(sim, backward, parameters, 0) == len(SIZES)
    assert len(optimizer.param_groups[0]["params"]) == len(SIZES)
