"""What programs written for torch.optim give an optimizer as a matter of course.

They give its keywords, and all parameters of a model, frozen and quantized ones too. Each test
compares with torch's own classes.
"""

import inspect
import re

import pytest
import torch
from generic_support import GenericPair
from optim_support import SMALL, parameters, twins

from torch_ext import OffloadedAdamW, OffloadedOptimizer

WAYS = [
    {"fused": True},
    {"fused": False},
    {"foreach": True},
    {"foreach": False, "fused": False},
    {"foreach": None, "fused": None},
    {"capturable": False},
    {"differentiable": False},
    {"foreach": True, "capturable": False, "differentiable": False, "fused": False},
]


def made(tensors, nvme_dir, **options):
    return OffloadedAdamW(tensors, nvme_path=nvme_dir, host_memory=SMALL, **options)


# Keywords ------------------------------------------------------------------------------


def test_every_keyword_of_torchs_adamw_is_one_of_ours():
    theirs = inspect.signature(torch.optim.AdamW).parameters
    ours = inspect.signature(OffloadedAdamW).parameters
    assert list(ours)[: list(theirs).index("amsgrad") + 1] == list(theirs)[:6]
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("ways", WAYS, ids=str)
def test_ways_of_computing_change_no_result(ways, nvme_dir):
    (ours,), (theirs,) = parameters(999), parameters(999)
    native = torch.optim.AdamW([theirs], fused=True)  # The kernel that is always ours.
    optimizer = made([ours], nvme_dir, **ways)
    for seed in range(3):
        ours.grad = torch.randn(999, generator=torch.Generator().manual_seed(seed))
        theirs.grad = ours.grad.clone()
        optimizer.step()
        native.step()
    assert torch.equal(ours, theirs)
    optimizer.close()


@pytest.mark.parametrize("ways", WAYS, ids=str)
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_either_side_loads_what_the_other_saved_in_another_way(ways, where, nvme_dir):
    if where == "constructor":
        ours, theirs = parameters(999), parameters(999)
        optimizer, native = made(ours, nvme_dir, **ways), torch.optim.AdamW(theirs, **ways)
    else:
        (p,), (q,) = parameters(999), parameters(999)
        optimizer = made([{"params": [p], **ways}], nvme_dir)
        native = torch.optim.AdamW([{"params": [q], **ways}])
        ours, theirs = [p], [q]
    ours[0].grad = torch.ones(999)
    theirs[0].grad = torch.ones(999)
    optimizer.step()
    native.step()
    mine, wanted = optimizer.state_dict(), native.state_dict()
    assert mine["param_groups"][0].keys() == wanted["param_groups"][0].keys()
    for name, value in ways.items():
        if value is not None:
            assert mine["param_groups"][0][name] is value
    again = torch.optim.AdamW(twins(ours))
    again.load_state_dict(mine)
    again.param_groups[0]["params"][0].grad = torch.ones(999)
    again.step()  # In the way that was saved.
    own = dict(optimizer.param_groups[0])
    optimizer.load_state_dict(wanted)
    for name in ("foreach", "capturable", "differentiable", "fused"):
        assert optimizer.param_groups[0][name] == own[name]  # It computes as before.
    optimizer.step()
    optimizer.close()


@pytest.mark.parametrize("name", ["capturable", "differentiable"])
def test_what_an_update_on_the_drive_cannot_be_is_refused_by_name(name, nvme_dir):
    (p,) = parameters(99)
    for cls in (torch.optim.AdamW, torch.optim.RMSprop):
        # As the class itself: on the CPU its step raises.
        q = torch.ones(9, requires_grad=True)
        native = cls([q], **{name: True})
        q.grad = torch.ones(9)
        with pytest.raises((AssertionError, RuntimeError)):
            native.step()
        with pytest.raises(ValueError, match=f"{name}=True"):
            OffloadedOptimizer(cls, [p], nvme_path=nvme_dir, **{name: True})
        with pytest.raises(ValueError, match=f"{name}=True"):
            OffloadedOptimizer(cls, [{"params": [p], name: True}], nvme_path=nvme_dir)
    with pytest.raises(ValueError, match=f"{name}=True"):
        made([p], nvme_dir, **{name: True})
    with pytest.raises(ValueError, match=f"{name}=True"):
        made([{"params": [p], name: True}], nvme_dir)
    # So it is when it is written into a group later.
    optimizer = made([p], nvme_dir)
    optimizer.param_groups[0][name] = True
    p.grad = torch.ones(99)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=f"{name}=True"):
        optimizer.step()
    assert torch.equal(p, before)
    optimizer.close()


