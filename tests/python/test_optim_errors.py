"""What OffloadedAdamW refuses, and what it does when the disk does."""

import errno
import gc
import os
import subprocess
import textwrap

import forked_python
import pytest
import torch
from optim_support import SMALL, Pair, equal, parameters, set_gradients, twins

from torch_ext import OffloadedAdamW
from torch_ext._closable import close_quietly


class Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, *_, **__):
        raise AssertionError("nobody shall compute with it")


@pytest.fixture
def make(nvme_dir):
    def make(params, **options):
        return OffloadedAdamW(params, **{"nvme_path": nvme_dir, "host_memory": SMALL} | options)

    return make


@pytest.fixture
def small_disk(nvme_dir):
    """A file system of 1 MiB."""
    size = "size=1m"
    mount = ["mount", "-t", "tmpfs", "-o", size, "none", str(nvme_dir)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    yield nvme_dir
    gc.collect()
    subprocess.run(["umount", "-l", str(nvme_dir)], check=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate"),
        ({"lr": torch.zeros(2)}, "Tensor lr must be 1-element"),
        ({"eps": -1.0}, "Invalid epsilon value"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value"),
        ({"amsgrad": True}, "amsgrad=True is not supported"),
        ({"host_memory": "200KiB"}, r"host_memory must be at least 245760 bytes \(240 KiB\)"),
        ({"host_memory": 0}, "host_memory must be at least"),
        ({"host_memory": "much"}, "much"),
        ({"engine": "steam"}, "steam"),
        ({"aio": {"queue_depth": 0}}, "queue_depth"),
        ({"params": []}, "empty parameter list"),
    ],
)
def test_a_wrong_value_is_named(make, options, text):
    with pytest.raises(ValueError, match=text):
        make(options.pop("params", parameters(10)), **options)


@pytest.mark.parametrize(
    ("tensor", "error", "text"),
    [
        (torch.zeros(3, dtype=torch.float64), TypeError, "dtype Double"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "dtype ComplexFloat"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), TypeError, "dtype Float8"),
        (torch.zeros(3, device="meta"), TypeError, "meta"),
        (torch.zeros(3).to_sparse(), TypeError, "Sparse"),
        (torch.zeros(6, 4)[:, ::2], ValueError, "not dense"),
        (torch.zeros(1).expand(5), ValueError, "not dense"),
        (torch.Tensor._make_wrapper_subclass(Subclass, (4,)), TypeError, "subclass"),
        ("text", TypeError, "optimizer can only optimize Tensors"),
    ],
    ids=lambda value: "subclass" if isinstance(value, Subclass) else str(value)[:30],
)
def test_a_parameter_that_cannot_be_optimized_is_refused(make, tensor, error, text):
    if isinstance(tensor, torch.Tensor):
        tensor.requires_grad_()
    with pytest.raises(error, match=text):
        make([tensor])
    good = parameters(10)
    optimizer = make(good)
    with pytest.raises(error, match=text):
        optimizer.add_param_group({"params": [tensor]})
    assert len(optimizer.param_groups) == 1
    set_gradients(good, seed=0)
    optimizer.step()
    assert optimizer.state[good[0]]["step"] == 1


def test_a_group_that_repeats_a_parameter_is_refused(make):
    first, second = parameters(3, 4)
    optimizer = make([first])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [first]})
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="twice"):
        optimizer.add_param_group({"params": [second, second]})
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.add_param_group({"params": [second], "amsgrad": True})
    optimizer.add_param_group({"params": [second]})


def test_sparse_gradients_are_refused_before_anything_changes(nvme_dir, make):
    plain, sparse = parameters(100, (10, 4))
    before = plain.detach().clone()
    optimizer = make([plain, sparse])
    plain.grad = torch.ones(100)
    sparse.grad = torch.ones(10, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        optimizer.step()
    assert torch.equal(plain.detach(), before)
    assert optimizer.state == {}
    sparse.grad = torch.ones(10, 4)
    optimizer.step()
    assert optimizer.state[plain]["step"] == 1


def test_a_changed_option_is_checked_by_the_step(make):
    ours = parameters(10)
    optimizer = make(ours)
    set_gradients(ours, seed=0)
    for key, value in (("amsgrad", True), ("lr", -1.0), ("betas", (0.9, 1.0))):
        good = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match="amsgrad|learning rate|beta"):
            optimizer.step()
        optimizer.param_groups[0][key] = good
    optimizer.step()
    assert optimizer.stats()["steps"] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.to(torch.bfloat16),
        lambda p: p.reshape(20, 10),
        lambda p: p.t().contiguous().t(),
        lambda p: p[:5].clone(),
    ],
    ids=["dtype", "shape", "strides", "size"],
)
def test_a_parameter_whose_kind_has_changed_needs_a_state(nvme_dir, make, change):
    ours = parameters((10, 20))
    optimizer = make(ours)
    set_gradients(ours, seed=0)
    optimizer.step()
    state = optimizer.state_dict()
    ours[0].grad = None
    ours[0].data = change(ours[0].data)
    set_gradients(ours, seed=1)
    before = ours[0].detach().clone()
    for attempt in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="the state was made for a parameter with"):
            attempt()
    assert torch.equal(ours[0].detach(), before)
    for name in ("exp_avg", "exp_avg_sq"):
        state["state"][0][name] = torch.zeros(ours[0].shape)
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.state[ours[0]]["step"] == 2


def test_before_the_first_step_a_parameter_may_change(make):
    ours = parameters((10, 20))
    optimizer = make(ours)
    ours[0].data = ours[0].data.bfloat16().t().contiguous()
    set_gradients(ours, seed=0)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["master_param"].shape == (20, 10)


