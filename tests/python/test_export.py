"""export() of commits: what other tools read equals the state_dict() that was committed.

Read by the safetensors library, torch.load, torch.optim.AdamW and torch.distributed.checkpoint.
"""

import errno
import io
import json
import os
import struct

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from safetensors import safe_open
from safetensors.torch import load_file
from test_dcp import EXTRA, all_of, commits_shards, made, make_model, same, train

import torch_ext
from torch_ext import OffloadedAdamW, OffloadedOptimizer
from torch_ext import __main__ as command

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MIB = 2**20


def flat_state(model, state_dict):
    """The tensors of a model and of its optimizer's state_dict(), by the names of the file."""
    names = [name for name, _ in model.named_parameters()]
    tensors = {f"model.{n}": p.detach().clone() for n, p in model.named_parameters()}
    for number, values in state_dict["state"].items():
        tensors |= {f"optim.state.{names[number]}.{k}": v for k, v in values.items()}
    return tensors


def read_header(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        return 8 + length, header, file.seek(0, os.SEEK_END)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A store, the model and the state that it has."""
    folder = tmp_path_factory.mktemp("store")
    model = make_model()
    with made(model, folder, weight_decay=0.1) as optimizer:
        train(model, optimizer, 3)
        optimizer.commit(30, extra=EXTRA)
        state = optimizer.state_dict()
    return folder, model, state


def test_safetensors_has_all_of_the_commit(tmp_path, committed):
    store, model, state = committed
    out = tmp_path / "out.safetensors"
    seen = []
    torch_ext.export(store, out, progress=lambda *p: seen.append(p))
    expected = flat_state(model, state) | {
        "extra.noise": EXTRA["noise"],
        "extra.small": EXTRA["small"],
        "extra.pair.1": EXTRA["pair"][1],
        "extra.list.0": EXTRA["list"][0],
    }
    assert same(load_file(out), expected)
    with safe_open(out, "pt") as file:
        texts = file.metadata()
    assert (texts["format"], texts["step"]) == ("pt", "30")
    assert json.loads(texts["optim.param_groups.0.lr"]) == 1e-2
    assert json.loads(texts["optim.param_groups.0.betas"]) == [0.9, 0.999]
    assert json.loads(texts["optim.param_groups.0.weight_decay"]) == 0.1
    names = [name for name, _ in model.named_parameters()]
    assert json.loads(texts["optim.param_groups.0.params"]) == names
    assert json.loads(texts["extra.scheduler"]) == EXTRA["scheduler"]
    assert json.loads(texts["extra.bytes"]) == {"base64": "YWJj"}
    assert json.loads(texts["extra.pair.0"]) == 1
    size = out.stat().st_size
    assert seen == sorted(seen)
    assert seen[-1] == (size, size)
    assert os.listdir(tmp_path) == [out.name]


def test_safetensors_goes_by_field_and_then_by_parameter(tmp_path, committed):
    store, model, _ = committed
    out = tmp_path / "out.safetensors"
    torch_ext.export(store, out)
    begin, header, _ = read_header(out)
    assert begin % 4096 == 0
    places = {n: e["data_offsets"] for n, e in header.items() if n != "__metadata__"}
    found = [n for n in sorted(places, key=places.get) if not n.startswith("extra")]
    names = [name for name, _ in model.named_parameters()]
    fields = ["exp_avg", "exp_avg_sq"]
    expected = [f"optim.state.{n}.{field}" for field in fields for n in names]
    expected += [f"model.{n}" for n in names] + [f"optim.state.{n}.step" for n in names]
    assert found == expected


class Odd(torch.nn.Module):
    """Parameters of all kinds of sizes and dtypes, so that streams meet within blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = [(1,), (1_200_001,), (7,), (700, 1001), (0,), (), (4096,), (5, 3, 2)]
        for i, size in enumerate(sizes):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                name = f"p{i}_{str(dtype)[6:]}"
                self.register_parameter(name, torch.nn.Parameter(torch.randn(size).to(dtype)))
        self.turned = torch.nn.Parameter(torch.randn(70, 50).t())


@pytest.mark.parametrize("state_format", ["exact", "int8"])
def test_safetensors_of_any_sizes_and_dtypes(tmp_path, state_format):
    model = Odd()
    with OffloadedAdamW(
        model.named_parameters(),
        nvme_path=tmp_path,
        host_memory="8MiB",
        state_format=state_format,
    ) as optimizer:
        for p in model.parameters():
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()
        optimizer.commit()
        expected = flat_state(model, optimizer.state_dict())
        out = tmp_path / "out.safetensors"
        torch_ext.export(optimizer, out)
    assert same(load_file(out), expected)
    assert same(torch_ext.load(out), expected)


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


@pytest.mark.parametrize("dim", [None, 1], ids=["rows", "columns"])
def test_safetensors_of_the_shards_of_several(ranks, tmp_path, dim):
    ranks.run(commits_shards, tmp_path, tmp_path / "whole.pt", dim)
    whole = torch.load(tmp_path / "whole.pt")
    out = tmp_path / "out.safetensors"
    torch_ext.export(tmp_path, out)
    expected = {f"model.{n}": t for n, t in whole["model"].items()}
    for name, values in whole["state"].items():
        expected |= {f"optim.state.{name}.{k}": v for k, v in values.items()}
    assert same(load_file(out), expected)


def test_torch_load_gives_what_adamw_takes(tmp_path, committed):
    store, model, state = committed
    out = tmp_path / "out.pt"
    torch_ext.export(store, out, "torch")
    loaded = torch.load(out, weights_only=True)
    assert same(loaded["model"], dict(model.state_dict()))
    assert same(loaded["extra"], EXTRA)
    assert same(loaded["optim"]["state"], state["state"])
    # The same training goes on in torch alone, bit for bit.
    whole, again = make_model(), make_model()
    options = {"lr": 1e-2, "weight_decay": 0.1, "fused": True}
    reference = torch.optim.AdamW(whole.parameters(), **options)
    train(whole, reference, 3)
    optimizer = torch.optim.AdamW(again.parameters())
    again.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optim"])
    for each, of in ((whole, reference), (again, optimizer)):
        train(each, of, 2, seed=5)
    assert same(dict(again.state_dict()), dict(whole.state_dict()))
    assert os.listdir(tmp_path) == [out.name]
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_torch_maps_large_tensors(tmp_path):
    model = torch.nn.Linear(1024, 600)
    with made(model, tmp_path) as optimizer:
        model(torch.randn(2, 1024)).sum().backward()
        optimizer.step()
        optimizer.commit()
        torch_ext.export(optimizer, tmp_path / "out.pt", "torch")
        state = optimizer.state_dict()
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert same(loaded["model"], dict(model.state_dict()))
    assert same(loaded["optim"]["state"], state["state"])


def test_dcp_has_what_the_reader_shows(tmp_path, committed):
    store, model, _ = committed
    out = tmp_path / "out"
    torch_ext.export(store, out, "dcp")
    assert same(all_of(dcp.FileSystemReader(out)), all_of(torch_ext.dcp.CommitReader(store)))
    again = {"model": make_model().state_dict()}
    dcp.load(again, checkpoint_id=out, no_dist=True)
    assert same(dict(again["model"]), dict(model.state_dict()))
    assert os.listdir(tmp_path) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask()


def test_any_class_is_exported(tmp_path):
    model = make_model()
    with OffloadedOptimizer(
        torch.optim.RMSprop, model.named_parameters(), lr=1e-2, nvme_path=tmp_path
    ) as optimizer:
        train(model, optimizer, 2)
        optimizer.commit()
        expected = flat_state(model, optimizer.state_dict())
        torch_ext.export(optimizer, tmp_path / "a")
        torch_ext.export(optimizer, tmp_path / "b", "torch")
    assert same(load_file(tmp_path / "a"), expected)
    loaded = torch.load(tmp_path / "b", weights_only=True)
    torch.optim.RMSprop(model.parameters()).load_state_dict(loaded["optim"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_written_to_a_parameter_after_its_step_counts(tmp_path, dtype):
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 1000).to(dtype))
    with OffloadedAdamW([("p", parameter)], nvme_path=tmp_path) as optimizer:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with torch.no_grad():
            parameter[::7] = 3
        optimizer.commit()
        torch_ext.export(tmp_path, tmp_path / "out.safetensors")
        expected = optimizer.state_dict()["state"][0]["master_param"]
    master = load_file(tmp_path / "out.safetensors")["optim.state.p.master_param"]
    # It is rounded to that, and in float16 is that.
    assert torch.equal(master[::7].to(dtype), parameter[::7].detach())
    assert dtype == torch.bfloat16 or bool((master[::7] == 3).all())
    assert torch.equal(master, expected)


def test_half_a_master_is_not_exported(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    with OffloadedAdamW([("p", parameter)], nvme_path=tmp_path) as optimizer:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.commit(include_parameters=False)
        torch_ext.export(tmp_path, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == {
        "optim.state.p.exp_avg",
        "optim.state.p.exp_avg_sq",
        "optim.state.p.step",
    }


def test_an_optimizer_stands_for_its_own_commit(tmp_path):
    model = make_model()
    with made(model, tmp_path) as optimizer:
        with pytest.raises(RuntimeError, match="has made no commit"):
            torch_ext.export(optimizer, tmp_path / "out")
        kept = {}
        for step in (1, 2):
            train(model, optimizer, 1)
            optimizer.commit(keep=2)
            kept[step] = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer.rollback(1)
        for name, step, expected in (("a", None, 1), ("b", 2, 2)):
            torch_ext.export(optimizer, tmp_path / name, step=step)
            found = load_file(tmp_path / name)
            assert same({k: found[f"model.{k}"] for k in kept[expected]}, kept[expected])


@pytest.mark.parametrize("format", ["safetensors", "torch", "dcp"])
def test_what_is_there_is_replaced_only_on_demand(tmp_path, committed, format):
    store, model, _ = committed
    out = tmp_path / "out"
    torch_ext.export(store, out, format)

    def content():
        files = [out] if out.is_file() else sorted(out.iterdir())
        return [file.read_bytes() for file in files]

    before = content()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        torch_ext.export(store, out, format)
    with pytest.raises(ValueError, match="no commit of step 4"):
        torch_ext.export(store, out, format, step=4, overwrite=True)
    stop = RuntimeError("stop")

    def fails(done, total):
        raise stop

    with pytest.raises(RuntimeError, match="stop"):
        torch_ext.export(store, out, format, overwrite=True, progress=fails)
    assert content() == before
    assert os.listdir(tmp_path) == ["out"]
    torch_ext.export(store, out, format, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def test_what_could_not_be_replaced_is_there_again(tmp_path, committed, monkeypatch):
    store, _, _ = committed
    out = tmp_path / "out"
    torch_ext.export(store, out, format="dcp")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rename = os.rename

    def fail(source, target):
        if str(source).endswith("-new"):
            raise OSError(errno.EIO, "the drive failed")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="the drive failed"):
        torch_ext.export(store, out, format="dcp", overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_directory_that_is_something_else_stays(tmp_path, committed):
    store, *_ = committed
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    with pytest.raises(FileExistsError, match="no checkpoint of DCP"):
        torch_ext.export(store, tmp_path / "mine", "dcp", overwrite=True)
    for format in ("safetensors", "torch"):
        with pytest.raises(IsADirectoryError):
            torch_ext.export(store, tmp_path / "mine", format, overwrite=True)
    with pytest.raises(NotADirectoryError):
        torch_ext.export(store, tmp_path / "mine/file", "dcp", overwrite=True)
    assert os.listdir(tmp_path / "mine") == ["file"]
    with pytest.raises(ValueError, match="format must be one of safetensors, dcp, torch"):
        torch_ext.export(store, tmp_path / "out", "zip")


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"tensor": torch.ones(3), 1: "a", "1": "b"}, "extra.1"),
        ({"tensor": torch.ones(3), "a": {"b": torch.ones(2), "c": 1}, "a.c": 2}, "extra.a.c"),
        ({1: torch.zeros(100), "1": torch.ones(100)}, "extra.1"),
    ],
)
def test_nothing_is_lost_of_keys_that_get_one_name(tmp_path, extra, name):
    model = make_model()
    with made(model, tmp_path) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit(extra=extra)
        with pytest.raises(ValueError, match=f"the header has the .* '{name}' twice"):
            torch_ext.export(optimizer, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        torch_ext.export(optimizer, tmp_path / "out", format="torch")
        assert torch.load(tmp_path / "out")["extra"].keys() == extra.keys()


@pytest.mark.parametrize("format", ["safetensors", "torch", "dcp"])
def test_what_is_neither_a_file_nor_a_directory_stays(tmp_path, committed, format):
    store, *_ = committed
    out = tmp_path / "out"
    os.mkfifo(out)
    for overwrite in (False, True):
        with pytest.raises(OSError, match="a device, a pipe or a socket") as caught:
            torch_ext.export(store, out, format, overwrite=overwrite)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(out))
    assert out.is_fifo()
    out.unlink()
    (tmp_path / "other").touch()
    out.symlink_to("other")
    with pytest.raises(OSError, match="links are not followed") as caught:
        torch_ext.export(store, out, format, overwrite=True)
    assert caught.value.errno == errno.ELOOP
    assert out.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


