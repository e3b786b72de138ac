"""A file includes its own layer and those below it, and little else."""

import re

import pytest
import tree

LAYERS = [
    *["base", "config", "io", "device", "memory", "store", "swap", "optim"],
    *["tensor", "bindings"],
]
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
BANNED = re.compile(r"torch/(extension|all|torch)\.h$")
# The outside world, and the only folders that may see it.
ALLOWED = {
    r"(libaio|linux/aio_abi)\.h$": ["csrc/io/"],
    r"liburing": ["csrc/io/"],
    r"nlohmann/": ["csrc/config/"],
    r"(dlfcn\.h$|cuda|driver_types)": ["csrc/device/"],
    r"xxhash": ["csrc/base/"],
    r"(torch|ATen|c10)/": ["include/torch_ext/tensor/", "csrc/bindings/"],
    r"(pybind11/|Python\.h$)": ["csrc/bindings/"],
}


def includes(file):
    return INCLUDE.findall((tree.ROOT / file).read_text())


@pytest.mark.parametrize("file", tree.cpp_files("include/", "csrc/"), ids=str)
def test_file_includes_only_its_layer_and_those_below(file):
    layer = LAYERS.index(file.parent.name)
    for quote, name in includes(file):
        if name.startswith("torch_ext/"):
            assert LAYERS.index(name.split("/")[1]) <= layer, name
        elif quote == '"' and "/" in name:
            assert (tree.ROOT / "csrc" / name).is_file(), f"{name}: no header of a layer"
            assert LAYERS.index(name.split("/")[0]) < layer, name
        elif quote == '"':
            assert (tree.ROOT / file.parent / name).is_file(), f"{name}: not of this folder"


@pytest.mark.parametrize("file", tree.cpp_files("include/", "csrc/"), ids=str)
def test_file_sees_only_the_libraries_its_layer_may(file):
    for _, name in includes(file):
        for pattern, folders in ALLOWED.items():
            if re.match(pattern, name):
                assert file.as_posix().startswith(tuple(folders)), name


def test_one_module_of_python_imports_the_compiled_one():
    """The one that builds it where there is none."""
    direct = re.compile(
        r"from torch_ext import .*\b_C\b|import torch_ext\._C|torch_ext\._C import"
    )
    files = (tree.ROOT / "torch_ext").glob("*.py")
    assert [f.name for f in files if direct.search(f.read_text())] == ["_native.py"]


@pytest.mark.parametrize("file", tree.cpp_files(""), ids=str)
def test_file_has_no_include_that_costs_half_a_minute_or_leaves_its_folder(file):
    for _, name in includes(file):
        assert not BANNED.match(name), name
        assert not name.startswith("../"), name
