"""aio_handle: DeepSpeed's calls and return values, and what happens when they fail."""

import copy
import errno
import inspect
import os
import pickle
import subprocess
import threading
import warnings

import forked_python
import numpy as np
import pytest
import torch

from torch_ext import aio_handle, gds_handle
from torch_ext.handle import pin_handle


def test_names_and_defaults_are_deepspeeds(handle):
    assert handle.get_block_size() == 1048576
    assert handle.get_queue_depth() == 128
    assert handle.get_single_submit() is False
    assert handle.get_overlap_events() is False
    assert handle.get_intra_op_parallelism() == 1
    assert handle.get_alignment() == 512
    arguments = {
        "read": ["buffer", "filename", "validate", "file_offset"],
        "write": ["buffer", "filename", "validate", "file_offset"],
        "sync_pread": ["buffer", "filename", "file_offset"],
        "sync_pwrite": ["buffer", "filename", "file_offset"],
        "async_pread": ["buffer", "filename", "file_offset"],
        "async_pwrite": ["buffer", "filename", "file_offset", "fd"],
        "new_cpu_locked_tensor": ["num_elem", "example_tenosr"],
        "free_cpu_locked_tensor": ["tensor"],
        "is_pinned": ["buffer"],
    }
    for name, expected in arguments.items():
        assert list(inspect.signature(getattr(handle, name)).parameters) == expected


def test_the_five_settings_are_used():
    with aio_handle(4096, 3, True, True, 2) as handle:
        assert handle.get_block_size() == 4096
        assert handle.get_queue_depth() == 3
        assert handle.get_single_submit() is True
        assert handle.get_overlap_events() is True
        assert handle.get_intra_op_parallelism() == 2
        assert handle.get_alignment() == 1024


@pytest.mark.parametrize("host_memory", [0, "4KiB", "1MiB", "256MiB"])
def test_every_block_size_of_the_range_works_with_any_host_memory(nvme_dir, host_memory):
    # Two that direct I/O cannot take: the bytes go through buffers.
    source = torch.arange(20_001).to(torch.uint8)[1:]
    for block_size in (1, 512, 1000, 4096, 5000, 8192, 1_000_000, (1 << 20) + 1, 1 << 30):
        name = nvme_dir / str(block_size)
        with aio_handle(block_size, strict=True, host_memory=host_memory) as handle:
            assert handle.get_block_size() == block_size
            handle.sync_pwrite(source, str(name))
            back = torch.zeros(20_001, dtype=torch.uint8)[1:]
            handle.sync_pread(back, str(name))
        assert name.read_bytes() == source.numpy().tobytes()
        assert torch.equal(back, source)


