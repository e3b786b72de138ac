"""TensorSwapper's stream contract, on a device whose streams really are late."""

import gc

import pytest
import torch

from torch_ext import TensorSwapper

CHUNK = 4 << 20


@pytest.fixture
def swapper(sim, nvme_dir):
    with TensorSwapper(nvme_dir, host_memory="16MiB") as swapper:
        yield swapper
        sim.release()
        sim.release_copies()


def filled(value, size=3 * CHUNK // 4):
    return torch.full((size,), float(value)).to("sim")


def is_all(tensor, value):
    return bool((tensor.cpu() == value).all())


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK, 2 * CHUNK + 3])
def test_device_tensors_come_back_to_any_device(swapper, size):
    tensor = torch.arange(size, dtype=torch.float32)
    swapper.swap_out("x", tensor.to("sim"))
    back = swapper.swap_in("x").result()
    assert back.device == torch.device("sim:0")
    assert torch.equal(back.cpu(), tensor)
    assert torch.equal(swapper.swap_in("x", device="cpu").result(), tensor)
    other = swapper.swap_in("x", device="sim:1").result()
    assert other.device == torch.device("sim:1")
    assert torch.equal(other.cpu(), tensor)


def test_swap_out_sees_the_work_queued_before_it(sim, swapper):
    tensor = filled(1)
    sim.hold()
    tensor.fill_(7.0)
    ticket = swapper.swap_out("x", tensor)
    sim.await_copies(1)
    sim.settle()
    assert not ticket.done()
    sim.release()
    ticket.wait(timeout=60)
    assert is_all(swapper.swap_in("x", device="cpu").result(), 7.0)


@pytest.mark.parametrize("timeout", [0, 0.05, 0.001])
def test_a_timeout_names_operation_key_and_the_time_given(sim, swapper, timeout):
    key = "a did not end within b"
    tensor = filled(1, size=2 * CHUNK)  # More than the buffers hold.
    sim.hold()
    out, back = swapper.swap_out(key, tensor), swapper.swap_in(key)
    for wait, name in [
        (out.wait, "swap_out"),
        (out.wait_source, "swap_out"),
        (back.wait, "swap_in"),
        (back.result, "swap_in"),
    ]:
        with pytest.raises(TimeoutError) as info:
            wait(timeout=timeout)
        assert str(info.value) == (
            f"{name} of '{key}' did not end within {timeout} s; it goes on"
        )
    sim.release()
    assert is_all(back.result(timeout=60), 1.0)


def test_swap_in_waits_for_the_readers_of_out(sim, swapper):
    swapper.swap_out("x", filled(7)).wait()
    out = filled(1)
    torch.accelerator.synchronize()
    queued = sim.counts()["async_copies"]
    sim.hold()
    seen = torch.empty(out.shape).copy_(out, non_blocking=True)
    ticket = swapper.swap_in("x", out=out)
    sim.await_copies(queued + 2)
    sim.settle()
    sim.release()
    ticket.wait(timeout=60)
    torch.accelerator.synchronize()
    assert is_all(seen, 1.0)
    assert is_all(out, 7.0)


def test_after_wait_source_the_source_may_be_overwritten(sim, swapper):
    tensor = filled(1)
    torch.accelerator.synchronize()
    sim.hold_copies()
    ticket = swapper.swap_out("x", tensor)
    ticket.wait_source(timeout=60)
    tensor.fill_(7.0)
    sim.settle()
    sim.release_copies()
    ticket.wait(timeout=60)
    assert is_all(swapper.swap_in("x", device="cpu").result(), 1.0)


def test_work_queued_after_wait_sees_what_swap_in_brings(sim, swapper):
    swapper.swap_out("x", filled(7)).wait()
    out = filled(1)
    torch.accelerator.synchronize()
    sim.hold_copies()
    ticket = swapper.swap_in("x", out=out)
    ticket.wait(timeout=60)
    assert not ticket.done()
    out.fill_(9.0)
    sim.settle()
    sim.release_copies()
    torch.accelerator.synchronize()
    assert is_all(out, 9.0)


