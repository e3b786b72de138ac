"""Optimizer classes of torch and of other packages, each with OffloadedOptimizer and alone.

    python tests/python/optimizer_classes.py [--write docs/optimizers.md] [PACKAGE ...]

Trains the same parameters twice and compares all bits. Says which classes are equal, and which
are refused with which text. Fails if one is neither. ``make optimizers-table`` installs the
packages first.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import multiprocessing
import re
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from torch_ext import OffloadedOptimizer

#: Packages: the module that has the classes, and what is installed.
PACKAGES = {
    "torch": ("torch.optim", "torch"),
    "timm": ("timm.optim", "timm"),
    "pytorch_optimizer": ("pytorch_optimizer", "pytorch-optimizer"),
    "schedulefree": ("schedulefree", "schedulefree"),
    "prodigyopt": ("prodigyopt", "prodigyopt"),
    "lion_pytorch": ("lion_pytorch", "lion-pytorch"),
    "optimi": ("optimi", "torch-optimi"),
    "dadaptation": ("dadaptation", "dadaptation"),
}
#: Seconds for a class; some compile for longer.
LIMIT = 120
_SIZES = [(37, 23), 5, 2501, (3, 4, 5, 2), ()], [(140, 131), 77]
_STEPS = 14


class Verdict(NamedTuple):
    #: "equal", "refused", "no use" (the class alone raises, too) or "DIFFERS".
    kind: str
    text: str = ""


def classes(package: str) -> dict[str, type[torch.optim.Optimizer]]:
    """A package's own optimizer classes by name; ImportError if it is not there."""
    if package == "timm":
        _without_models("timm")
    module = importlib.import_module(PACKAGES[package][0])
    found = {
        name: cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls)
        and issubclass(cls, torch.optim.Optimizer)
        and cls.__module__.split(".")[0] == package
        and cls is not torch.optim.Optimizer
    }
    return dict(sorted(found.items()))


def _without_models(package: str) -> None:
    """Lets a package's optimizers be imported without what only its models need."""
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"{package} is not installed")
    whole = types.ModuleType(package)
    whole.__path__ = list(spec.submodule_search_locations or [])
    models = types.ModuleType(f"{package}.models")
    models.group_parameters = None  # type: ignore[attr-defined]
    sys.modules[package], sys.modules[f"{package}.models"] = whole, models


def compare(cls: type[torch.optim.Optimizer], nvme_path: Path) -> Verdict:
    """Trains parameters of odd sizes with the class and with its state on NVMe."""
    options = _options_of(cls)
    verdict = Verdict("")
    # Some classes take one group only, or one rate.
    for sizes in (_SIZES, _SIZES[:1], [[(37, 23), (140, 131)]]):
        verdict = _compare(cls, options, sizes, nvme_path)
        if verdict.kind != "no use":
            break
    return verdict


def _options_of(cls: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """Such that there is a rate, and a momentum where it decides whether there is state."""
    defaults = {k: v.default for k, v in inspect.signature(cls).parameters.items()}
    options: dict[str, Any] = {}
    if "lr" in defaults and not isinstance(defaults["lr"], float):
        options["lr"] = 1e-3
    if defaults.get("momentum") == 0:
        options["momentum"] = 0.9
    return options


def _compare(
    cls: type[torch.optim.Optimizer],
    options: dict[str, Any],
    sizes: list[list[Any]],
    nvme_path: Path,
) -> Verdict:
    ours, theirs = _groups(sizes), _groups(sizes)
    alone = ""
    try:
        native = cls(theirs, **options)
        _run(native, theirs, 0)
    except Exception as error:
        alone = _line(error)
    try:
        offloaded = OffloadedOptimizer(
            cls, ours, nvme_path=nvme_path, host_memory="256KiB", **options
        )
    except Exception as error:
        return Verdict("no use" if alone else "refused", alone or _line(error))
    with offloaded:
        try:
            _run(offloaded, ours, 0)
            for number in range(1, 1 if alone else _STEPS):
                _run(native, theirs, number)
                _run(offloaded, ours, number)
                if difference := _difference(native, theirs, offloaded, ours):
                    return Verdict("DIFFERS", f"after step {number + 1}: {difference}")
        except Exception as error:
            return Verdict("no use", alone) if alone else Verdict("DIFFERS", _line(error))
    return Verdict("DIFFERS", f"alone: {alone}") if alone else Verdict("equal")


def _groups(sizes: list[list[Any]]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"params": [torch.randn(size, generator=generator).requires_grad_() for size in some]}
        for some in sizes
    ]


