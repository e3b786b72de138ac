"""state_dict and load_state_dict of OffloadedAdamW, and what else calls them."""

import copy
import gc
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from optim_support import (
    SMALL,
    Pair,
    equal,
    equal_states,
    parameters,
    set_gradients,
    split_master,
    twins,
)

from torch_ext import OffloadedAdamW

SIZES = [1, 65, 30_000, (100, 70), 0, ()]


@pytest.fixture(autouse=True)
def one_thread():
    """Many small kernel calls are slow on threads that others compete for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(nvme_dir):
    """Makes an OffloadedAdamW; all are closed at the end."""
    made = []

    def make(params, **options):
        made.append(
            OffloadedAdamW(params, **{"nvme_path": nvme_dir, "host_memory": SMALL} | options)
        )
        return made[-1]

    yield make
    for optimizer in made:
        optimizer.close()


def test_torch_goes_on_with_our_state_bit_for_bit(nvme_dir):
    pair = Pair(parameters(*SIZES), nvme_dir)
    pair.steps(3)
    rest = twins(pair.ours)
    torchs = torch.optim.AdamW(rest, lr=0.5, fused=True)
    torchs.load_state_dict(pair.a.state_dict())
    assert torchs.param_groups[0]["lr"] == pair.a.param_groups[0]["lr"]
    for seed in range(10, 13):
        pair.step(seed)
        set_gradients(rest, seed=seed)
        torchs.step()
    assert equal(rest, pair.ours)
    assert pair.equal()


@pytest.mark.parametrize("fused", [True, False])
def test_we_go_on_with_torchs_state_bit_for_bit(nvme_dir, make, fused):
    pair = Pair(parameters(*SIZES), nvme_dir)
    pair.steps(3)
    state = copy.deepcopy(pair.b.state_dict())
    if not fused:
        state["param_groups"][0].update(fused=None, foreach=True)
    rest = twins(pair.theirs)
    ours = make(rest, lr=0.5, eps=0.1)
    set_gradients(rest, seed=99)  # State that the load replaces.
    ours.step()
    for p, q in zip(rest, pair.theirs, strict=True):
        p.data.copy_(q)
    ours.load_state_dict(state)
    assert equal_states(ours.state_dict(), state)
    assert ours.param_groups[0]["fused"] is True
    assert ours.param_groups[0]["eps"] == 1e-8
    for seed in range(10, 13):
        pair.step(seed)
        set_gradients(rest, seed=seed)
        ours.step()
    assert equal(rest, pair.theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["tensors", "mapped"])
def test_a_saved_file_brings_everything_back(nvme_dir, make, dtype, mode):
    ours = parameters(*SIZES, dtype=dtype)
    a = make(ours, state_dict_mode=mode)
    for seed in range(3):
        set_gradients(ours, seed=seed)
        a.step()
    torch.save(a.state_dict(), nvme_dir / "state.pt")
    rest = twins(ours)
    b = make(rest, lr=1.0)
    b.load_state_dict(torch.load(nvme_dir / "state.pt", weights_only=True))
    for seed in range(3, 6):
        set_gradients(ours, rest, seed=seed)
        a.step()
        b.step()
        assert equal(ours, rest)


@pytest.mark.parametrize("mode", ["tensors", "mapped"])
def test_the_state_dict_is_a_snapshot(nvme_dir, make, mode):
    ours = parameters(30_000, 5)
    a = make(ours, state_dict_mode=mode)
    set_gradients(ours, seed=0)
    a.step()
    before = a.state_dict()
    kept = copy.deepcopy(before)
    set_gradients(ours, seed=1)
    a.step()
    assert equal_states(before, kept)
    assert not equal_states(a.state_dict(), kept)
    before["state"][0]["exp_avg"].zero_()  # Private to whoever holds it.
    fresh = a.state_dict()
    assert fresh["state"][0]["exp_avg"].any()
    after = copy.deepcopy(fresh)
    a.close()
    assert equal_states(fresh, after)


def test_mapped_tensors_hold_the_snapshot_file(nvme_dir, make):
    def open_files():
        gc.collect()
        maps = Path("/proc/self/maps").read_text().splitlines()
        return sum(str(nvme_dir) in line for line in maps)

    ours = parameters(30_000, 5)
    a = make(ours, engine="threads", state_dict_mode="mapped")
    set_gradients(ours, seed=0)
    a.step()
    assert open_files() == 0
    state = a.state_dict()
    last = state["state"][1]["exp_avg_sq"]
    assert open_files() == 1
    del state
    assert open_files() == 1
    assert last.any()
    del last
    assert open_files() == 0
    assert os.listdir(nvme_dir) == []


def test_tensors_have_the_parameters_shape_and_strides(make):
    weight = torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last)
    ours = [weight.requires_grad_(), *parameters((3, 4), (), 0, (2, 0))]
    a = make(ours)
    set_gradients(ours, seed=0)
    a.step()
    state = a.state_dict()["state"]
    for i, p in enumerate(ours):
        assert state[i]["exp_avg"].shape == p.shape
        assert state[i]["exp_avg"].stride() == p.stride()
        assert state[i]["exp_avg"].dtype == torch.float32
        assert state[i]["step"].dtype == torch.float32
        assert state[i]["step"].shape == ()


def test_state_is_empty_at_first_and_never_holds_tensors(make):
    ours = parameters(100, 200) + parameters(5, dtype=torch.bfloat16)
    a = make(ours)
    assert a.state == {}
    assert a.state_dict()["state"] == {}
    set_gradients(ours[1:], seed=0)
    for _ in range(3):
        a.step()
    assert list(a.state) == ours[1:]
    assert a.state[ours[1]] == {"step": 3, "exp_avg": None, "exp_avg_sq": None}
    assert "master_param" in a.state[ours[2]]
    assert list(a.state_dict()["state"]) == [1, 2]


def test_only_some_parameters_may_have_state(nvme_dir, make):
    pair = Pair(parameters(1000, 2000, 30), nvme_dir)
    pair.step(0, [0, 2])
    rest = twins(pair.ours)
    c = make(rest)
    c.load_state_dict(pair.a.state_dict())
    assert list(c.state) == [rest[0], rest[2]]
    for seed in range(1, 4):
        pair.step(seed)
        set_gradients(rest, seed=seed)
        c.step()
    assert equal(rest, pair.ours)
    c.load_state_dict({"state": {}, "param_groups": c.state_dict()["param_groups"]})
    assert c.state == {}
    assert c.state_dict()["state"] == {}


def test_names_and_extra_keys_of_groups_are_kept(make):
    model = torch.nn.Linear(3, 2)
    a = make([{"params": list(model.named_parameters()), "tag": [1, 2]}])
    saved = a.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    a.param_groups[0]["tag"].append(3)
    a.load_state_dict(saved)
    assert a.param_groups[0]["tag"] == [1, 2, 3]
    assert a.param_groups[0]["tag"] is not saved["param_groups"][0]["tag"]
    del saved["param_groups"][0]["param_names"]
    a.load_state_dict(saved)
    assert a.param_groups[0]["param_names"] == ["weight", "bias"]
    assert a.param_groups[0]["params"] == [model.weight, model.bias]


def test_hooks_of_state_dict_and_load_state_dict_run(make):
    ours = parameters(100)
    a = make(ours)
    set_gradients(ours, seed=0)
    a.step()
    calls = []
    a.register_state_dict_pre_hook(lambda _: calls.append("pre"))
    a.register_state_dict_post_hook(lambda _, d: {**d, "more": 1})
    a.register_load_state_dict_pre_hook(lambda _, d: calls.append(sorted(d)))
    a.register_load_state_dict_post_hook(lambda _: calls.append("post"))
    a.load_state_dict(a.state_dict())
    assert calls == ["pre", ["more", "param_groups", "state"], "post"]


def bad(state, **entry):
    state = copy.deepcopy(state)
    state["state"][0].update(entry)
    return state


def without(state, name):
    state = copy.deepcopy(state)
    del state["state"][0][name]
    return state


def with_group(state, **values):
    state = copy.deepcopy(state)
    state["param_groups"][0].update(values)
    return state


def without_in_group(state, name):
    state = copy.deepcopy(state)
    del state["param_groups"][0][name]
    return state


BAD_STATES = {
    "groups": (lambda s: {**s, "param_groups": s["param_groups"] * 2}, "different number"),
    "size": (lambda s: with_group(s, params=[0]), "doesn't match the size"),
    "shape": (lambda s: bad(s, exp_avg=torch.zeros(5)), "exp_avg has sizes"),
    "shape of sq": (lambda s: bad(s, exp_avg_sq=torch.zeros(100, 1)), "exp_avg_sq has sizes"),
    "missing": (lambda s: without(s, "exp_avg_sq"), "no tensor 'exp_avg_sq'"),
    "none": (lambda s: bad(s, exp_avg=None), "no tensor 'exp_avg'"),
    "no step": (lambda s: without(s, "step"), "has no 'step'"),
    "huge step": (lambda s: bad(s, step=torch.tensor(1e30)), r"the step 1e\+30;"),
    "text as step": (lambda s: bad(s, step="many"), "the step 'many', which is no number"),
    "two steps": (lambda s: bad(s, step=torch.ones(2)), "which is no number"),
    "half a step": (lambda s: bad(s, step=torch.tensor(0.5)), "the step 0.5"),
    "nan step": (lambda s: bad(s, step=torch.tensor(float("nan"))), "the step nan"),
    "integers": (
        lambda s: bad(s, exp_avg=torch.zeros(100, dtype=torch.int)),
        "dtype torch.int32; allowed: float64",
    ),
    "meta": (lambda s: bad(s, exp_avg=torch.zeros(100, device="meta")), "meta"),
    "sparse": (lambda s: bad(s, exp_avg=torch.zeros(100).to_sparse()), "sparse_coo"),
    "no dict": (lambda s: {**s, "state": {0: 5}}, "must be a dict, not int"),
    "number": (lambda s: 3, "a state_dict must be a dict.*not int"),
    "no state": (lambda s: {"param_groups": s["param_groups"]}, "'state'.*are .'param_groups"),
    "no groups": (lambda s: {"state": s["state"]}, "no 'param_groups'"),
    "no params": (lambda s: {**s, "param_groups": [{"lr": 1.0}]}, r"param_groups\[0\] has no"),
    "amsgrad": (lambda s: with_group(s, amsgrad=True), "amsgrad"),
    "adam": (lambda s: with_group(s, decoupled_weight_decay=False), "decoupled"),
    "lr": (lambda s: with_group(s, lr=-1.0), "Invalid learning rate"),
    "no lr": (lambda s: without_in_group(s, "lr"), "has no 'lr'"),
    "no betas": (lambda s: without_in_group(s, "betas"), "has no 'betas'"),
    "strangers": (
        lambda s: {**s, "state": {"weight": s["state"][0], "bias": s["state"][1]}},
        r"a state of \['weight', 'bias'\], which no",
    ),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_that_does_not_fit_changes_nothing(nvme_dir, name):
    change, text = BAD_STATES[name]
    pair = Pair(parameters(100, 9000), nvme_dir)
    pair.steps(2)
    state = change(pair.b.state_dict())
    with pytest.raises((ValueError, TypeError), match=text):
        pair.a.load_state_dict(state)
    assert pair.a.param_groups[0]["lr"] == 1e-3
    pair.steps(2, first=5)
    assert pair.equal()
    assert equal_states(pair.a.state_dict(), pair.b.state_dict())


def test_a_state_that_does_not_fit_names_the_parameter(make):
    a = make([("weight", parameters(10)[0]), ("bias", parameters(3)[0])])
    zeros = torch.zeros(3)
    for wrong in ({"exp_avg": torch.zeros(4)}, {"exp_avg_sq": zeros.int()}, {"step": -1.0}):
        entry = {"step": 1, "exp_avg": zeros, "exp_avg_sq": zeros} | wrong
        group = a.state_dict()["param_groups"][0] | {"params": ["w", "b"]}
        state = {"state": {"b": entry}, "param_groups": [group]}
        with pytest.raises((ValueError, TypeError)) as info:
            a.load_state_dict(state)
        assert "parameter 'b', param_groups[0]['params'][1] ('bias')" in str(info.value)


def test_loaded_weights_win_over_the_master(make):
    """In whichever order the model's and the optimizer's state are loaded."""
    weights = parameters(5000, dtype=torch.bfloat16)
    a = make(weights)
    for seed in range(3):
        set_gradients(weights, seed=seed)
        a.step()
    saved, saved_weights = a.state_dict(), weights[0].detach().clone()
    results = []
    for model_first in (True, False):
        other = parameters(5000, dtype=torch.bfloat16, seed=9)
        b = make(other)
        if model_first:
            other[0].data.copy_(saved_weights)
        b.load_state_dict(saved)
        other[0].data.copy_(saved_weights)
        set_gradients(other, seed=7)
        b.step()
        results.append(other)
    set_gradients(weights, seed=7)
    a.step()
    assert equal(weights, results[0])
    assert equal(weights, results[1])


def test_without_masters_the_parameters_are_taken(make):
    weights = parameters(5000, dtype=torch.bfloat16)
    a = make(weights)
    set_gradients(weights, seed=0)
    a.step()
    state = a.state_dict()
    del state["state"][0]["master_param"]
    a.load_state_dict(state)
    assert torch.equal(a.state_dict()["state"][0]["master_param"], weights[0].float())


def test_a_changed_parameter_is_seen_in_the_saved_master(make):
    weights = parameters(5000, dtype=torch.bfloat16)
    a = make(weights)
    set_gradients(weights, seed=0)
    a.step()
    with torch.no_grad():
        weights[0][::2] = 3.0
    master = a.state_dict()["state"][0]["master_param"]
    assert torch.equal(split_master(master)[0], weights[0])
    assert torch.all((master[::2] - 3.0).abs() <= 2.0**-7)
    assert not torch.equal(master, weights[0].float())


def dcp_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(30, 300), torch.nn.Linear(300, 10))


def train(model, optimizer, steps):
    for seed in steps:
        set_gradients(list(model.parameters()), seed=seed)
        optimizer.step()
        optimizer.zero_grad()


def dcp_optimizer(model, make, lr):
    groups = [{"params": model[0].parameters(), "lr": lr}, {"params": model[1].parameters()}]
    return make(groups)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["float", "tensor"])
def test_dcp_may_ask_for_the_state_before_the_first_step(make, lr):
    asked, plain = dcp_model(), dcp_model()
    a, b = dcp_optimizer(asked, make, lr), dcp_optimizer(plain, make, lr)
    for _ in range(2):
        state = dcp.get_optimizer_state_dict(asked, a)
        assert state["state"]["0.weight"]["step"] == 0
        assert not state["state"]["1.bias"]["exp_avg"].any()
    assert float(a.param_groups[0]["lr"]) == float(lr)
    assert equal(asked.parameters(), plain.parameters())
    train(asked, a, range(3))
    train(plain, b, range(3))
    assert equal(asked.parameters(), plain.parameters())
    assert a.state_dict()["state"][0]["step"] == 3


@pytest.mark.parametrize("flat", [False, True])
def test_dcp_brings_the_state_back(make, flat):
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    source, target = dcp_model(), dcp_model()
    a, b = dcp_optimizer(source, make, 1e-2), dcp_optimizer(target, make, 1e-2)
    train(source, a, range(3))
    state = dcp.get_optimizer_state_dict(source, a, options=options)
    dcp.set_optimizer_state_dict(target, b, state, options=options)
    target.load_state_dict(source.state_dict())
    train(source, a, range(3, 6))
    train(target, b, range(3, 6))
    assert equal(source.parameters(), target.parameters())


def test_a_first_step_with_zero_gradients_counts_if_the_rate_is_not_zero(nvme_dir):
    pair = Pair(parameters(100), nvme_dir)
    pair.step(0, scale=0.0)
    pair.steps(2)
    assert pair.equal()


def test_a_first_step_with_rate_zero_counts_if_a_gradient_is_not_zero(nvme_dir):
    pair = Pair(parameters(100), nvme_dir, lr=0.0)
    pair.step(0)
    for group in (*pair.a.param_groups, *pair.b.param_groups):
        group["lr"] = 0.1
    pair.steps(2)
    assert pair.equal()


def test_it_survives_what_accelerate_does(nvme_dir):
    """AcceleratedOptimizer moves the tensors of the state dict and loads it."""
    pair = Pair(parameters(3000), nvme_dir)
    for seed in range(3):
        state = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.to("cpu", copy=True), pair.a.state_dict()
        )
        pair.a.load_state_dict(state)
        pair.step(seed)
    assert pair.equal()


def test_it_survives_what_lightning_does(nvme_dir):
    """Strategy.setup moves the tensors in ``state``, in place."""
    pair = Pair(parameters(3000), nvme_dir)
    for seed in range(3):
        for p, entry in pair.a.state.items():
            pair.a.state[p] = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: t.to("meta"), entry
            )
        pair.step(seed)
    assert pair.equal()


def test_it_cannot_be_copied_or_pickled(make):
    a = make(parameters(10))
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            attempt(a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.lr_scheduler.StepLR(a, 3).state_dict()
