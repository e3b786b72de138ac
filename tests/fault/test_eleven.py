"""The eleven faults of eleven.py; `make test-faults` tries them on every engine."""

import os

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


def test_lost_bytes_and_a_process_that_dies_are_told_from_success():
    # The null engine moves no bytes and says that it did.
    assert eleven.trial("ours", "misaligned_buffer", "/var/tmp", "null")[0] == "LOST"
    assert eleven.trial("nobody", "misaligned_buffer", "/var/tmp", "auto")[0] == "ABORTED"
