"""What OffloadedOptimizer refuses, and what follows an error."""

import copy
import errno
import gc
import os
import pickle
import signal

import pytest
import torch
from generic_support import GenericPair, Lion, Normalized
from optim_support import SMALL, equal, parameters, set_gradients, twins

from torch_ext import OffloadedAdamW, OffloadedOptimizer


@pytest.fixture
def make(nvme_dir):
    def make(cls, params=None, **options):
        params = parameters(10) if params is None else params
        options = {"nvme_path": nvme_dir, "host_memory": SMALL} | options
        return OffloadedOptimizer(cls, params, **options)

    return make


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (torch.optim.Adafactor, "Adafactor is not elementwise.*the state 'row_var' did not"),
        (Normalized, "Normalized is not elementwise.*bit for bit"),
        (torch.optim.LBFGS, "LBFGS cannot be run piece by piece.*closure"),
        (torch.optim.SparseAdam, "SparseAdam cannot be run piece by piece"),
        (torch.optim.Muon, "Muon cannot be run piece by piece.*2D"),
        (torch.optim.SGD, "SGD keeps no state with these options.*nothing to offload"),
    ],
)
def test_a_class_that_cannot_be_offloaded_is_refused_with_the_reason(make, cls, text):
    with pytest.raises(ValueError, match=text):
        make(cls, parameters((10, 10)), **({"momentum": 0.9} if cls is Normalized else {}))


def test_a_rate_that_begins_at_zero_hides_nothing(make):
    class Trusting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(p.norm(), alpha=-group["lr"])

    for rate in (0.0, torch.tensor(0.0)):
        with pytest.raises(ValueError, match="Trusting is not elementwise"):
            make(Trusting, lr=rate, momentum=0.9)


class Bounded(torch.optim.SGD):
    """Looks at a whole parameter, if that is larger than a bound."""

    def __init__(self, params, max_norm, **options):
        super().__init__(params, **options)
        self.param_groups[0].setdefault("max_norm", max_norm)
        self.defaults["max_norm"] = max_norm

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_((group["max_norm"] / p.grad.norm()).clamp(max=1))
        super().step(closure)


def test_a_number_that_makes_a_class_look_at_a_whole_parameter_is_tried_again(make):
    params = parameters(100)
    optimizer = make(Bounded, params, max_norm=1e30, momentum=0.9)
    set_gradients(params, seed=1)
    optimizer.step()
    optimizer.param_groups[0].update(lr=0.5, momentum=0.8)  # As schedules do.
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["max_norm"] = 1e5  # Only some gradients of a trial are larger.
    with pytest.raises(ValueError, match="Bounded is not elementwise"):
        optimizer.step()
    assert equal(before, params)


class Half(torch.optim.Optimizer):
    """Keeps something else for each piece than for the whole."""

    keep = staticmethod(lambda p: p.abs().mean())

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"buffer": torch.zeros_like(p), "kept": self.keep(p)}


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        (lambda p: p.abs().mean(), "the state 'kept' did not agree"),
        (lambda p: float(p.numel()), "the state 'kept' did not agree"),
        (lambda p: torch.zeros(3), "the state 'kept' did not agree"),
        (lambda p: torch.zeros_like(p, dtype=torch.int), "'kept' in torch.int32"),
        (lambda p: "text", "keeps 'kept', a str"),
    ],
)
def test_state_that_pieces_cannot_share_is_refused(make, keep, text):
    cls = type("Half", (Half,), {"keep": staticmethod(keep)})
    with pytest.raises(ValueError, match=text):
        make(cls)


def test_more_state_than_fits_is_refused(make):
    class Greedy(torch.optim.Optimizer):
        def __init__(self, params, fields):
            super().__init__(params, {"lr": 0.1, "fields": fields})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    for i in range(group["fields"]):
                        self.state[p][str(i)] = torch.zeros_like(p)

    make(Greedy, fields=5)
    with pytest.raises(ValueError, match="more tensors than the 5"):
        make(Greedy, fields=6)
    with pytest.raises(ValueError, match="one less for 16-bit"):
        make(Greedy, parameters(3, dtype=torch.bfloat16), fields=5)


