"""OffloadedOptimizer equals the class itself, whatever the class writes, or refuses it."""

import itertools
import random
import warnings

import pytest
import torch
from generic_support import GenericPair
from optim_support import SMALL, equal, parameters, set_gradients, split_master, twins
from torch.optim.optimizer import register_optimizer_step_pre_hook

from torch_ext import OffloadedOptimizer
from torch_ext.optim._pieces import PieceOptimizer
from torch_ext.optim._trial import Trials

SIZES = [1, 65, (100, 70), 9000, ()]


class Momentum(torch.optim.Optimizer):
    """What hostile classes are made of: ``prepare`` sees it before each step, and ``rate``
    says by what a parameter is changed."""

    more: dict = {}

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr, **self.more})

    def prepare(self):
        pass

    def count(self, group):
        pass

    def rate(self, group, i, p):
        return group["lr"]

    @torch.no_grad()
    def step(self, closure=None):
        self.prepare()
        for group in self.param_groups:
            self.count(group)
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                state["average"].lerp_(p.grad, 0.1)
                p.sub_(state["average"] * self.rate(group, i, p))


class CountsInGroup(Momentum):
    """As apex's FusedAdam: the step number is the group's, made in the first step."""

    def count(self, group):
        group["step"] = group.get("step", 0) + 1

    def rate(self, group, i, p):
        return group["lr"] / (1 - 0.9 ** group["step"])


class MadeByConstructor(CountsInGroup):
    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["step"] = 0


class CountsInTensor(CountsInGroup):
    more = {"step": torch.tensor(0)}

    def count(self, group):
        group["step"] = group["step"] + 1


class CountsInPlace(CountsInGroup):
    def __init__(self, params, lr=0.01):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["steps"] = [0, {"sum": torch.zeros(())}]

    def count(self, group):
        group["steps"][0] += 1
        group["steps"][1]["sum"] += group["lr"]
        group["step"] = group["steps"][0]


class CountsWithGradientOnly(CountsInGroup):
    def count(self, group):
        if any(p.grad is not None for p in group["params"]):
            super().count(group)


class Forgets(CountsInGroup):
    """Deletes a key in every other step."""

    def count(self, group):
        super().count(group)
        if group.pop("odd", None) is None:
            group["odd"] = group["step"]


class WritesItsRate(CountsInGroup):
    def count(self, group):
        super().count(group)
        group["lr"] = group["lr"] * 0.9


class AddsDecayToGradients(Momentum):
    def rate(self, group, i, p):
        p.grad.add_(p, alpha=0.1)
        return group["lr"] * p.grad.abs()


class RebindsGradients(Momentum):
    def rate(self, group, i, p):
        p.grad = p.grad * 0.5
        return group["lr"] * p.grad.abs()


class ScheduleFree(Momentum):
    """As schedulefree's: parameters are written by train() and eval(), too."""

    more = {"training": False, "k": 0, "weights": 0.0}

    def train(self):
        self.switch(True, 0.1)

    def eval(self):
        self.switch(False, 1 - 1 / 0.9)

    @torch.no_grad()
    def switch(self, training, weight):
        for group in self.param_groups:
            if group["training"] != training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)
            group["training"] = training

    @torch.no_grad()
    def step(self, closure=None):
        if not self.param_groups[0]["training"]:
            raise ValueError("call train() before step()")
        for group in self.param_groups:
            group["k"] += 1
            group["weights"] += group["lr"] ** 2
            share = group["lr"] ** 2 / group["weights"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, share).add_(p.grad, alpha=group["lr"] * (0.9 * (1 - share) - 1))
                    z.sub_(p.grad, alpha=group["lr"])


class ExchangesState(Momentum):
    """Its tensors change places, with each other, the parameter and the gradient."""

    def rate(self, group, i, p):
        state = self.state[p]
        if "first" not in state:
            state.update(first=p.clone(), second=torch.zeros_like(p), last=p.clone())
        state["first"], state["average"] = state["average"], state["first"]
        p.data, state["last"] = state["last"].lerp_(p, 0.9), p.data
        state["second"], p.grad = p.grad, state["second"]
        return group["lr"] * state["first"].abs()


def two_groups():
    return [
        {"params": parameters(*SIZES)},
        {"params": parameters(700, 40_000, seed=1), "lr": 0.03},
    ]


