"""_C.pyi says exactly what the compiled module has."""

import ast
import inspect
import re

import pytest
import tree

from torch_ext._native import _C

STUB = ast.parse((tree.ROOT / "torch_ext/_C.pyi").read_text())


def is_public(name):
    return not name.startswith("_")


def members(body):
    """Names that a class or module of the stub defines, with their nodes."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.AnnAssign):
            found.setdefault(node.target.id, []).append(node)
    return found


def stub_parameters(node):
    """(name, has a default, is keyword-only) of each parameter."""
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    without = len(plain) - len(a.defaults)
    found = [(arg.arg, i >= without, False) for i, arg in enumerate(plain)]
    found += [
        (arg.arg, d is not None, True)
        for arg, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    return found


def split_parameters(text):
    """Cuts at the commas that stand in no bracket and no string."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{<":
            depth += 1
        elif c in ")]}>":
            depth -= 1
        if c == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def module_signatures(function):
    """The same, of each overload, read from the text that pybind11 writes."""
    name = function.__name__
    lines = (function.__doc__ or "").splitlines()
    found = []
    for line in lines:
        match = re.match(rf"(?:\d+\. )?{name}\((.*)\) -> .*$", line)
        if match is None or match[1] == "*args, **kwargs":
            continue
        parameters, keyword_only = [], False
        for part in split_parameters(match[1]):
            if part in ("*", "/"):
                keyword_only = keyword_only or part == "*"
                continue
            parameters.append((part.partition(":")[0], " = " in part, keyword_only))
        found.append(parameters)
    return found


def classes():
    return [c for _, c in inspect.getmembers(_C, inspect.isclass)]


def same_signatures(function, nodes):
    stub = [stub_parameters(n) for n in nodes]
    return sorted(map(str, module_signatures(function))) == sorted(map(str, stub))


def test_module_and_stub_have_the_same_names():
    assert sorted(filter(is_public, members(STUB.body))) == sorted(filter(is_public, dir(_C)))


@pytest.mark.parametrize("cls", classes(), ids=lambda c: c.__name__)
def test_class_and_stub_have_the_same_members(cls):
    (node,) = members(STUB.body)[cls.__name__]
    stub = members(node.body)
    assert sorted(filter(is_public, stub)) == sorted(filter(is_public, vars(cls)))
    assert not [name for name in stub if not hasattr(cls, name)]


@pytest.mark.parametrize("cls", classes(), ids=lambda c: c.__name__)
def test_methods_take_the_same_parameters(cls):
    (node,) = members(STUB.body)[cls.__name__]
    for name, nodes in members(node.body).items():
        value = vars(cls).get(name)
        kinds = {
            ast.unparse(d)
            for n in nodes
            if isinstance(n, ast.FunctionDef)
            for d in n.decorator_list
        }
        if isinstance(value, property):
            writable = isinstance(nodes[0], ast.AnnAssign) or f"{name}.setter" in kinds
            assert writable or "property" in kinds, name
            assert writable == (value.fset is not None), name
        elif isinstance(nodes[0], ast.FunctionDef) and value is not None:
            function = getattr(cls, name)
            if is_public(name) or name == "__init__":
                assert same_signatures(function, nodes), (name, function.__doc__)


def test_functions_take_the_same_parameters():
    stub = members(STUB.body)
    for name, function in inspect.getmembers(_C, inspect.isroutine):
        if is_public(name):
            assert same_signatures(function, stub[name]), (name, function.__doc__)
