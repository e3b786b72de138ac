"""Groups, parameters and state that change between backward() and step(), with "update".

Nothing is lost. What cannot be done any more raises once, and all goes on. Torch's optimizer
gets the change after the step where ours has refused it.
"""

import pytest
import torch
from optim_support import SMALL, equal, equal_states, parameters, twins

from torch_ext import OffloadedAdamW

SIZES = [9000, 17, 4000]


class Pair:
    def __init__(self, nvme_dir, mode="update"):
        self.ours = parameters(*SIZES)
        self.theirs = twins(self.ours)
        self.a = OffloadedAdamW(
            [{"params": self.ours[:1]}, {"params": self.ours[1:]}],
            lr=1e-2,
            nvme_path=nvme_dir,
            host_memory=SMALL,
            overlap_backward=mode,
        )
        self.b = torch.optim.AdamW(
            [{"params": self.theirs[:1]}, {"params": self.theirs[1:]}], lr=1e-2, fused=True
        )

    def backward(self, seed):
        for optimizer in (self.a, self.b):
            generator = torch.Generator().manual_seed(seed)
            optimizer.zero_grad()
            params = [p for g in optimizer.param_groups for p in g["params"]]
            terms = [(p * torch.randn(p.shape, generator=generator)).sum() for p in params]
            sum(t for t in terms if t.requires_grad).backward()

    def steps(self, seeds):
        for seed in seeds:
            self.backward(seed)
            self.a.step()
            self.b.step()

    def equal(self):
        return equal(self.ours, self.theirs) and equal_states(
            self.a.state_dict(), self.b.state_dict()
        )


@pytest.fixture(params=["update", "prefetch", False])
def pair(nvme_dir, request):
    pair = Pair(nvme_dir, request.param)
    yield pair
    pair.a.close()


@pytest.fixture
def update(nvme_dir):
    pair = Pair(nvme_dir)
    yield pair
    pair.a.close()


def _pop(optimizer, params):
    optimizer.param_groups.pop(1)


def _take_out(optimizer, params):
    optimizer.param_groups[1]["params"].remove(params[1])


def _swap(optimizer, params):
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(9000))


@pytest.mark.parametrize("change", [_pop, _take_out, _swap])
@pytest.mark.parametrize("first", [0, 2])
def test_a_parameter_taken_out_is_updated_once_more_which_is_told_once(update, change, first):
    update.steps(range(first))
    update.backward(first)
    change(update.a, update.ours)
    with pytest.raises(RuntimeError, match="taken out of param_groups.*change groups after"):
        update.a.step()
    update.b.step()
    change(update.b, update.theirs)
    assert equal(update.ours, update.theirs)
    update.a.step()  # No gradient: nothing happens.
    update.a.zero_grad()
    update.steps(range(3, 6))
    assert equal(update.ours, update.theirs)
    gone = [p for p in update.ours if p in update.a.state]
    assert len(gone) == 3  # State is the parameter's.
    back = [p for p in update.ours if all(p is not q for q in _all(update.a))]
    update.a.add_param_group({"params": back})
    other = [p for p in update.theirs if all(p is not q for q in _all(update.b))]
    update.b.add_param_group({"params": other})
    update.steps(range(6, 8))
    assert equal(_all(update.a), _all(update.b))


def _all(optimizer):
    return [p for g in optimizer.param_groups for p in g["params"]]


def _clear(state, p):
    state.clear()


def _delete(state, p):
    del state[p]


def _empty(state, p):
    state[p] = {}


def _assign(state, p):
    state[p]["exp_avg"] = torch.zeros_like(p)


def _step_number(state, p):
    state[p]["step"] = 0


def _read(state, p):
    state[p]["exp_avg"]


def _delete_a_name(state, p):
    del state[p]["exp_avg"]


@pytest.mark.parametrize(
    "change", [_clear, _delete, _empty, _assign, _step_number, _read, _delete_a_name]
)
@pytest.mark.parametrize("first", [0, 2])
def test_state_is_left_alone_until_the_step_has_ended(update, change, first):
    update.steps(range(first))
    update.backward(first)
    with pytest.raises(RuntimeError, match=r"between backward\(\) and step\(\).*Call step"):
        change(update.a.state, update.ours[0])
    update.a.step()
    update.b.step()
    assert update.equal()
    update.steps(range(3, 5))
    assert update.equal()


def test_freezing_changes_nothing_of_the_step_that_has_begun(pair):
    pair.steps(range(2))
    pair.backward(2)
    for optimizer, params in ((pair.a, pair.ours), (pair.b, pair.theirs)):
        params[1].requires_grad_(False)
        optimizer.step()
    pair.steps(range(3, 5))
    for params in (pair.ours, pair.theirs):
        params[1].requires_grad_(True)
    pair.steps(range(5, 7))
    assert pair.equal()


def test_groups_that_change_and_keep_what_the_step_uses_may_change_at_any_time(pair):
    pair.steps(range(2))
    pair.backward(2)
    for optimizer, others in ((pair.a, parameters(50)), (pair.b, parameters(50))):
        group = optimizer.param_groups.pop(0)
        optimizer.add_param_group({"params": group["params"]})
        optimizer.add_param_group({"params": others, "lr": 1e-3})
        optimizer.step()
    pair.steps(range(3, 6))
    assert equal(_all(pair.a), _all(pair.b))
    assert equal_states(pair.a.state_dict(), pair.b.state_dict())


def test_options_that_cannot_be_used_are_told_once_and_the_step_is_whole(update):
    update.steps(range(2))
    update.backward(2)
    update.a.param_groups[0]["lr"] = -1.0
    with pytest.raises(RuntimeError, match=r"options of param_groups\[0\] were changed"):
        update.a.step()
    update.b.step()
    update.a.param_groups[0]["lr"] = 1e-2
    update.steps(range(3, 5))
    assert update.equal()


def test_what_was_assigned_before_backward_counts_in_the_step_that_it_begins(pair):
    pair.steps(range(2))
    for optimizer, params in ((pair.a, pair.ours), (pair.b, pair.theirs)):
        optimizer.state[params[0]]["exp_avg"].mul_(0.5)
        optimizer.state[params[2]]["exp_avg_sq"] = torch.ones(4000)
    pair.steps(range(2, 4))
    assert pair.equal()


def test_a_tensor_of_a_state_that_is_written_to_after_backward_is_told_once(update):
    update.steps(range(2))
    read = update.a.state[update.ours[0]]["exp_avg"]
    update.backward(2)
    read.zero_()
    update.a.step()
    update.b.step()
    with pytest.raises(RuntimeError, match="written to after"):
        update.a.state_dict()
    assert update.equal()


def test_a_parameter_in_no_group_keeps_its_gradient(pair):
    pair.steps(range(2))
    pair.a.zero_grad()
    pair.b.zero_grad()
    groups = [o.param_groups.pop(1) for o in (pair.a, pair.b)]
    for params in (pair.ours, pair.theirs):
        (params[1] * 3).sum().backward()
        assert torch.equal(params[1].grad, torch.full((17,), 3.0))
        assert params[1].sum().isfinite()  # Nor does anything keep it from being used.
    for optimizer, group in zip((pair.a, pair.b), groups, strict=True):
        optimizer.add_param_group(group)
        optimizer.step()
    pair.steps(range(2, 4))
    assert pair.equal()
