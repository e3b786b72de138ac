"""Shares the tests out where pytest-xdist runs them side by side."""

from __future__ import annotations

import pytest

# Builds wheels for minutes: begins first, so that the others go on beside it.
_LONG = ("tests/python/test_packaging.py",)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each file to one process, for its fixtures. The simulated device has one process
    too.

    Autograd makes threads for the devices that are known at the first backward of a process.
    The
    simulated one has to be known by then, so its tests come first.
    """
    for item in items:
        file = item.nodeid.partition("::")[0]
        simulated = "sim_machine" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("sim" if simulated else file))
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    (group,) = item.get_closest_marker("xdist_group").args
    return 0 if group == "sim" else 1 if group in _LONG else 2