def _run(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], number: int) -> None:
    """A step; before and after some of them what a user does besides."""
    modes = (
        callable(getattr(optimizer, "train", None)),
        callable(getattr(optimizer, "eval", None)),
    )
    if all(modes) and number in (0, 5):
        optimizer.train()
    for group, factor in zip(optimizer.param_groups, (1.0, 0.5), strict=False):
        if number and isinstance(group.get("lr"), float):
            group["lr"] *= 0.9 if number % 3 else 1.1
        elif isinstance(group.get("lr"), float):
            group["lr"] *= factor
    generator = torch.Generator().manual_seed(number)
    for i, group in enumerate(groups):
        for j, p in enumerate(group["params"]):
            gradient = torch.randn(p.shape, generator=generator)
            none = (j == 1 and number < 2) or (i == 1 and number == 9) or number == 11
            p.grad = None if none else gradient * (1.0, 0.01, 30.0, 1.0)[number % 4]
    optimizer.step()
    if all(modes) and number == 4:
        optimizer.eval()


def _difference(native: Any, theirs: Any, offloaded: Any, ours: Any) -> str:
    for i, (group, other) in enumerate(zip(theirs, ours, strict=True)):
        for p, q in zip(group["params"], other["params"], strict=True):
            if not _same(p.detach(), q.detach()):
                return f"a parameter of sizes {list(p.shape)}"
            if not _same(p.grad, q.grad):
                return f"a gradient of sizes {list(p.shape)}"
        for key in {**native.param_groups[i], **offloaded.param_groups[i]}:
            a, b = (o.param_groups[i].get(key, "none") for o in (native, offloaded))
            if key != "params" and not _same(a, b):
                return f"the group's {key!r}: {a!r:.40}, {b!r:.40}"
    states = native.state_dict()["state"], offloaded.state_dict()["state"]
    for number, state in states[0].items():
        for name in {**state, **states[1].get(number, {})}:
            # Some classes make state for a parameter before it has a gradient.
            if number in states[1] and not _same(
                state.get(name, "none"), states[1][number].get(name, "none")
            ):
                return f"the state {name!r}"
    return ""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = [t.detach().flatten().contiguous().view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    return type(a) is type(b) and repr(a) == repr(b)


def _line(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{error}") or type(error).__name__


def verdicts(packages: list[str], folder: Path) -> dict[str, dict[str, Verdict]]:
    found: dict[str, dict[str, Verdict]] = {}
    for package in packages:
        of_package = found[package] = {}
        for name, cls in classes(package).items():
            of_package[name] = _apart(cls, folder)
            print(package, name, *of_package[name], flush=True)
    return found


def _apart(cls: type[torch.optim.Optimizer], folder: Path) -> Verdict:
    """In a process of its own, which can be ended whatever it does."""
    processes = multiprocessing.get_context("fork")
    here, there = processes.Pipe(duplex=False)

    def run() -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(io.StringIO()):
            there.send(compare(cls, folder))

    process = processes.Process(target=run)
    process.start()
    there.close()
    try:
        if here.poll(LIMIT):
            return here.recv()
        return Verdict("no use", f"not done after {LIMIT} seconds")
    except EOFError:
        return Verdict("no use", "ends the process")
    finally:
        process.kill()
        process.join()


def table(found: dict[str, dict[str, Verdict]]) -> str:
    """In Markdown."""
    lines = []
    for package, of_package in found.items():
        version = importlib.metadata.version(PACKAGES[package][1])
        lines += ["", f"## {PACKAGES[package][1]} {version.split('+')[0]}", ""]
        kinds: dict[str, list[str]] = {}
        for name, verdict in of_package.items():
            kinds.setdefault(verdict.kind, []).append(f"`{name}`")
        for kind, title in (("equal", "Equal"), ("no use", "Not tried")):
            if kind in kinds:
                lines += [f"{title}: {', '.join(kinds[kind])}.", ""]
        if "refused" in kinds:
            lines += ["| refused | why |", "|---|---|"]
            lines += [
                f"| `{name}` | {_reason(verdict.text)} |"
                for name, verdict in of_package.items()
                if verdict.kind == "refused"
            ]
    return "\n".join(lines).strip() + "\n"


def _reason(text: str) -> str:
    text = re.sub(r"^.*?piece by piece(?: with these options)?: ", "", text)
    text = text.replace(" with small parameters, whole and cut into pieces,", "")
    text = text.split(". What belongs to no parameter")[0]
    return text.replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", default=list(PACKAGES))
    parser.add_argument(
        "--write", type=Path, help="a page whose part <!-- table --> is replaced"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = verdicts(arguments.packages, Path(folder))
    if arguments.write:
        marks = "<!-- table -->", "<!-- /table -->"
        before, rest = arguments.write.read_text().split(marks[0])
        after = rest.split(marks[1])[1]
        arguments.write.write_text(f"{before}{marks[0]}\n\n{table(found)}\n{marks[1]}{after}")
    wrong = [
        f"{package}.{name}"
        for package, of_package in found.items()
        for name, verdict in of_package.items()
        if verdict.kind == "DIFFERS"
    ]
    if wrong:
        sys.exit(f"neither equal nor refused: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
