"""`python -m torch_ext verify`, `info` and `remove` of committed stores.

Damage is placed by a reader of the format that was written from docs/file_format.md alone.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import threading

import pytest
import torch
from store_file import StoreFile

from torch_ext import OffloadedAdamW, _store_commands
from torch_ext import __main__ as command
from torch_ext._stores import StoreFiles

NAME = "state.r0-of-1.e0.d0.store"
NAMES = ["first.weight", "first.bias", "second.weight", "second.bias"]


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 16]))


# Stores ----------------------------------------------------------------------------


def make_model():
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.first = torch.nn.Linear(64, 300)
    model.second = torch.nn.Linear(300, 33)
    return model


def step(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()


def make_optimizer(model, path):
    return OffloadedAdamW(
        model.named_parameters(),
        lr=1e-2,
        nvme_path=path,
        host_memory="240KiB",
        aio={"block_size": "4KiB"},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with a store that keeps two commits, and the values of the last."""
    path = tmp_path_factory.mktemp("made")
    model = make_model()
    with make_optimizer(model, path) as optimizer:
        for number in (10, 20, 30):
            step(model, optimizer)
            optimizer.commit(number, keep=2)
    return path, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def store(made, tmp_path):
    """A copy of that store: (its file, what a reader finds)."""
    path = tmp_path / NAME
    shutil.copyfile(made[0] / NAME, path)
    return path, StoreFile(path)