def test_a_link_is_refused_with_the_remedy_which_works(nvme_dir):
    (nvme_dir / "target").write_bytes(bytes(range(100)))
    link = nvme_dir / "link"
    link.symlink_to("target")
    buffer = torch.zeros(100, dtype=torch.uint8)
    with aio_handle(strict=True) as handle:
        for call in (handle.sync_pread, handle.sync_pwrite, handle.async_pread, handle.read):
            arguments = (False,) if call == handle.read else ()
            with pytest.raises(OSError, match=r"os\.path\.realpath") as raised:
                call(buffer, str(link), *arguments)
            assert raised.value.errno == errno.ELOOP
            assert raised.value.filename == str(link)
        handle.sync_pread(buffer, os.path.realpath(link))
        assert buffer.tolist() == list(range(100))
        (nvme_dir / "folder").symlink_to(nvme_dir)
        handle.sync_pread(buffer, str(nvme_dir / "folder/target"))
    with aio_handle() as handle:
        assert handle.sync_pread(buffer, str(link)) == -1
        assert "os.path.realpath" in str(handle.errors[-1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": -1}, "block_size"),
        ({"queue_depth": 0}, "queue_depth"),
        ({"intra_op_parallelism": 0}, "aio.intra_op_parallelism is 0"),
        ({"single_submit": 2}, "aio.single_submit is 2"),
        ({"overlap_events": np.zeros(3, dtype=bool)}, "aio.overlap_events"),
        ({"engine": "floppy"}, "floppy"),
        ({"host_memory": "much"}, "much"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        aio_handle(**wrong)


def test_a_setting_of_none_is_no_default():
    with pytest.raises(TypeError, match="queue_depth must not be None"):
        aio_handle(queue_depth=None)


@pytest.mark.parametrize("flag", [0, 1, np.bool_(0), np.bool_(1), np.int32(1)])
def test_flags_may_be_numbers(flag):
    with aio_handle(single_submit=flag, overlap_events=flag) as handle:
        assert handle.get_single_submit() is bool(flag)
        assert handle.get_overlap_events() is bool(flag)


@pytest.mark.parametrize(
    ("timeout", "kind"),
    [(-1, ValueError), (float("nan"), ValueError), ("soon", TypeError), ([1], TypeError)],
)
def test_wait_refuses_what_is_no_time(handle, timeout, kind):
    with pytest.raises(kind, match="timeout must be None or"):
        handle.wait(timeout)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4095, 4096, 4097, 1_000_003])
@pytest.mark.parametrize("offset", [0, 1, 4096, 5000])
def test_any_size_at_any_offset_comes_back(strict, nvme_dir, size, offset):
    name = str(nvme_dir / "x")
    written = torch.randint(0, 256, (size,), dtype=torch.uint8)
    assert strict.sync_pwrite(written, name, offset) == 1
    read = torch.zeros_like(written)
    assert strict.sync_pread(read, name, offset) == 1
    assert torch.equal(read, written)
    if size:
        with open(name, "rb") as file:
            assert file.read() == bytes(offset) + written.numpy().tobytes()


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.bfloat16, torch.float64, torch.complex64, torch.uint16]
)
def test_views_move_as_exactly_their_elements(strict, nvme_dir, dtype):
    name = str(nvme_dir / "x")
    whole = torch.arange(60, dtype=torch.float32).reshape(6, 10).to(dtype)
    assert strict.sync_pwrite(whole[1:4, ::2], name) == 1
    target = torch.zeros(10, 6, dtype=dtype)
    view = target.t()[1:4, 1:6]
    assert strict.sync_pread(view, name) == 1
    assert torch.equal(view, whole[1:4, ::2])
    assert not target[0].any()
    assert not target[:, 0].any()


def test_wait_counts_what_was_pending(handle, nvme_dir):
    x = torch.randn(1000)
    assert handle.wait() == 0
    for i in range(3):
        assert handle.async_pwrite(x, str(nvme_dir / str(i))) == 0
    assert handle.wait() == 3
    assert handle.wait() == 0
    assert handle.async_pread(x.clone(), str(nvme_dir / "0")) == 0
    assert handle.sync_pread(x.clone(), str(nvme_dir / "1")) == 2


def test_pread_and_pwrite_take_async_by_place_and_by_name(handle, nvme_dir):
    name = str(nvme_dir / "x")
    x, y = torch.randn(1000), torch.zeros(1000)
    assert handle.pwrite(x, name, True, False) == 1
    assert handle.pread(y, name, True, True) == 0
    assert handle.wait() == 1
    assert torch.equal(x, y)
    assert handle.pread(y[:500], name, False, file_offset=2000, **{"async": False}) == 1
    assert torch.equal(y[:500], x[500:])
    for arguments, named in [((), {}), ((True, 0, 0), {}), ((True,), {"async": True})]:
        with pytest.raises(TypeError, match="async"):
            handle.pread(y, name, False, *arguments, **named)


def test_read_and_write_return_0_and_take_whole_files(handle, nvme_dir):
    name = str(nvme_dir / "x")
    x, y = torch.randn(1000), torch.zeros(1000)
    assert handle.write(x, name, True) == 0
    assert handle.read(y, name, True) == 0
    assert torch.equal(x, y)
    assert handle.read(y[:10], name, False) == -1
    assert "4000 bytes" in str(handle.errors[-1])
    assert handle.read(y[:10], name, False, 4) == 0
    assert torch.equal(y[:10], x[1:11])


def test_a_file_keeps_its_tail_and_a_new_one_is_private(strict, nvme_dir):
    name = nvme_dir / "x"
    strict.sync_pwrite(torch.zeros(1000), str(name))
    strict.sync_pwrite(torch.ones(10), str(name))
    assert name.stat().st_size == 4000
    assert name.stat().st_mode & 0o777 == 0o600


