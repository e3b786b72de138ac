"""What the tests of the repository itself share."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def files() -> list[Path]:
    """All files of the project, relative to its root; no built or ignored ones."""
    listing = subprocess.run(
        [
            "git",
            "-c",
            "safe.directory=*",
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [
        Path(name) for name in sorted(listing.split("\0")) if name and (ROOT / name).is_file()
    ]


def cpp_files(*folders: str) -> list[Path]:
    return [
        file
        for file in files()
        if file.suffix in (".h", ".cpp") and file.as_posix().startswith(folders)
    ]
