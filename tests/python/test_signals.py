"""Handlers of signals that come at any line of a call: what they find, and what is left.

A signal is raised at each line of torch_ext that a call runs, one line after the other. The
handler saves, or raises. What there is to save then is what torch.optim has in memory, after
the same number of steps.
"""

import _thread
import contextlib
import ctypes
import errno
import functools
import gc
import operator
import os
import signal
import sys
import threading
import types

import pytest
import torch

import torch_ext
from torch_ext import OffloadedAdamW, OffloadedOptimizer, aio_handle
from torch_ext._native import _C
from torch_ext._quiet import undisturbed
from torch_ext.optim._overlap import TakenGradient

HERE = os.path.dirname(torch_ext.__file__)
SIZES = (700, 90, 300)


class Raised(BaseException):
    """As KeyboardInterrupt, which would end the tests if one got away."""


class Lines:
    """Calls ``then`` at one line of torch_ext, or collects all that are run.

    A line is (file, number, how often it has been run before: 0, or 1 for more).
    """

    def __init__(self, at=None, then=None):
        self.seen = {}
        self._at, self._then = at, then
        self._counts = {}

    def __enter__(self):
        gc.disable()  # What has been dropped runs lines of its own.
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)
        gc.enable()

    def _call(self, frame, event, _):
        inside = frame.f_code.co_filename.startswith(HERE)
        return self._line if inside else None

    def _line(self, frame, event, _):
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            count = self._counts[place] = self._counts.get(place, -1) + 1
            line = (*place, min(count, 1))
            if line not in self.seen:
                self.seen[line] = None
                if line == self._at:
                    self._then()
        return self._line


def lines_of(call):
    with Lines() as lines:
        call()
    assert len(lines.seen) > 5
    return list(lines.seen)