def test_a_descriptor_of_the_caller_is_written_to(handle, nvme_dir):
    x = torch.randn(1000)
    fd = os.open(nvme_dir / "x", os.O_CREAT | os.O_WRONLY)
    assert handle.async_pwrite(x, fd, 8) == 0
    assert handle.wait() == 1
    assert handle.async_pwrite(x, fd=fd) == 0
    assert handle.wait() == 1
    assert os.fstat(fd).st_size == 4008
    os.close(fd)
    assert handle.async_pwrite(x, fd) == -1
    assert handle.errors[-1].errno == errno.EBADF


# What DeepSpeed's handle does with the same: silence, an abort or a hang.
@pytest.mark.parametrize("is_strict", [False, True])
def test_failures_raise_or_return_minus_1(nvme_dir, is_strict):
    x = torch.zeros(1000)
    (nvme_dir / "short").write_bytes(b"1234")
    os.mkfifo(nvme_dir / "fifo")
    os.symlink(nvme_dir / "elsewhere", nvme_dir / "link")
    cases = [
        ("async_pread", "none", FileNotFoundError),
        ("async_pwrite", "none/x", FileNotFoundError),
        ("async_pwrite", ".", IsADirectoryError),
        ("async_pwrite", "link", OSError),
        ("async_pread", "fifo", OSError),
        ("sync_pread", "short", OSError),
    ]
    with aio_handle(strict=is_strict) as handle:
        for call, name, error in cases:
            path = str(nvme_dir / name)
            if is_strict:
                with pytest.raises(error) as raised:
                    getattr(handle, call)(x, path)
                found = raised.value
            else:
                assert getattr(handle, call)(x, path) == -1
                found = handle.errors[-1]
            assert isinstance(found, error)
            assert os.path.normpath(found.filename) == os.path.normpath(path)
        assert len(handle.errors) == (0 if is_strict else len(cases))
        assert handle.sync_pwrite(x, str(nvme_dir / "good")) == 1
    assert not (nvme_dir / "elsewhere").exists()


def test_one_failure_among_many_is_found_and_the_others_end(nvme_dir):
    x = torch.randn(100_000)
    good = str(nvme_dir / "good")
    (nvme_dir / "short").write_bytes(bytes(100))
    for is_strict in (False, True):
        with aio_handle(strict=is_strict) as handle:
            handle.async_pwrite(x, good)
            # The file is long enough when the read is asked for.
            os.truncate(nvme_dir / "short", 400_000)
            handle.async_pread(x.clone(), str(nvme_dir / "short"))
            assert handle.wait() == 2
            target = torch.zeros_like(x)
            handle.async_pread(target, good)
            os.truncate(nvme_dir / "short", 100)
            if is_strict:
                with pytest.raises(OSError, match="the file ends at byte 100"):
                    handle.sync_pread(x.clone(), str(nvme_dir / "short"))
                assert handle.wait() == 1
            else:
                assert handle.sync_pread(x.clone(), str(nvme_dir / "short")) == -1
                assert handle.wait() == 1
            assert torch.equal(target, x)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("no tensor", "x"), TypeError),
        ((torch.zeros(3), 3.5), TypeError),
        ((torch.zeros(3), True), TypeError),
        ((torch.zeros(3), "x", "0"), TypeError),
        ((torch.zeros(3).to_sparse(), "x"), TypeError),
        ((torch.zeros(3, device="meta"), "x"), TypeError),
    ],
)
def test_arguments_of_another_type_are_type_errors(
    handle, arguments, error, nvme_dir, monkeypatch
):
    monkeypatch.chdir(nvme_dir)
    with pytest.raises(error):
        handle.async_pwrite(*arguments)
    assert handle.wait() == 0


@pytest.mark.parametrize("name", ["", "a\0b", "\udce4" + "x" * 300])
def test_names_that_no_file_can_have_are_errors(strict, name, nvme_dir, monkeypatch):
    monkeypatch.chdir(nvme_dir)
    with pytest.raises((ValueError, OSError)):
        strict.async_pwrite(torch.zeros(3), name)


