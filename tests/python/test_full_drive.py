"""Drives that are full or fail: file systems in loop devices, which only root can mount."""

import contextlib
import errno
import io
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import torch_ext
from torch_ext import OffloadedAdamW, OffloadedOptimizer, TensorSwapper, aio_handle
from torch_ext.__main__ import collect

MIB = 2**20
NO_SPACE = "No space left on device"


def run(*command):
    """Or a skip that says why this machine cannot."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        pytest.skip(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


@pytest.fixture
def loop(request):
    """Makes file systems: loop("ext2", 64) is a directory of 64 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    folder = Path(
        subprocess.check_output(["mktemp", "-d", "-p", "/var/tmp"], text=True).strip()
    )
    mounted = []

    def make(kind, mib, *options, within=folder):
        image, place = within / f"image{len(mounted)}", folder / f"place{len(mounted)}"
        place.mkdir()
        with image.open("wb") as file:
            file.truncate(mib * MIB)
        run(f"mkfs.{kind}", "-q", *options, image)
        run("mount", "-o", "loop", image, place)
        mounted.append(place)
        return place

    try:
        yield make
    finally:
        for place in reversed(mounted):
            subprocess.run(["umount", "--lazy", place], check=True, timeout=60)
        shutil.rmtree(folder)


def free(place):
    space = os.statvfs(place)
    return space.f_bfree * space.f_frsize


def fill(place, leave):
    """Takes all of a file system but so many bytes."""
    with (place / "fill").open("wb") as file:
        left = free(place) - leave
        with contextlib.suppress(OSError):  # The map of its blocks takes some too.
            while left > 0:
                left -= file.write(b"x" * min(left, MIB))
                file.flush()
            os.fsync(file.fileno())


class Twins:
    """The same parameter under both optimizers."""

    def __init__(self, elements, place, **options):
        self.p = torch.linspace(-1, 1, elements).requires_grad_()
        self.q = self.p.detach().clone().requires_grad_()
        self.ours = OffloadedAdamW([self.p], lr=1e-2, nvme_path=place, **options)
        self.theirs = torch.optim.AdamW([self.q], lr=1e-2, fused=True)

    def give(self, seed):
        g = torch.randn(self.p.numel(), generator=torch.Generator().manual_seed(seed))
        self.p.grad, self.q.grad = g, g.clone()

    def step(self, seed):
        self.give(seed)
        self.ours.step()
        self.theirs.step()

    def equal(self):
        return torch.equal(self.p, self.q)

    def holds(self, state_dict):
        """Whether this is the state, by torch's own."""
        theirs = self.theirs.state_dict()["state"][0]
        ours = state_dict["state"][0]
        return all(torch.equal(ours[k], theirs[k]) for k in ("exp_avg", "exp_avg_sq"))


KINDS = pytest.mark.parametrize("kind", ["ext2", "ext4"])


@KINDS
def test_a_step_without_room_changes_nothing_and_can_be_made_again(loop, kind):
    place = loop(kind, 64)
    fill(place, 10 * MIB)
    before = free(place)
    twins = Twins(4 << 20, place, host_memory="2MiB")  # 32 MiB of state.
    twins.give(0)
    for _ in range(2):
        with pytest.raises(OSError, match=NO_SPACE) as caught:
            twins.ours.step()
        assert caught.value.errno == errno.ENOSPC
        assert twins.equal()
        assert free(place) > before - MIB
    (place / "fill").unlink()
    for seed in range(3):
        twins.step(seed)
        assert twins.equal()
    assert twins.holds(twins.ours.state_dict())
    twins.ours.close()


def test_the_space_of_a_step_is_there_before_the_step(loop):
    """Without fallocate too: what has once been made sure of cannot run out."""
    place = loop("ext2", 64)
    twins = Twins(1 << 20, place, host_memory="2MiB")
    twins.step(0)
    fill(place, 0)
    for seed in range(1, 4):
        twins.step(seed)
    assert twins.equal()
    twins.ours.close()


@KINDS
def test_a_swapper_without_room_keeps_the_old_value(loop, kind):
    place = loop(kind, 64)
    with TensorSwapper(place) as swapper:
        old = torch.arange(5_000_000, dtype=torch.float32)
        swapper.swap_out("k", old).wait(60)
        before = free(place)
        for key in ("k", "big"):
            with pytest.raises(OSError, match=NO_SPACE) as caught:
                swapper.swap_out(key, torch.zeros(12_000_000)).wait(60)
            assert caught.value.errno == errno.ENOSPC
            assert free(place) > before - MIB
        assert torch.equal(swapper.swap_in("k").result(60), old)
        swapper.delete("k")
        swapper.swap_out("z", old + 1).wait(60)
        assert torch.equal(swapper.swap_in("z").result(60), old + 1)