def some_of(lines, kind):
    """All; but fewer where a line takes long, since it needs a new optimizer."""
    return lines[:: {"generic": len(lines) // 8 + 1, "update": 2}.get(kind, 1)]


@contextlib.contextmanager
def handler(function, *numbers):
    before = {n: signal.signal(n, function) for n in numbers or [signal.SIGUSR1]}
    try:
        yield
    finally:
        for n, old in before.items():
            signal.signal(n, old)


class Handler:
    """Saves what there is, and raises if it shall."""

    def __init__(self, raises, save=lambda: None):
        self.raises, self.save = raises, save
        self.calls = 0
        self.saved = []

    def __call__(self, *_):
        self.calls += 1
        self.saved.append(self.save())
        if self.raises:
            raise Raised


def interrupted_at(line, call, raises, save=lambda: None):
    """Calls with a signal at the line; returns the handler, and whether the call ended."""
    found = Handler(raises, save)
    ended = False
    with handler(found):
        try:
            with Lines(line, lambda: signal.raise_signal(signal.SIGUSR1)):
                call()
            ended = True
        except Raised:
            assert raises
    return found, ended


# Optimizers -------------------------------------------------------------------------------


def gradient(i):
    return torch.linspace(-1, 2, SIZES[i]) * (i + 1)


def start(i):
    return torch.linspace(-3, 1, SIZES[i])


class Truth:
    """A parameter and its state after each number of steps, as torch has them in memory."""

    def __init__(self, optimizer_class, **options):
        self._all = []
        for i in range(len(SIZES)):
            p = torch.nn.Parameter(start(i))
            p.grad = gradient(i)
            self._all.append((p, optimizer_class([p], **options), []))

    def at(self, i, step):
        p, optimizer, history = self._all[i]
        if not history:
            history.append((p.detach().clone(), {}))
        while len(history) <= step:
            optimizer.step()
            state = {n: t.clone() for n, t in optimizer.state[p].items() if n != "step"}
            history.append((p.detach().clone(), state))
        return history[step]

    def fits(self, i, weight, state):
        """The number of steps after which the parameter and its state are these."""
        for step in [int(state["step"])] if "step" in state else range(999):
            there, expected = self.at(i, step)
            if torch.equal(weight, there):
                own = {n: t for n, t in state.items() if n != "step"}
                assert own.keys() == expected.keys(), (step, list(state))
                assert all(torch.equal(own[n], t) for n, t in expected.items())
                return step
        raise AssertionError("the parameter is that of no step")


class Run:
    """An optimizer with parameters whose gradients are the same in each step."""

    def __init__(self, kind, directory):
        self.ps = [torch.nn.Parameter(start(i)) for i in range(len(SIZES))]
        self.update = kind == "update"
        if kind == "generic":
            self.o = OffloadedOptimizer(
                torch.optim.SGD,
                self.ps,
                lr=1e-2,
                momentum=0.9,
                nvme_path=directory,
                host_memory="1MiB",
            )
        else:
            overlap = "update" if self.update else False
            self.o = OffloadedAdamW(
                self.ps,
                lr=1e-2,
                nvme_path=directory,
                host_memory="1MiB",
                overlap_backward=overlap,
            )

    def step(self):
        if self.update:
            sum((p * gradient(i)).sum() for i, p in enumerate(self.ps)).backward()
        else:
            for i, p in enumerate(self.ps):
                p.grad = gradient(i)
        self.o.step()
        self.o.zero_grad()

    def save(self):
        """As a user's handler: None where it is refused."""
        try:
            state = self.o.state_dict()["state"]
        except RuntimeError as error:
            if self.update and "is not complete" in str(error):
                return None
            raise
        return [
            (p.detach().clone(), {n: t.clone() for n, t in state.get(i, {}).items()})
            for i, p in enumerate(self.ps)
        ]

    def close(self):
        self.o.close()


@pytest.fixture(scope="module")
def truths():
    adamw = Truth(torch.optim.AdamW, lr=1e-2, fused=True)
    sgd = Truth(torch.optim.SGD, lr=1e-2, momentum=0.9)
    return {"adamw": adamw, "update": adamw, "generic": sgd}


def steps_of(saved, truth):
    return [truth.fits(i, *entry) for i, entry in enumerate(saved)]


KINDS = ["adamw", "update", "generic"]


@pytest.fixture
def one(request, nvme_dir):
    run = Run(request.param, nvme_dir)
    run.kind = request.param
    yield run
    run.close()


@pytest.mark.parametrize("raises", [False, True], ids=["saves", "raises"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_is_whole_at_each_line(kind, raises, nvme_dir, truths):
    run = Run(kind, nvme_dir)
    lines = lines_of(run.step)
    run.close()
    for line in some_of(lines, kind):
        run = Run(kind, nvme_dir)
        found, ended = interrupted_at(line, run.step, raises, run.save)
        assert found.calls == 1, line
        saved = [entry for entry in found.saved if entry is not None]
        if ended:
            saved.append(run.save())
            assert steps_of(saved[-1], truths[kind]) == [1, 1, 1], line
        if saved:
            steps = [steps_of(entry, truths[kind]) for entry in saved]
            assert all(len(set(entry)) == 1 for entry in steps), (line, steps)
        if not ended:
            # What backward had begun is ended by step(), for those that were taken.
            run.o.zero_grad()
            run.o.step()
            left = steps_of(run.save(), truths[kind])
            assert run.update or len(set(left)) == 1, (line, left)
            assert set(left) <= {0, 1}
            if kind == "adamw":
                assert [run.o.state[p].get("step", 0) for p in run.ps] == left
        run.close()


@pytest.mark.parametrize("one", KINDS, indirect=True)
def test_what_a_handler_saves_at_any_line_is_a_whole_step(one, truths):
    one.step()
    steps = 1
    for line in lines_of(one.step):
        steps += 1
        found, _ = interrupted_at(line, one.step, False, one.save)
        assert found.calls == 1, line
        for saved in (one.save(), *(entry for entry in found.saved if entry is not None)):
            got = steps_of(saved, truths[one.kind])
            assert len(set(got)) == 1, (line, got)
            assert got[0] in (steps, steps + 1), line


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_loaded_whole_or_not_at_all(kind, nvme_dir, truths):
    run = Run(kind, nvme_dir)
    run.step()
    early = run.o.state_dict()
    early_weights = [p.detach().clone() for p in run.ps]
    for _ in range(2):
        run.step()
    late = run.o.state_dict()
    late_weights = [p.detach().clone() for p in run.ps]

    def weights(values):
        with torch.no_grad():
            for p, value in zip(run.ps, values, strict=True):
                p.copy_(value)

    def state():
        # With the parameters that belong to it.
        saved = run.o.state_dict()["state"]
        return {i: {n: t.clone() for n, t in entry.items()} for i, entry in saved.items()}

    def which(saved):
        """The number of steps of a state, which all parameters have had."""
        for step, values in ((1, early_weights), (3, late_weights)):
            try:
                entries = [(values[i], saved[i]) for i in range(len(SIZES))]
                assert steps_of(entries, truths[kind]) == [step] * 3
            except AssertionError:
                continue
            return step
        raise AssertionError("a state that is neither")

    load = lambda: run.o.load_state_dict(early)  # noqa: E731
    lines = lines_of(load)
    for raises in (False, True):
        for line in lines:
            run.o.load_state_dict(late)
            found, _ = interrupted_at(line, load, raises, state)
            assert found.calls == 1
            assert [which(saved) for saved in found.saved] in ([1], [3]), line
            assert which(state()) == (1 if not raises else which(found.saved[0])), line
    weights(early_weights)
    run.o.load_state_dict(early)
    run.step()
    assert steps_of(run.save(), truths[kind]) == [2, 2, 2]
    run.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_is_added_whole_or_not_at_all(kind, nvme_dir, truths):
    def make():
        run = Run(kind, nvme_dir)
        last = run.ps.pop()
        options = {"lr": 1e-2, "nvme_path": nvme_dir, "host_memory": "1MiB"}
        if kind == "generic":
            run.o = OffloadedOptimizer(torch.optim.SGD, run.ps, momentum=0.9, **options)
        else:
            overlap = "update" if run.update else False
            run.o = OffloadedAdamW(run.ps, overlap_backward=overlap, **options)
        return run, lambda: run.o.add_param_group({"params": [last]}), last

    run, add, _ = make()
    lines = lines_of(add)
    run.close()
    for line in some_of(lines, kind):
        run, add, last = make()
        found, _ = interrupted_at(line, add, True)
        assert found.calls == 1
        assert len(run.o.param_groups) == len(run.o._slots) - 1
        if len(run.o.param_groups) == 1:
            add()
        run.ps.append(last)
        run.step()
        assert steps_of(run.save(), truths[kind]) == [1, 1, 1], line
        run.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_close_has_closed_or_can_be_called_again(kind, nvme_dir):
    run = Run(kind, nvme_dir)
    run.step()
    lines = lines_of(run.close)
    for line in lines:
        run = Run(kind, nvme_dir)
        run.step()
        found, _ = interrupted_at(line, run.close, True)
        assert found.calls == 1
        if not run.o._life.closed:
            run.step()
        run.close()
        with pytest.raises(RuntimeError, match="is closed"):
            run.step()


def test_zero_grad_gives_all_gradients_back_or_none(nvme_dir):
    run = Run("update", nvme_dir)

    def backward():
        sum((p * gradient(i)).sum() for i, p in enumerate(run.ps)).backward()

    def clear():
        run.o.zero_grad(set_to_none=False)

    backward()
    for line in lines_of(clear):
        run.o.zero_grad()
        run.o.step()
        backward()
        found, _ = interrupted_at(line, clear, True)
        assert found.calls == 1
        assert len({isinstance(p.grad, TakenGradient) for p in run.ps}) == 1, line
    run.o.zero_grad()
    run.o.step()
    run.close()


# Holding ----------------------------------------------------------------------------------


def test_a_closure_can_be_interrupted(nvme_dir, truths):
    run = Run("adamw", nvme_dir)

    def closure():
        signal.raise_signal(signal.SIGUSR1)
        raise AssertionError("the handler has not run")

    with handler(Handler(True)), pytest.raises(Raised):
        run.o.step(closure)
    assert steps_of(run.save(), truths["adamw"]) == [0, 0, 0]
    run.close()


def test_all_handlers_run_though_one_raises(nvme_dir):
    came = []
    numbers = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT]

    def note(number, frame):
        assert frame is not None
        came.append(number)
        if number in (signal.SIGINT, signal.SIGUSR1):
            raise Raised(number)

    class Signals(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for number in numbers:
                signal.raise_signal(number)

    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = OffloadedOptimizer(torch.optim.SGD, [p], momentum=0.9, nvme_path=nvme_dir)
    optimizer.step()
    optimizer._pieces._optimizer = Signals([torch.zeros(1)], lr=1e-3, momentum=0.9)
    with handler(note, *numbers):
        with pytest.raises(Raised) as raised:
            optimizer.step()
        assert all(signal.getsignal(number) is note for number in numbers)
    assert came == sorted(numbers)
    assert raised.value.args == (signal.SIGINT,)
    assert raised.value.__context__.args == (signal.SIGUSR1,)
    assert raised.value.__context__.__context__ is None
    assert optimizer.stats()["steps"] == 2
    optimizer.close()


def test_a_signal_from_anywhere_is_held():
    came = []

    @undisturbed
    def outer():
        @undisturbed
        def inner():
            _thread.interrupt_main(signal.SIGUSR1)

        inner()
        thread = threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGUSR2))
        thread.start()
        thread.join()
        came.append("end")

    with handler(lambda number, _: came.append(number), signal.SIGUSR1, signal.SIGUSR2):
        outer()
        assert came == ["end", signal.SIGUSR1, signal.SIGUSR2]


def test_what_is_raised_inside_and_what_a_handler_raises_are_both_told():
    @undisturbed
    def fails():
        signal.raise_signal(signal.SIGUSR1)
        raise ValueError("of the call")

    with handler(Handler(True)), pytest.raises(Raised) as raised:
        fails()
    assert isinstance(raised.value.__context__, ValueError)


def test_a_handler_that_is_set_inside_stays_and_may_be_set_back():
    came = []

    @undisturbed
    def sets():
        return signal.signal(signal.SIGUSR1, lambda *_: came.append("new"))

    def old(*_):
        came.append("old")

    @undisturbed
    def inside():
        signal.raise_signal(signal.SIGUSR1)
        came.append("inside")

    with handler(old):
        kept = sets()
        signal.raise_signal(signal.SIGUSR1)
        assert came == ["new"]
        signal.signal(signal.SIGUSR1, kept)
        signal.raise_signal(signal.SIGUSR1)
        assert came == ["new", "old"]
        inside()
        assert came == ["new", "old", "inside", "old"]
        assert signal.getsignal(signal.SIGUSR1) is old


def test_interrupted_system_calls_go_on_as_the_caller_has_chosen():
    def restarts():
        action = (ctypes.c_char * 152)()  # A handler, a mask of 128 bytes, the flags.
        assert ctypes.CDLL(None).sigaction(int(signal.SIGUSR1), None, action) == 0
        return int.from_bytes(action[136:140], "little") & 0x10000000  # SA_RESTART

    with handler(lambda *_: None):
        assert not restarts()
        signal.siginterrupt(signal.SIGUSR1, False)
        assert restarts()
        undisturbed(lambda: None)()  # signal.signal() resets it.
        assert restarts()


def test_other_threads_hold_nothing():
    came = []
    inside, done = threading.Event(), threading.Event()

    @undisturbed
    def wait():
        inside.set()
        assert done.wait(60)

    with handler(lambda *_: came.append("handler")):
        thread = threading.Thread(target=wait)
        thread.start()
        assert inside.wait(60)
        signal.raise_signal(signal.SIGUSR1)
        assert came == ["handler"]
        done.set()
        thread.join()


@pytest.mark.parametrize("raised", [Raised, ValueError])
def test_what_a_handler_raises_as_holding_begins_comes_out(raised):
    def fails(*_):
        raise raised

    held = _C.HeldSignals()
    # Between calls of C nobody runs the handler but signal.signal().
    call = operator.methodcaller("__call__")
    trip = functools.partial(_thread.interrupt_main, signal.SIGUSR1)
    with handler(fails):
        with pytest.raises(raised):
            list(map(call, [trip, held.__enter__]))
        assert signal.getsignal(signal.SIGUSR1) is fails
        with pytest.raises(raised):
            signal.raise_signal(signal.SIGUSR1)


# The handle -------------------------------------------------------------------------------


class Files:
    """In the place of the compiled files of a handle: what has "bad" in its name fails."""

    def __init__(self):
        self.failed = 0

    def read(self, path, offset, tensor, tickets):
        error = OSError(errno.EIO, "lost") if "bad" in str(path) else None
        self.failed += error is not None
        if "refused" in str(path):
            raise error
        tickets.append(types.SimpleNamespace(outcome=lambda timeout=None: error))

    def notes(self):
        return []

    def drop_deleted(self):
        pass

    def close(self):
        pass


X = torch.zeros(4)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "calls",
    [
        lambda handle: (handle.async_pread(X, "bad"), handle.wait()),
        lambda handle: handle.async_pread(X, "bad refused"),
        lambda handle: handle.read(X, "bad", False, 1),
        lambda handle: handle.sync_pread(X, "bad"),
        lambda handle: (handle.async_pread(X, "bad"), handle.sync_pread(X, "x")),
        lambda handle: (handle.async_pread(X, "bad"), handle.close()),
    ],
)
def test_no_failure_of_a_handle_is_lost_at_any_line(calls, strict, monkeypatch):
    def make():
        files = Files()
        monkeypatch.setattr("torch_ext._C.TensorFileTransfer", lambda *_: files)
        return files, aio_handle(strict=strict)

    def run(call, found):
        try:
            call()
        except Raised as raised:
            # Python's own way to tell of both.
            if isinstance(raised.__context__, OSError):
                found.append(raised.__context__)
        except OSError as error:
            found.append(error)

    _, first = make()
    lines = lines_of(lambda: run(lambda: calls(first), []))
    for line in lines:
        files, handle = make()
        found, interrupted = [], Handler(True)

        def traced():
            with Lines(line, lambda: signal.raise_signal(signal.SIGUSR1)):  # noqa: B023
                calls(handle)  # noqa: B023

        with handler(interrupted):
            run(traced, found)
        assert interrupted.calls == 1, line
        run(handle.close, found)
        found += handle.errors
        assert [str(error) for error in found] == ["[Errno 5] lost"] * files.failed, line


@pytest.mark.parametrize("raised", [OSError, ValueError])
def test_what_a_handler_raises_at_any_line_is_not_taken_for_a_failure(raised, monkeypatch):
    monkeypatch.setattr("torch_ext._C.TensorFileTransfer", lambda *_: Files())
    handle = aio_handle()

    def call():
        handle.async_pread(X, "x")

    def fails(*_):
        raise raised

    for line in lines_of(call):
        raise_here = Lines(line, lambda: signal.raise_signal(signal.SIGUSR1))
        with handler(fails), pytest.raises(raised), raise_here:
            call()
        assert handle.errors == []
