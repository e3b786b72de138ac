"""Commits of OffloadedOptimizer. The reference is the class itself, in memory, unbroken."""

import pytest
import torch
from test_commit import bits, equal, make_model, the_same_state, train

import torch_ext
from torch_ext import OffloadedAdamW, OffloadedOptimizer

CLASSES = {
    torch.optim.SGD: {"lr": 1e-2, "momentum": 0.9},
    torch.optim.Adam: {"lr": 1e-2, "amsgrad": True},
    torch.optim.RMSprop: {"lr": 1e-3, "centered": True},
    torch.optim.Adagrad: {"lr": 1e-2},
    torch.optim.NAdam: {"lr": 1e-2},
    torch.optim.Rprop: {"lr": 1e-2},
}


class Counting(torch.optim.Optimizer):
    """Keeps numbers in its group and in its state, and a name."""

    def __init__(self, params, lr=1e-2, name="it"):
        super().__init__(params, {"lr": lr, "calls": 0, "name": name})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["calls"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["sum"] = torch.zeros_like(p)
                    state["times"] = 0
                state["times"] += 1
                state["sum"].add_(p.grad)
                p.sub_(group["lr"] * state["sum"] / (state["times"] + group["calls"]))


def run(path, kind, dtype, more, **options):
    """Trains 4 steps, is resumed, and trains 4 more. Returns the model and the state."""
    model = make_model(dtype)
    optimizer = OffloadedOptimizer(
        kind, model.named_parameters(), nvme_path=path, host_memory="1MiB", **more, **options
    )
    torch.manual_seed(1)
    train(model, optimizer, 4)
    optimizer.commit(extra=torch_ext.rng_state())
    train(model, optimizer, 1)
    optimizer.close()
    model = make_model(dtype)
    optimizer = OffloadedOptimizer.resume(
        path, kind, model.named_parameters(), host_memory="512KiB"
    )
    assert optimizer.committed_step == 4
    torch_ext.set_rng_state(optimizer.committed_extra)
    train(model, optimizer, 4)
    state = optimizer.state_dict()
    optimizer.close()
    return model, state


@pytest.mark.parametrize("kind", [*CLASSES, Counting], ids=lambda kind: kind.__name__)
def test_the_class_in_memory_gives_the_same(tmp_path, kind):
    more = CLASSES.get(kind, {"name": "another"})
    reference = make_model()
    in_memory = kind(reference.parameters(), **more)
    torch.manual_seed(1)
    train(reference, in_memory, 8)
    model, state = run(tmp_path, kind, torch.float32, more)
    assert equal(bits(model), bits(reference))
    expected = in_memory.state_dict()
    for p, q in zip(state["state"].values(), expected["state"].values(), strict=True):
        assert p.keys() == q.keys()
        for name, value in p.items():
            assert value == q[name] if not isinstance(value, torch.Tensor) else True, name
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, q[name]), name
    ours, theirs = state["param_groups"][0], expected["param_groups"][0]
    assert {k: ours[k] for k in theirs if k != "params"} == {
        k: v for k, v in theirs.items() if k != "params"
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_go_on(tmp_path, dtype):
    more = CLASSES[torch.optim.RMSprop]
    whole = make_model(dtype)
    (tmp_path / "whole").mkdir()
    with OffloadedOptimizer(
        torch.optim.RMSprop, whole.parameters(), nvme_path=tmp_path / "whole", **more
    ) as optimizer:
        torch.manual_seed(1)
        train(whole, optimizer, 8)
        expected = optimizer.state_dict()
    model, state = run(tmp_path, torch.optim.RMSprop, dtype, more)
    assert equal(bits(model), bits(whole))
    the_same_state(state, expected)


def test_modes_go_on(tmp_path):
    class Averaging(torch.optim.Optimizer):
        """Has modes, as schedule-free classes have."""

        def __init__(self, params, lr=1e-2):
            super().__init__(params, {"lr": lr, "train_mode": True})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                if not group["train_mode"]:
                    raise RuntimeError("call train() first")
                for p in group["params"]:
                    if p.grad is not None:
                        state = self.state[p]
                        if not state:
                            state["z"] = p.clone()
                        state["z"].sub_(group["lr"] * p.grad)
                        p.lerp_(state["z"], 0.5)

        @torch.no_grad()
        def _switch(self, mode):
            for group in self.param_groups:
                for p in group["params"]:
                    if group["train_mode"] != mode and "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], -0.5 if mode else 0.5)
                group["train_mode"] = mode

        def train(self):
            self._switch(True)

        def eval(self):
            self._switch(False)

    model = make_model()
    optimizer = OffloadedOptimizer(Averaging, model.parameters(), nvme_path=tmp_path)
    train(model, optimizer, 2)
    optimizer.eval()
    assert optimizer.commit().step == 2
    kept = bits(model)
    optimizer.close()
    model = make_model()
    with OffloadedOptimizer.resume(tmp_path, Averaging, model.parameters()) as optimizer:
        assert equal(bits(model), kept)
        with pytest.raises(RuntimeError, match=r"call train\(\) first"):
            train(model, optimizer, 1)
        optimizer.zero_grad()
        optimizer.train()
        train(model, optimizer, 1)
        assert optimizer.commit().step == 3


def test_what_belongs_to_another_class_is_refused(tmp_path):
    model = make_model()
    with OffloadedOptimizer(
        torch.optim.RMSprop, model.named_parameters(), nvme_path=tmp_path, lr=1e-2
    ) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
    before = bits(model)
    resume = OffloadedOptimizer.resume
    with pytest.raises(ValueError, match="with RMSprop, not with Adam"):
        resume(tmp_path, torch.optim.Adam, model.named_parameters())
    with pytest.raises(ValueError, match="of an OffloadedOptimizer, not of an OffloadedAdamW"):
        OffloadedAdamW.resume(tmp_path, model.named_parameters())
    with pytest.raises(TypeError, match="takes no 'lr': the commit has the options"):
        resume(tmp_path, torch.optim.RMSprop, model.named_parameters(), lr=1)
    with pytest.raises(TypeError, match="must be a class of optimizers"):
        resume(tmp_path, "RMSprop", model.named_parameters())
    with resume(tmp_path, torch.optim.RMSprop, model.named_parameters()) as optimizer:
        assert equal(bits(model), before)
        assert optimizer.param_groups[0]["lr"] == 1e-2


def test_a_class_that_keeps_something_else_now_is_refused(tmp_path):
    def made(name):
        class Sums(torch.optim.Optimizer):
            def __init__(self, params):
                super().__init__(params, {"lr": 0.1})

            @torch.no_grad()
            def step(self):
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            state = self.state[p]
                            state.setdefault(name, torch.zeros_like(p)).add_(p.grad)
                            p.sub_(state[name], alpha=group["lr"])

        return Sums

    model = make_model()
    with OffloadedOptimizer(made("old"), model.named_parameters(), nvme_path=tmp_path) as one:
        train(model, one, 1)
        one.commit()
    before = bits(model)
    with pytest.raises(ValueError, match=r"keeps \['new'\] .* the commit has \['old'\] of"):
        OffloadedOptimizer.resume(tmp_path, made("new"), model.named_parameters())
    assert equal(bits(model), before)


def test_an_option_that_cannot_be_kept_is_named(tmp_path):
    class Called(torch.optim.SGD):
        def __init__(self, params, how=None, **options):
            super().__init__(params, **options)

    model = make_model()
    with OffloadedOptimizer(
        Called, model.parameters(), nvme_path=tmp_path, lr=1, momentum=0.5, how=print
    ) as optimizer:
        with pytest.raises(TypeError, match=r"an option of Called\['how'\] is a builtin"):
            optimizer.commit()
        train(model, optimizer, 1)


def test_what_could_not_be_resumed_is_no_commit(tmp_path):
    model = make_model()
    with OffloadedOptimizer(
        torch.optim.Adam, model.named_parameters(), nvme_path=tmp_path
    ) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
        kept = bits(model)
        optimizer.param_groups[0]["amsgrad"] = True
        with pytest.raises(ValueError, match=r"0.weight.*but the state was made for"):
            optimizer.commit()
    with OffloadedOptimizer.resume(
        tmp_path, torch.optim.Adam, model.named_parameters()
    ) as optimizer:
        assert equal(bits(model), kept)


def test_the_state_of_any_class_moves(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    model = make_model()
    with OffloadedOptimizer(
        torch.optim.RMSprop, model.named_parameters(), nvme_path=here
    ) as optimizer:
        train(model, optimizer, 2)
        optimizer.commit()
        kept = bits(model)
        state = optimizer.state_dict()["state"]
    model = make_model()
    with OffloadedOptimizer.resume(
        here, torch.optim.RMSprop, model.named_parameters(), nvme_path=there
    ) as optimizer:
        assert equal(bits(model), kept)
        for ours, theirs in zip(
            optimizer.state_dict()["state"].values(), state.values(), strict=True
        ):
            assert equal(ours["square_avg"], theirs["square_avg"])
        optimizer.commit()
    assert len(list(there.iterdir())) == 1