@KINDS
@pytest.mark.parametrize("size", [0, 12 * MIB, 24 * MIB])
def test_a_handle_without_room_gives_back_what_it_took(loop, kind, size):
    place = loop(kind, 48)
    path = place / "file"
    with path.open("wb") as file:
        file.write(b"kept")
        file.truncate(size or 4)  # Holes.
    fill(place, 12 * MIB)
    before, blocks = free(place), path.stat().st_blocks
    handle = aio_handle(strict=True)
    with pytest.raises(OSError, match=NO_SPACE) as caught:
        handle.sync_pwrite(torch.ones(24 * MIB, dtype=torch.uint8), str(path))
    assert caught.value.errno == errno.ENOSPC
    assert free(place) > before - MIB // 2
    assert path.stat().st_blocks < blocks + MIB // 2 // 512
    assert path.stat().st_size == (size or 4)
    with path.open("rb") as file:
        assert file.read(4) == b"kept"
    (place / "fill").unlink()
    ones = torch.ones(24 * MIB, dtype=torch.uint8)
    handle.sync_pwrite(ones, str(path))
    assert path.read_bytes() == ones.numpy().tobytes()
    handle.close()


@KINDS
@pytest.mark.parametrize("mode", ["tensors", "mapped"])
def test_a_state_dict_without_room_on_the_drive_leaves_all_as_it_was(loop, kind, mode):
    place = loop(kind, 48)
    twins = Twins(1 << 20, place, host_memory="2MiB", state_dict_mode=mode)
    twins.step(0)
    fill(place, 3 * MIB)
    before = free(place)
    if mode == "mapped":
        with pytest.raises(OSError, match=NO_SPACE) as caught:
            twins.ours.state_dict()
        assert caught.value.errno == errno.ENOSPC
        assert free(place) > before - MIB // 2
    else:
        assert twins.holds(twins.ours.state_dict())
    twins.step(1)
    assert twins.equal()
    (place / "fill").unlink()
    assert twins.holds(twins.ours.state_dict())
    twins.ours.close()


@pytest.fixture
def thin(loop):
    """A directory of 128 MiB on a drive that holds 48, and the drive."""
    outer = loop("ext4", 48)
    options = ("-E", "lazy_itable_init=0,nodiscard", "-O", "^has_journal")
    return loop("ext4", 128, *options, within=outer), outer


def drop_pages(place):
    """As the kernel does when memory is short."""
    os.sync()
    maps = Path("/proc/self/maps").read_text().splitlines()
    for line in maps:
        if str(place) in line:
            fd = os.open(f"/proc/self/map_files/{line.split()[0]}", os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("mode", ["tensors", "mapped"])
def test_what_a_drive_loses_is_never_saved_in_silence(thin, mode):
    place, outer = thin
    twins = Twins(1 << 20, place, host_memory="64MiB", state_dict_mode=mode)
    twins.step(0)
    twins.step(1)
    fill(outer, 0)
    if mode == "mapped":
        with pytest.raises(OSError, match="EIO|ENOSPC"):
            twins.ours.state_dict()
    else:
        state_dict = twins.ours.state_dict()
        drop_pages(place)
        assert twins.holds(saved(state_dict))
    twins.step(2)
    assert twins.equal()
    twins.ours.close()


def test_a_drive_that_fails_later_does_not_take_a_state_dict_away(loop):
    place = loop("ext4", 128, "-O", "^has_journal")
    twins = Twins(1 << 20, place, host_memory="64MiB")
    twins.step(0)
    state_dict = twins.ours.state_dict()
    drop_pages(place)
    os.truncate(place.parent / "image0", 8 * MIB)  # Reads of the rest fail from here on.
    assert twins.holds(saved(state_dict))
    twins.ours.close()


@pytest.mark.parametrize("what", ["adamw", "any class", "swapper", "handle"])
def test_a_file_system_without_fallocate_is_said_once(loop, caplog, what):
    place = loop("ext2", 32)
    p = torch.ones(1000, requires_grad=True)
    p.grad = torch.ones(1000)
    caplog.set_level(logging.INFO, logger="torch_ext")
    if what == "adamw":
        with OffloadedAdamW([p], nvme_path=place) as optimizer:
            optimizer.step()
    elif what == "any class":
        with OffloadedOptimizer(torch.optim.Adam, [p], nvme_path=place) as optimizer:
            optimizer.step()
    elif what == "swapper":
        with TensorSwapper(place) as swapper:
            for key in "ab":
                swapper.swap_out(key, torch.ones(1000)).wait()
    else:
        handle = aio_handle()
        for name in "ab":
            handle.sync_pwrite(torch.ones(1000), str(place / name))
        handle.close()
    assert sum("no fallocate" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(("kind", "said"), [("ext2", 1), ("ext4", 0)])
def test_info_calls_a_file_system_without_fallocate_degraded(loop, kind, said):
    report = collect(loop(kind, 32))
    assert report["directory"]["reserves"] is not bool(said)
    assert sum("fallocate" in way for way in report["degraded"]) == said


PROGRAM = """
    import os, sys, torch
    from torch_ext import OffloadedAdamW

    place, cgroup, mode = sys.argv[1:]
    torch.set_num_threads(1)
    p = torch.ones(4 << 20, requires_grad=True)  # 32 MiB of state.
    q = torch.ones(4 << 20, requires_grad=True)
    ours = OffloadedAdamW([p], nvme_path=place, host_memory="4MiB", state_dict_mode=mode)
    theirs = torch.optim.AdamW([q], fused=True)
    p.grad = q.grad = torch.arange(4 << 20, dtype=torch.float32)
    ours.step()
    theirs.step()
    with open(cgroup + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    try:
        state = ours.state_dict()["state"][0]
    except OSError as error:
        print("refused", error.errno, error)
    else:
        torch.save(state, place + "/saved")
        state = torch.load(place + "/saved", mmap=True)
        print("equal", torch.equal(state["exp_avg"], theirs.state[q]["exp_avg"]))
    ours.step()
    theirs.step()
    print("goes on", torch.equal(p, q))
"""


@pytest.fixture
def small_cgroup():
    """A memory cgroup of 33 MiB, whichever version there is."""
    one = Path("/sys/fs/cgroup/memory")
    parent = one if one.is_dir() else Path("/sys/fs/cgroup")
    group = parent / f"torch_ext_test_{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if parent == one else "memory.max")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        try:
            limit.write_text(str(33 * MIB))
        except OSError as error:
            pytest.skip(f"a cgroup's memory cannot be limited: {error}")
        yield group
    finally:
        group.rmdir()


@pytest.mark.parametrize("mode", ["tensors", "mapped"])
def test_a_state_dict_larger_than_memory_never_kills_the_process(nvme_dir, small_cgroup, mode):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), nvme_dir, small_cgroup, mode],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert second == "goes on True"
    if mode == "mapped":
        assert first == "equal True"
    else:
        assert first.startswith(f"refused {errno.ENOMEM} ")
        assert "32 MiB" in first
        assert 'state_dict_mode="mapped"' in first


