"""OffloadedAdamW for parameters on a device, which here is simulated."""

import logging
import threading
from contextlib import contextmanager

import pytest
import torch
from optim_support import SMALL, equal, parameters, set_gradients

from torch_ext import OffloadedAdamW

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# With SMALL: elements of a chunk on its way to the host.
CHUNK = 2048


def on_sim(tensors, device="sim"):
    return [t.detach().to(device).requires_grad_() for t in tensors]


def give(gradients_of, to, dtype=None):
    for p, q in zip(gradients_of, to, strict=True):
        if dtype is not None:
            q.grad_dtype = None
        q.grad = p.grad.to(dtype or p.grad.dtype).to(q.device)


@contextmanager
def released_by(sim, thread):
    """Starts a thread that the device stops, and lets both go on at the end."""
    thread.start()
    yield
    sim.settle()
    sim.release()
    sim.release_copies()
    thread.join()


def one(sim, nvme_dir, count=1000, dtype=torch.float32, **options):
    """A parameter of zeros on the device that a step with gradient 1 makes -1."""
    weight = torch.zeros(count, dtype=dtype).to("sim").requires_grad_()
    weight.grad = torch.ones(count, dtype=dtype).to("sim")
    optimizer = OffloadedAdamW(
        [weight], lr=1.0, weight_decay=0.0, nvme_path=nvme_dir, host_memory=SMALL, **options
    )
    sim.settle()
    return weight, optimizer


def is_all(tensor, value):
    return torch.allclose(tensor.detach().cpu().float(), torch.full(tensor.shape, value))


