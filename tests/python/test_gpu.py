"""What only a GPU can show: `pytest -m gpu`."""

import pytest
import torch

from torch_ext import TensorSwapper, aio_handle

pytestmark = pytest.mark.gpu


@pytest.fixture
def swapper(nvme_dir):
    with TensorSwapper(nvme_dir, host_memory="64MiB") as swapper:
        yield swapper


def long_kernel():
    torch.cuda._sleep(200_000_000)


@pytest.mark.parametrize("size", [0, 1, 4097, 9_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_cuda_tensors_come_back_exactly(swapper, size, dtype):
    tensor = torch.randint(-100, 100, (size,), device="cuda").to(dtype)
    swapper.swap_out("x", tensor)
    assert torch.equal(swapper.swap_in("x").result(), tensor)
    assert torch.equal(swapper.swap_in("x", device="cpu").result(), tensor.cpu())


def test_buffers_are_page_locked(swapper, caplog):
    swapper.swap_out("x", torch.zeros(10, device="cuda")).wait()
    swapper.stats()
    assert "page-locked" not in caplog.text


def test_swap_out_sees_the_kernels_queued_before_it(swapper):
    tensor = torch.zeros(4_000_000, device="cuda")
    for value in range(5):
        long_kernel()
        tensor.fill_(value)
        swapper.swap_out("x", tensor).wait_source()
        tensor.fill_(-1)
        assert bool((swapper.swap_in("x").result() == value).all())


def test_swap_in_waits_for_the_readers_of_out(swapper):
    swapper.swap_out("x", torch.full((4_000_000,), 7.0, device="cuda")).wait()
    out = torch.full((4_000_000,), 1.0, device="cuda")
    long_kernel()
    seen = out.clone()
    ticket = swapper.swap_in("x", out=out)
    ticket.wait()
    assert bool((seen == 1).all())
    assert bool((out == 7).all())


def test_swaps_overlap_a_long_kernel(swapper):
    tensor = torch.randn(1_000_000, device="cuda")
    swapper.swap_out("x", tensor).wait()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(4_000_000_000)
    ticket = swapper.swap_in("x")
    ticket.wait()
    while not ticket.done():
        pass
    assert not side.query()
    side.synchronize()


def test_tensors_may_be_dropped_at_once(swapper):
    for value in range(20):
        swapper.swap_out(str(value), torch.full((500_000,), value, device="cuda"))
    for value in range(20):
        assert bool((swapper.swap_in(str(value)).result() == value).all())


def test_a_swap_under_graph_capture_is_refused_and_the_capture_goes_on(swapper):
    tensor = torch.ones(1000, device="cuda")
    swapper.swap_out("x", tensor).wait()
    other = TensorSwapper("/var/tmp", host_memory="64MiB")
    busy = [other.swap_out(str(i), torch.randn(2_000_000, device="cuda")) for i in range(8)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensor.add_(1)
        with pytest.raises(RuntimeError, match="captured"):
            swapper.swap_out("x", tensor)
        with pytest.raises(RuntimeError, match="captured"):
            swapper.swap_in("x", out=tensor)
    for ticket in busy:
        ticket.wait()
    other.close()
    tensor.fill_(1)
    graph.replay()
    assert bool((tensor == 2).all())


def test_offloaded_adamw_trains_cuda_parameters(nvme_dir):
    from torch_ext import OffloadedAdamW

    def train(make):
        torch.manual_seed(0)
        model = torch.nn.Linear(300, 300).cuda()
        optimizer = make(model.parameters())
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(torch.ones(8, 300, device="cuda")).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours = train(lambda p: OffloadedAdamW(p, lr=1e-2, nvme_path=nvme_dir, host_memory="32MiB"))
    theirs = train(lambda p: torch.optim.AdamW(p, lr=1e-2))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("update_on", ["cpu", "cuda"])
def test_offloaded_adamw_sees_late_gradients_and_is_seen_by_later_work(nvme_dir, update_on):
    from torch_ext import OffloadedAdamW

    weight = torch.zeros(3_000_000, device="cuda", requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    optimizer = OffloadedAdamW(
        [weight], lr=1.0, weight_decay=0.0, nvme_path=nvme_dir, update_on=update_on
    )
    with torch.cuda.stream(torch.cuda.Stream()):
        for turn in range(1, 4):
            long_kernel()
            weight.grad.fill_(1.0)
            optimizer.step()
            seen = weight.detach().clone()
            assert torch.allclose(seen, torch.full_like(seen, -turn))


@pytest.mark.parametrize("update_on", ["cpu", "cuda"])
def test_the_optimizers_memory_is_page_locked(nvme_dir, update_on, caplog):
    from torch_ext import OffloadedAdamW

    weight = torch.zeros(1000, device="cuda", requires_grad=True)
    weight.grad = torch.ones_like(weight)
    OffloadedAdamW(
        [weight], nvme_path=nvme_dir, host_memory="32MiB", update_on=update_on
    ).step()
    assert "page-locked" not in caplog.text


def test_an_update_on_cuda_is_that_of_torchs_fused_kernel(nvme_dir):
    from torch_ext import OffloadedAdamW

    generator = torch.Generator("cuda").manual_seed(0)
    ours = [torch.randn(n, device="cuda", generator=generator) for n in (1, 999, 3_000_001)]
    theirs = [p.clone() for p in ours]
    optimizers = [
        OffloadedAdamW(ours, nvme_path=nvme_dir, host_memory="4MiB", update_on="cuda"),
        torch.optim.AdamW(theirs, fused=True),
    ]
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, device="cuda", generator=generator)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
def test_an_update_on_the_cpu_is_that_of_parameters_on_the_cpu(nvme_dir, state_format, dtype):
    from torch_ext import OffloadedAdamW

    here = torch.randn(300_001).to(dtype).requires_grad_()
    there = here.detach().cuda().requires_grad_()
    options = {"nvme_path": nvme_dir, "host_memory": "2MiB", "state_format": state_format}
    optimizers = [OffloadedAdamW([p], **options) for p in (here, there)]
    for _ in range(3):
        here.grad = torch.randn(here.shape).to(dtype)
        there.grad = here.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("overlap", ["prefetch", "update"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_overlap_changes_the_result(nvme_dir, overlap, dtype):
    from torch_ext import OffloadedAdamW

    sizes = [(700, 800), (300_001,), (7,)]
    trained = []
    for mode in (False, overlap):
        torch.manual_seed(0)
        parameters = [torch.randn(n, device="cuda").to(dtype).requires_grad_() for n in sizes]
        optimizer = OffloadedAdamW(
            parameters, nvme_path=nvme_dir, host_memory="8MiB", overlap_backward=mode
        )
        for _ in range(5):
            with torch.cuda.stream(torch.cuda.Stream()):
                gradients = [torch.randn_like(p) for p in parameters]
                long_kernel()  # Backward is late.
                torch.autograd.backward(parameters, gradients)
                optimizer.step()
                optimizer.zero_grad()
        trained.append([p.detach().cpu() for p in parameters])
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_on_cuda_keeps_the_masters_of_halves(nvme_dir, dtype):
    from torch_ext import OffloadedAdamW

    weight = torch.ones(100_000, device="cuda", dtype=dtype, requires_grad=True)
    optimizer = OffloadedAdamW(
        [weight], lr=1e-5, weight_decay=0.0, nvme_path=nvme_dir, update_on="cuda"
    )
    for _ in range(200):  # Each step alone is less than half of a bfloat16's last place.
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    master = optimizer.state_dict()["state"][0]["master_param"]
    assert torch.allclose(master, torch.full_like(master, 1 - 200e-5), atol=1e-5)
    assert torch.allclose(weight.float().cpu(), master, atol=4e-3)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elsewhere", ["cuda", "cpu"])
def test_a_training_that_was_committed_goes_on(nvme_dir, dtype, elsewhere, wait):
    from torch_ext import OffloadedAdamW

    start = [torch.randn(n).to(dtype) for n in (300_001, 7)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(6)]

    def make(device):
        return [p.detach().to(device).clone().requires_grad_() for p in start]

    def train(optimizer, parameters, steps):
        for turn in steps:
            for p, gradient in zip(parameters, gradients[turn], strict=True):
                p.grad = gradient.to(p.device)
            if parameters[0].is_cuda:
                long_kernel()
                parameters[0].grad.mul_(1)
            optimizer.step()

    options = {"nvme_path": nvme_dir, "host_memory": "2MiB"}
    whole, broken, resumed = make("cuda"), make("cuda"), make(elsewhere)
    with OffloadedAdamW(whole, **options) as optimizer:
        train(optimizer, whole, range(6))
    with OffloadedAdamW(broken, **options) as optimizer:
        train(optimizer, broken, range(3))
        commit = optimizer.commit(extra={"turn": 3}, wait=wait)
        train(optimizer, broken, range(3, 5))  # These are lost.
        commit.wait()
    with OffloadedAdamW.resume(nvme_dir, resumed, host_memory="4MiB") as optimizer:
        train(optimizer, resumed, range(optimizer.committed_extra["turn"], 6))
    assert all(torch.equal(p.cpu(), q.cpu()) for p, q in zip(whole, resumed, strict=True))


def test_aio_handle_moves_cuda_tensors_in_order_with_kernels(nvme_dir):
    name = str(nvme_dir / "x")
    with aio_handle(strict=True, host_memory="16MiB") as handle:
        tensor = torch.zeros(9_000_001, device="cuda")
        long_kernel()
        tensor.fill_(3)
        handle.async_pwrite(tensor, name, 5)
        assert handle.wait() == 1
        out = torch.ones_like(tensor)
        long_kernel()
        seen = out.clone()
        handle.async_pread(out, name, 5)
        assert handle.wait() == 1
        assert bool((out == 3).all())
        assert bool((seen == 1).all())


def test_locked_tensors_are_page_locked_for_the_gpu():
    with aio_handle() as handle:
        tensor = handle.new_cpu_locked_tensor(1000, torch.zeros(0))
        assert tensor.is_pinned()
        assert tensor[5:10].is_pinned()
