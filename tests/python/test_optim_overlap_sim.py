"""Updates while backward goes on, of parameters on a device, which is simulated."""

import threading

import pytest
import torch
from optim_support import SMALL
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
