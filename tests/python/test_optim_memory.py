"""The host memory that a step takes, by the process's own account."""

import re
import subprocess
import textwrap

import forked_python
import pytest
import torch
from generic_support import GenericPair
from optim_support import Pair, parameters

from torch_ext import OffloadedAdamW
from torch_ext.config import parse_size

MIB = 2**20

PROGRAM = """
    import sys, torch
    from torch_ext import OffloadedAdamW

    def status(key):
        with open("/proc/self/status") as file:
            return next(int(l.split()[1]) * 1024 for l in file if l.startswith(key))

    def run(parameters, host_memory):
        optimizer = OffloadedAdamW(
            parameters, nvme_path=sys.argv[1], host_memory=host_memory,
            state_dict_mode="mapped",
        )
        for _ in range(2):
            optimizer.step()
        optimizer.state_dict()
        optimizer.close()
        return optimizer.stats()

    dtype = getattr(torch, sys.argv[2])
    elements = int(sys.argv[3])
    small = [torch.ones(100, dtype=dtype, requires_grad=True)]
    large = [torch.ones(elements // 4, dtype=dtype, requires_grad=True) for _ in range(4)]
    for p in (*small, *large):
        p.grad = torch.ones_like(p)
    run(small, 2**20)  # All imports, threads and libraries.
    torch.optim.AdamW(small).step()
    for host_memory in map(int, sys.argv[4:]):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM starts anew.
        before = status("VmRSS")
        stats = run(large, host_memory)
        print(host_memory, status("VmHWM") - before, stats["host_bytes_peak"])
"""


def measure(nvme_dir, dtype, elements, budgets):
    arguments = [str(nvme_dir), dtype, str(elements), *map(str, budgets)]
    done = subprocess.run(
        [forked_python.python(), "-c", textwrap.dedent(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "elements", "budgets"),
    [
        ("float32", 140_000_000, [256 * MIB, 1024 * MIB]),
        ("bfloat16", 60_000_000, [64 * MIB, 512 * MIB]),
    ],
)
def test_a_step_takes_no_more_than_host_memory(nvme_dir, dtype, elements, budgets):
    measured = measure(nvme_dir, dtype, elements, budgets)
    assert [budget for budget, *_ in measured] == budgets
    for budget, grown, peak in measured:
        assert peak <= budget
        assert grown <= budget * 1.05 + 16 * MIB
        assert grown > budget / 2  # Else the measurement is wrong.


COMMITS = """
    import sys, torch
    from torch_ext import OffloadedAdamW

    def status(key):
        with open("/proc/self/status") as file:
            return next(int(l.split()[1]) * 1024 for l in file if l.startswith(key))

    def grown(work):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM starts anew.
        before = status("VmRSS")
        work()
        return status("VmHWM") - before

    def make(parameters, path):
        with OffloadedAdamW(parameters, nvme_path=path, host_memory=host_memory) as optimizer:
            for _ in range(2):
                optimizer.step()
                optimizer.commit()

    def resume(parameters, path):
        with OffloadedAdamW.resume(path, parameters, host_memory=host_memory) as optimizer:
            optimizer.step()
            optimizer.commit()

    host_memory, elements = map(int, sys.argv[3:])
    small = [torch.ones(100, requires_grad=True)]
    large = [torch.ones(elements // 4, requires_grad=True) for _ in range(4)]
    for p in (*small, *large):
        p.grad = torch.ones_like(p)
    make(small, sys.argv[2])  # All imports, threads and libraries.
    resume(small, sys.argv[2])
    print(grown(lambda: make(large, sys.argv[1])), grown(lambda: resume(large, sys.argv[1])))
"""


@pytest.mark.parametrize("budget", [32 * MIB, 96 * MIB])
def test_a_commit_and_a_resume_take_no_more_than_host_memory(nvme_dir, budget):
    elements = 20_000_000
    paths = [nvme_dir / "large", nvme_dir / "small"]
    for path in paths:
        path.mkdir()
    done = subprocess.run(
        [forked_python.python(), "-c", textwrap.dedent(COMMITS)]
        + [*map(str, paths), str(budget), str(elements)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    state = 8 * elements
    assert budget < state  # Else nothing would be moved.
    # 40 bytes a tile and 8 a block, and as much again while they are written: less than 1 MiB.
    for grown in map(int, done.stdout.split()):
        assert budget / 2 < grown <= budget * 1.05 + 16 * MIB + MIB


@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
@pytest.mark.parametrize(
    "sizes", [[100], [4000] * 500, [2048 * 2048, 2048] * 6, [30_000_000, 70_000_001]], ids=len
)
@pytest.mark.parametrize("budget", ["240KiB", "1MiB", "64MiB"])
def test_with_the_memory_that_the_plan_names_nothing_is_moved(
    nvme_dir, sizes, budget, state_format
):
    parameters = [torch.zeros(n, dtype=torch.bfloat16, requires_grad=True) for n in sizes]

    def plan_with(host_memory):
        options = {"nvme_path": nvme_dir, "state_format": state_format}
        with OffloadedAdamW(parameters, host_memory=host_memory, **options) as optimizer:
            return optimizer.plan()

    plan = plan_with(budget)
    enough = plan.host_memory_for_all
    for more in (1, 1.001, 1.01, 1.1, 1.5):
        assert plan_with(max(int(enough * more), 240 << 10)).step_bytes == 0
    assert enough <= 1.1 * plan.state_bytes + (2 << 20)
    if plan.step_bytes:
        said = re.search("with host_memory='(.*)' nothing would be moved", str(plan))[1]
        assert enough <= parse_size(said)
        assert plan_with(said).step_bytes == 0


@pytest.mark.parametrize("block_size", [4096, 12288, 1 << 20, 1 << 30])
@pytest.mark.parametrize("host_memory", ["240KiB", "256KiB", "8MiB"])
def test_every_block_size_of_the_range_works_with_any_host_memory(
    nvme_dir, block_size, host_memory
):
    aio = {"block_size": block_size}
    pair = Pair(parameters(100, 50_000), nvme_dir, host_memory, aio=aio)
    for seed in range(2):
        pair.step(seed)
    assert pair.equal()
    offload = {"aio": aio}
    pair = GenericPair(
        torch.optim.SGD, parameters(100, 50_000), nvme_dir, host_memory, offload, momentum=0.9
    )
    pair.steps(2)
    assert pair.equal()


def test_more_host_memory_than_can_be_mapped_is_an_error_that_names_it(nvme_dir):
    with pytest.raises(OSError, match="host_memory is too large"):
        OffloadedAdamW(
            [torch.zeros(1, requires_grad=True)], nvme_path=nvme_dir, host_memory=1 << 48
        )