@pytest.fixture
def run(capsys):
    """Runs a command. Returns the exit status, and what it prints and complains."""

    def run(*arguments):
        status = command.main([os.fspath(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_reader_of_this_file_finds_the_values(made):
    path, values = made
    found = StoreFile(path / NAME)
    assert (found.step, found.generation, len(found.kept)) == (30, 3, 1)
    assert sorted(found.caller["parameters"]) == sorted(NAMES)
    for name in ("first.bias", "second.bias"):
        extent, offset = found.tile_of(name, values=True)
        at = extent.offsets[0] + offset
        read = found.data[at : at + values[name].nbytes]
        assert read == values[name].numpy().tobytes()


# verify ----------------------------------------------------------------------------


def test_a_whole_store_is_whole(store, run, tmp_path):
    path, _ = store
    before = path.read_bytes()
    for where in (tmp_path, path):
        status, out, err = run("verify", where)
        assert (status, err) == (0, "")
        assert out.startswith(f"{path}: whole: 2 commits (step 20, 30), ")
        assert len(out.splitlines()) == 1
    assert path.read_bytes() == before


def test_a_process_says_so_in_its_exit_status(store, tmp_path):
    path, found = store
    flip(path, found.extents[0].offsets[0])
    program = [sys.executable, "-m", "torch_ext", "verify", tmp_path]
    done = subprocess.run(program, capture_output=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert b"damaged" in done.stdout


def heads(found):
    return [
        ("its header is damaged", 30),
        ("its header is damaged", 4095),
        ("does not begin as one", 3),
        (f"offset={65536 * (1 + found.slot)} length=4096: root {found.slot}", None),
        (f"offset={65536 * (2 - found.slot)} length=4096: root {1 - found.slot}", None),
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_damaged_head_is_named(store, run, tmp_path, number):
    path, found = store
    text, at = heads(found)[number]
    if at is None:
        at = int(text.split()[0].removeprefix("offset=")) + 77
    flip(path, at)
    status, out, err = run("verify", tmp_path)
    assert status == 1
    assert text in out + err
    assert str(path) in out + err


def test_each_copy_of_a_table_is_checked(store, run, tmp_path):
    path, found = store
    places = [(30, place) for place in found.tables] + [(20, p) for p in found.kept[0]]
    for number, (kept, place) in enumerate(places):
        flip(path, place.offsets[0] + place.size - 1)
        status, out, _ = run("verify", tmp_path)
        assert status == 1
        line = f"{path} offset={place.offsets[0]} length={place.size}: "
        assert f"{line}copy {number % 2 + 1} of the table of step {kept}" in out
        flip(path, place.offsets[0] + place.size - 1)
    assert run("verify", tmp_path)[0] == 0


def test_if_both_copies_are_damaged_the_other_root_is_read(store, run, tmp_path):
    path, found = store
    for place in found.tables:
        flip(path, place.offsets[0] + 100)
    status, out, _ = run("verify", tmp_path)
    assert status == 1
    assert "copy 1 of the table of step 30" in out
    assert "copy 2 of the table of step 30" in out
    assert "1 commit (step 20)" in out.splitlines()[0]
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_damage_has_the_name_of_the_parameter(store, run, tmp_path, name, values):
    path, found = store
    extent, offset = found.tile_of(name, values=values)
    at = extent.offsets[0] + offset
    flip(path, at)
    status, out, _ = run("verify", tmp_path)
    assert status == 1
    first, damage = out.splitlines()
    assert first.startswith(f"{path}: damaged: 2 commits")
    begin = extent.offsets[0] + offset // found.block * found.block
    length = min(found.block, found.padded(extent) - offset // found.block * found.block)
    assert f"{path} offset={begin} length={length}: checksum mismatch" in damage
    assert f"{'values' if values else 'state'} of {name}" in damage
    assert "commit of step 30" in damage
    result = json.loads(run("verify", tmp_path, "--json")[1])
    (listed,) = result["stores"][0]["damage"]
    assert (listed["path"], listed["offset"], listed["length"]) == (str(path), begin, length)
    at = begin - extent.offsets[0]
    expected = found.names_in(extent, at, at + length)
    assert {part.split(" of ")[1] for part in listed["parts"]} == expected


def test_a_kept_commit_is_checked_too(store, run, tmp_path):
    path, found = store
    now = {extent.offsets[0] for extent in found.extents}
    found._table(found.kept[0][0].offsets[0])
    before = [extent for extent in found.extents if extent.offsets[0] not in now]
    assert before
    flip(path, before[0].offsets[0])
    status, out, _ = run("verify", tmp_path)
    assert status == 1
    assert "in the commit of step 20" in out


def test_bytes_of_no_commit_do_not_matter(store, run, tmp_path):
    path, found = store
    used = [*found.extents, *found.tables, *found.kept[0]]
    found._table(found.kept[0][0].offsets[0])
    used += found.extents
    end = max(extent.offsets[0] + found.padded(extent) for extent in used)
    assert end < len(found.data)
    for at in (5000, 65536 * 3, 1 << 19, end, len(found.data) - 1):
        flip(path, at)
    assert run("verify", tmp_path)[0] == 0


def test_swapped_tiles_are_seen(store, run, tmp_path):
    path, found = store
    one, other = found.extents[:2]
    assert one.size == other.size
    a, b = one.offsets[0], other.offsets[0]
    data = bytearray(found.data)
    data[a : a + one.size], data[b : b + one.size] = (
        found.data[b : b + one.size],
        found.data[a : a + one.size],
    )
    path.write_bytes(data)
    status, out, _ = run("verify", tmp_path)
    assert status == 1
    for at in (a, b):
        assert f"offset={at} " in out


def test_a_truncated_file_is_damaged_wherever_it_ends(store, run, tmp_path):
    path, found = store
    last = max([*found.extents, *found.tables], key=lambda extent: extent.offsets[0])
    for size in (last.offsets[0], 1 << 20, 200_000, 100_000, 4096, 100, 9):
        os.truncate(path, size)
        status, out, err = run("verify", tmp_path)
        assert status == 1, (size, out, err)
        assert str(path) in out + err
        if size > 1 << 20:
            assert f"offset={last.offsets[0]} length={last.size}: copy 2 of the table" in out
            assert f"cannot lie at {last.offsets[0]} in {path}" in out


def test_what_is_not_ours_is_said_to_be_so(store, run, tmp_path):
    path, found = store
    version = bytearray(found.data)
    version[8:16] = struct.pack("<II", 9, 7)
    cases = tmp_path / "cases"
    cases.mkdir()
    (cases / "empty").mkdir()
    (cases / "foreign.store").write_bytes(b"something else" * 1000)
    (cases / "nothing.store").write_bytes(b"")
    (cases / "folder.store").mkdir()
    (cases / "newer.store").write_bytes(version)
    (cases / "link.store").symlink_to(path)
    os.mkfifo(cases / "fifo.store")
    for name, text in [
        ("missing", "No such file"),
        ("empty", "no file of a store is in this directory"),
        ("foreign.store", "not a store of torch_ext"),
        ("nothing.store", "not a store of torch_ext"),
        ("folder.store", "no file of a store is in this directory"),
        ("newer.store", "version 9 of the format, and needs a reader of version 7"),
        ("link.store", "links are not followed"),
        ("fifo.store", "not a regular file"),
    ]:
        for name_of_command in ("verify", "remove"):
            status, out, err = run(name_of_command, cases / name)
            assert (status, out) == (2, ""), name
            assert text in err
            assert str(cases / name) in err
    assert run("verify", cases)[0] == 2
    assert len(os.listdir(cases)) == 7
    # Beside a store, foreign files are left out.
    shutil.copyfile(path, cases / NAME)
    (cases / "newer.store").unlink()
    status, out, err = run("verify", cases)
    assert status == 0
    assert "foreign.store: it is not a store of torch_ext (left out)" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_not_damaged(store, run, tmp_path):
    path, _ = store
    path.chmod(0)
    status, _, err = run("verify", tmp_path)
    assert status == 2
    assert "EACCES" in err


def test_the_worst_is_the_exit_status(store, run, tmp_path):
    path, found = store
    (tmp_path / "empty").mkdir()
    assert run("verify", tmp_path, tmp_path / "empty")[0] == 2
    flip(path, found.extents[0].offsets[0])
    assert run("verify", tmp_path, tmp_path / "empty")[0] == 1


def test_a_live_owner_that_commits_is_never_said_to_be_damaged(tmp_path, run):
    model = make_model()
    stop = threading.Event()
    with make_optimizer(model, tmp_path) as optimizer:
        step(model, optimizer)
        optimizer.commit()

        def train():
            while not stop.is_set():
                step(model, optimizer)
                optimizer.commit()

        thread = threading.Thread(target=train)
        thread.start()
        try:
            results = [run("verify", tmp_path) for _ in range(30)]
        finally:
            stop.set()
            thread.join()
        assert optimizer.commit().generation > 5
        assert run("verify", tmp_path)[0] == 0
    for status, out, err in results:
        assert status == 0 or (status == 2 and "made commits twice" in out + err), out
    assert any(status == 0 for status, _, _ in results)


def make_on_two_drives(tmp_path):
    drives = [tmp_path / "a", tmp_path / "b"]
    for drive in drives:
        drive.mkdir()
    model = make_model()
    with OffloadedAdamW(
        model.named_parameters(),
        lr=1e-2,
        nvme_path=drives,
        host_memory="240KiB",
        aio={"block_size": "16KiB"},
    ) as optimizer:
        step(model, optimizer)
        optimizer.commit(5)
    return drives


def test_a_store_on_two_drives_wants_both(tmp_path, run):
    one, other = make_on_two_drives(tmp_path)
    status, out, _ = run("verify", other, one)
    assert status == 0
    assert out.startswith(f"{one / NAME}: whole")
    for where, missing in ((one, 1), (other, 0)):
        status, out, _ = run("verify", where)
        assert status == 2
        assert f"that of drive {missing} is not there: give the directories of all" in out
    found = StoreFile(one / NAME)
    extent = next(e for e in found.extents if e.offsets[1] != 2**64 - 1)
    second = other / NAME.replace(".d0.", ".d1.")
    flip(second, extent.offsets[1])
    status, out, _ = run("verify", one, other)
    assert status == 1
    assert f"{second} offset={extent.offsets[1]} length=16384: checksum mismatch" in out
    assert "state of " in out
    second.unlink()
    status, out, _ = run("verify", one, other)
    assert status == 1
    assert "that of drive 1 is not there" in out


def test_stores_with_one_name_in_two_directories_are_two(store, run, tmp_path):
    path, _ = store
    (tmp_path / "b").mkdir()
    shutil.copyfile(path, tmp_path / "b" / NAME)
    status, out, _ = run("verify", tmp_path, tmp_path / "b", path)
    assert status == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == sorted(
        [str(path), str(tmp_path / "b" / NAME)]
    )


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


def test_a_terminal_has_a_bar_and_a_log_has_lines(monkeypatch):
    bar = _store_commands._Progress("here", Stream(is_terminal=True))
    bar(1 << 20, 4 << 20)
    bar.close()
    text = bar._stream.getvalue()
    assert text.startswith("\r[#######...")
    assert "25% of 4 MiB  here" in text
    assert text.endswith("\r")
    monkeypatch.setattr(_store_commands._Progress, "_LINE_SECONDS", 0.0)
    lines = _store_commands._Progress("here", Stream(is_terminal=False))
    lines(1 << 20, 4 << 20)
    lines(4 << 20, 4 << 20)
    lines.close()
    assert lines._stream.getvalue() == "25% of 4 MiB  here\n100% of 4 MiB  here\n"


# info ------------------------------------------------------------------------------


def test_info_says_what_a_store_holds(store, made, run, tmp_path):
    path, found = store
    status, out, err = run("info", tmp_path, "--json")
    assert (status, err) == (0, "")
    (report,) = json.loads(out)["stores"]
    assert report["files"] == [str(path)]
    assert report["id"] == found.data[16:32].hex()
    assert (report["rank"], report["world"], report["epoch"]) == (0, 1, 0)
    assert report["owner"] is None
    assert report["disk_bytes"] == path.stat().st_blocks * 512
    assert [(c["generation"], c["step"]) for c in report["commits"]] == [(2, 20), (3, 30)]
    newest = report["commits"][-1]
    assert newest["time"] == found.time
    assert newest["bytes"] == sum(map(found.padded, found.extents))
    places = {e.offsets[0]: found.padded(e) for e in [*found.extents, *found.tables]}
    places |= {e.offsets[0]: found.padded(e) for e in found.kept[0]}
    found._table(found.kept[0][0].offsets[0])
    places |= {e.offsets[0]: found.padded(e) for e in found.extents}
    assert report["committed_bytes"] == (1 << 20) + sum(places.values())
    assert report["optimizer"] == {
        "class": "OffloadedAdamW",
        "optimizer": None,
        "state_format": "exact",
        "parameters": 4,
        "without_values": 0,
        "frozen": 0,
        "elements": sum(value.numel() for value in made[1].values()),
        "dtypes": {"float32": 4},
    }
    assert report["damage"] == []
    status, out, err = run("info", path)
    assert (status, err) == (0, "")
    for text in (str(path), "OffloadedAdamW, state exact", "step 30, generation 3, 20"):
        assert text in out


def test_info_of_a_damaged_store_says_so(store, run, tmp_path):
    path, found = store
    flip(path, found.tables[1].offsets[0])
    status, out, _ = run("info", tmp_path)
    assert status == 1
    assert "copy 2 of the table of step 30" in out
    flip(path, 30)
    status, _, err = run("info", tmp_path)
    assert status == 1
    assert "its header is damaged" in err


HOSTILE = {
    "a number for a text": {"class": 5, "optimizer": "x", "state_format": ["y"]},
    "a list for a text": {"class": ["A"], "optimizer": {"b": 1}, "state_format": "exact"},
    "a size that Python does not write": {
        "parameters": {"p": {"shape": [10**4000, 10**4000], "dtype": "float32"}}
    },
    "more dimensions than there are": {
        "parameters": {"p": {"shape": [2**62] * 10_000, "dtype": "float32"}}
    },
    "what a terminal obeys": {
        "class": "A\x1b[2J\nstate.store: whole",
        "parameters": {"p\x1b]0;": {"shape": [2], "dtype": "\x9b1m"}},
    },
}


@pytest.mark.parametrize("what", HOSTILE)
def test_info_shows_any_document(tmp_path, run, what):
    model = make_model()
    with make_optimizer(model, tmp_path) as optimizer:
        optimizer._offload.commit(7, json.dumps(HOSTILE[what]), [], 1)
    for arguments in (["info"], ["info", "--json"], ["verify"]):
        status, out, err = run(*arguments, tmp_path)
        assert (status, err) == (0, "")
        assert out.replace("\n", "").isprintable()
    _, out, _ = run("info", tmp_path)
    assert "\nstate.store" not in out
    assert "step 7" in out


def test_damage_of_a_strange_name_is_one_line(tmp_path, run):
    model = make_model()
    names = ["a\nb\x1b[2J", "c", "d", "e"]
    named = [(name, p) for name, (_, p) in zip(names, model.named_parameters(), strict=True)]
    with OffloadedAdamW(named, nvme_path=tmp_path, host_memory="240KiB") as optimizer:
        step(model, optimizer)
        optimizer.commit()
    extent, offset = StoreFile(tmp_path / NAME).tile_of(names[0], values=True)
    flip(tmp_path / NAME, extent.offsets[0] + offset)
    status, out, _ = run("verify", tmp_path)
    assert status == 1
    assert r"values of a\nb\x1b[2J" in out


def test_the_owner_is_named(tmp_path, run):
    model = make_model()
    with make_optimizer(model, tmp_path) as optimizer:
        step(model, optimizer)
        optimizer.commit()
        owner = json.loads(run("info", tmp_path, "--json")[1])["stores"][0]["owner"]
        assert owner.startswith(f"process {os.getpid()} (")
        assert f" on {os.uname().nodename} since 20" in owner
        with pytest.raises(BlockingIOError, match=f"uses this store: process {os.getpid()} "):
            OffloadedAdamW.resume(tmp_path, model.named_parameters())
        status, out, err = run("remove", tmp_path, "--yes")
        assert (status, out) == (1, "")
        assert f"process {os.getpid()} " in err
        optimizer.commit()
    assert json.loads(run("info", tmp_path, "--json")[1])["stores"][0]["owner"] is None


def test_info_of_a_directory_without_stores_is_about_the_machine(run, tmp_path):
    status, out, _ = run("info", tmp_path, "--json")
    assert status == 0
    assert json.loads(out)["directory"]["path"] == os.path.realpath(tmp_path)


# remove ----------------------------------------------------------------------------


def test_shards_that_were_not_looked_at_are_said(store, run, tmp_path):
    found = StoreFiles(b"", 1, {"rank": 1, "world": 4, "epoch": 2})
    assert list(_store_commands._other_shards([found])) == [
        "note: of the 4 shards of epoch 2, 1 is here (rank 1); the state needs them all"
    ]
    status, _, error = run("verify", tmp_path)
    assert (status, error) == (0, "")


def test_an_export_into_no_directory_cannot_be_written(store, run, tmp_path):
    status, _, error = run("export", tmp_path, tmp_path / "nowhere" / "x")
    assert status == 1
    assert "cannot be written" in error


def test_remove_says_what_it_removed(store, run, tmp_path):
    path, _ = store
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "foreign.store").write_text("foreign")
    (tmp_path / "link.store").symlink_to(tmp_path / "mine.txt")
    status, out, err = run("remove", tmp_path)
    assert status == 1
    assert "nobody can be asked" in err
    assert path.exists()
    size = _store_commands.size(path.stat().st_blocks * 512)
    status, out, _ = run("remove", tmp_path, "--yes")
    assert status == 0
    assert out == f"removed, {size} are free:\n  {path}\n"
    assert sorted(os.listdir(tmp_path)) == ["foreign.store", "link.store", "mine.txt"]
    assert run("remove", tmp_path, "--yes")[0] == 2


@pytest.mark.parametrize(("answer", "stays"), [("y", False), ("", True), ("n", True)])
def test_remove_asks_on_a_terminal(store, run, tmp_path, monkeypatch, answer, stays):
    path, _ = store
    monkeypatch.setattr(sys, "stdin", Stream(is_terminal=True))
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    status, out, _ = run("remove", tmp_path)
    assert len(asked) == 1
    assert f"{path}\n" in out
    assert "with the commits of step 20, 30" in out
    assert path.exists() == stays
    assert status == int(stays)


def test_remove_follows_no_link(store, run, tmp_path):
    path, _ = store
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / NAME).symlink_to(path)
    (tmp_path / "directory").symlink_to(tmp_path)
    for where in ("links", f"links/{NAME}", "directory", "directory/"):
        status, _, err = run("remove", f"{tmp_path}/{where}", "--yes")
        assert status == 2
        assert "link" in err
    assert path.exists()


def test_remove_takes_debris_and_damaged_stores(store, run, tmp_path):
    path, found = store
    with open(path, "r+b") as file:
        for at in (65536, 131072):
            file.seek(at)
            file.write(bytes(4096))
    status, out, _ = run("verify", tmp_path)
    assert status == 1
    assert "nothing was committed there" in out
    assert run("remove", tmp_path, "--yes")[0] == 0
    path.write_bytes(found.data[:100_000])
    assert run("remove", tmp_path, "--yes")[0] == 0
    assert not path.exists()
    # What has lost its header may be anybody's.
    path.write_bytes(found.data[8:])
    assert run("remove", tmp_path, "--yes")[0] == 1
    assert path.exists()


def test_remove_takes_all_files_of_a_store_or_none(tmp_path, run):
    one, other = make_on_two_drives(tmp_path)
    second = other / NAME.replace(".d0.", ".d1.")
    for where in (one, other):
        status, _, err = run("remove", where, "--yes")
        assert status == 1
        assert "give the directories of all its drives; nothing was removed" in err
    assert (one / NAME).exists()
    assert second.exists()
    # A crash in the first commit leaves the names of the other drives.
    first = (one / NAME).read_bytes()
    (one / NAME).unlink()
    for left in (second, one / NAME):
        if not left.exists():
            left.write_bytes(first)
        status, out, err = run("remove", one, other, "--yes")
        assert status == 2
        assert out.endswith(f"are free:\n  {left}\n")
        assert "no file of a store is in this directory" in err
        assert not left.exists()
