"""``optimizer.state`` may be written to, deleted and assigned, as people do with torch.optim.

Each test does the same to an optimizer of torch, in memory, and to ours.
"""

import copy
import pickle
from collections import defaultdict

import pytest
import torch
from optim_support import SMALL, HalfReference, equal, parameters, set_gradients, twins

from torch_ext import OffloadedAdamW, OffloadedOptimizer

#: Several tiles, small ones that share one, none at all.
SIZES = [(300, 70), 5000, 17, 1, 0]
KINDS = ["AdamW", "update", "Adam", "NAdam"]


@pytest.fixture(autouse=True)
def one_thread():
    """Many small kernel calls are slow on threads that others compete for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_memory(kind, params, **options):
    if kind in ("AdamW", "update", "prefetch"):
        return torch.optim.AdamW(params, fused=True, **options)
    return getattr(torch.optim, kind)(params, foreach=False, **options)


def offloaded(kind, params, directory, host_memory=SMALL, **options):
    place = {"nvme_path": directory, "host_memory": host_memory}
    if kind in ("AdamW", "update", "prefetch"):
        overlap = False if kind == "AdamW" else kind
        return OffloadedAdamW(params, overlap_backward=overlap, **options, **place)
    return OffloadedOptimizer(
        getattr(torch.optim, kind), params, foreach=False, **options, **place
    )


class Both:
    """Ours beside torch's."""

    def __init__(self, kind, nvme_dir, sizes=SIZES, **options):
        offload = {k: options.pop(k) for k in ("host_memory",) if k in options}
        self.ours = parameters(*sizes)
        self.theirs = twins(self.ours)
        groups = [self.ours[:2], self.ours[2:]] if len(sizes) > 2 else [self.ours]
        other = [self.theirs[:2], self.theirs[2:]] if len(sizes) > 2 else [self.theirs]
        self.a = offloaded(
            kind, [{"params": g} for g in groups], nvme_dir, **offload, **options
        )
        self.b = in_memory(kind, [{"params": g} for g in other], **options)

    @property
    def sides(self):
        return ((self.a, self.ours), (self.b, self.theirs))

    def do(self, action):
        """The same to both."""
        for optimizer, params in self.sides:
            action(optimizer, params)

    def current(self):
        return [[p for g in o.param_groups for p in g["params"]] for o in (self.a, self.b)]

    def step(self, seed):
        """By backward, so that "update" takes the gradients."""
        for optimizer, params in zip((self.a, self.b), self.current(), strict=True):
            generator = torch.Generator().manual_seed(seed)
            optimizer.zero_grad()
            factors = [torch.randn(p.shape, generator=generator) for p in params]
            sum((p * f).sum() for p, f in zip(params, factors, strict=True)).backward()
            optimizer.step()

    def steps(self, count, first=0):
        for seed in range(first, first + count):
            self.step(seed)

    def differences(self):
        ours, theirs = self.current()
        found = [
            i for i, (p, q) in enumerate(zip(ours, theirs, strict=True)) if not equal([p], [q])
        ]
        a, b = self.a.state_dict()["state"], self.b.state_dict()["state"]
        b = {key: entry for key, entry in b.items() if entry}
        found += [] if a.keys() == b.keys() else [list(a), list(b)]
        for key in a.keys() & b.keys():
            same = a[key].keys() == b[key].keys() and all(
                torch.equal(torch.as_tensor(a[key][n]), torch.as_tensor(b[key][n]))
                for n in a[key]
            )
            found += [] if same else [key]
        return found


@pytest.fixture
def both(nvme_dir):
    made = []

    def make(kind, **options):
        made.append(Both(kind, nvme_dir, **options))
        return made[-1]

    yield make
    for each in made:
        each.a.close()


def _assign(o, params):
    o.state = defaultdict(dict)


def _clear(o, params):
    o.state.clear()


def _delete_some(o, params):
    for p in params[1:3]:
        del o.state[p]


def _pop(o, params):
    assert o.state.pop(params[0])["step"] == 3
    assert o.state.pop(torch.zeros(3), "none") == "none"


def _popitem(o, params):
    while o.state:
        o.state.popitem()


