"""What a commit says about an optimizer, as JSON.

The drive has the state and the parameters. The document has the rest: names, groups, what the
caller wants to be kept. It is plain JSON, so that nothing is run when it is read.
"""

from __future__ import annotations

import base64
import errno
import json
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_ext._bytes import bytes_view
from torch_ext._native import _C
from torch_ext.optim._dtensor import is_distributed
from torch_ext.optim._state_dict import WAYS
from torch_ext.optim._together import Vote


@dataclass(frozen=True)
class Commit:
    """A commit that is on the drive, or on its way there.

    ``generation`` counts the store's commits from 1, and ``step`` is the caller's number.
    ``time`` is in seconds since 1970. ``bytes_written`` are those of the commit on the drive,
    padded, and ``seconds`` is its wall time. The last two are None for a commit that was found.

    A commit that was made with ``wait=False`` goes on behind the caller:

    * ``wait_source(timeout=None)`` returns when others than the optimizer may change the
      parameters, and the tensors in ``extra``.
    * ``wait(timeout=None)`` returns when the commit is durable.
    * ``done()`` tells whether it has ended, well or not. It never blocks.

    ``time``, ``bytes_written`` and ``seconds`` are None before one of them has told that it is
    durable. The waits raise the commit's error: those of ``commit()``. They raise TimeoutError
    after ``timeout`` seconds, while the commit goes on, and KeyboardInterrupt on Ctrl-C.
    """

    generation: int
    step: int
    time: int | None
    bytes_written: int | None = None
    seconds: float | None = None
    #: None once the end is noted. Another thread may do that: look at it once in a call.
    _ticket: _C.CommitTicket | None = field(default=None, repr=False, compare=False)
    _vote: Vote | None = field(default=None, repr=False, compare=False)
    #: Whether somebody has got the error that it ended with.
    _error_seen: bool = field(default=False, repr=False, compare=False)

    def wait_source(self, timeout: float | None = None) -> None:
        """Returns when others than the optimizer may change what is committed."""
        _C.to_seconds(timeout)
        ticket = self._ticket
        if ticket is not None:
            with self._explained(ticket):
                ticket.wait_source(timeout)

    def wait(self, timeout: float | None = None) -> None:
        """Returns when the commit is durable."""
        _C.to_seconds(timeout)
        ticket = self._ticket
        if ticket is not None:
            with self._explained(ticket):
                report = ticket.wait(timeout)
            self._note(report)

    def _wait_unseen(self) -> None:
        """Waits, and raises the error that it ended with if nobody has got it yet."""
        if not self._error_seen:
            self.wait()

    def done(self) -> bool:
        """Whether the commit has ended, well or not. Never blocks."""
        ticket = self._ticket
        if ticket is None:
            return True
        ended = ticket.done()
        self._note(ticket.report())
        return ended

    @contextmanager
    def _explained(self, ticket: _C.CommitTicket | None) -> Iterator[None]:
        """Raises what another process has failed with, if an error says no more than that."""
        try:
            yield
        except Exception as error:
            if ticket is not None and ticket.done():  # Not out of time.
                object.__setattr__(self, "_error_seen", True)
            if self._vote is not None:
                self._vote.explain(error)
            raise

    def _note(self, report: tuple[int, int, int, int, float] | None) -> None:
        if report is None:
            return
        for name, value in zip(_REPORTED, (*report, None), strict=True):
            object.__setattr__(self, name, value)


_REPORTED = ("generation", "step", "time", "bytes_written", "seconds", "_ticket")


