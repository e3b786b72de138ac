"""A commit is resumed in another division: processes, shards, drives, tiles, formats.

The reference is torch's AdamW over whole parameters in one process, with the same gradients.
16-bit parameters are compared by their masters, which are float32.
"""

import errno
import logging
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from optim_support import equal
from ranks import Ranks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import torch_ext
from torch_ext import OffloadedAdamW, OffloadedOptimizer, _stores
from torch_ext.optim import _committing, _division
from torch_ext.optim._division import Division, Source
from torch_ext.optim._dtensor import local_of
from torch_ext.optim._together import Together, Vote

#: Neither 2 nor 4 divides all rows; the last one leaves a process without any.
SHAPES = {"embed": (301, 68), "norm": (64,), "conv": (9, 8, 3, 3), "tiny": (3, 300)}
STEPS = 3


@pytest.fixture(scope="module")
def two():
    group = Ranks(2)
    yield group
    group.close()


@pytest.fixture(scope="module")
def four():
    group = Ranks(4)
    yield group
    group.close()


class Model(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        for name, shape in SHAPES.items():
            values = torch.randn(shape, generator=generator).to(dtype)
            setattr(self, name, torch.nn.Parameter(values))


def make_model(dtype, rows=True):
    model = Model(dtype)
    if torch.distributed.is_initialized():
        placement = None if rows else lambda p: Shard(min(1, p.dim() - 1))
        fully_shard(model, shard_placement_fn=placement)
        model.named_parameters()  # FSDP2 shards when it is made.
    return model


def gradient(name, step, dtype):
    seed = 1000 * step + sum(map(ord, name))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES[name], generator=generator).to(dtype)


def train(model, optimizer, first, last):
    for step in range(first, last):
        for name, p in model.named_parameters():
            grad = gradient(name, step, p.dtype)
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements)
            p.grad = grad
        optimizer.step()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def everything(model, optimizer):
    """Returns parameters and state by name, whole."""
    found = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        found[name] = whole(p)
        for key in ("exp_avg", "exp_avg_sq", "master_param"):
            if key != "master_param" or p.dtype != torch.float32:
                found[f"{name}.{key}"] = whole(state[key])
        found[f"{name}.step"] = int(state["step"])
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (
            equal(value, other[name])
            if isinstance(value, torch.Tensor)
            else (value == other[name])
        ), name


