"""Each tensor that the library makes names its dtype and its device.

Otherwise the caller's default dtype, or a torch.device context, would decide what a state is
kept in. A user's own class is another matter: it sees the caller's default dtype.
"""

import ast
import re

import tree

FACTORIES = {
    *("arange", "asarray", "as_tensor", "empty", "empty_permuted", "empty_strided", "eye"),
    *("full", "linspace", "logspace", "nested_tensor", "ones", "rand", "randint", "randn"),
    *("randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
# Legacy constructors, which take both from the default.
CONSTRUCTORS = {"Tensor", "FloatTensor", "HalfTensor", "DoubleTensor", "get_default_dtype"}
SETTERS = {"set_default_dtype", "set_default_device", "set_default_tensor_type"}
# Is told apart by what a class keeps under it.
ASKS_FOR_THE_DEFAULT = {"torch_ext/optim/_trial.py"}

PYTHON = [
    f for f in tree.files() if f.suffix == ".py" and f.as_posix().startswith("torch_ext/")
]
CALL = re.compile(
    r"\b(?:at|torch)::(?:arange|empty|empty_strided|eye|from_blob|full|linspace|ones|rand|randint|"
    r"randn|scalar_tensor|tensor|zeros)\("
)


def unnamed(source):
    """(line, call, what it does not name) of each factory call."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        if not isinstance(owner, ast.Name) or owner.id != "torch":
            continue
        if name in CONSTRUCTORS | SETTERS:
            found.append((node.lineno, name, "anything"))
        if name in FACTORIES:
            given = {keyword.arg for keyword in node.keywords}
            found += [
                (node.lineno, name, what) for what in ("dtype", "device") if what not in given
            ]
    return found


def unnamed_in_cpp(source):
    """Each call without options, which host_options() makes, or a tensor's."""
    found = []
    for call in CALL.finditer(source):
        depth, end = 1, call.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        text = source[call.start() : end]
        if not re.search(r"options|dtype\(.*device\(", text, flags=re.DOTALL):
            found.append(" ".join(text.split()))
    return found


def test_python_names_the_dtype_and_the_device_of_each_tensor_it_makes():
    for file in PYTHON:
        found = unnamed((tree.ROOT / file).read_text())
        if file.as_posix() in ASKS_FOR_THE_DEFAULT:
            found = [entry for entry in found if entry[1] != "get_default_dtype"]
        assert found == [], file


def test_cpp_names_the_dtype_and_the_device_of_each_tensor_it_makes():
    for file in tree.cpp_files("include/torch_ext/tensor", "csrc/tensor", "csrc/bindings"):
        assert unnamed_in_cpp((tree.ROOT / file).read_text()) == [], file


def test_a_tensor_that_names_neither_is_found():
    assert unnamed("import torch\nx = torch.zeros(3)") == [
        (2, "zeros", "dtype"),
        (2, "zeros", "device"),
    ]
    assert unnamed('torch.full((), 1.0, dtype=torch.float32, device="cpu")') == []
    assert unnamed("torch.set_default_dtype(torch.float32)") != []
    assert unnamed_in_cpp("at::empty(sizes(), at::kFloat)") == [
        "at::empty(sizes(), at::kFloat)"
    ]
    assert unnamed_in_cpp("at::empty({size}, host_options(at::kFloat))") == []
