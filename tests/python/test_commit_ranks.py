"""Several processes commit together: all have a commit, or none.

The reference is the same training in the same processes without a break.
"""

import os
import resource
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import pytest
import torch
from optim_support import equal
from ranks import Ranks
from torch.distributed.fsdp import fully_shard

import torch_ext
from torch_ext import OffloadedAdamW, OffloadedOptimizer
from torch_ext.optim._dtensor import local_of

WORLD = 2


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(WORLD)
    yield group
    group.close()


def make_model(sharded, dtype=torch.float32):
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 301), torch.nn.Tanh(), torch.nn.Linear(301, 33)
    ).to(dtype)
    if sharded:
        fully_shard(model[0])
        fully_shard(model)
    return model


def rank():
    return torch.distributed.get_rank()


def train(model, optimizer, steps):
    for _ in range(steps):
        x = torch.randn(16, 64).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(model):
    return [local_of(p).detach().clone() for p in model.parameters()]


def made(model, path, **more):
    return OffloadedAdamW(
        model.named_parameters(), lr=1e-2, nvme_path=path, host_memory="1MiB", **more
    )


def commit(optimizer, step=None, **more):
    return optimizer.commit(step, extra=torch_ext.rng_state(), **more)


def resumed(path, sharded=True, dtype=torch.float32, **more):
    model = make_model(sharded, dtype)
    optimizer = OffloadedAdamW.resume(
        path, model.named_parameters(), host_memory="1MiB", **more
    )
    torch_ext.set_rng_state(optimizer.committed_extra)
    return model, optimizer


def go_on(path, sharded, dtype, more, wait=True):
    whole = make_model(sharded, dtype)
    with made(whole, path, **more) as optimizer:
        torch.manual_seed(rank())
        train(whole, optimizer, 8)
    model = make_model(sharded, dtype)
    with made(model, path, **more) as optimizer:
        torch.manual_seed(rank())
        for _ in range(3):
            train(model, optimizer, 1)
            if not wait:  # It goes on behind the next iteration.
                commit(optimizer, wait=False)
        train(model, optimizer, 1)
        made_last = commit(optimizer, wait=wait)
        assert made_last.generation == (1 if wait else 4)
        train(model, optimizer, 1)
        made_last.wait()
        assert optimizer.committed_step == 4
    model, optimizer = resumed(path, sharded, dtype)
    with optimizer:
        assert optimizer.committed_step == 4
        train(model, optimizer, 4)
        assert equal(bits(model), bits(whole))
        assert commit(optimizer).step == 8
    return sorted(os.listdir(path))


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    ("dtype", "more"),
    [(torch.float32, {}), (torch.bfloat16, {"state_format": "int8"})],
    ids=["exact", "int8"],
)
def test_each_goes_on_where_it_was_committed(ranks, tmp_path, sharded, dtype, more):
    (names, _) = ranks.run(go_on, tmp_path, sharded, dtype, more)
    assert names == [f"state.r{i}-of-2.e0.d0.store" for i in range(WORLD)]


@pytest.mark.parametrize(
    ("sharded", "dtype", "more"),
    [
        (True, torch.float32, {}),
        (True, torch.bfloat16, {"state_format": "int8"}),
        (False, torch.float16, {"overlap_backward": "update"}),
    ],
    ids=["exact", "int8", "update"],
)
def test_steps_go_on_beside_a_commit_of_several(ranks, tmp_path, sharded, dtype, more):
    ranks.run(go_on, tmp_path, sharded, dtype, more, False)


def votes_late(path):
    model = make_model(sharded=True)
    with made(model, path) as optimizer:
        train(model, optimizer, 1)
        commit(optimizer, wait=False).wait()
        beside, may_vote = optimizer._together.beside(), threading.Event()
        exchange = beside.exchange

        def late(value):
            may_vote.wait()
            return exchange(value)

        beside.exchange = late
        train(model, optimizer, 1)
        kept = bits(model)
        begun = commit(optimizer, wait=False)
        begun.wait_source()
        # What the processes say to each other meanwhile does not meet the vote.
        torch.distributed.barrier()
        with pytest.raises(TimeoutError):
            begun.wait(timeout=0.05)
        assert (begun.done(), optimizer.committed_step) == (False, 1)
        may_vote.set()
        begun.wait()
        assert (begun.done(), optimizer.committed_step) == (True, 2)
        train(model, optimizer, 1)
        optimizer.rollback()
        assert equal(bits(model), kept)


def test_the_call_returns_before_the_vote(ranks, tmp_path):
    ranks.run(votes_late, tmp_path)


