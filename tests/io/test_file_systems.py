"""The I/O core on other file systems than the machine's own, in a loop device.

The C++ tests run on $TORCH_EXT_TEST_DIR; here that is a file system made for
them, on a device with sectors of 4 KiB, where O_DIRECT takes nothing smaller.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

BUILD = Path(os.environ.get("TORCH_EXT_BUILD_DIR", "build/release")).resolve()
IMAGE_BYTES = 6 << 30  # Sparse.
#: What depends on where a file lies. Cases in /dev/shm run without this.
TESTS = "*IoEngineContract*:File*:IoQueue*:Store*:Swapper*:-*tmpfs*"


def run(*command: str | Path) -> str:
    """Its output, or a skip that says why this machine cannot."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        pytest.skip(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture(params=["ext4", "xfs"])
def file_system(request) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    folder = Path(run("mktemp", "-d", "-p", "/var/tmp", "torch_ext_loop.XXXXXX"))
    image, place = folder / "image", folder / "mounted"
    place.mkdir()
    undo = [["rm", "-rf", "--one-file-system", folder]]
    try:
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        device = run("losetup", "--find", "--show", "--sector-size", "4096", image)
        undo.append(["losetup", "--detach", device])
        run(f"mkfs.{request.param}", "-q", device)
        run("mount", device, place)
        undo.append(["umount", place])
        yield place
    finally:
        for command in reversed(undo):
            subprocess.run(command, check=True, timeout=120)


@pytest.mark.timeout(580)
def test_the_core_holds_on_sectors_of_4_kib(file_system):
    device = os.stat(file_system).st_dev
    sectors = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue")
    assert (sectors / "logical_block_size").read_text().strip() == "4096"
    done = subprocess.run(
        [BUILD / "tests" / "torch_ext_core_tests", f"--gtest_filter={TESTS}"],
        env={**os.environ, "TORCH_EXT_TEST_DIR": str(file_system)},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "[  PASSED  ]" in done.stdout
