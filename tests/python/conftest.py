"""What the Python tests share.

A registered PrivateUse1 device takes precedence over CUDA in torch. So the tests of the
simulated device and those marked ``gpu`` cannot share a process. On a machine with a GPU, the
simulated ones run only with ``TORCH_EXT_TEST_SIM=1``, which leaves out those marked ``gpu``.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

_SIM = Path(__file__).resolve().parents[1] / "sim"


def _sim_refusal(config: pytest.Config) -> str | None:
    import torch

    if os.environ.get("TORCH_EXT_TEST_SIM") == "1":
        return None
    if config.getoption("markexpr", "").strip() == "gpu":
        return "-m gpu: the simulated device needs a process of its own"
    if torch.cuda.is_available():
        return "CUDA is available; for the simulated device set TORCH_EXT_TEST_SIM=1"
    return None


def _gpu_refusal() -> str | None:
    import torch

    if os.environ.get("TORCH_EXT_TEST_SIM") == "1":
        return "TORCH_EXT_TEST_SIM=1: the GPU needs a process of its own"
    return None if torch.cuda.is_available() else "needs a GPU"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _gpu_refusal()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(call: pytest.CallInfo):
    # The report of a failure shows tensors, and so waits for streams that the
    # test may have held.
    if call.excinfo is not None and "sim" in sys.modules:
        sys.modules["sim"].reset()
    return (yield)


@pytest.fixture(scope="session")
def sim_machine(pytestconfig: pytest.Config):
    """The module ``sim``, its device known to torch. Tests take ``sim`` instead."""
    if reason := _sim_refusal(pytestconfig):
        pytest.skip(reason)
    sys.path.insert(0, str(_SIM))
    import sim

    sim.install()
    return sim


@pytest.fixture
def sim(sim_machine):
    """Control of the simulated device: see tests/sim/sim.py."""
    sim_machine.reset()
    yield sim_machine
    sim_machine.reset()


@pytest.fixture
def handle():
    """An ``aio_handle`` that returns -1 where something fails."""
    from torch_ext import aio_handle

    with aio_handle() as handle:
        yield handle


@pytest.fixture
def strict():
    """An ``aio_handle`` that raises."""
    from torch_ext import aio_handle

    with aio_handle(strict=True) as handle:
        yield handle


@pytest.fixture
def nvme_dir():
    """An empty directory on a disk, or in ``TORCH_EXT_TEST_DIR``."""
    parent = os.environ.get("TORCH_EXT_TEST_DIR") or "/var/tmp"
    directory = tempfile.mkdtemp(prefix="torch_ext_test.", dir=parent)
    yield Path(directory)
    shutil.rmtree(directory, ignore_errors=True)
