"""aio_handle: whose failure is reported to whom, when waits are cut short or meet.

The operations are fakes, which end when a test says so: the rules are Python's alone.
"""

import copy
import errno
import gc
import subprocess
import sys
import textwrap
import threading
import weakref

import forked_python
import pytest
import torch

from torch_ext import aio_handle

GUARD = 60


class Ticket:
    """The ticket of an operation that ends when it is told to. Threads: any."""

    def __init__(self):
        self.waiting = threading.Semaphore(0)
        self._ended = threading.Event()
        self._error = None

    def end(self, error=None):
        self._error = error
        self._ended.set()

    def end_at_last(self):
        self._ended.set()

    def done(self):
        return self._ended.is_set()

    def outcome(self, timeout=None):
        self.waiting.release()
        if not self._ended.wait(GUARD if timeout is None else timeout):
            raise TimeoutError("the operation did not end")
        # A new one each time, as from C++.
        return copy.copy(self._error)


class Files:
    """In the place of the compiled files of a handle."""

    def __init__(self):
        self.tickets = []
        self.on_start = lambda ticket: None
        self.unseen = None

    def write(self, path, offset, tensor, tickets):
        ticket = Ticket()
        self.tickets.append(ticket)
        tickets.append(ticket)
        self.on_start(ticket)

    read = write

    def notes(self):
        return []

    def drop_deleted(self):
        pass

    def close(self):
        for ticket in self.tickets:
            ticket.end_at_last()
        error, self.unseen = self.unseen, None
        if error is not None:
            raise error


@pytest.fixture
def files():
    return Files()


@pytest.fixture
def make(files, monkeypatch):
    def make(strict=False):
        monkeypatch.setattr("torch_ext._C.TensorFileTransfer", lambda *_: files)
        return aio_handle(strict=strict)

    return make


def in_thread(call, *arguments):
    """Calls in another thread; join() gives what was returned or raised."""

    class Call(threading.Thread):
        def run(self):
            try:
                self.outcome = call(*arguments)
            except BaseException as error:
                self.outcome = error

        def join(self):
            super().join(GUARD)
            assert not self.is_alive()
            return self.outcome

    thread = Call(daemon=True)
    thread.start()
    return thread


def lost():
    return OSError(errno.EIO, "lost")


X = torch.zeros(4)


@pytest.mark.parametrize("strict", [False, True])
def test_what_a_timed_out_wait_found_is_reported_by_the_next(make, files, strict):
    handle = make(strict)
    for _ in range(3):
        handle.async_pwrite(X, "x")
    first, second, third = files.tickets
    error = lost()
    first.end()
    second.end(error)
    for _ in range(2):
        with pytest.raises(TimeoutError, match="did not end"):
            handle.wait(timeout=0)
    assert handle.errors == []
    third.end()
    if strict:
        with pytest.raises(OSError, match="lost"):
            handle.wait()
        assert handle.errors == []
    else:
        assert handle.wait() == -1
        assert list(map(repr, handle.errors)) == [repr(error)]
    assert handle.wait() == 0


def test_a_wait_after_one_that_timed_out_counts_all(make, files):
    handle = make()
    for _ in range(3):
        handle.async_pwrite(X, "x")
    files.tickets[0].end()
    with pytest.raises(TimeoutError):
        handle.wait(timeout=0)
    for ticket in files.tickets[1:]:
        ticket.end()
    assert handle.wait() == 3


def test_what_a_timed_out_wait_has_validated_stays_so(make, files, nvme_dir):
    name = nvme_dir / "x"
    name.write_bytes(bytes(X.nbytes))
    handle = make()
    handle.pwrite(X, str(name), True, True)
    handle.async_pwrite(X, "y")
    files.tickets[0].end()
    with pytest.raises(TimeoutError):
        handle.wait(timeout=0)
    name.unlink()
    files.tickets[1].end()
    assert handle.wait() == 2


def test_close_raises_the_first_failure_that_no_wait_reported(make, files):
    handle = make()
    for _ in range(4):
        handle.async_pwrite(X, "x")
    errors = [OSError(errno.EIO, text) for text in ("first", "second")]
    files.tickets[1].end(errors[0])
    files.tickets[0].end()
    with pytest.raises(TimeoutError):
        handle.wait(timeout=0)
    files.tickets[2].end(errors[1])
    files.tickets[3].end()
    with pytest.raises(OSError, match="first"):
        handle.close()
    assert list(map(repr, handle.errors)) == [repr(errors[1])]
    handle.close()


def test_close_raises_what_only_the_files_know(make, files):
    handle = make()
    files.unseen = lost()
    with pytest.raises(OSError, match="lost"):
        handle.close()