def test_keywords_that_exclude_each_other_are_refused_in_torchs_words(nvme_dir):
    (p,) = parameters(99)
    for options in (
        {"fused": True, "foreach": True},
        {"lr": torch.tensor(0.1), "foreach": True},
    ):
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            torch.optim.AdamW([p], **options)
        with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))):
            made([p], nvme_dir, **options)
    with pytest.raises(ValueError, match="amsgrad=True is not supported by OffloadedAdamW"):
        made([p], nvme_dir, amsgrad=True)


@pytest.mark.parametrize(
    "ways", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_class_gets_the_ways_that_it_knows(cls, ways, nvme_dir):
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    pair = GenericPair(cls, parameters(1000, 64), nvme_dir, **ways, **options)
    pair.steps(3)
    assert pair.equal()
    saved, wanted = pair.a.state_dict(), pair.b.state_dict()
    assert saved["param_groups"] == wanted["param_groups"]
    pair.a.load_state_dict(wanted)
    pair.b.load_state_dict(saved)
    pair.steps(2, first=3)
    assert pair.equal()
    pair.a.close()


# Frozen parameters ---------------------------------------------------------------------


def frozen_ones():
    quantized = torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.quint8)
    tensors = {
        "uint8": torch.ones(8, 8, dtype=torch.uint8),
        "int8": torch.ones(8, 8, dtype=torch.int8),
        "int64": torch.ones(8, 8, dtype=torch.int64),
        "bool": torch.ones(8, 8, dtype=torch.bool),
        "float8": torch.ones(8, 8).to(torch.float8_e4m3fn),
        "float64": torch.ones(8, 8, dtype=torch.float64),
        "complex": torch.ones(8, 8, dtype=torch.complex64),
        "float32": torch.ones(8, 8),
        "quantized": quantized,
        "meta": torch.ones(8, 8, device="meta"),
        "sparse": torch.ones(8, 8).to_sparse(),
        "expanded": torch.ones(1, 8).expand(8, 8),
    }
    return {
        name: torch.nn.Parameter(tensor, requires_grad=False)
        for name, tensor in tensors.items()
    }


def pairs(nvme_dir, given, others, cls):
    """The optimizer and torch's own, of all parameters of a model."""
    where = {"nvme_path": nvme_dir, "host_memory": SMALL}
    if cls is None:
        return OffloadedAdamW(given, lr=1e-2, **where), torch.optim.AdamW(
            others, lr=1e-2, fused=True
        )
    options = {"lr": 1e-2, "foreach": False}
    return OffloadedOptimizer(cls, given, **options, **where), cls(others, **options)


@pytest.mark.parametrize("kind", frozen_ones())
@pytest.mark.parametrize("cls", [None, torch.optim.RMSprop], ids=str)
def test_a_frozen_parameter_of_any_kind_is_left_alone(cls, kind, nvme_dir):
    frozen = frozen_ones()[kind]
    (ours,), (theirs,) = parameters(99), parameters(99)
    optimizer, native = pairs(nvme_dir, [frozen, ours], [frozen, theirs], cls)
    alone, _ = pairs(nvme_dir, twins([ours]), [theirs], cls)
    assert optimizer.plan() == alone.plan()
    alone.close()
    for seed in range(2):
        ours.grad = torch.randn(99, generator=torch.Generator().manual_seed(seed))
        theirs.grad = ours.grad.clone()
        optimizer.step()
        native.step()
    assert torch.equal(ours, theirs)
    assert frozen not in optimizer.state
    saved, wanted = optimizer.state_dict(), native.state_dict()
    assert saved["state"].keys() == wanted["state"].keys() == {1}
    assert saved["param_groups"][0]["params"] == wanted["param_groups"][0]["params"]
    optimizer.load_state_dict(wanted)
    native.load_state_dict(saved)
    ours.grad, theirs.grad = torch.ones(99), torch.ones(99)
    optimizer.step()
    native.step()
    assert torch.equal(ours, theirs)
    optimizer.close()


