"""aio_handle: `validate`, which reads the file again and compares it."""

import errno
import os
from pathlib import Path

import pytest
import torch


def written(handle):
    """Returns when all operations have ended, of which wait() knows nothing."""
    while handle.stats()["in_flight"]:
        pass


def test_validate_finds_other_bytes(handle, nvme_dir):
    name = nvme_dir / "x"
    assert handle.pwrite(torch.randn(1000), str(name), True, True) == 0
    written(handle)
    name.write_bytes(bytes(4000))
    assert handle.wait() == -1
    assert handle.errors[-1].errno == errno.EIO
    assert "validate" in str(handle.errors[-1])


def test_validate_takes_one_element_of_any_stride(handle, nvme_dir):
    name = nvme_dir / "x"
    one = torch.randn(1, 5)[:, 2]
    assert handle.pwrite(one, str(name), True, True) == 0
    assert handle.wait() == 1
    assert name.read_bytes() == one.numpy().tobytes()


@pytest.mark.parametrize("kind", ["fifo", "link", "directory", "nothing"])
def test_validate_opens_what_the_operation_would(handle, nvme_dir, kind):
    name = nvme_dir / "x"
    handle.pwrite(torch.zeros(1000), str(name), True, True)
    written(handle)
    name.rename(nvme_dir / "y")
    if kind == "fifo":
        os.mkfifo(name)
    elif kind == "link":
        os.symlink(nvme_dir / "y", name)
    elif kind == "directory":
        name.mkdir()
    assert handle.wait() == -1
    assert handle.wait() == 0
    assert [error.filename for error in handle.errors] == [str(name)]
    if kind == "link":
        assert "replaced by a link" in str(handle.errors[0])


def test_validate_reads_the_file_that_was_written(strict, nvme_dir, monkeypatch):
    monkeypatch.chdir(nvme_dir)
    for name in ("x", b"y", Path("z")):
        strict.pwrite(torch.ones(1000), name, True, True)
    monkeypatch.chdir("/")
    assert strict.wait() == 3


@pytest.mark.parametrize(
    "view",
    [
        torch.conj,
        lambda x: x.conj().imag,
        lambda x: x.conj()[::2],
        lambda x: torch._neg_view(x.real.clone()),
        lambda x: x.real.requires_grad_(),
        lambda x: x[0].conj(),
    ],
)
def test_validate_compares_the_elements_of_views(strict, nvme_dir, view):
    name = str(nvme_dir / "x")
    tensor = view(torch.randn(1000, dtype=torch.complex64))
    assert strict.write(tensor, name, True) == 0
    target = torch.zeros_like(tensor).resolve_conj().resolve_neg()
    assert strict.read(target.detach(), name, True) == 0
    assert torch.equal(target, tensor.resolve_conj().resolve_neg())


def test_a_failed_validate_leaves_the_handle_usable(strict, nvme_dir, monkeypatch):
    def refuse(*_):
        raise RuntimeError("CUDA error")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", refuse)
        strict.pwrite(torch.zeros(10), str(nvme_dir / "x"), True, True)
        with pytest.raises(RuntimeError, match="CUDA"):
            strict.wait()
    assert strict.wait() == 0
    assert strict.sync_pwrite(torch.zeros(10), str(nvme_dir / "x")) == 1
