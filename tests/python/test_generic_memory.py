"""The host memory that a step of OffloadedOptimizer takes, by the process's own account."""

import subprocess
import textwrap

import forked_python
import pytest

MIB = 2**20

PROGRAM = """
    import sys, torch
    from torch_ext import OffloadedOptimizer

    def status(key):
        with open("/proc/self/status") as file:
            return next(int(l.split()[1]) * 1024 for l in file if l.startswith(key))

    def run(parameter, host_memory):
        optimizer = OffloadedOptimizer(
            torch.optim.RMSprop, [parameter], centered=True, momentum=0.9,
            nvme_path=sys.argv[1], host_memory=host_memory, state_dict_mode="mapped",
        )
        for _ in range(2):
            optimizer.step()
        optimizer.state_dict()
        optimizer.close()
        return optimizer.stats()

    def ones(elements):
        parameter = torch.ones(elements, dtype=getattr(torch, sys.argv[2])).requires_grad_()
        parameter.grad = torch.ones_like(parameter)
        return parameter

    run(ones(100), 2**20)  # All imports, threads and libraries.
    large = ones(int(sys.argv[3]))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew.
    before = status("VmRSS")
    stats = run(large, int(sys.argv[4]))
    print(status("VmHWM") - before, stats["host_bytes_peak"])
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_takes_no_more_than_host_memory(nvme_dir, dtype):
    budget = 32 * MIB
    arguments = [str(nvme_dir), dtype, str(8_000_000), str(budget)]
    done = subprocess.run(
        [forked_python.python(), "-c", textwrap.dedent(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown, peak = map(int, done.stdout.split())
    assert peak <= budget
    assert budget / 2 < grown <= budget * 1.05 + 16 * MIB
