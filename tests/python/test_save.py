"""torch_ext.save and torch_ext.load, beside the safetensors library and torch.

The format is also read here by hand: 8 bytes of length, JSON, the bytes of the tensors.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import forked_python
import pytest
import torch

import torch_ext

CORPUS = Path(__file__).resolve().parents[1] / "fuzz/corpus/safetensors"
MIB = 2**20

# What safetensors calls torch's dtypes.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
}


@pytest.fixture
def path(nvme_dir):
    return nvme_dir / "model.safetensors"


def tensor_of(dtype, *shape):
    """Any bits, NaNs too."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def raw(tensor):
    """The elements' bytes, in row-major order."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.flatten().view(torch.uint8).numpy().tobytes()


def some_of_everything():
    torch.manual_seed(0)
    tensors = {f"of {name}": tensor_of(dtype, 3, 5) for name, dtype in DTYPES.items()}
    return tensors | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "large": torch.randn(700, 1001),
        "large bytes": tensor_of(torch.uint8, 3 * MIB + 1),
        "transposed": torch.randn(1500, 901).t(),
        "every second": torch.randn(2000)[::2],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "conjugate": torch.randn(5, dtype=torch.complex64).conj(),
        "negative": torch.randn(5, dtype=torch.complex64).conj().imag,
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        'a name: " \\ \n é \U0001f600 \0': torch.ones(1),
    }


def assert_the_same(loaded, expected):
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        other = loaded[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert raw(other) == raw(tensor), name


def header_of(path):
    content = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_file(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_file_is_what_the_format_says(path):
    tensors = some_of_everything()
    torch_ext.save(tensors, path, metadata={"format": "pt"})
    header, data = header_of(path)
    assert (path.stat().st_size - len(data)) % 4096 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    assert list(header) == list(tensors)
    names = {dtype: name for name, dtype in DTYPES.items()}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        tensor = tensors[name]
        shape = list(tensor.shape)
        if tensor.dtype is torch.float4_e2m1fn_x2:
            shape[-1] *= 2
        assert (entry["dtype"], entry["shape"]) == (names[tensor.dtype], shape)
        begin, last = end, entry["data_offsets"][1]
        assert entry["data_offsets"][0] == begin
        assert begin % tensor.dtype.itemsize == 0
        assert data[begin:last] == raw(tensor), name
        end = last
    assert end == len(data)


@pytest.mark.parametrize("mmap", [False, True])
def test_what_was_saved_is_loaded_in_order(path, mmap):
    tensors = some_of_everything()
    torch_ext.save(tensors, path)
    loaded = torch_ext.load(path, mmap=mmap)
    assert list(loaded) == list(tensors)
    assert_the_same(loaded, tensors)
    for tensor in loaded.values():
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert tensor.data_ptr() % tensor.dtype.itemsize == 0


def test_the_library_reads_ours_bit_for_bit(path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = some_of_everything()
    metadata = {"format": "pt", "": 'é\n"', "long": "x" * 10000}
    torch_ext.save(tensors, path, metadata=metadata)
    assert_the_same(safetensors.load_file(path), tensors)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    torch_ext.save({}, path)
    assert safetensors.load_file(path) == {}


@pytest.mark.parametrize("mmap", [False, True])
def test_the_librarys_files_are_read_bit_for_bit(path, mmap):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {
        name: each.resolve_conj().resolve_neg().contiguous()
        for name, each in some_of_everything().items()
    }
    safetensors.save_file(tensors, path, metadata={"a": "b", "é": "\n"})
    assert_the_same(torch_ext.load(path, mmap=mmap), tensors)
    assert torch_ext.load_metadata(path) == {"a": "b", "é": "\n"}
    safetensors.save_file({}, path)
    assert torch_ext.load(path, mmap=mmap) == {}
    assert torch_ext.load_metadata(path) == {}


def loaded_or_refused(path):
    """Loads, or returns None for a ValueError that names the file."""
    try:
        return torch_ext.load(path, mmap=True)
    except ValueError as error:
        if str(path) in str(error):
            return None
        raise


# What the library takes and we do not: 6-bit numbers, which torch lacks, and what no
# writer makes.
STRICTER = {"every_dtype", "shape_zero_and_huge", "shape_65_dimensions", "metadata_key_twice"}


def test_a_file_of_many_pieces_is_read_bit_for_bit(path):
    library = pytest.importorskip("safetensors.torch")
    # Larger than all buffers together, with edges that no piece or page has.
    tensors = {
        "first": torch.randint(0, 256, (70 * 2**20 + 1,), dtype=torch.uint8),
        "second": torch.randn(5 * 2**20 + 7),
    }
    library.save_file(tensors, path)
    loaded = torch_ext.load(path)
    assert all(torch.equal(loaded[name], each) for name, each in tensors.items())


def test_files_are_refused_where_the_library_refuses_them():
    library = pytest.importorskip("safetensors")
    taken, only_theirs = 0, set()
    for file in CORPUS.iterdir():
        try:
            with library.safe_open(file, "pt") as opened:
                theirs = set(opened.keys())
        except library.SafetensorError:
            theirs = None
        loaded = loaded_or_refused(file)
        ours = None if loaded is None else set(loaded)
        taken += loaded is not None
        if ours is None and theirs is not None:
            only_theirs.add(file.name)
        else:
            assert ours == theirs, file.name
    assert taken > 10
    assert {name for name in only_theirs if not name.startswith("found_")} == STRICTER


@pytest.mark.parametrize("mmap", [False, True])
def test_tensors_at_odd_addresses_are_copied_to_even_ones(path, mmap):
    numbers = torch.tensor([1.5, -2.5])
    tensors = {"a": torch.tensor([7], dtype=torch.uint8), "b": numbers}
    entries = {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    for pad in range(4):
        entries["__metadata__"] = {"pad": "x" * pad}
        write_file(path, entries, b"\7" + raw(numbers))
        loaded = torch_ext.load(path, mmap=mmap)
        assert_the_same(loaded, tensors)
        assert loaded["b"].data_ptr() % 4 == 0


def test_every_corrupted_byte_of_a_header_is_refused_or_another_header(path):
    torch_ext.save({"a": torch.arange(3.0), "b": torch.zeros(2, dtype=torch.int8)}, path)
    content = bytearray(path.read_bytes())
    end = content.index(b"}}") + 8
    with path.open("r+b", buffering=0) as file:
        for at in range(end):
            file.seek(at)
            file.write(bytes([content[at] ^ 1 << at % 8]))
            loaded = loaded_or_refused(path)
            if loaded is not None:
                assert sorted(each.nbytes for each in loaded.values()) == [2, 12]
            file.seek(at)
            file.write(content[at : at + 1])


def test_every_cut_file_is_refused(path):
    torch_ext.save({"a": torch.arange(3.0)}, path)
    content = path.read_bytes()
    for length in [*range(0, 200, 7), *range(4090, len(content))]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="no whole safetensors file"):
            torch_ext.load(path)
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match="of which there are 13"):
        torch_ext.load(path)


def test_a_model_comes_back_with_what_torch_save_would_have_kept(path, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    torch_ext.save(model.state_dict(), path)
    torch.save(model.state_dict(), tmp_path / "torch.pt")
    assert_the_same(torch_ext.load(path), torch.load(tmp_path / "torch.pt"))
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    other.load_state_dict(torch_ext.load(path), assign=True)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(model.eval()(x), other.eval()(x))
    other.train()(x).sum().backward()


def test_each_loaded_tensor_has_a_storage_of_its_own(path, tmp_path):
    torch_ext.save({"a": torch.randn(MIB), "b": torch.randn(3)}, path)
    for mmap in (False, True):
        loaded = torch_ext.load(path, mmap=mmap)
        assert loaded["b"].untyped_storage().nbytes() == 12
        torch.save(loaded["b"], tmp_path / "b.pt")
        assert (tmp_path / "b.pt").stat().st_size < 4096
        b = raw(loaded["b"])
        del loaded["a"]
        assert raw(loaded["b"]) == b


def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_memory_goes_back_with_the_tensor_that_has_it(path):
    torch_ext.save({"a": torch.zeros(64 * MIB, dtype=torch.uint8), "b": torch.ones(3)}, path)
    before = resident()
    loaded = torch_ext.load(path)
    assert resident() - before > 60 * MIB
    del loaded["a"]
    assert resident() - before < 20 * MIB
    assert loaded["b"].tolist() == [1, 1, 1]


def test_changes_to_a_mapping_stay_in_this_process(path):
    torch_ext.save({"a": torch.zeros(5000)}, path)
    mapped = torch_ext.load(path, mmap=True)["a"]
    mapped += 1
    assert torch_ext.load(path)["a"].sum() == 0
    torch_ext.save({"a": torch.full((5000,), 2.0)}, path)  # It has another inode.
    assert mapped.sum() == 5000


def test_the_callers_modes_change_nothing(path):
    tensors = {"a": torch.randn(3, requires_grad=True), "b": torch.randn(3).half()}
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.device("meta"):
            torch_ext.save(tensors, path)
            loaded = torch_ext.load(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_the_same(loaded, tensors)
    loaded["a"].requires_grad_().sum().backward()


def test_meta_reads_the_header_alone(path):
    torch_ext.save({"a": torch.randn(3, 4).bfloat16()}, path)
    (a,) = torch_ext.load(path, "meta").values()
    assert (a.device.type, a.dtype, a.shape) == ("meta", torch.bfloat16, (3, 4))


@pytest.mark.parametrize("mmap", [False, True])
def test_device_tensors_are_saved_and_loaded(sim, path, mmap):
    tensors = some_of_everything()
    there = {name: each.to("sim") for name, each in tensors.items()}
    there["mixed"] = tensors["mixed"] = torch.randn(10)
    torch_ext.save(there, path)
    header, _ = header_of(path)
    assert list(header) == list(tensors)
    assert_the_same(torch_ext.load(path), tensors)
    loaded = torch_ext.load(path, "sim:1", mmap=mmap)
    assert {str(each.device) for each in loaded.values()} == {"sim:1"}
    assert_the_same(loaded, tensors)


def test_a_save_sees_the_work_that_was_queued_before_it(sim, path):
    tensors = {"large": torch.zeros(MIB, device="sim"), "small": torch.zeros(3, device="sim")}
    for each in tensors.values():
        each.fill_(7.0)
    torch_ext.save(tensors, path)
    assert all((each == 7).all() for each in torch_ext.load(path).values())


class Strange(torch.Tensor):
    pass


REFUSED = {
    "a list": ([torch.ones(1)], TypeError, "dict of tensors by name"),
    "a module": (torch.nn.Linear(2, 2), TypeError, r"such as model.state_dict\(\)"),
    "a nested dict": ({"a": {"b": torch.ones(1)}}, TypeError, r"state_dict\['a'\] is a dict"),
    "a number": ({"step": 3}, TypeError, "make it a tensor, or text in metadata="),
    "a name": ({3: torch.ones(1)}, TypeError, "names of tensors must be str, not int"),
    "a surrogate": ({"\ud800": torch.ones(1)}, ValueError, "cannot be written in UTF-8"),
    "the metadata's name": ({"__metadata__": torch.ones(1)}, ValueError, "__metadata__"),
    "complex128": (
        {"a": torch.ones(1, dtype=torch.complex128)},
        TypeError,
        "'a' has the dtype",
    ),
    "sparse": ({"a": torch.eye(2).to_sparse()}, TypeError, "save: tensor 'a': Sparse"),
    "a NUL in its name": ({"a\0b": torch.eye(2).to_sparse()}, TypeError, "'a b': Sparse"),
    "meta": ({"a": torch.ones(1, device="meta")}, TypeError, "meta tensors are not supported"),
    "a lazy parameter": (
        {"a": torch.nn.parameter.UninitializedParameter()},
        TypeError,
        "'a'.* has no shape yet",
    ),
    "a lazy buffer": (
        {"a": torch.nn.parameter.UninitializedBuffer()},
        TypeError,
        "'a'.* has no shape yet",
    ),
    "quantized": (
        {"a": torch.quantize_per_tensor(torch.ones(1), 1.0, 0, torch.qint8)},
        TypeError,
        "quantized",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_file_cannot_hold_is_refused_and_nothing_is_written(path, what):
    tensors, error, words = REFUSED[what]
    path.write_bytes(b"old")
    with pytest.raises(error, match=words):
        torch_ext.save(tensors, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


def test_a_dtensor_is_refused_with_the_remedy(path, tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(TypeError, match=r"DTensor.*\.full_tensor\(\)"):
            torch_ext.save({"a": DTensor.from_local(torch.ones(2), mesh)}, path)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"a": 1}, TypeError),
        ({1: "a"}, TypeError),
        (["a"], TypeError),
        ({"a": "\udc00"}, ValueError),
    ],
)
def test_metadata_is_text(path, metadata, error):
    with pytest.raises(error, match="metadata"):
        torch_ext.save({}, path, metadata=metadata)


def test_tensors_that_share_memory_are_refused_and_disjoint_views_are_not(path):
    whole = torch.randn(10, 10)
    with pytest.raises(ValueError, match=r"'a' and tensor 'b' share memory .*clone"):
        torch_ext.save({"a": whole, "b": whole}, path)
    with pytest.raises(ValueError, match="share memory"):
        torch_ext.save({"long": whole, "x": torch.ones(1), "b": whole[3]}, path)
    with pytest.raises(ValueError, match="share memory"):
        torch_ext.save({"a": whole[:6], "c": whole[7], "b": whole[5:7]}, path)
    apart = {"b": whole[5:], "a": whole[:5], "none": whole[3:3]}
    torch_ext.save(apart, path)
    assert_the_same(torch_ext.load(path), apart)
    tied = {"a": whole, "b": whole.clone()}
    torch_ext.save(tied, path)
    assert_the_same(torch_ext.load(path), tied)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_one_element_may_have_any_stride(path, dtype):
    whole = tensor_of(torch.uint8, 4 * dtype.itemsize).view(dtype)
    one = whole.as_strided((1, 1), (3, 2), 1)
    torch_ext.save({"one": one}, path)
    loaded = torch_ext.load(path)["one"]
    assert (loaded.dtype, loaded.shape) == (dtype, (1, 1))
    expected = whole.view(torch.uint8)[dtype.itemsize : 2 * dtype.itemsize]
    assert torch.equal(loaded.view(-1).view(torch.uint8), expected)


def test_arguments_of_load_are_checked(path):
    torch_ext.save({"a": torch.ones(1)}, path)
    for other in (lambda storage, location: storage, {"cuda:0": "cpu"}, 0):
        with pytest.raises(TypeError, match="map_location must be a device"):
            torch_ext.load(path, map_location=other)
    with pytest.raises(TypeError, match="'weights_only'"):
        torch_ext.load(path, weights_only=True)
    with pytest.raises(TypeError, match="path must be a str"):
        torch_ext.load(None)
    with pytest.raises(RuntimeError):
        torch_ext.load(path, "no such device")
    for missing in (path.parent / "none", path / "x"):
        with pytest.raises(OSError, match="open") as raised:
            torch_ext.load(missing)
        assert raised.value.filename == os.fspath(missing)
    with pytest.raises(IsADirectoryError):
        torch_ext.load(path.parent)


def test_without_a_path_load_is_still_build_for_one_release(monkeypatch):
    from torch_ext import jit

    monkeypatch.setattr(jit, "build", lambda **arguments: arguments)
    with pytest.warns(DeprecationWarning, match=r"torch_ext.build\(\)"):
        assert torch_ext.load(build_directory="x") == {"build_directory": "x"}


def test_torch_dtypes_that_are_missing_are_named(path):
    write_file(path, {"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"abc")
    with pytest.raises(ValueError, match="'a' has the dtype F6_E2M3, which torch has not"):
        torch_ext.load(path)
    write_file(path, {"a": {"dtype": "F4", "shape": [2, 1], "data_offsets": [0, 1]}}, b"a")
    with pytest.raises(ValueError, match="the last dimension of tensor 'a' is odd"):
        torch_ext.load(path)


def test_a_link_is_followed_and_stays_one(path):
    link = path.parent / "latest"
    link.symlink_to(path.name)
    torch_ext.save({"a": torch.ones(1)}, link)
    assert link.is_symlink()
    assert path.is_file()
    assert torch_ext.load(link)["a"] == 1


def test_permissions_are_those_of_other_new_files(path):
    before = os.umask(0o027)
    try:
        torch_ext.save({}, path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    torch_ext.save({}, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_no_room_is_an_error_before_any_byte(path):
    import resource

    torch_ext.save({"a": torch.ones(1)}, path)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(OSError, match="fallocate") as raised:
            torch_ext.save({"a": torch.ones(MIB)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == os.fspath(path)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


SAVE = """
import sys, torch, torch_ext
torch_ext.save({"large": torch.ones(2**20), "small": torch.ones(3)}, sys.argv[1])
"""


def test_the_file_is_synced_then_named_then_the_directory_is_synced(path):
    """What strace sees of a save, from the last write on."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = path.parent / "log"
    trace = ["strace", "-f", "-y", "-o", log, "-e", "trace=fsync,fdatasync,linkat,rename"]
    path.write_bytes(b"old")
    ran = subprocess.run(
        [*trace, sys.executable, "-c", SAVE, path], capture_output=True, text=True, timeout=120
    )
    if "ptrace" in ran.stderr:
        pytest.skip(ran.stderr)
    assert ran.returncode == 0, ran.stderr
    calls = [line.split(None, 1)[1] for line in log.read_text().splitlines() if " = 0" in line]
    linked = next(i for i, call in enumerate(calls) if call.startswith("linkat"))
    file, link, rename, directory = calls[linked - 1 : linked + 3]
    assert re.match(rf"fsync\(\d+<{path.parent}/[^>]*>", file), file
    beside = re.search(r'"([^"]*\.torch_ext-new)"', link)[1]
    assert Path(beside).parent == path.parent
    assert re.match(rf'rename\("{re.escape(beside)}", "{path}"\)', rename), rename
    assert re.match(rf"fsync\(\d+<{path.parent}>\)", directory), directory


