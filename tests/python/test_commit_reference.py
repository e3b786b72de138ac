"""A state_dict() that refers to a commit: what a trainer saves and loads in its own way.

The reference is torch.optim.AdamW in memory, with ordinary checkpoints at the same steps, or
the same training without a break.
"""

import copy
import io
import json
import logging
import os
import pickle
import shutil

import pytest
import torch
from optim_support import HalfReference
from ranks import Ranks
from test_commit import bits, equal, make_model, options, the_same_state, train
from torch.distributed.fsdp import fully_shard

from torch_ext import OffloadedAdamW, OffloadedOptimizer

KEY = "torch_ext_commit"


def made(path, model, kind="AdamW", **more):
    more = {"state_dict_mode": "commit"} | more
    if kind == "AdamW":
        return OffloadedAdamW(model.named_parameters(), **options(path, **more))
    return OffloadedOptimizer(
        getattr(torch.optim, kind), model.named_parameters(), **options(path, **more)
    )


def saved(model, optimizer):
    """A checkpoint as a trainer makes it: bytes."""
    file = io.BytesIO()
    everything = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(everything, file)
    return file.getvalue()


def loaded(checkpoint, model, optimizer):
    """Loads it, as a trainer does, the model first."""
    everything = torch.load(io.BytesIO(checkpoint), weights_only=True)
    model.load_state_dict(everything["model"])
    optimizer.load_state_dict(everything["optimizer"])
    torch.set_rng_state(everything["rng"])


