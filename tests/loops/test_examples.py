"""OffloadedAdamW under trainers of others; `make test-loops` runs all of this.

Not part of what `make test` installs: the trainers bring some forty packages.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, directory, *arguments):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "--nvme-path", directory, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=directory,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(output):
    """Returns all columns of each step."""
    lines = output.splitlines()
    assert lines[-1] == "equal to the bit: yes"
    rows = [line.split()[1:] for line in lines if re.match(r" *\d+  ", line)]
    assert len(rows) == 6
    assert len({row[0] for row in rows}) == 6
    return rows


def test_hugging_face_trains_and_resumes_with_the_losses_of_adamw_in_memory(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    output = run("hf_trainer.py", tmp_path, "--host-memory=256KiB", "--steps=6")
    for in_memory, offloaded, resumed in losses(output):
        assert in_memory == offloaded == resumed
    assert list(tmp_path.iterdir()) == []


def test_lightning_trains_with_the_losses_of_adamw_in_memory(tmp_path):
    pytest.importorskip("lightning")
    output = run("lightning_train.py", tmp_path, "--host-memory=256KiB", "--steps=6")
    for in_memory, offloaded in losses(output):
        assert in_memory == offloaded
    assert list(tmp_path.iterdir()) == []