@pytest.mark.parametrize("format", ["safetensors", "torch", "dcp"])
def test_damage_leaves_nothing_behind(tmp_path, format):
    store = tmp_path / "store"
    store.mkdir()
    model = make_model()
    with made(model, store) as optimizer:
        train(model, optimizer, 1)
        optimizer.commit()
    file = store / "state.r0-of-1.e0.d0.store"
    content = bytearray(file.read_bytes())
    content[content.find(model[2].weight.detach().numpy().tobytes()[:64])] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match="checksum") as caught:
        torch_ext.export(store, tmp_path / "out", format)
    assert str(file) in str(caught.value)
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize("format", ["safetensors", "torch", "dcp"])
def test_the_owner_may_go_on_meanwhile(tmp_path, format):
    """What is exported is one commit, or the error says why not."""
    model = torch.nn.Linear(2048, 700)
    with made(model, tmp_path, host_memory="8MiB") as optimizer:

        def go_on():
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.randn(p.shape)
                optimizer.step()
                optimizer.commit()

        def once(done, total):
            nonlocal left
            if left > 0:
                left -= 1
                go_on()

        go_on()
        left = 1
        torch_ext.export(tmp_path, tmp_path / "out", format, progress=once)
        found = {
            "safetensors": lambda: load_file(tmp_path / "out")["model.weight"],
            "torch": lambda: torch.load(tmp_path / "out")["model"]["weight"],
            "dcp": lambda: all_of(dcp.FileSystemReader(tmp_path / "out"))["model"]["weight"],
        }[format]()
        assert same(found, model.weight.detach())
        left = 1000
        with pytest.raises(OSError, match="its owner has made other commits"):
            torch_ext.export(tmp_path, tmp_path / "other", format, progress=once)
        assert not (tmp_path / "other").exists()


