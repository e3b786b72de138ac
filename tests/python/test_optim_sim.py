"""OffloadedAdamW for parameters on a device, which here is simulated."""

import pytest
import torch
from optim_support import SMALL, equal, parameters, set_gradients

from torch_ext import OffloadedAdamW


def on_sim(tensors):
    return [t.detach().to("sim").requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_is_that_of_parameters_on_the_cpu(sim, nvme_dir, dtype):
    ours = parameters(1, 65, 30_000, (10, 70), 0, (), dtype=dtype)
    device = on_sim(ours)
    a = OffloadedAdamW(ours, nvme_path=nvme_dir, host_memory=SMALL)
    b = OffloadedAdamW(device, nvme_path=nvme_dir, host_memory=SMALL)
    for seed in range(4):
        set_gradients(ours, seed=seed)
        for p, q in zip(ours, device, strict=True):
            q.grad = p.grad.to("sim")
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


def test_the_step_waits_for_the_work_that_makes_the_gradient(sim, nvme_dir):
    weight = torch.zeros(1000).to("sim").requires_grad_()
    weight.grad = torch.zeros(1000).to("sim")
    optimizer = OffloadedAdamW(
        [weight], lr=1.0, weight_decay=0.0, nvme_path=nvme_dir, host_memory=SMALL
    )
    weight.grad.fill_(1.0)  # Queued; the device is late.
    optimizer.step()
    weight.data.mul_(2.0)
    assert torch.allclose(weight.detach().cpu(), torch.full((1000,), -2.0))


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
