"""Breaks the code in the ways tests/mutants/*.patch describe, one at a time.

A patch begins with comment lines:

    # test: SwapperTest.*                 a GoogleTest filter, or
    # test: tests/python/test_x.py::test_y   a pytest node
    # build: core                         core (default for GoogleTest), tensor or python
    # why: what goes wrong without the code that it removes

Each is applied to a copy of the tree and built there. The test named must then fail. It must
pass before, or its failure would prove nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEST_TIMEOUT = 300  # Seconds: a mutant may hang, which is noticing too.


@dataclass
class Mutant:
    patch: Path
    test: str
    build: str

    @property
    def name(self) -> str:
        return self.patch.stem


def read(patch: Path) -> Mutant:
    head = {}
    for line in patch.read_text().splitlines():
        if not line.startswith("# "):
            break
        key, _, value = line[2:].partition(": ")
        head[key] = value.strip()
    if "test" not in head:
        raise SystemExit(f"{patch}: no line '# test: ...'")
    python = head["test"].startswith("tests/")
    return Mutant(patch, head["test"], head.get("build", "python" if python else "core"))


class Copy:
    """A copy of the tree with its own build folder, kept between mutants."""

    def __init__(self, folder: Path):
        self.tree = folder / "tree"
        self.build = folder / "build"
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in filter(None, listing.split("\0")):
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        if (ROOT / ".deps").is_dir():
            (self.tree / ".deps").symlink_to(ROOT / ".deps")
        self.env = os.environ | {
            "PYTHONPATH": str(self.tree),
            "TORCH_EXT_BUILD_DIR": str(self.build),
            "TORCH_EXT_SIM_LIBRARY": str(self.build / "tests/libtorch_ext_sim.so"),
        }
        self.log = (folder / "log").open("w+")

    def run(self, *command: object, timeout: float | None = None) -> bool:
        try:
            done = subprocess.run(
                [str(c) for c in command],
                cwd=self.tree,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def make(self, mutant: Mutant) -> bool:
        targets = [f"torch_ext_{mutant.build}_tests"]
        if mutant.build == "python":
            targets = ["torch_ext_python", "torch_ext_sim"]
        done = self.run(
            *["cmake", "-S", self.tree, "-B", self.build, "-DTORCH_EXT_TESTS=ON"],
            *["-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1"],
            f"-DPython3_EXECUTABLE={sys.executable}",
        ) and self.run(
            *["cmake", "--build", self.build, "--parallel", os.cpu_count()],
            *["--target", *targets],
        )
        for module in self.build.glob("_C.*.so"):
            shutil.copy2(module, self.tree / "torch_ext")
        return done

    def test(self, mutant: Mutant) -> bool:
        if mutant.test.startswith("tests/"):
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                mutant.test,
            ]
        else:
            command = [
                self.build / f"tests/torch_ext_{mutant.build}_tests",
                f"--gtest_filter={mutant.test}",
            ]
        return self.run(*command, timeout=TEST_TIMEOUT)

    def patch(self, mutant: Mutant, *, undo: bool = False) -> bool:
        reverse = ["--reverse"] if undo else []
        return self.run("git", "apply", *reverse, mutant.patch.resolve())

    def last_words(self) -> str:
        self.log.flush()
        return "\n".join(Path(self.log.name).read_text(errors="replace").splitlines()[-40:])


def judge(copy: Copy, mutant: Mutant) -> str:
    """Empty if the mutant was noticed, else what is wrong."""
    if not copy.make(mutant):
        return "the tree does not build unbroken"
    if not copy.test(mutant):
        return f"{mutant.test} fails already without the patch"
    if not copy.patch(mutant):
        return "the patch does not apply"
    try:
        if not copy.make(mutant):
            return "does not build with the patch"
        if copy.test(mutant):
            return f"{mutant.test} passes all the same"
    finally:
        copy.patch(mutant, undo=True)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="patches to try (default: all)")
    names = parser.parse_args().names
    patches = sorted((ROOT / "tests/mutants").glob("*.patch"))
    mutants = [m for m in map(read, patches) if not names or m.name in names]
    if not mutants:
        print("no such mutant")
        return 1
    missed = 0
    with tempfile.TemporaryDirectory(prefix="torch_ext_mutants.", dir="/var/tmp") as folder:
        copy = Copy(Path(folder))
        for mutant in sorted(mutants, key=lambda m: m.build):
            wrong = judge(copy, mutant)
            missed += bool(wrong)
            print(
                f"{'MISSED ' if wrong else 'noticed'} {mutant.name}: {wrong or mutant.test}",
                flush=True,
            )
            if wrong:
                print(copy.last_words())
    print(f"{len(mutants) - missed} passed, {missed} failed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