def test_memory_is_bounded(tmp_path):
    """A state of 300 MiB is never in memory as a whole."""
    model = torch.nn.Linear(5000, 5000, bias=False)
    with made(model, tmp_path, host_memory="16MiB") as optimizer:
        model.weight.grad = torch.randn(5000, 5000)
        optimizer.step()
        optimizer.commit()
    expected = model.weight.detach()[::997].clone()
    del model, optimizer
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # The peak is what there is now.
    before = peak()
    torch_ext.export(tmp_path, tmp_path / "out")
    assert peak() - before < 100 * MIB
    with safe_open(tmp_path / "out", "pt") as file:
        assert torch.equal(file.get_slice("model.weight")[::997], expected)


def peak():
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# The command -----------------------------------------------------------------------------


def run(*arguments):
    return command.main(["export", *map(str, arguments)])


def test_the_command(tmp_path, committed, capsys):
    store, model, _ = committed
    out = tmp_path / "out"
    assert run(store, out) == 0
    assert same(load_file(out)["model.0.bias"], model[0].bias.detach())
    assert "out: written (safetensors)" in capsys.readouterr().out
    assert run(store, out) == 2
    assert "--force" in capsys.readouterr().err
    assert run(store, out, "--force", "--format", "torch", "--step", 30) == 0
    assert torch.load(out, weights_only=True)["extra"]["list"][1] == 7
    assert run(store, tmp_path / "new", "--step", 31) == 2
    assert "the steps of those kept are 30" in capsys.readouterr().err
    assert run(tmp_path, tmp_path / "new") == 2
    assert "nothing was committed" in capsys.readouterr().err
    assert run(store, out / "below") == 1
    assert "is no directory" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["out"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_command_shows_how_far_it_is(tmp_path, committed, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert run(committed[0], tmp_path / "out") == 0
    assert "100%" in terminal.getvalue()
