"""The package's front door, and `python -m torch_ext info`."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import torch_ext
from torch_ext import __main__ as command
from torch_ext._native import _C
from torch_ext._size import size, size_up

PACKAGE = Path(torch_ext.__file__).parent


def run_python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(os.fspath, arguments)],
        env=os.environ | {"PYTHONPATH": os.fspath(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def info(capsys, *arguments):
    """Exit status and what `info --json` prints."""
    status = command.main(["info", "--json", *map(os.fspath, arguments)])
    return status, json.loads(capsys.readouterr().out)


def test_a_directory_that_takes_no_files_is_an_error_that_says_so(capsys):
    assert command.main(["info", "/proc"]) == 1
    text = capsys.readouterr().err
    assert "no file can be made in this directory, which is on proc" in text
    assert text.endswith(": '/proc'\n")


# The package -------------------------------------------------------------------


def test_importing_the_package_does_not_import_torch():
    code = "import sys, torch_ext; torch_ext.__version__; sys.exit('torch' in sys.modules)"
    assert run_python("-c", code).returncode == 0


def test_all_public_names_are_there():
    for name in torch_ext.__all__:
        assert getattr(torch_ext, name) is not None
        assert name in dir(torch_ext)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = torch_ext.nothing
    with pytest.raises(ImportError):
        exec("from torch_ext import nothing")


def test_version_is_that_of_the_project():
    project = PACKAGE.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("the package is installed without its source tree")
    version = re.search(r'^version = "(.*)"$', project.read_text(), re.MULTILINE)
    if version is not None:
        assert torch_ext.__version__ == version[1]


def test_warnings_reach_a_program_that_has_not_set_up_logging():
    text = "import logging, torch_ext; logging.getLogger('torch_ext').warning('look here')"
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=True
    )
    assert "look here" in done.stderr


# Errors from C++ ---------------------------------------------------------------


def test_io_error_is_the_os_error_of_its_errno_with_the_path(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        _C.probe_directory(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == os.fspath(tmp_path / "missing")
    assert "ENOENT" in caught.value.strerror
    assert os.fspath(tmp_path) not in caught.value.strerror
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        _C.probe_directory(tmp_path / "file")


def test_io_error_names_a_path_that_is_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff")
    with pytest.raises(FileNotFoundError) as caught:
        _C.probe_directory(path)
    assert caught.value.filename == os.fspath(path)


# info --------------------------------------------------------------------------


def test_info_reports_versions_devices_and_engines(capsys, tmp_path):
    torch = importlib.import_module("torch")
    status, report = info(capsys, tmp_path)
    assert status == 0
    assert report["versions"] == {
        "torch_ext": torch_ext.__version__,
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "kernel": os.uname().release,
    }
    assert report["compiled_module"] == {"path": _C.__file__, "reason": ""}
    assert report["devices"][0]["name"] == "cpu"
    assert len(report["devices"]) == 1 + torch.accelerator.device_count()
    engines = {engine["name"]: engine for engine in report["engines"]}
    assert {"libaio", "io_uring", "threads", "memory", "null"} <= set(engines)
    assert engines["threads"] == {"name": "threads", "available": True, "reason": ""}
    for engine in report["engines"]:
        assert engine["available"] == (engine["reason"] == "")


def test_info_reports_a_cuda_runtime_or_why_there_is_none(capsys, tmp_path):
    runtime = info(capsys, tmp_path)[1]["cuda_runtime"]
    if runtime["reason"]:
        assert runtime["version"] is None
    else:
        assert re.fullmatch(r"\d+\.\d+", runtime["version"])
        assert runtime["library"] is None or Path(runtime["library"]).exists()


def test_info_reports_the_directory(capsys, tmp_path):
    directory = info(capsys, tmp_path)[1]["directory"]
    assert directory["path"] == os.path.realpath(tmp_path)
    stat = os.statvfs(tmp_path)
    assert abs(directory["free_bytes"] - stat.f_bavail * stat.f_frsize) < 2**30
    assert directory["granule"] % 4096 == 0
    if directory["direct"]:
        assert directory["buffered_reason"] == ""
        assert directory["granule"] % directory["offset_alignment"] == 0
    else:
        assert directory["buffered_reason"]
    assert list(tmp_path.iterdir()) == []


def test_info_reports_the_limits(capsys, tmp_path):
    limits = info(capsys, tmp_path)[1]["limits"]
    assert limits["aio_max_nr"] == int(Path("/proc/sys/fs/aio-max-nr").read_text())
    assert limits["aio_nr"] >= 0
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert limits["memlock_bytes"] == (None if soft == resource.RLIM_INFINITY else soft)


def test_info_is_about_the_working_directory_by_default(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert info(capsys)[1]["directory"]["path"] == os.path.realpath(tmp_path)


def test_info_follows_a_link_to_a_directory(capsys, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    path = info(capsys, tmp_path / "link")[1]["directory"]["path"]
    assert path == os.path.realpath(tmp_path / "real")


def test_info_prints_text_for_people(capsys, tmp_path):
    assert command.main(["info", os.fspath(tmp_path)]) == 0
    lines = dict(
        re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()
    )
    assert lines["torch_ext"] == torch_ext.__version__
    assert lines["directory"] == os.path.realpath(tmp_path)
    assert lines["engine threads"] == "available"
    assert {"CUDA run-time", "file system", "free space", "alignment"} <= set(lines)
    assert {"fs.aio-max-nr", "memlock limit", "degraded"} <= set(lines)


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_info_takes_a_path_that_is_not_utf8(capsys, tmp_path, json_option):
    path = tmp_path / os.fsdecode(b"a b\xff")
    path.mkdir()
    assert command.main(["info", os.fspath(path), *json_option]) == 0
    assert "\\udcff" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing", "file", "missing/deeper", "dangling"])
def test_directory_that_cannot_be_used_is_an_error(capsys, tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    assert command.main(["info", os.fspath(tmp_path / name)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search("missing|file|nowhere", captured.err)
    assert len(captured.err.splitlines()) == 1


def test_command_line_runs_as_a_module(tmp_path):
    done = run_python("-m", "torch_ext", "info", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compiled_module"]["path"]
    done = run_python("-m", "torch_ext", "info", tmp_path / "missing")
    assert done.returncode == 1
    assert done.stderr.startswith("torch_ext: ")
    assert "missing" in done.stderr
    assert run_python("-m", "torch_ext").returncode == 2


# Without the compiled module ---------------------------------------------------


@pytest.fixture
def without_native(monkeypatch):
    """The compiled module is missing, and _native is not imported yet."""
    monkeypatch.setitem(sys.modules, "torch_ext._C", None)
    monkeypatch.delattr(torch_ext, "_C", raising=False)
    monkeypatch.delitem(sys.modules, "torch_ext._native")
    monkeypatch.setattr(torch_ext, "_native", torch_ext._native)  # Put back afterwards.


def test_info_says_why_the_compiled_module_is_missing(
    capsys, tmp_path, monkeypatch, without_native
):
    def fail():
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch_ext.jit.build", fail)
    status, report = info(capsys, tmp_path)
    assert status == 0
    assert report["compiled_module"]["path"] is None
    assert "no C++ compiler" in report["compiled_module"]["reason"]
    assert "_C" in report["compiled_module"]["reason"]
    assert report["engines"] == []
    assert report["directory"]["file_system"]
    assert len(report["degraded"]) == 1
    assert command.main(["info", os.fspath(tmp_path)]) == 0
    assert "no C++ compiler" in capsys.readouterr().out


def test_missing_compiled_module_is_built_with_a_line_in_the_log(
    caplog, monkeypatch, without_native
):
    monkeypatch.setattr("torch_ext.jit.build", lambda: _C)
    with caplog.at_level(logging.WARNING, "torch_ext"):
        native = importlib.import_module("torch_ext._native")
    assert native._C is _C
    assert [record.name for record in caplog.records] == ["torch_ext"]
    assert "building it now" in caplog.text


def test_info_works_without_torch(tmp_path):
    code = (
        "import sys, runpy\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = ['torch_ext', 'info', {os.fspath(tmp_path)!r}]\n"
        "runpy.run_module('torch_ext', run_name='__main__', alter_sys=True)\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^torch +none", done.stdout, re.MULTILINE)


# Parts -------------------------------------------------------------------------


def test_file_system_is_that_of_the_deepest_mount():
    assert command._file_system("/proc/self")[0] == "proc"
    assert command._file_system("/")[0] not in ("proc", "unknown")
    assert command._file_system("/processes")[0] == command._file_system("/")[0]


def test_file_system_reads_mount_points_with_odd_characters(monkeypatch):
    table = (
        "1 0 8:1 / / rw - ext4 /dev/a rw\n"
        "2 1 8:2 / /my\\040disk rw shared:1 - xfs /dev/b rw\n"
        "3 1 8:3 / /my\\040disk rw - btrfs /dev/c rw\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: table)
    assert command._file_system("/my disk/x") == ("btrfs", "/dev/c")
    assert command._file_system("/my") == ("ext4", "/dev/a")


def report_of(
    *,
    direct=True,
    in_memory=False,
    reserves=True,
    libaio="",
    io_uring="",
    cuda=None,
    devices=("cpu",),
):
    return {
        "compiled_module": {"path": "_C.so", "reason": ""},
        "directory": {
            "direct": direct,
            "buffered_reason": "" if direct else "no O_DIRECT",
            "in_memory": in_memory,
            "reserves": reserves,
            "file_system": "tmpfs" if in_memory else "ext4",
        },
        "engines": [
            {"name": "libaio", "available": not libaio, "reason": libaio},
            {"name": "io_uring", "available": not io_uring, "reason": io_uring},
            {"name": "threads", "available": True, "reason": ""},
        ],
        "cuda_runtime": {"reason": cuda or ""},
        "devices": [{"name": name} for name in devices],
    }


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (report_of(), None),
        (report_of(direct=False), "buffered I/O.*no O_DIRECT"),
        (report_of(in_memory=True), "nothing leaves host memory: tmpfs"),
        (report_of(reserves=False), "zeros are written.*ext4 has no fallocate"),
        (report_of(libaio="aio-max-nr"), None),
        (report_of(io_uring="seccomp"), None),
        (
            report_of(libaio="aio-max-nr", io_uring="seccomp"),
            "threads engine in place of libaio or io_uring.*aio-max-nr.*seccomp",
        ),
        (report_of(cuda="no libcudart"), None),
        (report_of(cuda="no libcudart", devices=("cpu", "cuda:0")), "page-locked.*libcudart"),
    ],
)
def test_each_slower_way_is_named_with_its_reason(report, words):
    ways = command._degraded(report)
    assert len(ways) == (words is not None)
    assert all(re.search(words, way) for way in ways)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (65536, "64 KiB"),
        (8 << 20, "8 MiB"),
        (3 << 39, "1.5 TiB"),
    ],
)
def test_sizes_are_shown_in_powers_of_1024(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(1, "1 KiB"), (4097, "5 KiB"), ((16 << 20) + 1, "17 MiB")]
)
def test_a_size_that_is_to_be_given_is_rounded_up(count, text):
    assert size_up(count) == text
    assert torch_ext.parse_size(text) >= count
