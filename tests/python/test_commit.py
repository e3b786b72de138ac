"""A training that was committed goes on in another process as if nothing had happened.

The reference is the same training without a break, and torch.optim.AdamW in memory.
"""

import json
import os
import random
import signal
import subprocess
from collections import Counter, OrderedDict, namedtuple
from contextlib import suppress
from pathlib import Path

import forked_python
import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import torch_ext
from torch_ext import OffloadedAdamW
from torch_ext import __main__ as command
from torch_ext.optim._commit import (
    Packer,
    find_tensors,
    read_document,
    unpack,
    whole_document,
)

BUDGETS = ["240KiB", "1MiB", "64MiB"]  # None, some or all of the state stays in memory.


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 300), torch.nn.Tanh(), torch.nn.Linear(300, 33)
    )
    model[2].bias.requires_grad_(False)
    return model.to(dtype)


def train(model, optimizer, steps, scheduler=None):
    for _ in range(steps):
        x = torch.randn(16, 64).to(model[0].weight.dtype)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def options(path, **more):
    return {"lr": 1e-2, "nvme_path": path, "host_memory": "1MiB"} | more


def the_same_state(a, b):
    for p, q in zip(a["state"].values(), b["state"].values(), strict=True):
        assert p.keys() == q.keys()
        for name, value in p.items():
            assert torch.equal(value, q[name]), name