@pytest.mark.parametrize(
    ("cls", "options", "error", "text"),
    [
        (torch.optim.Adam, {"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        (torch.optim.Adam, {"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter"),
        (torch.optim.Adam, {"rate": 1.0}, TypeError, "rate"),
        (torch.optim.Adam, {"differentiable": True}, ValueError, "differentiable=True"),
        (torch.optim.Adam, {"host_memory": "200KiB"}, ValueError, "host_memory must be at"),
        (torch.optim.Adam, {"engine": "steam"}, ValueError, "steam"),
        (torch.optim.Adam, {"nvme_path": None}, TypeError, "^nvme_path must be"),
        (torch.optim.Adam, {"params": []}, ValueError, "empty parameter list"),
        ("Adam", {}, TypeError, "optimizer_class must be a class.*not 'Adam'"),
        (torch.nn.Linear, {}, TypeError, "optimizer_class must be a class"),
        (OffloadedAdamW, {}, TypeError, "OffloadedAdamW keeps its state on NVMe by itself"),
    ],
)
def test_a_wrong_value_is_named(make, cls, options, error, text):
    with pytest.raises(error, match=text):
        make(cls, **options)


def test_a_missing_directory_is_an_oserror_with_its_name(make, nvme_dir):
    with pytest.raises(FileNotFoundError) as missing:
        make(torch.optim.Adam, nvme_path=nvme_dir / "missing")
    assert str(nvme_dir / "missing") in str(missing.value)


@pytest.mark.parametrize(
    ("tensor", "error", "text"),
    [
        (torch.zeros(3, dtype=torch.float64), TypeError, "dtype Double"),
        (torch.zeros(3, device="meta"), TypeError, "meta"),
        (torch.zeros(3).to_sparse(), TypeError, "Sparse"),
        (torch.zeros(6, 4)[:, ::2], ValueError, "not dense"),
    ],
    ids=str,
)
def test_a_parameter_that_cannot_be_optimized_is_refused(make, tensor, error, text):
    optimizer = make(torch.optim.Adam)
    with pytest.raises(error, match=text):
        optimizer.add_param_group({"params": [tensor.requires_grad_()]})
    assert len(optimizer.param_groups) == 1


def test_wrong_gradients_are_refused_before_anything_changes(make):
    plain, other = parameters(100, (10, 4))
    before = plain.detach().clone()
    optimizer = make(torch.optim.Adam, [plain, other])
    plain.grad = torch.ones(100)
    other.grad = torch.ones(10, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        optimizer.step()
    assert torch.equal(plain.detach(), before)
    assert optimizer.state == {}
    other.grad = torch.ones(10, 4)
    optimizer.step()
    assert optimizer.state[plain]["step"] == 1


def test_options_that_would_change_what_is_kept_are_refused_by_the_step(make):
    ours = parameters(100)
    optimizer = make(torch.optim.Adam, ours)
    set_gradients(ours, seed=0)
    optimizer.step()
    before = ours[0].detach().clone()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="'max_exp_avg_sq'.* with these options"):
        optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = False
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(ValueError, match="capturable=True is not supported"):
        optimizer.step()
    assert torch.equal(ours[0].detach(), before)
    optimizer.param_groups[0]["capturable"] = False
    optimizer.step()
    assert optimizer.state[ours[0]]["step"] == 2


def test_a_group_whose_options_break_it_is_refused(make):
    optimizer = make(torch.optim.SGD, momentum=0.9)
    with pytest.raises(ValueError, match="keeps no state"):
        optimizer.add_param_group({"params": parameters(3), "momentum": 0.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "change",
    [lambda p: p.to(torch.bfloat16), lambda p: p.reshape(20, 10), lambda p: p[:5].clone()],
    ids=["dtype", "shape", "size"],
)
def test_a_parameter_whose_kind_has_changed_needs_a_state(make, change):
    ours = parameters((10, 20))
    optimizer = make(torch.optim.Adam, ours)
    set_gradients(ours, seed=0)
    optimizer.step()
    state = optimizer.state_dict()
    ours[0].grad = None
    ours[0].data = change(ours[0].data)
    set_gradients(ours, seed=1)
    for attempt in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match="the state was made for a parameter with"):
            attempt()
    for name in ("exp_avg", "exp_avg_sq"):
        state["state"][0][name] = torch.zeros(ours[0].shape)
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.state[ours[0]]["step"] == 2


def test_a_parameter_put_in_place_of_another_is_checked_before_anything_changes(make):
    (own,) = parameters(10)
    stranger = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    optimizer = make(torch.optim.Adam, [("first", own)])
    set_gradients([own], seed=0)
    stranger.grad = torch.ones_like(stranger)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = stranger
    for attempt in (optimizer.step, optimizer.state_dict, optimizer.plan):
        with pytest.raises(TypeError, match="dtype Double"):
            attempt()
    optimizer.param_groups[0]["params"][0] = own
    optimizer.step()
    assert optimizer.state[own]["step"] == 2


def spoil_files(directory):
    """Overwrites the nameless files that this process has in a directory.

    All but the first tile: if that fails, nothing has changed, and a step may be tried again.
    Whether it has been read ahead by now depends on how busy the machine is.
    """
    begin = 2**20 + 2**16
    for link in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{link}"
        if os.path.exists(path) and os.readlink(path).startswith(str(directory)):
            with open(path, "r+b") as file:
                file.seek(begin)
                file.write(b"x" * (os.fstat(file.fileno()).st_size - begin))
                os.fsync(file.fileno())


def test_after_an_io_error_steps_are_refused_until_a_state_is_loaded(nvme_dir):
    pair = GenericPair(torch.optim.RMSprop, parameters(200_000), nvme_dir)
    pair.steps(2)
    state = pair.a.state_dict()  # All writes have ended.
    spoil_files(nvme_dir)
    set_gradients(pair.ours, seed=2)
    with pytest.raises(OSError, match="checksum"):
        pair.a.step()
    for attempt in (pair.a.step, pair.a.state_dict):
        with pytest.raises(OSError, match="the optimizer state may be half updated: load it"):
            attempt()
    for p, q in zip(pair.ours, pair.theirs, strict=True):
        p.data.copy_(q)
    pair.a.load_state_dict(state)
    pair.steps(2, first=5)
    assert pair.equal()


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        if _calls_left and next(_calls_left[0], None) is None:
            raise ArithmeticError("the class's own words")
        return super().step(closure)


_calls_left = []


def test_what_the_class_raises_comes_out_and_later_steps_are_refused(make, monkeypatch):
    ours = parameters(200_000)
    optimizer = make(Failing, ours, lr=0.1, momentum=0.9)
    set_gradients(ours, seed=0)
    optimizer.step()
    state = optimizer.state_dict()
    monkeypatch.setitem(globals(), "_calls_left", [iter(range(3))])
    with pytest.raises(ArithmeticError, match="^the class's own words$"):
        optimizer.step()
    with pytest.raises(
        RuntimeError, match="own words; the optimizer state may be half updated"
    ):
        optimizer.step()
    monkeypatch.undo()
    optimizer.load_state_dict(state)
    optimizer.step()


def test_ctrl_c_waits_for_the_end_of_the_step(nvme_dir):
    # A shell's background commands begin with it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    class Interrupted(torch.optim.SGD):
        def step(self, closure=None):
            signal.raise_signal(signal.SIGINT)
            return super().step(closure)

    ours = parameters(100_000)
    theirs = twins(ours)
    # The trial, at construction, is interrupted as anything is.
    a = OffloadedOptimizer(
        torch.optim.SGD, ours, lr=0.1, momentum=0.9, nvme_path=nvme_dir, host_memory=SMALL
    )
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    a._pieces._optimizer = Interrupted([torch.zeros(1)], lr=0.1, momentum=0.9)
    for seed in range(2):
        set_gradients(ours, theirs, seed=seed)
        with pytest.raises(KeyboardInterrupt):
            a.step()
        b.step()
    assert a.stats()["steps"] == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert equal(ours, theirs)


def test_a_full_disk_refuses_new_state_and_keeps_the_old(nvme_dir, monkeypatch):
    pair = GenericPair(torch.optim.Adam, parameters(60_000, 100_000), nvme_dir)
    pair.step(0, [0])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full:
        def __getattr__(self, name):
            return full if name == "step" else getattr(state, name)

    state = pair.a._offload._offload
    set_gradients(pair.ours, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(pair.a._offload, "_offload", Full())
        with pytest.raises(OSError, match="No space left on device"):
            pair.a.step()
    for seed in range(2, 4):
        pair.step(seed, [0])
    pair.step(4)
    assert pair.equal()


def test_a_closed_optimizer_refuses_steps_and_keeps_its_counters(make):
    ours = parameters(100)
    with make(torch.optim.Adam, ours) as optimizer:
        set_gradients(ours, seed=0)
        optimizer.step()
    optimizer.close()
    for attempt in (
        optimizer.step,
        optimizer.state_dict,
        optimizer.plan,
        lambda: optimizer.load_state_dict({"state": {}, "param_groups": []}),
        lambda: optimizer.add_param_group({"params": parameters(3)}),
    ):
        with pytest.raises(RuntimeError, match="this optimizer is closed"):
            attempt()
    assert optimizer.stats()["steps"] == 1
    assert len(optimizer.timeline()) > 0
    assert optimizer.engine


def test_a_forked_child_is_told_whose_optimizer_it_is(make):
    ours = parameters(100_000)
    optimizer = make(Lion, ours)
    set_gradients(ours, seed=0)
    optimizer.step()
    calls = [
        optimizer.step,
        optimizer.state_dict,
        lambda: optimizer.add_param_group({"params": parameters(3)}),
        optimizer.stats,
        optimizer.close,
    ]
    child = os.fork()
    if child == 0:
        refused = 0
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                refused += f"created in process {os.getppid()}" in str(error)
        del optimizer, calls, call
        gc.collect()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(calls)
    optimizer.step()
    assert optimizer.stats()["steps"] == 2


def test_it_cannot_be_copied_or_pickled(make):
    optimizer = make(torch.optim.Adam)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            attempt(optimizer)


class Counting(torch.optim.Optimizer):
    """Adds gradients up. It fails where it is told to, and may keep several sums."""

    fails_for = None

    def __init__(self, params, lr=0.1, sums=1):
        super().__init__(params, {"lr": lr, "sums": sums})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if Counting.fails_for is not None and Counting.fails_for(p):
                    raise ArithmeticError("told to fail")
                state = self.state[p]
                for i in range(group["sums"]):
                    state.setdefault(f"sum{i}", torch.zeros_like(p)).add_(p.grad)
                state["count"] = state.get("count", 0) + 1
                p.sub_(state["sum0"], alpha=group["lr"])


@pytest.mark.parametrize("first", [True, False], ids=["first step", "second step"])
def test_an_error_about_a_parameter_without_elements_finds_all_as_it_was(
    make, monkeypatch, first
):
    ours = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(0))]
    theirs = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(0))]
    offloaded, in_memory = make(Counting, ours), Counting(theirs)
    for p in (*ours, *theirs):
        p.grad = torch.ones_like(p)
    if not first:
        offloaded.step()
        in_memory.step()
    monkeypatch.setattr(Counting, "fails_for", lambda p: p.numel() == 0)
    with pytest.raises(ArithmeticError, match="told to fail"):
        offloaded.step()
    monkeypatch.setattr(Counting, "fails_for", None)
    assert len(offloaded.state_dict()["state"]) == (0 if first else 2)
    for optimizer in (offloaded, in_memory):
        optimizer.step()
    assert equal(ours, theirs)
    state = offloaded.state_dict()["state"]
    assert torch.equal(state[0]["sum0"], in_memory.state[theirs[0]]["sum0"])
    assert state[0]["count"] == in_memory.state[theirs[0]]["count"]


