"""TensorSwapper on CPU tensors: what a user may give it, and what comes back."""

import copy
import gc
import os
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torch_ext
from torch_ext import TensorSwapper

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
    torch.float8_e4m3fn,
    torch.bits16,
]


@pytest.fixture
def swapper(nvme_dir):
    with TensorSwapper(nvme_dir, host_memory="16MiB") as swapper:
        yield swapper


def bytes_of(tensor):
    packed = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(packed.flatten().view(torch.uint8).numpy()) if packed.numel() else b""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(swapper, dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    tensor = torch.randint(0, 256, (1001 * size,), dtype=torch.uint8).view(dtype)
    swapper.swap_out("x", tensor)
    back = swapper.swap_in("x").result()
    assert back.dtype == dtype
    assert bytes_of(back) == bytes_of(tensor)


@pytest.mark.parametrize("size", [0, 1, 1000, 4095, 4096, 4097, 1 << 20, (5 << 20) + 3])
def test_sizes_come_back_exactly(swapper, size):
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8)
    swapper.swap_out("x", tensor).wait()
    assert torch.equal(swapper.swap_in("x").result(), tensor)


def test_zero_dim_empty_and_many_dims(swapper):
    for tensor in [torch.tensor(3.5), torch.empty(0, 7), torch.randn(2, 1, 3, 1, 5)]:
        swapper.swap_out("x", tensor)
        back = swapper.swap_in("x").result()
        assert back.shape == tensor.shape
        assert torch.equal(back, tensor)


VIEWS = {
    "slice": lambda base: base[3:17],
    "columns": lambda base: base[:, 5:9],
    "transposed": lambda base: base.t(),
    "strided": lambda base: base[::3, ::2],
    "channels_last": lambda base: base.view(8, 4, 6, 16).permute(0, 3, 1, 2),
    "scalar": lambda base: base[2, 3],
    "conjugate": lambda base: torch.view_as_complex(base.view(64, 24, 2)).conj(),
    "negative": lambda base: torch.view_as_complex(base.view(64, 24, 2)).conj().imag,
    "expanded": lambda base: base[:1].expand(10, 48),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_stored_as_exactly_its_elements(swapper, name):
    tensor = VIEWS[name](torch.randn(64, 48))
    swapper.swap_out("x", tensor).wait()
    assert swapper.stats()["bytes_out"] == tensor.numel() * tensor.element_size()
    assert torch.equal(swapper.swap_in("x").result(), tensor)


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "expanded"])
def test_out_may_be_any_view_and_only_its_elements_change(swapper, name):
    base = torch.randn(64, 48)
    model = base.clone()
    out = VIEWS[name](base)
    value = torch.randn(out.shape, dtype=out.dtype)
    VIEWS[name](model).copy_(value)
    swapper.swap_out("x", value)
    assert swapper.swap_in("x", out=out).result() is out
    assert torch.equal(base, model)


def test_out_belongs_to_autograd_no_more(swapper):
    weight = torch.randn(100, requires_grad=True)
    saved = weight * weight
    swapper.swap_out("x", torch.randn(100))
    swapper.swap_in("x", out=weight).wait()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    swapper.swap_out("x", weight).wait()
    assert not swapper.swap_in("x").result().requires_grad


def test_inference_tensors_work_both_ways(swapper):
    with torch.inference_mode():
        tensor = torch.randn(50)
        swapper.swap_out("x", tensor)
        out = torch.empty(50)
        swapper.swap_in("x", out=out).wait()
    assert torch.equal(out, tensor)


def test_a_numpy_array_may_be_dropped_by_its_owner(swapper):
    for _ in range(20):
        array = np.random.rand(100_000)
        expected = array.copy()
        ticket = swapper.swap_out("x", torch.from_numpy(array))
        del array
        ticket.wait()
    assert np.array_equal(swapper.swap_in("x").result().numpy(), expected)


def test_after_wait_source_the_tensor_may_be_overwritten(swapper):
    tensor = torch.arange(3_000_000)
    for _ in range(10):
        swapper.swap_out("x", tensor).wait_source(timeout=60)
        expected = tensor.clone()
        tensor.add_(1)
        assert torch.equal(swapper.swap_in("x").result(timeout=60), expected)


def test_what_is_prefetched_arrives_beside_what_is_needed(swapper):
    later, now = torch.randn(1 << 20), torch.randn(1 << 16)
    swapper.swap_out("later", later)
    swapper.swap_out("now", now)
    prefetched = swapper.swap_in("later", prefetch=True)
    assert torch.equal(swapper.swap_in("now", prefetch=False).result(), now)
    assert torch.equal(prefetched.result(), later)
    with pytest.raises(TypeError):
        swapper.swap_in("now", None, None, True)


