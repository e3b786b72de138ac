"""A daemon thread that is inside a call when the interpreter ends."""

import subprocess
import sys
import textwrap

import pytest

_PREPARE = {
    # Calls of closed objects too let go of the GIL, and want it back.
    "a swapper": """
        swapper = torch_ext.TensorSwapper(directory)
        call = swapper.stats
    """,
    "a ticket": """
        swapper = torch_ext.TensorSwapper(directory)
        ticket = swapper.swap_out("k", torch.ones(1000))
        ticket.wait()
        call = ticket.wait
    """,
    "an optimizer": """
        weight = torch.nn.Parameter(torch.ones(1000))
        optimizer = torch_ext.OffloadedAdamW([weight], nvme_path=directory)
        call = optimizer.stats
    """,
    "a destructor": """
        def call():
            torch_ext.aio_handle(host_memory="1MiB")._finalizer()
    """,
    # It holds the GIL again, inside the library.
    "a callback": """
        weight = torch.ones(1000)
        args = [(directory, 1)], _C.AioConfig(), 1 << 20, "auto", True, "tensors"
        offload = _C.PieceOffload(*args)
        slot = offload.add(weight, True)
        offload.describe(slot, [("average", torch.float32)])

        def call():
            offload.step([(slot, weight, None, 0, False)], lambda pieces: time.sleep(0.0001))
    """,
}


@pytest.mark.parametrize("what", _PREPARE)
def test_a_process_ends_well_with_a_daemon_thread_inside(what, nvme_dir):
    before = f"""
        import threading, time
        import torch, torch_ext
        from torch_ext import _C
        directory = {str(nvme_dir)!r}
    """
    after = """
        running = threading.Event()

        def forever():
            while True:
                call()
                running.set()

        threading.Thread(target=forever, daemon=True).start()
        running.wait()
    """
    program = "".join(map(textwrap.dedent, (before, _PREPARE[what], after)))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr
