"""state_dict and load_state_dict of OffloadedOptimizer: those of the class itself."""

import copy

import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp
from generic_support import GenericPair, Lion, equal_states
from optim_support import SMALL, equal, parameters, set_gradients, twins

from torch_ext import OffloadedOptimizer

SIZES = [1, 65, 30_000, (100, 70), 0, ()]
CLASSES = [
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.RMSprop, {"centered": True}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    (torch.optim.Adamax, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.ASGD, {}),
    (Lion, {}),
]
named = pytest.mark.parametrize(("cls", "options"), CLASSES, ids=lambda v: str(v)[-20:])


@pytest.fixture(autouse=True)
def one_thread():
    """Torch rounds the last elements of a thread's share differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make(nvme_dir):
    """Makes an OffloadedOptimizer; all are closed at the end."""
    made = []

    def make(cls, params, **options):
        options = {"nvme_path": nvme_dir, "host_memory": SMALL} | options
        made.append(OffloadedOptimizer(cls, params, **options))
        return made[-1]

    yield make
    for optimizer in made:
        optimizer.close()


@named
@pytest.mark.parametrize("before", [0, 3])
def test_the_class_goes_on_with_our_state_bit_for_bit(nvme_dir, cls, options, before):
    pair = GenericPair(cls, parameters(*SIZES), nvme_dir, **options)
    pair.steps(before)
    rest = twins(pair.ours)
    other = cls(rest, **options)
    state = pair.a.state_dict()
    assert state["param_groups"] == pair.b.state_dict()["param_groups"]
    other.load_state_dict(state)
    for seed in range(10, 13):
        pair.step(seed)
        set_gradients(rest, seed=seed)
        other.step()
    assert equal(rest, pair.ours)
    assert pair.equal()


@named
@pytest.mark.parametrize("before", [0, 3])
def test_we_go_on_with_the_state_of_the_class_bit_for_bit(nvme_dir, make, cls, options, before):
    pair = GenericPair(cls, parameters(*SIZES), nvme_dir, **options)
    pair.steps(before)
    state = copy.deepcopy(pair.b.state_dict())
    rest = twins(pair.theirs)
    ours = make(cls, rest, **{**options, "lr": 0.5})
    set_gradients(rest, seed=99)  # State that the load replaces.
    ours.step()
    for p, q in zip(rest, pair.theirs, strict=True):
        p.data.copy_(q)
    ours.load_state_dict(state)
    assert equal_states(ours.state_dict(), state)
    assert ours.param_groups[0]["lr"] == pair.b.param_groups[0]["lr"]
    for seed in range(10, 13):
        pair.step(seed)
        set_gradients(rest, seed=seed)
        ours.step()
    assert equal(rest, pair.theirs)


@pytest.mark.parametrize("cls", [torch.optim.Adagrad, torch.optim.RMSprop])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("before", [0, 3])
def test_a_saved_file_brings_everything_back(nvme_dir, make, cls, dtype, before):
    ours = parameters(*SIZES, dtype=dtype)
    a = make(cls, ours)
    for seed in range(before):
        set_gradients(ours, seed=seed)
        a.step()
    torch.save(a.state_dict(), nvme_dir / "state.pt")
    rest = twins(ours)
    b = make(cls, rest, lr=1.0)
    b.load_state_dict(torch.load(nvme_dir / "state.pt", weights_only=True))
    for seed in range(3, 6):
        set_gradients(ours, rest, seed=seed)
        a.step()
        b.step()
        assert equal(ours, rest)


def test_state_in_any_strides_and_dtype_is_loaded(nvme_dir):
    pair = GenericPair(
        torch.optim.RMSprop, [torch.randn(50, 400).t().requires_grad_()], nvme_dir
    )
    pair.steps(2)
    state = pair.b.state_dict()
    entry = dict(state["state"][0])
    entry["square_avg"] = entry["square_avg"].contiguous().double()
    entry["step"] = 2
    pair.a.load_state_dict({**state, "state": {0: entry}})
    pair.steps(2, first=5)
    assert pair.equal()


@pytest.mark.parametrize("mode", ["tensors", "mapped"])
def test_the_state_dict_is_a_snapshot(nvme_dir, make, mode):
    ours = parameters(30_000, 5)
    a = make(torch.optim.Adam, ours, state_dict_mode=mode)
    set_gradients(ours, seed=0)
    a.step()
    before = a.state_dict()
    kept = copy.deepcopy(before)
    set_gradients(ours, seed=1)
    a.step()
    assert equal_states(before, kept)
    assert not equal_states(a.state_dict(), kept)
    before["state"][0]["exp_avg"].zero_()  # Private to whoever holds it.
    before["state"][0]["step"].zero_()
    fresh = a.state_dict()
    assert fresh["state"][0]["exp_avg"].any()
    assert fresh["state"][0]["step"] == 2
    after = copy.deepcopy(fresh)
    a.close()
    assert equal_states(fresh, after)


def test_state_is_empty_at_first_and_never_holds_tensors(make):
    ours = parameters(100, 200) + parameters(5, dtype=torch.bfloat16)
    a = make(torch.optim.Adam, ours)
    assert a.state == {}
    assert a.state_dict()["state"] == {}
    set_gradients(ours[1:], seed=0)
    for _ in range(3):
        a.step()
    assert list(a.state) == ours[1:]
    assert a.state[ours[1]] == {"step": 3.0, "exp_avg": None, "exp_avg_sq": None}
    assert "master_param" in a.state[ours[2]]
    assert list(a.state_dict()["state"]) == [1, 2]


def test_hooks_of_state_dict_and_load_state_dict_run(make):
    a = make(torch.optim.Adam, parameters(100))
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


BAD_STATES = {
    "groups": (lambda s: {**s, "param_groups": s["param_groups"] * 2}, "different number"),
    "shape": (lambda s: bad(s, exp_avg=torch.zeros(5)), "exp_avg has sizes"),
    "none": (lambda s: bad(s, exp_avg=None), "no tensor 'exp_avg'"),
    "no step": (lambda s: bad(s, step=None), "'step' is None"),
    "text as step": (lambda s: bad(s, step="many"), "'step' is 'many', which is no number"),
    "two steps": (lambda s: bad(s, step=torch.ones(2)), "which is no number"),
    "integers": (lambda s: bad(s, exp_avg=torch.zeros(100, dtype=torch.int)), "torch.int32"),
    "another class": (
        lambda s: {
            "param_groups": [{"lr": 0.1, "params": [0, 1]}],
            "state": {0: {"momentum_buffer": torch.ones(100)}},
        },
        "no tensor 'exp_avg'",
    ),
    "no dict": (lambda s: {**s, "state": {0: 5}}, "must be a dict, not int"),
    "number": (lambda s: 3, "a state_dict must be a dict.*not int"),
    "strangers": (lambda s: {**s, "state": {"w": s["state"][0]}}, r"a state of \['w'\]"),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_state_that_does_not_fit_changes_nothing(nvme_dir, name):
    change, text = BAD_STATES[name]
    pair = GenericPair(torch.optim.Adam, parameters(100, 9000), nvme_dir)
    pair.steps(2)
    with pytest.raises((ValueError, TypeError), match=text):
        pair.a.load_state_dict(change(pair.b.state_dict()))
    pair.steps(2, first=5)
    assert pair.equal()
    assert equal_states(pair.a.state_dict(), pair.b.state_dict())


def test_loaded_options_decide_which_state_is_wanted(nvme_dir, make):
    pair = GenericPair(torch.optim.Adam, parameters(9000), nvme_dir, amsgrad=True)
    pair.steps(2)
    rest = twins(pair.ours)
    plain = make(torch.optim.Adam, rest)
    plain.load_state_dict(pair.a.state_dict())
    assert plain.param_groups[0]["amsgrad"] is True
    pair.step(5)
    set_gradients(rest, seed=5)
    plain.step()
    assert equal(rest, pair.ours)


def test_distributed_checkpoint_saves_and_loads_it(make):
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(70, 30), torch.nn.Linear(30, 3))

    source, target = model(), model()
    a = make(torch.optim.RMSprop, source.parameters(), momentum=0.9)
    b = make(torch.optim.RMSprop, target.parameters(), momentum=0.9)
    for seed in range(3):
        set_gradients(list(source.parameters()), seed=seed)
        a.step()
    a.zero_grad()
    options = dcp.StateDictOptions(full_state_dict=True)
    state = dcp.get_optimizer_state_dict(source, a, options=options)
    dcp.set_optimizer_state_dict(target, b, state, options=options)
    target.load_state_dict(source.state_dict())
    for seed in range(3, 6):
        set_gradients(list(source.parameters()), list(target.parameters()), seed=seed)
        a.step()
        b.step()
    assert equal(source.parameters(), target.parameters())


def test_it_survives_what_accelerate_and_lightning_do(nvme_dir):
    """They move the tensors of the state dict and load it, or those of ``state``."""
    pair = GenericPair(torch.optim.NAdam, parameters(3000), nvme_dir)
    move = torch.utils._pytree.tree_map_only
    for seed in range(3):
        state = move(torch.Tensor, lambda t: t.to("cpu", copy=True), pair.a.state_dict())
        pair.a.load_state_dict(state)
        for p, entry in pair.a.state.items():
            pair.a.state[p] = move(torch.Tensor, lambda t: t.to("meta"), entry)
        pair.step(seed)
    assert pair.equal()
