"""rollback() goes back to a commit that is kept, and training goes on from there.

The reference is a training in memory, or the same one without the steps that were taken back.
"""

import pytest
import torch
from test_commit import bits, equal, make_model, options, the_same_state, train

import torch_ext
from torch_ext import OffloadedAdamW, OffloadedOptimizer


def commit(optimizer, step, keep=9):
    return optimizer.commit(step, extra=torch_ext.rng_state(), keep=keep)


def made(kind, model, path, **more):
    if kind == "AdamW":
        return OffloadedAdamW(model.named_parameters(), **options(path, **more))
    return OffloadedOptimizer(
        torch.optim.AdamW, model.named_parameters(), **options(path, **more)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["AdamW", "Optimizer"])
@pytest.mark.parametrize("host_memory", ["240KiB", "64MiB"])
def test_each_commit_can_be_gone_back_to(tmp_path, kind, dtype, host_memory):
    model = make_model(dtype)
    with made(kind, model, tmp_path, host_memory=host_memory) as optimizer:
        torch.manual_seed(1)
        kept = {}
        for step in (2, 4, 6):
            train(model, optimizer, 2)
            commit(optimizer, step)
            kept[step] = (bits(model), optimizer.state_dict())
        assert [c.step for c in optimizer.commits()] == [2, 4, 6]
        assert [c.generation for c in optimizer.commits()] == [1, 2, 3]
        train(model, optimizer, 1)
        for step in (6, 2, 4):
            optimizer.rollback(step)
            assert optimizer.committed_step == step
            assert equal(bits(model), kept[step][0])
            the_same_state(optimizer.state_dict(), kept[step][1])
            torch_ext.set_rng_state(optimizer.committed_extra)
            while step < 6:
                train(model, optimizer, 2)
                step += 2
                assert equal(bits(model), kept[step][0])
            train(model, optimizer, 1)
        optimizer.rollback()
        assert optimizer.committed_step == 6


@pytest.mark.parametrize("kind", ["AdamW", "Optimizer"])
def test_a_resume_picks_a_commit(tmp_path, kind):
    model = make_model()
    kept = {}
    with made(kind, model, tmp_path) as optimizer:
        for step in (10, 20, 30):
            train(model, optimizer, 1)
            commit(optimizer, step, keep=2)
            kept[step] = bits(model)

    def resume(**more):
        other = make_model()
        if kind == "AdamW":
            optimizer = OffloadedAdamW.resume(tmp_path, other.named_parameters(), **more)
        else:
            optimizer = OffloadedOptimizer.resume(
                tmp_path, torch.optim.AdamW, other.named_parameters(), **more
            )
        return other, optimizer

    with pytest.raises(
        ValueError, match="no commit of step 10; the steps of those kept are 20, 30"
    ):
        resume(step=10)
    other, optimizer = resume(step=20)
    with optimizer:
        assert equal(bits(other), kept[20])
        assert [c.step for c in optimizer.commits()] == [20, 30]
        optimizer.rollback(30)
        assert equal(bits(other), kept[30])
        optimizer.rollback(20)
        train(other, optimizer, 1)
        assert optimizer.commit(keep=3).step == 21
        assert [c.step for c in optimizer.commits()] == [20, 30, 21]
    other, optimizer = resume()
    optimizer.close()
    assert optimizer.committed_step == 21


def test_options_of_groups_come_back_too(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.named_parameters(), **options(tmp_path)) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
        optimizer.param_groups[0]["lr"] = 7.0
        optimizer.param_groups[0]["mine"] = "later"
        optimizer.state[model[0].weight]["note"] = 3
        optimizer.rollback()
        group = optimizer.param_groups[0]
        assert group["lr"] == 1e-2
        assert "mine" not in group
        assert "note" not in optimizer.state[model[0].weight]
        assert group["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_what_cannot_be_gone_back_to_changes_nothing(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.named_parameters(), **options(tmp_path)) as optimizer:
        with pytest.raises(RuntimeError, match="nothing was committed"):
            optimizer.rollback()
        train(model, optimizer, 1)
        optimizer.commit(1)
        train(model, optimizer, 1)
        before, state = bits(model), optimizer.state_dict()
        with pytest.raises(ValueError, match="no commit of step 5; .* are 1"):
            optimizer.rollback(5)
        with pytest.raises(TypeError, match="step must be a whole number"):
            optimizer.rollback("1")
        more = torch.nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [("more", more)]})
        with pytest.raises(ValueError, match="more is not in the commit"):
            optimizer.rollback(1)
        del optimizer.param_groups[1]
        optimizer.commit(2, include_parameters=False)
        with pytest.raises(ValueError, match="the commit of step 2 has no parameters"):
            optimizer.rollback()
        assert equal(bits(model), before)
        the_same_state(optimizer.state_dict(), state)