def test_a_value_is_read_many_times_rewritten_with_another_shape_and_deleted(swapper):
    swapper.swap_out("x", torch.arange(10))
    for _ in range(3):
        assert torch.equal(swapper.swap_in("x").result(), torch.arange(10))
    swapper.swap_out("x", torch.ones(3, 4))
    ticket = swapper.swap_in("x")
    assert ticket.result().shape == (3, 4)
    while not ticket.done():
        pass
    assert swapper.keys() == ["x"]
    assert "x" in swapper
    assert len(swapper) == 1
    swapper.remove("x")
    assert swapper.keys() == []
    assert "x" not in swapper
    assert swapper.stats()["disk_bytes_allocated"] == 0
    with pytest.raises(KeyError, match="'x'"):
        swapper.swap_in("x")
    with pytest.raises(KeyError, match="'x'"):
        swapper.remove("x")


class Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.randn(4, 4).to_sparse(), id="sparse"),
        pytest.param(lambda: torch.randn(4, 4).to_sparse_csr(), id="sparse_csr"),
        pytest.param(lambda: torch.empty(4, device="meta"), id="meta"),
        pytest.param(
            lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
            id="quantized",
        ),
        pytest.param(lambda: torch.nested.nested_tensor([torch.randn(2)]), id="nested"),
        pytest.param(lambda: torch.randn(4).to_mkldnn(), id="mkldnn"),
        pytest.param(
            lambda: torch.Tensor._make_wrapper_subclass(Subclass, (4,)), id="wrapper_subclass"
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_memory_are_refused(swapper, make):
    with pytest.raises(TypeError, match="swap_out"):
        swapper.swap_out("x", make())
    swapper.swap_out("x", torch.randn(4))
    with pytest.raises((TypeError, ValueError)):
        swapper.swap_in("x", out=make())
    assert swapper.keys() == ["x"]


def test_wrong_arguments_get_clear_errors(swapper):
    swapper.swap_out("x", torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"shape.*\[4, 3\].*\[3, 4\]"):
        swapper.swap_in("x", out=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="dtype.*Float.*Double"):
        swapper.swap_in("x", out=torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="share memory"):
        swapper.swap_in("x", out=torch.zeros(1, 3).expand(4, 3))
    with pytest.raises(ValueError, match="share memory"):
        swapper.swap_in("x", out=torch.zeros(20).as_strided((4, 3), (1, 1)))
    apart = torch.zeros(40)
    swapper.swap_in("x", out=apart.as_strided((4, 3), (2, 11))).wait()
    assert torch.equal(apart.as_strided((4, 3), (2, 11)), swapper.swap_in("x").result())
    assert swapper.swap_in("x", out=torch.zeros(4, 3), device="cpu:0").result().is_cpu
    with pytest.raises(ValueError, match="device"):
        swapper.swap_in("x", out=torch.zeros(4, 3), device="meta")
    for bad in [[1, 2], None, np.zeros(3)]:
        name = type(bad).__name__
        with pytest.raises(TypeError, match=f"^tensor must be a torch.Tensor, not {name}$"):
            swapper.swap_out("y", bad)
    with pytest.raises(TypeError, match=r"^out must be a torch.Tensor, not list$"):
        swapper.swap_in("x", out=[1])
    for call in [
        lambda: swapper.swap_out(3, torch.zeros(1)),
        lambda: swapper.swap_in(3),
        lambda: swapper.remove(3),
    ]:
        with pytest.raises(TypeError, match="^a key must be a str, not int$"):
            call()
    with pytest.raises(ValueError, match=r"key '\\udc80' cannot be written in UTF-8"):
        swapper.swap_out("\udc80", torch.zeros(1))
    ticket = swapper.swap_in("x")
    for wait in (ticket.wait, ticket.wait_source, ticket.result):
        for bad in [-1, float("nan")]:
            with pytest.raises(ValueError, match=f"timeout must be None or >= 0, got {bad}"):
                wait(timeout=bad)
        with pytest.raises(TypeError, match="^timeout must be None or a number, not 'soon'$"):
            wait(timeout="soon")
    assert swapper.keys() == ["x"]


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        (
            {"host_memory": "1KiB"},
            ValueError,
            "host_memory is 1 KiB.*raise host_memory to 1 MiB, or lower block_size, .* 1 MiB$",
        ),
        ({"host_memory": "lots"}, ValueError, "lots"),
        ({"host_memory": 1.5}, TypeError, "1.5"),
        ({"engine": "warp"}, ValueError, "warp"),
        ({"engine": None}, TypeError, "^engine must be a str such as 'auto'.*not NoneType$"),
        ({"directory": ""}, ValueError, "^directory is empty"),
        ({"directory": b""}, ValueError, "^directory is empty"),
        ({"directory": "a\0b"}, ValueError, r"^directory has a NUL character: 'a\\x00b'$"),
        ({"directory": "\ud800"}, ValueError, r"^directory has a character .*'\\ud800'$"),
        ({"directory": 3}, TypeError, "^directory must be a str or os.PathLike, not int$"),
        (
            {"config": {"block_size": "1MB"}},
            ValueError,
            "block_size must be a multiple of 4096 .*, got 1000000: 1003520 is the next",
        ),
        ({"config": {"aio": {"queue_depth": 0}}}, ValueError, "queue_depth"),
    ],
)
def test_construction_says_what_is_wrong(nvme_dir, kwargs, error, match):
    with pytest.raises(error, match=match):
        TensorSwapper(**{"directory": nvme_dir} | kwargs)


