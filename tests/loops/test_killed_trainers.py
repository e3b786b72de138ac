"""Trainers of others resume with state_dict_mode="commit"; `make test-loops` runs this.

Runs are killed, also while they write a checkpoint. What they print must be the losses of the
same training in memory, with torch's own AdamW and without a break.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Each run imports a trainer, and a test has up to seven runs.
pytestmark = pytest.mark.timeout(900)

HERE = Path(__file__).resolve().parent
STEPS = 8


class Run:
    """A training that dies and is started again, until it is done."""

    def __init__(self, script, output, place=None, processes=1, **more):
        self._command = [sys.executable, HERE / script]
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
            self._command = [
                *[sys.executable, *launcher, "--master-port=0", "--rdzv-backend=c10d"],
                *["--rdzv-endpoint=localhost:0", HERE / script],
            ]
        self._processes = processes
        self._output = output
        self._arguments = [f"--output={output}", f"--steps={STEPS}"]
        self._arguments += [f"--{k.replace('_', '-')}={v}" for k, v in more.items()]
        if place is not None:
            self._arguments.append(f"--optimizer={json.dumps(place)}")
        self.losses = {}

    def __call__(self, *arguments, dies=False, resume=None):
        more = [f"--resume={resume}"] if resume else []
        done = subprocess.run(
            [*self._command, *self._arguments, *arguments, *more],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        output = done.stdout + done.stderr
        if not dies:
            assert done.returncode == 0, output
        elif self._processes == 1:
            assert done.returncode == -signal.SIGKILL, output
        else:
            assert "Signal 9 (SIGKILL)" in done.stderr, output
        found = {}
        for step, loss in re.findall(r"^step (\d+) (\S+)$", done.stdout, re.M):
            found[int(step)] = loss
        for step in found.keys() & self.losses.keys():
            assert found[step] == self.losses[step], step
        self.losses |= found
        return list(found)


def hugging_face(output):
    """The newest folder that is complete: Trainer writes its state last."""
    folders = [f.parent for f in output.glob("checkpoint-*/trainer_state.json")]
    return max(folders, key=lambda folder: int(folder.name.split("-")[1]))


def lightning(output):
    return max(
        output.glob("*.ckpt"), key=lambda file: int(file.stem.split("=")[1].split("-")[0])
    )


def place_in(path, keep):
    path.mkdir()
    return {
        "nvme_path": str(path),
        "host_memory": "256KiB",
        "state_dict_mode": "commit",
        "keep_commits": keep,
    }


@pytest.mark.parametrize(
    ("script", "newest", "packages"),
    [
        ("hf_victim.py", hugging_face, ("transformers", "accelerate")),
        ("lightning_victim.py", lightning, ("lightning",)),
    ],
)
def test_a_run_that_is_killed_has_the_losses_of_adamw_in_memory(
    tmp_path, script, newest, packages
):
    for package in packages:
        pytest.importorskip(package)
    in_memory = Run(script, tmp_path / "memory")
    assert in_memory() == list(range(1, STEPS + 1))

    place = place_in(tmp_path / "nvme", keep=2)
    run = Run(script, tmp_path / "out", place, limit=1)
    assert run("--die-after=3", dies=True) == [1, 2, 3]
    assert run("--die-after=5", dies=True, resume=newest(tmp_path / "out")) == [3, 4, 5]
    # The checkpoint of step 6 is cut off, again and again. That of step 4 is the only one.
    for _ in range(2):
        folder = newest(tmp_path / "out")
        assert run("--die-saving=6", dies=True, resume=folder)[0] == 5
        assert newest(tmp_path / "out") == folder
    assert run(resume=newest(tmp_path / "out"))[0] == 5
    assert run.losses == in_memory.losses
    # Checkpoints are rotated as ever, and the one that is there can be used.
    assert newest(tmp_path / "out").name.split(".")[0].endswith(str(STEPS))
    for file in (tmp_path / "out").glob("checkpoint-*/optimizer.pt"):
        assert file.stat().st_size < 64 << 10
    assert [f.name for f in (tmp_path / "nvme").iterdir()] == ["state.r0-of-1.e0.d0.store"]


def test_low_halves_of_hugging_face_meet_their_parameters(tmp_path):
    """With 16-bit parameters, what Trainer saves and what the drive has are one number."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    whole = Run("hf_victim.py", tmp_path / "whole", place_in(tmp_path / "a", keep=3))
    whole("--bf16-weights")
    run = Run("hf_victim.py", tmp_path / "out", place_in(tmp_path / "b", keep=3))
    run("--bf16-weights", "--die-after=5", dies=True)
    run("--bf16-weights", resume=hugging_face(tmp_path / "out"))
    assert run.losses == whole.losses
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 2


def test_hugging_face_under_ddp(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    in_memory = Run("hf_victim.py", tmp_path / "memory", processes=2)
    in_memory()
    place = place_in(tmp_path / "nvme", keep=3)
    run = Run("hf_victim.py", tmp_path / "out", place, processes=2)
    run("--die-after=5", dies=True)
    run(resume=hugging_face(tmp_path / "out"))
    assert run.losses == in_memory.losses
