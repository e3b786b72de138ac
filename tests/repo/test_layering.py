"""A file includes its own layer and those below it, and little else."""

import re
from functools import cache

import tree

LAYERS = [
    *["base", "config", "io", "device", "memory", "store", "paging", "swap", "optim"],
    *["tensor", "bindings"],
]
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
# csrc/tensor is compiled by programs that have no path to csrc.
FROM_TENSOR = "../base/mutex.h"
BANNED = re.compile(r"torch/(extension|all|torch)\.h$")
# The outside world, and the only folders that may see it.
ALLOWED = {
    r"(libaio|linux/aio_abi)\.h$": ["csrc/io/"],
    r"liburing": ["csrc/io/"],
    r"nlohmann/": [
        "csrc/config/",
        "csrc/optim/adamw_commit.cpp",
        "csrc/optim/commit_document.cpp",
        "csrc/swap/safetensors.cpp",
        "csrc/swap/safetensors_checkpoint.cpp",
    ],
    r"(dlfcn\.h$|cuda|driver_types)": ["csrc/device/"],
    r"xxhash": ["csrc/base/"],
    r"(torch|ATen|c10)/": ["include/torch_ext/tensor/", "csrc/tensor/", "csrc/bindings/"],
    r"(pybind11/|Python\.h$)": ["csrc/bindings/"],
}


@cache
def includes(file):
    return INCLUDE.findall((tree.ROOT / file).read_text())


def all_includes(*folders):
    """(file, quote, name) of every include. One test looks at all of them: a test for
    each file would take longer to begin than to run."""
    files = tree.cpp_files(*folders)
    assert len(files) > 20
    return [(file, quote, name) for file in files for quote, name in includes(file)]


def is_of_its_layer_or_below(file, quote, name):
    layer = LAYERS.index(file.parent.name)
    if name.startswith("torch_ext/"):
        return LAYERS.index(name.split("/")[1]) <= layer
    if name == FROM_TENSOR:
        return file.parent.name == "tensor"
    if quote == '"' and "/" in name:
        there = (tree.ROOT / "csrc" / name).is_file()
        return there and LAYERS.index(name.split("/")[0]) < layer
    return quote != '"' or (tree.ROOT / file.parent / name).is_file()


def test_files_include_only_their_layer_and_those_below():
    strangers = [
        f"{file}: {name}"
        for file, quote, name in all_includes("include/", "csrc/")
        if not is_of_its_layer_or_below(file, quote, name)
    ]
    assert strangers == []


def test_files_see_only_the_libraries_their_layer_may():
    strangers = [
        f"{file}: {name}"
        for file, _, name in all_includes("include/", "csrc/")
        for pattern, folders in ALLOWED.items()
        if re.match(pattern, name) and not file.as_posix().startswith(tuple(folders))
    ]
    assert strangers == []


def test_one_module_of_python_imports_the_compiled_one():
    """The one that builds it where there is none."""
    direct = re.compile(
        r"from torch_ext import .*\b_C\b|import torch_ext\._C|torch_ext\._C import"
    )
    files = (tree.ROOT / "torch_ext").glob("*.py")
    assert [f.name for f in files if direct.search(f.read_text())] == ["_native.py"]


def test_no_include_costs_half_a_minute_or_leaves_its_folder():
    strangers = [
        f"{file}: {name}"
        for file, _, name in all_includes("")
        if BANNED.match(name) or (name.startswith("../") and name != FROM_TENSOR)
    ]
    assert strangers == []
