"""What offload() takes and refuses, and what befalls a model that is offloaded."""

from __future__ import annotations

import copy
import errno
import gc
import io
import itertools
import os
import pickle
import threading

import pytest
import torch
from torch import nn

import torch_ext

KIB = 1024


def layers(count=8, width=256):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


@pytest.fixture
def model():
    return layers()


def expected():
    return [p.detach().clone() for p in layers().parameters()]


def unchanged(model):
    now = list(model.parameters())
    return all(p.data_ptr() != 0 for p in now) and all(map(torch.equal, now, expected()))


def offload(model, directory, host_memory="1MiB", **options):
    return torch_ext.offload(model, directory, host_memory=host_memory, **options)


def in_threads(run):
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# What it refuses ---------------------------------------------------------------------------


def test_a_budget_below_two_parameters_names_the_largest_and_what_would_do(model, tmp_path):
    model.append(nn.Linear(256, 1024))
    with pytest.raises(ValueError, match=r"at least 2097152, twice the largest.*'8.weight'"):
        offload(model, tmp_path, host_memory=2 * KIB * KIB - 1)
    del model[8]
    assert unchanged(model)


def test_a_drive_without_room_leaves_the_model(tmp_path_factory):
    mount = tmp_path_factory.mktemp("small")
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=1m tmpfs {mount}") != 0:
        pytest.skip("needs the right to mount")
    try:
        model = layers()
        with pytest.raises(OSError, match="ENOSPC") as caught:
            offload(model, mount)
        assert caught.value.errno == errno.ENOSPC
        assert unchanged(model)
    finally:
        os.system(f"umount {mount}")


def test_a_directory_that_is_not_there_leaves_the_model(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        offload(model, tmp_path / "absent")
    assert unchanged(model)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda m: m.append(nn.Embedding.from_pretrained(torch.eye(300).to_sparse())),
            "Sparse",
        ),
    ],
)
def test_a_parameter_of_another_kind_is_named(change, text, model, tmp_path):
    change(model)
    with pytest.raises(TypeError, match=text):
        offload(model, tmp_path)


def test_what_is_no_module_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not list"):
        offload([torch.zeros(1)], tmp_path)


def test_a_second_offload_is_refused_and_changes_nothing(model, tmp_path):
    offload(model, tmp_path)
    with pytest.raises(RuntimeError, match="'0.weight' is offloaded already"):
        offload(model, tmp_path)
    with pytest.raises(RuntimeError, match="'1.weight' is offloaded already"):
        offload(nn.Sequential(nn.Linear(256, 256), model[0]), tmp_path)
    assert all(map(torch.equal, model.parameters(), expected()))


def test_hooks_of_libraries_that_move_parameters_are_refused(model, tmp_path):
    model[2]._hf_hook = object()
    with pytest.raises(RuntimeError, match="2 has hooks of accelerate"):
        offload(model, tmp_path)
    del model[2]._hf_hook
    assert unchanged(model)


def test_memory_that_something_else_shares_stays_and_the_plan_says_so(model, tmp_path):
    array = model[3].weight.detach().numpy()
    made = offload(model, tmp_path)
    plan = made.plan()
    assert "shared" in plan.staying["3.weight"]
    assert "3.weight: its memory is shared" in str(plan)
    with torch.no_grad():
        model[3].weight.mul_(2)
    assert (array == expected()[6].numpy() * 2).all()


def test_memory_of_a_file_or_of_other_processes_stays(model, tmp_path):
    path = tmp_path / "weights"
    mapped = torch.from_file(str(path), shared=True, size=256 * 256)
    model[0].weight = nn.Parameter(mapped.view(256, 256))
    del mapped
    reader, writer = torch.multiprocessing.Pipe(duplex=False)
    writer.send(torch.ones(256, 256))
    model[1].weight = nn.Parameter(reader.recv())
    made = offload(model, tmp_path)
    plan = made.plan()
    assert "of a file" in plan.staying["0.weight"]
    assert "other processes" in plan.staying["1.weight"]
    assert plan.staying_bytes == 2 * 2**18 + 8 * KIB
    assert set(plan.offloaded) == {f"{i}.weight" for i in range(2, 8)}
    with torch.no_grad():
        model[0].weight.fill_(3)
    assert path.read_bytes() == torch.full((256, 256), 3.0).numpy().tobytes()
    model(torch.ones(1, 256)).sum().backward()


def test_a_model_that_was_saved_before_is_offloaded(model, tmp_path):
    torch.save(model.state_dict(), io.BytesIO())
    kept = model[7].weight.untyped_storage()
    made = offload(model, tmp_path)
    assert set(made.plan().offloaded) == {f"{i}.weight" for i in range(7)}
    assert kept.data_ptr() == model[7].weight.data_ptr()
    made.close()
    torch.save(model.state_dict(), io.BytesIO())
    assert len(offload(model, tmp_path).plan().offloaded) == 7


