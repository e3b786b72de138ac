"""No setting of torch that the caller is in changes a result.

Each test compares with torch's own classes in memory, with torch as it is when nothing was
set."""

import contextlib

import pytest
import torch
from generic_support import GenericPair
from optim_support import SMALL, parameters

from torch_ext import OffloadedAdamW, OffloadedOptimizer, TensorSwapper, aio_handle
from torch_ext.deepspeed import deepspeed_memcpy


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


SETTINGS = {
    "default float32": lambda: default_dtype(torch.float32),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "with device": lambda: torch.device("meta"),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}

CLASSES = {
    "AdamW": (torch.optim.AdamW, {"fused": True}),
    "generic AdamW": (torch.optim.AdamW, {"foreach": False}),
    "generic SGD": (torch.optim.SGD, {"momentum": 0.9, "foreach": False}),
    "generic RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "foreach": False}),
    "generic Adagrad": (torch.optim.Adagrad, {"foreach": False}),
}
STAGES = ("construction", "step", "save", "load")


class Run:
    """A model trained by the class in memory, and offloaded with a setting at some stages.

    The second parameter is bfloat16; in memory stands its float32 master.
    """

    def __init__(self, name, setting, stages, nvme_path):
        self.cls, self.options = CLASSES[name]
        self.offloads = name.startswith("generic")
        self.setting, self.stages, self.nvme_path = SETTINGS[setting], stages, nvme_path
        self.ours = [*parameters(999), *parameters((5, 67), dtype=torch.bfloat16, seed=1)]
        self.theirs = [p.detach().float().clone().requires_grad_() for p in self.ours]
        self.native = self.cls(self.theirs, lr=1e-2, **self.options)
        self.seed = 0

    def at(self, stage):
        return self.setting() if stage in self.stages else contextlib.nullcontext()

    def made(self, tensors):
        where = {"nvme_path": self.nvme_path, "host_memory": SMALL}
        with self.at("construction"):
            if self.offloads:
                return OffloadedOptimizer(self.cls, tensors, lr=1e-2, **self.options, **where)
            return OffloadedAdamW(tensors, lr=1e-2, **where)

    def step(self, optimizer, tensors):
        generator = torch.Generator().manual_seed(self.seed)
        self.seed += 1
        for p, q in zip(tensors, self.theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            q.grad = p.grad.float()
        with self.at("step"):
            optimizer.step()
        self.native.step()

    def check(self, state_dict, tensors):
        assert torch.equal(tensors[0], self.theirs[0])
        state, native = state_dict["state"], self.native.state_dict()["state"]
        masters = [state[i].pop("master_param", None) for i in (0, 1)]
        assert masters[0] is None
        assert masters[1].dtype == torch.float32
        assert torch.equal(masters[1], self.theirs[1])
        for mine, wanted in zip(state.values(), native.values(), strict=True):
            assert mine.keys() == wanted.keys()
            for key, value in wanted.items():
                if not isinstance(value, torch.Tensor):
                    assert mine[key] == value
                    continue
                assert torch.equal(mine[key].to(value.dtype), value), key
                assert mine[key].device.type == "cpu"
                assert not mine[key].is_inference()
                assert not mine[key].requires_grad
                if value.dim():
                    assert mine[key].dtype == torch.float32
        state[1]["master_param"] = masters[1]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_setting_at_any_stage_leaves_the_result_as_in_memory(name, setting, nvme_dir):
    for stages in (STAGES, STAGES[::2], STAGES[1::2]):
        run = Run(name, setting, stages, nvme_dir)
        optimizer = run.made(run.ours)
        for _ in range(3):
            run.step(optimizer, run.ours)
        with run.at("save"):
            saved = optimizer.state_dict()
        run.check(saved, run.ours)
        # Goes on in another optimizer, also in the class itself.
        rest = [p.detach().clone().requires_grad_() for p in run.ours]
        other = run.made(rest)
        with run.at("load"):
            other.load_state_dict(saved)
        for _ in range(2):
            run.step(other, rest)
        run.check(other.state_dict(), rest)
        optimizer.close()
        other.close()


def test_a_saved_state_goes_on_in_the_class_itself_whatever_it_was_saved_in(nvme_dir):
    for setting in SETTINGS:
        for name in CLASSES:
            run = Run(name, setting, STAGES, nvme_dir)
            optimizer = run.made(run.ours[:1])
            p, q = run.ours[0], run.theirs[0]
            p.grad = q.grad = torch.ones(999)
            with run.at("step"):
                optimizer.step()
            run.native.step()
            with run.at("save"):
                saved = optimizer.state_dict()
            optimizer.close()
            again = p.detach().clone().requires_grad_()
            native = run.cls([again], lr=1e-2, **run.options)
            native.load_state_dict(saved)
            again.grad = torch.ones(999)
            native.step()
            run.native.step()
            assert torch.equal(again, q), (setting, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_class_sees_the_default_dtype_as_it_does_in_memory(dtype, nvme_dir):
    # NAdam keeps a product, and ASGD its rate, in float64 where that is the default.
    for cls in (torch.optim.NAdam, torch.optim.ASGD):
        with default_dtype(dtype):
            pair = GenericPair(cls, parameters(999, 64), nvme_dir, lr=1e-2, foreach=False)
            pair.steps(4)
            ours, theirs = pair.a.state_dict()["state"], pair.b.state_dict()["state"]
        assert pair.equal()
        for key, value in theirs[0].items():
            assert ours[0][key].dtype == value.dtype, key
            assert torch.equal(ours[0][key], value), key
        pair.a.close()


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "AdamW"])
@pytest.mark.parametrize("saved", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loaded", [torch.float32, torch.float64], ids=str)
def test_numbers_go_on_in_the_dtype_in_which_the_class_goes_on(loaded, saved, name, nvme_dir):
    cls = getattr(torch.optim, name)
    for ways in [{"foreach": False}] + [{"fused": True}] * (name == "AdamW"):
        with default_dtype(saved):
            pair = GenericPair(cls, parameters(999), nvme_dir, lr=1e-2, **ways)
            pair.steps(2)
            states = pair.a.state_dict(), pair.b.state_dict()
        with default_dtype(loaded):
            pair.a.load_state_dict(states[0])
            pair.b.load_state_dict(states[1])
            pair.steps(3, first=2)
            ours, theirs = pair.a.state_dict()["state"][0], pair.b.state_dict()["state"][0]
        assert pair.equal()
        for key, value in theirs.items():
            assert ours[key].dtype == value.dtype, key
            assert torch.equal(ours[key], value), key
        pair.a.close()


class InDefaultDtype(torch.optim.Optimizer):
    """Makes its tensors as its author's torch does by default."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros(p.shape)
                state["average"].mul_(0.9).add_(p.grad)
                p.add_(state["average"].to(p.dtype), alpha=-group["lr"])


@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_class_that_takes_the_defaults_of_torch_finds_those_of_the_step(
    dtype, device, nvme_dir
):
    pair = GenericPair(InDefaultDtype, parameters(999, 64), nvme_dir)
    for i, p in enumerate((*pair.ours, *pair.theirs)):
        p.grad = torch.linspace(-1, 1, p.numel()) * (i % 2 + 1)
    with default_dtype(dtype):
        if device is None:
            pair.a.step()
        else:  # Pieces are on the CPU, whatever the device of whole parameters is.
            with torch.device(device):
                pair.a.step()
        pair.b.step()
    pair.a.step()  # The state stays what it is when the default goes back.
    pair.b.step()
    assert pair.equal()
    with default_dtype(dtype):
        ours = pair.a.state_dict()["state"][0]["average"]
    assert ours.dtype == dtype
    assert torch.equal(ours, pair.b.state_dict()["state"][0]["average"])


def test_clipping_does_not_depend_on_autocast_or_the_default_dtype(nvme_dir):
    for setting in SETTINGS:
        ours, theirs = parameters(999), parameters(999)
        native = torch.optim.AdamW(theirs, fused=True)
        optimizer = OffloadedAdamW(
            ours, nvme_path=nvme_dir, host_memory=SMALL, max_grad_norm=0.5
        )
        ours[0].grad = torch.ones(999)
        theirs[0].grad = torch.ones(999)
        wanted = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        native.step()
        with SETTINGS[setting]():
            optimizer.step()
        assert torch.equal(ours[0], theirs[0]), setting
        assert torch.equal(optimizer.grad_norm, wanted)
        assert not optimizer.grad_norm.is_inference()
        ours[0].grad = None
        with SETTINGS[setting]():
            optimizer.step()
        assert optimizer.grad_norm.dtype == torch.float32
        assert optimizer.grad_norm.item() == 0
        optimizer.close()


@pytest.mark.parametrize("setting", SETTINGS)
def test_parameters_updated_during_backward_do_not_depend_on_settings_either(setting, nvme_dir):
    ours, theirs = parameters(999, 64), parameters(999, 64)
    native = torch.optim.AdamW(theirs, fused=True)
    with SETTINGS[setting]():
        optimizer = OffloadedAdamW(
            ours, nvme_path=nvme_dir, host_memory=SMALL, overlap_backward="update"
        )
    for _ in range(2):
        for tensors in (ours, theirs):
            sum(t.square().sum() for t in tensors).backward()
        with SETTINGS[setting]():
            optimizer.step()
            optimizer.zero_grad()
        native.step()
        native.zero_grad()
    assert all(map(torch.equal, ours, theirs))
    with SETTINGS[setting](), optimizer.accumulate():
        pass
    # A gradient that is given by hand in this setting.
    for tensors in (ours, theirs):
        for t in tensors:
            t.grad = torch.ones_like(t)
    with SETTINGS[setting]():
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    native.step()
    assert all(map(torch.equal, ours, theirs))
    assert all(p.grad is None or not p.grad.any() for p in ours)
    optimizer.close()


def test_a_closure_runs_in_the_settings_of_the_caller(nvme_dir):
    (p,) = parameters(999)
    optimizer = OffloadedAdamW([p], nvme_path=nvme_dir, host_memory=SMALL)
    generic = OffloadedOptimizer(
        torch.optim.RMSprop, [p], nvme_path=nvme_dir, host_memory=SMALL
    )
    seen = []

    def closure():
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return torch.ones(())

    for each in (optimizer, generic):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            each.step(closure)
        each.close()
    assert seen == [(True, True)] * 2


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_that_were_made_in_inference_mode_are_trained(name, dtype, nvme_dir):
    with torch.inference_mode():
        run = Run(name, "inference_mode", STAGES, nvme_dir)
        run.ours = [p.detach().to(dtype).clone().requires_grad_() for p in run.ours]
        run.theirs = [p.detach().float().clone().requires_grad_() for p in run.ours]
        run.native = run.cls(run.theirs, lr=1e-2, **run.options)
        assert run.ours[0].is_inference()
        optimizer = run.made(run.ours)
        for _ in range(3):
            run.step(optimizer, run.ours)
        for p, q in zip(run.ours, run.theirs, strict=True):
            if dtype == torch.float32:
                assert torch.equal(p, q)
            else:
                # A bfloat16 parameter's ties round away from zero.
                assert torch.allclose(p.float(), q, rtol=2**-8, atol=0)
        saved = optimizer.state_dict()["state"]
        masters = [saved[i].get("master_param", p) for i, p in enumerate(run.ours)]
        assert all(map(torch.equal, masters, run.theirs))
    optimizer.close()


def test_the_version_of_a_parameter_grows_with_each_step(nvme_dir):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        (p,) = parameters(999, dtype=dtype)
        generic = OffloadedOptimizer(
            torch.optim.RMSprop, [p], nvme_path=nvme_dir, host_memory=SMALL
        )
        loss = (p.detach().requires_grad_() * p).sum()
        p.grad = torch.ones_like(p)
        generic.step()
        generic.close()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_swapped_tensor_comes_back_as_it_was_and_can_be_trained(setting, nvme_dir):
    tensors = [torch.randn(5, 7), torch.randn(7, 5).t(), torch.arange(9), torch.randn(4).half()]
    with SETTINGS[setting](), TensorSwapper(nvme_dir) as swapper:
        for i, tensor in enumerate(tensors):
            swapper.swap_out(str(i), tensor).wait()
        back = [swapper.swap_in(str(i)).result() for i in range(4)]
        back += [swapper.swap_in(str(i), device="cpu").result() for i in range(4)]
    for tensor, found in zip(tensors * 2, back, strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        assert not found.is_inference()
    found = back[0].requires_grad_()
    (found * found).sum().backward()
    assert torch.equal(found.grad, 2 * tensors[0])


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_handle_moves_the_bytes_in_any_setting(setting, nvme_dir):
    source, example = torch.randn(999), torch.zeros(0, dtype=torch.int16)
    with SETTINGS[setting](), aio_handle(strict=True) as handle:
        locked = handle.new_cpu_locked_tensor(999, example)
        assert handle.sync_pwrite(source, str(nvme_dir / "file")) == 1
        target = source.clone()
        target.zero_()
        handle.read(target, str(nvme_dir / "file"), True)
        handle.pwrite(source, str(nvme_dir / "file"), True, False)
    assert torch.equal(target, source)
    assert locked.dtype == torch.int16
    assert locked.device.type == "cpu"
    assert not locked.is_inference()
    assert not locked.any()
    copy = torch.zeros(999)
    with SETTINGS[setting]():
        deepspeed_memcpy(copy, source)
    assert torch.equal(copy, source)


def test_a_fake_tensor_mode_is_refused_by_its_name(nvme_dir):
    from torch._subclasses.fake_tensor import FakeTensorMode

    (p,) = parameters(999)
    p.grad = torch.ones(999)
    where = {"nvme_path": nvme_dir, "host_memory": SMALL}
    optimizer = OffloadedAdamW([p], **where)
    generic = OffloadedOptimizer(torch.optim.RMSprop, [p], **where)
    swapper = TensorSwapper(nvme_dir)
    swapper.swap_out("key", p).wait()
    before = p.detach().clone()
    calls = [
        lambda: OffloadedAdamW([p], **where),
        lambda: OffloadedOptimizer(torch.optim.RMSprop, [p], **where),
        lambda: swapper.swap_out("other", p),
        lambda: swapper.swap_in("key"),
    ]
    for each in (optimizer, generic):
        calls += [each.step, each.state_dict, each.plan]
        calls += [lambda each=each: each.load_state_dict({"state": {}, "param_groups": []})]
    for call in calls:
        with FakeTensorMode(), pytest.raises(RuntimeError, match="FakeTensorMode is active"):
            call()
    assert torch.equal(p, before)
    for each in (optimizer, generic):
        each.step()
        each.close()
    swapper.close()
    assert not torch.equal(p, before)


def test_modes_that_only_look_on_are_left_alone(nvme_dir):
    from torch.utils.flop_counter import FlopCounterMode

    ours, theirs = parameters(999), parameters(999)
    native = torch.optim.AdamW(theirs, fused=True)
    optimizer = OffloadedAdamW(ours, nvme_path=nvme_dir, host_memory=SMALL)
    for tensors in (ours, theirs):
        tensors[0].grad = torch.ones(999)
    with FlopCounterMode(display=False):
        optimizer.step()
        saved = optimizer.state_dict()["state"][0]
    native.step()
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(saved["exp_avg"], native.state[theirs[0]]["exp_avg"])
    optimizer.close()


def test_a_batched_tensor_of_a_transform_is_refused(nvme_dir):
    with TensorSwapper(nvme_dir) as swapper:

        def out(row):
            swapper.swap_out("key", row)
            return row

        with pytest.raises(TypeError, match="swap_out: subclass or wrapper"):
            torch.func.vmap(out)(torch.ones(2, 3))
