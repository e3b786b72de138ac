"""torch.distributed.checkpoint reads commits.

The reference is torch.optim.AdamW in memory, saved by torch.distributed.checkpoint itself, and
where torch has no such optimizer, the state_dict() of the one that has committed.
"""

import os
import signal
import subprocess
import sys

import forked_python
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from torch_ext import OffloadedAdamW, OffloadedOptimizer
from torch_ext.dcp import CommitReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WORLD = 2
EXTRA = {
    "scheduler": {"last_epoch": 3, "rates": [0.1, 0.2]},
    "noise": torch.arange(1000.0).view(20, 50),
    "small": torch.tensor([1, 2]),
    "pair": (1, torch.ones(100)),
    "list": [torch.zeros(3), 7],
    "bytes": b"abc",
}


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 301), torch.nn.Tanh(), torch.nn.Linear(301, 33)
    )
    return model.to(dtype)


def train(model, optimizer, steps, seed=1):
    torch.manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 64).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def made(model, path, **more):
    return OffloadedAdamW(
        model.named_parameters(),
        **({"lr": 1e-2, "nvme_path": path, "host_memory": "1MiB"} | more),
    )


def all_of(reader):
    """What a checkpoint has, loaded without knowing anything of it."""
    state = {}
    torch.distributed.checkpoint.state_dict_loader._load_state_dict(
        state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


def save(state, path):
    # Copies ahead are for tensors on a device; the simulated one has no such streams.
    writer = dcp.FileSystemWriter(path, per_thread_copy_ahead=0)
    dcp.save(state, storage_writer=writer, no_dist=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """AdamW in memory, saved by DCP, and the same in a commit."""
    folder = tmp_path_factory.mktemp("reference")
    model = make_model()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2, fused=True)
    train(model, optimizer, 3)
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        state = {
            "model": model.state_dict(),
            "optim": get_optimizer_state_dict(model, optimizer, options=options),
            "extra": EXTRA,
        }
        save(state, folder / f"dcp{flat:d}")
    (folder / "store").mkdir()
    ours = make_model()
    with made(ours, folder / "store") as optimizer:
        train(ours, optimizer, 3)
        optimizer.commit(extra=EXTRA)
    return folder


@pytest.mark.parametrize("flat", [False, True])
def test_a_commit_is_what_dcp_saves_of_adamw(reference, flat):
    theirs = dcp.FileSystemReader(reference / f"dcp{flat:d}")
    ours = CommitReader(reference / "store", flatten_optimizer_state_dict=flat)
    expected, found = (r.read_metadata().state_dict_metadata for r in (theirs, ours))
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        assert type(found[name]) is type(entry)
        if hasattr(entry, "size"):
            assert (found[name].size, found[name].chunks) == (entry.size, entry.chunks)
            assert found[name].properties.dtype == entry.properties.dtype
    assert same(all_of(ours), all_of(theirs))
    assert ours.step == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda t: torch.empty_like(t),
        lambda t: torch.empty_like(t, dtype=torch.float64),
        lambda t: torch.empty_like(t, dtype=torch.bfloat16),
        lambda t: torch.empty(t.shape[::-1]).t() if t.dim() == 2 else torch.empty_like(t),
        lambda t: torch.empty(*t.shape, 2)[..., 1],
        lambda t: torch.empty_like(t, requires_grad=True),
    ],
    ids=["same", "float64", "bfloat16", "transposed", "strided", "leaf"],
)
def test_tensors_of_any_kind_are_filled_as_dcp_fills_them(reference, make):
    loaded = []
    for reader in (
        dcp.FileSystemReader(reference / "dcp0"),
        CommitReader(reference / "store"),
    ):
        weights = {
            "model": {n: make(t.detach()) for n, t in make_model().named_parameters()},
            "optim": {"state": {"2.weight": {"exp_avg": make(torch.zeros(33, 301))}}},
        }
        dcp.load(weights, storage_reader=reader, no_dist=True)
        loaded.append(weights)
    assert same(*loaded)


def test_the_model_may_be_the_whole_state_dict(reference):
    expected = all_of(dcp.FileSystemReader(reference / "dcp0"))
    model = make_model()
    state = model.state_dict()
    dcp.load(state, storage_reader=CommitReader(reference / "store", model=""), no_dist=True)
    assert same(dict(state), expected["model"])
    named = {"app": {"m": make_model().state_dict()}}
    reader = CommitReader(reference / "store", model="app.m", optimizer="app.o")
    dcp.load(named, storage_reader=reader, no_dist=True)
    assert same(dict(named["app"]["m"]), expected["model"])