def test_other_parameters_with_the_numbers_of_old_ones_are_not_mixed_up(tmp_path):
    """A number that was given again belongs to another parameter at the commit."""
    a, b, c = (torch.nn.Parameter(torch.full((500,), float(i))) for i in range(3))
    with OffloadedAdamW([("a", a), ("b", b)], **options(tmp_path)) as optimizer:
        for p in (a, b):
            p.grad = torch.ones(500)
        optimizer.step()
        optimizer.commit(1)
        values, state = [a.detach().clone(), b.detach().clone()], optimizer.state_dict()
        # b leaves with its number, c gets it, and b comes back with another.
        optimizer.param_groups[0]["params"] = [a]
        del optimizer.state[b]
        optimizer.param_groups[0]["params"] = [c, a]
        c.grad = torch.full((500,), 3.0)
        optimizer.step()
        del optimizer.state[c]
        optimizer.param_groups[0]["params"] = [a, b]
        optimizer.param_groups[0]["param_names"] = ["a", "b"]
        optimizer.step()
        optimizer.rollback()
        assert equal([a.detach(), b.detach()], values)
        the_same_state(optimizer.state_dict(), state)


def test_between_backward_and_step_the_step_is_given_up(tmp_path):
    model = make_model()
    more = {"overlap_backward": "update"}
    with OffloadedAdamW(model.named_parameters(), **options(tmp_path, **more)) as optimizer:
        torch.manual_seed(1)
        train(model, optimizer, 2)
        commit(optimizer, 2)
        kept, state = bits(model), optimizer.state_dict()
        model(torch.randn(4, 64)).sum().backward()
        optimizer.rollback()
        optimizer.zero_grad()
        assert equal(bits(model), kept)
        the_same_state(optimizer.state_dict(), state)
        torch_ext.set_rng_state(optimizer.committed_extra)
        train(model, optimizer, 3)
        after = bits(model)
    with OffloadedAdamW.resume(tmp_path, model.named_parameters()) as optimizer:
        torch_ext.set_rng_state(optimizer.committed_extra)
        train(model, optimizer, 3)
        assert equal(bits(model), after)


def test_a_graph_sees_that_parameters_have_changed(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.named_parameters(), **options(tmp_path)) as optimizer:
        optimizer.commit()
        loss = model(torch.randn(4, 64)).sum()
        optimizer.rollback()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_number_that_comes_next_is_the_commits(tmp_path):
    """Rounding depends on a parameter's number: a late one rounds as without the break."""

    def late(optimizer):
        torch.manual_seed(5)
        p = torch.nn.Parameter(torch.randn(5000))
        optimizer.add_param_group({"params": [("late", p)]})
        for _ in range(3):
            p.grad = p.detach().sin()
            optimizer.step()
        return p.detach()

    def start(path):
        model = make_model()
        optimizer = OffloadedAdamW(
            model.named_parameters(), **options(path, state_format="int8")
        )
        gone = torch.nn.Parameter(torch.ones(300))
        optimizer.add_param_group({"params": [("gone", gone)]})
        del optimizer.param_groups[1]
        train(model, optimizer, 1)
        optimizer._let_go()  # Its number can be given again.
        return model, optimizer

    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    _, optimizer = start(first)
    with optimizer:
        expected = late(optimizer)
    model, optimizer = start(second)
    with optimizer:
        optimizer.commit()
        late(optimizer)
        del optimizer.param_groups[1]
        optimizer.rollback()
        assert torch.equal(late(optimizer), expected)
    with OffloadedAdamW.resume(second, model.named_parameters()) as optimizer:
        assert torch.equal(late(optimizer), expected)
