"""The rows of deepspeed_comparison.py; `make test-faults` tries them on every engine."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import deepspeed_comparison as comparison
import forked_python
import pytest

from torch_ext._native import _C

ENGINES = ["auto"]
if os.environ.get("TORCH_EXT_TEST_FAULTS") == "all":
    ENGINES = [name for name, why_not in _C.engine_info() if not why_not]
    ENGINES = [name for name in ENGINES if name not in ("memory", "null")]


@pytest.fixture(autouse=True)
def _forked(monkeypatch):
    monkeypatch.setattr(comparison, "PYTHON", forked_python.python())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", comparison.FAULTS)
def test_a_fault_is_reported_or_survived(fault, engine):
    directory = os.environ.get("TORCH_EXT_TEST_DIR") or "/var/tmp"
    word, text = comparison.trial("ours", fault, directory, engine)
    if word == "not tried":
        pytest.skip(text)
    assert word in comparison.GOOD, text


@pytest.mark.parametrize(
    ("fault", "injections"),
    [("submit_eagain", comparison.SUBMIT_EAGAIN), ("submit_half", comparison.SUBMIT_HALF)],
)
def test_a_fault_that_did_not_happen_is_told_from_one_survived(fault, injections, monkeypatch):
    monkeypatch.setitem(injections, "threads", injections["libaio"])
    word, text = comparison.trial("ours", fault, "/var/tmp", "threads")
    if word == "not tried":
        pytest.skip(text)
    assert word == "NOT INJECTED"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another number of the call")
def test_half_of_a_batch_is_taken_from_a_build_without_libaio_too(tmp_path):
    # As a wheel does it; 209 is io_submit, and of one request nothing is taken.
    calls = (
        "import ctypes; c = ctypes.CDLL(None); c.syscall(209, 0, 2, 0); c.syscall(209, 0, 1, 0)"
    )
    injection = comparison.SUBMIT_HALF["libaio"]
    try:
        command = injection.command(tmp_path)
    except comparison.NotTriedError as error:
        pytest.skip(str(error))
    subprocess.run([*command, sys.executable, "-c", calls], check=True)
    assert injection.times(tmp_path) == 1


def test_a_file_that_is_cut_to_what_was_written_is_not_kept(tmp_path):
    class Cutting:
        new_cpu_locked_tensor = staticmethod(_C.pinned_zeros)

        def async_pwrite(self, tensor, path, offset):
            Path(path).write_bytes(tensor.numpy().tobytes())
            return 0

        def wait(self):
            return 1

    assert comparison.longer_before(Cutting(), tmp_path) is False


def test_lost_bytes_and_a_process_that_dies_are_told_from_success():
    # The null engine moves no bytes and says that it did.
    assert comparison.trial("ours", "misaligned_buffer", "/var/tmp", "null")[0] == "LOST"
    dies = [sys.executable, "-c", "import os; os.abort()"]
    assert comparison.outcome_of(dies)[0] == "ABORTED"


# Stands for deepspeed.ops.op_builder.
PEER = """
import time
class AsyncIOBuilder:
    def load(self):
        {body}
"""


@pytest.mark.parametrize(
    ("body", "seconds", "told"),
    [
        ("raise RuntimeError('no\\n compiler')", 60, r"RuntimeError: no\s+compiler"),
        ("time.sleep(600)", 3, "did not load within 3 s.*named lock in .*/cache_of_ops"),
    ],
)
def test_a_peer_that_does_not_load_is_not_tried_and_says_why(
    body, seconds, told, tmp_path, monkeypatch
):
    package = tmp_path / "deepspeed/ops"
    package.mkdir(parents=True)
    (package / "op_builder.py").write_text(PEER.format(body=body))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache_of_ops"))
    monkeypatch.setattr(comparison, "LOAD_SECONDS", seconds)
    comparison.why_not_loaded.cache_clear()
    try:
        for fault in ("misaligned_buffer", "submit_half"):
            word, text = comparison.trial("deepspeed", fault, "/var/tmp", "auto")
            assert word == "not tried"
            assert re.search(told, text), text
    finally:
        comparison.why_not_loaded.cache_clear()