@pytest.mark.parametrize("host_memory", BUDGETS)
@pytest.mark.parametrize("state_format", ["exact", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overlap", [False, "update"])
def test_ten_steps_a_commit_and_ten_more_are_twenty_steps(
    tmp_path, dtype, state_format, overlap, host_memory
):
    more = {
        "state_format": state_format,
        "host_memory": host_memory,
        "overlap_backward": overlap,
        "seed": 7,
    }
    whole = make_model(dtype)
    with OffloadedAdamW(whole.parameters(), **options(tmp_path, **more)) as optimizer:
        torch.manual_seed(1)
        train(whole, optimizer, 20)
        expected = optimizer.state_dict()

    first = make_model(dtype)
    with OffloadedAdamW(first.parameters(), **options(tmp_path, **more)) as optimizer:
        torch.manual_seed(1)
        train(first, optimizer, 10)
        done = optimizer.commit(extra=torch_ext.rng_state())
        assert (done.generation, done.step) == (1, 10)
        train(first, optimizer, 2)  # Lost.

    second = make_model(dtype)
    optimizer = OffloadedAdamW.resume(
        tmp_path, second.parameters(), host_memory=host_memory, overlap_backward=overlap
    )
    with optimizer:
        assert optimizer.committed_step == 10
        assert optimizer.param_groups[0]["lr"] == 1e-2
        torch_ext.set_rng_state(optimizer.committed_extra)
        train(second, optimizer, 10)
        assert equal(bits(second), bits(whole))
        the_same_state(optimizer.state_dict(), expected)
        assert optimizer.commit().step == 20


def test_a_run_in_memory_gives_the_same(tmp_path):
    reference = make_model()
    in_memory = torch.optim.AdamW(reference.parameters(), lr=1e-2, fused=True)
    torch.manual_seed(1)
    train(reference, in_memory, 6)

    model = make_model()
    torch.manual_seed(1)
    optimizer = OffloadedAdamW(model.named_parameters(), **options(tmp_path))
    for _ in range(3):
        train(model, optimizer, 2)
        optimizer.commit(extra=torch_ext.rng_state())
        optimizer.close()
        model = make_model()
        optimizer = OffloadedAdamW.resume(
            tmp_path, model.named_parameters(), host_memory="1MiB"
        )
        torch_ext.set_rng_state(optimizer.committed_extra)
    assert equal(bits(model), bits(reference))
    the_same_state(optimizer.state_dict(), in_memory.state_dict())
    optimizer.close()


def test_groups_and_a_scheduler_go_on(tmp_path):
    def start(path):
        model = make_model()
        groups = [
            {"params": list(model[0].named_parameters("0")), "lr": 1e-2, "mine": ("a", 1)},
            {"params": list(model[2].named_parameters("2")), "betas": (0.8, 0.99)},
        ]
        return model, groups

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    whole, groups = start(tmp_path)
    with OffloadedAdamW(groups, **options(tmp_path)) as optimizer:
        torch.manual_seed(1)
        train(whole, optimizer, 8, schedule(optimizer))

    model, groups = start(tmp_path)
    with OffloadedAdamW(groups, **options(tmp_path)) as optimizer:
        scheduler = schedule(optimizer)
        torch.manual_seed(1)
        train(model, optimizer, 4, scheduler)
        extra = {"scheduler": scheduler.state_dict(), "rng": torch_ext.rng_state()}
        optimizer.commit(100, extra=extra)

    # One list of parameters: the commit knows the groups.
    model, _ = start(tmp_path)
    with OffloadedAdamW.resume(tmp_path, model.named_parameters()) as optimizer:
        assert optimizer.committed_step == 100
        assert [g["betas"] for g in optimizer.param_groups] == [(0.9, 0.999), (0.8, 0.99)]
        assert optimizer.param_groups[0]["mine"] == ("a", 1)
        scheduler = schedule(optimizer)
        scheduler.load_state_dict(optimizer.committed_extra["scheduler"])
        # A new scheduler begins with its first rate.
        for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
        torch_ext.set_rng_state(optimizer.committed_extra["rng"])
        train(model, optimizer, 4, scheduler)
        assert equal(bits(model), bits(whole))


def test_names_are_the_models_whatever_wraps_it(tmp_path):
    model = make_model()
    wrapped = torch.nn.Module()
    wrapped.module = torch.nn.Module()
    wrapped.module._orig_mod = model
    with OffloadedAdamW(wrapped.named_parameters(), **options(tmp_path)) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
    plain = make_model()
    with OffloadedAdamW.resume(tmp_path, plain.named_parameters()) as optimizer:
        assert equal(bits(plain), bits(model))


def equal_ones(count):
    return [torch.nn.Parameter(torch.ones(30_000)) for _ in range(count)]


@pytest.mark.parametrize("host_memory", BUDGETS)
@pytest.mark.parametrize("case", ["made and not stepped", "without a gradient"])
def test_state_that_no_step_has_touched_goes_on_like_torchs(tmp_path, case, host_memory):
    untouched = case == "made and not stepped"
    parameters, reference = equal_ones(3), equal_ones(3)
    expected = torch.optim.AdamW(reference, lr=1e-2, fused=True)
    overlap = {"overlap_backward": False if untouched else "update"}
    more = options(tmp_path, host_memory=host_memory) | overlap
    with OffloadedAdamW(parameters, **more) as optimizer:
        if untouched:  # As torch.distributed.checkpoint asks for state.
            optimizer.param_groups[0]["lr"] = 0.0
            for p in parameters:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 1e-2
        else:
            parameters[1].grad = torch.ones(30_000)
            reference[1].grad = torch.ones(30_000)
            optimizer.step()
            expected.step()
        optimizer.commit()
    assert command.main(["verify", os.fspath(tmp_path)]) == 0
    with open(tmp_path / "state.r0-of-1.e0.d0.store", "r+b") as file:
        for root in (65536, 131072):
            file.seek(root)
            if file.read(8) == bytes(8):  # The power was cut while the next one was written.
                file.seek(root)
                file.write(b"txROOT \n")
    resumed = equal_ones(3)
    with OffloadedAdamW.resume(tmp_path, resumed, **overlap) as optimizer:
        for _ in range(2):
            for p, q in zip(resumed, reference, strict=True):
                p.grad, q.grad = torch.ones(30_000), torch.ones(30_000)
            optimizer.step()
            expected.step()
        assert equal(resumed, reference)
        found, there = optimizer.state_dict()["state"], expected.state_dict()["state"]
        for i in range(3):
            assert all(torch.equal(found[i][name], there[i][name]) for name in there[i])


def test_extra_comes_back_as_it_was(tmp_path):
    extra = {
        "a": [1, 2.5, float("inf"), None, True, "text \N{SNOWMAN}", b"\0\xff"],
        3: (2**70, -1, {"nested": torch.arange(5).view(5, 1)}),
        "empty": [{}, [], (), torch.empty(0, 3), torch.tensor(1 + 2j)],
        "strided": torch.arange(6.0).view(2, 3).t(),
        "one": torch.arange(6.0)[1::2][:1],
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "kinds": [Counter("aab"), OrderedDict(a=1), bytearray(b"x")],
        "surrogates": ["\ud83d\ude00", "\ud800\udfff", {"\udcff": "x"}],
    }
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        optimizer.commit(extra=extra)
        assert optimizer.committed_extra is extra
    with OffloadedAdamW.resume(tmp_path, model.parameters()) as optimizer:
        found = optimizer.committed_extra
    assert str(found) == str(extra)
    assert found["strided"].dtype == torch.float32
    assert list(map(type, found["kinds"])) == [Counter, OrderedDict, bytearray]


def nested(depth, leaf):
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def at_depth(frames, call):
    return call() if frames == 0 else at_depth(frames - 1, call)


def test_what_is_kept_can_be_read_from_a_deeper_stack(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        deepest = 0
        for depth in (60, 90, 99, 100, 101, 110, 150, 200):
            try:
                optimizer.commit(extra=nested(depth, torch.ones(100)))
            except ValueError as refusal:
                text = str(refusal)
                break
            deepest = depth
        assert "nested more than" in text
        assert 50 < deepest < 200
        at_depth(400, optimizer.rollback)
        assert str(optimizer.committed_extra) == str(nested(deepest, torch.ones(100)))
        endless = {}
        endless["itself"] = [endless]
        with pytest.raises(ValueError, match="or contains itself"):
            optimizer.commit(extra=endless)
    at_depth(400, lambda: OffloadedAdamW.resume(tmp_path, model.parameters()).close())


def wrapped(tensor):
    """A tensor whose memory is another one's."""
    return TwoTensor(tensor, tensor.clone())


@pytest.mark.parametrize("host_memory", ["240KiB", "64MiB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [1, 2])
def test_the_plan_says_what_commits_take_up(tmp_path, dtype, host_memory, keep):
    parameters = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (3_000_000, 777)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    with OffloadedAdamW(parameters, **options(tmp_path, host_memory=host_memory)) as optimizer:
        plan = optimizer.plan()
        assert "with commits" in str(plan)
        for _ in range(4):
            optimizer.step()
            optimizer.commit(keep=keep)
        (store,) = tmp_path.iterdir()
        taken = store.stat().st_blocks * 512
    said = plan.commit_bytes * (1 + keep) / 2
    grows_by = 16 * 2**20
    assert said <= taken <= 1.01 * said + grows_by + 2**19  # Header, tables.


def test_what_cannot_be_kept_is_named_and_nothing_has_changed(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        train(model, optimizer, 1)
        for value, text in [
            ({"a": [object()]}, r"extra\['a'\]\[0\] is a object"),
            (namedtuple("Pair", "a b")(1, 2), "extra is a Pair"),
            (torch.nested.nested_tensor([torch.ones(2)]), "without plain memory"),
            ({"b": wrapped(torch.ones(100))}, r"extra\['b'\]: subclass or wrapper tensors"),
        ]:
            with pytest.raises(TypeError, match=text):
                optimizer.commit(extra=value)
        for elements in (1, 1000):
            for left in (0, 2):
                resized = torch.ones(elements)
                resized.untyped_storage().resize_(left)
                with pytest.raises(ValueError, match=r"extra\[1\]: .*was it resized"):
                    optimizer.commit(extra=[1, resized])
        optimizer.state[model[0].weight]["ema"] = resized
        with pytest.raises(ValueError, match="was it resized"):
            optimizer.commit()
        del optimizer.state[model[0].weight]["ema"]
        assert os.listdir(tmp_path) == []
        with pytest.raises(ValueError, match="keep must be from 1"):
            optimizer.commit(keep=0)
        with pytest.raises(ValueError, match="step must be from 0"):
            optimizer.commit(-1)
        with pytest.raises(TypeError, match="step must be a whole number, not float"):
            optimizer.commit(1.5)
        assert os.listdir(tmp_path) == []
        optimizer.commit()
        assert os.listdir(tmp_path) == ["state.r0-of-1.e0.d0.store"]


def test_a_parameter_may_stay_the_callers(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        train(model, optimizer, 2)
        optimizer.commit(include_parameters=False)
        small = optimizer.commit(include_parameters=False).bytes_written
        kept = bits(model)[:3]  # The fourth is frozen.
        assert optimizer.commit().bytes_written > small + sum(p.nbytes for p in kept)
        optimizer.commit(include_parameters=False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    changed = bits(model)
    with OffloadedAdamW.resume(tmp_path, model.parameters()) as optimizer:
        assert equal(bits(model), changed)


def test_another_models_parameters_are_listed(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.named_parameters(), **options(tmp_path)) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
    other = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.Linear(300, 34))
    before = bits(other)
    with pytest.raises(ValueError, match="not those of the commit") as caught:
        OffloadedAdamW.resume(tmp_path, other.named_parameters())
    text = str(caught.value)
    for part in ("1.weight is not in the commit", "2.weight is missing"):
        assert part in text
    assert equal(bits(other), before)
    half = make_model(torch.bfloat16)
    with pytest.raises(ValueError, match="0.bias has dtype float32 there and bfloat16 here"):
        OffloadedAdamW.resume(tmp_path, half.named_parameters())
    # The store is not held by those who were refused.
    with OffloadedAdamW.resume(tmp_path, model.named_parameters()):
        pass


def test_groups_that_join_later_have_the_runs_defaults(tmp_path):
    model = make_model()
    more = {"betas": (0.5, 0.6), "weight_decay": 0.3, "eps": 1e-3, "maximize": True}
    with OffloadedAdamW(model.parameters(), **options(tmp_path, **more)) as optimizer:
        optimizer.commit()
        expected = optimizer.defaults
    with OffloadedAdamW.resume(tmp_path, model.parameters()) as optimizer:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        group = optimizer.param_groups[1]
        assert {name: group[name] for name in more} == more
        assert optimizer.defaults == expected


def test_drives_are_given_in_their_order(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options([first, second])) as optimizer:
        train(model, optimizer, 2)
        optimizer.commit()
    kept = bits(model)
    places = f"drive 0: {first}, drive 1: {second}"
    with pytest.raises(ValueError, match="not in its order") as refused:
        OffloadedAdamW.resume([second, first], model.parameters())
    assert places in str(refused.value)
    assert "remove" not in str(refused.value)
    (tmp_path / "c").mkdir()
    for given, count in ((first, "1 was"), ([first, second, tmp_path / "c"], "3 were")):
        with pytest.raises(
            ValueError, match=f"is in 2 directories, and {count} given"
        ) as refused:
            OffloadedAdamW.resume(given, model.parameters())
        assert "nvme_path=" in str(refused.value)
    other = make_model()
    with OffloadedAdamW.resume([first, second], other.parameters()):
        assert equal(bits(other), kept)
    name = "state.r0-of-1.e0.d0.store"
    (first / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}.* cut off, remove that file"):
        OffloadedAdamW.resume([first, second], model.parameters())


def test_a_damaged_root_is_said_and_what_is_taken_is_whole(tmp_path, caplog):
    model = make_model()
    more = {"host_memory": "240KiB"}
    with OffloadedAdamW(model.parameters(), **options(tmp_path, **more)) as optimizer:
        for step in (1, 2, 3):
            train(model, optimizer, 1)
            optimizer.commit(step)
    store = tmp_path / "state.r0-of-1.e0.d0.store"
    data = bytearray(store.read_bytes())
    data[65536 + 100] ^= 1  # The root of the third.
    store.write_bytes(data)
    with OffloadedAdamW.resume(tmp_path, model.parameters(), **more) as optimizer:
        assert optimizer.committed_step == 2
        assert "root 0 is damaged" in caplog.text
        optimizer.state_dict()


def test_a_damaged_document_is_an_error_in_words(tmp_path):
    for i, change in enumerate(({"class": None}, {"extra": {}}, {"groups": []})):
        (tmp_path / str(i)).mkdir()
        model = make_model()
        optimizer = OffloadedAdamW(model.parameters(), **options(tmp_path / str(i)))
        made = optimizer._document

        def damaged(*args, made=made, change=change):
            document = made(*args) | change
            return {name: value for name, value in document.items() if value is not None}

        optimizer._document = damaged
        optimizer.commit()
        optimizer.close()
        with pytest.raises(OSError, match="document is damaged"):
            OffloadedAdamW.resume(tmp_path / str(i), model.parameters())


def test_a_file_that_was_removed_takes_no_commit(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        optimizer.commit()
        (tmp_path / "state.r0-of-1.e0.d0.store").unlink()
        with pytest.raises(FileNotFoundError, match="was removed"):
            optimizer.commit()
        train(model, optimizer, 1)


def test_where_nothing_was_committed_there_is_no_file(tmp_path):
    model = make_model()
    with pytest.raises(FileNotFoundError):
        OffloadedAdamW.resume(tmp_path, model.parameters())
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        train(model, optimizer, 1)
        with pytest.raises(FileNotFoundError):
            OffloadedAdamW.resume(tmp_path, model.parameters())
    for name in ("seed", "lr"):
        with pytest.raises(TypeError, match=f"takes no '{name}'"):
            OffloadedAdamW.resume(tmp_path, model.parameters(), **{name: 1})


def test_a_store_has_one_owner_and_is_not_replaced(tmp_path, caplog):
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        optimizer.commit()
        with pytest.raises(BlockingIOError, match="another process uses this store"):
            OffloadedAdamW.resume(tmp_path, model.parameters())
        more = {"host_memory": "64MiB"}
        with OffloadedAdamW(model.parameters(), **options(tmp_path, **more)) as second:
            assert "resume() goes on from it" in caplog.text
            for _ in range(3):
                with pytest.raises(FileExistsError, match="another run"):
                    second.commit()
                train(model, second, 1)
            assert second.stats()["bytes_written"] == 0  # All of it is in memory.


def test_commit_between_backward_and_step_is_refused_with_update(tmp_path):
    model = make_model()
    with OffloadedAdamW(
        model.parameters(), **options(tmp_path, overlap_backward="update")
    ) as optimizer:
        model(torch.randn(16, 64)).square().mean().backward()
        with pytest.raises(RuntimeError, match=r"commit\(\) between backward"):
            optimizer.commit()
        optimizer.step()
        optimizer.commit()


def test_without_checksums_there_is_no_commit(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path, verify=False)) as optimizer:
        train(model, optimizer, 1)
        with pytest.raises(RuntimeError, match="verify"):
            optimizer.commit()
        train(model, optimizer, 1)


def test_a_number_of_thousands_of_digits_is_kept(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        optimizer.commit(extra=-(10**5000))
    with OffloadedAdamW.resume(tmp_path, model.parameters()) as optimizer:
        assert optimizer.committed_extra == -(10**5000)


def resized(model, optimizer):
    weight = model[2].weight
    weight.data = weight.data[:7].clone()


def of_another_dtype(model, optimizer):
    model[0].bias.data = model[0].bias.data.bfloat16()


def with_a_bad_rate(model, optimizer):
    optimizer.param_groups[0]["lr"] = float("nan")


def without_an_option(model, optimizer):
    del optimizer.param_groups[0]["eps"]


def with_a_nameless_one(model, optimizer):
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(3)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (resized, "2.weight.*the state was made for a parameter with dtype"),
        (of_another_dtype, "0.bias.*it has now dtype"),
        (with_a_bad_rate, "Invalid learning rate: nan"),
        (without_an_option, r"param_groups\[0\] has no option 'eps'"),
        (with_a_nameless_one, "5 parameters and 4 param_names"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_could_not_be_resumed_is_no_commit(tmp_path, change, text):
    """It would take the place of one that works."""
    model = make_model()
    with OffloadedAdamW(model.named_parameters(), **options(tmp_path)) as optimizer:
        train(model, optimizer, 2)
        optimizer.commit()
        kept = bits(model)
        change(model, optimizer)
        with pytest.raises((ValueError, RuntimeError), match=text):
            optimizer.commit()
    model = make_model()
    with OffloadedAdamW.resume(tmp_path, model.named_parameters()) as optimizer:
        assert optimizer.committed_step == 2
        assert equal(bits(model), kept)


def test_a_model_may_have_a_module_called_module(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(5))
            self.module = torch.nn.Linear(4, 4)

    model = Odd()
    with OffloadedAdamW(model.named_parameters(), **options(tmp_path)) as optimizer:
        optimizer.commit()
        kept = bits(model)
    model = Odd()
    with OffloadedAdamW.resume(tmp_path, model.named_parameters()):
        assert equal(bits(model), kept)


def test_random_numbers_go_on(tmp_path):
    state = torch_ext.rng_state()
    drawn = [random.random(), np.random.rand(), torch.rand(1)]
    torch_ext.set_rng_state(state)
    assert [random.random(), np.random.rand(), torch.rand(1)] == drawn


def test_random_numbers_of_other_devices_are_said(caplog):
    state = torch_ext.rng_state()
    assert state["cuda"] == [] or torch.cuda.is_available()
    drawn = torch.rand(1)
    torch_ext.set_rng_state(state | {"cuda": [torch.get_rng_state()] * 99})
    assert torch.rand(1) == drawn
    assert "those of 99 CUDA devices, and there are" in caplog.text


def test_a_damaged_document_is_said_to_be_damaged():
    """Whatever a packed value has become, nothing comes out but what unpack() promises."""
    value = {
        "a": [1, 2.5, float("inf"), 2**70, None, True, "x\udc00", b"bytes", (1, 2)],
        "b": torch.arange(4),
        "c": torch.arange(1000.0),
        ("k", 1): OrderedDict(x=1),
    }
    tensors = []
    text = json.dumps(Packer(tensors).pack(value, "extra"))
    rng = random.Random(0)
    refused = 0
    for _ in range(3000):
        i = rng.randrange(len(text))
        damaged = text[:i] + rng.choice('{}[]":,0-zZ9eE.') + text[i + rng.randrange(3) :]
        try:
            packed = json.loads(damaged)
        except ValueError:
            continue
        with suppress(OSError), whole_document():
            refused += 1
            unpack(packed, find_tensors(packed))
            refused -= 1
    assert refused > 100
    with pytest.raises(OSError, match="damaged"):
        read_document("{not json", "OffloadedAdamW")


KILLED = """
import os, signal, sys, threading, time
sys.path[:0] = sys.argv[3:]
import torch, torch_ext
from test_commit import make_model, options, train
from torch_ext import OffloadedAdamW
path, after = sys.argv[1], float(sys.argv[2])
model = make_model(torch.bfloat16)
try:
    optimizer = OffloadedAdamW.resume(path, model.parameters(), host_memory="240KiB")
    torch_ext.set_rng_state(optimizer.committed_extra)
except FileNotFoundError:
    torch.manual_seed(1)
    optimizer = OffloadedAdamW(
        model.parameters(), **options(path, state_format="int8", host_memory="240KiB")
    )
print("resumed", optimizer.committed_step, flush=True)
killed = threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
while True:
    train(model, optimizer, 1)
    print(optimizer.commit(extra=torch_ext.rng_state()).step, flush=True)
    if killed.ident is None:
        killed.start()  # A busy machine must not end it before its first commit.
"""


def test_after_each_of_seven_kills_it_goes_on(tmp_path):
    acknowledged = 0
    for i in range(7):
        program = [forked_python.python(), "-c", KILLED, tmp_path, str(0.02 + 0.03 * i)]
        result = subprocess.run(
            [*program, *map(str, Path(__file__).parents[:2])],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == -signal.SIGKILL, result.stderr
        resumed, *steps = result.stdout.split("\n")
        found = resumed.split()[1]
        # The last that was acknowledged, or the one that was being made.
        assert found == "None" or int(found) in (acknowledged, acknowledged + 1)
        assert acknowledged == 0 or found != "None"
        acknowledged = max([acknowledged, *map(int, filter(None, steps))])
    model = make_model(torch.bfloat16)
    with OffloadedAdamW.resume(tmp_path, model.parameters()) as optimizer:
        steps = optimizer.committed_step
        assert steps >= acknowledged > 0
        state = optimizer.state_dict()
    reference = make_model(torch.bfloat16)
    torch.manual_seed(1)
    (tmp_path / "reference").mkdir()
    with OffloadedAdamW(
        reference.parameters(), **options(tmp_path / "reference", state_format="int8")
    ) as optimizer:
        train(reference, optimizer, steps)
        assert equal(bits(model), bits(reference))
        the_same_state(state, optimizer.state_dict())