@pytest.mark.parametrize("update_on", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_that_of_parameters_on_the_cpu(sim, nvme_dir, dtype, update_on):
    ours = parameters(1, 65, 30_000, (10, 70), 0, (), dtype=dtype)
    device = on_sim(ours)
    a = OffloadedAdamW(ours, nvme_path=nvme_dir, host_memory=SMALL)
    b = OffloadedAdamW(device, nvme_path=nvme_dir, host_memory=SMALL, update_on=update_on)
    for seed in range(4):
        set_gradients(ours, seed=seed)
        give(ours, device)
        a.step()
        b.step()
        assert equal(ours, device)
    assert b.stats()["host_bytes_peak"] <= b.stats()["host_memory"]
    names = ("exp_avg", "exp_avg_sq", "master_param")
    of_a, of_b = a.state_dict()["state"], b.state_dict()["state"]
    for i in of_a:
        for name in names[: 2 if dtype == torch.float32 else 3]:
            assert of_b[i][name].device.type == "cpu"
            assert torch.equal(of_a[i][name], of_b[i][name])


@pytest.mark.parametrize("gradients", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
def test_every_format_takes_every_kind_of_gradient(
    sim, nvme_dir, state_format, dtype, gradients
):
    ours = parameters(20_000, (30, 70), dtype=dtype)
    device = on_sim(ours)
    options = {"nvme_path": nvme_dir, "host_memory": SMALL, "state_format": state_format}
    a = OffloadedAdamW(ours, **options)
    b = OffloadedAdamW(device, **options)
    for seed in range(3):
        set_gradients(ours, seed=seed)
        give(ours, ours, gradients)
        give(ours, device, gradients)
        a.step()
        b.step()
        assert equal(ours, device)


@pytest.mark.parametrize("update_on", ["cpu", "cuda"])
def test_parameters_may_be_on_several_devices(sim, nvme_dir, update_on):
    ours = parameters(5000, 300, 9000, 40, dtype=torch.bfloat16)
    devices = ["sim:0", "sim:1", "sim:0", "cpu" if update_on == "cpu" else "sim:1"]
    there = [on_sim([p], where)[0] for p, where in zip(ours, devices, strict=True)]
    a = OffloadedAdamW(ours, nvme_path=nvme_dir, host_memory=SMALL)
    b = OffloadedAdamW(there, nvme_path=nvme_dir, host_memory=SMALL, update_on=update_on)
    for seed in range(3):
        set_gradients(ours, seed=seed)
        give(ours, there)
        a.step()
        b.step()
        assert equal(ours, there)


@pytest.mark.parametrize("update_on", ["cpu", "cuda"])
def test_what_writes_to_parameters_between_steps_counts(sim, nvme_dir, update_on):
    ours = parameters(3000, 700, dtype=torch.bfloat16)
    device = on_sim(ours)
    a = OffloadedAdamW(ours, nvme_path=nvme_dir, host_memory=SMALL)
    b = OffloadedAdamW(device, nvme_path=nvme_dir, host_memory=SMALL, update_on=update_on)
    for seed, change in enumerate([None, torch.zero_, lambda p: p.clamp_(-0.1, 0.1)]):
        for tensors in (ours, device):
            if change is not None:
                change(tensors[0].data)
        set_gradients(ours, seed=seed)
        give(ours, device)
        a.step()
        b.step()
        assert equal(ours, device)
        assert not any(p.isnan().any() for p in ours)


def test_gradients_are_copied_as_they_are_and_no_copy_blocks(sim, nvme_dir):
    count = 5 * CHUNK + 10
    bytes_moved = {
        ("exact", torch.float32): 4 + 4 + 4,  # Gradient, parameter, back.
        ("exact", torch.bfloat16): 2 + 2 + 2,
        ("bf16", torch.bfloat16): 2 + 2 + 2,
        ("int8", torch.float16): 2 + 2 + 2,
        ("exact", torch.float32, torch.bfloat16): 2 + 4 + 4,
        ("bf16", torch.float32, torch.bfloat16): 2 + 4 + 4,
        ("exact", torch.bfloat16, torch.float32): 4 + 2 + 2,
    }
    for (state_format, dtype, *of_gradient), expected in bytes_moved.items():
        weight, optimizer = one(sim, nvme_dir, count, dtype, state_format=state_format)
        give([weight], [weight], *of_gradient)
        sim.reset()
        optimizer.step()
        assert sim.counts()["async_bytes"] == expected * count
        assert sim.counts()["async_copies"] == 3 * 6
        assert sim.counts()["sync_copies"] == 0
        assert sim.counts()["stale_copies"] == 0
        assert is_all(weight, -1.0)


def test_kernels_of_the_copy_stream_go_before_those_of_others(sim, nvme_dir):
    sim.reset()
    weight, optimizer = one(sim, nvme_dir)
    optimizer.step()
    assert sim.counts()["urgent_streams"] == 1


@pytest.mark.parametrize("update_on", ["cpu", "cuda"])
def test_the_step_waits_for_the_work_that_makes_the_gradient(sim, nvme_dir, update_on):
    weight, optimizer = one(sim, nvme_dir, update_on=update_on)
    sim.reset()
    sim.hold()
    weight.grad.fill_(-1.0)  # Queued; the device is late.
    with released_by(sim, threading.Thread(target=optimizer.step)):
        # All that can be queued before the host has to wait.
        sim.await_copies(2 if update_on == "cpu" else 4)
    assert is_all(weight, 1.0)


def test_the_next_chunk_is_on_its_way_while_one_is_awaited(sim, nvme_dir):
    weight, optimizer = one(sim, nvme_dir, 2 * CHUNK)
    sim.reset()
    sim.hold_copies()
    with released_by(sim, threading.Thread(target=optimizer.step)):
        sim.await_copies(4)
        # The first chunk is not updated before it is there.
        with pytest.raises(TimeoutError):
            sim.await_copies(5, timeout=0.3)
    assert is_all(weight, -1.0)


def test_work_after_the_step_sees_the_parameters(sim, nvme_dir):
    weight, optimizer = one(sim, nvme_dir)
    sim.hold_copies_after(2)
    optimizer.step()  # Its copy back is late.
    seen = weight.detach().clone()
    sim.settle()
    sim.release_copies()
    assert is_all(seen, -1.0)


def test_work_after_the_step_is_that_of_the_callers_stream(sim, nvme_dir):
    weight, optimizer = one(sim, nvme_dir)
    with torch.Stream("sim"):
        weight.grad.fill_(-1.0)
        sim.hold_copies_after(2)
        optimizer.step()
        seen = weight.detach().clone()
        sim.settle()
        sim.release_copies()
        assert is_all(seen, 1.0)


def test_a_commit_that_goes_on_has_what_was_queued_before_it(sim, nvme_dir):
    weight, optimizer = one(sim, nvme_dir)
    optimizer.step()
    sim.settle()
    sim.hold()
    with torch.no_grad():
        weight.fill_(7.0)  # Queued; the device is late.
    commit = optimizer.commit(wait=False)
    with pytest.raises(TimeoutError, match=r"within 0\.1\d* s; it goes on"):
        commit.wait_source(0.1)
    assert not commit.done()
    sim.release()
    optimizer.step()
    assert is_all(weight, 6.0)
    commit.wait()
    optimizer.rollback()
    assert is_all(weight, 7.0)


def test_a_parameter_may_be_dropped_after_the_step(sim, nvme_dir):
    weight, optimizer = one(sim, nvme_dir)
    sim.hold_copies_after(2)
    optimizer.step()
    optimizer.param_groups[0]["params"].clear()
    optimizer._slots.clear()
    optimizer.state.clear()
    del weight
    sim.settle()
    sim.release_copies()
    sim.settle()
    assert sim.counts()["stale_copies"] == 0


def test_memory_in_between_is_not_used_anew_before_its_copy_is_made(sim, nvme_dir):
    """By parameters on the CPU, and by another device."""
    for other in ("cpu", "sim:1"):
        first = torch.zeros(CHUNK).to("sim").requires_grad_()
        second = torch.zeros(9000, dtype=torch.bfloat16).to(other).requires_grad_()
        optimizer = OffloadedAdamW(
            [first, second],
            lr=1.0,
            weight_decay=0.0,
            nvme_path=nvme_dir,
            host_memory=SMALL,
        )
        for turn in range(1, 3):
            first.grad = torch.ones(CHUNK).to("sim")
            second.grad = torch.ones(9000, dtype=torch.bfloat16).to(other)
            sim.settle()
            sim.reset()
            # The first one's copy back is the third of the step.
            sim.hold_copies_after(2)
            thread = threading.Thread(target=optimizer.step)
            with released_by(sim, thread):
                sim.await_copies(3)
                thread.join(0.3)
            assert is_all(first, -float(turn)), other
            assert is_all(second, -float(turn)), other


def test_state_from_the_device_is_there_before_it_is_written(sim, nvme_dir):
    _, optimizer = one(sim, nvme_dir, 40_000, update_on="cuda")
    # There are five tiles, and none stays in memory. The first one's copies back are held.
    sim.hold_copies_after(2)
    thread = threading.Thread(target=optimizer.step)
    with released_by(sim, thread):
        thread.join(0.3)
    assert is_all(optimizer.state_dict()["state"][0]["exp_avg"], 0.1)


@pytest.mark.parametrize("call", ["state_dict", "close"])
def test_late_copies_come_before_what_takes_their_memory(sim, nvme_dir, call):
    weight, optimizer = one(sim, nvme_dir, 2 * CHUNK, state_format="bf16")
    sim.hold_copies_after(5)
    optimizer.step()
    thread = threading.Thread(target=getattr(optimizer, call))
    with released_by(sim, thread):
        thread.join(0.3)
    assert is_all(weight, -1.0)


@pytest.mark.parametrize("update_on", ["cpu", "cuda"])
def test_a_failed_copy_is_an_error_until_a_state_is_loaded(sim, nvme_dir, update_on):
    weight, optimizer = one(sim, nvme_dir, 2 * CHUNK, update_on=update_on)
    optimizer.step()
    state = optimizer.state_dict()
    sim.fail_copy(1)
    with pytest.raises(RuntimeError, match="on sim:0: .*the copy failed"):
        optimizer.step()
    for refused in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="the copy failed.*load it anew"):
            refused()
    weight.data.fill_(-1.0)
    optimizer.load_state_dict(state)
    optimizer.step()
    assert is_all(weight, -2.0)


def test_a_copy_back_that_fails_late_is_the_next_steps_error(sim, nvme_dir):
    weight, optimizer = one(sim, nvme_dir)
    state = optimizer.state_dict()
    sim.fail_copy(2)
    optimizer.step()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the copy failed"):
            optimizer.step()
    optimizer.load_state_dict(state)
    optimizer.step()
    assert is_all(weight, -1.0)


def test_a_copy_back_that_fails_last_is_the_error_of_close(sim, nvme_dir):
    _, optimizer = one(sim, nvme_dir)
    sim.fail_copy(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="the copy failed"):
        optimizer.close()


def test_memory_that_is_not_page_locked_is_logged_once(sim, nvme_dir, caplog):
    with caplog.at_level(logging.WARNING):
        _, optimizer = one(sim, nvme_dir)
        assert "page-locked" not in caplog.text
        optimizer.step()
        optimizer.step()
    assert caplog.text.count("host buffers are not page-locked for sim:0") == 1


def test_state_on_a_device_is_loaded(sim, nvme_dir):
    ours = parameters(3000, (20, 30))
    other = [p.detach().clone().requires_grad_() for p in ours]
    a = OffloadedAdamW(ours, nvme_path=nvme_dir, host_memory=SMALL)
    b = OffloadedAdamW(other, nvme_path=nvme_dir, host_memory=SMALL)
    set_gradients(ours, seed=0)
    a.step()
    state = a.state_dict()
    for entry in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            entry[name] = entry[name].to("sim")
    b.load_state_dict(state)
    for p, q in zip(ours, other, strict=True):
        q.data.copy_(p)
    set_gradients(ours, other, seed=1)
    a.step()
    b.step()
    assert equal(ours, other)


def test_gradients_of_another_order_are_taken(sim, nvme_dir):
    ours = parameters((60, 70))
    device = on_sim(ours)
    a = OffloadedAdamW(ours, nvme_path=nvme_dir, host_memory=SMALL)
    b = OffloadedAdamW(device, nvme_path=nvme_dir, host_memory=SMALL)
    gradient = torch.randn(70, 60)
    ours[0].grad = gradient.t()
    device[0].grad = gradient.to("sim").t()
    a.step()
    b.step()
    assert equal(ours, device)


def test_an_update_on_the_device_needs_its_parameters_there(sim, nvme_dir):
    on_device = {"nvme_path": nvme_dir, "host_memory": SMALL, "update_on": "cuda"}
    here = torch.zeros(10, requires_grad=True)
    with pytest.raises(ValueError, match='on the CPU, and update_on is "cuda"'):
        OffloadedAdamW([here], **on_device)
    there = torch.zeros(10).to("sim").requires_grad_()
    optimizer = OffloadedAdamW([there], **on_device)
    with pytest.raises(ValueError, match="on the CPU"):
        optimizer.add_param_group({"params": [here]})
    torch.utils.swap_tensors(there, here)
    there.grad = torch.ones(10)
    with pytest.raises(ValueError, match="on the CPU"):
        optimizer.step()
    assert is_all(there, 0.0)


def test_an_update_on_the_device_is_for_exact_state(sim, nvme_dir):
    there = torch.zeros(10).to("sim").requires_grad_()
    for state_format in ("bf16", "int8"):
        with pytest.raises(ValueError, match='update_on "cuda" is for state_format "exact"'):
            OffloadedAdamW(
                [there], nvme_path=nvme_dir, state_format=state_format, update_on="cuda"
            )
    with pytest.raises(ValueError, match='update_on must be "cpu" or "cuda", got "gpu"'):
        OffloadedAdamW([there], nvme_path=nvme_dir, update_on="gpu")
    with pytest.raises(TypeError, match="update_on must be"):
        OffloadedAdamW([there], nvme_path=nvme_dir, update_on=None)


@pytest.mark.parametrize("overlap", [False, "prefetch", "update"])
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
def test_a_chunk_may_be_updated_by_several_threads(
    sim, nvme_dir, state_format, gradients, overlap
):
    ours = parameters(200_000, dtype=torch.bfloat16)
    device = on_sim(ours)
    options = {"nvme_path": nvme_dir, "host_memory": "64MiB", "state_format": state_format}
    a = OffloadedAdamW(ours, **options)
    b = OffloadedAdamW(device, overlap_backward=overlap, **options)
    for seed in range(3):
        set_gradients(ours, seed=seed)
        give(ours, ours, gradients)
        give(ours, device, gradients)
        if overlap == "prefetch":
            b._on_gradient(device[0])
        a.step()
        b.step()
        assert equal(ours, device)
