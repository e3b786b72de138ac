"""What the tests of the repository itself share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


# What a walk leaves out where git does not say what is ignored.
_BUILT_FOLDERS = {".git", ".venv", ".deps", "build", "dist", "__pycache__"}
_BUILT_FOLDERS |= {".pytest_cache", ".ruff_cache", ".hypothesis"}
_BUILT = ("torch_ext/lib/", "torch_ext/include/", "torch_ext/share/", "torch_ext/csrc/")


@contextmanager
def imports_from(*folders: str) -> Iterator[None]:
    """Imports the modules of ``folders``, relative to the root, and forgets them at the end.

    Names are not unique: tests/python/ranks.py is not benchmarks/ranks.py. The tests that share
    this process find the modules they had, whose functions and classes they may pickle.
    """
    paths = [str(ROOT / folder) for folder in folders]
    names = {file.stem for path in paths for file in Path(path).glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    sys.path[:0] = paths
    try:
        yield
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@cache
def files() -> list[Path]:
    """All files of the project, relative to its root; no built or ignored ones."""
    names = _names_of_git() if (ROOT / ".git").exists() else None
    if names is None:  # A source distribution, or no git here.
        names = walked(ROOT)
    return [Path(name) for name in sorted(names) if (ROOT / name).is_file()]


def _names_of_git() -> list[str] | None:
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [name for name in listing.stdout.split("\0") if name]


def walked(root: Path) -> list[str]:
    """The files below ``root``, relative to it, without what builds leave there."""
    names = []
    for folder, below, here in os.walk(root):
        below[:] = [f for f in below if f not in _BUILT_FOLDERS and ".egg-info" not in f]
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in here]
    return [
        name
        for name in names
        if not name.startswith(_BUILT) and not name.endswith((".so", ".pyc"))
    ]


def cpp_files(*folders: str) -> list[Path]:
    return [
        file
        for file in files()
        if file.suffix in (".h", ".cpp") and file.as_posix().startswith(folders)
    ]