@pytest.mark.parametrize(
    "cls",
    [
        *(CountsInGroup, MadeByConstructor, CountsInTensor, CountsInPlace, Forgets),
        *(CountsWithGradientOnly, WritesItsRate, AddsDecayToGradients, RebindsGradients),
        ExchangesState,
    ],
    ids=lambda cls: cls.__name__,
)
def test_what_a_class_writes_to_groups_and_gradients_is_as_in_memory(nvme_dir, cls):
    pair = GenericPair(cls, two_groups(), nvme_dir)
    everything = range(len(pair.ours))
    # Also without gradients: for some parameters, a group, all.
    for seed, which in enumerate([everything, [0, 3], everything, [], everything, everything]):
        pair.step(seed, which)
        assert pair.equal_in_all()
    rest = twins(pair.ours)
    n = len(SIZES)
    groups = [{"params": rest[:n]}, {"params": rest[n:], "lr": 0.5}]
    with OffloadedOptimizer(cls, groups, nvme_path=nvme_dir, host_memory=SMALL) as resumed:
        resumed.load_state_dict(pair.a.state_dict())
        pair.step(9)
        set_gradients(rest, seed=9)
        resumed.step()
        assert equal(rest, pair.theirs)


def test_classes_with_train_and_eval_have_them_and_evaluate_what_they_should(nvme_dir):
    pair = GenericPair(ScheduleFree, two_groups(), nvme_dir)
    set_gradients(pair.ours, seed=0)
    with pytest.raises(ValueError, match=r"^call train\(\) before step\(\)$"):
        pair.a.step()
    for seed in range(4):
        for optimizer in (pair.a, pair.b):
            optimizer.train()
        assert pair.equal_in_all() or seed == 0
        pair.step(seed, range(len(pair.ours)) if seed else [1, 3])
        assert pair.equal_in_all()
        for optimizer in (pair.a, pair.b):
            optimizer.eval()
            optimizer.eval()
        assert pair.equal_in_all()
    assert pair.a.stats()["steps"] == 4


def test_methods_that_are_not_run_are_named(nvme_dir):
    class Restarting(Momentum):
        def restart(self):
            raise AssertionError

    optimizer = OffloadedOptimizer(Restarting, parameters(10), nvme_path=nvme_dir)
    with pytest.raises(AttributeError, match="no 'restart', a method of Restarting's own"):
        optimizer.restart()
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "anything")


@pytest.mark.parametrize("cls", [AddsDecayToGradients, RebindsGradients])
def test_what_a_class_writes_to_gradients_arrives_in_any_strides_and_dtype(nvme_dir, cls):
    ours = [torch.randn(8, 50, 3, 4).to(memory_format=torch.channels_last), torch.randn(90, 70)]
    pair = GenericPair(cls, [p.requires_grad_() for p in ours], nvme_dir)
    for seed in range(2):
        set_gradients(pair.ours, pair.theirs, seed=seed)
        for p in (*pair.ours, *pair.theirs):
            p.grad = p.grad.contiguous() if p.dim() == 4 else p.grad.t().contiguous().t()
        pair.a.step()
        pair.b.step()
    assert pair.equal_in_all()
    halves = parameters(5000, dtype=torch.bfloat16)
    masters = [p.detach().float().requires_grad_() for p in halves]
    a = OffloadedOptimizer(cls, halves, nvme_path=nvme_dir, host_memory=SMALL)
    b = cls(masters)
    set_gradients(halves, seed=3)
    masters[0].grad = halves[0].grad.float()
    a.step()
    b.step()
    assert torch.equal(halves[0], split_master(masters[0])[0])
    assert torch.equal(halves[0].grad, masters[0].grad.bfloat16())


def test_a_class_sees_the_attributes_of_a_parameter(nvme_dir):
    class Scaled(Momentum):
        def rate(self, group, i, p):
            return group["lr"] * getattr(p, "scale", 1.0)

    pair = GenericPair(Scaled, parameters(9000, 10), nvme_dir)
    for p in (pair.ours[0], pair.theirs[0]):
        p.scale = 3.0
    pair.steps(2)
    assert pair.equal_in_all()


# What is refused ------------------------------------------------------------------------


class InAttribute(Momentum):
    k = 0

    def prepare(self):
        self.k += 1


class InListOfInstance(Momentum):
    def __init__(self, params):
        super().__init__(params)
        self.kept = [0]

    def prepare(self):
        self.kept[0] += 1


class InClass(Momentum):
    k = 0

    def prepare(self):
        InClass.k += 1


class InDefaults(Momentum):
    def prepare(self):
        self.defaults["k"] = self.defaults.get("k", 0) + 1


class InState(Momentum):
    def prepare(self):
        self.state["global"]["k"] = self.state["global"].get("k", 0) + 1


class InStateOfZero(Momentum):
    def prepare(self):
        self.state[0] = 1


class InParameter(Momentum):
    def rate(self, group, i, p):
        p.k = getattr(p, "k", 0) + 1
        return group["lr"] * (1 if p.k < 100 else 2)


