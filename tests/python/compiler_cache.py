"""ccache, where it is there, for the tests that build what was built before."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def compiler_cache(folder: Path) -> dict[str, str]:
    """An environment in which ``c++`` is ccache; makes ``folder/ccache`` for it.

    Paths below ``folder`` count as relative to where the compiler runs: a folder of
    another name, laid out alike, gives the same.
    """
    program = shutil.which("ccache")
    if program is None or "CXX" in os.environ:
        return {}
    (folder / "ccache").mkdir(parents=True, exist_ok=True)
    (folder / "ccache/c++").unlink(missing_ok=True)
    (folder / "ccache/c++").symlink_to(program)
    return {
        "PATH": os.pathsep.join([str(folder / "ccache"), os.environ["PATH"]]),
        # The launcher would call what is ccache already.
        "CMAKE_CXX_COMPILER_LAUNCHER": "",
        "CCACHE_BASEDIR": str(folder),
        "CCACHE_NOHASHDIR": "1",
    }