def any_class(path):
    def make():
        model = make_model(sharded=False)
        return model, OffloadedOptimizer(
            torch.optim.RMSprop, model.named_parameters(), lr=1e-2, nvme_path=path
        )

    whole, optimizer = make()
    with optimizer:
        torch.manual_seed(rank())
        train(whole, optimizer, 4)
    model, optimizer = make()
    with optimizer:
        torch.manual_seed(rank())
        train(model, optimizer, 2)
        commit(optimizer)
    model = make_model(sharded=False)
    with OffloadedOptimizer.resume(
        path, torch.optim.RMSprop, model.named_parameters()
    ) as optimizer:
        torch_ext.set_rng_state(optimizer.committed_extra)
        train(model, optimizer, 2)
        assert equal(bits(model), bits(whole))


def test_any_class_commits_in_several_processes(ranks, tmp_path):
    ranks.run(any_class, tmp_path)


def refused(kind, call):
    """Returns the text of the error, which each process has."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def one_fails(path):
    model = make_model(sharded=True)
    texts = []
    with made(model, path) as optimizer:
        train(model, optimizer, 1)
        # Before anything is written: what one cannot keep, none commits.
        extra = object() if rank() == 1 else None
        texts.append(refused(TypeError, lambda: optimizer.commit(extra=extra)))
        step = 5 + rank()
        texts.append(refused(ValueError, lambda: optimizer.commit(step)))
        assert commit(optimizer).generation == 1
        kept = bits(model)
        train(model, optimizer, 1)
        # In the midst of it: the file of one is gone.
        if rank() == 1:
            os.unlink(store(path, 1))
        texts.append(refused(FileNotFoundError, lambda: commit(optimizer)))
        texts.append(refused(FileNotFoundError, lambda: commit(optimizer, wait=False)))
        assert [c.step for c in optimizer.commits()] == [1]
        train(model, optimizer, 1)
        optimizer.rollback()
        assert equal(bits(model), kept)
    return texts


def store(path, of_rank):
    return f"{path}/state.r{of_rank}-of-{WORLD}.e0.d0.store"


def test_what_one_cannot_commit_none_commits(ranks, tmp_path):
    here, there = ranks.run(one_fails, tmp_path)
    for texts, others in ((here, True), (there, False)):
        assert "extra is a object" in texts[0]
        assert "(step, keep, wait) is (5, 1, True) on rank 0 and (6, 1, True) on" in texts[1]
        assert all("was removed" in text for text in texts[2:])
        assert all(("rank 1: " in texts[i]) == others for i in (0, 2, 3))


def a_full_drive(path, small):
    model = make_model(sharded=True)
    where = small if rank() == 1 else path
    with made(model, where) as optimizer:
        train(model, optimizer, 1)
        commit(optimizer)
        train(model, optimizer, 1)
        more = torch.zeros(1 << 24) if rank() == 1 else None
        text = refused(OSError, lambda: optimizer.commit(extra=more))
        after = bits(model)
        train(model, optimizer, 1)
        assert commit(optimizer).step == 3
        assert not equal(bits(model), after)
        kept = bits(model)
    model, optimizer = resumed(where)
    with optimizer:
        assert equal(bits(model), kept)
    return text


def a_full_drive_later(path, small):
    """The errors of commits that nobody waits for, from each call that raises them."""
    model = make_model(sharded=True)
    where = small if rank() == 1 else path
    texts = []
    optimizer = made(model, where)
    train(model, optimizer, 1)
    commit(optimizer)
    more = torch.zeros(1 << 24) if rank() == 1 else None
    begin = lambda: optimizer.commit(extra=more, wait=False)  # noqa: E731
    texts.append(refused(OSError, begin().wait))
    begin()
    texts.append(refused(OSError, lambda: commit(optimizer)))
    train(model, optimizer, 1)
    assert commit(optimizer, wait=False).step == 2
    begin()
    texts.append(refused(OSError, optimizer.close))
    _, optimizer = resumed(where)
    with optimizer:
        assert optimizer.committed_step == 2
    return texts


@pytest.fixture
def small(tmp_path):
    """A drive of 64 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize("job", [a_full_drive, a_full_drive_later])
def test_a_full_drive_of_one_is_an_error_of_all(ranks, tmp_path, small, job):
    here, there = ranks.run(job, tmp_path, small)
    here, there = ([each] if isinstance(each, str) else each for each in (here, there))
    assert all("rank 1: " in text and "No space" in text for text in here)
    assert all("rank" not in text and "No space" in text for text in there)