class HasOneStateTwice(Momentum):
    """What is written to one counts for the other, which pieces do not keep so."""

    def rate(self, group, i, p):
        self.state[p].setdefault("same", self.state[p]["average"])
        return group["lr"] * self.state[p]["same"].abs()


class DrawsFromTorch(Momentum):
    def rate(self, group, i, p):
        return torch.rand(p.shape) * group["lr"]


class DrawsFromPython(Momentum):
    def rate(self, group, i, p):
        return random.random() * group["lr"]


class InClosure(Momentum):
    numbers = staticmethod(itertools.count(1).__next__)

    def rate(self, group, i, p):
        return group["lr"] / self.numbers()


class ByPlace(Momentum):
    def rate(self, group, i, p):
        return group["lr"] * 0.9**i


class ByNumber(Momentum):
    def rate(self, group, i, p):
        return group["lr"] / len(group["params"])


class BySize(Momentum):
    def rate(self, group, i, p):
        return group["lr"] if p.numel() < 10_000 else 0.0


class ByDimensions(Momentum):
    def rate(self, group, i, p):
        return group["lr"] if p.dim() < 4 else 0.0


class ByLargeNorm(Momentum):
    def rate(self, group, i, p):
        return group["lr"] if p.norm() < 5000 else 0.0


class ByLargeGradient(Momentum):
    def rate(self, group, i, p):
        return group["lr"] if p.grad.norm() < 10_000 else 0.0


class ByNone(Momentum):
    def rate(self, group, i, p):
        return group["lr"] * (1 + any(q.grad is None for q in group["params"]))


class DecaysWithoutGradient(Momentum):
    def count(self, group):
        for p in group["params"]:
            p.mul_(0.9)


class ByNames(Momentum):
    def rate(self, group, i, p):
        named = "bias" in group.get("param_names", [""] * 99)[i]
        return 0.0 if named else group["lr"]


class NormAfterTen(CountsInGroup):
    def rate(self, group, i, p):
        return group["lr"] * (p.norm() if group["step"] >= 10 else 1)


class NormInGroup(Momentum):
    def rate(self, group, i, p):
        group["norm"] = group.get("norm", 0.0) + float(p.grad.norm())
        return group["lr"]


class TakesGradients(Momentum):
    def rate(self, group, i, p):
        average = self.state[p]["average"]
        p.grad = None
        return group["lr"] * average.abs()


REFUSED = {
    InAttribute: "changes self.k in its steps",
    InListOfInstance: "changes self.kept in its steps",
    InClass: "changes InClass.k in its steps",
    InDefaults: "changes self.defaults in its steps",
    InState: "keeps state under 'global', which is no parameter",
    InStateOfZero: "keeps state under 0, which is no parameter",
    InParameter: r"changes p\.k of its parameters",
    HasOneStateTwice: "did not agree bit for bit",
    DrawsFromTorch: "draws numbers from torch's generator",
    DrawsFromPython: "draws numbers from Python's generator",
    InClosure: "is not elementwise",
    ByPlace: "a parameter did not agree bit for bit",
    ByNumber: "a parameter did not agree bit for bit",
    BySize: "a parameter did not agree bit for bit",
    ByDimensions: "a parameter did not agree bit for bit",
    ByLargeNorm: "a parameter did not agree bit for bit",
    ByLargeGradient: "a parameter did not agree bit for bit",
    ByNone: "a parameter did not agree bit for bit",
    DecaysWithoutGradient: "a parameter did not agree bit for bit",
    NormAfterTen: "in step 1[012] .* a parameter did not agree bit for bit",
    NormInGroup: r"wrote something else to group\['norm'\]",
    TakesGradients: "takes gradients away",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_a_class_that_pieces_would_be_wrong_with_is_refused_with_the_reason(nvme_dir, cls):
    with pytest.raises(ValueError, match=f"^{cls.__name__} .*{REFUSED[cls]}"):
        OffloadedOptimizer(cls, parameters(10), nvme_path=nvme_dir)


def test_a_class_that_goes_by_names_is_refused_if_there_are_names(nvme_dir):
    model = torch.nn.Linear(3, 3)
    OffloadedOptimizer(ByNames, model.parameters(), nvme_path=nvme_dir).close()
    with pytest.raises(ValueError, match="a parameter did not agree"):
        OffloadedOptimizer(ByNames, model.named_parameters(), nvme_path=nvme_dir)


def test_a_class_that_looks_into_other_groups_is_refused_if_there_are_others(nvme_dir):
    class FirstGroup(Momentum):
        def rate(self, group, i, p):
            return self.param_groups[0]["lr"]

    optimizer = OffloadedOptimizer(FirstGroup, parameters(10), nvme_path=nvme_dir)
    with pytest.raises(ValueError, match="FirstGroup is not elementwise"):
        optimizer.add_param_group({"params": parameters(3)})
    assert len(optimizer.param_groups) == 1


class KeepsGradients(Momentum):
    def zero_grad(self, set_to_none=True):
        pass


class CountsZeroGrad(Momentum):
    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self.param_groups[0]["k"] = 1


class SavesOtherwise(Momentum):
    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (KeepsGradients, r"its zero_grad\(\) does something else"),
        (CountsZeroGrad, r"after zero_grad\(\) it wrote something else to group\['k'\]"),
        (SavesOtherwise, r"has its own state_dict\(\)"),
    ],
)
def test_a_class_whose_methods_do_more_than_torchs_is_refused(nvme_dir, cls, text):
    with pytest.raises(ValueError, match=text):
        OffloadedOptimizer(cls, parameters(10), nvme_path=nvme_dir)
    plain = type(
        "Plain", (Momentum,), {"zero_grad": lambda self: super(Momentum, self).zero_grad()}
    )
    OffloadedOptimizer(plain, parameters(10), nvme_path=nvme_dir).close()


