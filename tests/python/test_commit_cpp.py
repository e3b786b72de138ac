"""A training that Python committed goes on in C++, and the other way round.

Python makes steps 1 to 3, a C++ program 4 to 6, and Python 7 to 9. The reference is one
training of nine steps in Python: torch.optim.AdamW in memory for "exact" and float32.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch

import torch_ext
from torch_ext import OffloadedAdamW

BUILD = Path(os.environ.get("TORCH_EXT_BUILD_DIR", "build/release")).resolve()
PROGRAM = BUILD / "tests/torch_ext_tensor_tests"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = ("exact", "bf16", "int8")
#: What each case has apart from its dtype and its format.
BEGUN_IN_CPP, NAMED, ODD, DIVIDED = "cpp", "named", "odd", "divided"
CASES = [
    *[f"{dtype}-{state_format}" for dtype in DTYPES for state_format in FORMATS],
    f"{BEGUN_IN_CPP}-float32-exact",
    f"{BEGUN_IN_CPP}-bfloat16-int8",
    f"{NAMED}-float32-exact",
    f"{ODD}-float32-exact",
    f"{DIVIDED}-bfloat16-int8",
]


def make_parameters(case):
    """The same as in the C++ program. The second is frozen."""
    dtype = DTYPES[case.split("-")[-2]]
    return [
        torch.nn.Parameter((torch.arange(30000.0) / 30000).to(dtype).view(100, 300)),
        torch.nn.Parameter(torch.ones(5, dtype=torch.uint8), requires_grad=False),
        torch.nn.Parameter(torch.ones(700, dtype=dtype)),
    ]


def groups_of(case, parameters):
    first, frozen, last = parameters
    more = {"lr": 1e-3, "betas": (0.8, 0.99)}
    if case.startswith(NAMED):
        groups = [[("a.weight", first), ("a.mask", frozen)], [("b", last)]]
    else:
        groups = [[first, frozen], [last]]
    return [{"params": groups[0]}, {"params": groups[1]} | more]


def train(parameters, optimizer):
    for _ in range(3):
        for p in parameters[::2]:
            p.grad = p.detach() * 0.5 + 0.25
        optimizer.step()


def begin(case, folder):
    """What Python does before C++ goes on."""
    parameters = make_parameters(case)
    optimizer = OffloadedAdamW(
        groups_of(case, parameters),
        lr=torch.tensor(1e-2, dtype=torch.float64) if case.startswith(ODD) else 1e-2,
        nvme_path=folder,
        host_memory="64MiB" if case.startswith(DIVIDED) else "1MiB",
        state_format=case.split("-")[-1],
        seed=7,
    )
    with optimizer:
        train(parameters, optimizer)
        extra = b"\0"
        if case.startswith(ODD):
            # Tensors that C++ has no place for, and more.
            extra = {"rng": torch_ext.rng_state(), "more": torch.ones(100_000)}
            extra["path"] = "\udcff"  # A file's name that is not in UTF-8.
            torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
            optimizer.state[parameters[0]]["slow_buffer"] = torch.ones(1000)
        optimizer.commit(extra=extra)
    if case.startswith(DIVIDED):
        # Smaller tiles are in a store of another name.
        groups = groups_of(case, parameters)
        with OffloadedAdamW.resume(folder, groups, host_memory="256KiB") as optimizer:
            optimizer.commit(extra=extra)
        assert os.listdir(folder) == ["state.r0-of-1.e1.d0.store"]


def reference(case, folder):
    """Returns parameters and state after nine steps."""
    parameters = make_parameters(case)
    if case.endswith("float32-exact"):
        optimizer = torch.optim.AdamW(groups_of(case, parameters), lr=1e-2, fused=True)
    else:
        optimizer = OffloadedAdamW(
            groups_of(case, parameters),
            lr=1e-2,
            nvme_path=folder,
            host_memory="1MiB",
            state_format=case.split("-")[-1],
            seed=7,
        )
    for _ in range(3):
        train(parameters, optimizer)
    return parameters, optimizer.state_dict()["state"]


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory):
    """A folder for each case, in which C++ has gone on, and what the program printed."""
    if not PROGRAM.exists():
        pytest.skip(f"there is no {PROGRAM}")
    root = tmp_path_factory.mktemp("commits")
    for case in CASES:
        (root / case).mkdir()
        if not case.startswith(BEGUN_IN_CPP):
            begin(case, root / case)
    done = subprocess.run(
        [PROGRAM, "--gtest_filter=CommitOfPythonTest.*"],
        env=os.environ | {"TORCH_EXT_TEST_COMMITS": "\n".join(str(root / c) for c in CASES)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[  PASSED  ] 1 test." in done.stdout
    return root, done.stdout


@pytest.mark.parametrize("case", CASES)
def test_nine_steps_in_two_languages_are_nine_steps(gone_on, tmp_path, case):
    root, _ = gone_on
    parameters = make_parameters(case)
    # C++ knows places only.
    groups = groups_of("", parameters)
    with OffloadedAdamW.resume(root / case, groups, host_memory="1MiB") as optimizer:
        before = 3 if case.startswith(BEGUN_IN_CPP) else 6
        assert optimizer.committed_step == before
        is_kept = not case.startswith((BEGUN_IN_CPP, ODD))
        assert optimizer.committed_extra == (b"\0" if is_kept else b"") + b"\xff and C++"
        assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 1e-3]
        assert [g["betas"] for g in optimizer.param_groups] == [(0.9, 0.999), (0.8, 0.99)]
        for _ in range(before, 9, 3):
            train(parameters, optimizer)
        state = optimizer.state_dict()["state"]
    expected, expected_state = reference(case, tmp_path)
    for p, q in zip(parameters, expected, strict=True):
        assert torch.equal(p, q)
    assert state.keys() == expected_state.keys() == {0, 2}
    for number, entry in expected_state.items():
        assert state[number].keys() == entry.keys()
        for name, value in entry.items():
            assert torch.equal(state[number][name], value), name


def test_cpp_says_what_it_leaves_out(gone_on):
    _, said = gone_on
    left_out = [line for line in said.splitlines() if "left out" in line]
    assert all(line.startswith(f"{ODD}-") for line in left_out), said
    for part in ("left out: initial_lr", "only Python reads", "state of others"):
        assert any(part in line for line in left_out), said
