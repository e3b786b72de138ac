"""Where swap_in puts the bytes: views, other streams, keys that change meanwhile."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_ext import TensorSwapper


@pytest.fixture
def swapper(nvme_dir):
    with TensorSwapper(nvme_dir, host_memory="16MiB") as swapper:
        yield swapper


@pytest.mark.parametrize("shape", [(7, 5), (900, 300), (1, 40_000, 3)], ids=str)
def test_a_view_is_filled_when_its_ticket_is_done(swapper, shape):
    value = torch.randn(shape)
    swapper.swap_out("x", value).wait()
    out = torch.zeros(shape[::-1]).permute(*reversed(range(len(shape))))
    ticket = swapper.swap_in("x", out=out)
    while not ticket.done():
        pass
    assert torch.equal(out, value)


def test_a_view_is_filled_though_its_ticket_was_dropped(nvme_dir):
    out = torch.zeros(300, 400).t()
    with TensorSwapper(nvme_dir) as swapper:
        value = torch.randn(400, 300)
        swapper.swap_out("x", value)
        swapper.swap_in("x", out=out)
    assert torch.equal(out, value)


def test_each_stream_that_waits_sees_a_view_filled(sim, nvme_dir):
    base = torch.full((600, 1000), 7.0).to("sim")
    out = torch.zeros(1000, 600).to("sim").t()
    first, second = (torch.Stream(device="sim") for _ in range(2))
    with TensorSwapper(nvme_dir) as swapper:
        swapper.swap_out("x", base).wait()
        torch.accelerator.synchronize()
        sim.hold_copies()
        ticket = swapper.swap_in("x", out=out)
        copies = []
        for stream in (first, second):
            with stream:
                ticket.wait(timeout=60)
                copies.append(out.clone())
        sim.settle()
        sim.release_copies()
        torch.accelerator.synchronize()
    for copy in copies:
        assert bool((copy.cpu() == 7.0).all())


def test_a_lazily_conjugate_view_on_a_device_is_refused(sim, nvme_dir):
    base = torch.ones(30, 4, dtype=torch.complex64).to("sim")
    with TensorSwapper(nvme_dir) as swapper:
        swapper.swap_out("x", base).wait()
        with pytest.raises(ValueError, match="out is lazily conjugate"):
            swapper.swap_in("x", out=base.conj())
        assert torch.equal(swapper.swap_in("x", out=base).result().cpu(), base.cpu())


def test_a_value_comes_with_its_own_dtype_while_another_thread_rewrites_the_key(swapper):
    values = [torch.full((16,), 1.0), torch.full((32,), 2, dtype=torch.int16)]
    swapper.swap_out("x", values[0]).wait()
    stop = threading.Event()

    def rewrite():
        while not stop.is_set():
            for value in values:
                swapper.swap_out("x", value).wait()

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(3000):
            back = swapper.swap_in("x").result()
            assert any(back.dtype == v.dtype and torch.equal(back, v) for v in values)
    finally:
        stop.set()
        writer.join()


def resized():
    tensor = torch.randn(100)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut():
    tensor = torch.randn(10, 10)[2:]
    tensor.untyped_storage().resize_(396)
    return tensor


@pytest.mark.parametrize("make", [resized, cut])
def test_a_tensor_larger_than_its_storage_is_refused(swapper, make):
    swapper.swap_out("x", torch.randn(make().shape)).wait()
    for call in (
        lambda: swapper.swap_out("y", make()),
        lambda: swapper.swap_in("x", out=make()),
    ):
        with pytest.raises(ValueError, match="resized"):
            call()
    assert swapper.keys() == ["x"]


def test_tensors_that_only_pretend_to_have_memory_are_refused(swapper):
    swapper.swap_out("x", torch.randn(4)).wait()
    with pytest.raises(TypeError, match="swap_out: subclass or wrapper"):
        swapper.swap_out("y", torch._efficientzerotensor(4))
    with FakeTensorMode():
        with pytest.raises(RuntimeError, match="FakeTensorMode"):
            swapper.swap_in("x")
        with pytest.raises(RuntimeError, match="FakeTensorMode"):
            swapper.swap_out("y", torch.randn(4))
    with pytest.raises(TypeError, match="swap_in: meta"):
        swapper.swap_in("x", device="meta")
    assert swapper.keys() == ["x"]
