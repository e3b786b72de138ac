"""Builds the C++ extension at run time, where no built one fits."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any

_PACKAGE = Path(__file__).resolve().parent


def build(
    name: str = "torch_ext_C",
    verbose: bool = False,
    *,
    lock_timeout: float = 300.0,
    **kwargs: Any,
) -> ModuleType:
    """Compiles the extension with ``torch.utils.cpp_extension.load``.

    The whole C++ core and the binding are compiled with the torch and the compiler at hand.
    This takes about a minute, once for each version of torch_ext and torch; a UserWarning says
    so before it begins. No CUDA toolkit is needed. Neither libaio nor liburing is used: the
    extension makes raw system calls instead of libaio's, and has no io_uring engine.

    Args:
        name: The name of the extension module.
        verbose: Whether the compiler's commands are shown.
        lock_timeout: Seconds to wait while another process builds the same.
        **kwargs: Passed on. ``extra_cflags``, ``extra_ldflags`` and ``extra_include_paths`` are
            added to those of torch_ext. No other extension may be built in ``build_directory``
            at the same time.

    Returns:
        The module that torch_ext uses as ``torch_ext._C``. Use the names of ``torch_ext``,
        which are the same with either.

    Raises:
        RuntimeError: The compiler, ninja or a header is missing, or the build failed. The text
            has the remedy, or the compiler's words.
        TimeoutError: Another process, which the text names, went on building.
    """
    from torch.utils import cpp_extension

    root = _source_root()
    directory = Path(kwargs.pop("build_directory", None) or _cache(name, root))
    directory.mkdir(parents=True, exist_ok=True)
    sources = json.loads((root / "csrc/sources.json").read_text())
    arguments = {"with_cuda": False} | kwargs
    arguments["extra_cflags"] = [
        *["-std=c++20", "-O2", "-g0", "-fvisibility=hidden"],
        "-DTORCH_EXT_RAW_AIO",
        *kwargs.get("extra_cflags", ()),
    ]
    arguments["extra_ldflags"] = ["-pthread", "-ldl", *kwargs.get("extra_ldflags", ())]
    arguments["extra_include_paths"] = [
        str(root / "include"),
        str(root / "csrc"),
        *_third_party(root),
        *kwargs.get("extra_include_paths", ()),
    ]
    _check_compiler_and_python()
    with _ninja_on_path(), _locked(directory / "torch_ext.lock", lock_timeout):
        # This file is a lock of torch's own. Up to 2.14 it blocks as long as the file exists,
        # and a killed build leaves it behind. Nobody builds here while our lock is held.
        (directory / "lock").unlink(missing_ok=True)
        if not (directory / f"{name}.so").exists():
            # A warning, unlike a log, is shown on stderr unless the user has chosen otherwise.
            warnings.warn(
                f"torch_ext: compiling the C++ extension in {directory}; this takes about "
                f"a minute, once",
                UserWarning,
                stacklevel=2,
            )
        return cpp_extension.load(
            name,
            [str(root / "csrc" / file) for file in sources["core"] + sources["bindings"]],
            build_directory=str(directory),
            verbose=verbose,
            **arguments,
        )


def _source_root() -> Path:
    """Returns where csrc and include are: in the wheel's package, beside it in a checkout."""
    for root in (_PACKAGE, _PACKAGE.parent):
        if (root / "csrc/sources.json").is_file():
            return root
    raise RuntimeError(f"{_PACKAGE} has no C++ sources: install torch_ext again")


def _cache(name: str, root: Path) -> Path:
    """Returns a folder for this torch and these sources alone.

    torch's own choice knows neither. And ninja goes by times, which cannot tell that another
    torch was installed.
    """
    import torch
    from torch.utils import cpp_extension

    base = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    key = hashlib.sha256(f"{root}\n{sys.prefix}\n{python}".encode()).hexdigest()[:12]
    return Path(base) / f"{name}-torch{torch.__version__}-{key}"


def _third_party(root: Path) -> list[str]:
    """Returns folders with nlohmann/json.hpp and xxhash.h, where the compiler lacks them."""
    shipped = root / "third_party/include"
    if shipped.is_dir():
        return [str(shipped)]
    folders = []
    places = [Path("/usr/include"), Path("/usr/local/include"), root / ".deps/usr/include"]
    places += [Path(p) / "nlohmann_json/include" for p in sys.path]
    for header, package in (
        ("xxhash.h", "libxxhash-dev"),
        ("nlohmann/json.hpp", "nlohmann-json3-dev"),
    ):
        place = next((p for p in places if (p / header).is_file()), None)
        if place is None:
            raise RuntimeError(
                f"<{header}> is missing: type `apt-get install {package}` or, without "
                f"root, `make deps`"
            )
        if place not in places[:2]:  # The compiler looks in the first two by itself.
            folders.append(str(place))
    return folders


def _check_compiler_and_python() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"torch_ext.build() needs a C++20 compiler and found no {compiler!r}: type "
            f"`apt-get install g++`, or set CXX"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise RuntimeError(
            f"torch_ext.build() needs {header}: type `apt-get install python3-dev`"
        )


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Adds Python's folder to PATH: pip puts ninja there."""
    before = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        beside = Path(sys.executable).parent
        if not (beside / "ninja").exists():
            raise RuntimeError("torch_ext.build() needs ninja: type `pip install ninja`")
        os.environ["PATH"] = f"{beside}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    """Holds the lock file. A process that ends leaves it unlocked."""
    deadline = time.monotonic() + timeout
    with path.open("a+") as file:
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                file.seek(0)
                raise TimeoutError(
                    f"process {file.read().strip() or 'unknown'} has been building the "
                    f"C++ extension for {timeout:g} s and still holds {path}: wait for "
                    f"it or end it, or raise lock_timeout"
                )
            time.sleep(min(0.1, max(timeout, 0.001)))
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
