"""Orders the tests, and so what the processes of pytest-xdist begin with."""

from __future__ import annotations

import pytest

# Minutes each: they begin first, so that the other processes have the rest beside them.
_LONG = (
    "tests/python/test_packaging.py",
    "tests/repo/test_benchmarks.py",
    "tests/fault/test_deepspeed_comparison.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files of the simulated device first, then those that take minutes.

    Autograd makes its threads for the devices there are at the first backward of a
    process: the simulated one has to be known by then. A process takes whole files,
    in this order.
    """
    simulated = {_file(item) for item in items if _is_simulated(item)}

    def place(item: pytest.Item) -> tuple[int, bool]:
        file = _file(item)
        group = 0 if file in simulated else 1 if file in _LONG else 2
        return group, group == 0 and not _is_simulated(item)

    items.sort(key=place)


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


def _is_simulated(item: pytest.Item) -> bool:
    return "sim_machine" in getattr(item, "fixturenames", ())