def test_a_dropped_handle_logs_what_no_wait_reported(make, files, caplog):
    handle = make()
    handle.async_pwrite(X, "x")
    handle.async_pwrite(X, "x")
    files.tickets[0].end(lost())
    with pytest.raises(TimeoutError):
        handle.wait(timeout=0)
    files.tickets[1].end()
    del handle
    gc.collect()
    assert "nobody waited for" in caplog.text
    assert "lost" in caplog.text


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda handle: handle.sync_pwrite(X, "x"),
        lambda handle: handle.pread(X, "x", False, False),
        lambda handle: handle.write(X, "x", False),
    ],
)
def test_a_call_that_waits_learns_of_its_own_failure_beside_other_waits(
    make, files, strict, call
):
    handle = make(strict)
    handle.async_pwrite(X, "other")
    caller = in_thread(call, handle)
    other = files.tickets[0]
    while len(files.tickets) < 2:
        assert caller.is_alive()
    own = files.tickets[1]
    assert own.waiting.acquire(timeout=GUARD)
    waiter = in_thread(handle.wait)
    assert other.waiting.acquire(timeout=GUARD)
    own.end(lost())
    other.end()
    outcome = caller.join()
    if strict:
        assert isinstance(outcome, OSError)
        assert handle.errors == []
    else:
        assert outcome == -1
        assert [error.errno for error in handle.errors] == [errno.EIO]
    assert waiter.join() in (0, 1)
    assert handle.wait() == 0


def test_wait_takes_what_was_pending_when_it_was_called(make, files):
    handle = make()
    handle.async_pwrite(X, "x")
    first = files.tickets[0]
    waiter = in_thread(handle.wait)
    assert first.waiting.acquire(timeout=GUARD)
    handle.async_pwrite(X, "y")
    first.end()
    assert waiter.join() == 1
    files.tickets[1].end()
    assert handle.wait() == 1


def test_starting_an_operation_looks_at_no_other(make, files, monkeypatch):
    compared = []

    def equal(operation, other):
        compared.append(operation)
        return operation is other

    monkeypatch.setattr("torch_ext._handle_operations.Operation.__eq__", equal)
    handle = make()
    errors = [OSError(errno.EIO, str(number)) for number in range(100)]
    for error in errors:
        handle.async_pwrite(X, "x")
        files.tickets[-1].end(error)
    assert not compared
    assert handle.wait() == -1
    assert list(map(repr, handle.errors)) == list(map(repr, errors))


def test_two_waits_end_in_their_own_time_and_report_once(make, files):
    handle = make()
    handle.async_pwrite(X, "x")
    ticket = files.tickets[0]
    waiter = in_thread(handle.wait)
    assert ticket.waiting.acquire(timeout=GUARD)
    with pytest.raises(TimeoutError):
        handle.wait(timeout=0)
    second = in_thread(handle.wait)
    assert ticket.waiting.acquire(timeout=GUARD)
    assert ticket.waiting.acquire(timeout=GUARD)
    ticket.end(lost())
    assert sorted([waiter.join(), second.join()]) == [-1, 0]
    assert len(handle.errors) == 1


class HandlerError(Exception):
    """What the handler of a signal may raise."""


HANDLERS = [KeyboardInterrupt, HandlerError, RuntimeError, OSError, ValueError, TimeoutError]


@pytest.mark.parametrize("exception", HANDLERS)
@pytest.mark.parametrize(
    "call",
    [
        lambda handle: handle.read(X, "x", False, 1),
        lambda handle: handle.write(X, "x", True),
        lambda handle: handle.sync_pread(X, "x"),
        lambda handle: handle.pwrite(X, "x", False, False),
    ],
)
def test_a_call_that_is_interrupted_leaves_its_operation_to_wait(
    make, files, monkeypatch, exception, call
):
    def wait(ticket, timeout=None):
        raise exception

    handle = make()
    with monkeypatch.context() as patch:
        patch.setattr(Ticket, "outcome", wait)
        with pytest.raises(exception):
            call(handle)
    with pytest.raises(TimeoutError):
        handle.wait(timeout=0)
    files.tickets[0].end(lost())
    assert handle.wait() == -1
    assert [error.errno for error in handle.errors] == [errno.EIO]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("exception", HANDLERS)
