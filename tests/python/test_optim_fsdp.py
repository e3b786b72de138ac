"""OffloadedAdamW over the shards of FSDP2: several processes, one directory."""

import os
import weakref
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optim_support import SMALL, HalfReference, equal
from ranks import Ranks
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from torch_ext import OffloadedAdamW
from torch_ext.optim._dtensor import first_element

LR = 1e-2


@pytest.fixture(scope="module")
def ranks():
    """The processes, by their number."""
    groups = {world: Ranks(world) for world in (2, 4)}
    yield groups
    for group in groups.values():
        group.close()


class Net(torch.nn.Module):
    """With parameters of which some ranks have less than others, or nothing."""

    def __init__(self, width=701):
        super().__init__()
        self.first = torch.nn.Linear(64, width)
        self.second = torch.nn.Linear(width, 45)
        self.third = torch.nn.Linear(45, 3)
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = torch.nn.functional.gelu(self.second(torch.nn.functional.gelu(self.first(x))))
        return self.third(x) * self.scale


def sharded(dtype=torch.float32, **options):
    torch.manual_seed(1)
    model = Net().to(dtype)
    for layer in (model.first, model.second):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def offloaded(model, directory, **options):
    options = {"lr": LR, "host_memory": SMALL} | options
    return OffloadedAdamW(model.parameters(), nvme_path=directory, **options)


def shards(model):
    with torch.no_grad():
        return [p.to_local() for p in model.parameters()]


def forward_backward(model, seed):
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(100 * seed + rank)
    dtype = next(model.parameters()).dtype
    x, target = (torch.randn(8, n, generator=generator, dtype=dtype) for n in (64, 3))
    loss = torch.nn.functional.mse_loss(model(x).float(), target.float())
    loss.backward()
    return loss.item()


def train(model, optimizer, seeds, clip=None):
    losses = []
    for seed in seeds:
        optimizer.zero_grad()
        losses.append(forward_backward(model, seed))
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            losses.append(norm.full_tensor().item())
        optimizer.step()
    return losses


def differences(directory, steps, clip, make):
    """Trains in memory and offloaded; says what is not equal."""
    ours, theirs = make(), make()
    a = offloaded(ours, directory)
    b = torch.optim.AdamW(theirs.parameters(), lr=LR, fused=True)
    losses = train(ours, a, range(steps), clip)
    found = [] if losses == train(theirs, b, range(steps), clip) else ["losses"]
    found += [] if equal(shards(ours), shards(theirs)) else ["parameters"]
    assert len(set(losses)) == len(losses)
    assert os.listdir(directory) == []  # While all of them have their files there.
    for p, entry in a.state_dict()["state"].items():
        same = b.state_dict()["state"][p]
        for name in ("exp_avg", "exp_avg_sq"):
            assert isinstance(entry[name], DTensor)
            assert entry[name].placements == same[name].placements
            if not torch.equal(entry[name].to_local(), same[name].to_local()):
                found.append(f"{name} of {p}")
    return found, a.stats()["bytes_written"], min(s.numel() for s in shards(ours))


def test_200_steps_on_two_ranks_are_bit_identical(ranks, nvme_dir):
    results = ranks[2].run(differences, nvme_dir, 200, None, sharded)
    for found, written, _ in results:
        assert found == []
        assert written > 0
    assert min(least for *_, least in results) == 0


def overlapped_differences(directory, steps, **more):
    """As ``differences``, with updates during backward."""
    ours, theirs = sharded(), sharded()
    a = offloaded(ours, directory, overlap_backward="update", **more)
    b = torch.optim.AdamW(theirs.parameters(), lr=LR, fused=True)
    losses = train(ours, a, range(steps))
    others = []
    for seed in range(steps):
        b.zero_grad()
        others.append(forward_backward(theirs, seed))
        if more:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), more["max_grad_norm"])
        b.step()
    same = equal(shards(ours), shards(theirs))
    return losses == others and same, a.stats()["steps"]


@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.1}], ids=["free", "clipped"])
def test_updates_during_backward_are_bit_identical(ranks, nvme_dir, more):
    run = partial(overlapped_differences, **more)
    assert ranks[2].run(run, nvme_dir, 20) == [(True, 20)] * 2


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_clipped_over_all_ranks_are_bit_identical(ranks, nvme_dir, world):
    for found, *_ in ranks[world].run(differences, nvme_dir, 20, 0.1, sharded):
        assert found == []