@pytest.mark.parametrize("mode", ["prefetch", "update"])
def test_a_frozen_parameter_is_left_alone_during_backward_too(mode, nvme_dir):
    for frozen in frozen_ones().values():
        (ours,), (theirs,) = parameters(99), parameters(99)
        optimizer = made([frozen, ours], nvme_dir, overlap_backward=mode)
        native = torch.optim.AdamW([frozen, theirs], fused=True)
        for _ in range(2):
            for p in (ours, theirs):
                p.square().sum().backward()
            optimizer.step()
            native.step()
            optimizer.zero_grad()
            native.zero_grad()
        assert torch.equal(ours, theirs)
        optimizer.close()


def test_what_adagrad_keeps_of_frozen_parameters_is_what_the_class_keeps(nvme_dir):
    cls = torch.optim.Adagrad
    for frozen in frozen_ones().values():
        if frozen.is_quantized or frozen.is_sparse or frozen.is_complex():
            continue  # The class itself cannot.
        (ours,), (theirs,) = parameters(99), parameters(99)
        optimizer, native = pairs(nvme_dir, [frozen, ours], [frozen, theirs], cls)
        wanted, saved = native.state_dict(), optimizer.state_dict()
        if frozen.dtype == torch.float32 and frozen.is_contiguous() and not frozen.is_meta:
            assert torch.equal(saved["state"][0]["sum"], wanted["state"][0]["sum"])
            optimizer.load_state_dict(wanted)
        else:  # What could not be trained has none here, and none is taken.
            assert saved["state"].keys() == {1}
            with pytest.warns(UserWarning, match=r"\['params'\]\[0\].* is frozen"):
                optimizer.load_state_dict(wanted)
        ours.grad, theirs.grad = torch.ones(99), torch.ones(99)
        optimizer.step()
        native.step()
        assert torch.equal(ours, theirs)
        optimizer.close()


@pytest.mark.parametrize("cls", [None, torch.optim.RMSprop], ids=str)
def test_a_parameter_that_is_unfrozen_is_trained_from_then_on(cls, nvme_dir):
    ours = [torch.nn.Parameter(p.detach(), i > 0) for i, p in enumerate(parameters(99, 64))]
    theirs = twins(ours)
    optimizer, native = pairs(nvme_dir, ours, theirs, cls)
    for step in range(4):
        if step == 2:
            ours[0].requires_grad_()
            theirs[0].requires_grad_()
        for p, q in zip(ours, theirs, strict=True):
            if p.requires_grad:
                p.grad = torch.full_like(p, step + 1.0)
                q.grad = p.grad.clone()
        optimizer.step()
        native.step()
        assert all(map(torch.equal, ours, theirs))
    assert optimizer.state_dict()["state"][0]["step"] == 2
    optimizer.close()


@pytest.mark.parametrize("names", [False, True], ids=["by index", "by name"])
@pytest.mark.parametrize("cls", [None, torch.optim.RMSprop], ids=str)
def test_at_the_step_in_which_it_has_a_gradient_the_error_names_it(cls, names, nvme_dir):
    wide = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64), requires_grad=False)
    (ours,) = parameters(99)
    given = [("base", ours), ("lora.weight", wide)] if names else [ours, wide]
    optimizer, _ = pairs(nvme_dir, given, [ours], cls)
    ours.grad = torch.ones(99)
    optimizer.step()
    before = ours.detach().clone()
    wide.requires_grad_()
    optimizer.step()
    before = ours.detach().clone()
    wide.grad = torch.ones(3, 4, dtype=torch.float64)
    name = r" \('lora\.weight'\)" if names else ""
    place = rf"param_groups\[0\]\['params'\]\[1\]{name}.*float64.*\[3, 4\]"
    with pytest.raises(TypeError, match=place):
        optimizer.step()
    assert torch.equal(ours, before)
    wide.requires_grad_(False)
    wide.grad = None
    optimizer.step()
    optimizer.close()


