"""OffloadedOptimizer for parameters on a device, which here is simulated."""

import pytest
import torch
from generic_support import equal_states
from optim_support import SMALL, equal, parameters, set_gradients

from torch_ext import OffloadedOptimizer


def make(params, nvme_dir):
    return OffloadedOptimizer(
        torch.optim.RMSprop, params, momentum=0.9, nvme_path=nvme_dir, host_memory=SMALL
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_is_that_of_parameters_on_the_cpu(sim, nvme_dir, dtype):
    ours = parameters(1, 65, 30_000, (10, 70), 0, (), dtype=dtype)
    device = [p.detach().to("sim").requires_grad_() for p in ours]
    a, b = make(ours, nvme_dir), make(device, nvme_dir)
    for seed in range(4):
        set_gradients(ours, seed=seed)
        for p, q in zip(ours, device, strict=True):
            q.grad = p.grad.to("sim")
        a.step()
        b.step()
        assert equal(ours, device)
    of_a, of_b = a.state_dict(), b.state_dict()
    assert of_b["state"][2]["square_avg"].device.type == "cpu"
    assert equal_states(of_a, of_b)


def test_the_step_waits_for_the_work_that_makes_the_gradient(sim, nvme_dir):
    weight = torch.zeros(1000).to("sim").requires_grad_()
    weight.grad = torch.zeros(1000).to("sim")
    optimizer = OffloadedOptimizer(
        torch.optim.SGD, [weight], lr=1.0, momentum=0.9, nvme_path=nvme_dir
    )
    weight.grad.fill_(1.0)  # Queued; the device is late.
    optimizer.step()
    weight.data.mul_(2.0)
    assert torch.equal(weight.detach().cpu(), torch.full((1000,), -2.0))


def test_state_and_rates_on_a_device_are_taken(sim, nvme_dir):
    ours = parameters(3000, (20, 30))
    other = [p.detach().clone().requires_grad_() for p in ours]
    a, b = make(ours, nvme_dir), make(other, nvme_dir)
    set_gradients(ours, seed=0)
    a.step()
    state = a.state_dict()
    for entry in state["state"].values():
        for name in entry:
            entry[name] = entry[name].to("sim")
    b.load_state_dict(state)
    b.param_groups[0]["lr"] = torch.tensor(a.param_groups[0]["lr"]).to("sim")
    for p, q in zip(ours, other, strict=True):
        q.data.copy_(p)
    set_gradients(ours, other, seed=1)
    a.step()
    b.step()
    assert all(torch.allclose(p, q) for p, q in zip(ours, other, strict=True))