@pytest.mark.parametrize("offset", [-1, 2**63, 2**63 - 1])
def test_offsets_out_of_range_are_value_errors(strict, nvme_dir, offset):
    with pytest.raises(ValueError, match="offset"):
        strict.async_pwrite(torch.zeros(3), str(nvme_dir / "x"), offset)
    assert not (nvme_dir / "x").exists()


def test_elements_that_share_memory_are_no_target(strict, nvme_dir):
    name = str(nvme_dir / "x")
    strict.sync_pwrite(torch.zeros(100), name)
    with pytest.raises(ValueError, match="share memory"):
        strict.async_pread(torch.zeros(1).expand(100), name)


def test_a_full_disk_is_an_error_and_works_again_when_it_is_not(nvme_dir):
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(nvme_dir)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount")
    try:
        x = torch.zeros(3 << 20, dtype=torch.uint8)
        with aio_handle() as handle:
            assert handle.sync_pwrite(x, str(nvme_dir / "a")) == 1
            assert handle.sync_pwrite(x, str(nvme_dir / "b")) == -1
            assert handle.errors[-1].errno == errno.ENOSPC
            assert handle.errors[-1].filename == str(nvme_dir / "b")
            os.remove(nvme_dir / "a")
            assert handle.sync_pwrite(x, str(nvme_dir / "b")) == 1
    finally:
        subprocess.run(["umount", str(nvme_dir)], check=True)


def test_after_rmtree_the_new_file_is_written(strict, nvme_dir):
    x = torch.randn(1024)
    folder = nvme_dir / "d"
    for _ in range(2):
        folder.mkdir()
        assert strict.sync_pwrite(x, str(folder / "x")) == 1
        assert (folder / "x").stat().st_size == 4096
        (folder / "x").unlink()
        folder.rmdir()


def test_1000_files_need_64_descriptors(strict, nvme_dir):
    tensors = [torch.full((1024,), float(i)) for i in range(1000)]
    before = len(os.listdir("/proc/self/fd"))
    for i, tensor in enumerate(tensors):
        strict.async_pwrite(tensor, str(nvme_dir / str(i)))
        assert len(os.listdir("/proc/self/fd")) <= before + 64 + 4
    assert strict.wait() == 1000
    back = [torch.zeros(1024) for _ in tensors]
    for i, tensor in enumerate(back):
        strict.async_pread(tensor, str(nvme_dir / str(i)))
    assert strict.wait() == 1000
    assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True))
    strict.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_locked_tensors_are_known_until_they_are_freed(handle):
    x = handle.new_cpu_locked_tensor(1000, torch.zeros(0, dtype=torch.bfloat16))
    assert x.shape == (1000,)
    assert x.dtype == torch.bfloat16
    assert x.data_ptr() % 4096 == 0
    for known in (handle, pin_handle()):
        assert known.is_pinned(x)
        assert known.is_pinned(x[10:20].view(2, 5))
        assert not known.is_pinned(torch.zeros(10))
    view = x[500:]
    assert handle.free_cpu_locked_tensor(view) is False
    assert handle.free_cpu_locked_tensor(torch.zeros(10)) is False
    assert handle.free_cpu_locked_tensor(x) is True
    assert handle.free_cpu_locked_tensor(x) is False
    assert not handle.is_pinned(x)
    del x
    view.fill_(1)
    pin = pin_handle()
    y = pin.new_cpu_locked_tensor(10, torch.zeros(0))
    assert pin.free_cpu_locked_tensor_by_ptr(y.data_ptr()) is True
    with pytest.raises(TypeError, match="QInt8"):
        pin.new_cpu_locked_tensor(
            1, torch.quantize_per_tensor(torch.zeros(1), 1, 0, torch.qint8)
        )
    with pytest.raises(ValueError, match="-1"):
        handle.new_cpu_locked_tensor(-1, torch.zeros(0))
    with pytest.raises(TypeError, match="dtype from a tensor.*not from torch.float32"):
        handle.new_cpu_locked_tensor(10, torch.float32)