def test_small_parameters_stay_and_have_addresses(model, tmp_path):
    made = offload(model, tmp_path)
    assert len(made.plan().offloaded) == 8
    assert set(made.plan().staying) == {f"{i}.bias" for i in range(8)}
    model[0].bias.detach().numpy()


# Raw access ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "access",
    [
        lambda w: w.data_ptr(),
        lambda w: w.detach().numpy(),
        lambda w: w.untyped_storage()[0],
        lambda w: w.detach().tolist(),
        lambda w: torch.save(w, io.BytesIO()),
        lambda w: w.share_memory_(),
        lambda w: torch.from_dlpack(w.detach()),
        lambda w: w.data.numpy(),
        lambda w: w.detach()[0].numpy(),
    ],
    ids=["data_ptr", "numpy", "storage", "tolist", "save", "share", "dlpack", "data", "view"],
)
@pytest.mark.parametrize("used", [False, True])
def test_whoever_takes_an_address_hears_the_name(access, used, model, tmp_path):
    offload(model, tmp_path)
    if used:
        model(torch.ones(1, 256))
    with pytest.raises(RuntimeError, match="'1.weight' is offloaded: .*gathered"):
        access(model[1].weight)
    assert all(map(torch.equal, model.parameters(), expected()))


def test_a_view_that_operators_use_has_no_address_either(model, tmp_path):
    offload(model, tmp_path)
    with torch.no_grad():
        view = model[0].weight.detach().t()
        view.sum()
        view.mul_(2)
    for access in (view.numpy, view.data_ptr, lambda: torch.from_dlpack(view)):
        with pytest.raises(RuntimeError, match="'0.weight' is offloaded"):
            access()
    assert torch.equal(view, 2 * expected()[0].t())


def test_gathered_parameters_have_addresses(model, tmp_path):
    made = offload(model, tmp_path)
    weight = model[2].weight
    with made.gathered(model[2]):
        assert weight.data_ptr() % 64 == 0
        assert (weight.detach().numpy() == expected()[4].numpy()).all()
    with made.gathered([weight], write=True):
        weight.detach().numpy()[:] = 3
    with pytest.raises(RuntimeError):
        weight.data_ptr()
    model(torch.ones(1, 256))
    assert torch.equal(weight, torch.full((256, 256), 3.0))


def test_a_block_of_gathered_ends_before_close_and_before_it_begins_again(model, tmp_path):
    made = offload(model, tmp_path)
    weight = model[2].weight
    with made.gathered(weight, write=True):
        weight.detach().numpy()[:] = 3
        with pytest.raises(RuntimeError, match="gathered, so they cannot"):
            made.close()
        weight.detach().numpy()[0] = 4
    gathered = made.gathered(weight)
    for _ in range(2):
        with gathered:
            with pytest.raises(RuntimeError, match=r"call gathered\(\) again"):
                gathered.__enter__()
            assert weight.data_ptr() != 0
    made.close()
    right = torch.full((256, 256), 3.0)
    right[0] = 4
    assert torch.equal(weight, right)


def test_what_cannot_be_gathered_or_is_dropped_does_not_stop_close(model, tmp_path):
    made = offload(model, tmp_path)
    made.gathered(model[0]).__enter__()
    with pytest.raises(MemoryError), made.gathered(model):
        pass
    made.close()
    assert unchanged(model)


def test_what_is_gathered_is_not_available_to_others(model, tmp_path):
    made = offload(model, tmp_path)
    with (
        pytest.raises(MemoryError, match="'0.weight', '1.weight', '2.weight', ..."),
        made.gathered(model),
    ):
        pass
    with (
        made.gathered(list(model.parameters())[:8]),
        pytest.raises(MemoryError, match="of which 1048576 are in use"),
    ):
        model(torch.ones(1, 256))
    model(torch.ones(1, 256))


def test_one_operator_with_all_parameters_is_a_memory_error(model, tmp_path):
    offload(model, tmp_path)
    model(torch.ones(1, 256)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, foreach=True)
    with pytest.raises(MemoryError, match="2097152 bytes are needed at once"):
        optimizer.step()


def test_it_can_be_printed(model, tmp_path):
    offload(model, tmp_path)
    assert repr(model[0].weight) == repr(layers()[0].weight)
    assert repr(model[0].weight.detach()[0]) == repr(layers()[0].weight.detach()[0])