@pytest.mark.parametrize(
    "call",
    [
        lambda handle: handle.async_pwrite(X, "x"),
        lambda handle: handle.sync_pread(X, "x"),
        lambda handle: handle.write(X, "x", False),
    ],
)
def test_what_a_handler_raises_as_an_operation_starts_is_not_its_failure(
    make, files, strict, exception, call
):
    def interrupt(_):
        raise exception("of a handler")

    handle = make(strict)
    files.on_start = interrupt
    with pytest.raises(exception, match="of a handler"):
        call(handle)
    assert handle.errors == []
    files.tickets[0].end()
    assert handle.wait() == 1


def test_ctrl_c_during_wait_leaves_all_to_the_next():
    script = """
        import os, signal, sys, threading
        sys.path[:0] = sys.argv[1:]
        import test_handle_waits as tests
        from torch_ext import _C, aio_handle

        files = tests.Files()
        _C.TensorFileTransfer = lambda *_: files
        handle = aio_handle(strict=True)
        for _ in range(3):
            handle.async_pwrite(tests.X, "x")
        good, bad, slow = files.tickets
        good.end()
        bad.end(tests.lost())

        interrupted = threading.Event()

        def once(*_):
            if not interrupted.is_set():
                interrupted.set()
                raise KeyboardInterrupt

        # Again until it is heard: Python's locks sleep through a signal that
        # comes just before they do.
        def interrupt():
            slow.waiting.acquire(timeout=tests.GUARD)
            while not interrupted.wait(0.1):
                os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGINT, once)
        threading.Thread(target=interrupt).start()
        try:
            handle.wait()
        except KeyboardInterrupt:
            print("interrupted")
        slow.end()
        try:
            handle.wait()
        except OSError as error:
            print(error.strerror)
        print(handle.wait(), handle.errors)
    """
    done = subprocess.run(
        [forked_python.python(), "-c", textwrap.dedent(script), *sys.path],
        capture_output=True,
        text=True,
        check=False,
        timeout=GUARD,
    )
    assert done.stdout == "interrupted\nlost\n0 []\n", done.stderr


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), MemoryError("none left"), KeyError("odd")]
)
def test_any_failure_of_an_operation_is_reported_once(make, files, strict, error):
    handle = make(strict)
    for _ in range(2):
        handle.async_pwrite(X, "x")
    files.tickets[0].end(error)
    files.tickets[1].end()
    if strict:
        with pytest.raises(type(error)):
            handle.wait()
    else:
        assert handle.wait() == -1
        assert list(map(repr, handle.errors)) == [repr(error)]
    assert handle.wait() == 0


def test_a_timeout_of_the_system_is_the_operations(make, files):
    handle = make()
    handle.async_pwrite(X, "x")
    files.tickets[0].end(TimeoutError(errno.ETIMEDOUT, "the server"))
    assert handle.wait(timeout=0) == -1
    assert handle.wait() == 0


@pytest.mark.parametrize("strict", [False, True])
def test_failures_keep_no_tensors(make, files, strict):
    handle = make(strict)
    files.on_start = lambda ticket: ticket.end(lost())
    gc.disable()
    try:
        for call in (
            lambda x: handle.sync_pwrite(x, "x"),
            lambda x: handle.write(x, "x", True),
            lambda x: (handle.pwrite(x, "x", True, True), handle.wait()),
            lambda x: handle.async_pwrite(x, "x\0"),
        ):
            tensor = torch.zeros(4)
            alive = weakref.ref(tensor)
            try:
                call(tensor)
            except (OSError, ValueError):
                assert strict
            del tensor
            assert alive() is None
    finally:
        gc.enable()
    assert len(handle.errors) == (0 if strict else 4)


def test_stored_failures_have_no_traceback_and_no_context(make, files):
    handle = make()
    handle.async_pwrite(X, "x")
    files.tickets[0].end(lost())
    try:
        raise KeyError("of the caller")
    except KeyError:
        handle.wait()
        handle.async_pwrite(X, "x\0")
    assert len(handle.errors) == 2
    for error in handle.errors:
        assert error.__traceback__ is None
        assert error.__context__ is None
        assert error.__cause__ is None


def test_a_strict_handle_stores_what_it_does_not_raise(make, files):
    handle = make(strict=True)
    for _ in range(3):
        handle.async_pwrite(X, "x")
    errors = [OSError(errno.EIO, text) for text in ("first", "second")]
    files.tickets[0].end(errors[0])
    files.tickets[1].end()
    files.tickets[2].end(errors[1])
    with pytest.raises(OSError, match="first"):
        handle.wait()
    assert list(map(repr, handle.errors)) == [repr(errors[1])]
    with pytest.raises(ValueError, match="NUL"):
        handle.async_pwrite(X, "x\0")
    assert list(map(repr, handle.errors)) == [repr(errors[1])]
