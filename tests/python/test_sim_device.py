"""The simulated device has to be as late and as unforgiving as these tests say.

Every other test on it trusts that.
"""

import os
import subprocess
import threading
from pathlib import Path

import forked_python
import pytest
import torch

FREED = torch.full((4,), 0xDB, dtype=torch.uint8).view(torch.float32).item()


def new_stream(device="sim"):
    return torch.Stream(device=device)


def current():
    return torch.accelerator.current_stream()


def host(tensor):
    """Queues a copy to host memory on the current stream; not done on return."""
    return torch.full(tensor.shape, -1.0).copy_(tensor, non_blocking=True)


@pytest.fixture
def held(sim):
    """A tensor of zeros, and a late kernel that will fill it with sevens."""
    tensor = torch.zeros(1000, device="sim")
    torch.accelerator.synchronize()
    sim.hold()
    tensor.fill_(7.0)
    return tensor


class TestStreams:
    def test_kernel_runs_late(self, sim, held):
        sim.settle()
        with new_stream():
            out = host(held)
            sim.settle()
        assert out[0] == 0.0  # Another stream, and no event: the old value.
        sim.release()
        assert held[0].item() == 7.0  # item() waits for the current stream.

    def test_work_of_one_stream_is_ordered(self, sim, held):
        out = host(held)
        sim.settle()
        assert out[0] == -1.0
        sim.release()
        sim.settle()
        assert out[0] == 7.0

    def test_event_orders_one_stream_after_another(self, sim, held):
        event = current().record_event()
        side = new_stream()
        side.wait_event(event)
        with side:
            out = host(held)
        sim.settle()
        assert out[0] == -1.0
        assert not event.query()
        assert not side.query()
        sim.release()
        side.synchronize()
        assert event.query()
        assert out[0] == 7.0

    def test_waiting_stream_keeps_the_version_of_the_event_it_asked_for(self, sim, held):
        event = torch.Event("sim")
        event.record()
        waits, other = new_stream(), new_stream()
        waits.wait_event(event)
        sim.hold(other)
        event.record(other)  # Not done, and nothing to those who wait.
        sim.release()
        sim.settle()
        assert waits.query()
        assert not event.query()
        sim.release(other)
        event.synchronize()

    def test_recording_again_later_does_not_make_an_old_wait_pass(self, sim, held):
        event = torch.Event("sim")
        event.record()
        waits = new_stream()
        waits.wait_event(event)
        event.record(new_stream())  # Done at once.
        sim.settle()
        assert event.query()
        assert not waits.query()

    def test_events_measure_time(self, sim):
        start, end = (
            torch.Event("sim", enable_timing=True),
            torch.Event("sim", enable_timing=True),
        )
        start.record()
        sim.sleep(0.02)
        end.record()
        end.synchronize()
        assert start.elapsed_time(end) >= 20

    def test_current_stream_is_the_threads_own(self, sim):
        seen = []
        with new_stream() as stream:
            thread = threading.Thread(target=lambda: seen.append(current()))
            thread.start()
            thread.join()
            assert current() == stream
        assert seen[0].stream_id == 0  # The default one.

    def test_devices_have_streams_of_their_own(self, sim, held):
        assert torch.accelerator.device_count() == 2
        other = torch.zeros(4, device="sim:1")
        other.fill_(3.0)
        assert other[0].item() == 3.0  # While sim:0 is held.
        copied = held.to("sim:1")
        sim.settle()
        assert not torch.accelerator.current_stream("sim:1").query()
        sim.release()
        assert copied[0].item() == 7.0


class TestCopies:
    def test_copy_to_the_host_is_made_late(self, sim):
        tensor = torch.full((8,), 5.0, device="sim")
        sim.hold_copies()
        out = host(tensor)
        event = current().record_event()
        sim.settle()
        assert out[0] == -1.0
        assert not event.query()
        sim.release_copies()
        event.synchronize()
        assert out[0] == 5.0

    def test_copy_from_the_host_reads_late(self, sim):
        source = torch.full((8,), 5.0)
        tensor = torch.zeros(8, device="sim")
        sim.hold_copies()
        tensor.copy_(source, non_blocking=True)
        source.fill_(6.0)  # Reused too early.
        sim.release_copies()
        assert tensor[0].item() == 6.0

    def test_host_memory_freed_in_flight_shows(self, sim):
        source = torch.full((8,), 5.0).pin_memory()
        tensor = torch.zeros(8, device="sim")
        sim.hold_copies()
        tensor.copy_(source, non_blocking=True)
        del source
        sim.release_copies()
        assert tensor[0].item() == FREED

    def test_device_memory_freed_in_flight_shows(self, sim):
        tensor = torch.full((8,), 5.0, device="sim")
        side = new_stream()
        side.wait_event(current().record_event())
        sim.hold_copies()
        with side:
            out = host(tensor)
        del tensor
        sim.settle()
        sim.release_copies()
        side.synchronize()
        assert out[0] == FREED
        assert sim.counts()["stale_copies"] == 1

    def test_blocking_copy_waits_for_its_stream(self, sim, held):
        timer = threading.Timer(0.05, sim.release, [current()])
        timer.start()
        assert held.cpu()[0] == 7.0
        timer.join()

    def test_copies_are_counted(self, sim):
        tensor = torch.zeros(8, device="sim")
        before = sim.counts()
        kept = host(tensor)  # A copy must not outlive its target.
        tensor.cpu()
        after = sim.counts()
        assert after["async_copies"] == before["async_copies"] + 1
        assert after["sync_copies"] == before["sync_copies"] + 1
        sim.await_copies(after["async_copies"])
        with pytest.raises(TimeoutError):
            sim.await_copies(after["async_copies"] + 1, timeout=0.01)
        assert kept[0] == 0.0

    @pytest.mark.parametrize("direction", ["out", "in"])
    def test_copies_convert_and_stride(self, sim, direction):
        source = torch.arange(12, dtype=torch.int32).reshape(3, 4)
        if direction == "out":
            out = torch.zeros(4, 3, dtype=torch.float64)
            out.copy_(source.to("sim").T, non_blocking=True)
            torch.accelerator.synchronize()
        else:
            device = torch.zeros(4, 3, dtype=torch.float64, device="sim")
            device.copy_(source.T, non_blocking=True)
            out = device.cpu()
        assert torch.equal(out, source.T.double())

    def test_failed_copy_shows_in_the_next_event_and_brings_no_bytes(self, sim):
        tensor = torch.full((8,), 5.0, device="sim")
        sim.fail_copy(1)
        first = host(tensor)
        before = current().record_event()
        second = host(tensor)
        failed = current().record_event()
        after = current().record_event()
        sim.settle()
        assert before.query()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="injected fault"):
                failed.query()
        with pytest.raises(RuntimeError, match="injected fault"):
            failed.synchronize()
        assert after.query()
        assert first[0] == 5.0
        assert second[0] == -1.0


