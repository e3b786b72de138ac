"""Commits that go on behind the caller: ``commit(wait=False)``.

The reference is the same training without commits, and what its parameters and state were at
the moment of the commit.
"""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from test_commit import bits, equal, options, the_same_state

from torch_ext import Commit, OffloadedAdamW, OffloadedOptimizer

BUDGETS = ["240KiB", "64MiB"]  # None or all of the state stays in memory.


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 300), torch.nn.Tanh(), torch.nn.Linear(300, 33)
    )
    return model.to(dtype)


def train(model, optimizer, steps):
    for _ in range(steps):
        x = torch.randn(16, 64).to(model[0].weight.dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("host_memory", BUDGETS)
@pytest.mark.parametrize(
    ("dtype", "state_format"),
    [
        (torch.float32, "exact"),
        (torch.bfloat16, "exact"),
        (torch.float16, "bf16"),
        (torch.bfloat16, "int8"),
    ],
)
@pytest.mark.parametrize("overlap", [False, "update"])
def test_steps_that_do_not_wait_change_neither_the_run_nor_the_commit(
    tmp_path, dtype, state_format, overlap, host_memory
):
    more = {
        "state_format": state_format,
        "host_memory": host_memory,
        "overlap_backward": overlap,
        "seed": 7,
    }
    whole, at_commit = make_model(dtype), []
    with OffloadedAdamW(whole.parameters(), **options(tmp_path, **more)) as optimizer:
        torch.manual_seed(1)
        for _ in range(6):
            train(whole, optimizer, 2)
            at_commit.append((bits(whole), optimizer.state_dict()))
        train(whole, optimizer, 1)
        expected = bits(whole), optimizer.state_dict()

    model = make_model(dtype)
    with OffloadedAdamW(model.parameters(), **options(tmp_path, **more)) as optimizer:
        torch.manual_seed(1)
        for number in range(1, 7):
            train(model, optimizer, 2)
            done = optimizer.commit(extra=number, keep=2, wait=False)
            assert (done.generation, done.step) == (number, 2 * number)
        train(model, optimizer, 1)
        assert equal(bits(model), expected[0])
        the_same_state(optimizer.state_dict(), expected[1])
        done.wait()
        assert [commit.step for commit in optimizer.commits()] == [10, 12]
        optimizer.rollback(10)
        assert equal(bits(model), at_commit[4][0])
        the_same_state(optimizer.state_dict(), at_commit[4][1])

    second = make_model(dtype)
    with OffloadedAdamW.resume(tmp_path, second.parameters(), host_memory=host_memory) as found:
        assert (found.committed_step, found.committed_extra) == (12, 6)
        assert equal(bits(second), at_commit[5][0])
        the_same_state(found.state_dict(), at_commit[5][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_class_goes_on_beside_its_commits(tmp_path, kind, dtype):
    def make(path):
        model = make_model(dtype)
        torch.manual_seed(1)
        run = {"lr": 1e-3, "nvme_path": path, "host_memory": "240KiB"}
        return model, OffloadedOptimizer(kind, model.named_parameters(), **run)

    whole, optimizer = make(tmp_path)
    with optimizer:
        train(whole, optimizer, 5)
        at_commit = bits(whole), optimizer.state_dict()
        train(whole, optimizer, 3)
        expected = bits(whole), optimizer.state_dict()
    model, optimizer = make(tmp_path)
    with optimizer:
        for steps in (2, 3):
            train(model, optimizer, steps)
            optimizer.commit(wait=False)
        train(model, optimizer, 3)
        assert equal(bits(model), expected[0])
        the_same_state(optimizer.state_dict(), expected[1])
    second = make_model(dtype)
    found = OffloadedOptimizer.resume(
        tmp_path, kind, second.named_parameters(), host_memory="240KiB"
    )
    with found:
        assert found.committed_step == 5
        assert equal(bits(second), at_commit[0])
        the_same_state(found.state_dict(), at_commit[1])


def test_what_a_commit_says_is_known_when_it_is_done(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        train(model, optimizer, 1)
        waited_for = optimizer.commit(extra="first")
        assert waited_for.done()
        waited_for.wait_source(0)
        waited_for.wait(0)
        assert optimizer.commits()[0].done()
        optimizer.commits()[0].wait(timeout=None)
        train(model, optimizer, 1)
        done = optimizer.commit(7, extra="second", wait=False)
        assert (done.generation, done.step) == (2, 7)
        done.wait_source()
        done.wait()
        assert done.done()
        assert optimizer.commits() == [Commit(done.generation, done.step, done.time)]
        assert done.bytes_written == waited_for.bytes_written
        assert done.seconds > 0
        assert (optimizer.committed_step, optimizer.committed_extra) == (7, "second")
        for wrong, error in ((-1, ValueError), ("a", TypeError)):
            with pytest.raises(error, match="timeout must be None or"):
                done.wait(wrong)
            with pytest.raises(error, match="timeout must be None or"):
                waited_for.wait_source(wrong)
        # A commit in flight is no promise yet. It is one at the end.
        begun = optimizer.commit(8, wait=False)
        while not begun.done():
            assert optimizer.committed_step in (7, 8)
            time.sleep(1e-4)
        assert optimizer.committed_step == 8


class Ticket:
    """One whose end another thread notes while it is asked."""

    def __init__(self, elsewhere):
        self._elsewhere = elsewhere

    def done(self):
        elsewhere, self._elsewhere = self._elsewhere, lambda: None
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(0.5)  # It may have to wait for us.
        return True

    def wait(self, timeout):
        self.done()
        return self.report()

    wait_source = wait

    def report(self):
        return 1, 2, 3, 4, 5.0


@pytest.mark.parametrize("ask", [Commit.done, Commit.wait, Commit.wait_source])
def test_several_threads_may_ask_for_a_commit(ask):
    done = Commit(1, 2, None, _ticket=Ticket(lambda: done.wait()))
    ask(done)
    assert done == Commit(1, 2, 3, 4, 5.0)


def test_several_threads_may_ask_what_was_committed(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        begun = Commit(1, 2, None, _ticket=Ticket(lambda: optimizer.committed_step))
        optimizer._begun = [(begun, "extra")]
        assert (optimizer.committed_step, optimizer.committed_extra) == (2, "extra")


def test_parameters_may_be_changed_after_wait_source(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        train(model, optimizer, 2)
        noise = torch.randn(1000)
        kept = noise.clone()
        expected = bits(model)
        done = optimizer.commit(extra=noise, wait=False)
        done.wait_source()
        with torch.no_grad():
            noise.zero_()
            for p in model.parameters():
                p.zero_()
        done.wait()
        optimizer.rollback()
        assert equal(bits(model), expected)
        assert torch.equal(optimizer.committed_extra, kept)


def test_an_error_that_nobody_waited_for_is_raised_by_the_next_commit(tmp_path):
    model = make_model()
    optimizer = OffloadedAdamW(model.parameters(), **options(tmp_path))
    train(model, optimizer, 1)
    with pytest.raises(TypeError, match="extra"):
        optimizer.commit(extra=object(), wait=False)
    too_much = torch.zeros(2**23)
    with largest_file(2**24 + 2**23):  # It has 17 MiB.
        failed = optimizer.commit(extra=too_much, wait=False)
        for _ in range(2):
            with pytest.raises(OSError, match="Errno"):
                failed.wait()
        assert failed.done()
        assert failed.time is None
        train(model, optimizer, 1)
        optimizer.commit(extra=too_much, wait=False)
        train(model, optimizer, 1)
        with pytest.raises(OSError, match="Errno"):
            optimizer.commit()
        assert optimizer.committed_step is None
        optimizer.commit(wait=False)
        train(model, optimizer, 1)
        optimizer.commit(extra=too_much, wait=False)
        assert optimizer.committed_step == 3
        with pytest.raises(OSError, match="Errno"):
            optimizer.close()
    optimizer.close()
    with OffloadedAdamW.resume(tmp_path, make_model().parameters()) as found:
        assert found.committed_step == 3


@contextmanager
def largest_file(size):
    """A file that would be larger is an error, as on a full drive."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


CHILD = """
    import os, signal, sys, threading
    import torch
    from torch_ext import OffloadedAdamW

    path, after = sys.argv[1], float(sys.argv[2])
    parameters = [torch.nn.Parameter(torch.full((20000 + i,), float(i))) for i in range(4)]
    run = {"host_memory": "240KiB"}
    try:
        optimizer = OffloadedAdamW.resume(path, parameters, **run)
    except FileNotFoundError:
        optimizer = OffloadedAdamW(parameters, lr=1e-2, nvme_path=path, **run)
    begun = optimizer.committed_step or 0
    threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    before = None
    for step in range(begun, 100000):
        for i, p in enumerate(parameters):
            p.grad = torch.full_like(p, ((step * 7 + i) % 11) - 5.0)
        optimizer.step()
        commit = optimizer.commit(step + 1, wait=False)
        if before is not None:
            before.wait()
            print(before.step, flush=True)
        before = commit
"""


def test_after_a_kill_the_last_commit_that_was_waited_for_is_there(tmp_path):
    parameters = [torch.nn.Parameter(torch.full((20000 + i,), float(i))) for i in range(4)]
    reference = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
    made, acknowledged = 0, 0
    for kill in range(5):
        child = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CHILD), tmp_path, str(0.05 + 0.03 * kill)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert child.returncode == -signal.SIGKILL
        told = [int(line) for line in child.stdout.splitlines() if line.strip().isdigit()]
        acknowledged = max([acknowledged, *told])
        if not acknowledged:
            continue
        found = [torch.nn.Parameter(torch.zeros_like(p)) for p in parameters]
        with OffloadedAdamW.resume(tmp_path, found, host_memory="240KiB") as optimizer:
            at = optimizer.committed_step
            assert at >= acknowledged
            while made < at:
                for i, p in enumerate(parameters):
                    p.grad = torch.full_like(p, ((made * 7 + i) % 11) - 5.0)
                reference.step()
                made += 1
            assert equal(found, parameters)
            the_same_state(optimizer.state_dict(), reference.state_dict())
    assert acknowledged > 0


def test_what_is_in_flight_ends_before_the_process_does(tmp_path):
    code = """
        import sys
        import torch
        from torch_ext import OffloadedAdamW

        parameter = torch.nn.Parameter(torch.ones(50000))
        optimizer = OffloadedAdamW([parameter], nvme_path=sys.argv[1], host_memory="1MiB")
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        commit = optimizer.commit(5, wait=False)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), tmp_path]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")
    parameter = torch.nn.Parameter(torch.ones(50000))
    with OffloadedAdamW.resume(tmp_path, [parameter]) as optimizer:
        assert optimizer.committed_step == 5


def test_a_forked_child_cannot_wait(tmp_path):
    model = make_model()
    with OffloadedAdamW(model.parameters(), **options(tmp_path)) as optimizer:
        train(model, optimizer, 1)
        commit = optimizer.commit(wait=False)
        child = os.fork()
        if child == 0:
            try:
                commit.wait()
            except RuntimeError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        commit.wait()