def test_a_locked_tensor_freed_in_flight_is_still_written(strict, nvme_dir):
    x = strict.new_cpu_locked_tensor(1 << 20, torch.zeros(0))
    x.fill_(3)
    strict.async_pwrite(x, str(nvme_dir / "x"))
    strict.free_cpu_locked_tensor(x)
    del x
    assert strict.wait() == 1
    assert torch.equal(
        torch.from_file(str(nvme_dir / "x"), size=1 << 20), torch.full((1 << 20,), 3.0)
    )


def test_threads_share_a_handle(strict, nvme_dir):
    failures = []

    def work(number):
        x = torch.full((5000,), float(number))
        y = torch.zeros(5000)
        try:
            for i in range(10):
                name = str(nvme_dir / f"{number}-{i}")
                assert strict.write(x, name, False) == 0
                assert strict.read(y, name, False) == 0
                assert torch.equal(x, y)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_only_async_pwrite_takes_a_descriptor(handle, nvme_dir):
    fd = os.open(nvme_dir / "x", os.O_CREAT | os.O_RDWR)
    x = torch.zeros(10)
    for call in (
        lambda: handle.sync_pwrite(x, fd),
        lambda: handle.write(x, fd, False),
        lambda: handle.pwrite(x, fd, False, False),
        lambda: handle.async_pread(x, fd),
        lambda: handle.read(x, fd, False),
    ):
        with pytest.raises(TypeError, match="filename must be a str"):
            call()
    assert os.fstat(fd).st_size == 0
    os.close(fd)


def test_numbers_may_be_numpys(strict, nvme_dir):
    name = str(nvme_dir / "x")
    assert strict.sync_pwrite(torch.arange(10), name, np.int64(16)) == 1
    back = torch.zeros(10, dtype=torch.int64)
    assert strict.pread(back, name, False, False, np.uint32(16)) == 1
    assert torch.equal(back, torch.arange(10))


def test_a_wait_that_runs_out_leaves_what_is_pending(handle, nvme_dir):
    name = str(nvme_dir / "x")
    x = torch.zeros(50_000_000, dtype=torch.uint8)
    handle.async_pwrite(x, name)
    with pytest.raises(TimeoutError, match="did not end"):
        handle.wait(timeout=0)
    assert handle.errors == []
    assert handle.wait() == 1


def test_a_closed_handle_says_so(nvme_dir):
    handle = aio_handle()
    handle.async_pwrite(torch.zeros(10), str(nvme_dir / "x"))
    handle.close()
    handle.close()
    assert (nvme_dir / "x").stat().st_size == 40
    for call in (
        handle.wait,
        lambda: handle.async_pwrite(torch.zeros(1), str(nvme_dir / "x")),
        lambda: handle.read(torch.zeros(10), str(nvme_dir / "x"), False),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    assert handle.stats()["operations"] == 1


def test_a_handle_cannot_be_copied(handle):
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="belongs to its process"):
            copied(handle)


def test_a_forked_child_gets_an_error(handle, nvme_dir):
    child = os.fork()
    if child == 0:
        refused = 0
        for call in (
            handle.wait,
            handle.close,
            handle.stats,
            lambda: handle.async_pwrite(torch.zeros(1), str(nvme_dir / "x")),
        ):
            try:
                call()
            except RuntimeError:
                refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4


def test_a_handle_alive_at_exit_ends_its_writes_and_prints_nothing(nvme_dir):
    script = """
import sys, torch, torch_ext
handle = torch_ext.aio_handle()
handle.async_pwrite(torch.ones(10_000_000), sys.argv[1])
"""
    done = subprocess.run(
        [forked_python.python(), "-c", script, str(nvme_dir / "x")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (nvme_dir / "x").stat().st_size == 40_000_000


def test_gds_handle_warns_once_and_works(nvme_dir):
    gds_handle._warned = False
    with pytest.warns(UserWarning, match="GPUDirect"):
        first = gds_handle()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = gds_handle()
    x = first.new_pinned_device_tensor(10, torch.zeros(0, dtype=torch.int32))
    assert first.pin_device_tensor(x)
    assert first.sync_pwrite(x, str(nvme_dir / "x")) == 1
    assert first.unpin_device_tensor(x)
    assert first.free_pinned_device_tensor(x)
    first.close()
    second.close()
