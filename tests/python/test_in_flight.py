"""What happens to tensors and files while operations use them."""

import os
import subprocess

import pytest
import torch

from torch_ext import TensorSwapper


@pytest.fixture
def swapper(nvme_dir):
    with TensorSwapper(nvme_dir, host_memory="16MiB") as swapper:
        yield swapper


@pytest.mark.parametrize("offset", [0, 1])  # In place, and through buffers.
def test_storages_cannot_be_resized_while_they_are_used(strict, nvme_dir, offset):
    size, name = 1 << 26, str(nvme_dir / "x")
    x = torch.ones(size, dtype=torch.uint8)[offset:]
    strict.sync_pwrite(x, name)
    for start in (strict.async_pwrite, strict.async_pread):
        start(x, name)
        with pytest.raises(RuntimeError, match="not resizable"):
            x.untyped_storage().resize_(0)
        strict.wait()
    assert x.all()
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().nbytes() == 0


def test_what_one_operation_writes_is_given_to_no_other(strict, nvme_dir):
    x, other = torch.ones(1 << 24), torch.zeros(100)
    names = [str(nvme_dir / name) for name in "xyz"]
    strict.sync_pwrite(x, names[0])
    for start in (strict.async_pread, strict.async_pwrite):
        strict.async_pread(x, names[0])
        with pytest.raises(ValueError, match="used by an operation that has not ended"):
            start(x[100:200], names[1])
        strict.async_pwrite(other, names[2])
        assert strict.wait() == 2
    # Many may read it, and then none may write it.
    for part in (x, x[10:], x[:500], x):
        strict.async_pwrite(part, names[1])
    with pytest.raises(ValueError, match="used by an operation that has not ended"):
        strict.async_pread(x[:1], names[0])
    assert strict.wait() == 4
    assert strict.sync_pread(x, names[0]) == 1


def test_tensors_in_shared_memory_are_taken_as_others_are(strict, swapper, nvme_dir):
    x = torch.arange(1 << 20, dtype=torch.int32).share_memory_()
    for offset in (0, 1):
        part = x[offset:]
        swapper.swap_out("x", part).wait()
        strict.sync_pwrite(part, str(nvme_dir / "file"))
        for y in (torch.zeros_like(part), torch.zeros_like(part).share_memory_()):
            assert torch.equal(swapper.swap_in("x", out=y).result(), part)
            y.zero_()
            strict.sync_pread(y, str(nvme_dir / "file"))
            assert torch.equal(y, part)
    # And what was not in shared memory may get there afterwards.
    z = torch.ones(1 << 20)
    swapper.swap_out("z", z).wait()
    assert z.share_memory_().is_shared()


def test_parts_of_a_tensor_may_be_read_into_at_once(strict, nvme_dir):
    parts = [nvme_dir / str(i) for i in range(64)]
    x = torch.arange(64 << 14, dtype=torch.int32)
    expected = x.clone()
    for _ in range(3):
        for path, piece in zip(parts, x.chunk(64), strict=True):
            strict.async_pwrite(piece, str(path))
        assert strict.wait() == 64
        x.zero_()
        for path, piece in zip(reversed(parts), reversed(x.chunk(64)), strict=True):
            strict.async_pread(piece, str(path))
        assert strict.wait() == 64
        assert torch.equal(x, expected)


def test_the_space_of_deleted_files_is_free_after_wait(handle, nvme_dir):
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(nvme_dir)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount")
    try:
        assert handle.sync_pwrite(torch.ones(3 << 19), str(nvme_dir / "x")) == 1
        os.unlink(nvme_dir / "x")
        handle.wait()
        with open(nvme_dir / "y", "wb") as file:
            file.write(bytes(6 << 20))
    finally:
        subprocess.run(["umount", str(nvme_dir)], check=True)


def test_a_storage_may_be_resized_when_its_bytes_are_taken_and_not_before(swapper):
    x = torch.ones(1 << 24)
    out = swapper.swap_out("x", x)
    with pytest.raises(RuntimeError, match="not resizable"):
        x.untyped_storage().resize_(0)
    out.wait_source()
    x.untyped_storage().resize_(0)
    y = torch.zeros(1 << 24)
    back = swapper.swap_in("x", out=y)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="used by an operation that has not ended"):
        swapper.swap_in("x", out=y)
    back.wait()
    assert y.all()
    y.untyped_storage().resize_(0)
