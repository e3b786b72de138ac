"""aio_handle with tensors on a device whose streams really are late."""

import signal

import pytest
import torch

from torch_ext import aio_handle

CHUNK = 4 << 20


@pytest.fixture
def handle(sim):
    with aio_handle(strict=True, host_memory="16MiB") as handle:
        yield handle
        sim.release()
        sim.release_copies()


@pytest.mark.parametrize("size", [0, 1, 1000, 2 * CHUNK + 3])
@pytest.mark.parametrize("offset", [0, 5])
def test_device_tensors_come_back(handle, nvme_dir, size, offset):
    name = str(nvme_dir / "x")
    tensor = torch.arange(size, dtype=torch.float32)
    assert handle.sync_pwrite(tensor.to("sim"), name, offset) == 1
    back = torch.zeros(size, device="sim:1")
    assert handle.sync_pread(back, name, offset) == 1
    assert torch.equal(back.cpu(), tensor)


def test_a_write_sees_the_work_queued_before_it(sim, handle, nvme_dir):
    name = str(nvme_dir / "x")
    tensor = torch.ones(CHUNK).to("sim")
    sim.hold()
    tensor.fill_(7.0)
    handle.async_pwrite(tensor, name)
    del tensor
    with pytest.raises(TimeoutError):
        handle.wait(timeout=0.05)
    sim.release()
    assert handle.wait() == 1
    assert torch.equal(torch.from_file(name, size=CHUNK), torch.full((CHUNK,), 7.0))


def test_work_queued_after_wait_comes_after_what_was_read(sim, handle, nvme_dir):
    name = str(nvme_dir / "x")
    handle.sync_pwrite(torch.full((1000,), 3.0), name)
    target = torch.zeros(1000).to("sim")
    torch.accelerator.synchronize()
    sim.hold_copies()
    handle.async_pread(target, name)
    assert handle.wait() == 1
    target.fill_(9.0)
    sim.settle()
    sim.release_copies()
    torch.accelerator.synchronize()
    assert bool((target.cpu() == 9).all())


def test_what_a_handler_raises_during_wait_is_not_the_operations(sim, handle, nvme_dir):
    name = str(nvme_dir / "x")

    def alarm(*_):
        raise RuntimeError("of a handler")

    tensor = torch.ones(1000).to("sim")
    sim.hold()
    handle.async_pwrite(tensor, name)
    before = signal.signal(signal.SIGALRM, alarm)
    try:
        # Again: Python may be between two waits when the first comes.
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        with pytest.raises(RuntimeError, match="of a handler"):
            handle.wait(timeout=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sim.release()
    assert handle.errors == []
    assert handle.wait() == 1


def test_validate_sees_what_the_current_stream_was_to_do(sim, handle, nvme_dir):
    name = str(nvme_dir / "x")
    handle.sync_pwrite(torch.full((1000,), 3.0), name)
    with torch.Stream("sim"):
        target = torch.zeros(1000, device="sim")
        assert handle.read(target, name, True) == 0
        assert handle.write(target.mul_(2), name, True) == 0
    assert torch.equal(torch.from_file(name, size=1000), torch.full((1000,), 6.0))