# Errors --------------------------------------------------------------------------------

PLACE = r"param_groups\[1\]\['params'\]\[1\] \('b'\) \(torch\.float32, sizes \[64\]\)"


def two_groups(nvme_dir, cls, extra=None):
    tensors = parameters(10, 20, 64)
    groups = [
        {"params": [("first", tensors[0])]},
        {"params": [("a", tensors[1]), ("b", tensors[2])]},
    ]
    if extra is not None:
        groups.append({"params": [("extra", extra)]})
    optimizer, _ = pairs(nvme_dir, groups, twins(tensors), cls)
    for p in tensors:
        p.grad = torch.ones_like(p)
    return optimizer, tensors


@pytest.mark.parametrize("cls", [None, torch.optim.RMSprop], ids=str)
def test_an_error_about_a_gradient_names_its_parameter(cls, nvme_dir):
    optimizer, tensors = two_groups(nvme_dir, cls)
    tensors[2].grad = torch.ones(64).to_sparse()
    before = [p.detach().clone() for p in tensors]
    with pytest.raises(RuntimeError, match=PLACE + ".*sparse"):
        optimizer.step()
    assert all(map(torch.equal, tensors, before))
    optimizer.close()


@pytest.mark.parametrize("cls", [None, torch.optim.RMSprop], ids=str)
def test_an_error_about_a_parameter_that_has_changed_names_it(cls, nvme_dir):
    optimizer, tensors = two_groups(nvme_dir, cls)
    optimizer.step()
    tensors[2].data = torch.ones(7, 9)
    tensors[2].grad = torch.ones(7, 9)
    place = PLACE.replace(r"\[64\]", r"\[7, 9\]")
    calls = [optimizer.step, optimizer.state_dict, optimizer.plan]
    for call in calls:
        with pytest.raises(RuntimeError, match=place + ".*the state was made for"):
            call()
    optimizer.close()


@pytest.mark.parametrize("cls", [None, torch.optim.RMSprop], ids=str)
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.ones(3, dtype=torch.float64), TypeError),
        (torch.ones(2, 3, 1).expand(2, 3, 4), ValueError),
        (torch.ones(3, device="meta"), TypeError),
    ],
    ids=["float64", "expanded", "meta"],
)
def test_an_error_at_construction_names_the_parameter(cls, bad, error, nvme_dir):
    bad = bad.requires_grad_()
    sizes = re.escape(str(list(bad.shape)))
    place = rf"param_groups\[2\]\['params'\]\[0\] \('extra'\) \({bad.dtype}, sizes {sizes}\)"
    with pytest.raises(error, match=place):
        two_groups(nvme_dir, cls, extra=bad)


@pytest.mark.parametrize("cls", [None, torch.optim.RMSprop], ids=str)
def test_an_error_at_the_second_parameter_of_a_new_group_adds_nothing(cls, nvme_dir):
    (p, q) = parameters(9, 8)
    optimizer, _ = pairs(nvme_dir, [p], [q], cls)
    bad = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['params'\]\[1\]"):
        optimizer.add_param_group({"params": [q, bad]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [q]})
    q.grad = torch.ones(8)
    optimizer.step()
    optimizer.close()


def test_a_gradient_taken_during_backward_that_cannot_be_used_names_its_parameter(nvme_dir):
    (p,) = parameters((8, 4))
    optimizer = made([("b", p)], nvme_dir, overlap_backward="update")
    row = torch.nn.functional.embedding(torch.tensor([3]), p, sparse=True)
    with pytest.raises(RuntimeError, match=r"\[0\] \('b'\).*sparse"):
        row.sum().backward()
    optimizer.close()