def _empty_dict(o, params):
    o.state[params[1]] = {}
    o.state[params[2]].clear()


def _name_by_name(o, params):
    for name in list(o.state[params[2]]):
        del o.state[params[2]][name]


RESETS = [_assign, _clear, _delete_some, _pop, _popitem, _empty_dict, _name_by_name]


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize(
    ("kind", "memory"),
    [(kind, SMALL) for kind in KINDS] + [("AdamW", "16MiB"), ("update", "16MiB")],
)
def test_state_that_is_deleted_begins_anew_as_in_memory(both, kind, reset, memory):
    pair = both(kind, lr=1e-2, host_memory=memory)
    pair.steps(3)
    pair.do(reset)
    pair.steps(3, first=3)
    assert pair.differences() == []
    pair.do(reset)  # Before a state_dict(), without a step.
    assert pair.differences() == []


def _assign_zeros(o, params):
    for p in params:
        for name in ("exp_avg", "exp_avg_sq"):
            o.state[p][name] = torch.zeros_like(p)


def _assign_others(o, params):
    generator = torch.Generator().manual_seed(1)
    for p in params:
        o.state[p]["exp_avg"] = torch.randn(p.shape, generator=generator)
        o.state[p].update(exp_avg_sq=torch.rand(p.shape, generator=generator))


def _zero_in_place(o, params):
    for p in params:
        for name in ("exp_avg", "exp_avg_sq"):
            o.state[p][name].zero_()


def _scale_what_is_held(o, params):
    held = [o.state[p]["exp_avg"] for p in params]
    torch._foreach_mul_(held, 0.5)


def _rows(o, params):
    o.state[params[0]]["exp_avg"][::3] = 0
    o.state[params[0]]["exp_avg_sq"][5:9].zero_()


def _by_data(o, params):
    o.state[params[0]]["exp_avg"].data.zero_()


def _by_numpy(o, params):
    o.state[params[1]]["exp_avg"].numpy()[7] = 3


def _by_a_view(o, params):
    view = o.state[params[1]]["exp_avg"][10:20]
    view.fill_(0.25)
    o.state[params[2]]["exp_avg"].zero_()
    view.mul_(2)


def _after_it_was_assigned(o, params):
    given = torch.ones_like(params[0])
    o.state[params[0]]["exp_avg"] = given
    o.state[params[1]]["exp_avg"] = torch.ones_like(params[1])
    assert o.state[params[1]]["exp_avg"].sum() == 5000
    given.mul_(0.125)


def _whole_entries(o, params):
    for p in params:
        o.state[p] = {
            **dict(o.state[p]),
            "exp_avg": torch.full_like(p, 0.5),
            "exp_avg_sq": o.state[p]["exp_avg_sq"] * 2,
        }


def _filled_after_it_was_assigned(o, params):
    filled = o.state[params[1]] = {}
    filled |= {"step": torch.tensor(7.0), "exp_avg": torch.ones_like(params[1])}
    filled["exp_avg_sq"] = torch.full_like(params[1], 0.01)


def _filled_in_turn(o, params):
    for p in params:
        filled = {}
        o.state[p] = filled
        filled["step"] = torch.tensor(7.0)
        filled["exp_avg"] = torch.ones_like(p)
        filled["exp_avg_sq"] = torch.full_like(p, 0.01)


def _replaced_in_what_was_assigned(o, params):
    entries = {p: copy.deepcopy(o.state[p]) for p in params}
    o.state.update(entries)
    for p in params:
        for value in (1.0, 0.5):  # The second may be where the first was.
            entries[p]["exp_avg"] = torch.full_like(p, value)
    entries[params[1]]["exp_avg_sq"].mul_(2)


def _filled_as_a_whole(o, params):
    entries = o.state = defaultdict(dict, {params[0]: copy.deepcopy(o.state[params[0]])})
    for p in params[1:]:
        entries[p].update(step=torch.tensor(2.0), exp_avg=torch.ones_like(p))
        entries[p]["exp_avg_sq"] = torch.full_like(p, 0.01)
    entries[params[0]]["step"] = torch.tensor(1.0)