class TestMemory:
    def test_freed_memory_is_overwritten_and_reused_at_once(self, sim):
        tensor = torch.full((1000,), 5.0, device="sim")
        address = tensor.data_ptr()
        del tensor
        again = torch.empty(1000, device="sim")
        assert again.data_ptr() == address
        assert again[0].item() == FREED

    def test_memory_is_freed_in_the_order_of_the_stream(self, sim, held):
        out = host(held)
        del held
        sim.release()
        sim.settle()
        assert out[0] == 7.0  # The copy was queued before the tensor died.

    def test_memory_of_one_stream_is_not_given_to_another(self, sim):
        tensor = torch.zeros(1000, device="sim")
        address = tensor.data_ptr()
        del tensor
        with new_stream():
            assert torch.empty(1000, device="sim").data_ptr() != address

    def test_record_stream_keeps_memory_until_that_stream_is_through(self, sim):
        tensor = torch.full((1000,), 5.0, device="sim")
        address = tensor.data_ptr()
        side = new_stream()
        side.wait_event(current().record_event())
        sim.hold(side)
        with side:
            out = host(tensor)
        tensor.record_stream(side)
        del tensor
        other = torch.empty(1000, device="sim")
        assert other.data_ptr() != address
        sim.release(side)
        side.synchronize()
        assert out[0] == 5.0
        assert torch.empty(1000, device="sim").data_ptr() == address

    def test_live_bytes_return_to_where_they_were(self, sim):
        before = sim.counts()["live_bytes"]
        tensor = torch.empty(1000, device="sim")
        assert sim.counts()["live_bytes"] > before
        del tensor
        assert sim.counts()["live_bytes"] == before

    def test_pinned_memory_is_known(self, sim):
        pinned = torch.ones(8).pin_memory()
        assert pinned.is_pinned()
        assert pinned[1:].is_pinned()
        assert not torch.ones(8).is_pinned()

    def test_storage_grows_and_keeps_its_bytes(self, sim):
        tensor = torch.full((4,), 5.0, device="sim")
        tensor.resize_(1000)
        assert tensor[3].item() == 5.0
        tensor.untyped_storage().resize_(0)
        assert tensor.untyped_storage().nbytes() == 0


class TestOperators:
    def test_operator_that_runs_on_the_cpu_waits_for_the_stream(self, sim, held):
        timer = threading.Timer(0.05, sim.release, [current()])
        timer.start()
        assert torch.equal((held + 1).cpu(), torch.full((1000,), 8.0))
        timer.join()

    def test_model_trains(self, sim):
        torch.manual_seed(0)
        layers = torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)
        model = torch.nn.Sequential(*layers).to("sim")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        inputs = torch.randn(64, 8).to("sim")
        wanted = inputs.sum(1, keepdim=True)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (model(inputs) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 5
        assert sim.counts()["stale_copies"] == 0

    def test_hooks_run_on_a_thread_of_autograd_as_on_a_gpu(self, sim):
        parameter = torch.nn.Parameter(torch.ones(4, device="sim"))
        threads = []
        parameter.register_post_accumulate_grad_hook(
            lambda _: threads.append(threading.current_thread())
        )
        (parameter * 2).sum().backward()
        assert threads != [threading.main_thread()]
        assert len(threads) == 1


def test_interpreter_ends_with_copies_in_flight(sim):
    script = """
import sys, torch, sim
sim.install()
tensor = torch.ones(1000, device="sim")
sim.hold_copies()
out = torch.empty(1000).copy_(tensor, non_blocking=True)
sim.sleep(0.05)
"""
    environment = os.environ | {
        "TORCH_EXT_SIM_LIBRARY": sim.library_path(),
        "PYTHONPATH": str(Path(sim.__file__).parent),
    }
    result = subprocess.run(
        [forked_python.python(), "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