KILLED = """
import sys, torch, torch_ext
tensors = [
    {"a": torch.full((700000,), value), "b": torch.full((7,), value)} for value in (1.0, 2.0)
]
for i in range(100000):
    torch_ext.save(tensors[i % 2], sys.argv[1])
    print(i, flush=True)
"""


def test_a_kill_leaves_a_whole_file(path):
    torch_ext.save({"a": torch.zeros(700000), "b": torch.zeros(7)}, path)
    values = set()
    for kill in range(5):
        process = subprocess.Popen(
            [forked_python.python(), "-c", KILLED, path], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(random.Random(kill).random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        loaded = torch_ext.load(path)
        (value,) = set(loaded["a"].unique().tolist()) | set(loaded["b"].unique().tolist())
        values.add(value)
        left = [name for name in os.listdir(path.parent) if name != path.name]
        assert all(
            re.fullmatch(r"\.model\.safetensors\.\w{16}\.torch_ext-new", n) for n in left
        )
    assert values <= {1.0, 2.0}
    deadline = time.monotonic() + 60  # The lock goes when the process is quite gone.
    while len(os.listdir(path.parent)) > 1 and time.monotonic() < deadline:
        torch_ext.save({}, path)
    assert os.listdir(path.parent) == [path.name]


def test_ctrl_c_ends_a_save_and_leaves_the_old_file(sim, path):
    torch_ext.save({"a": torch.ones(3)}, path)
    old = path.read_bytes()
    large = torch.zeros(2 * MIB, device="sim")
    sim.hold_copies()
    # What a shell has started in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(
        signal.SIGALRM, lambda *_: (sim.release_copies(), signal.raise_signal(signal.SIGINT))
    )
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            torch_ext.save({"a": large}, path)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, before)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_the_pages_example_runs(tmp_path):
    page = (CORPUS.parents[3] / "docs/save.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    ran = subprocess.run(
        [forked_python.python(), "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert os.listdir(tmp_path) == ["model.safetensors"]