#: What wrappers put before the names of parameters.
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def names_of(groups: Iterable[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Returns the name under which each parameter is committed.

    It is the model's, without what wrappers add, or "group.index". A model may itself have what
    looks like a wrapper: if two parameters then have one name, nothing is taken away.

    Raises:
        ValueError: Two parameters have the same name, or some have none.
    """
    given: dict[Tensor, str] = {}
    for i, group in enumerate(groups):
        names = group.get("param_names")
        if names and len(names) != len(group["params"]):
            raise ValueError(
                f"param_groups[{i}] has {len(group['params'])} parameters and {len(names)} "
                f"param_names: give each a name there"
            )
        for j, parameter in enumerate(group["params"]):
            given[parameter] = names[j] if names else f"{i}.{j}"
    short = {parameter: _WRAPPERS.sub("", name) for parameter, name in given.items()}
    for chosen in (short, given):
        if len(set(chosen.values())) == len(chosen):
            return chosen
    twice, _ = Counter(given.values()).most_common(1)[0]
    raise ValueError(f"two parameters are called {twice!r}")


#: Mappings that come back as what they were. A scheduler of torch's has a Counter.
_DICTS = (dict, OrderedDict, Counter)
_BYTES = (bytes, bytearray)
_MAKE: dict[str, Callable[..., Any]] = {each.__name__: each for each in _DICTS}


#: The most bytes of a tensor that the document has itself, such as a learning rate or a step.
_SMALL = 256
#: The deepest nesting that is kept. Readers recurse, and perhaps from a deeper stack than the
#: commit.
_DEEPEST = 100


class Packer:
    """Turns values into JSON. Tensors are put aside, for the drive, if they are not small."""

    def __init__(self, tensors: list[Tensor] | None) -> None:
        #: None: only small tensors are allowed.
        self.tensors = tensors

    def pack(self, value: Any, where: str, depth: int = 0) -> Any:
        """Returns ``value`` as JSON has it.

        Raises:
            TypeError, ValueError: It cannot be kept. The text says ``where`` it is.
        """
        if depth > _DEEPEST:
            raise ValueError(
                f"{where[:80]}... is nested more than {_DEEPEST} deep, which a commit cannot "
                f"keep, or contains itself"
            )
        if value is None or type(value) is bool:
            return value
        if type(value) is str:
            return value if _is_unicode(value) else {"str": _base64(_utf8(value))}
        if type(value) is int:
            # JSON readers know numbers up to 2^53.
            return value if abs(value) < 2**53 else {"int": _text_of(value)}
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if type(value) in _BYTES:
            return {type(value).__name__: _base64(value)}
        if isinstance(value, Tensor):
            return self._pack_tensor(value, where)
        if type(value) in (list, tuple):
            kind = type(value).__name__
            return {
                kind: [self.pack(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
            }
        if type(value) in _DICTS:
            return {
                type(value).__name__: [
                    [
                        self.pack(k, f"a key of {where}", depth + 1),
                        self.pack(v, f"{where}[{k!r}]", depth + 1),
                    ]
                    for k, v in value.items()
                ]
            }
        raise TypeError(
            f"{where} is a {type(value).__name__}, which a commit cannot keep; allowed: dict, "
            f"list, tuple, str, bytes, int, float, bool, None and tensors"
        )

    def _pack_tensor(self, tensor: Tensor, where: str) -> Any:
        odd = tensor.is_meta or tensor.is_quantized or tensor.is_nested
        if odd or tensor.layout != torch.strided:
            raise TypeError(f"{where} is a tensor without plain memory")
        if is_distributed(tensor):
            raise TypeError(f"{where} is a DTensor; commit its to_local()")
        _C.check_plain_memory(where, tensor)
        plain = tensor.detach().resolve_conj().resolve_neg()
        described = {
            "dtype": name_of(tensor.dtype),
            "shape": list(tensor.shape),
        }
        if tensor.numel() * tensor.element_size() <= _SMALL:
            content = bytes(bytes_view(plain.cpu().contiguous()).tolist())
            return {"small": _base64(content)} | described
        if self.tensors is None:
            raise TypeError(
                f"{where} is a tensor of more than {_SMALL} bytes, which a commit keeps in "
                f"extra= only"
            )
        self.tensors.append(plain)
        return {"tensor": len(self.tensors) - 1} | described


def _base64(content: bytes | bytearray) -> str:
    return base64.b64encode(content).decode()


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _is_unicode(text: str) -> bool:
    """Whether a text is without lone surrogates: readers refuse them, or join two of them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_of(number: int) -> str:
    try:
        return str(number)
    except ValueError:  # Python writes so many digits in a base of 2 only.
        return hex(number)


def unpack(value: Any, tensors: Mapping[int, Tensor]) -> Any:
    """Returns what ``Packer.pack`` was given.

    Raises:
        KeyError, and others of _BROKEN: ``value`` is nothing that it returns.
    """
    with _as_broken():
        return _unpacked(value, tensors)


def _unpacked(value: Any, tensors: Mapping[int, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = list(value.items())[0]  # noqa: RUF015 (an IndexError if it is empty)
    if kind == "int":
        return int(content, 0)
    if kind == "float":
        return float(content)
    if kind == "str":
        return base64.b64decode(content).decode(errors="surrogatepass")
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind](base64.b64decode(content))
    if kind == "tensor":
        return tensors[content]
    if kind == "small":
        return _small_tensor(content, value)
    if kind in _MAKE:
        pairs = {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in content}
        return _MAKE[kind](pairs)
    items = [_unpacked(v, tensors) for v in content]
    return items if kind == "list" else tuple(items)


def _small_tensor(content: str, value: Mapping[str, Any]) -> Tensor:
    read = base64.b64decode(content)
    dtype = getattr(torch, value["dtype"])
    if len(read) != math.prod(value["shape"]) * dtype.itemsize or len(read) > _SMALL:
        raise KeyError("small")
    numbers = torch.tensor(list(read), dtype=torch.uint8, device="cpu")
    return numbers.view(dtype).view(value["shape"])


def find_tensors(value: Any) -> dict[int, Tensor]:
    """Returns empty tensors for those of a packed value, by number. Errors: as ``unpack()``."""
    with _as_broken():
        return _tensors_in(value)


def _tensors_in(value: Any) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    if isinstance(value, dict) and "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        found[value["tensor"]] = torch.empty(value["shape"], dtype=dtype, device="cpu")
    elif isinstance(value, dict):
        for part in value.values():
            found |= _tensors_in(part)
    elif isinstance(value, list):
        for part in value:
            found |= _tensors_in(part)
    return found


def sizes_of(value: Any, values: Mapping[int, Tensor]) -> list[tuple[int, int]]:
    """Returns elements and their bytes of all tensors of a commit, by number.

    Those of the packed ``value`` are not made for that.
    """
    sizes = {number: (t.numel(), t.element_size()) for number, t in values.items()}
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict) and "tensor" in part:
            dtype = getattr(torch, part["dtype"])
            if part["tensor"] in sizes or not isinstance(dtype, torch.dtype):
                raise KeyError("tensor")
            sizes[part["tensor"]] = (math.prod(part["shape"]), dtype.itemsize)
        elif isinstance(part, (dict, list)):
            left += part.values() if isinstance(part, dict) else part
    return [sizes[number] for number in range(len(sizes))]


def ways_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ways of computing, which are this run's."""
    return {way: options[way] for way in WAYS if way in options}


_BROKEN = (KeyError, IndexError, AttributeError, StopIteration, TypeError, RecursionError)


@contextmanager
def whole_document() -> Iterator[None]:
    """Says in words that a document is not what ``commit()`` writes."""
    try:
        yield
    except _BROKEN as error:
        text = f"the commit's document is damaged: {type(error).__name__}: {error}"
        raise OSError(errno.EIO, text) from error


@contextmanager
def _as_broken() -> Iterator[None]:
    """Makes a KeyError of what values of another kind raise. ValueError is for the caller's."""
    try:
        yield
    except (ValueError, RuntimeError, OverflowError) as error:
        raise KeyError(f"{type(error).__name__}: {error}") from error


def read_document(text: str, kind: str) -> dict[str, Any]:
    """Returns the document of a commit of ``kind``.

    Raises:
        ValueError: It is of another class, or of a later version.
    """
    with whole_document(), _as_broken():
        document = json.loads(text)
        version, found = document["format"], document["class"]
    if version != 1:
        raise ValueError(
            f"the commit has version {version!r} of the document; this "
            f"torch_ext reads version 1"
        )
    if found != kind:
        raise ValueError(f"the commit is of an {found}, not of an {kind}")
    return document


def chosen(
    commits: list[tuple[int, int, int, str]], step: int | None, kind: str
) -> tuple[Commit, dict[str, Any]]:
    """Returns the newest commit, or the newest one of ``step``, and what it says."""
    if step is not None:
        step = whole_number(step, "step", 0)
    for generation, of_step, time, text in reversed(commits):
        if step in (None, of_step):
            return Commit(generation, of_step, time), read_document(text, kind)
    there = ", ".join(str(of_step) for _, of_step, *_ in commits)
    raise ValueError(f"there is no commit of step {step}; the steps of those kept are {there}")


def check_parameters(
    committed: Mapping[str, Mapping[str, Any]], given: Mapping[str, Tensor]
) -> None:
    """Raises ValueError that lists the first ten parameters that differ."""
    wrong = [f"{name} is not in the commit" for name in given.keys() - committed.keys()]
    wrong += [f"{name} is missing" for name in committed.keys() - given.keys()]
    for name, parameter in given.items():
        if (entry := committed.get(name)) is None:
            continue
        wrong += [f"{name} has {found}" for found in differences(entry, parameter)]
    if wrong:
        more = f", and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            f"the parameters are not those of the commit: {'; '.join(sorted(wrong)[:10])}{more}"
        )


def differences(entry: Mapping[str, Any], parameter: Tensor) -> list[str]:
    """Returns in what a parameter differs from the one that was committed.

    A frozen one, whose values the commit does not have, may differ.
    """
    if "shape" not in entry:
        return []
    return [
        f"{what} {entry[what]} there and {now} here"
        for what, now in described(parameter).items()
        if entry[what] != now
    ]


def described(parameter: Tensor) -> dict[str, Any]:
    """Returns what a parameter has to have in common with the one that was committed."""
    order = sorted(range(parameter.dim()), key=parameter.stride, reverse=True)
    return {
        "shape": list(parameter.shape),
        "dtype": name_of(parameter.dtype),
        "order": [d for d in order if parameter.shape[d] != 1],
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def named(group: Mapping[str, Any]) -> Iterable[tuple[Tensor, str]]:
    """Returns a group's parameters with the names that the caller gave."""
    return zip(group["params"], group.get("param_names", ()), strict=False)


def whole_number(value: Any, name: str, least: int) -> int:
    """Raises ValueError or TypeError if ``value`` is no number from ``least`` on."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, not {type(value).__name__}")
    if not least <= (number := value.__index__()) < 2**63:
        raise ValueError(f"{name} must be from {least} to 2**63 - 1, got {number}")
    return number