def a_first_commit(path, small, wait):
    """It fails in rank 1, and the run is started again."""
    model = make_model(sharded=True)
    where = small if rank() == 1 else path
    with made(model, where) as optimizer:
        train(model, optimizer, 1)
        more = torch.zeros(1 << 25) if rank() == 1 else None
        text = refused(OSError, lambda: optimizer.commit(extra=more, wait=wait).wait())
    assert os.listdir(where) == ["small"] * (rank() == 0)
    refused(FileNotFoundError, lambda: resumed(where))
    with made(model, where) as optimizer:
        assert commit(optimizer, wait=wait).generation == 1
    return text


@pytest.mark.parametrize("wait", [True, False])
def test_a_first_commit_that_failed_is_not_in_the_way(ranks, tmp_path, small, wait):
    here, there = ranks.run(a_first_commit, tmp_path, small, wait)
    assert "rank 1: " in here
    assert "No space" in there


def closed_early(path):
    model = make_model(sharded=False)
    optimizer = made(model, path)
    commit(optimizer)
    if rank() == 1:
        optimizer.close()
    texts = [refused(RuntimeError, lambda: commit(optimizer))]
    texts += [refused(RuntimeError, optimizer.rollback)]
    optimizer.close()
    more = {"lr": 1} if rank() == 1 else {}
    texts += [refused(TypeError, lambda: resumed(path, False, **more))]
    small = {"host_memory": "1KiB"} if rank() == 1 else {}
    make = OffloadedAdamW.resume
    texts += [refused(ValueError, lambda: make(path, model.named_parameters(), **small))]
    make(path, model.named_parameters()).close()  # Nobody has kept the store.
    return texts


def test_nobody_waits_for_one_that_cannot_take_part(ranks, tmp_path):
    here, there = ranks.run(closed_early, tmp_path)
    assert all(text.startswith("rank 1: ") for text in here)
    words = ("is closed", "is closed", "takes no 'lr'", "host_memory must be at least")
    for text, word in zip(there, words, strict=True):
        assert word in text
        assert "rank" not in text


def goes_back(path):
    model = make_model(sharded=True)
    with made(model, path) as optimizer:
        torch.manual_seed(rank())
        kept = {}
        for step in (1, 2, 3):
            train(model, optimizer, 1)
            commit(optimizer, keep=3)
            kept[step] = bits(model)
        text = refused(ValueError, lambda: optimizer.rollback(1 + rank()))
        assert equal(bits(model), kept[3])
        optimizer.rollback(2)
        assert equal(bits(model), kept[2])
        torch_ext.set_rng_state(optimizer.committed_extra)
        train(model, optimizer, 1)
        assert equal(bits(model), kept[3])
    model, optimizer = resumed(path, step=1)
    with optimizer:
        assert equal(bits(model), kept[1])
    return text


def test_all_go_back_to_the_same_commit(ranks, tmp_path):
    texts = ranks.run(goes_back, tmp_path)
    assert all("generation of the commit is 1 on rank 0 and 2 on rank 1" in t for t in texts)


def dies(path, at):
    """Commits three times. Rank 1 ends in the third, before or after an exchange of it."""
    model = make_model(sharded=False)
    optimizer = made(model, path)
    torch.manual_seed(rank())
    train(model, optimizer, 1)
    commit(optimizer)
    train(model, optimizer, 1)
    commit(optimizer)
    train(model, optimizer, 1)
    together, moments = optimizer._together, iter(MOMENTS)
    exchange = together.exchange

    def pass_by():
        if next(moments) == at and rank() == 1:
            os._exit(1)

    def watched(value):
        pass_by()
        values = exchange(value)
        pass_by()
        return values

    together.exchange = watched
    commit(optimizer)
    return "committed"


def dies_beside(path, at):
    """So too, in a commit that nobody waits for: before or after the vote."""
    model = make_model(sharded=False)
    optimizer = made(model, path)
    torch.manual_seed(rank())
    for _ in range(2):
        train(model, optimizer, 1)
        commit(optimizer, wait=False).wait()
    train(model, optimizer, 1)
    beside = optimizer._together.beside()
    exchange = beside.exchange

    def watched(value):
        if at == "durable" and rank() == 1:
            os._exit(1)
        values = exchange(value)
        if at == "voted" and rank() == 1:
            os._exit(1)
        return values

    beside.exchange = watched
    commit(optimizer, wait=False).wait()
    return "committed"


