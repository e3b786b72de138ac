"""state_format: what the drive holds of the moments, and how it is rounded."""

import pytest
import torch
from optim_support import SMALL, HalfReference, equal, parameters, set_gradients, twins

from torch_ext import OffloadedAdamW

SIZES = [1, 255, 256, 257, 30_000, (70, 300), 0, ()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def make(nvme_dir):
    made = []

    def make(params, **options):
        options = {"host_memory": SMALL, "lr": 1e-2, **options}
        made.append(OffloadedAdamW(params, nvme_path=nvme_dir, **options))
        return made[-1]

    yield make
    for optimizer in made:
        optimizer.close()


def trained(make, params, steps=4, scale=1.0, **options):
    optimizer = make(params, **options)
    for seed in range(steps):
        set_gradients(params, seed=seed, scale=scale)
        optimizer.step()
    return optimizer


def moments(optimizer):
    return [
        entry[name]
        for entry in optimizer.state_dict()["state"].values()
        for name in ("exp_avg", "exp_avg_sq")
    ]


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_depends_on_nothing_but_the_seed(make, state_format, dtype):
    first = parameters(*SIZES, dtype=dtype)
    a = trained(make, first, state_format=state_format)
    before = torch.get_num_threads()
    others = [
        {"host_memory": "1MiB"},
        {"host_memory": "64MiB"},
        {"engine": "threads"},
        {"aio": {"block_size": 4096, "queue_depth": 3, "thread_count": 2}},
        {"threads": 1},
    ]
    for other in others:
        torch.set_num_threads(other.pop("threads", before))
        params = parameters(*SIZES, dtype=dtype)
        b = trained(make, params, state_format=state_format, **other)
        assert equal(first, params), other
        assert equal(moments(a), moments(b)), other
        b.close()
    torch.set_num_threads(before)
    params = parameters(*SIZES, dtype=dtype)
    trained(make, params, state_format=state_format, seed=1)
    assert not equal(first, params)


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
def test_the_order_of_training_does_not_matter(make, state_format):
    """Which parameters come first in the file depends on which had a gradient first."""
    whole, parts = parameters(30_000, 20_000), parameters(30_000, 20_000)
    trained(make, whole, steps=1, state_format=state_format)
    b = make(parts, state_format=state_format)
    set_gradients(parts, seed=0)
    first = parts[0].grad
    parts[0].grad = None
    b.step()
    parts[0].grad, parts[1].grad = first, None
    b.step()
    assert equal(whole, parts)


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_state_continues_bit_for_bit(make, state_format, dtype):
    ours = parameters(*SIZES, dtype=dtype)
    a = trained(make, ours, state_format=state_format)
    rest = twins(ours)
    b = make(rest, state_format=state_format)
    b.load_state_dict(a.state_dict())
    assert equal(moments(a), moments(b))
    for seed in range(10, 14):
        set_gradients(ours, rest, seed=seed)
        a.step()
        b.step()
        assert equal(ours, rest)


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_of_another_format_is_converted(make, state_format, dtype):
    ours = parameters(*SIZES, dtype=dtype)
    exact = trained(make, ours)
    packed = make(twins(ours), state_format=state_format)
    packed.load_state_dict(exact.state_dict())
    relative = 2**-7 if state_format == "bf16" else 2**-3
    for was, now in zip(moments(exact), moments(packed), strict=True):
        assert now.dtype == torch.float32
        least = was.abs().max() * 2**-17 if was.numel() else 0.0
        assert torch.all((was - now).abs() <= relative * was.abs() + least)


def bytes_per_step(optimizer, params):
    set_gradients(params, seed=0)
    for _ in range(2):
        optimizer.step()
    before = optimizer.stats()
    for _ in range(12):
        optimizer.step()
    optimizer.close()
    after = optimizer.stats()
    names = ("bytes_read", "bytes_written")
    # What the last step reads ahead and the first had read before cancel out, but for a
    # buffer here and there.
    return sum(after[name] - before[name] for name in names) / 12


@pytest.mark.parametrize(
    ("dtype", "state_format", "expected"),
    [
        (torch.float32, "exact", 16.0),
        (torch.bfloat16, "exact", 20.0),
        (torch.float16, "exact", 24.0),
        (torch.float32, "bf16", 8.0),
        (torch.bfloat16, "bf16", 12.0),
        (torch.bfloat16, "int8", 8.016),
    ],
    ids=str,
)
def test_a_step_moves_no_more_bytes_than_the_format_has(make, dtype, state_format, expected):
    params = parameters(2_000_000, dtype=dtype)
    optimizer = make(params, state_format=state_format, host_memory="2MiB")
    moved = bytes_per_step(optimizer, params) / 2_000_000
    assert expected * 0.98 <= moved <= expected * 1.02


@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_nan_stays_with_its_elements(make, state_format, dtype):
    ours = parameters(1000, dtype=dtype)
    theirs = [p.detach().float().requires_grad_() for p in ours]
    a, b = make(ours, state_format=state_format), torch.optim.AdamW(theirs, lr=1e-2, fused=True)
    for seed in range(3):
        set_gradients(ours, seed=seed)
        set_gradients(theirs, seed=seed)
        if seed == 1:
            ours[0].grad[5] = theirs[0].grad[5] = float("nan")
            ours[0].grad[700] = theirs[0].grad[700] = float("inf")
        a.step()
        b.step()
    nan = theirs[0].isnan()
    assert nan.sum() == 2
    assert torch.equal(ours[0].isnan(), nan)


@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
def test_whatever_is_written_to_a_bf16_parameter_counts(make, state_format):
    ours = parameters(5000, 3000, dtype=torch.bfloat16)
    a = trained(make, ours, state_format=state_format)
    extremes = torch.tensor([0.0, -0.0, 3.38e38, float("inf"), -float("inf"), 1e-40])
    for seed, write in enumerate(
        [
            lambda p: p.zero_(),
            lambda p: p.clamp_(-0.01, 0.01),
            lambda p: p.neg_(),
            lambda p: p.copy_(extremes.to(torch.bfloat16).repeat(1000)[: p.numel()]),
        ]
    ):
        for p in ours:
            write(p.data)
        before = [p.detach().clone() for p in ours]
        for group in a.param_groups:
            group["lr"] = 0.0
        set_gradients(ours, seed=seed)
        a.step()
        assert equal(ours, before)  # A learning rate of 0 changes nothing.
        for group in a.param_groups:
            group["lr"] = 1e-2
        set_gradients(ours, seed=10 + seed)
        a.step()
        assert not any(p.isnan().any() for p in ours)


def test_exact_means_the_master_bit_for_bit_for_200_steps(make):
    ours = parameters(1, 65, 9000, (50, 60), dtype=torch.bfloat16)
    halves = twins(ours)
    a = make(ours, lr=1e-3)
    reference = HalfReference(halves, lr=1e-3)
    for seed in range(200):
        set_gradients(ours, seed=seed, scale=0.1)
        a.step()
        reference.step([p.grad for p in ours])
    assert equal(ours, halves)
    masters = [entry["master_param"] for entry in a.state_dict()["state"].values()]
    assert equal(masters, reference.masters)


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
def test_packed_moments_follow_those_of_torch(make, state_format):
    """Where the moments have settled, so does their ratio, the step."""
    ours = parameters(4096)
    theirs = twins(ours)
    a = make(ours, lr=2e-2, state_format=state_format, betas=(0.9, 0.99))
    b = torch.optim.AdamW(theirs, lr=2e-2, betas=(0.9, 0.99), fused=True)
    target = torch.randn(4096, generator=torch.Generator().manual_seed(3))
    for _ in range(600):
        for optimizer, (p,) in ((a, ours), (b, theirs)):
            p.grad = (p.detach() - target) * 2
            optimizer.step()
    for p in (*ours, *theirs):
        assert torch.all((p.detach() - target).abs() < 0.1)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"state_format": "fp8"}, ValueError, 'state_format must be .*\'?"fp8"'),
        ({"state_format": None}, TypeError, "state_format"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"seed": "1"}, TypeError, "seed"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(make, options, error, text):
    with pytest.raises(error, match=text):
        make(parameters(10), **options)
