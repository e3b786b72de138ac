"""DeepSpeed itself on torch_ext's I/O; `make test-deepspeed` runs it.

Not part of `make test`: DeepSpeed compiles its own op for the comparison, which
takes minutes.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# This folder, too, is a package "deepspeed" for pytest, which looks in tests/.
pytest.importorskip("deepspeed.ops")

TRAIN = Path(__file__).with_name("train.py")


def train(directory, op, *arguments):
    done = subprocess.run(
        [sys.executable, TRAIN, directory, op, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


@pytest.mark.deepspeed
@pytest.mark.parametrize("pipeline", [False, True])
def test_zero_3_trains_with_the_same_losses_on_both(tmp_path, pipeline):
    arguments = ["--pipeline"] if pipeline else []
    results = {}
    for op in ("own", "ours"):
        (tmp_path / op).mkdir()
        results[op] = train(tmp_path / op, op, *arguments)
    assert results["own"]["op"] != "torch_ext.deepspeed"
    assert results["ours"]["op"] == "torch_ext.deepspeed"
    assert results["own"]["losses"] == results["ours"]["losses"]
    assert len(set(results["ours"]["losses"])) == len(results["ours"]["losses"])
