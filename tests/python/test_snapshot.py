"""`snapshot()`: the last commit as a store of its own.

The reference is the same training without a break, and a reader of the format that was written
from docs/file_format.md alone.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from store_file import StoreFile
from test_commit import bits, equal, make_model, options, the_same_state, train
from test_commit_ranks import commit, made, rank, refused, resumed, store
from test_commit_ranks import make_model as make_model_of_ranks
from test_commit_ranks import train as train_ranks

import torch_ext
from torch_ext import OffloadedAdamW, OffloadedOptimizer
from torch_ext import __main__ as command
from torch_ext.optim._committing import Snapshot

NAME = "state.r0-of-1.e0.d0.store"


def directory(parent, name):
    made = parent / name
    made.mkdir()
    return made


@pytest.fixture
def here(tmp_path):
    return directory(tmp_path, "here")


@pytest.fixture
def there(tmp_path):
    return directory(tmp_path, "there")


def adamw(model, path, **more):
    return OffloadedAdamW(model.named_parameters(), **options(path, **more))


def rmsprop(model, path, **more):
    return OffloadedOptimizer(
        torch.optim.RMSprop, model.named_parameters(), **options(path, **more)
    )


def resume_adamw(path, model):
    return OffloadedAdamW.resume(path, model.named_parameters())


def resume_rmsprop(path, model):
    return OffloadedOptimizer.resume(path, torch.optim.RMSprop, model.named_parameters())


@pytest.mark.parametrize(
    ("make", "resume", "dtype", "more"),
    [
        (adamw, resume_adamw, torch.float32, {"host_memory": "240KiB"}),
        (adamw, resume_adamw, torch.bfloat16, {"state_format": "int8"}),
        (rmsprop, resume_rmsprop, torch.float32, {}),
    ],
    ids=["adamw", "int8", "rmsprop"],
)
def test_both_go_on_from_the_commit(here, there, make, resume, dtype, more):
    whole = make_model(dtype)
    with make(whole, here, **more) as optimizer:
        torch.manual_seed(1)
        train(whole, optimizer, 8)
        expected = optimizer.state_dict()
    model, other = make_model(dtype), make_model(dtype)
    with make(model, here, **more) as optimizer:
        torch.manual_seed(1)
        train(model, optimizer, 4)
        optimizer.commit(40, extra=torch_ext.rng_state())
        rng = torch_ext.rng_state()
        train(model, optimizer, 1)
        assert optimizer.snapshot(there).step == 40
        with resume(there, other) as second:
            assert second.committed_step == 40
            torch_ext.set_rng_state(second.committed_extra)
            train(other, second, 4)
            assert equal(bits(other), bits(whole))
            the_same_state(second.state_dict(), expected)
            second.commit()
        # What became of the snapshot is nothing to the original.
        optimizer.rollback()
        torch_ext.set_rng_state(rng)
        train(model, optimizer, 4)
        assert equal(bits(model), bits(whole))
        the_same_state(optimizer.state_dict(), expected)


def contents(path, model):
    """What a reader finds of each parameter: bytes of its state, and of its values."""
    found = StoreFile(path)
    all_of = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = []
        for values in (False, True):
            extent, offset = found.tile_of(name, values=values)
            at = extent.offsets[0] + offset
            parts.append(found.data[at : extent.offsets[0] + found.padded(extent)])
        # A large parameter goes on in another tile.
        first = min(parameter.nbytes, 4096)
        assert parts[1][:first] == parameter.detach().numpy().tobytes()[:first]
        all_of[name] = parts
    return found, all_of


def test_a_reader_of_the_format_finds_the_same(here, there):
    model = make_model()
    with adamw(model, here) as optimizer:
        for step in (1, 2):
            train(model, optimizer, 1)
            optimizer.commit(step, keep=2)
        made = optimizer.snapshot(there)
        mine, my_contents = contents(here / NAME, model)
        its, its_contents = contents(there / NAME, model)
    assert its_contents == my_contents
    assert its.caller == mine.caller
    assert its.layout == mine.layout
    assert (its.generation, its.step, its.time) == (mine.generation, mine.step, mine.time)
    assert (len(mine.kept), len(its.kept)) == (1, 0)
    assert its.data[16:32] != mine.data[16:32], "the id"
    assert made == Snapshot(2, made.way, sum(map(its.padded, its.extents)), made.seconds)
    # The head, the extents, two tables, and hardly more.
    assert os.path.getsize(there / NAME) <= (1 << 20) + made.bytes + 2 * 16384


def test_commands_take_it_for_a_store_of_its_own(here, there, capsys):
    model = make_model()
    with adamw(model, here) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit(1)
        optimizer.snapshot(there)
        assert command.main(["verify", str(there)]) == 0
        assert "whole: 1 commit (step 1)" in capsys.readouterr().out
        assert command.main(["verify", str(here), str(there)]) == 0
        assert command.main(["info", str(there)]) == 0
        assert "none that can be seen" in capsys.readouterr().out
        assert command.main(["remove", "--yes", str(there)]) == 0
        assert os.listdir(there) == []
        assert command.main(["remove", "--yes", str(here)]) == 1, "it is in use"
        assert command.main(["verify", str(here)]) == 0
        optimizer.snapshot(there)


def test_several_drives_have_as_many(tmp_path):
    drives = {directory(tmp_path, "a"): 2, directory(tmp_path, "b"): 1}
    copies = {directory(tmp_path, "c"): 2, directory(tmp_path, "d"): 1}
    model, other = make_model(), make_model()
    with adamw(model, drives, host_memory="240KiB") as optimizer:
        train(model, optimizer, 1)
        optimizer.commit(1)
        kept = bits(model)
        for wrong in ([*copies], [*copies][0], dict.fromkeys(copies, 1)):
            with pytest.raises(ValueError, match="2 directories of the weights 2, 1"):
                optimizer.snapshot(wrong)
        optimizer.snapshot(copies)
    assert command.main(["verify", *map(str, copies)]) == 0
    with resume_adamw(copies, other):
        assert equal(bits(other), kept)


def test_what_cannot_be_is_refused(here, there):
    model = make_model()
    with adamw(model, here) as optimizer:
        train(model, optimizer, 1)
        with pytest.raises(RuntimeError, match="nothing was committed"):
            optimizer.snapshot(there)
        optimizer.commit()
        with pytest.raises(FileNotFoundError) as missing:
            optimizer.snapshot(there / "missing")
        assert missing.value.filename == str(there / "missing")
        with pytest.raises(TypeError, match="path must be a str"):
            optimizer.snapshot(3)
        with pytest.raises(FileExistsError) as taken:
            optimizer.snapshot(here)
        assert taken.value.filename == str(here / NAME)
        optimizer.snapshot(there)
        with pytest.raises(FileExistsError, match="remove it, or give another"):
            optimizer.snapshot(there)
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.snapshot(there)


@pytest.mark.parametrize("name", ["state.r0-of-1.e1.d0.store", "state.r1-of-2.e0.d0.store"])
def test_a_store_that_resume_could_take_for_it_is_refused(here, there, name):
    model = make_model()
    with adamw(model, here) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
        (there / name).write_bytes(b"another run's")
        with pytest.raises(FileExistsError, match="remove it, or give another") as taken:
            optimizer.snapshot(there)
        assert taken.value.filename == str(there / name)
        assert os.listdir(there) == [name]


# Several processes -------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


def together(path, copies):
    model = make_model_of_ranks(sharded=True)
    with made(model, path) as optimizer:
        torch.manual_seed(rank())
        train_ranks(model, optimizer, 2)
        commit(optimizer)
        kept = bits_of(model)
        train_ranks(model, optimizer, 1)
        assert optimizer.snapshot(copies[0]).step == 2
        texts = [refused(FileExistsError, lambda: optimizer.snapshot(copies[0]))]
        # A call that was killed between the names of two processes.
        if rank() == 1:
            os.unlink(store(copies[0], 1))
        torch.distributed.barrier()
        assert optimizer.snapshot(copies[0]).step == 2
        # One has no place: no one has a snapshot.
        if rank() == 1:
            Path(store(copies[1], 1)).write_bytes(b"somebody's")
        torch.distributed.barrier()
        texts.append(refused(FileExistsError, lambda: optimizer.snapshot(copies[1])))
        missing = copies[1] if rank() == 0 else f"{copies[1]}/missing"
        texts.append(refused(FileNotFoundError, lambda: optimizer.snapshot(missing)))
        # A store that is the newer one by its name.
        Path(copies[2], "state.r0-of-1.e3.d0.store").touch()
        torch.distributed.barrier()
        texts.append(refused(FileExistsError, lambda: optimizer.snapshot(copies[2])))
        train_ranks(model, optimizer, 1)
        after = bits_of(model)
    model, optimizer = resumed(copies[0])
    with optimizer:
        assert equal(bits_of(model), kept)
        train_ranks(model, optimizer, 2)
        assert equal(bits_of(model), after)
    return texts


def bits_of(model):
    from test_commit_ranks import bits as bits_of_shards

    return bits_of_shards(model)


def test_all_processes_have_one_or_none(ranks, tmp_path):
    copies = [directory(tmp_path, name) for name in ("one", "two", "three")]
    here, there = ranks.run(together, directory(tmp_path, "here"), copies)
    assert sorted(os.listdir(copies[0])) == [f"state.r{i}-of-2.e0.d0.store" for i in (0, 1)]
    assert os.listdir(copies[1]) == ["state.r1-of-2.e0.d0.store"]
    assert Path(store(copies[1], 1)).read_bytes() == b"somebody's"
    assert os.listdir(copies[2]) == ["state.r0-of-1.e3.d0.store"]
    for texts, others in ((here, True), (there, False)):
        assert ["rank 1: " in text for text in texts[1:3]] == [others, others]
        assert "state.r0-of-1.e3.d0.store" in texts[3]


# File systems that share blocks --------------------------------------------------------


@pytest.fixture(params=["xfs", "btrfs"])
def shares(request, tmp_path):
    """A file system of its own, in a loop device."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    mkfs = shutil.which(f"mkfs.{request.param}")
    if mkfs is None:
        pytest.skip(f"mkfs.{request.param} is not installed")
    image, place = tmp_path / "image", directory(tmp_path, request.param)
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([mkfs, "-q", image], check=True)
    done = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"mount: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def free(path):
    os.sync()
    space = os.statvfs(path)
    return space.f_bfree * space.f_frsize