def after_the_death(path):
    whole = make_model(sharded=False)
    other = f"{path}/other{rank()}"
    os.makedirs(other)
    with made(whole, other) as optimizer:
        torch.manual_seed(rank())
        train(whole, optimizer, 5)
    model, optimizer = resumed(path, sharded=False)
    with optimizer:
        step = optimizer.committed_step
        train(model, optimizer, 5 - step)
        assert equal(bits(model), bits(whole))
        generation = commit(optimizer, 5).generation
    again, optimizer = resumed(path, sharded=False)
    with optimizer:
        assert optimizer.committed_step == 5
        assert equal(bits(again), bits(whole))
    return step, generation


#: What is before and after the exchanges of a commit: the run, errors, the step, generations,
#: the vote.
MOMENTS = ("start", "same run", "same run", "checked", "checked", "same step", "same step")
MOMENTS += ("begin", "durable", "voted")


# At "begin" the other goes on to its root, whose number is not used again.
@pytest.mark.parametrize(
    ("job", "at", "step", "generation"),
    [
        (dies, "start", 2, 3),
        (dies, "begin", 2, 4),
        (dies, "durable", 3, 4),
        (dies_beside, "durable", 3, 4),
        (dies_beside, "voted", 3, 4),
    ],
)
def test_if_one_is_killed_in_a_commit_all_have_the_same(tmp_path, job, at, step, generation):
    group = Ranks(WORLD)
    with pytest.raises(AssertionError, match="died"):
        group.run(job, tmp_path, at)
    group = Ranks(WORLD)
    assert group.run(after_the_death, tmp_path) == [(step, generation)] * WORLD
    group.close()


def without_a_shard(path):
    model = make_model(sharded=False)
    with made(model, path) as optimizer:
        train(model, optimizer, 1)
        commit(optimizer)
    torch.distributed.barrier()
    if rank() == 0:
        shutil.move(store(path, 1), f"{path}/away")
    torch.distributed.barrier()
    text = refused(OSError, lambda: resumed(path, sharded=False))
    nothing = refused(FileNotFoundError, lambda: resumed(f"{path}/nothing", sharded=False))
    return text, nothing


def test_shards_that_are_missing_are_named(ranks, tmp_path):
    (tmp_path / "nothing").mkdir()
    for text, _ in ranks.run(without_a_shard, tmp_path):
        assert "the shards of rank 1 of 2 are missing" in text


def is_silent(path):
    short = torch.distributed.new_group(timeout=timedelta(seconds=1))
    model = make_model(sharded=False)
    with made(model, path, process_group=short) as optimizer:
        train(model, optimizer, 1)
        if rank() == 1:
            return ""
        return refused(RuntimeError, lambda: commit(optimizer))


def test_who_does_not_answer_is_named(tmp_path):
    group = Ranks(WORLD)
    text, _ = group.run(is_silent, tmp_path)
    group.close(failed=True)
    assert "Ranks 1 failed" in text


def a_group_of_its_own(path):
    alone = [torch.distributed.new_group([i]) for i in range(WORLD)][rank()]
    where = f"{path}/{rank()}"
    os.makedirs(where)
    model = make_model(sharded=False)
    with made(model, where, process_group=alone) as optimizer:
        train(model, optimizer, 1)
        if rank() == 1:
            optimizer.commit(7)
    if rank() == 0:
        return os.listdir(where)
    model = make_model(sharded=False)
    with OffloadedAdamW.resume(
        where, model.named_parameters(), process_group=alone
    ) as optimizer:
        assert optimizer.committed_step == 7
    return os.listdir(where)


def test_a_process_may_commit_in_a_group_of_its_own(ranks, tmp_path):
    assert ranks.run(a_group_of_its_own, tmp_path) == [[], ["state.r0-of-1.e0.d0.store"]]


def in_some_groups(path):
    short = {"timeout": timedelta(seconds=30)}  # Those that do not meet shall not wait long.
    some = torch.distributed.new_group([0, 2], **short)
    every = torch.distributed.new_group([2, 0, 1], **short)
    if rank() == 0:  # It is in more groups than the others.
        torch.distributed.new_group([0], use_local_synchronization=True, **short)
    model, other = make_model(sharded=False), make_model(sharded=False)
    of_some = made(other, f"{path}/some", process_group=some) if rank() in (0, 2) else None
    with made(model, f"{path}/all", process_group=every) as of_all:
        for step in range(3):
            train(model, of_all, 1)
            if of_some is not None:
                train(other, of_some, 1)
                commit(of_some, step, wait=False)
            begun = commit(of_all, step, wait=False)
        begun.wait()
        kept = [c.step for c in of_all.commits()]
    if of_some is not None:
        kept += [c.step for c in of_some.commits()]
        of_some.close()
    return kept