class Reference:
    """torch's AdamW on float32 copies, in the same shards: its kernel rounds the last elements
    of a tensor in another way than the others."""

    def __init__(self, dtype):
        self.dtype = dtype
        params = {n: p.detach().float().clone() for n, p in Model(dtype).named_parameters()}
        self.state = {
            name: {
                "param": p,
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            for name, p in params.items()
        }

    def train(self, first, last, world=1, rows=True):
        for name, state in self.state.items():
            dim = 0 if rows else min(1, len(SHAPES[name]) - 1)
            shards = zip(*(t.chunk(world, dim) for t in state.values()), strict=True)
            trained = [
                self._train(name, first, last, dim, i, world, shard)
                for i, shard in enumerate(shards)
            ]
            for key, parts in zip(state, zip(*trained, strict=True), strict=True):
                state[key] = torch.cat(parts, dim)

    def _train(self, name, first, last, dim, i, world, shard):
        p, exp_avg, exp_avg_sq = (t.clone(memory_format=torch.contiguous_format) for t in shard)
        optimizer = torch.optim.AdamW([p], lr=1e-2, fused=True)
        optimizer.state[p] = {
            "step": torch.tensor(float(first)),
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
        }
        for step in range(first, last):
            whole = gradient(name, step, self.dtype).float()
            p.grad = whole.chunk(world, dim)[i].contiguous()
            optimizer.step()
        return p, exp_avg, exp_avg_sq

    def check(self, found, steps):
        for name, state in self.state.items():
            own = name if self.dtype == torch.float32 else f"{name}.master_param"
            assert equal(found[own], state["param"]), name
            assert equal(found[f"{name}.exp_avg"], state["exp_avg"]), name
            assert equal(found[f"{name}.exp_avg_sq"], state["exp_avg_sq"]), name
            assert found[f"{name}.step"] == steps


OPTIONS = {"host_memory": "1MiB", "engine": "threads"}


def begin(path, dtype, rows, more):
    model = make_model(dtype, rows)
    with OffloadedAdamW(
        model.named_parameters(), lr=1e-2, nvme_path=path, **OPTIONS, **more
    ) as optimizer:
        train(model, optimizer, 0, STEPS)
        optimizer.commit(extra={"place": torch.arange(1000.0), "name": "x"})
        return everything(model, optimizer)


def go_on(path, dtype, rows, first, options=OPTIONS):
    """Resumes, steps, commits. Returns what was found, and what was left."""
    model = make_model(dtype, rows)
    with torch.no_grad():
        for p in model.parameters():
            local_of(p).zero_()
    with OffloadedAdamW.resume(path, model.named_parameters(), **options) as optimizer:
        assert optimizer.committed_step == first
        assert equal(optimizer.committed_extra["place"], torch.arange(1000.0))
        found = everything(model, optimizer)
        train(model, optimizer, first, first + STEPS)
        extra = optimizer.committed_extra
        assert optimizer.commit(extra=extra).step == first + STEPS
        return found, everything(model, optimizer)


CASES = [
    pytest.param(torch.float32, {}, id="float32"),
    pytest.param(torch.bfloat16, {}, id="bfloat16"),
    pytest.param(torch.float16, {"state_format": "bf16"}, id="float16-bf16"),
    pytest.param(torch.bfloat16, {"state_format": "int8"}, id="bfloat16-int8"),
]


def names(path):
    return sorted(os.listdir(path))


@pytest.mark.parametrize(("dtype", "more"), CASES)
def test_two_processes_then_four_then_one(two, four, tmp_path, dtype, more):
    exact = not more
    left = two.run(begin, tmp_path, dtype, True, more)[0]
    torch_s = Reference(dtype)
    torch_s.train(0, STEPS, 2)
    steps = STEPS
    for group, rows in ((four, True), (two, False), (four, False), (None, True)):
        run = group.run if group else lambda call, *args: [call(*args)]
        results = run(go_on, tmp_path, dtype, rows, steps)
        found, now = results[0]
        if exact or rows:
            same(found, left)
        else:
            # Boxes of columns have other scales: they are made anew, once.
            for name in ("embed", "embed.master_param", "norm.exp_avg"):
                assert equal(found[name], left[name])
        torch_s.train(steps, steps + STEPS, group.world if group else 1, rows)
        left, steps = now, steps + STEPS
        if exact:
            torch_s.check(left, steps)
    assert names(tmp_path) == ["state.r0-of-1.e4.d0.store"]


# One process -------------------------------------------------------------------------------


def alone(path, dtype=torch.float32, steps=STEPS, **more):
    """A run that has committed after ``steps`` steps. Returns what it had then."""
    model = make_model(dtype)
    options = {"nvme_path": path, "host_memory": "64MiB", "engine": "threads"} | more
    with OffloadedAdamW(model.named_parameters(), lr=1e-2, **options) as optimizer:
        train(model, optimizer, 0, steps)
        optimizer.commit(extra={"place": torch.arange(1000.0), "name": "x"})
        return everything(model, optimizer)


def found_in(path, dtype=torch.float32, **more):
    """Resumes. Returns the model and the optimizer."""
    model = make_model(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    options = {"host_memory": "64MiB", "engine": "threads"} | more
    return model, OffloadedAdamW.resume(path, model.named_parameters(), **options)


@pytest.mark.parametrize(("dtype", "more"), CASES)
def test_drives_tiles_and_budget_may_be_others(tmp_path, dtype, more):
    torch_s = Reference(dtype)
    torch_s.train(0, 2 * STEPS)
    old, new = tmp_path / "old", [tmp_path / "a", tmp_path / "b"]
    for each in (old, *new):
        each.mkdir()
    left = alone(old, dtype, **more)
    before = {name: (old / name).read_bytes() for name in names(old)}
    model, optimizer = found_in(old, dtype, nvme_path=new)
    with optimizer:
        assert optimizer.committed_step == STEPS
        assert optimizer.commits() == []
        same(everything(model, optimizer), left)
        train(model, optimizer, STEPS, 2 * STEPS)
        optimizer.commit()
        left = everything(model, optimizer)
    if not more:
        torch_s.check(left, 2 * STEPS)
    # It lives elsewhere now, so what it came from is nobody's business.
    assert {name: (old / name).read_bytes() for name in names(old)} == before
    assert [names(each) for each in new] == [[f"state.r0-of-1.e0.d{d}.store"] for d in (0, 1)]
    # The same drives, with a budget in which no three tiles have room.
    model, optimizer = found_in(new, dtype, host_memory="256KiB")
    with optimizer:
        same(everything(model, optimizer), left)
        assert names(new[0]) == ["state.r0-of-1.e0.d0.store"]
        optimizer.commit()
        assert names(new[1]) == ["state.r0-of-1.e1.d1.store"]
    model, optimizer = found_in(new, dtype)
    with optimizer:
        same(everything(model, optimizer), left)


def test_state_takes_another_format(tmp_path):
    exact = alone(tmp_path)
    model, optimizer = found_in(tmp_path, state_format="bf16")
    with optimizer:
        rounded = everything(model, optimizer)
        optimizer.commit()
    for name, value in exact.items():
        if not name.endswith(("exp_avg", "exp_avg_sq")):
            assert (
                rounded[name] == value if name.endswith("step") else equal(rounded[name], value)
            )
            continue
        # Each is one of the two bfloat16 numbers beside the float32.
        assert equal(rounded[name], rounded[name].bfloat16().float())
        assert torch.all((rounded[name] - value).abs() <= value.abs() * 2**-7)
    model, optimizer = found_in(tmp_path)
    with optimizer:
        assert optimizer.state_dict()["param_groups"]
        same(everything(model, optimizer), rounded)  # It stays in that format.
    model, optimizer = found_in(tmp_path, state_format="exact")
    with optimizer:
        same(everything(model, optimizer), rounded)


def test_the_order_of_dimensions_may_be_another(tmp_path):
    left = alone(tmp_path)
    model = make_model(torch.float32)
    model.conv.data = model.conv.data.contiguous(memory_format=torch.channels_last)
    with OffloadedAdamW.resume(tmp_path, model.named_parameters()) as optimizer:
        same(everything(model, optimizer), left)
        assert model.conv.is_contiguous(memory_format=torch.channels_last)


def test_parameters_without_values_keep_their_own(tmp_path):
    model = make_model(torch.bfloat16)
    with OffloadedAdamW(
        model.named_parameters(), lr=1e-2, nvme_path=tmp_path, engine="threads"
    ) as optimizer:
        train(model, optimizer, 0, STEPS)
        optimizer.commit(include_parameters=False)
        left = everything(model, optimizer)
    with OffloadedAdamW.resume(
        tmp_path, model.named_parameters(), host_memory="256KiB", engine="threads"
    ) as optimizer:
        same(everything(model, optimizer), left)


def test_any_class_takes_another_budget(tmp_path):
    def run(path, steps):
        model = make_model(torch.float32)
        with OffloadedOptimizer(
            torch.optim.Adam,
            model.named_parameters(),
            lr=1e-2,
            nvme_path=path,
            host_memory="64MiB",
            engine="threads",
        ) as optimizer:
            train(model, optimizer, 0, steps)
            optimizer.commit()
        return model

    run(tmp_path, STEPS)
    model = make_model(torch.float32)
    with OffloadedOptimizer.resume(
        tmp_path, torch.optim.Adam, model.named_parameters(), host_memory="512KiB"
    ) as optimizer:
        train(model, optimizer, STEPS, 2 * STEPS)
        optimizer.commit()
    assert names(tmp_path) == ["state.r0-of-1.e1.d0.store"]
    whole_run = make_model(torch.float32)
    plain = torch.optim.Adam(whole_run.parameters(), lr=1e-2)
    train(whole_run, plain, 0, 2 * STEPS)
    assert equal(model.parameters(), whole_run.parameters())


def test_a_kept_commit_is_divided_anew(tmp_path):
    model = make_model(torch.float32)
    options = {"host_memory": "64MiB", "engine": "threads"}
    with OffloadedAdamW(
        model.named_parameters(), lr=1e-2, nvme_path=tmp_path, **options
    ) as optimizer:
        train(model, optimizer, 0, 1)
        optimizer.commit(keep=2)
        left = everything(model, optimizer)
        train(model, optimizer, 1, 2)
        optimizer.commit(keep=2)
    model = make_model(torch.float32)
    with OffloadedAdamW.resume(
        tmp_path, model.named_parameters(), step=1, host_memory="256KiB", engine="threads"
    ) as optimizer:
        assert optimizer.committed_step == 1
        same(everything(model, optimizer), left)
        with pytest.raises(RuntimeError, match="nothing was committed yet"):
            optimizer.rollback()
    with pytest.raises(ValueError, match="the steps of those kept are 1, 2"):
        found_in(tmp_path, step=5, host_memory="256KiB")


# What can go wrong -------------------------------------------------------------------------


def test_the_old_stores_stay_until_a_commit(tmp_path):
    left = alone(tmp_path)
    model, optimizer = found_in(tmp_path, host_memory="256KiB")
    with optimizer:
        train(model, optimizer, STEPS, STEPS + 1)
        assert names(tmp_path) == ["state.r0-of-1.e0.d0.store"]
    model, optimizer = found_in(tmp_path)
    with optimizer:
        same(everything(model, optimizer), left)


@pytest.mark.parametrize("waits", [True, False])
def test_a_commit_that_was_durable_at_the_close_removes_them_too(tmp_path, waits):
    alone(tmp_path)
    model, optimizer = found_in(tmp_path, state_format="bf16")
    train(model, optimizer, STEPS, STEPS + 1)
    begun = optimizer.commit(wait=False)
    if waits:
        begun.wait()
    optimizer.close()
    assert names(tmp_path) == ["state.r0-of-1.e1.d0.store"]


def test_a_crash_before_the_old_stores_are_removed(tmp_path):
    alone(tmp_path)
    old = tmp_path / "state.r0-of-1.e0.d0.store"
    kept = tmp_path / "kept"
    shutil.copyfile(old, kept)
    model, optimizer = found_in(tmp_path, host_memory="256KiB")
    with optimizer:
        train(model, optimizer, STEPS, STEPS + 1)
        optimizer.commit()
        left = everything(model, optimizer)
    shutil.move(kept, old)
    model, optimizer = found_in(tmp_path)
    with optimizer:
        same(everything(model, optimizer), left)
        assert old.exists()
        optimizer.commit()
        assert names(tmp_path) == ["state.r0-of-1.e1.d0.store"]


def test_an_epoch_that_was_cut_off_does_not_count(tmp_path, caplog):
    left = alone(tmp_path)
    # The first of two processes has its name, the other had none.
    shutil.copyfile(
        tmp_path / "state.r0-of-1.e0.d0.store", tmp_path / "state.r0-of-2.e1.d0.store"
    )
    with caplog.at_level(logging.WARNING, "torch_ext"):
        model, optimizer = found_in(tmp_path)
    with optimizer:
        same(everything(model, optimizer), left)
    assert "epoch 1 of the state was cut off" in caplog.text
    model, optimizer = found_in(tmp_path, host_memory="256KiB")
    with optimizer:
        optimizer.commit()  # It does not meet the name.
    assert "state.r0-of-1.e2.d0.store" in names(tmp_path)


def fail_to_commit(path, killed):
    """Divides a commit among two processes, and the second votes against their commit."""
    model = make_model(torch.float32)
    file = path / f"state.r{torch.distributed.get_rank()}-of-2.e1.d0.store"
    with OffloadedAdamW.resume(path, model.named_parameters(), **OPTIONS) as optimizer:
        call = Vote.__call__

        def refuse():
            raise RuntimeError("I am against it")

        def vote_against(vote, check):
            return call(vote, refuse if torch.distributed.get_rank() == 1 else check)

        Vote.__call__ = vote_against
        with pytest.raises(RuntimeError, match="rank 1: I am against it"):
            optimizer.commit()
        Vote.__call__ = call
        left = shutil.copyfile(file, file.with_suffix(".left"))
    os.rename(left, file) if killed else os.remove(left)


@pytest.mark.parametrize("killed", [True, False])
def test_a_division_that_failed_does_not_count(two, tmp_path, caplog, killed):
    left = alone(tmp_path)
    two.run(fail_to_commit, tmp_path, killed)
    # Until they are closed, their stores have names, and no commit.
    assert len(names(tmp_path)) == (3 if killed else 1)
    with caplog.at_level(logging.WARNING, "torch_ext"):
        model, optimizer = found_in(tmp_path)
    assert ("epoch 1 of the state was cut off" in caplog.text) == killed
    with optimizer:
        same(everything(model, optimizer), left)


def kill_me(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_a_division(path, at):
    """Divides a commit anew. All processes are killed in the first commit, or before it."""
    model = make_model(torch.float32)
    optimizer = OffloadedAdamW.resume(path, model.named_parameters(), **OPTIONS)
    if at == "resumed":
        kill_me()
    together, remove = optimizer._together, _stores.remove
    exchange = together.exchange

    def vote(value):
        # Files have their names when a process votes.
        if at == "named" and any(".e1." in name for name in names(path)):
            kill_me()
        return exchange(value)

    def remove_one(store):
        remove(store)
        kill_me()

    together.exchange = vote
    if at == "committed":
        _committing.remove_stores = kill_me
    if at == "half removed":
        _stores.remove = remove_one
    optimizer.commit()
    return "it lives"


def run_in(group, world, function, *arguments):
    return [function(*arguments)] if world == 1 else group.run(function, *arguments)


@pytest.mark.parametrize(
    ("before", "after", "at"),
    [(1, 2, at) for at in ("resumed", "named", "committed", "half removed")]
    # One process does not vote.
    + [(2, 1, at) for at in ("resumed", "committed", "half removed")],
)
def test_a_kill_in_a_division_loses_nothing(two, before, after, at, tmp_path):
    left = run_in(two, before, commit_some, tmp_path)[0]
    old = names(tmp_path)
    victims = two if after == 2 else Ranks(1)
    with pytest.raises(AssertionError, match="died"):
        victims.run(killed_in_a_division, tmp_path, at)
    now = names(tmp_path)
    assert (set(old) <= set(now)) == (at != "half removed")
    assert any(".e1." in name for name in now) == (at != "resumed")
    # As many processes resume as were killed, and then as many as there were before.
    for world in (after, before):
        for found in run_in(two, world, resume_and_commit, tmp_path):
            same(found, left)


def commit_some(path):
    model = make_model(torch.float32)
    with OffloadedAdamW(
        model.named_parameters(), lr=1e-2, nvme_path=path, **OPTIONS
    ) as optimizer:
        train(model, optimizer, 0, STEPS)
        optimizer.commit()
        return everything(model, optimizer)


def resume_and_commit(path):
    model = make_model(torch.float32)
    with OffloadedAdamW.resume(path, model.named_parameters(), **OPTIONS) as optimizer:
        found = everything(model, optimizer)
        optimizer.commit()
        return found


def test_each_process_may_have_a_drive_of_its_own(two, tmp_path):
    left = two.run(begin_on_own_drives, tmp_path)[0]
    found = two.run(go_on_own_drives, tmp_path)[0]
    same(found, left)
    with pytest.raises(OSError, match="the shards of rank 1 are missing"):
        found_in(tmp_path / "0")
    model, optimizer = found_in([tmp_path / "0", tmp_path / "1"], nvme_path=tmp_path)
    with optimizer:
        same(everything(model, optimizer), left)


def begin_on_own_drives(path):
    own = path / str(torch.distributed.get_rank())
    own.mkdir()
    return begin(own, torch.float32, True, {})


def go_on_own_drives(path):
    """Each needs its own store only."""
    own = path / str(torch.distributed.get_rank())
    model = make_model(torch.float32)
    with OffloadedAdamW.resume(
        own, model.named_parameters(), state_format="exact", host_memory="240KiB"
    ) as optimizer:
        return everything(model, optimizer)


def test_two_divisions_of_one_epoch_are_an_error(tmp_path):
    alone(tmp_path)
    store = tmp_path / "state.r0-of-1.e0.d0.store"
    for rank in range(2):
        shutil.copyfile(store, tmp_path / f"state.r{rank}-of-2.e0.d0.store")
    with pytest.raises(ValueError, match="commits of 1 and of 2 processes"):
        found_in(tmp_path)


def test_a_new_run_does_not_commit_beside_another(two, tmp_path, caplog):
    """Else resume() would go on from the other one, and its commits would be lost."""
    alone(tmp_path)
    model, optimizer = found_in(tmp_path, state_format="bf16")
    with optimizer:
        optimizer.commit()
    assert names(tmp_path) == ["state.r0-of-1.e1.d0.store"]
    with caplog.at_level(logging.WARNING, "torch_ext"):
        texts = [*two.run(refused_to_begin, tmp_path), refused_to_begin(tmp_path)]
    assert all("e1.d0.store" in text and "another run is there" in text for text in texts)
    assert "another run has committed in" in caplog.text
    assert names(tmp_path) == ["state.r0-of-1.e1.d0.store"]


def refused_to_begin(path):
    with pytest.raises(FileExistsError) as caught:
        begin(path, torch.float32, True, {})
    return str(caught.value)


def test_missing_shards_are_named(two, tmp_path):
    two.run(begin, tmp_path, torch.float32, True, {})
    os.remove(tmp_path / "state.r1-of-2.e0.d0.store")
    with pytest.raises(OSError, match="of 2 processes, and the shards of rank 1 are missing"):
        found_in(tmp_path)


def test_a_store_in_use_is_not_divided(tmp_path):
    model = make_model(torch.float32)
    options = {"host_memory": "64MiB", "engine": "threads"}
    with OffloadedAdamW(
        model.named_parameters(), lr=1e-2, nvme_path=tmp_path, **options
    ) as optimizer:
        train(model, optimizer, 0, STEPS)
        optimizer.commit()
        left = everything(model, optimizer)
        with pytest.raises(BlockingIOError, match="another process uses"):
            found_in(tmp_path, state_format="bf16")
        # Elsewhere a live run is read as it was committed.
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        train(model, optimizer, STEPS, STEPS + 1)
        other, copy = found_in(tmp_path, nvme_path=elsewhere)
        with copy:
            same(everything(other, copy), left)
            copy.commit()
        assert names(elsewhere) == ["state.r0-of-1.e0.d0.store"]


def test_a_store_that_is_divided_belongs_to_nobody_else(tmp_path):
    """Else the other run would commit to what is removed soon."""
    alone(tmp_path)
    model, optimizer = found_in(tmp_path, state_format="bf16")
    with optimizer:
        with pytest.raises(BlockingIOError, match="another process|process"):
            found_in(tmp_path, host_memory="64MiB")
        train(model, optimizer, STEPS, STEPS + 1)
    # Given up without a commit, the old one is free again.
    _, optimizer = found_in(tmp_path, host_memory="64MiB")
    optimizer.close()
    _, optimizer = found_in(tmp_path, state_format="bf16")
    with optimizer:
        optimizer.commit()
        assert names(tmp_path) == ["state.r0-of-1.e1.d0.store"]


def test_a_directory_by_another_name_is_the_same(tmp_path, monkeypatch):
    """Else a store in use would be taken for one that is elsewhere."""
    run, more = tmp_path / "run", tmp_path / "more"
    run.mkdir()
    more.mkdir()
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    model = make_model(torch.float32)
    with OffloadedAdamW(model.named_parameters(), nvme_path="run") as optimizer:
        optimizer.commit(1)
        for other in ("run", "run/", "./run", run, tmp_path / "link", [run, more], [more, run]):
            with pytest.raises(BlockingIOError, match="another process uses"):
                found_in("run", nvme_path=other)
        optimizer.commit(2)
    for other in ("run/", tmp_path / "link"):
        _, optimizer = found_in("run", nvme_path=other)
        with optimizer:
            assert optimizer.committed_step == 2
    assert names(run) == ["state.r0-of-1.e0.d0.store"]
    _, optimizer = found_in("run", nvme_path=[run, more])
    with optimizer:
        optimizer.commit()
    assert names(run) == ["state.r0-of-1.e1.d0.store"]
    assert names(more) == ["state.r0-of-1.e1.d1.store"]


def test_the_current_directory_may_be_another_one_at_the_commit(tmp_path, monkeypatch):
    alone(tmp_path)
    monkeypatch.chdir(tmp_path)
    _, optimizer = found_in(".", state_format="bf16")
    with optimizer:
        monkeypatch.chdir("/")
        optimizer.commit()
        assert names(tmp_path) == ["state.r0-of-1.e1.d0.store"]


def test_no_commit_is_made_between_the_choice_and_the_lock(tmp_path, monkeypatch):
    """It would be lost with the old store."""
    alone(tmp_path)
    real = _division._commits_of

    def listed(*arguments):
        monkeypatch.setattr(_division, "_commits_of", real)
        with pytest.raises(BlockingIOError, match="another process"):
            found_in(tmp_path)
        return real(*arguments)

    monkeypatch.setattr(_division, "_commits_of", listed)
    _, optimizer = found_in(tmp_path, state_format="bf16")
    optimizer.close()
    assert _division._commits_of is real


@pytest.mark.parametrize("removed", [True, False])
def test_who_divides_after_another_is_told(tmp_path, monkeypatch, removed):
    alone(tmp_path)
    real = _division._lock_all

    def late(*arguments):
        monkeypatch.setattr(_division, "_lock_all", real)
        if not removed:
            monkeypatch.setattr(_committing, "remove_stores", lambda *_: None)
        _, optimizer = found_in(tmp_path, state_format="bf16")
        with optimizer:
            optimizer.commit(77)
        return real(*arguments)

    monkeypatch.setattr(_division, "_lock_all", late)
    with pytest.raises(BlockingIOError, match="another run has"):
        found_in(tmp_path, state_format="bf16")
    _, optimizer = found_in(tmp_path)
    with optimizer:
        assert optimizer.committed_step == 77


def test_two_runs_do_not_share_a_directory_as_other_drives(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    alone(two)
    with pytest.raises(FileExistsError, match="a store of another run is there") as caught:
        alone([one, two])
    assert caught.value.filename == str(two / "state.r0-of-1.e0.d0.store")
    assert names(one) == []


def test_a_close_that_fails_frees_the_old_store_too(tmp_path):
    alone(tmp_path)
    _, optimizer = found_in(tmp_path, state_format="bf16")
    offload = optimizer._offload

    def fail():
        offload.close()
        raise OSError("the drive is gone")

    optimizer._offload = SimpleNamespace(close=fail)
    with pytest.raises(OSError, match="the drive is gone"):
        optimizer.close()
    found_in(tmp_path, host_memory="64MiB")[1].close()


def test_a_copy_under_another_name_is_not_taken(tmp_path):
    model = make_model(torch.float32)
    backup = tmp_path / "state_backup.store"
    with OffloadedAdamW(
        model.named_parameters(), lr=1e-2, nvme_path=tmp_path, **OPTIONS
    ) as optimizer:
        train(model, optimizer, 0, 1)
        optimizer.commit()
        shutil.copyfile(tmp_path / "state.r0-of-1.e0.d0.store", backup)
        train(model, optimizer, 1, STEPS)
        optimizer.commit()
        left = everything(model, optimizer)
    torch_ext.export(tmp_path, tmp_path / "out.safetensors")
    exported = torch_ext.load(tmp_path / "out.safetensors")
    assert equal(exported["model.embed"], left["embed"])
    model, optimizer = found_in(tmp_path, state_format="bf16")
    with optimizer:
        assert optimizer.committed_step == STEPS
        assert equal(whole(model.embed), left["embed"])
        optimizer.commit()
    assert "state.r0-of-1.e1.d0.store" in names(tmp_path)
    assert backup.exists()
    # In directories of their own nobody can tell which one counts.
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copyfile(backup, tmp_path / name / "state.r0-of-1.e0.d0.store")
    with pytest.raises(FileExistsError, match="is a store of rank 0 too") as caught:
        found_in([tmp_path / "a", tmp_path / "b"], nvme_path=tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


def test_state_does_not_move_onto_another_run(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for each in (here, there):
        each.mkdir()
        alone(each)
    with pytest.raises(FileExistsError, match="where a store is already"):
        found_in(here, nvme_path=there)
    for path in (here, there):
        assert names(path) == ["state.r0-of-1.e0.d0.store"]
        found_in(path, host_memory="64MiB")[1].close()


def mixed_runs(path, options):
    with pytest.raises(ValueError, match="of different runs") as caught:
        go_on(path, torch.float32, True, STEPS, options)
    return str(caught.value)


def test_shards_of_two_runs_are_no_state(two, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
        two.run(begin, path, torch.float32, True, {})
    store = "state.r1-of-2.e0.d0.store"
    shutil.copyfile(other / store, one / store)
    two.run(mixed_runs, one, OPTIONS)
    two.run(mixed_runs, one, OPTIONS | {"state_format": "bf16"})
    with pytest.raises(ValueError, match="of different runs"):
        found_in(one)
    with pytest.raises(ValueError, match="of different runs"):
        torch_ext.export(one, tmp_path / "out.safetensors")


def test_a_commit_that_one_shard_has_lost_is_said():
    source = Source(
        Together(),
        Division(0, 2),
        {rank: SimpleNamespace(path=f"/store{rank}", id=b"") for rank in range(2)},
        {0: [(3, 3, 0, "{}"), (4, 4, 0, "{}")], 1: [(4, 4, 0, "{}")]},
        (None, "auto"),
        {},
    )
    source.commits[0][0] = (3, 3, 0, '{"format": 1, "class": "X"}')
    with pytest.raises(OSError, match="commit 3 of rank 1 is lost or damaged.*step=") as caught:
        source.choose(3, "X")
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "/store1")


def test_more_processes_than_before_are_told_whose_extra_they_have(two, tmp_path, caplog):
    alone(tmp_path)
    (text, _) = two.run(what_is_logged, tmp_path)
    assert "the commit is of 1 process and 2 go on" in text
    assert "committed_extra of rank 1 is that of rank 0" in text


def what_is_logged(path):
    logged = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("torch_ext").addHandler(handler)
    model = make_model(torch.float32)
    OffloadedAdamW.resume(path, model.named_parameters(), **OPTIONS).close()
    logging.getLogger("torch_ext").removeHandler(handler)
    return "".join(logged)


def test_damage_is_an_error_and_leaves_the_old_store(tmp_path):
    left = alone(tmp_path)
    store = tmp_path / "state.r0-of-1.e0.d0.store"
    whole_file = store.read_bytes()
    (extent, *_) = torch_ext._C.read_store([str(store)], False, None)["commits"]
    assert extent["fault"] == ""
    with store.open("r+b") as file:
        file.seek(1 << 20)  # The first tile.
        file.write(b"\xff" * 64)
    with pytest.raises(OSError, match="checksum mismatch.*verify names.*step= takes another"):
        found_in(tmp_path, state_format="bf16")
    assert names(tmp_path) == [store.name]
    store.write_bytes(whole_file)
    model, optimizer = found_in(tmp_path, state_format="bf16")
    with optimizer:
        assert equal(whole(model.embed), left["embed"])


def test_another_models_parameters_are_named(tmp_path):
    alone(tmp_path)
    model = make_model(torch.float32)
    model.norm = torch.nn.Parameter(torch.zeros(65))
    with pytest.raises(ValueError, match=r"norm has shape \[64\] there and \[65\] here"):
        OffloadedAdamW.resume(tmp_path, model.named_parameters(), host_memory="256KiB")
    with pytest.raises(ValueError, match="state_format"):
        found_in(tmp_path, state_format="int7")
    assert names(tmp_path) == ["state.r0-of-1.e0.d0.store"]
