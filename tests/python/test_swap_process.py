"""TensorSwapper and its surroundings: forks, exits, signals, a full disk."""

import errno
import os
import subprocess
import threading

import forked_python
import pytest
import torch

from torch_ext import TensorSwapper


@pytest.fixture
def swapper(nvme_dir):
    with TensorSwapper(nvme_dir, host_memory="16MiB") as swapper:
        yield swapper


def test_a_forked_child_gets_a_clear_error_and_exits(swapper):
    swapper.swap_out("x", torch.randn(100)).wait()
    child = os.fork()
    if child == 0:
        try:
            swapper.swap_in("x")
        except RuntimeError as error:
            os._exit(0 if str(os.getppid()) in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    swapper.swap_in("x").result(timeout=60)


SCRIPT = """
import os, signal, sys, threading, time, torch, torch_ext
swapper = torch_ext.TensorSwapper(sys.argv[1], host_memory="8M")
"""


def run_script(nvme_dir, body, **kwargs):
    return subprocess.run(
        [forked_python.python(), "-c", SCRIPT + body, str(nvme_dir)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("ending", "code"),
    [("", 0), ("sys.exit(3)", 3), ("os._exit(4)", 4), ("raise KeyError", 1)],
)
def test_a_process_may_end_with_operations_in_flight(nvme_dir, ending, code):
    body = (
        """
for i in range(50):
    last = swapper.swap_out(str(i), torch.randn(500_000))
"""
        + ending
    )
    result = run_script(nvme_dir, body)
    assert result.returncode == code, result.stderr
    assert os.listdir(nvme_dir) == []


def test_ctrl_c_ends_a_wait(nvme_dir):
    # A FIFO of operations that takes far longer than the test may.
    body = """
# Whoever runs the tests in the background ignores it, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
swapper.swap_out("x", torch.zeros(200_000_000, dtype=torch.uint8))
tickets = [swapper.swap_in("x") for _ in range(40)]
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    for ticket in tickets:
        ticket.wait()
    print("ended")
except KeyboardInterrupt:
    print("interrupted", flush=True)
    os._exit(0)
"""
    assert run_script(nvme_dir, body).stdout.strip() == "interrupted"


def test_a_wait_lets_other_threads_run(nvme_dir):
    with TensorSwapper(nvme_dir, {"aio": {"block_size": 4096, "queue_depth": 1}}) as swapper:
        ran = threading.Event()
        swapper.swap_out("x", torch.zeros(20_000_000, dtype=torch.uint8))
        ticket = swapper.swap_in("x")
        threading.Thread(target=ran.set).start()
        with pytest.raises(TimeoutError, match="swap_in of 'x'"):
            ticket.wait(timeout=0.001)
        ticket.wait()
        assert ran.is_set()


def test_a_forked_child_may_ask_a_swapper_nothing(swapper):
    calls = [
        swapper.stats,
        swapper.keys,
        swapper.close,
        lambda: swapper.engine,
        lambda: swapper.remove("x"),
        lambda: swapper.swap_out("x", torch.zeros(1)),
    ]
    child = os.fork()
    if child == 0:
        refused = 0
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                refused += f"created in process {os.getppid()}" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(calls)
    assert swapper.stats()["operations"] == 0


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 64 << 20)
    commands = [
        ["mkfs.ext4", "-q", "-m", "0", str(image)],
        ["mount", "-o", "loop", str(image), str(mount)],
    ]
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a loop device needs root and mkfs: {error}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_enospc_and_the_swapper_works_on(small_disk):
    with TensorSwapper(small_disk) as swapper:
        small = torch.randn(1_000_000)
        swapper.swap_out("small", small).wait()
        large = torch.randint(0, 256, (128 << 20,), dtype=torch.uint8)
        with pytest.raises(OSError, match="offset=.*length=") as info:
            swapper.swap_out("large", large).wait()
        assert info.value.errno == errno.ENOSPC
        assert str(small_disk) in info.value.filename
        with pytest.raises(KeyError):
            swapper.swap_in("large")
        assert torch.equal(swapper.swap_in("small").result(), small)
        with pytest.raises(OSError, match="No space"):
            swapper.swap_out("small", large).wait_source()
        assert torch.equal(swapper.swap_in("small").result(), small)
        swapper.swap_out("more", small).wait()
        assert torch.equal(swapper.swap_in("more").result(), small)


def test_a_key_is_removed_whatever_failed_and_close_raises_what_nobody_has_seen(small_disk):
    large = torch.zeros(128 << 20, dtype=torch.uint8)
    swapper = TensorSwapper(small_disk)
    swapper.swap_out("x", torch.zeros(1)).wait()
    for key in ("x", "never complete"):
        ticket = swapper.swap_out(key, large)
        while not ticket.done():
            pass
    swapper.remove("x")
    swapper.delete("never complete")  # The former name.
    assert swapper.keys() == []
    with pytest.raises(KeyError, match="'x'"):
        swapper.remove("x")
    swapper.swap_out("x", torch.ones(1))
    assert torch.equal(swapper.swap_in("x").result(), torch.ones(1))
    with pytest.raises(OSError, match="No space"):
        swapper.close()


def test_an_error_nobody_waited_for_comes_with_the_next_call_and_with_close(small_disk):
    large = torch.zeros(128 << 20, dtype=torch.uint8)
    swapper = TensorSwapper(small_disk)
    ticket = swapper.swap_out("x", large)
    while not ticket.done():
        pass
    with pytest.raises(OSError, match="No space"):
        swapper.swap_out("x", torch.zeros(1))
    swapper.swap_out("x", torch.zeros(1)).wait()
    swapper.swap_out("y", large)
    with pytest.raises(OSError, match="No space"):
        swapper.close()
    swapper.close()