def _given_other_memory(o, params):
    for p in params:
        read = o.state[p]["exp_avg"]
        assert read is o.state[p]["exp_avg"]
        read.data = torch.full_like(p, 0.125)
        o.state[p]["exp_avg_sq"].data = torch.full_like(p, 0.01)


def _set_by_setstate(o, params):
    entries = {p: copy.deepcopy(o.state[p]) for p in params[1:]}
    o.__setstate__({"state": defaultdict(dict, entries)})


CHANGES = [
    _assign_zeros,
    _assign_others,
    _zero_in_place,
    _scale_what_is_held,
    _rows,
    _by_data,
    _by_numpy,
    _by_a_view,
    _after_it_was_assigned,
    _whole_entries,
    _filled_after_it_was_assigned,
    _filled_in_turn,
    _replaced_in_what_was_assigned,
    _filled_as_a_whole,
    _given_other_memory,
    _set_by_setstate,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["AdamW", "update", "Adam"])
def test_what_is_written_to_a_state_counts_as_in_memory(both, kind, change):
    pair = both(kind, lr=1e-2)
    pair.steps(3)
    with torch.no_grad():
        pair.do(change)
    assert pair.differences() == []
    pair.steps(2, first=3)
    with torch.no_grad():
        pair.do(change)
    pair.steps(2, first=5)  # With nothing in between that would write it.
    assert pair.differences() == []


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_the_number_of_steps_can_be_set(both, kind):
    pair = both(kind, lr=1e-2)
    pair.steps(3)
    pair.a.state[pair.ours[0]]["step"] = 0
    pair.b.state[pair.theirs[0]]["step"].zero_()
    pair.do(lambda o, params: o.state[params[1]].update(step=torch.tensor(70.0)))
    assert pair.a.state[pair.ours[1]]["step"] == 70
    pair.steps(2, first=3)
    assert pair.differences() == []


@pytest.mark.parametrize("kind", KINDS)
def test_reading_gives_what_state_dict_gives(both, kind):
    pair = both(kind, lr=1e-2)
    pair.steps(2)
    for number, entry in pair.a.state_dict()["state"].items():
        shown = pair.a.state[pair.ours[number]]
        assert list(shown) == list(entry)
        assert dict(shown).keys() == shown.keys() == copy.deepcopy(shown).keys()
        for name in entry:
            assert torch.equal(torch.as_tensor(shown[name]), torch.as_tensor(entry[name]))
            if name.startswith("exp"):
                assert shown[name].stride() == entry[name].stride()
                assert torch.equal(pickle.loads(pickle.dumps(shown))[name], entry[name])
    assert pair.differences() == []


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_a_loop_over_items_shows_numbers_and_what_others_keep_and_no_tensor(both, kind):
    pair = both(kind)
    pair.steps(2)
    first = pair.ours[0]
    note = torch.ones(2)
    pair.a.state[first]["note"] = note
    names = {"step": 2, "exp_avg": None, "exp_avg_sq": None}
    assert pair.a.state[first] == {**names, "note": note}
    assert list(pair.a.state[first].values()) == [2, None, None, note]
    pair.a.state[first]["exp_avg"] = torch.zeros_like(first)
    assert dict(pair.a.state[first].items()) == {**names, "note": note}
    assert pair.a.state[pair.ours[1]] == names


def test_state_is_a_dict_as_torchs_is(both):
    pair = both("AdamW")
    state = pair.a.state
    assert isinstance(state, dict)
    assert isinstance(state, defaultdict)
    assert not state
    assert state == {}
    assert state.get(pair.ours[0]) is None
    assert pair.ours[0] not in state
    pair.step(0)
    assert list(state) == pair.ours
    assert len(state) == len(pair.ours)
    assert isinstance(state[pair.ours[0]], dict)
    assert state[pair.ours[0]] is state[pair.ours[0]]
    assert set(map(id, state.keys())) == set(map(id, pair.ours))
    assert state.setdefault(pair.ours[0], {})["step"] == 1
    assert state[pair.ours[0]].get("amsgrad", 5) == 5
    with pytest.raises(KeyError):
        state[pair.ours[0]]["amsgrad"]
    with pytest.raises(KeyError):
        del state[torch.zeros(2)]
    with pytest.raises(KeyError):
        state.pop(torch.zeros(2))
    with pytest.raises(TypeError, match="must be a dict, not list"):
        state[pair.ours[0]] = [1]
    other = torch.zeros(3)
    assert state[other] == {}
    assert other in state