def other_model(dtype=torch.float32):
    """The same model with other values: only a checkpoint makes them equal."""
    model = make_model(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    return model


def size_of(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return len(file.getvalue())


def tensors_of(optimizer, path):
    """The state as tensors, by another optimizer that has no part in the mode."""
    reference = optimizer.state_dict()
    model = make_model(next(iter(optimizer.param_groups[0]["params"])).dtype)
    with torch.no_grad():
        for p, q in zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True):
            p.copy_(q)
    optimizer.close()
    with OffloadedAdamW(model.named_parameters(), **options(path)) as reader:
        reader.load_state_dict(reference)
        return reader.state_dict()


OF_ADAMW = [
    ("AdamW", more, dtype, host_memory)
    for more in ({}, {"state_format": "int8", "seed": 3}, {"overlap_backward": "update"})
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for host_memory in ("240KiB", "64MiB")
]


@pytest.mark.parametrize(
    ("kind", "more", "dtype", "host_memory"),
    [
        *OF_ADAMW,
        ("RMSprop", {"momentum": 0.9}, torch.float32, "240KiB"),
        ("RMSprop", {"momentum": 0.9}, torch.bfloat16, "64MiB"),
    ],
)
def test_a_training_goes_on_bit_for_bit(tmp_path, kind, more, dtype, host_memory):
    more = more | {"host_memory": host_memory}
    whole = make_model(dtype)
    with made(tmp_path, whole, kind, **more) as optimizer:
        torch.manual_seed(1)
        train(whole, optimizer, 9)

    model = make_model(dtype)
    torch.manual_seed(1)
    optimizer = made(tmp_path, model, kind, **more)
    for _ in range(3):
        train(model, optimizer, 3)
        checkpoint = saved(model, optimizer)
        train(model, optimizer, 1)  # Lost.
        optimizer.close()
        model = other_model(dtype)
        optimizer = made(tmp_path, model, kind, **more)
        loaded(checkpoint, model, optimizer)
    with optimizer:
        assert equal(bits(model), bits(whole))
        assert optimizer.committed_step == 9
    assert os.listdir(tmp_path) == ["state.r0-of-1.e0.d0.store"]


def test_the_losses_and_the_state_are_those_of_adamw_in_memory(tmp_path):
    def run(make):
        model = make_model()
        optimizer = make(model)
        torch.manual_seed(1)
        for _ in range(3):
            train(model, optimizer, 2)
            checkpoint = saved(model, optimizer)
            if isinstance(optimizer, OffloadedAdamW):
                optimizer.close()
            model = other_model()
            optimizer = make(model)
            loaded(checkpoint, model, optimizer)
        return model, optimizer

    expected, reference = run(
        lambda m: torch.optim.AdamW(m.named_parameters(), lr=1e-2, fused=True)
    )
    model, optimizer = run(lambda m: made(tmp_path, m))
    assert equal(bits(model), bits(expected))
    the_same_state(tensors_of(optimizer, tmp_path), reference.state_dict())


def test_low_halves_meet_the_parameters_that_were_loaded(tmp_path):
    """A 16-bit parameter and what the drive has of its master are one number."""
    torch.manual_seed(0)
    values = torch.randn(300).bfloat16()
    gradients = [torch.randn(300).bfloat16() for _ in range(4)]
    expected = HalfReference([values.clone()], lr=1e-2)
    p = values.clone().requires_grad_()
    optimizer = OffloadedAdamW([p], **options(tmp_path, state_dict_mode="commit"))
    for gradient in gradients[:2]:
        expected.step([gradient])
        p.grad = gradient.clone()
        optimizer.step()
    checkpoint = optimizer.state_dict(), p.detach().clone()
    p.grad = gradients[0].clone()
    optimizer.step()
    optimizer.close()
    p = torch.zeros(300, dtype=torch.bfloat16, requires_grad=True)
    with OffloadedAdamW([p], **options(tmp_path, state_dict_mode="commit")) as optimizer:
        with torch.no_grad():
            p.copy_(checkpoint[1])
        optimizer.load_state_dict(checkpoint[0])
        for gradient in gradients[2:]:
            expected.step([gradient])
            p.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(p.detach(), expected.halves[0])


def test_a_checkpoint_takes_a_kilobyte_whatever_the_model(tmp_path):
    model = make_model()
    with made(tmp_path, model) as optimizer:
        train(model, optimizer, 1)
        state_dict = optimizer.state_dict()
        assert size_of(state_dict) < 3000
        assert state_dict.keys() == {"state", "param_groups", KEY}
        assert state_dict["state"] == {}
        json.dumps(state_dict)  # Plain values.
    many = [
        (f"model.layers.{i}.mlp.experts.0.gate_proj.weight", torch.ones(1, requires_grad=True))
        for i in range(5000)
    ]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with OffloadedAdamW(many, **options(tmp_path, state_dict_mode="commit")) as optimizer:
        for _, p in many:
            p.grad = torch.ones(1)
        optimizer.step()
        assert size_of(optimizer.state_dict()) < 64 << 10


def test_the_generation_that_is_meant_comes_back_and_no_other(tmp_path):
    model = make_model()
    checkpoints, states = [], []
    with made(tmp_path, model, keep_commits=3) as optimizer:
        for _ in range(3):
            train(model, optimizer, 1)
            checkpoints.append(saved(model, optimizer))
        # In this process it is a rollback.
        for i in (1, 0, 2):
            loaded(checkpoints[i], model, optimizer)
            assert optimizer.committed_step == i + 1
            train(model, optimizer, 1)
            states.append(bits(model))
    for i, state in zip((1, 0, 2), states, strict=True):
        model = other_model()
        with made(tmp_path, model, keep_commits=3) as optimizer:
            loaded(checkpoints[i], model, optimizer)
            assert optimizer.committed_step == i + 1
            train(model, optimizer, 1)
            assert equal(bits(model), state)
    assert not equal(states[0], states[1])


def test_a_commit_that_is_gone_is_named_with_those_that_are_there(tmp_path):
    model = make_model()
    with made(tmp_path, model) as optimizer:
        checkpoints = []
        for _ in range(3):
            train(model, optimizer, 1)
            checkpoints.append(saved(model, optimizer))
        before = bits(model)
        text = r"generation 1 \(step 1\) of .*store, which is gone; there are 2 \(step 2\), 3"
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(
                torch.load(io.BytesIO(checkpoints[0]), weights_only=True)["optimizer"]
            )
        assert equal(bits(model), before)
        train(model, optimizer, 1)
    model = other_model()
    with made(tmp_path, model) as optimizer:
        with pytest.raises(ValueError, match=text):
            loaded(checkpoints[0], model, optimizer)
        loaded(checkpoints[1], model, optimizer)  # Nothing stands in the way of this.
        assert optimizer.committed_step == 2


def test_a_commit_stays_however_often_the_next_checkpoint_is_cut_off(tmp_path):
    """A disk that is full of models, for example, cuts off each attempt to save one."""
    model = make_model()
    with made(tmp_path, model, keep_commits=2) as optimizer:
        torch.manual_seed(1)
        train(model, optimizer, 2)
        checkpoint = saved(model, optimizer)
        train(model, optimizer, 2)
        expected = bits(model)
    size = None
    for _ in range(6):
        model = other_model()
        with made(tmp_path, model, keep_commits=2) as optimizer:
            loaded(checkpoint, model, optimizer)
            train(model, optimizer, 2)
            assert equal(bits(model), expected)
            optimizer.state_dict()  # The folder for it never becomes complete.
        now = sum(os.stat(tmp_path / name).st_blocks for name in os.listdir(tmp_path))
        size = size or now
        assert now <= 1.2 * size


def test_commits_of_the_callers_own_do_not_push_it_out_early(tmp_path):
    model = make_model()
    with made(tmp_path, model, keep_commits=3) as optimizer:
        train(model, optimizer, 1)
        checkpoint = saved(model, optimizer)
        for _ in range(2):
            train(model, optimizer, 1)
            optimizer.commit()  # With keep=1.
        assert [c.generation for c in optimizer.commits()] == [1, 2, 3]
    model = other_model()
    with made(tmp_path, model) as optimizer:
        loaded(checkpoint, model, optimizer)
        assert optimizer.committed_step == 1


@pytest.mark.parametrize("host_memory", ["240KiB", "64MiB"])
def test_what_has_not_changed_is_not_committed_again(tmp_path, host_memory):
    """A trainer may save several checkpoints of one step."""
    model = make_model()
    with made(tmp_path, model, host_memory=host_memory) as optimizer:

        def generation():
            return optimizer.state_dict()[KEY]["generation"]

        train(model, optimizer, 1)
        checkpoint = saved(model, optimizer)
        assert [generation(), generation()] == [1, 1]
        optimizer.param_groups[0]["lr"] = 0.5
        assert [generation(), generation()] == [2, 2]
        first = optimizer.state[model[0].weight]
        first["exp_avg"] = torch.full_like(first["exp_avg"], 0.25)
        assert [generation(), generation()] == [3, 3]
        train(model, optimizer, 1)
        assert [generation(), generation()] == [4, 4]
        optimizer.state["others"] = torch.ones(1000)  # Which is not compared.
        assert [generation(), generation()] == [5, 6]
        del optimizer.state["others"]
        assert generation() == 7
        state_dict = optimizer.state_dict()
        train(model, optimizer, 1)
        assert generation() == 8
        # It counts as the newest when it is loaded, and when it is referred to again.
        optimizer.load_state_dict(state_dict)
        assert [generation(), generation()] == [7, 7]
        assert [c.generation for c in optimizer.commits()] == [7, 8]
        train(model, optimizer, 1)
        assert generation() == 9
        assert [c.generation for c in optimizer.commits()] == [7, 9]
    assert torch.load(io.BytesIO(checkpoint), weights_only=True)["optimizer"][KEY]["step"] == 1


def test_a_store_may_move(tmp_path, caplog):
    old, new, empty = (tmp_path / name for name in ("old", "new", "empty"))
    for path in (old, new, empty):
        path.mkdir()
    model = make_model()
    with made(old, model) as optimizer:
        train(model, optimizer, 1)
        checkpoint = saved(model, optimizer)
        torch.manual_seed(1)
        train(model, optimizer, 1)
        expected = bits(model)

    def go_on(path):
        model = other_model()
        with made(path, model) as optimizer:
            loaded(checkpoint, model, optimizer)
            torch.manual_seed(1)
            train(model, optimizer, 1)
            assert equal(bits(model), expected)
            return optimizer.state_dict()[KEY]

    (name,) = os.listdir(old)
    with caplog.at_level(logging.WARNING, "torch_ext"):
        there = go_on(empty)
    assert f"refers to {old / name}, and {empty / name} is not there" in caplog.text
    assert there["directories"] == [[str(old), 1]]
    assert os.listdir(empty) == []

    caplog.clear()
    shutil.move(old / name, new)
    with caplog.at_level(logging.WARNING, "torch_ext"):
        there = go_on(new)
    assert there["directories"] == [[str(new), 1]]
    assert "is not there" not in caplog.text

    model = other_model()
    with made(empty, model) as optimizer:
        with pytest.raises(FileNotFoundError, match="neither there nor where it was") as caught:
            loaded(checkpoint, model, optimizer)
        assert caught.value.filename == str(empty / name)
        train(model, optimizer, 1)


def test_a_relative_directory_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model()
    with made(".", model) as optimizer:
        train(model, optimizer, 1)
        monkeypatch.chdir("/")
        checkpoint = saved(model, optimizer)
    model = other_model()
    monkeypatch.chdir(tmp_path)
    with made(".", model) as optimizer:
        monkeypatch.chdir("/")
        loaded(checkpoint, model, optimizer)
        assert optimizer.committed_step == 1
        assert optimizer.state_dict()[KEY]["directories"] == [[str(tmp_path), 1]]


def test_several_drives_with_weights(tmp_path):
    drives = {tmp_path / "a": 2, tmp_path / "b": 1}
    for path in drives:
        path.mkdir()
    model = make_model()
    with made(drives, model) as optimizer:
        train(model, optimizer, 1)
        checkpoint = saved(model, optimizer)
    model = other_model()
    with made(tmp_path, model) as optimizer:  # By what the checkpoint says.
        loaded(checkpoint, model, optimizer)
        assert optimizer.committed_step == 1
        assert optimizer.state_dict()[KEY]["directories"] == [
            [str(p), w] for p, w in drives.items()
        ]


def test_a_checkpoint_of_another_run_names_both(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    checkpoints = []
    for path in paths:
        path.mkdir()
        model = make_model()
        with made(path, model) as optimizer:
            train(model, optimizer, 1)
            checkpoints.append(saved(model, optimizer))
    ids = [
        torch.load(io.BytesIO(c), weights_only=True)["optimizer"][KEY]["store"]
        for c in checkpoints
    ]
    text = (
        f"refers to the store {ids[0]}, which was {paths[0]}.*{paths[1]}.* is another one, "
        f"{ids[1]}"
    )
    model = other_model()
    with made(paths[1], model) as optimizer:
        with pytest.raises(ValueError, match=text):
            loaded(checkpoints[0], model, optimizer)
        loaded(checkpoints[1], model, optimizer)
        with pytest.raises(ValueError, match=text):  # It owns the other one now.
            loaded(checkpoints[0], model, optimizer)
        train(model, optimizer, 1)
        optimizer.state_dict()


def test_before_the_first_step_it_is_the_groups_alone(tmp_path):
    """accelerate's wrapper asks for the state, moves it to a device and loads it."""
    model = make_model()
    with made(tmp_path, model) as optimizer:
        state_dict = optimizer.state_dict()
        assert state_dict.keys() == {"state", "param_groups"}
        expected = torch.optim.AdamW(model.named_parameters(), lr=1e-2, fused=True).state_dict()
        assert state_dict == expected
        optimizer.load_state_dict(state_dict)
        assert os.listdir(tmp_path) == []
        optimizer.state["others"] = 3
        assert optimizer.state_dict()["state"] == {"others": 3}


def test_what_cannot_work_is_refused_at_construction(tmp_path):
    model = make_model()
    for kind in ("AdamW", "RMSprop"):
        for more, kind_of_error, text in [
            ({"verify": False}, ValueError, "needs checksums"),
            ({"keep_commits": 0}, ValueError, "keep_commits must be from 1"),
            ({"keep_commits": 1.0}, TypeError, "keep_commits must be an int, not float"),
            ({"keep_commits": True}, TypeError, "keep_commits must be an int, not bool"),
            ({"state_dict_mode": "commits"}, ValueError, '"tensors", "mapped" or "commit"'),
            (
                {"state_dict_mode": "tensors", "keep_commits": 1},
                ValueError,
                'keep_commits is for state_dict_mode="commit"',
            ),
        ]:
            with pytest.raises(kind_of_error, match=text):
                made(tmp_path, model, kind, **more)
    assert os.listdir(tmp_path) == []


def test_a_run_that_could_not_be_saved_ends_before_it_begins(tmp_path):
    model = make_model()
    with made(tmp_path, model) as optimizer:
        train(model, optimizer, 1)
        optimizer.state_dict()
    (name,) = os.listdir(tmp_path)
    model = make_model()
    before = bits(model)
    with made(tmp_path, model) as optimizer:
        optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(FileExistsError, match="another run has committed there") as caught:
            train(model, optimizer, 1)
        assert caught.value.filename == str(tmp_path / name)
        assert equal(bits(model), before)
        os.remove(tmp_path / name)
        optimizer.zero_grad()
        train(model, optimizer, 1)
        optimizer.state_dict()


def test_who_owns_the_store_keeps_it(tmp_path):
    model = make_model()
    with made(tmp_path, model) as owner:
        train(model, owner, 1)
        checkpoint = saved(model, owner)
        other = other_model()
        with (
            made(tmp_path, other) as optimizer,
            pytest.raises(BlockingIOError, match="this one, on"),
        ):
            loaded(checkpoint, other, optimizer)
        train(model, owner, 1)
        owner.state_dict()


def broken(state_dict, **changes):
    return state_dict | {KEY: state_dict[KEY] | changes}


def test_what_does_not_fit_changes_nothing(tmp_path):
    model = make_model()
    with made(tmp_path, model) as optimizer:
        train(model, optimizer, 1)
        state_dict = optimizer.state_dict()
    smaller = torch.nn.Sequential(
        torch.nn.Linear(64, 299), torch.nn.Tanh(), torch.nn.Linear(299, 33)
    )
    smaller[2].bias.requires_grad_(False)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for made_so, text in [
        (lambda: made(scratch, smaller), "parameters are not those of the commit"),
        (lambda: made(scratch, make_model(torch.bfloat16)), "float32 there and bfloat16 here"),
        (lambda: made(scratch, make_model(), "RMSprop"), "is of an OffloadedAdamW"),
        (lambda: made(scratch, make_model(), state_format="int8"), "state_format='exact'"),
        (lambda: made(scratch, make_model(), seed=5), "seed=0, this optimizer 5"),
    ]:
        with made_so() as optimizer:
            # The state of a run of its own must be there afterwards.
            parameters = optimizer.param_groups[0]["params"]
            for p in parameters:
                p.grad = torch.ones_like(p) if p.requires_grad else None
            optimizer.step()
            names = [n for n in optimizer.state[parameters[0]] if n != "step"]
            before = [optimizer.state[parameters[0]][n].clone() for n in names]
            with pytest.raises(ValueError, match=text):
                optimizer.load_state_dict(state_dict)
            assert equal([optimizer.state[parameters[0]][n] for n in names], before)
            optimizer.step()
        assert os.listdir(scratch) == []
    model = make_model()
    with made(scratch, model) as optimizer:
        for changes, text in [
            ({"version": 2}, "has version 2; this torch_ext reads version 1"),
            ({"store": 3}, "is damaged"),
            ({"generation": -1}, "is damaged"),
            ({"generation": True}, "is damaged"),
            ({"step": "1"}, "is damaged"),
            ({"directories": []}, "is damaged"),
            ({"directories": [["/a\0b", 1]]}, "is damaged"),
            ({"directories": [["/a", 0]]}, "is damaged"),
            ({"directories": 7}, "is damaged"),
            ({"rank": 1}, "is of rank 1. Rank 0 alone has the commit"),
        ]:
            with pytest.raises(ValueError, match=text):
                optimizer.load_state_dict(broken(state_dict, **changes))
        with pytest.raises(ValueError, match="is no dict"):
            optimizer.load_state_dict(state_dict | {KEY: "1"})
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict(state_dict | {"param_groups": []})
        own = {"exp_avg": torch.zeros(300, 64)}
        with pytest.raises(ValueError, match=r"has the state \['exp_avg'\] of parameter 0"):
            optimizer.load_state_dict(state_dict | {"state": {0: own}})
        optimizer.load_state_dict(state_dict)
        assert optimizer.committed_step == 1


def test_nothing_that_others_keep_is_dropped(tmp_path):
    model = make_model()
    with OffloadedAdamW(
        model.named_parameters(),
        **options(tmp_path, state_dict_mode="commit", lr=torch.tensor(0.02)),
    ) as optimizer:
        optimizer.param_groups[0]["initial_lr"] = 0.5
        optimizer.param_groups[0]["mine"] = ("a", 1)
        train(model, optimizer, 1)
        slow = torch.arange(300.0 * 64).view(300, 64)
        optimizer.state[model[0].weight]["slow_buffer"] = slow
        optimizer.state["counts"] = {"k": 5}
        optimizer.register_state_dict_post_hook(lambda _, d: d | {"hooked": 1})
        state_dict = optimizer.state_dict()
        assert state_dict["hooked"] == 1
        assert size_of(state_dict) < 4000
        optimizer.param_groups[0]["lr"].fill_(9.0)
    assert state_dict["param_groups"][0]["lr"] == 0.02
    model = other_model()
    with made(tmp_path, model) as optimizer:
        optimizer.load_state_dict(state_dict)
        group = optimizer.param_groups[0]
        assert isinstance(group["lr"], torch.Tensor)
        assert float(group["lr"]) == pytest.approx(0.02)
        assert (group["initial_lr"], group["mine"]) == (0.5, ("a", 1))
        assert group["param_names"] == [n for n, _ in model.named_parameters()]
        assert torch.equal(optimizer.state[model[0].weight]["slow_buffer"], slow)
        assert optimizer.state["counts"] == {"k": 5}
        # What somebody has changed in the dict counts, as with torch.optim.
        state_dict["param_groups"][0] |= {"lr": 0.25, "weight_decay": 0.75}
        state_dict["state"] = {1: {"more": 2}, "others": 3}
        optimizer.load_state_dict(state_dict)
        assert optimizer.param_groups[0]["lr"] == 0.25
        assert optimizer.param_groups[0]["weight_decay"] == 0.75
        assert optimizer.state[model[0].bias]["more"] == 2
        assert (optimizer.state["others"], optimizer.state["counts"]) == (3, {"k": 5})
        optimizer.param_groups[0]["odd"] = object()
        train(model, optimizer, 1)
        with pytest.raises(TypeError, match=r"param_groups\[0\]\['odd'\] is a object"):
            optimizer.state_dict()


def test_a_scheduler_goes_on(tmp_path):
    def run(path, broken_off):
        model = make_model()

        def start():
            optimizer = made(path, model)
            return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 8)

        torch.manual_seed(1)
        optimizer, scheduler = start()
        train(model, optimizer, 4, scheduler)
        if broken_off:
            checkpoint, plan = saved(model, optimizer), scheduler.state_dict()
            optimizer.close()
            optimizer, scheduler = start()
            loaded(checkpoint, model, optimizer)
            scheduler.load_state_dict(plan)
        train(model, optimizer, 3, scheduler)
        optimizer.close()
        return bits(model)

    whole = run(tmp_path, False)
    assert equal(run(tmp_path, True), whole)


def test_the_dict_can_be_copied(tmp_path):
    model = make_model()
    with made(tmp_path, model) as optimizer:
        train(model, optimizer, 1)
        state_dict = optimizer.state_dict()
        for other in (copy.deepcopy(state_dict), pickle.loads(pickle.dumps(state_dict))):
            assert other == state_dict
            optimizer.load_state_dict(other)
            assert optimizer.committed_step == 1


def test_ordinary_state_and_references_go_both_ways(tmp_path):
    reference = make_model()
    in_memory = torch.optim.AdamW(reference.named_parameters(), lr=1e-2, fused=True)
    torch.manual_seed(1)
    train(reference, in_memory, 2)
    model = make_model()
    model.load_state_dict(reference.state_dict())
    with made(tmp_path, model) as optimizer:
        optimizer.load_state_dict(in_memory.state_dict())
        kept = optimizer.state_dict()
    # An optimizer of the other mode takes it too, and says what is in it.
    for mode in ("tensors", "mapped"):
        with made(tmp_path, model, state_dict_mode=mode) as optimizer:
            optimizer.load_state_dict(kept)
            the_same_state(optimizer.state_dict(), in_memory.state_dict())


def test_state_is_not_saved_in_the_midst_of_a_step(tmp_path):
    model = make_model()
    with made(tmp_path, model, overlap_backward="update") as optimizer:
        train(model, optimizer, 1)
        checkpoint = saved(model, optimizer)
        model(torch.ones(2, 64)).square().mean().backward()
        with pytest.raises(RuntimeError, match=r"state_dict\(\) between backward\(\) and step"):
            optimizer.state_dict()
        optimizer.step()
        expected = saved(model, optimizer)
        optimizer.zero_grad()
    wanted = torch.load(io.BytesIO(expected), weights_only=True)["model"]
    # Loading gives up a step that has begun: first of a store that is left for the other one,
    # then of this.
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    model = other_model()
    with made(scratch, model, overlap_backward="update") as optimizer:
        for _ in range(2):
            model(torch.ones(2, 64)).square().mean().backward()
            everything = torch.load(io.BytesIO(checkpoint), weights_only=True)
            optimizer.load_state_dict(everything["optimizer"])
            optimizer.zero_grad()
            model.load_state_dict(everything["model"])
            model(torch.ones(2, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert equal(list(model.state_dict().values()), list(wanted.values()))


def test_backward_does_not_begin_a_step_that_could_not_be_saved(tmp_path):
    model = make_model()
    with made(tmp_path, model) as optimizer:
        train(model, optimizer, 1)
        optimizer.state_dict()
    model = make_model()
    before = bits(model)
    with made(tmp_path, model, overlap_backward="update"):
        with pytest.raises(FileExistsError, match="another run has committed there"):
            model(torch.ones(2, 64)).square().mean().backward()
        assert equal(bits(model), before)


def test_resume_finds_what_a_trainer_has_committed(tmp_path):
    model = make_model()
    with made(tmp_path, model, keep_commits=4) as optimizer:
        torch.manual_seed(1)
        train(model, optimizer, 2)
        optimizer.state_dict()
        weights = copy.deepcopy(model.state_dict())
        train(model, optimizer, 2)
        expected = bits(model)
    model = other_model()
    model.load_state_dict(weights)
    with OffloadedAdamW.resume(
        tmp_path, model.named_parameters(), state_dict_mode="commit", keep_commits=4
    ) as optimizer:
        torch.manual_seed(1)
        for _ in range(2):
            torch.randn(16, 64)  # What the first two steps have used.
        train(model, optimizer, 2)
        assert equal(bits(model), expected)
        assert optimizer.state_dict()[KEY]["generation"] == 2


# Several processes with the same parameters ------------------------------------------------


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


def rank():
    return torch.distributed.get_rank()


def train_together(model, optimizer, steps):
    for _ in range(steps):
        x = torch.randn(16, 64).to(model[0].weight.dtype)
        model(x).square().mean().backward()
        for p in model.parameters():
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()


def as_a_trainer_does(path, kind, dtype, more):
    whole = make_model(dtype)
    nvme = path / f"nvme{rank()}"
    nvme.mkdir()
    with made(nvme, whole, kind, **more) as optimizer:
        torch.manual_seed(rank())
        train_together(whole, optimizer, 6)

    model = make_model(dtype)
    with made(nvme, model, kind, **more) as optimizer:
        torch.manual_seed(rank())
        train_together(model, optimizer, 3)
        random = torch.get_rng_state()
        if rank() == 0:  # It alone is asked.
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
                path / "last",
            )
        torch.distributed.barrier()
        train_together(model, optimizer, 1)

    model = other_model(dtype)
    with made(nvme, model, kind, **more) as optimizer:
        everything = torch.load(path / "last", weights_only=True)
        model.load_state_dict(everything["model"])
        optimizer.load_state_dict(everything["optimizer"])
        assert optimizer.committed_step == 3
        torch.set_rng_state(random)
        train_together(model, optimizer, 3)
        assert equal(bits(model), bits(whole))
        if rank() == 1:
            assert os.listdir(nvme) == []
            with pytest.raises(RuntimeError, match="rank 0 commits for all"):
                optimizer.commit()
            assert optimizer.state_dict()[KEY] == {"rank": 1}
        with pytest.raises(ValueError, match="of rank 1. Rank 0 alone"):
            optimizer.load_state_dict(everything["optimizer"] | {KEY: {"rank": 1}})
    return bits(model)


@pytest.mark.parametrize(
    ("kind", "dtype", "more"),
    [
        ("AdamW", torch.float32, {}),
        ("AdamW", torch.bfloat16, {"state_format": "int8"}),
        ("AdamW", torch.bfloat16, {"state_format": "bf16", "overlap_backward": "prefetch"}),
        ("RMSprop", torch.float16, {"momentum": 0.9}),
    ],
)
def test_rank_0_commits_for_all(ranks, tmp_path, kind, dtype, more):
    a, b = ranks.run(as_a_trainer_does, tmp_path, kind, dtype, more)
    assert equal(a, b)
    # One process goes on with it too.
    model = other_model(dtype)
    everything = torch.load(tmp_path / "last", weights_only=True)
    model.load_state_dict(everything["model"])
    with made(tmp_path / "nvme0", model, kind, **more) as optimizer:
        optimizer.load_state_dict(everything["optimizer"])
        assert optimizer.committed_step == 3


def moments(model, optimizer):
    return [optimizer.state[p]["exp_avg"] for p in model.parameters() if p in optimizer.state]


def what_fails_for_one_fails_for_all(path):
    model = make_model()
    nvme = path / f"nvme{rank()}"
    nvme.mkdir()
    with made(nvme, model) as optimizer:
        train_together(model, optimizer, 1)
        state_dict = optimizer.state_dict()
        state_dict = dict(state_dict, **{KEY: shared(state_dict[KEY])})
        for changes, text in [
            ({"generation": 7}, "generation 7 .* which is gone; there are 1"),
            ({"store": "00"}, "refers to the store 00"),
        ]:
            before = [t.clone() for t in moments(model, optimizer)]
            with pytest.raises(ValueError, match=text):
                optimizer.load_state_dict(broken(state_dict, **changes))
            assert equal(moments(model, optimizer), before)
        train_together(model, optimizer, 1)
    # One of them has other parameters.
    model = torch.nn.Sequential(torch.nn.Linear(64, 300 + rank()))
    with OffloadedAdamW(
        model.named_parameters(), **options(nvme, state_dict_mode="commit")
    ) as optimizer:
        state_dict["param_groups"][0]["params"] = [0, 1]
        with pytest.raises(ValueError, match="on rank 0: all processes must have the same"):
            optimizer.load_state_dict(state_dict)
    # An optimizer of another mode has a store for each process.
    with (
        made(nvme, make_model(), state_dict_mode="tensors") as optimizer,
        pytest.raises(ValueError, match='takes an optimizer with state_dict_mode="commit"'),
    ):
        optimizer.load_state_dict(state_dict)


def shared(value):
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def a_part_is_refused(path):
    model = make_model()
    fully_shard(model)
    with pytest.raises(ValueError, match="this one is a DTensor: call commit"):
        made(path, model)


def test_an_error_of_one_process_is_an_error_of_all(ranks, tmp_path):
    ranks.run(what_fails_for_one_fails_for_all, tmp_path)


def test_parts_of_parameters_are_refused(ranks, tmp_path):
    ranks.run(a_part_is_refused, tmp_path)
