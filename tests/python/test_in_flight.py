"""What happens to tensors and files while operations use them."""

import os
import subprocess

import pytest
import torch

from torch_ext import TensorSwapper, aio_handle


@pytest.fixture
def handle():
    with aio_handle() as handle:
        yield handle


@pytest.fixture
def strict():
    with aio_handle(strict=True) as handle:
        yield handle


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


def test_what_is_being_read_into_is_given_to_no_other_operation(strict, nvme_dir):
    x, other = torch.ones(1 << 24), torch.zeros(100)
    names = [str(nvme_dir / name) for name in "xyz"]
    strict.sync_pwrite(x, names[0])
    for start in (strict.async_pread, strict.async_pwrite):
        strict.async_pread(x, names[0])
        with pytest.raises(ValueError, match="destination of an operation that has not ended"):
            start(x[100:200], names[1])
        strict.async_pwrite(other, names[2])
        assert strict.wait() == 2
        strict.async_pwrite(x, names[0])
        strict.async_pwrite(x, names[1])
        assert strict.wait() == 2


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
    with pytest.raises(ValueError, match="destination of an operation that has not ended"):
        swapper.swap_in("x", out=y)
    back.wait()
    assert y.all()
    y.untyped_storage().resize_(0)