@pytest.mark.parametrize("block_size", [4096, 12288, 1 << 20, 1003520, 1 << 30])
def test_every_block_size_of_the_range_works_with_host_memory_for_one(nvme_dir, block_size):
    config = {"block_size": block_size}
    source = torch.arange(50_001).to(torch.uint8)[1:]
    for host_memory in (block_size, block_size + 1, 2 * block_size):
        with TensorSwapper(nvme_dir, config, host_memory=host_memory) as swapper:
            swapper.swap_out("x", source)
            assert torch.equal(swapper.swap_in("x").result(), source)
            assert swapper.stats()["host_bytes"] <= host_memory
    with pytest.raises(ValueError, match="host_memory.*block_size"):
        TensorSwapper(nvme_dir, config, host_memory=block_size - 1)


def test_directories_that_cannot_be_used_give_oserrors(nvme_dir):
    with pytest.raises(FileNotFoundError) as info:
        TensorSwapper(nvme_dir / "none")
    assert "none" in info.value.filename
    (nvme_dir / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        TensorSwapper(nvme_dir / "file")
    with pytest.raises(TypeError):
        TensorSwapper(3)


@pytest.mark.parametrize("engine", ["libaio", "io_uring", "threads", "memory"])
def test_engines_and_knobs_give_the_same_bytes(nvme_dir, engine):
    config = {
        "aio": {
            "block_size": "8K",
            "queue_depth": 3,
            "thread_count": 2,
            "single_submit": True,
            "overlap_events": False,
        }
    }
    with TensorSwapper(nvme_dir, config, engine=engine, host_memory="1M") as swapper:
        assert swapper.engine == engine
        tensors = [torch.randn(n) for n in (1, 1000, 100_000, 1_000_000)]
        for i, tensor in enumerate(tensors):
            swapper.swap_out(str(i), tensor)
        for i, tensor in enumerate(tensors):
            assert torch.equal(swapper.swap_in(str(i)).result(), tensor)
        assert swapper.stats()["host_bytes_peak"] <= 1 << 20


def test_stats_count_bytes_and_operations(swapper):
    swapper.swap_out("x", torch.zeros(5000, dtype=torch.uint8)).wait()
    swapper.swap_in("x").wait()
    stats = swapper.stats()
    assert stats["bytes_out"] == stats["bytes_in"] == 5000
    assert stats["disk_bytes_written"] == stats["disk_bytes_read"] == 8192
    assert stats["operations"] == 2
    assert stats["failures"] == stats["in_flight"] == 0
    assert stats["host_bytes"] <= 16 << 20


def test_close_is_idempotent_frees_and_ends_all_use(nvme_dir):
    swapper = TensorSwapper(nvme_dir)
    swapper.swap_out("x", torch.randn(1000))
    swapper.close()
    swapper.close()
    for call in [
        lambda: swapper.swap_out("x", torch.randn(1)),
        lambda: swapper.swap_in("x"),
        lambda: swapper.remove("x"),
        swapper.keys,
    ]:
        with pytest.raises(RuntimeError, match="this swapper is closed"):
            call()
    assert swapper.stats()["bytes_out"] == 4000
    assert swapper.engine
    assert os.listdir(nvme_dir) == []


def test_leaving_the_block_by_an_exception_keeps_that_exception(nvme_dir):
    def body():
        with TensorSwapper(nvme_dir) as swapper:
            swapper.swap_out("x", torch.randn(1000))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()


def test_a_swapper_cannot_be_copied_or_pickled(swapper):
    for call in [lambda: copy.deepcopy(swapper), lambda: pickle.dumps(swapper)]:
        with pytest.raises(TypeError, match="process"):
            call()


def test_dropping_swapper_and_tickets_frees_descriptors_and_threads(nvme_dir):
    def held():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    TensorSwapper(nvme_dir).close()
    gc.collect()  # What earlier tests have left.
    before = held()
    for _ in range(20):
        swapper = TensorSwapper(nvme_dir, host_memory="8M")
        ticket = swapper.swap_out("x", torch.randn(1000))
        alive = weakref.ref(swapper)
        del swapper
        gc.collect()
        assert alive() is None
        assert ticket.done()
    assert held() == before


def test_threads_may_share_a_swapper(swapper):
    errors = []

    def work(name):
        try:
            for i in range(30):
                tensor = torch.full((10_000,), i)
                swapper.swap_out(name, tensor)
                assert torch.equal(swapper.swap_in(name).result(), tensor)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.slow
def test_a_tensor_beyond_two_gibibytes_comes_back(nvme_dir):
    tensor = torch.arange((5 << 28) // 2 + 3, dtype=torch.int32)
    assert tensor.nbytes > 1 << 31
    with TensorSwapper(nvme_dir, {"aio": {"block_size": "4M"}}) as swapper:
        swapper.swap_out("x", tensor).wait()
        back = swapper.swap_in("x").result()
        assert torch.equal(back, tensor)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 70_000)), max_size=12),
    st.randoms(),
)
def test_any_sequence_of_operations_matches_a_dict(swapper, steps, random):
    for key in list(swapper.keys()):
        swapper.remove(key)
    model = {}
    for key, size in steps:
        if key in model and random.random() < 0.5:
            assert torch.equal(swapper.swap_in(key).result(), model[key])
            if random.random() < 0.3:
                swapper.remove(key)
                del model[key]
        else:
            model[key] = torch.randint(0, 256, (size,), dtype=torch.uint8)
            swapper.swap_out(key, model[key])
    assert sorted(swapper.keys()) == sorted(model)
    for key, value in model.items():
        assert torch.equal(swapper.swap_in(key).result(), value)


