"""examples/train_gpt.py, in the small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked_python
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import gpt_report  # noqa: E402

SMALL = ["--layers=1", "--width=64", "--heads=2", "--batch=1", "--context=16", "--steps=4"]


def run(*arguments):
    return subprocess.run(
        [forked_python.python(), str(EXAMPLES / "train_gpt.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["off", "update"])
def test_demo_trains_twice_and_compares(nvme_dir, overlap):
    output = nvme_dir / "out"
    place = ["--output", output, "--nvme-path", nvme_dir, "--host-memory", "240KiB"]
    done = run(*SMALL, *place, "--overlap-backward", overlap)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the bit: yes" in done.stdout
    assert str(output / "train_gpt.png") in done.stdout
    assert "\x1b" not in done.stdout
    assert (output / "train_gpt.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((output / "train_gpt.json").read_text())
    assert figures["equal"] is True
    assert len(figures["offloaded"]["steps"]) == 4
    assert figures["offloaded"]["last_loss"] < figures["offloaded"]["first_loss"]
    # With the least memory each step writes all state; the first has none to read.
    assert figures["io"]["bytes_written"] >= 4 * figures["state_bytes"]
    assert figures["io"]["bytes_read"] >= 3 * figures["state_bytes"]
    assert figures["io"]["host_bytes_peak"] <= 240 << 10
    # How much is hidden is a matter of time (benchmarks/README.md); that it can be, of
    # test_optim_overlap.py.
    assert 0 <= figures["io"]["hidden_share"] <= 1
    assert figures["job"]["overlap_backward"] == overlap.replace("off", "")
    lanes = {lane for step in figures["timeline"] for lane, *_ in step}
    assert lanes == {"read", "update", "write"}
    killed = figures["killed"]
    assert killed["equal"] is True
    assert (killed["killed_in"], killed["resumed_after"], killed["commits"]) == (3, 2, 4)
    assert "killed in step 3, resumed after step 2: the losses of all 4 steps" in done.stdout
    assert [entry.name for entry in nvme_dir.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--lr", "nan"], "--lr"),
        (["--width", "100", "--heads", "7"], "--heads 7"),
        (["--nvme-path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--host-memory", "12Q"], "12Q"),
        (["--host-memory", "4KiB"], "host_memory"),
        (["--device", "abacus"], "abacus"),
        (["--layers", "1000", "--width", "65536"], "state needs"),
        (["--bogus"], "--bogus"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_status_2(arguments, named, nvme_dir):
    done = run("--output", nvme_dir, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr


def test_runs_that_differ_in_one_bit_are_not_equal():
    def result(loss=2.0, bits="ab"):
        return {
            "steps": [{"loss": 3.0}, {"loss": loss}],
            "validation_loss": 2.5,
            "digests": {"w": bits},
        }

    assert gpt_report.compare(result(), result())["equal"]
    assert not gpt_report.compare(result(), result(loss=2.0000000000000004))["equal"]
    assert not gpt_report.compare(result(), result(bits="ac"))["equal"]
    assert not gpt_report.compare(result(float("nan")), result(float("nan")))["equal"]


def test_hidden_share_is_that_of_the_time_outside_of_steps():
    assert gpt_report.union([(0, 2), (1, 3), (5, 6), (5.5, 5.75)]) == 4
    transfers = [(0, 2), (1, 4), (6, 8)]
    assert gpt_report.hidden_share(transfers, [(4, 6)]) == 1
    assert gpt_report.hidden_share(transfers, [(1.5, 3), (7, 9)]) == 1 - 2.5 / 6
    assert gpt_report.hidden_share(transfers, [(0, 9)]) == 0
    assert gpt_report.hidden_share([], [(0, 9)]) is None


def test_a_resumed_run_that_differs_or_lacks_a_step_is_not_equal():
    undisturbed = {"steps": [{"loss": 3.0}, {"loss": 2.0}]}

    def equal(losses):
        killed = {
            "losses": losses,
            "steps": 2,
            "killed_in": 2,
            "resumed_after": 1,
            "commits": [{"seconds": 1, "bytes": 2}],
        }
        return gpt_report.summarize_killed(killed, undisturbed)["equal"]

    assert equal({1: [3.0], 2: [2.0, 2.0]})
    assert not equal({1: [3.0], 2: [2.0, 2.0000000000000004]})
    assert not equal({1: [float("nan")], 2: [2.0]})
    assert not equal({1: [3.0]})
