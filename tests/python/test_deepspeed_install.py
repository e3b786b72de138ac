"""torch_ext.deepspeed against the places in DeepSpeed that it puts modules in.

tests/deepspeed runs the real one.
"""

import subprocess
import sys
import textwrap
import types

import pytest
import torch

import torch_ext.deepspeed as ours
from torch_ext import aio_handle, gds_handle


@pytest.fixture
def deepspeed(monkeypatch):
    """What install() needs of a DeepSpeed: its cache of loaded ops."""

    class OpBuilder:
        _loaded_ops = {"cpu_adam": "an op"}

    names = ["deepspeed", "deepspeed.ops", "deepspeed.ops.op_builder"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    builder = types.ModuleType("deepspeed.ops.op_builder.builder")
    builder.OpBuilder = OpBuilder
    monkeypatch.setitem(sys.modules, builder.__name__, builder)
    yield OpBuilder._loaded_ops
    ours.uninstall()


def test_install_and_uninstall_leave_what_was_there(deepspeed):
    own = types.ModuleType("own")
    deepspeed["gds"] = own
    before = dict(deepspeed)
    ours.install()
    ours.install()
    assert issubclass(deepspeed["async_io"].aio_handle, aio_handle)
    assert issubclass(deepspeed["gds"].gds_handle, gds_handle)
    assert sys._deepspeed_pin_memory_op_module is deepspeed["pin_memory"]
    # DeepSpeed opens what has a file as a library.
    assert getattr(sys._deepspeed_pin_memory_op_module, "__file__", None) is None
    ours.uninstall()
    ours.uninstall()
    assert deepspeed == before
    assert not hasattr(sys, "_deepspeed_pin_memory_op_module")


def test_its_handles_are_strict(deepspeed, nvme_dir):
    ours.install()
    handle = deepspeed["async_io"].aio_handle(
        block_size=4096,
        queue_depth=8,
        single_submit=False,
        overlap_events=True,
        intra_op_parallelism=1,
    )
    with pytest.raises(FileNotFoundError):
        handle.async_pread(torch.zeros(10), str(nvme_dir / "none"))
    handle.close()


def test_the_functions_of_the_module(deepspeed, nvme_dir):
    ours.install()
    op = deepspeed["async_io"]
    name = str(nvme_dir / "x")
    x, y = torch.randn(1000), torch.zeros(1000)
    assert op.aio_write(x, name, 4096, 8, False, True, True) == 0
    assert op.aio_read(y, name, 4096, 8, False, True, True) == 0
    assert torch.equal(x, y)
    z = torch.zeros(2000, dtype=torch.bfloat16)
    assert op.deepspeed_memcpy(z, x) == 0
    assert bytes(z.view(torch.uint8).numpy()) == bytes(x.view(torch.uint8).numpy())
    assert op.deepspeed_memcpy(z[::2][:1], x[:1].view(torch.bfloat16)[1:]) == 0
    assert bytes(z[:1].view(torch.uint8).numpy()) == bytes(x[:1].view(torch.uint8).numpy())[2:]
    one = torch.arange(4.0)[1::2][:1]
    assert op.deepspeed_memcpy(z[:2], one) == 0
    assert z[:2].view(torch.float32) == 1
    with pytest.raises(ValueError, match="do not fit"):
        op.deepspeed_memcpy(z[:10], x)
    with pytest.raises(ValueError, match="contiguous"):
        op.deepspeed_memcpy(x[::2], x[:500])


def test_without_deepspeed_the_error_says_what_to_do(monkeypatch):
    for name in ("deepspeed", "op_builder"):
        monkeypatch.setitem(sys.modules, name, None)
    # Another test may have had the real one imported.
    monkeypatch.delattr(sys, "_deepspeed_pin_memory_op_module", raising=False)
    with pytest.raises(ImportError, match="pip install deepspeed"):
        ours.install()
    assert not hasattr(sys, "_deepspeed_pin_memory_op_module")


def test_spawned_processes_that_run_the_script_have_it_too(tmp_path):
    package = tmp_path / "deepspeed" / "ops" / "op_builder"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    (package / "builder.py").write_text("class OpBuilder:\n    _loaded_ops = {}\n")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing
        import torch_ext.deepspeed

        torch_ext.deepspeed.install()

        def handle():
            from deepspeed.ops.op_builder.builder import OpBuilder
            print(OpBuilder._loaded_ops["async_io"].aio_handle.__module__, flush=True)

        if __name__ == "__main__":
            child = multiprocessing.get_context("spawn").Process(target=handle)
            child.start()
            child.join()
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("torch_ext.deepspeed\n", 0), done.stderr