@pytest.mark.parametrize(
    "options",
    [
        {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
        # Pinning, the default, is refused by torch itself where there is no GPU.
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"reshard_after_forward": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_policies_of_fsdp_do_not_matter(ranks, nvme_dir, options):
    make = partial(sharded, **options)
    for found, *_ in ranks[2].run(differences, nvme_dir, 20, 1.0, make):
        assert found == []


def replicated_shards():
    return sharded(mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))


def tensor_parallel_shards():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "parts"))
    torch.manual_seed(1)
    model = Net(width=700)
    plan = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    return fully_shard(parallelize_module(model, mesh["parts"], plan), mesh=mesh["shards"])


@pytest.mark.parametrize("make", [replicated_shards, tensor_parallel_shards])
def test_meshes_of_two_dimensions_are_bit_identical(ranks, nvme_dir, make):
    for found, *_ in ranks[4].run(differences, nvme_dir, 10, None, make):
        assert found == []


def halves_differ(directory, steps):
    ours, theirs = sharded(torch.bfloat16), sharded(torch.bfloat16)
    a = offloaded(ours, directory)
    b = HalfReference(shards(theirs), lr=LR)
    losses, others = [], []
    for seed in range(steps):
        losses += train(ours, a, [seed])
        theirs.zero_grad()
        others.append(forward_backward(theirs, seed))
        b.step([p.grad.to_local() for p in theirs.parameters()])
    masters = [entry["master_param"].to_local() for entry in a.state_dict()["state"].values()]
    b.refresh()
    assert len(set(losses)) > steps / 2
    return losses == others, equal(shards(ours), shards(theirs)), equal(masters, b.masters)


@pytest.mark.parametrize(("world", "steps"), [(2, 100), (4, 20)])
def test_bfloat16_shards_have_masters_bit_for_bit(ranks, nvme_dir, world, steps):
    results = ranks[world].run(halves_differ, nvme_dir, steps)
    assert results == [(True, True, True)] * world