def test_processes_in_different_groups_commit_beside_the_next_step(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "all").mkdir()
    group = Ranks(3)
    try:
        assert group.run(in_some_groups, tmp_path) == [[2, 2], [2], [2, 2]]
    finally:
        group.close()


def initialized_again(path):
    model = make_model(sharded=False)
    optimizer = made(model, path)
    train(model, optimizer, 1)
    commit(optimizer, wait=False).wait()
    here = rank()
    torch.distributed.destroy_process_group()
    refused(ValueError, lambda: commit(optimizer, wait=False))  # There are no others.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}/again", rank=here, world_size=WORLD
    )
    train(model, optimizer, 1)
    commit(optimizer, wait=False).wait()
    train(model, optimizer, 1)
    begun = commit(optimizer, wait=False)
    optimizer.close()
    return optimizer.committed_step, begun.done()


def test_the_default_group_may_be_made_anew_between_commits(tmp_path):
    group = Ranks(WORLD)
    try:
        assert group.run(initialized_again, tmp_path) == [(3, True)] * WORLD
    finally:
        group.close()


def open_here():
    """The threads and descriptors of this process."""
    return [len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd")]


def one_after_another(path):
    counts, kept = [], []
    for number in range(6):
        where = f"{path}/{number}"
        os.makedirs(where, exist_ok=True)
        model = make_model(sharded=False)
        with made(model, where) as optimizer:
            train(model, optimizer, 1)
            kept.append(commit(optimizer, wait=False))  # A commit holds no threads.
        counts.append(open_here())
    return counts


def test_a_closed_optimizer_leaves_no_threads(ranks, tmp_path):
    for counts in ranks.run(one_after_another, tmp_path):
        assert counts[5] == counts[0]


@contextmanager
def no_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def cannot_connect(path):
    model = make_model(sharded=False)
    with made(model, path) as optimizer:
        train(model, optimizer, 1)
        commit(optimizer)
        begin = time.monotonic()
        with no_descriptors() if rank() == 1 else nullcontext():
            text = refused(OSError, lambda: commit(optimizer, 5, wait=False))
        seconds = time.monotonic() - begin
        commit(optimizer, 6, wait=False).wait()
        assert [c.step for c in optimizer.commits()] == [6]
    return text, seconds


def test_all_hear_at_once_if_one_cannot_be_connected(ranks, tmp_path):
    for text, seconds in ranks.run(cannot_connect, tmp_path):
        assert "Too many open files" in text
        assert seconds < 30


def give_different_things(path):
    models = [make_model(sharded=False) for _ in range(2)]
    a, b = (made(models[i], f"{path}/{'ab'[i]}") for i in range(2))
    texts = []
    for model, optimizer in zip(models, (a, b), strict=True):
        train(model, optimizer, 1)
    texts.append(refused(ValueError, lambda: a.commit(1, wait=rank() == 0)))
    for wait in (True, False):
        first, second = (a, b) if rank() == 0 else (b, a)
        texts.append(refused(ValueError, lambda: first.commit(1, wait=wait)))  # noqa: B023
        texts.append(refused(ValueError, lambda: second.commit(1, wait=wait)))  # noqa: B023
        assert (a.commits(), b.commits()) == ([], [])
    for optimizer in (a, b):
        assert optimizer.commit(2, wait=False).step == 2
        optimizer.close()
    for name in "ab":
        with OffloadedAdamW.resume(f"{path}/{name}", models[0].named_parameters()) as found:
            assert found.committed_step == 2
    return texts


def test_different_things_are_not_committed_together(ranks, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    for waits, *orders in ranks.run(give_different_things, tmp_path):
        assert "(1, 1, True) on rank 0 and (1, 1, False) on rank 1" in waits
        for text, name in zip(orders, "abab", strict=True):
            other = "b" if name == "a" else "a"
            assert f"{tmp_path}/{name}' on rank 0" in text
            assert f"{tmp_path}/{other}' on rank 1" in text


def made_for_itself(path):
    if rank() == 0:  # Nobody commits it.
        made(make_model(sharded=False), f"{path}/itself").close()
    model = make_model(sharded=False)
    with made(model, f"{path}/all") as optimizer:
        train(model, optimizer, 1)
        return commit(optimizer).step


def test_one_process_may_have_made_an_optimizer_more(tmp_path):
    for name in ("itself", "all"):
        (tmp_path / name).mkdir()
    group = Ranks(WORLD)
    try:
        assert group.run(made_for_itself, tmp_path) == [1] * WORLD
    finally:
        group.close()