def test_a_directory_that_cannot_be_used_is_an_oserror_with_its_name(make, nvme_dir):
    with pytest.raises(FileNotFoundError) as missing:
        make(parameters(10), nvme_path=nvme_dir / "missing")
    assert str(nvme_dir / "missing") in str(missing.value)
    (nvme_dir / "file").touch()
    with pytest.raises(NotADirectoryError):
        make(parameters(10), nvme_path=nvme_dir / "file")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"nvme_path": ""}, ValueError, "^nvme_path is empty"),
        ({"nvme_path": "a\0b"}, ValueError, "^nvme_path has a NUL character"),
        ({"nvme_path": None}, TypeError, "^nvme_path must be a str or os.PathLike, not NoneT"),
        ({"engine": None}, TypeError, "^engine must be a str such as 'auto'.*not NoneType$"),
    ],
)
def test_what_is_no_path_or_no_engine_is_refused_in_plain_words(make, options, error, text):
    with pytest.raises(error, match=text):
        make(parameters(10), **options)


@pytest.mark.parametrize("path", [".", "below"])
def test_a_deleted_current_directory_is_an_oserror_that_names_the_path(tmp_path, path):
    program = f"""
        import os, sys, torch, torch_ext
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
        try:
            torch_ext.OffloadedAdamW([torch.zeros(3, requires_grad=True)], nvme_path={path!r})
        except FileNotFoundError as error:
            assert error.filename == {path!r}, error
            print("current directory" in str(error))
    """
    done = subprocess.run(
        [forked_python.python(), "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n", done.stderr


def test_a_parameter_put_in_place_of_another_is_checked_before_anything_changes(make):
    ours = parameters(10, 20)
    optimizer = make([("first", ours[0]), ("second", ours[1])])
    set_gradients(ours, seed=0)
    optimizer.step()
    stranger = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    stranger.grad = torch.ones_like(stranger)
    optimizer.param_groups[0]["params"][1] = stranger
    for attempt in (optimizer.step, optimizer.state_dict):
        with pytest.raises(TypeError, match="dtype Double"):
            attempt()
    optimizer.param_groups[0]["params"][1] = ours[1]
    optimizer.step()
    assert optimizer.state[ours[0]]["step"] == 2


def test_a_directory_in_memory_is_warned_of(small_disk, caplog):
    OffloadedAdamW(parameters(10), nvme_path=small_disk, host_memory=SMALL).close()
    assert f"{small_disk}/[scratch] is on a file system in memory" in caplog.text


def test_a_full_disk_refuses_new_state_and_keeps_the_old(small_disk):
    pair = Pair(
        parameters(70_000, 100_000), small_disk, engine="threads", state_dict_mode="mapped"
    )
    pair.step(0, [0])
    set_gradients(pair.ours, seed=1)
    with pytest.raises(OSError, match="No space left on device") as full:
        pair.a.step()
    assert full.value.errno == errno.ENOSPC
    assert str(small_disk) in str(full.value)
    for seed in range(2, 4):
        pair.step(seed, [0])
    assert pair.equal()
    with pytest.raises(OSError, match="No space left on device"):
        pair.a.state_dict()  # No room for a copy.
    pair.step(5, [0])
    assert pair.equal()


def test_a_closed_optimizer_refuses_steps_and_keeps_its_counters(make):
    ours = parameters(100)
    with make(ours) as optimizer:
        set_gradients(ours, seed=0)
        optimizer.step()
    optimizer.close()
    for attempt in (
        optimizer.step,
        optimizer.state_dict,
        lambda: optimizer.load_state_dict({"state": {}, "param_groups": []}),
        lambda: optimizer.add_param_group({"params": parameters(3)}),
    ):
        with pytest.raises(RuntimeError, match="this optimizer is closed"):
            attempt()
    assert len(optimizer.param_groups) == 1
    assert optimizer.stats()["steps"] == 1
    assert len(optimizer.timeline()) > 0
    assert optimizer.engine


def test_a_forked_child_is_told_whose_optimizer_it_is(make):
    ours = parameters(100_000)
    theirs = twins(ours)
    optimizer = make(ours)
    other = torch.optim.AdamW(theirs, fused=True)
    set_gradients(ours, theirs, seed=0)
    optimizer.step()
    other.step()
    calls = [
        optimizer.step,
        optimizer.state_dict,
        lambda: optimizer.add_param_group({"params": parameters(3)}),
        optimizer.stats,
        optimizer.timeline,
        lambda: optimizer.engine,
        optimizer.close,
    ]
    child = os.fork()
    if child == 0:
        refused = 0
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                refused += f"created in process {os.getppid()}" in str(error)
        del optimizer, calls, call
        gc.collect()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(calls)
    optimizer.step()
    other.step()
    assert equal(ours, theirs)


def test_a_process_may_end_with_transfers_in_flight(nvme_dir):
    program = f"""
        import torch
        from torch_ext import OffloadedAdamW
        weight = torch.zeros(1_000_000, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        optimizer = OffloadedAdamW([weight], nvme_path={str(nvme_dir)!r}, host_memory="2MiB")
        optimizer.step()
    """
    done = subprocess.run(
        [forked_python.python(), "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert list(nvme_dir.iterdir()) == []


def test_an_error_while_it_is_dropped_is_logged(make, caplog, monkeypatch):
    ours = parameters(10)
    optimizer = make(ours)
    finalizer = optimizer._finalizer

    class Broken:
        def close(self):
            raise OSError(errno.EIO, "broken")

    finalizer.detach()
    close_quietly(Broken(), os.getpid(), "an OffloadedAdamW")
    assert "broken" in caplog.text
    caplog.clear()
    close_quietly(Broken(), os.getpid() + 1, "an OffloadedAdamW")
    assert caplog.text == ""
