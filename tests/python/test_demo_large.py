"""examples/demo_large.py, in the small."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo_large  # noqa: E402
import memory_limit  # noqa: E402

MIB = 1 << 20
TAKE_200_MIB = "block = bytearray(200 << 20); print('lived')"


@pytest.mark.slow
def test_demo_trains_under_a_limit_that_ends_the_run_in_memory(nvme_dir):
    output = nvme_dir / "out"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo_large.py"), "--quick", "--output", output]
        + ["--nvme-path", nvme_dir],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((output / "demo_large.json").read_text())
    assert figures["in_memory"]["status"] != 0
    assert figures["in_memory"]["steps"] == []
    assert len(figures["offloaded"]["steps"]) == 2
    # 10 of the 12 bytes: the upper half of a master is the parameter.
    state = figures["offloaded"]["stats"]["state_bytes"]
    assert state >= 10 * figures["parameters"]
    assert f"limited by {figures['limited_by']}" in done.stdout
    assert "OffloadedAdamW: trained" in done.stdout
    assert [entry.name for entry in nvme_dir.iterdir()] == ["out"]


@pytest.mark.parametrize(("arguments", "times"), [([], 2), (["--overlap-backward=update"], 3)])
def test_masters_and_moments_are_larger_than_the_limit(tmp_path, monkeypatch, arguments, times):
    monkeypatch.setattr(demo_large, "describe", lambda path: {"free_bytes": 1 << 40})
    place = [f"--output={tmp_path}", f"--nvme-path={tmp_path}"]
    task = demo_large.make_job(demo_large.make_parser().parse_args([*arguments, *place]))
    assert task["parameters"] >= 0.5e9
    assert 12 * task["parameters"] >= times * task["limit"]


@pytest.mark.parametrize("kind", ["auto", "rlimit"])
def test_process_that_takes_more_than_its_limit_ends(kind):
    ends = []
    for mib in (100, 400):
        limit = memory_limit.make_limit(mib * MIB, kind)
        try:
            ends.append(
                subprocess.run(
                    [sys.executable, "-c", TAKE_200_MIB],
                    preexec_fn=limit.enter,
                    capture_output=True,
                    text=True,
                )
            )
        finally:
            limit.close()
    assert ends[0].returncode != 0
    assert ends[0].stdout == ""
    assert ends[1].stdout == "lived\n"


def test_where_no_group_can_be_made_the_limit_is_rlimit_data(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_limit, "parents", lambda: [(2, tmp_path)])
    limit = memory_limit.make_limit(100 * MIB)
    assert limit.kind.startswith("RLIMIT_DATA; no cgroup: ")
    # A group without the memory controller has no such file, and is not left behind.
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="no memory cgroup"):
        memory_limit.make_limit(100 * MIB, "cgroup")


def test_only_a_lack_of_memory_counts_as_one():
    def result(status, error=None, stderr=""):
        return {"status": status, "error": error, "stderr": stderr}

    assert demo_large.lacked_memory(result(-signal.SIGKILL))
    assert demo_large.lacked_memory(result(1, "RuntimeError: DefaultCPUAllocator: memory"))
    assert demo_large.lacked_memory(result(-signal.SIGABRT, None, "std::bad_alloc"))
    assert not demo_large.lacked_memory(result(1, "ValueError: betas"))
    assert not demo_large.lacked_memory(result(0))
