"""The example program, built against the installed package, as a user would."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiler_cache import compiler_cache

import torch_ext

APP = Path(__file__).resolve().parents[2] / "examples/libtorch_app"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not Path(torch_ext.cmake_prefix_path).is_dir():
        pytest.skip("the package is not installed here")
    build = tmp_path_factory.mktemp("libtorch_app")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    env = os.environ | compiler_cache(build)
    for command in [
        [cmake, "-S", APP, "-B", build, "-DCMAKE_BUILD_TYPE=Debug",
         f"-DCMAKE_PREFIX_PATH={torch_ext.cmake_prefix_path}",
         f"-DTORCH_ROOT={Path(torch.__file__).parent}"],
        [cmake, "--build", build],
    ]:  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return build / "libtorch_app"


def run(program, *arguments):
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_the_program_swaps_and_trains_to_the_bit(program, nvme_dir):
    done = run(program, nvme_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the bit" in done.stdout
    assert "no such key: 'nothing'" in done.stdout
    assert os.listdir(nvme_dir) == []


def test_the_program_goes_on_from_its_commit(program, nvme_dir):
    for steps in ("steps 1 to 10,", "steps 11 to 20,"):
        done = run(program, "--resume", nvme_dir)
        assert done.returncode == 0, done.stdout + done.stderr
        assert steps in done.stdout

    def make_parameters():
        torch.manual_seed(1)
        drawn = [torch.randn(64, 300) / 8, torch.zeros(300), torch.randn(300, 7) / 17]
        return [torch.nn.Parameter(p) for p in drawn]

    # The same in memory, in Python.
    reference = make_parameters()
    x = torch.randn(32, 64)
    in_memory = torch.optim.AdamW(reference, lr=1e-2, fused=True)
    for _ in range(20):
        in_memory.zero_grad()
        y = torch.addmm(reference[1], x, reference[0]).relu().mm(reference[2])
        (y - x[:, :7]).square().mean().backward()
        in_memory.step()
    parameters = make_parameters()
    with torch_ext.OffloadedAdamW.resume(nvme_dir, parameters) as optimizer:
        assert optimizer.committed_step == 20
        for p, expected in zip(parameters, reference, strict=True):
            assert torch.equal(p, expected)


def test_a_missing_directory_is_named(program, nvme_dir):
    done = run(program, nvme_dir / "none")
    assert done.returncode == 2
    assert "none" in done.stderr
    assert "ENOENT" in done.stderr