def test_blocks_are_shared_until_one_is_written(shares):
    here, there = directory(shares, "here"), directory(shares, "there")
    torch.manual_seed(0)
    model = torch.nn.Linear(1000, 1500)
    other = torch.nn.Linear(1000, 1500)
    with adamw(model, here, host_memory="4MiB") as optimizer:
        train_one(model, optimizer, 2)
        optimizer.commit(2)
        kept = bits(model)
        before = free(shares)
        done = optimizer.snapshot(there)
        assert done.way == "reflink"
        assert done.bytes >= 12 * 1_501_500
        # btrfs frees what was reserved at once as long as none of it is used.
        assert shares.name == "btrfs" or before - free(shares) < 4 << 20
        # The original is written all over.
        for step in (3, 4, 5):
            train_one(model, optimizer, 1)
            optimizer.commit(step)
        assert command.main(["verify", str(here), str(there)]) == 0
        with resume_adamw(there, other) as second:
            assert equal(bits(other), kept)
            train_one(other, second, 3)
            assert equal(bits(other), bits(model))
            second.commit()
        assert command.main(["verify", str(here), str(there)]) == 0


def train_one(model, optimizer, steps):
    for _ in range(steps):
        model(torch.ones(2, 1000)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_from_one_file_system_to_another_it_is_copied(shares, there):
    model = make_model()
    with adamw(model, directory(shares, "here")) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
        assert optimizer.snapshot(there).way == "copied"
    assert command.main(["verify", str(there)]) == 0


@pytest.mark.parametrize("shares", ["xfs"], indirect=True)  # btrfs cannot be filled so exactly.
def test_where_there_is_no_room_for_a_copy_nothing_is_shared(shares):
    here, there = directory(shares, "here"), directory(shares, "there")
    model = torch.nn.Linear(1000, 1500)
    with adamw(model, here, host_memory="4MiB") as optimizer:
        train_one(model, optimizer, 1)
        optimizer.commit()
        with open(shares / "other", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free(shares) - (12 << 20))
        with pytest.raises(OSError, match="No space"):
            optimizer.snapshot(there)
        assert os.listdir(there) == []
        train_one(model, optimizer, 1)
        os.unlink(shares / "other")
        while free(shares) < 64 << 20:  # It is freed a little later.
            time.sleep(0.05)
        assert optimizer.snapshot(there).way == "reflink"