def test_whether_it_is_shared_can_be_asked(model, tmp_path):
    shared = torch.ones(3).share_memory_()
    offload(model, tmp_path)
    assert not model[0].weight.is_shared()
    assert not model[0].weight.detach()[0].is_shared()
    with pytest.raises(RuntimeError, match=r"'0\.weight' is offloaded"):
        model[0].weight.untyped_storage().is_shared()
    assert shared.is_shared()
    assert shared.untyped_storage().is_shared()
    assert not model[0].bias.is_shared()


def test_it_makes_tensors_of_its_kind(model, tmp_path):
    offload(model, tmp_path)
    weight = model[0].weight
    assert torch.equal(weight.new_tensor([1, 2]), torch.tensor([1.0, 2.0]))
    assert weight.new([1.0]).tolist() == [1.0]
    assert weight.new_zeros(2).dtype == weight.dtype
    assert weight.type() == "torch.FloatTensor"
    with torch.no_grad():
        nn.init.trunc_normal_(weight)


@pytest.mark.parametrize(
    "access",
    [torch.Tensor.numpy, torch.Tensor.data_ptr, torch.from_dlpack, torch.Tensor.tolist],
)
def test_a_view_that_was_made_while_there_were_bytes_has_no_address_either(
    access, model, tmp_path
):
    made = offload(model, tmp_path)
    with made.gathered(model[0]):
        gathered = model[0].weight.detach()
        assert gathered.numpy()[0, 0] == expected()[0][0, 0]
    inside, _ = torch.unsafe_chunk(model[0].weight.detach(), 2)
    for view in (gathered, inside):
        with pytest.raises(RuntimeError, match="'0.weight' is offloaded"):
            access(view)
    made.close()
    assert access(gathered) is not None


def test_a_storage_without_bytes_makes_others(model, tmp_path):
    offload(model, tmp_path)
    assert model[0].weight.untyped_storage().new().nbytes() == 0


# Faults --------------------------------------------------------------------------------------


def scratch_files(directory):
    """The files without a name, each once."""
    found = {}
    for link in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{link}"
        if os.path.exists(path) and os.readlink(path).startswith(str(directory)):
            found[os.stat(path).st_ino] = path
    return found.values()


def swap_contents(directory):
    """Exchanges every byte of the scratch files with its complement."""
    for path in scratch_files(directory):
        with open(path, "r+b") as file:
            content = file.read()
            file.seek(0)
            file.write(bytes(255 - byte for byte in content))
            os.fsync(file.fileno())


@pytest.mark.parametrize("backward", [False, True])
def test_a_fault_is_an_os_error_and_the_same_step_works_afterwards(backward, model, tmp_path):
    offload(model, tmp_path)
    x = torch.ones(2, 256)
    loss = model(x).square().sum() if backward else None
    swap_contents(tmp_path)
    with pytest.raises(OSError, match="checksum") as caught:
        loss.backward() if backward else model(x)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename.startswith(str(tmp_path))
    swap_contents(tmp_path)
    model.zero_grad()
    reference = layers()
    for each in (model, reference):
        each(x).square().sum().backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)


def test_an_operator_that_fails_leaves_the_parameter(model, tmp_path):
    offload(model, tmp_path)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="must match"):
            model[0].weight.copy_(torch.ones(3, 3))
        with pytest.raises(RuntimeError):
            model[0].weight.normal_(0, -1)
    assert all(map(torch.equal, model.parameters(), expected()))