def rounded_stochastically(directory, state_format, dtype, distribute):
    """The state and the parameter of five steps, whole."""
    whole = torch.randn(512, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    parameter = torch.nn.Parameter(distribute(whole))
    optimizer = OffloadedAdamW(
        [parameter], lr=LR, nvme_path=directory, host_memory=SMALL, state_format=state_format
    )
    for seed in range(5):
        gradient = torch.randn(512, 256, generator=torch.Generator().manual_seed(seed))
        parameter.grad = distribute(gradient.to(dtype))
        optimizer.step()
    entry = optimizer.state_dict()["state"][0]
    tensors = [parameter.detach(), entry["exp_avg"], entry["exp_avg_sq"]]
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def rounded_in_shards(directory, state_format, dtype):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return rounded_stochastically(
        directory, state_format, dtype, lambda t: distribute_tensor(t, mesh, [Shard(0)])
    )


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_does_not_depend_on_the_number_of_ranks(ranks, nvme_dir, state_format, dtype):
    alone = rounded_stochastically(nvme_dir, state_format, dtype, lambda t: t)
    for world in (2, 4):
        for shards in ranks[world].run(rounded_in_shards, nvme_dir, state_format, dtype):
            assert equal(shards, alone)


def first_elements(shape, mesh_shape, placements):
    mesh = init_device_mesh("cpu", mesh_shape)
    return first_element(distribute_tensor(torch.zeros(shape), mesh, placements))


def test_the_place_of_a_shard_is_that_of_its_first_element(ranks):
    def places(*args):
        return ranks[4].run(first_elements, *args)

    assert places((10, 3), (4,), [Shard(0)]) == [0, 9, 18, 27]
    assert places((3,), (4,), [Shard(0)]) == [0, 1, 2, 3]
    assert places((8, 3), (2, 2), [Replicate(), Shard(0)]) == [0, 12, 0, 12]
    assert places((8, 3), (2, 2), [Shard(0), Shard(0)]) == [0, 6, 12, 18]
    # Columns lie apart from one another: no two ranks share the numbers of a row.
    assert places((2, 8), (4,), [Shard(1)]) == [n << 32 for n in (0, 2, 4, 6)]


def go_on_alike(source, a, target, b):
    target.load_state_dict(source.state_dict())
    losses = train(source, a, range(3, 6))
    return losses == train(target, b, range(3, 6)), equal(shards(source), shards(target))


def resumed(directory, dtype, options):
    """Whether a state that went through DCP's functions goes on bit for bit."""
    options = dcp_state.StateDictOptions(**options)
    source, target = sharded(dtype), sharded(dtype)
    a, b = offloaded(source, directory), offloaded(target, directory)
    train(source, a, range(3))
    state = dcp_state.get_optimizer_state_dict(source, a, options=options)
    dcp_state.set_optimizer_state_dict(target, b, state, options=options)
    return go_on_alike(source, a, target, b)


@pytest.mark.parametrize(
    "options",
    [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}],
    ids=["sharded", "flat", "full"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dcp_brings_shards_of_the_state_back(ranks, nvme_dir, dtype, options):
    assert ranks[2].run(resumed, nvme_dir, dtype, options) == [(True, True)] * 2


def resumed_through(directory, kind):
    source, target = sharded(), sharded()
    a, b = offloaded(source, directory), offloaded(target, directory)
    train(source, a, range(3))
    state = a.state_dict()
    if kind == "torch":
        between = torch.optim.AdamW(sharded().parameters(), lr=LR, fused=True)
        between.load_state_dict(state)
        state = between.state_dict()
    elif kind == "plain tensors":
        state["state"] = {
            p: {k: v.to_local() if isinstance(v, DTensor) else v for k, v in entry.items()}
            for p, entry in state["state"].items()
        }
    b.load_state_dict(state)
    return go_on_alike(source, a, target, b)


@pytest.mark.parametrize("kind", ["torch", "plain tensors"])
def test_shards_of_the_state_are_loaded_without_dcp(ranks, nvme_dir, kind):
    assert ranks[4].run(resumed_through, nvme_dir, kind) == [(True, True)] * 4


def save_checkpoint(directory, checkpoint):
    model = sharded()
    optimizer = offloaded(model, directory)
    train(model, optimizer, range(3))
    state = dcp_state.get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), state, strict=True)), checkpoint_id=checkpoint)
    return {name: full_tensors(entry) for name, entry in state[1]["state"].items()}


def load_checkpoint(directory, checkpoint):
    model = sharded()
    optimizer = offloaded(model, directory)
    state = dict(
        zip(("model", "optimizer"), dcp_state.get_state_dict(model, optimizer), strict=True)
    )
    dcp.load(state, checkpoint_id=checkpoint)
    dcp_state.set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    brought = dcp_state.get_optimizer_state_dict(model, optimizer)["state"]
    return {name: full_tensors(entry) for name, entry in brought.items()}


def full_tensors(entry):
    return {
        key: value.full_tensor().tolist() if isinstance(value, DTensor) else float(value)
        for key, value in entry.items()
    }


def test_a_checkpoint_of_two_ranks_is_loaded_by_four(ranks, nvme_dir, tmp_path):
    saved, _ = ranks[2].run(save_checkpoint, nvme_dir, tmp_path)
    assert saved["scale"]["step"] == 3
    for loaded in ranks[4].run(load_checkpoint, nvme_dir, tmp_path):
        assert loaded == saved


def refusals(directory):
    """The words of each refusal; nothing has changed."""
    model = sharded()
    optimizer = offloaded(model, directory)
    train(model, optimizer, range(2))
    before = [shard.clone() for shard in shards(model)]
    weight = model.first.weight
    good, texts = weight.grad, {}
    summand = DTensor.from_local(torch.zeros(weight.shape), weight.device_mesh, [Partial()])

    def attempt(name, error, action):
        with pytest.raises(error) as caught:
            action()
        texts[name] = str(caught.value)

    for name, gradient in {
        "replicated": good.redistribute(placements=[Replicate()]),
        "other dim": good.redistribute(placements=[Shard(1)]),
        "partial": summand,
    }.items():
        weight.grad = gradient
        attempt(name, RuntimeError, optimizer.step)
    attempt("sum", ValueError, lambda: offloaded(torch.nn.ParameterList([summand]), directory))
    weight.grad = good
    state = optimizer.state_dict()
    moved = state["state"][1]["exp_avg"].redistribute(placements=[Replicate()])
    for name, tensor in {"state": moved, "whole": moved.to_local()}.items():
        entry = state["state"][1] | {"exp_avg": tensor}
        other = state | {"state": state["state"] | {1: entry}}
        attempt(name, ValueError, lambda other=other: optimizer.load_state_dict(other))
    assert equal(shards(model), before)
    optimizer.step()
    assert optimizer.stats()["steps"] == 3
    return texts