def test_after_wait_the_destination_may_be_used_again_though_its_copy_is_late(sim, swapper):
    for key in ("a", "b"):
        swapper.swap_out(key, filled(ord(key))).wait()
    out = filled(1)
    sim.settle()
    sim.hold_copies()
    swapper.swap_in("a", out=out).wait(timeout=60)
    second = swapper.swap_in("b", out=out)
    sim.release_copies()
    second.wait(timeout=60)
    assert is_all(out, ord("b"))


def test_wait_joins_the_stream_that_is_current_then(sim, swapper):
    swapper.swap_out("x", filled(7)).wait()
    sim.hold_copies()
    ticket = swapper.swap_in("x")
    with torch.Stream(device="sim") as side:
        result = ticket.result(timeout=60)
        result.fill_(9.0)
        sim.settle()
        sim.release_copies()
        side.synchronize()
        assert is_all(result, 9.0)


def test_a_tensor_that_is_not_contiguous_is_packed_on_its_stream(sim, swapper):
    base = torch.arange(600_000, dtype=torch.float32).view(600, 1000).to("sim")
    swapper.swap_out("x", base.t()).wait()
    expected = base.cpu().t()
    assert torch.equal(swapper.swap_in("x").result().cpu(), expected)
    out = torch.zeros(600, 1000).to("sim").t()
    assert torch.equal(swapper.swap_in("x", out=out).result().cpu(), expected)


def test_source_and_destination_may_be_dropped_at_once(sim, swapper):
    sim.hold_copies()
    ticket = swapper.swap_out("x", filled(7))
    gc.collect()
    poison = [filled(3) for _ in range(4)]
    sim.release_copies()
    ticket.wait(timeout=60)
    sim.hold_copies()
    swapper.swap_in("x")
    gc.collect()
    poison += [filled(4) for _ in range(4)]
    sim.release_copies()
    torch.accelerator.synchronize()
    assert sim.counts()["stale_copies"] == 0
    for tensor, value in zip(poison, [3] * 4 + [4] * 4, strict=True):
        assert is_all(tensor, value)
    assert is_all(swapper.swap_in("x", device="cpu").result(), 7.0)


def test_a_swap_out_behind_a_long_kernel_does_not_hold_up_swap_ins(sim, swapper):
    swapper.swap_out("x", filled(7)).wait()
    busy = filled(1)
    out = filled(0)
    torch.accelerator.synchronize()
    with torch.Stream(device="sim"):
        sim.hold()
        held = torch.accelerator.current_stream()
        waiting = swapper.swap_out("busy", busy)
    ticket = swapper.swap_in("x", out=out)
    ticket.wait(timeout=60)
    while not ticket.done():
        pass
    assert not waiting.done()
    sim.release(held)
    waiting.wait(timeout=60)
    assert is_all(out, 7.0)


def test_a_copy_that_fails_raises_and_the_key_keeps_its_value(sim, swapper):
    swapper.swap_out("x", filled(1)).wait()
    sim.fail_copy()
    with pytest.raises(RuntimeError, match="copy"):
        swapper.swap_out("x", filled(2)).wait()
    assert is_all(swapper.swap_in("x", device="cpu").result(), 1.0)
    swapper.swap_out("x", filled(3)).wait()
    assert is_all(swapper.swap_in("x").result(), 3.0)


def test_copies_are_asynchronous_and_in_chunks(sim, swapper):
    swapper.swap_out("x", filled(1, 3 * CHUNK // 4 * 2)).wait()
    assert sim.counts()["async_copies"] == 6


def test_memory_of_the_device_is_given_back(sim, swapper):
    gc.collect()  # What the tests before have left.
    before = sim.counts()["live_bytes"]
    for i in range(10):
        swapper.swap_out(str(i), filled(i))
        swapper.swap_in(str(i))
    swapper.close()
    gc.collect()
    assert sim.counts()["live_bytes"] == before


def test_threads_with_their_own_streams_share_a_swapper(sim, swapper):
    import threading

    wrong = []

    def work(value):
        with torch.Stream(device="sim"):
            for i in range(8):
                tensor = torch.empty(200_000, device="sim").fill_(float(value + i))
                swapper.swap_out(str(value), tensor).wait_source(timeout=60)
                tensor.fill_(-1.0)
                back = swapper.swap_in(str(value)).result(timeout=60)
                if not is_all(back, value + i):
                    wrong.append((value, i))

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