def test_a_forked_child_is_refused(model, tmp_path):
    offload(model, tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            model(torch.ones(1, 256))
            os.write(write, b"no error")
        except RuntimeError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    assert b"cannot be used in a forked child" in os.read(read, 1000)
    os.waitpid(child, 0)
    assert all(map(torch.equal, model.parameters(), expected()))


# Life ----------------------------------------------------------------------------------------


def test_close_brings_all_back(model, tmp_path):
    made = offload(model, tmp_path)
    view = model[0].weight.t()
    made.close()
    made.close()
    assert unchanged(model)
    assert torch.equal(view, expected()[0].t())
    assert model[0].weight.untyped_storage().resizable()
    with pytest.raises(RuntimeError, match="closed"):
        made.plan()
    offload(model, tmp_path)


def test_it_needs_no_handle(model, tmp_path):
    offload(model, tmp_path)
    gc.collect()
    assert all(map(torch.equal, model.parameters(), expected()))


def test_a_dropped_model_frees_its_space(tmp_path):
    model = layers()
    made = offload(model, tmp_path)
    model(torch.ones(1, 256)).sum().backward()
    model.state_dict()
    with pytest.raises(RuntimeError):
        torch.save(model[0].weight, io.BytesIO())
    del model
    gc.collect()
    offload(layers(), tmp_path)  # It looks for those that nobody has.
    assert made.plan().offloaded == {}


def test_a_parameter_that_gets_other_data_is_an_ordinary_one(model, tmp_path):
    made = offload(model, tmp_path)
    data = torch.full((256, 256), 2.0)
    view = model[0].weight.detach()
    model[0].weight.data = data
    model(torch.ones(1, 256))
    assert torch.equal(view, expected()[0])
    del view
    assert model[0].weight.data_ptr() == data.data_ptr()
    model.double()
    assert model[1].weight.dtype == torch.float64
    assert torch.equal(model[1].weight, expected()[2].double())
    offload(layers(), tmp_path)
    assert made.plan().offloaded == {}


def test_a_state_dict_is_a_copy_that_cannot_be_changed_in_silence(model, tmp_path):
    made = offload(model, tmp_path)
    state = model.state_dict()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(state["0.weight"], expected()[0])
    with pytest.raises(RuntimeError, match="inference tensor"):
        state["0.weight"].mul_(2)
    other = layers()
    other.load_state_dict(state)
    saved = io.BytesIO()
    torch.save(copy.deepcopy(state), saved)
    assert state["0.bias"].data_ptr() == model[0].bias.data_ptr()
    made.close()
    assert model.state_dict()["1.weight"].data_ptr() == model[1].weight.data_ptr()


def test_a_state_dict_with_keep_vars_has_the_parameters(model, tmp_path):
    offload(model, tmp_path)
    state = model.state_dict(keep_vars=True)
    assert all(state[name] is p for name, p in model.named_parameters())


def test_a_state_dict_keeps_what_is_conjugated_or_negated_when_it_is_read(tmp_path):
    model = nn.Module()
    torch.manual_seed(0)
    numbers = torch.randn(4, 128, 128, dtype=torch.complex64)
    model.conjugated = nn.Parameter(numbers[:2].clone().conj())
    model.negated = nn.Parameter(numbers[2:].clone().conj().imag)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    offload(model, tmp_path)
    state = model.state_dict()
    for name, value in expected.items():
        assert torch.equal(state[name], value)
        assert state[name].is_inference()
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved)["negated"], expected["negated"])


def test_copies_of_the_model_can_be_pickled(model, tmp_path):
    offload(model, tmp_path)
    copied = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(copied))
    assert b"torch_ext" not in pickle.dumps(copied)
    for each in (copied, loaded):
        assert all(map(torch.equal, each.parameters(), expected()))
        assert each.state_dict()["0.weight"].data_ptr() == each[0].weight.data_ptr()
    with pytest.raises(RuntimeError, match="'0.weight' is offloaded"):
        pickle.dumps(model)
    model.double()
    pickle.dumps(model)


def test_threads_may_use_one_model(model, tmp_path):
    offload(model, tmp_path)
    x = torch.randn(4, 256)
    with torch.no_grad():
        right = layers()(x)
        wrong = []

        def run():
            with torch.no_grad():
                for _ in range(20):
                    if not torch.equal(model(x), right):
                        wrong.append(1)

        in_threads(run)
    assert not wrong


def test_threads_may_use_two_models_in_any_order(tmp_path):
    a, b = layers(6), layers(6)
    for model in (a, b):
        offload(model, tmp_path, host_memory="600KiB")
    product = expected()[0] @ expected()[2]
    failures = []
    numbers = itertools.count()

    def run(i):
        try:
            with torch.no_grad():
                for _ in range(30):
                    first, second = (a, b) if i % 2 else (b, a)
                    if not torch.equal(first[0].weight @ second[1].weight, product):
                        failures.append("other bits")
        except Exception as error:
            failures.append(error)

    in_threads(lambda: run(next(numbers)))
    assert not failures


def test_threads_may_use_one_view(model, tmp_path):
    offload(model, tmp_path)
    view = model[0].weight.detach().t()
    others = [p.detach() for p in model.parameters()]
    right = expected()[0].t().sum()
    wrong = []

    def run():
        for i in range(60):
            if view.sum() != right:
                wrong.append(1)
            others[i % len(others)].sum()

    in_threads(run)
    assert not wrong
    with pytest.raises(RuntimeError):
        view.data_ptr()


def test_it_stays_below_its_budget_and_reads_ahead(tmp_path):
    model = layers(24)
    made = offload(model, tmp_path, host_memory="2MiB")
    x = torch.randn(4, 256)
    for _ in range(3):
        model(x)
    before = made.stats()
    for _ in range(5):
        model(x)
    after = made.stats()
    assert after["host_bytes_peak"] <= after["host_bytes"] == 2**21
    assert after["foreseen"] - before["foreseen"] == after["touches"] - before["touches"] == 120
    assert after["bytes_written"] == before["bytes_written"]
    # Five of 24 stay, so 19 are read in each pass, and one more or less at its ends.
    assert after["resident_bytes"] == 5 * 2**18
    assert (after["bytes_read"] - before["bytes_read"]) / 2**18 <= 5 * 19 + 3