def test_what_is_distributed_differently_is_refused(ranks, nvme_dir):
    for texts in ranks[2].run(refusals, nvme_dir):
        for name, placement in (
            ("replicated", "Replicate"),
            ("other dim", "Shard"),
            ("partial", "Partial"),
        ):
            assert "param_groups[0]['params'][1]" in texts[name]
            assert "redistribute(p.device_mesh, p.placements)" in texts[name]
            assert placement in texts[name]
        assert "exp_avg is a DTensor with placements (Replicate" in texts["state"]
        assert "set_optimizer_state_dict" in texts["state"]
        assert "sizes" in texts["whole"]
        assert "Partial" in texts["sum"]


def switched(directory):
    """As accelerate prepares a model and its optimizer for FSDP2."""
    whole, theirs, ours = Net(), sharded(), sharded()
    a = offloaded(whole, directory)
    b = torch.optim.AdamW(theirs.parameters(), lr=LR, fused=True)
    a.param_groups[0]["params"] = [torch.empty(1) for _ in whole.parameters()]
    a.param_groups[0]["params"] = list(ours.parameters())
    losses = train(ours, a, range(3))
    replaced = weakref.ref(whole.first.weight)
    del whole
    assert replaced() is None
    return losses == train(theirs, b, range(3)), equal(shards(ours), shards(theirs))


def test_shards_may_take_the_place_of_parameters_before_the_first_step(ranks, nvme_dir):
    assert ranks[2].run(switched, nvme_dir) == [(True, True)] * 2


def rewritten(directory, overlap):
    """State that is deleted, assigned and written to, of shards."""
    ours, theirs = sharded(), sharded()
    a = offloaded(ours, directory, overlap_backward=overlap)
    b = torch.optim.AdamW(theirs.parameters(), lr=LR, fused=True)
    same = []
    for seeds in (range(2), range(2, 4)):
        same.append(train(ours, a, seeds) == train(theirs, b, seeds))
        a.zero_grad()
        for optimizer, model in ((a, ours), (b, theirs)):
            first, second, third = list(model.parameters())[:3]
            del optimizer.state[first]
            with torch.no_grad():
                optimizer.state[second]["exp_avg"].zero_()
                doubled = optimizer.state[third]["exp_avg_sq"] * 2
            assert isinstance(doubled, DTensor)
            optimizer.state[third]["exp_avg_sq"] = doubled
    same.append(train(ours, a, range(4, 6)) == train(theirs, b, range(4, 6)))
    return [*same, equal(shards(ours), shards(theirs))]


@pytest.mark.parametrize("overlap", [False, "update"])
def test_what_is_written_to_the_state_of_shards_counts(ranks, nvme_dir, overlap):
    assert ranks[2].run(rewritten, nvme_dir, overlap) == [[True] * 4] * 2


def first_step_at_rate_zero(directory):
    """Makes the first step of a parameter of which the other ranks have nothing."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones(1), mesh, [Shard(0)]))
    optimizer = OffloadedAdamW([parameter], lr=0.0, nvme_path=directory, host_memory=SMALL)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state[parameter]["step"]


def test_ranks_agree_whether_a_first_step_at_rate_zero_counts(ranks, nvme_dir):
    assert ranks[2].run(first_step_at_rate_zero, nvme_dir) == [1, 1]


def change_before_backward(directory):
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(10), mesh, [Shard(0)]))
    optimizer = OffloadedAdamW([weight], nvme_path=directory, host_memory=SMALL)
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd_notices_that_a_sharded_parameter_has_changed(ranks, nvme_dir):
    ranks[2].run(change_before_backward, nvme_dir)
