"""The command line: `python -m torch_ext info`, and `verify`, `export`, `remove` of stores."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch_ext
from torch_ext import _store_commands, _stores
from torch_ext._size import size

_Report = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m torch_ext", description=torch_ext.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    info = commands.add_parser(
        "info",
        help="what torch_ext finds on this machine; with PATH, what the stores there hold",
        description="Shows what torch_ext finds on this machine, and which way it will take. "
        "If committed stores are in PATH, it shows what they hold instead. It takes no lock.",
    )
    info.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="a directory on the file system that will hold the tensors (default: this one); "
        "or directories or files with stores",
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    _store_commands.add_parsers(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


def _info(options: argparse.Namespace) -> int:
    if len(options.paths) > 1 or any(map(_stores.holds_stores, options.paths)):
        return _store_commands.run_info(options.paths, options.json)
    try:
        report = collect(options.paths[0] if options.paths else ".")
    except OSError as error:
        print(f"torch_ext: {error}", file=sys.stderr)
        return 1
    text = json.dumps(report, indent=2) if options.json else _render(report)
    print(text.encode(errors="backslashreplace").decode())  # A path may not be UTF-8.
    return 0


def collect(directory: str | os.PathLike[str]) -> _Report:
    """Returns all that `info` shows.

    Raises:
        OSError: ``directory`` is missing or no file can be made in it.
    """
    path = os.path.realpath(directory, strict=True)
    if not os.path.isdir(path):
        raise NotADirectoryError(20, os.strerror(20), os.fspath(directory))
    native, why_not = _native()
    report = {
        "versions": _versions(),
        "compiled_module": {"path": getattr(native, "__file__", None), "reason": why_not},
        "devices": _devices(),
        "cuda_runtime": _cuda_runtime(native),
        "engines": [
            {"name": name, "available": not reason, "reason": reason}
            for name, reason in (native.engine_info() if native else [])
        ],
        "directory": _directory(native, path),
        "limits": _limits(),
    }
    report["degraded"] = _degraded(report)
    return report


def _native() -> tuple[ModuleType | None, str]:
    try:
        from torch_ext._native import _C
    except Exception as error:  # Whatever a missing torch or compiler raises.
        first = f"{error.__context__}; then " if error.__context__ else ""
        return None, f"{first}{type(error).__name__}: {error}"
    return _C, ""


def _versions() -> _Report:
    try:
        from torch import __version__ as torch_version
    except ImportError as error:
        torch_version = f"none ({error})"
    return {
        "torch_ext": torch_ext.__version__,
        "torch": str(torch_version),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def _devices() -> list[_Report]:
    devices = [{"name": "cpu", "model": platform.machine()}]
    try:
        from torch import accelerator, cuda
    except ImportError:
        return devices
    kind = accelerator.current_accelerator(check_available=True)
    for index in range(accelerator.device_count() if kind else 0):
        model = cuda.get_device_name(index) if kind.type == "cuda" else kind.type
        devices.append({"name": f"{kind.type}:{index}", "model": model})
    return devices


def _cuda_runtime(native: ModuleType | None) -> _Report:
    if native is None:
        return {"version": None, "library": None, "reason": "no compiled module"}
    version, reason = native.cuda_runtime_info()
    if reason:
        return {"version": None, "library": None, "reason": reason}
    maps = Path("/proc/self/maps").read_text(errors="replace")
    library = re.search(r"\S*/libcudart\S*$", maps, re.MULTILINE)
    return {
        "version": f"{version // 1000}.{version % 1000 // 10}",
        "library": library.group() if library else None,
        "reason": "",
    }


def _directory(native: ModuleType | None, path: str) -> _Report:
    file_system, source = _file_system(path)
    report = {
        "path": path,
        "file_system": file_system,
        "source": source,
        "free_bytes": shutil.disk_usage(path).free,
    }
    if native is not None:
        try:
            report |= native.probe_directory(path)
        except OSError as error:
            why = (
                f"no file can be made in this directory, which is on {file_system} "
                f"({error.strerror})"
            )
            raise OSError(error.errno, why, path) from error
    return report


def _file_system(path: str) -> tuple[str, str]:
    """Returns type and source of the mount that holds ``path``: the deepest, last one."""
    found = ("unknown", "unknown")
    deepest = -1
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        mount, _, source = line.partition(" - ")
        # The kernel writes space, tab, newline and backslash in octal.
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), mount.split(" ")[4])
        if os.path.commonpath([point, path]) == point and len(point) >= deepest:
            deepest = len(point)
            found = (source.split(" ")[0], source.split(" ")[1])
    return found


def _limits() -> _Report:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "aio_max_nr": _read_number("/proc/sys/fs/aio-max-nr"),
        "aio_nr": _read_number("/proc/sys/fs/aio-nr"),
        "memlock_bytes": None if soft == resource.RLIM_INFINITY else soft,
        "memlock_hard_bytes": None if hard == resource.RLIM_INFINITY else hard,
    }


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except OSError:  # The kernel does not have it.
        return None


def _degraded(report: _Report) -> list[str]:
    """Returns the slower ways that will be taken here, with the reasons."""
    module = report["compiled_module"]
    if module["path"] is None:
        return [f"nothing works without the compiled module: {module['reason']}"]
    ways = []
    if not report["directory"]["direct"]:
        ways.append(
            f"buffered I/O through the threads engine: {report['directory']['buffered_reason']}"
        )
    if report["directory"]["in_memory"]:
        ways.append(
            f"nothing leaves host memory: {report['directory']['file_system']} keeps its files "
            f"there"
        )
    if not report["directory"]["reserves"]:
        ways.append(
            f"zeros are written to space that is new, to make sure of it: "
            f"{report['directory']['file_system']} has no fallocate"
        )
    asynchronous = [e for e in report["engines"] if e["name"] in ("libaio", "io_uring")]
    if not any(engine["available"] for engine in asynchronous):
        reasons = "; ".join(f"{engine['name']}: {engine['reason']}" for engine in asynchronous)
        ways.append(f"the threads engine in place of libaio or io_uring; {reasons}")
    on_cuda = any(device["name"].startswith("cuda") for device in report["devices"])
    if on_cuda and report["cuda_runtime"]["reason"]:
        ways.append(
            f"copies from and to the GPU through memory that is not page-locked: "
            f"{report['cuda_runtime']['reason']}"
        )
    return ways


def _render(report: _Report) -> str:
    versions, directory = report["versions"], report["directory"]
    limits, cuda = report["limits"], report["cuda_runtime"]
    memlock = limits["memlock_bytes"]
    module = report["compiled_module"]
    lines = [
        ("torch_ext", versions["torch_ext"]),
        ("compiled module", module["path"] or f"none: {module['reason']}"),
        ("torch", versions["torch"]),
        ("Python", versions["python"]),
        ("kernel", versions["kernel"]),
    ]
    lines += [
        ("device", f"{device['name']} ({device['model']})") for device in report["devices"]
    ]
    found = f"{cuda['version']} ({cuda['library'] or 'library unknown'})"
    lines += [("CUDA run-time", f"none: {cuda['reason']}" if cuda["reason"] else found)]
    lines += [
        (f"engine {engine['name']}", engine["reason"] or "available")
        for engine in report["engines"]
    ]
    lines += [
        ("directory", directory["path"]),
        ("file system", f"{directory['file_system']} on {directory['source']}"),
        ("free space", size(directory["free_bytes"])),
    ]
    if "direct" in directory:
        memory, offset = directory["memory_alignment"], directory["offset_alignment"]
        lines += [
            ("direct I/O", "yes" if directory["direct"] else directory["buffered_reason"]),
            ("alignment", f"memory {memory}, offset and length {offset} bytes"),
            ("fallocate", "yes" if directory["reserves"] else "no"),
        ]
    lines += [
        ("fs.aio-max-nr", f"{limits['aio_max_nr']}, of which {limits['aio_nr']} are in use"),
        ("memlock limit", "unlimited" if memlock is None else size(memlock)),
    ]
    lines += [("degraded", way) for way in report["degraded"] or ["nothing"]]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


if __name__ == "__main__":
    sys.exit(main())
