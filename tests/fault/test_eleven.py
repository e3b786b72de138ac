"""The rows of eleven.py; `make test-faults` tries them on every engine."""

import os
from pathlib import Path

import eleven
import pytest

from torch_ext._native import _C

ENGINES = ["auto"]
if os.environ.get("TORCH_EXT_TEST_FAULTS") == "all":
    ENGINES = [name for name, why_not in _C.engine_info() if not why_not]
    ENGINES = [name for name in ENGINES if name not in ("memory", "null")]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fault", eleven.FAULTS)
def test_a_fault_is_reported_or_survived(fault, engine):
    directory = os.environ.get("TORCH_EXT_TEST_DIR") or "/var/tmp"
    word, text = eleven.trial("ours", fault, directory, engine)
    if word == "not tried":
        pytest.skip(text)
    assert word in eleven.GOOD, text


@pytest.mark.parametrize(
    ("fault", "injections"),
    [("submit_eagain", eleven.SUBMIT_EAGAIN), ("submit_half", eleven.SUBMIT_HALF)],
)
def test_a_fault_that_did_not_happen_is_told_from_one_survived(fault, injections, monkeypatch):
    monkeypatch.setitem(injections, "threads", injections["libaio"])
    word, text = eleven.trial("ours", fault, "/var/tmp", "threads")
    if word == "not tried":
        pytest.skip(text)
    assert word == "NOT INJECTED"


def test_a_file_that_is_cut_to_what_was_written_is_not_kept(tmp_path):
    class Cutting:
        new_cpu_locked_tensor = staticmethod(_C.pinned_zeros)

        def async_pwrite(self, tensor, path, offset):
            Path(path).write_bytes(tensor.numpy().tobytes())
            return 0

        def wait(self):
            return 1

    assert eleven.longer_before(Cutting(), tmp_path) is False


def test_lost_bytes_and_a_process_that_dies_are_told_from_success():
    # The null engine moves no bytes and says that it did.
    assert eleven.trial("ours", "misaligned_buffer", "/var/tmp", "null")[0] == "LOST"
    assert eleven.trial("nobody", "misaligned_buffer", "/var/tmp", "auto")[0] == "ABORTED"