def _lightning(o, params):
    for p, v in o.state.items():
        o.state[p] = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), v)


def _lightning_as_it_rebuilds_mappings(o, params):
    for p, v in o.state.items():
        o.state[p] = type(v)(list(v.items()))


def _lightning_entry_by_entry(o, params):
    for v in o.state.values():
        for name, value in v.items():
            v[name] = value


def _a_copy(o, params):
    o.state = defaultdict(dict, o.state)


def _itself(o, params):
    o.state = o.state
    o.state |= {}
    for p in params:
        o.state[p] = o.state[p]


@pytest.mark.parametrize(
    "nothing",
    [
        _lightning,
        _lightning_as_it_rebuilds_mappings,
        _lightning_entry_by_entry,
        _a_copy,
        _itself,
    ],
)
@pytest.mark.parametrize("kind", ["AdamW", "Adam", "update"])
def test_who_assigns_what_is_there_changes_nothing(both, kind, nothing, monkeypatch):
    pair = both(kind, lr=1e-2)
    pair.steps(3)

    def untouched(what):
        assert not what

    monkeypatch.setattr(pair.a, "_change_states", untouched)
    monkeypatch.setattr(pair.a, "_forget_states", untouched)
    nothing(pair.a, pair.ours)
    pair.a.state.flush()
    monkeypatch.undo()
    pair.steps(2, first=3)
    assert pair.differences() == []


@pytest.mark.parametrize("kind", ["AdamW", "update", "Adam"])
def test_who_holds_an_entry_that_is_replaced_goes_on_with_it(both, kind):
    pair = both(kind, lr=1e-2, sizes=[5000, 5000, 30])
    pair.steps(3)

    def put_aside(o, params):
        entry = o.state[params[2]]
        before = entry["exp_avg"].clone()
        o.state[params[2]] = {}
        kept.append(entry)
        assert torch.equal(entry["exp_avg"], before)

    def exchange(o, params):
        one, other = params[:2]
        o.state[one], o.state[other] = o.state[other], o.state[one]

    def put_back(o, params):
        o.state[params[2]] = kept.pop(0)

    kept = []
    for action in (put_aside, exchange, put_back, exchange):
        pair.do(action)
        assert pair.differences() == []
        pair.steps(2, first=3)
        assert pair.differences() == []


@pytest.mark.parametrize("kind", ["AdamW", "update", "Adam"])
def test_a_dict_that_was_assigned_counts_also_after_a_step(both, kind):
    pair = both(kind, lr=1e-2)
    pair.steps(2)
    entries = {}

    def assign(o, params):
        for p in params:
            entries[p] = o.state[p] = copy.deepcopy(dict(o.state[p]))

    def change(o, params):
        entries[params[0]]["exp_avg"] = torch.full_like(params[0], 0.5)
        entries[params[1]].clear()

    for action in (assign, change):
        pair.do(action)
        pair.steps(2, first=2)
    assert pair.differences() == []


@pytest.mark.parametrize(
    "put_back",
    [
        lambda state, p, saved: state[p].update(saved),
        lambda state, p, saved: state.update({p: saved}),
        lambda state, p, saved: [state[p].__setitem__(*item) for item in saved.items()],
    ],
)
@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_what_a_loop_showed_before_a_step_is_no_state_to_go_back_to(both, kind, put_back):
    pair = both(kind, lr=1e-2)
    pair.steps(2)
    p = pair.ours[1]
    saved = dict(pair.a.state[p].items())
    pair.steps(1, first=2)
    place = r"the state of param_groups\[0\]\['params'\]\[1\]"
    with pytest.raises(ValueError, match=f"^{place} is assigned other numbers, and None for"):
        put_back(pair.a.state, p, saved)


