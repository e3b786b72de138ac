"""Every optimizer class that is installed: equal to itself in memory, or refused."""

import importlib.util

import optimizer_classes
import pytest
import torch

#: torch's own classes that are equal. Its others are refused, or do not take such parameters.
EQUAL = {
    *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "SGD"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Torch rounds the last elements of a thread's share differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "cls"), optimizer_classes.classes("torch").items(), ids=lambda v: str(v)[:12]
)
def test_a_class_of_torch_is_equal_to_itself_in_memory_or_refused(nvme_dir, name, cls):
    verdict = optimizer_classes.compare(cls, nvme_dir)
    assert verdict.kind in (["equal"] if name in EQUAL else ["refused", "no use"]), verdict


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("package", [p for p in optimizer_classes.PACKAGES if p != "torch"])
def test_a_class_of_another_package_is_equal_or_refused_too(nvme_dir, package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = optimizer_classes.verdicts([package], nvme_dir)[package]
    assert {name for name, verdict in found.items() if verdict.kind == "DIFFERS"} == set()