def test_what_a_failed_class_held_can_be_read_after_close(make, monkeypatch):
    p = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = make(Counting, [p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    monkeypatch.setattr(Counting, "fails_for", lambda p: True)
    with pytest.raises(ArithmeticError) as raised:
        optimizer.step()
    optimizer.close()
    held = []
    traceback = raised.value.__traceback__
    while traceback is not None:
        batch = traceback.tb_frame.f_locals.get("batch")
        if isinstance(batch, list) and batch and isinstance(batch[0], tuple):
            held += [field for piece in batch for field in piece[-1]]
        traceback = traceback.tb_next
    assert held
    assert all(bool((field == 1).all()) for field in held)


def test_a_refused_load_of_too_many_fields_leaves_the_state(make):
    p = torch.nn.Parameter(torch.ones(30))
    frozen = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)
    optimizer = make(Counting, [p, frozen], sums=5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    smaller = {f"sum{i}": torch.zeros(20) for i in range(5)} | {"count": 1}
    given = {f"sum{i}": torch.zeros(8) for i in range(5)} | {"count": 1}
    whole = p.data
    p.data = whole[:20]  # A load that went on would forget this one's state first.
    with pytest.raises(ValueError, match="more than 5 fields"):
        optimizer.load_state_dict({**saved, "state": {0: smaller, 1: given}})
    p.data = whole
    assert torch.equal(optimizer.state[p]["sum4"], torch.ones(30))


class Prepared(torch.optim.Optimizer):
    """Has state from the start, in another dtype where it is told to."""

    dtype = torch.float32

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                dtype = Prepared.dtype if p.numel() > 4 else torch.float32
                self.state[p]["sum"] = torch.full_like(p.detach(), 0.5, dtype=dtype)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["sum"].add_(p.grad)
                    p.sub_(self.state[p]["sum"], alpha=group["lr"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_first_state_unlike_that_of_the_trial_is_an_error(make, monkeypatch, dtype):
    p = torch.nn.Parameter(torch.zeros(50_000))
    optimizer = make(Prepared, [p])
    monkeypatch.setattr(Prepared, "dtype", dtype)
    with pytest.raises(RuntimeError, match="first state sum has .* unlike in the trial"):
        optimizer.state_dict()
    monkeypatch.setattr(Prepared, "dtype", torch.float32)
    assert torch.equal(optimizer.state_dict()["state"][0]["sum"], torch.full((50_000,), 0.5))