KEEP = torch.arange(300) % 3 != 0


def _kept_rows(p):
    return torch.nn.Parameter(p.detach()[KEEP].clone())


def _prune_3dgs(o, params):
    group = o.param_groups[0]
    stored = o.state.get(group["params"][0], None)
    stored["exp_avg"] = stored["exp_avg"][KEEP]
    stored["exp_avg_sq"] = stored["exp_avg_sq"][KEEP]
    del o.state[group["params"][0]]
    group["params"][0] = _kept_rows(group["params"][0])
    o.state[group["params"][0]] = stored


def _prune_gsplat(o, params):
    group = o.param_groups[0]
    old = group["params"][0]
    stored = o.state[old]
    del o.state[old]
    for name in stored.keys():  # noqa: SIM118, as it is written there.
        if name not in ("step", "mu_product"):
            stored[name] = stored[name][KEEP]
    group["params"] = [_kept_rows(old), *group["params"][1:]]
    o.state[group["params"][0]] = stored


def _grow(o, params):
    group = o.param_groups[0]
    old = group["params"][0]
    stored = o.state.get(old, None)
    more = torch.ones(5, 70)
    for name in ("exp_avg", "exp_avg_sq"):
        stored[name] = torch.cat((stored[name], torch.zeros_like(more)), dim=0)
    del o.state[old]
    group["params"][0] = torch.nn.Parameter(torch.cat((old.detach(), more)))
    o.state[group["params"][0]] = stored


def _replace_tensor(o, params):
    group = o.param_groups[0]
    old = group["params"][0]
    stored = o.state.get(old, None)
    stored["exp_avg"] = torch.zeros_like(old)
    stored["exp_avg_sq"] = torch.zeros_like(old)
    del o.state[old]
    group["params"][0] = torch.nn.Parameter(old.detach() * 0.5)
    o.state[group["params"][0]] = stored


def _move_by_pop(o, params):
    group = o.param_groups[0]
    old = group["params"][0]
    group["params"][0] = torch.nn.Parameter(old.detach() * 0.5)
    o.state[group["params"][0]] = o.state.pop(old)


def _copy_then_delete(o, params):
    group = o.param_groups[0]
    old = group["params"][0]
    group["params"][0] = torch.nn.Parameter(old.detach() * 0.5)
    o.state[group["params"][0]] = o.state[old]
    del o.state[old]


def _replace_and_delete(o, params):
    group = o.param_groups[0]
    del o.state[group["params"][0]]
    group["params"][0] = _kept_rows(group["params"][0])


def _cut_in_place(o, params):
    p = o.param_groups[0]["params"][0]
    p.data = p.data[:90].clone()
    p.grad = None
    for name in ("exp_avg", "exp_avg_sq"):
        o.state[p][name] = o.state[p][name][:90]


PRUNINGS = [
    _prune_3dgs,
    _prune_gsplat,
    _grow,
    _replace_tensor,
    _move_by_pop,
    _copy_then_delete,
    _replace_and_delete,
]