def test_the_example_of_the_issue_runs(nvme_dir):
    config = torch_ext.get_aio_config({"aio": {"block_size": 1 << 20, "queue_depth": 32}})
    tensor = torch.randn(1000)
    with torch_ext.TensorSwapper(nvme_dir, config) as swapper:
        out = swapper.swap_out("layer.0", tensor)
        out.wait(timeout=60)
        assert torch.equal(swapper.swap_in("layer.0").result(), tensor)
        assert swapper.swap_out("layer.0", tensor).result() is None


@pytest.fixture
def drives(tmp_path, nvme_dir):
    paths = [nvme_dir, tmp_path / "a", tmp_path / "b"]
    for path in paths[1:]:
        path.mkdir()
    return paths


def test_tensors_are_striped_over_several_directories(drives):
    weighted = dict(zip(map(str, drives), (3, 2, 1), strict=True))
    tensors = [torch.randn(n) for n in (1, 1000, 3_000_000, 0)]
    for directory in (drives, tuple(drives), weighted):
        with TensorSwapper(directory, {"aio": {"block_size": 65536}}) as swapper:
            for i, tensor in enumerate(tensors):
                swapper.swap_out(str(i), tensor)
            for i, tensor in enumerate(tensors):
                assert torch.equal(swapper.swap_in(str(i)).result(), tensor)
            files = [
                os.readlink(link) for link in _open_files() if os.readlink(link).startswith("/")
            ]
            assert all(any(str(path) in file for file in files) for path in drives)


def _open_files():
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.islink(link)]


@pytest.mark.parametrize(
    ("directory", "error", "text"),
    [
        ([], ValueError, "directory names no directory"),
        ({}, ValueError, "directory names no directory"),
        (["/var/tmp", "/var/tmp"], ValueError, "directory has '/var/tmp' twice"),
        (["/var/tmp", 3], TypeError, "directory must be a str or os.PathLike, not int"),
        ({"/var/tmp": "2"}, TypeError, "weight of '/var/tmp' must be an int, not str"),
        ({"/var/tmp": True}, TypeError, "weight of '/var/tmp' must be an int, not bool"),
        ({"/var/tmp": 0}, ValueError, "must be from 1 to 100, got 0"),
        ({"/var/tmp": 10**30}, ValueError, "must be from 1 to 100, got 1000"),
        (["/var/tmp", "/nowhere"], FileNotFoundError, "/nowhere"),
    ],
)
def test_directories_that_make_no_sense_are_refused(directory, error, text):
    with pytest.raises(error, match=text):
        TensorSwapper(directory)


def test_the_chosen_engine_is_logged_once(nvme_dir, caplog, monkeypatch):
    monkeypatch.setattr("torch_ext._closable._engines_logged", set())
    with caplog.at_level("INFO", "torch_ext"):
        for _ in range(2):
            TensorSwapper(nvme_dir).close()
        TensorSwapper(nvme_dir, engine="threads").close()
    messages = [record.getMessage() for record in caplog.records]
    assert len([text for text in messages if text.startswith("I/O engine ")]) == 1
