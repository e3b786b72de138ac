"""What a forked child makes for itself works, though its parent has computed before."""

import os
import signal
import time

import pytest
import torch

from torch_ext import OffloadedAdamW, OffloadedOptimizer, TensorSwapper, aio_handle

SIZE = 1 << 18  # Enough that PyTorch uses several threads.


def in_children(work, count):
    """Runs it in forked children, one after the other; it returns whether all is right."""
    for _ in range(count):
        child = os.fork()
        if child == 0:
            code = 2
            try:
                code = 0 if work() else 1
            finally:
                os._exit(code)
        deadline = time.monotonic() + 60
        ended = 0
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the child hangs")
        assert os.waitstatus_to_exitcode(status) == 0


def parameters(dtype=torch.float32):
    values = torch.linspace(-1, 1, SIZE).to(dtype)
    ps = [torch.nn.Parameter(values.clone()) for _ in range(2)]
    for p in ps:
        p.grad = torch.ones_like(p)
    return ps


@pytest.fixture(autouse=True)
def threads():
    """Gives PyTorch several threads that have worked. A child lacks them."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    (torch.ones(1 << 20) + 1).sum()
    yield
    torch.set_num_threads(before)


ONES = torch.ones(SIZE)  # Made before: PyTorch's own operators hang in a child.


def step(optimizer, ps):
    for p in ps:
        p.grad = ONES
    optimizer.step()


def expected(optimizer_class, steps, **options):
    ps = parameters()
    other = optimizer_class(ps, **options)
    for _ in range(steps):
        other.step()
    return [p.detach().clone() for p in ps]


@pytest.mark.parametrize("overlap", [False, "update"])
def test_an_optimizer_of_a_child_steps_saves_and_loads(nvme_dir, overlap):
    def make(ps):
        return OffloadedAdamW(
            ps, nvme_path=nvme_dir, host_memory="1MiB", overlap_backward=overlap
        )

    right = [bytes(p.numpy().data) for p in expected(torch.optim.AdamW, 6, fused=True)]
    ps = parameters()
    optimizer = make(ps)
    # The pool's threads wait to be woken, which those of the child never do.
    for _ in range(3):
        step(optimizer, ps)
    ours = parameters()

    def work():
        own = make(ours)
        for _ in range(3):
            step(own, ours)
        state = own.state_dict()
        other = make(ours)
        other.load_state_dict(state)
        for _ in range(3):
            step(other, ours)
        return [bytes(p.detach().numpy().data) for p in ours] == right

    in_children(work, 4)
    step(optimizer, ps)
    optimizer.close()


def test_any_class_steps_in_a_child(nvme_dir):
    options = {"lr": 0.1, "momentum": 0.9}
    right = [
        bytes(p.numpy().data) for p in expected(torch.optim.SGD, 2, foreach=False, **options)
    ]
    ours = parameters()

    def work():
        own = OffloadedOptimizer(
            torch.optim.SGD, ours, nvme_path=nvme_dir, host_memory="1MiB", **options
        )
        for _ in range(2):
            own.step()
        return [bytes(p.detach().numpy().data) for p in ours] == right

    in_children(work, 2)


def test_a_swapper_of_a_child_moves_tensors(nvme_dir):
    tensor = torch.arange(2 * SIZE, dtype=torch.float32).view(2, SIZE).t()  # Is packed first.
    right = bytes(tensor.contiguous().numpy().data)
    parent = TensorSwapper(nvme_dir, host_memory="8MiB")
    parent.swap_out("x", tensor).wait()

    def work():
        with TensorSwapper(nvme_dir, host_memory="8MiB") as own:
            own.swap_out("x", tensor)
            return bytes(own.swap_in("x").result(timeout=60).numpy().data) == right

    in_children(work, 3)
    parent.close()


def test_a_handle_of_a_child_moves_tensors(nvme_dir):
    tensor = torch.arange(SIZE, dtype=torch.float32)
    parent = aio_handle(strict=True, host_memory="8MiB")
    parent.sync_pwrite(tensor, str(nvme_dir / "parent"))
    back = torch.empty(SIZE)

    def work():
        with aio_handle(strict=True, host_memory="8MiB") as own:
            own.sync_pwrite(tensor, str(nvme_dir / "child"))
            own.sync_pread(back, str(nvme_dir / "child"))
        return back.numpy().tobytes() == tensor.numpy().tobytes()

    in_children(work, 3)
    parent.close()


def test_what_a_child_is_told_works(nvme_dir):
    ps = parameters()
    optimizer = OffloadedAdamW(ps, nvme_path=nvme_dir, host_memory="1MiB")
    optimizer.step()

    def work():
        try:
            optimizer.step()
        except RuntimeError as error:
            if "torch.set_num_threads(1)" not in str(error):
                return False
        torch.set_num_threads(1)
        own = OffloadedAdamW(ps, nvme_path=nvme_dir, host_memory="1MiB")
        # Not by backward(): PyTorch refuses it in a child once the parent has had
        # gradients on a device, as the simulated one's tests have.
        for p in ps:
            p.grad = 2 * p.detach()
        own.step()
        return bool((ps[0] != 0).any())

    in_children(work, 2)
    optimizer.close()