@pytest.mark.parametrize("prune", PRUNINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_and_go_as_in_memory(both, kind, prune):
    pair = both(kind, lr=1e-2)
    pair.steps(3)
    pair.do(prune)
    pair.steps(3, first=3)
    assert pair.differences() == []


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_rows_are_cut_in_place_as_in_memory(both, kind):
    pair = both(kind, lr=1e-2)
    pair.steps(3)
    pair.do(_cut_in_place)
    pair.steps(3, first=3)
    assert pair.differences() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_put_in_the_place_of_another_has_no_state_as_in_memory(both, kind):
    pair = both(kind, lr=1e-2)
    pair.steps(3)

    def replace(o, params):
        o.param_groups[0]["params"][0] = _kept_rows(o.param_groups[0]["params"][0])

    pair.do(replace)
    pair.steps(3, first=3)
    assert equal(*pair.current())
    assert pair.ours[0] in pair.a.state  # State is the parameter's.
    pair.a.state_dict()  # Torch's own is a KeyError now.
    pair.do(lambda o, params: o.state.pop(params[0]))
    assert pair.differences() == []


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_1000_resets_and_replacements_take_no_more_space(nvme_dir, kind):
    params = parameters(9000, 17, 3)
    optimizer = offloaded(kind, params, nvme_dir, lr=1e-2)
    params = optimizer.param_groups[0]["params"]
    sizes = []
    for number in range(1000):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        sizes.append(optimizer.stats()["state_bytes"])
        which = number % 3
        del optimizer.state[params[which]]
        if which != 1:
            params[which] = torch.nn.Parameter(params[which].detach() * 0.5)
    assert len(optimizer._slots) == 3
    assert max(sizes) <= 2 * sizes[0]
    assert optimizer.stats()["tiles"] <= 6
    optimizer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_the_parameters_whatever_group_it_is_in(both, kind):
    pair = both(kind, lr=1e-2)
    pair.steps(3)

    def regroup(o, params):
        group = o.param_groups.pop(0)
        o.add_param_group({"params": group["params"][:1], "weight_decay": 0.1})
        o.add_param_group({"params": group["params"][1:], "lr": 1e-3})

    pair.do(regroup)
    pair.steps(2, first=3)
    assert pair.differences() == []
    away = [o.param_groups.pop() for o in (pair.a, pair.b)]
    pair.steps(2, first=5)
    assert equal(*pair.current())
    for o, group in zip((pair.a, pair.b), away, strict=True):
        o.add_param_group(group)
    pair.steps(2, first=7)
    assert pair.differences() == []


def test_state_of_parameters_in_no_group_is_left_out_of_a_state_dict_with_a_warning(
    both, caplog
):
    pair = both("AdamW")
    pair.steps(2)
    pair.a.param_groups.pop()
    state = pair.a.state_dict()
    assert list(state["state"]) == [0, 1]
    assert "leaves out the state of 3 parameters" in caplog.text
    pair.a.load_state_dict(state)
    assert list(pair.a.state) == pair.ours[:2]


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_keys_of_others_stay_and_are_saved_and_loaded(both, nvme_dir, kind):
    pair = both(kind, lr=1e-2)

    def keep(o, params):
        o.state["global"] = {"rounds": 3}

    pair.do(keep)
    pair.a.state[pair.ours[0]]["early"] = torch.ones(2)
    pair.b.step()
    pair.steps(3)
    pair.do(lambda o, params: o.state[params[0]].update(slow_buffer=params[0].detach() * 2))
    pair.b.state[pair.theirs[0]]["early"] = torch.ones(2)
    pair.steps(1, first=3)
    saved = pair.a.state_dict()
    assert saved["state"]["global"] == {"rounds": 3}
    wanted = pair.b.state_dict()["state"]
    assert set(saved["state"][0]) == set(wanted[0])
    assert torch.equal(saved["state"][0]["slow_buffer"], wanted[0]["slow_buffer"])
    torch.save(saved, nvme_dir / "state.pt")
    rest = twins(pair.ours)
    again = offloaded(
        kind, [{"params": rest[:2]}, {"params": rest[2:]}], nvme_dir, host_memory=SMALL
    )
    again.load_state_dict(torch.load(nvme_dir / "state.pt", weights_only=True))
    assert again.state["global"] == {"rounds": 3}
    assert torch.equal(again.state[rest[0]]["slow_buffer"], wanted[0]["slow_buffer"])
    assert torch.equal(again.state[rest[0]]["early"], torch.ones(2))
    del again.state["global"]
    again.state[rest[0]].pop("slow_buffer")
    after = again.state_dict()["state"]
    assert "global" not in after
    assert list(after[0]) == [n for n in wanted[0] if n != "slow_buffer"]
    again.close()
    (nvme_dir / "state.pt").unlink()


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "update"])
def test_whole_entries_load_a_state(both, nvme_dir, kind):
    """As ZeroRedundancyOptimizer loads."""
    pair = both(kind, lr=1e-2)
    pair.steps(3)
    rest = twins(pair.ours)
    ours = offloaded(kind, rest, nvme_dir, lr=1e-2)
    for p, q in zip(rest, pair.theirs, strict=True):
        ours.state[p] = copy.deepcopy(pair.b.state[q])
    assert ours.stats()["state_bytes"] > 8 * 26_000  # Not all of it waits in memory.
    for seed in range(3, 6):
        pair.step(seed)
        set_gradients(rest, twins(rest), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        ours.zero_grad()
        factors = [torch.randn(p.shape, generator=generator) for p in rest]
        sum((p * f).sum() for p, f in zip(rest, factors, strict=True)).backward()
        ours.step()
    assert equal(rest, pair.theirs)
    ours.close()


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_what_cannot_be_a_state_is_refused_when_it_is_used_and_named(both, kind):
    pair = both(kind, lr=1e-2)
    pair.steps(2)
    place = r"the state of param_groups\[0\]\['params'\]\[1\]"
    entry = pair.a.state[pair.ours[1]]
    cases = [
        (
            "exp_avg",
            torch.zeros(3),
            ValueError,
            r"exp_avg has sizes \[3\], its parameter \[5000\]",
        ),
        ("exp_avg", torch.zeros(5000, dtype=torch.int32), TypeError, "exp_avg has dtype"),
        ("exp_avg", torch.empty(5000, device="meta"), TypeError, "exp_avg is meta"),
        ("exp_avg", 3, ValueError, "no tensor 'exp_avg'"),
        ("step", "many", ValueError, "step"),
        ("step", None, ValueError, "step"),
    ]
    for name, value, error, text in cases:
        good = entry[name]
        entry[name] = value
        for call in (pair.a.step, pair.a.state_dict):
            with pytest.raises(error, match=f"{place}.*{text}"):
                call()
        entry[name] = good
    del entry["exp_avg"]
    with pytest.raises(ValueError, match=rf"{place} lacks \['exp_avg'\]"):
        pair.a.step()
    with pytest.raises(KeyError):
        entry["exp_avg"]
    entry["exp_avg"] = pair.b.state[pair.theirs[1]]["exp_avg"].clone()
    pair.a.state[pair.ours[0]] = {"step": 3}
    with pytest.raises(ValueError, match=r"\[0\] lacks \['exp_avg', 'exp_avg_sq'\]"):
        pair.a.step()
    pair.a.state[pair.ours[0]] = copy.deepcopy(pair.b.state[pair.theirs[0]])
    pair.steps(2, first=2)
    assert pair.differences() == []


@pytest.mark.parametrize("write", ["zero_", "data", "numpy", "view"])
@pytest.mark.parametrize("kind", ["AdamW", "Adam", "update"])
def test_writing_to_what_was_read_before_a_step_is_told_once(both, kind, write):
    pair = both(kind, lr=1e-2)
    pair.steps(2)
    read = pair.a.state[pair.ours[1]]["exp_avg"]
    pair.step(2)
    if write == "zero_":
        read.zero_()
    elif write == "data":
        read.data[3] = 7
    elif write == "numpy":
        read.numpy()[3] = 7
    else:
        read[3:5].fill_(9)
    del read
    text = r"'exp_avg' of the state of param_groups\[0\]\['params'\]\[1\].*before a step"
    with pytest.raises(RuntimeError, match=text):
        pair.a.state_dict()
    pair.steps(2, first=3)
    assert pair.differences() == []


def test_a_buffer_that_is_assigned_again_may_have_been_written_to(both):
    pair = both("AdamW", lr=1e-2)
    buffers = [torch.zeros_like(pair.ours[1]) for _ in range(2)]
    for seed in range(4):
        pair.step(seed)
        for (optimizer, params), buffer in zip(pair.sides, buffers, strict=True):
            buffer.fill_(seed)
            optimizer.state[params[1]]["exp_avg"] = buffer
    pair.step(9)
    assert pair.differences() == []


def test_tensors_that_nobody_holds_do_not_pile_up(both):
    pair = both("AdamW", sizes=[30_000] * 8)
    pair.step(0)
    for p in pair.ours:
        assert pair.a.state[p]["exp_avg"].any()
    assert len(pair.a.state._active) <= 1
    _assign_zeros(pair.a, pair.ours)
    assert len(pair.a.state._active) <= 1


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_a_closed_optimizers_state_is_not_read(both, kind):
    pair = both(kind)
    pair.step(0)
    pair.a.close()
    assert pair.a.state[pair.ours[0]]["step"] == 1
    for attempt in (
        lambda: pair.a.state[pair.ours[0]]["exp_avg"],
        lambda: pair.a.state.clear(),
        lambda: pair.a.state.pop(pair.ours[0]),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            attempt()


@pytest.mark.parametrize("kind", ["AdamW", "update", "Adam"])
def test_what_an_interrupt_leaves_out_is_not_lost(both, kind, monkeypatch):
    """The engine knows which parameters have a state, whoever is interrupted."""
    pair = both(kind, lr=1e-2)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pair.a.state, "retire", interrupted)
    for seed in range(2):
        with pytest.raises(KeyboardInterrupt):
            pair.step(seed)
        optimizer, params = pair.sides[1]
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        factors = [torch.randn(p.shape, generator=generator) for p in params]
        sum((p * f).sum() for p, f in zip(params, factors, strict=True)).backward()
        optimizer.step()
    monkeypatch.undo()
    assert pair.differences() == []
    assert pair.a.state[pair.ours[0]]["step"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_reset_drops_the_master(nvme_dir, dtype):
    ours = parameters(9000, 5, dtype=dtype)
    optimizer = OffloadedAdamW(ours, lr=1e-2, nvme_path=nvme_dir, host_memory=SMALL)
    for seed in range(3):
        set_gradients(ours, seed=seed)
        optimizer.step()
    master = optimizer.state[ours[0]]["master_param"]
    assert torch.equal(master, optimizer.state_dict()["state"][0]["master_param"])
    assert not torch.equal(master, ours[0].detach().float())
    optimizer.state.clear()
    reference = HalfReference(twins(ours), lr=1e-2)
    for seed in range(3, 6):
        set_gradients(ours, reference.halves, seed=seed)
        optimizer.step()
        reference.step([half.grad for half in reference.halves])
    assert equal(ours, reference.halves)
    for p, q in zip(ours, reference.masters, strict=True):
        assert torch.equal(optimizer.state[p]["master_param"], q.detach())
    optimizer.close()


def test_an_assigned_master_is_the_one_that_is_updated(nvme_dir):
    (ours,) = parameters(9000, dtype=torch.bfloat16)
    optimizer = OffloadedAdamW([ours], lr=1e-2, nvme_path=nvme_dir, host_memory=SMALL)
    reference = HalfReference(twins([ours]), lr=1e-2)
    for seed in range(2):
        set_gradients([ours], reference.halves, seed=seed)
        optimizer.step()
        reference.step([reference.halves[0].grad])
    master = ours.detach().float() * (1 + 2**-12)
    low = master.view(torch.int32) & 0xFFFF
    master = torch.where(low < 0x8000, master, ours.detach().float())
    optimizer.state[ours]["master_param"] = master
    reference.lows[0] = master.view(torch.int32) & 0xFFFF
    set_gradients([ours], reference.halves, seed=9)
    optimizer.step()
    reference.step([reference.halves[0].grad])
    assert torch.equal(ours.detach(), reference.halves[0].detach())
    optimizer.close()


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
def test_resets_are_right_in_formats_that_are_not_exact(nvme_dir, state_format):
    def make(params):
        return OffloadedAdamW(
            params,
            lr=1e-2,
            nvme_path=nvme_dir,
            host_memory=SMALL,
            state_format=state_format,
            seed=5,
        )

    ours = parameters(20_000, 17)
    optimizer = make(ours)
    for seed in range(3):
        set_gradients(ours, seed=seed)
        optimizer.step()
    optimizer.state.clear()
    rest = twins(ours)
    new = make(rest)
    for seed in range(3):
        set_gradients(ours, rest, seed=seed)
        optimizer.step()
        new.step()
    assert equal(ours, rest)
    shown = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(optimizer.state[ours[0]]["exp_avg"], shown)
    optimizer.state[ours[1]]["exp_avg"].zero_()
    assert not optimizer.state_dict()["state"][1]["exp_avg"].any()
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], shown)
    optimizer.close()
    new.close()