@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_have_their_masters(tmp_path, dtype, state_format):
    model = make_model(dtype)
    with made(model, tmp_path, state_format=state_format) as optimizer:
        train(model, optimizer, 2)
        optimizer.commit()
        expected = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    found = all_of(CommitReader(tmp_path))
    assert same(found["model"], dict(model.state_dict()))
    for i, name in enumerate(names):
        assert same(found["optim"]["state"][name], expected["state"][i])
    assert "master_param" in found["optim"]["state"][names[0]]


def test_any_class_is_what_dcp_saves_of_it(tmp_path):
    theirs, ours = make_model(), make_model()
    options = {"lr": 1e-2, "momentum": 0.5, "centered": True}
    optimizer = torch.optim.RMSprop(theirs.named_parameters(), foreach=False, **options)
    train(theirs, optimizer, 2)
    expected = get_optimizer_state_dict(theirs, optimizer)
    with OffloadedOptimizer(
        torch.optim.RMSprop, ours.named_parameters(), nvme_path=tmp_path, **options
    ) as optimizer:
        train(ours, optimizer, 2)
        optimizer.commit(include_parameters=False)
    found = all_of(CommitReader(tmp_path))
    assert "model" not in found
    assert same(found["optim"]["state"], expected["state"])
    (group,) = found["optim"]["param_groups"]
    assert group["params"] == expected["param_groups"][0]["params"]
    assert {k: group[k] for k in options} == options


def test_an_earlier_commit_is_read_by_its_step(tmp_path):
    model = make_model()
    with made(model, tmp_path) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit(keep=2)
        first = {k: v.clone() for k, v in model.state_dict().items()}
        train(model, optimizer, 1)
        optimizer.commit(keep=2)
        assert same(all_of(CommitReader(tmp_path, 1))["model"], first)
        assert same(all_of(CommitReader(tmp_path))["model"], dict(model.state_dict()))
        with pytest.raises(ValueError, match="no commit of step 7; .* are 1, 2"):
            CommitReader(tmp_path, 7)


def test_keys_that_dcp_cannot_tell_apart_come_in_one(tmp_path):
    extra = {1: torch.ones(100), "1": "one"}
    with made(make_model(), tmp_path) as optimizer:
        optimizer.commit(extra=extra)
    assert same(all_of(CommitReader(tmp_path))["extra"], extra)


def test_what_is_not_there_is_said(tmp_path, reference):
    with pytest.raises(FileNotFoundError, match="nothing was committed here"):
        CommitReader(tmp_path)
    with pytest.raises(FileNotFoundError):
        CommitReader(tmp_path / "missing")
    with pytest.raises(TypeError, match="step must be a whole number"):
        CommitReader(reference / "store", "3")
    with pytest.raises(ValueError, match="must differ"):
        CommitReader(reference / "store", model="a", optimizer="a")
    with pytest.raises(dcp.CheckpointException, match="Missing key in checkpoint .*other"):
        dcp.load(
            {"model": {"other": torch.zeros(3)}},
            storage_reader=CommitReader(reference / "store"),
            no_dist=True,
        )
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        dcp.load(
            {"model": {"0.bias": torch.zeros(3)}},
            storage_reader=CommitReader(reference / "store"),
            no_dist=True,
        )


def test_damage_is_said_and_not_taken_for_the_owners_work(tmp_path):
    model = make_model()
    with made(model, tmp_path) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
    store = tmp_path / "state.r0-of-1.e0.d0.store"
    content = bytearray(store.read_bytes())
    place = content.find(model[0].weight.detach().numpy().tobytes()[:64])
    content[place] ^= 1
    store.write_bytes(content)
    state = {"model": model.state_dict()}
    with pytest.raises(dcp.CheckpointException, match="checksum"):
        dcp.load(state, storage_reader=CommitReader(tmp_path), no_dist=True)


# A process that goes on, or is gone ------------------------------------------------------

_KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from test_dcp import make_model, made, train
model = make_model()
optimizer = made(model, {store!r})
train(model, optimizer, 3)
optimizer.commit()
train(model, optimizer, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_commit_is_read_after_its_process_was_killed(tmp_path, reference):
    code = _KILLED.format(path=sys.path, store=str(tmp_path))
    done = subprocess.run([forked_python.python(), "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    found = all_of(CommitReader(tmp_path))
    expected = all_of(dcp.FileSystemReader(reference / "dcp0"))
    assert same(found["model"], expected["model"])
    assert same(found["optim"], expected["optim"])


class GoesOn(dcp.DefaultLoadPlanner):
    """Lets the owner step and commit when a tensor is about to be read."""

    def __init__(self, model, optimizer, times):
        super().__init__()
        self.owner, self.times = (model, optimizer), times

    def resolve_tensor(self, item):
        if self.times:
            self.times -= 1
            for _ in range(3):
                train(*self.owner, 1)
                self.owner[1].commit()
        return super().resolve_tensor(item)


def targets():
    model = make_model()
    empty = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    return {
        "model": empty,
        "optim": {"state": {n: {"exp_avg": torch.zeros_like(t)} for n, t in empty.items()}},
    }


def test_the_owner_may_go_on_while_its_commit_is_read(tmp_path):
    model = make_model()
    with made(model, tmp_path, host_memory="240KiB") as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
        state = targets()
        reader = CommitReader(tmp_path)
        dcp.load(
            state,
            storage_reader=reader,
            planner=GoesOn(model, optimizer, 1),
            no_dist=True,
        )
        assert reader.step == 4
        assert same(state["model"], dict(model.state_dict()))
        expected = optimizer.state_dict()["state"]
        for i, values in enumerate(state["optim"]["state"].values()):
            assert same(values["exp_avg"], expected[i]["exp_avg"])
        # Nothing that it has is a mixture, so what moves on twice is an error.
        for times, is_named in ((100, False), (1, True)):
            step = optimizer.committed_step if is_named else None
            reader = CommitReader(tmp_path, step)
            with pytest.raises(dcp.CheckpointException, match="its owner has made other"):
                dcp.load(
                    targets(),
                    storage_reader=reader,
                    planner=GoesOn(model, optimizer, times),
                    no_dist=True,
                )


# Several processes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(WORLD)
    yield group
    group.close()


def loads_in_part(store, saved):
    """Loads what is in a store, each process a part, and compares with a file of DCP's."""
    mesh = init_device_mesh("cpu", (WORLD,))
    shapes = {n: p.detach() for n, p in make_model().named_parameters()}
    for dim in (0, 1):
        results = []
        for reader in (dcp.FileSystemReader(saved), CommitReader(store)):

            def part(tensor, dim=dim):
                place = [Shard(min(dim, tensor.dim() - 1))]
                return distribute_tensor(torch.zeros_like(tensor), mesh, place)

            state = {
                "model": {n: part(p) for n, p in shapes.items()},
                "optim": {
                    "state": {
                        n: {
                            "exp_avg": part(p),
                            "exp_avg_sq": torch.zeros_like(p),  # Each has all of it.
                            "step": torch.tensor(0.0),
                        }
                        for n, p in shapes.items()
                    }
                },
            }
            dcp.load(state, storage_reader=reader)
            results.append(state)
        theirs, ours = results
        for name in shapes:
            assert same(ours["model"][name].to_local(), theirs["model"][name].to_local()), (
                name,
                dim,
            )
            a, b = (each["optim"]["state"][name] for each in (ours, theirs))
            assert same(a["exp_avg"].to_local(), b["exp_avg"].to_local()), (name, dim)
            assert same(a["exp_avg_sq"], b["exp_avg_sq"])
            assert same(a["step"], b["step"])
            assert a["exp_avg"].to_local().any() or not a["exp_avg"].to_local().numel()


def test_each_process_reads_its_part(ranks, reference):
    ranks.run(loads_in_part, reference / "store", reference / "dcp0")


def commits_shards(store, saved, dim):
    """A sharded training is committed, and its whole is saved for comparison."""
    model = make_model()
    if dim is None:
        fully_shard(model[0])
        fully_shard(model)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        for module in (model[0], model[2]):
            for name, p in list(module.named_parameters()):
                place = [Shard(min(dim, p.dim() - 1))]
                whole = distribute_tensor(p.detach(), mesh, place)
                setattr(module, name, torch.nn.Parameter(whole))
    with made(model, store) as optimizer:
        for step in range(2):
            for i, p in enumerate(model.parameters()):
                torch.manual_seed(10 * step + i)
                whole = torch.randn(p.shape)
                p.grad = distribute_tensor(whole, p.device_mesh, p.placements)
            optimizer.step()
        optimizer.commit()
        saved_state = optimizer.state_dict()["state"]
        names = [n for n, _ in model.named_parameters()]
        full = {
            "model": {n: p.detach().full_tensor() for n, p in model.named_parameters()},
            "state": {
                n: {
                    k: v.full_tensor() if isinstance(v, DTensor) else v
                    for k, v in saved_state[i].items()
                }
                for i, n in enumerate(names)
            },
        }
    if torch.distributed.get_rank() == 0:
        torch.save(full, saved)
    boxes = CommitReader(store).read_metadata().state_dict_metadata["model.0.weight"].chunks
    return sorted((tuple(c.offsets), tuple(c.sizes)) for c in boxes)


@pytest.mark.parametrize("dim", [None, 0, 1], ids=["fsdp", "rows", "columns"])
def test_the_shards_of_several_are_one_checkpoint(ranks, tmp_path, dim):
    saved = tmp_path / "whole.pt"
    boxes, _ = ranks.run(commits_shards, tmp_path, saved, dim)
    if dim == 1:
        assert boxes == [((0, 0), (301, 32)), ((0, 32), (301, 32))]
    else:
        assert boxes == [((0, 0), (151, 64)), ((151, 0), (150, 64))]
    expected = torch.load(saved)
    found = all_of(CommitReader(tmp_path))
    assert same(found["model"], expected["model"])
    assert same(found["optim"]["state"], expected["state"])
    # Another division of the two, and one tensor in one process.
    as_dcp = tmp_path / "dcp"
    state = {"model": expected["model"], "optim": {"state": expected["state"]}}
    save(state, as_dcp)
    ranks.run(loads_in_part, tmp_path, as_dcp)
    os.rename(tmp_path / "state.r1-of-2.e0.d0.store", tmp_path / "away")
    with pytest.raises(OSError, match="of 2 processes, and the shards of rank 1 are missing"):
        CommitReader(tmp_path)


def replicated(store):
    model = make_model()
    with made(model, store) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
    entry = CommitReader(store).read_metadata().state_dict_metadata["model.0.weight"]
    return len(entry.chunks)


def test_what_all_have_is_one_chunk(ranks, tmp_path):
    assert ranks.run(replicated, tmp_path) == [1, 1]


def in_stages(store):
    """Each process has another part of the model."""
    rank = torch.distributed.get_rank()
    model = make_model()
    named = [(f"stage{rank}.{n}", p) for n, p in model.named_parameters()]
    with OffloadedAdamW(named, lr=1e-2, nvme_path=store) as optimizer:
        train(model, optimizer, 1, seed=rank)
        optimizer.commit()
    return {f"stage{rank}.{n}": p.tolist() for n, p in model.state_dict().items()}


def test_processes_may_have_other_parameters(ranks, tmp_path):
    here, there = ranks.run(in_stages, tmp_path)
    found = all_of(CommitReader(tmp_path))
    assert {n: p.tolist() for n, p in found["model"].items()} == here | there
    (group,) = found["optim"]["param_groups"]
    assert group["params"] == [*here, *there]
    assert found["optim"]["state"].keys() == here.keys() | there.keys()


def one_sees_nothing(store):
    reader = CommitReader(store)
    path = store.parent if torch.distributed.get_rank() == 1 else store
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(targets(), checkpoint_id=path, storage_reader=reader)
    return str(caught.value)


def test_what_one_cannot_read_is_an_error_of_all(ranks, reference):
    for text in ranks.run(one_sees_nothing, reference / "store"):
        assert "nothing was committed here" in text


def differ(store):
    rank, newest = torch.distributed.get_rank(), None
    own = [torch.distributed.new_group([i]) for i in range(WORLD)][rank]
    reader = CommitReader(store)
    torch.distributed.barrier()
    if rank == 0:
        model = make_model()
        with OffloadedAdamW.resume(
            store, model.named_parameters(), host_memory="1MiB", process_group=own
        ) as optimizer:
            train(model, optimizer, 1)
            optimizer.commit()
        newest = {n: p.tolist() for n, p in model.state_dict().items()}
        reader._look()
    torch.distributed.barrier()
    state = targets()
    dcp.load(state, storage_reader=reader)
    return {n: t.tolist() for n, t in state["model"].items()}, newest


def test_processes_that_saw_different_commits_read_the_newer(ranks, tmp_path):
    model = make_model()
    with made(model, tmp_path) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
    (here, newest), (there, _) = ranks.run(differ, tmp_path)
    assert here == there == newest
