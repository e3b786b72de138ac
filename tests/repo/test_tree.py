"""Rules about files that no compiler holds."""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tree

CODE = [f for f in tree.files() if f.suffix in (".h", ".cpp", ".py", ".sh", ".cmake", ".pyi")]
# Written apart, so that this file passes its own test.
PLACES = re.compile(
    "|".join(
        [
            r"(?<![\w.])/(work|root|home)/\w",
            *["py" + r"pi\.org", "python" + r"hosted\.org", "deb" + r"ian\.org"],
        ]
    )
)


def text_of(file):
    return (tree.ROOT / file).read_text(encoding="utf-8", errors="ignore")


def test_no_file_names_a_place_on_the_machine_it_was_written_on():
    names = [PLACES]
    if len(platform.node()) > 8:
        names.append(re.compile(re.escape(platform.node())))
    for file in tree.files():
        for name in names:
            assert not name.search(text_of(file)), f"{file}: {name.search(text_of(file))}"


def test_no_wait_depends_on_a_clock_that_can_be_set():
    setting = re.compile(r"system_clock|high_resolution_clock|CLOCK_REALTIME|gettimeofday")
    users = [f for f in tree.cpp_files("csrc", "include") if setting.search(text_of(f))]
    assert users == []


def test_every_mutex_is_one_that_says_what_it_guards():
    own = re.compile(r"std::(mutex|lock_guard|scoped_lock|condition_variable)\b")
    for file in tree.cpp_files("csrc"):
        if file.as_posix() == "csrc/base/mutex.h":
            continue
        text = text_of(file)
        assert not own.search(text), f"{file}: {own.search(text)}"
        for name in re.findall(r"^\s+(?:mutable )?Mutex (\w+);", text, re.MULTILINE):
            assert re.search(rf"(GUARDED_BY|REQUIRES)\({name}\)", text), f"{file}: {name}"


def test_the_core_library_needs_nothing_of_torch_python_or_cuda():
    library = tree.ROOT / "torch_ext/lib/libtorch_ext_core.so"
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "pwrite" in symbols
    assert not re.findall(r"\b(?:at|c10|torch|pybind11)::|\bPy[A-Z_]|\bcuda[A-Z]", symbols)


def test_the_core_library_exports_its_own_namespace_only():
    library = tree.ROOT / "torch_ext/lib/libtorch_ext_core.so"
    symbols = subprocess.run(
        ["nm", "-DC", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    strangers = [line for line in symbols.splitlines() if "torch_ext::" not in line]
    assert strangers == []
    assert "typeinfo for torch_ext::IoError" in symbols


def test_every_public_core_header_compiles_alone():
    build = os.environ.get("TORCH_EXT_BUILD_DIR", str(tree.ROOT / "build/release"))
    subprocess.run(
        ["cmake", "--build", build, "--target", "all_verify_interface_header_sets", "-j2"],
        check=True,
    )


def test_without_git_the_files_are_found_by_a_walk(monkeypatch, tmp_path):
    listed = {file.as_posix() for file in tree.files()}
    assert listed <= set(tree.walked(tree.ROOT))
    for name in ("csrc/a.cpp", "build/b.cpp", ".venv/c.py", "torch_ext/lib/d.so", "e.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(tree, "ROOT", tmp_path)
    for git_fails in (False, True):
        if git_fails:
            (tmp_path / ".git").write_text("no repository")
        tree.files.cache_clear()
        try:
            assert [f.as_posix() for f in tree.files() if f.name != ".git"] == ["csrc/a.cpp"]
        finally:
            tree.files.cache_clear()


def test_there_is_one_version_number():
    import torch_ext

    assert f'version = "{torch_ext.__version__}"' in text_of("pyproject.toml").splitlines()


MUTANTS = [f for f in tree.files() if f.match("tests/mutants/*.patch")]


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_mutants_still_fit_the_code():
    assert MUTANTS
    for patch in MUTANTS:
        command = ["git", "-c", "safe.directory=*", "apply", "--check", str(tree.ROOT / patch)]
        done = subprocess.run(
            command, cwd=tree.ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{patch}: {done.stderr}"


def test_modules_of_one_name_do_not_get_in_each_others_way(monkeypatch):
    mine = types.ModuleType("ranks")
    monkeypatch.setitem(sys.modules, "ranks", mine)
    path = list(sys.path)
    with tree.imports_from("benchmarks"):
        theirs = importlib.import_module("ranks")
        assert Path(theirs.__file__) == tree.ROOT / "benchmarks/ranks.py"
    assert sys.modules["ranks"] is mine
    assert "common" not in sys.modules
    assert sys.path == path