class Late(CountsInGroup):
    """Does only after the steps of a trial what it cannot do to pieces."""

    def rate(self, group, i, p):
        if group["step"] == 15:
            self.late(group, p)
        return group["lr"]


class LateInGroup(Late):
    def late(self, group, p):
        group["norm"] = float(p.grad.norm())


class LateInAttribute(Late):
    k = 0

    def late(self, group, p):
        self.k += 1


class LateInState(Late):
    def late(self, group, p):
        self.state["global"] = {"norm": p.grad.norm()}


class LateInNumber(Late):
    def rate(self, group, i, p):
        self.state[p].setdefault("norm", 0.0)
        return super().rate(group, i, p)

    def late(self, group, p):
        self.state[p]["norm"] = float(p.norm())


class LateInGradient(Late):
    def late(self, group, p):
        p.grad.mul_(0.5)


class LateInParameter(Late):
    def late(self, group, p):
        p.k = 1


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (LateInNumber, "written something else to the state 'norm'"),
        (LateInGradient, "writes to gradients"),
        (LateInParameter, r"changes p\.k of its parameters"),
        (LateInGroup, r"written something else to group\['norm'\]"),
        (LateInAttribute, "changed self.k"),
        (LateInState, "state under 'global'"),
    ],
)
def test_what_shows_after_the_trial_only_is_an_error_of_the_step(nvme_dir, cls, text):
    ours = parameters((90, 100), 10)
    optimizer = OffloadedOptimizer(cls, ours, nvme_path=nvme_dir, host_memory=SMALL)
    for seed in range(15):
        set_gradients(ours, seed=seed)
        ours[0].grad = ours[0].grad.t().contiguous().t()
        if seed < 14:
            optimizer.step()
    with pytest.raises(RuntimeError, match=text):
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 14
    with pytest.raises(RuntimeError, match="may be half updated"):
        optimizer.step()


# What a trial costs and leaves ------------------------------------------------------------


def test_a_trial_leaves_generators_warnings_and_hooks_alone(nvme_dir):
    class Talkative(Momentum):
        def prepare(self):
            warnings.warn("a word of the class", stacklevel=2)

    calls = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: calls.append(optimizer))
    numpy = pytest.importorskip("numpy")
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = parameters(9000)
        optimizer = OffloadedOptimizer(Talkative, ours, nvme_path=nvme_dir, host_memory=SMALL)
    with pytest.raises(ValueError, match="Python's generator"):
        OffloadedOptimizer(DrawsFromPython, ours, nvme_path=nvme_dir)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (numpy.random.get_state()[1] == before[2]).all()
    assert calls == []
    set_gradients(ours, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    hook.remove()
    assert calls == [optimizer]


def test_a_class_is_tried_once_for_groups_that_differ_in_what_it_writes_or_schedules_do(
    monkeypatch,
):
    from torch_ext.optim import _trial

    tried = []
    real = _trial.tried
    monkeypatch.setattr(_trial, "tried", lambda *args: tried.append(1) or real(*args))
    trials = Trials(PieceOptimizer(CountsInGroup, {}))
    trials.kept([{"params": [], "lr": 0.1}])
    for step in range(5):
        trials.kept([{"params": [], "lr": 0.1 / (step + 1), "step": step, "initial_lr": 1.0}])
    assert tried == [1]
    trials.kept([{"params": [], "lr": 0.1, "more": 1}])
    assert tried == [1, 1]