LOADS = """
    import os, sys, torch
    import torch_ext

    place, cgroup = sys.argv[1:]
    torch.set_num_threads(1)
    torch_ext.save({"a": torch.zeros(20 << 20, dtype=torch.uint8)}, place + "/a")
    torch_ext.save({"a": torch.zeros(1 << 20, dtype=torch.uint8)}, place + "/small")
    torch_ext.load(place + "/small")
    with open(cgroup + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    print(len(torch_ext.load(place + "/a")["a"]) >> 20)
"""


def test_a_load_that_just_fits_is_not_killed(nvme_dir, small_cgroup):
    """What it reads through needs memory too."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADS), nvme_dir, small_cgroup],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr


def test_unknown_modes_are_refused_by_name(nvme_dir):
    parameters = [torch.ones(1, requires_grad=True)]
    for make in (
        OffloadedAdamW,
        lambda params, **options: OffloadedOptimizer(torch.optim.Adam, params, **options),
    ):
        with pytest.raises(ValueError, match='must be "tensors", "mapped" or'):
            make(parameters, nvme_path=nvme_dir, state_dict_mode="file")
        with pytest.raises(TypeError, match="state_dict_mode must be a str"):
            make(parameters, nvme_path=nvme_dir, state_dict_mode=None)


@KINDS
def test_a_save_onto_a_full_drive_leaves_the_old_file_and_the_space(loop, kind):
    place = loop(kind, 32)
    path = place / "x.safetensors"
    torch_ext.save({"a": torch.ones(1000)}, path)
    fill(place, 8 * MIB)
    before, names = free(place), set(os.listdir(place))
    with pytest.raises(OSError, match=NO_SPACE) as raised:
        torch_ext.save({"a": torch.zeros(16 * MIB, dtype=torch.uint8)}, path)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, os.fspath(path))
    assert set(os.listdir(place)) == names
    assert free(place) == before
    assert torch_ext.load(path)["a"].sum() == 1000
    torch_ext.save({"a": torch.full((MIB,), 2.0)}, path)
    assert torch_ext.load(path)["a"].sum() == 2 * MIB
    assert set(os.listdir(place)) == names


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_commit_without_room_takes_nothing_from_the_next(loop, kind):
    """Neither its own space nor the tables' may be gone when the drive is full.

    Values are larger than what a file has to spare, which grows by 16 MiB.
    """
    place = loop(kind, 320)
    model = torch.nn.Linear(8192, 1024, bias=False)
    with OffloadedAdamW(
        model.parameters(), lr=1e-2, nvme_path=place, host_memory="4MiB"
    ) as optimizer:

        def step():
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()

        step()
        optimizer.commit()
        fill(place, 0)
        step()
        optimizer.commit()
        for _ in range(2):
            with pytest.raises(OSError, match="a commit needs .* more here") as caught:
                optimizer.commit(extra={"x": torch.zeros(8 * MIB)})
            assert caught.value.errno == errno.ENOSPC
            step()
            optimizer.commit(extra={"small": torch.zeros(0)})
        step()
        last = optimizer.commit(7)
        kept = model.weight.detach().clone()
        assert [commit.generation for commit in optimizer.commits()] == [last.generation]
    model = torch.nn.Linear(8192, 1024, bias=False)
    with OffloadedAdamW.resume(place, model.parameters()) as optimizer:
        assert torch.equal(model.weight, kept)
        assert optimizer.committed_step == 7
