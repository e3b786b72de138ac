"""Any elementwise optimizer of torch, with its state on NVMe."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_ext._checks import Directories, engine_of
from torch_ext._modes import plain_modes
from torch_ext._native import _C
from torch_ext._quiet import undisturbed
from torch_ext.config import AioConfig, parse_size, resolve_aio_config
from torch_ext.optim._base import OffloadedBase
from torch_ext.optim._commit import Packer, name_of, unpack, whole_document
from torch_ext.optim._committing import Take
from torch_ext.optim._dtensor import is_distributed
from torch_ext.optim._found import Found
from torch_ext.optim._piece_state import MASTER, Group, Loaded, PieceState, Trained
from torch_ext.optim._pieces import Kept, PieceOptimizer, options_of
from torch_ext.optim._plan import OffloadPlan
from torch_ext.optim._reference import ReferringOptimizer
from torch_ext.optim._state_dict import (
    WAYS,
    check_saved_tensor,
    check_ways,
    foreign_of,
    labelled_parameters,
    others_of,
    paired,
)
from torch_ext.optim._trial import Trials
from torch_ext.optim._values import differing

_MOST_FIELDS = 5

#: What ``resume()`` is given; the rest is the commit's.
_OF_THIS_RUN = {
    "nvme_path",
    "host_memory",
    "state_dict_mode",
    "keep_commits",
    "aio",
    "engine",
    "verify",
    "process_group",
}


class OffloadedOptimizer(ReferringOptimizer):
    """An optimizer class of torch, or of yours, whose state lives in a file on an NVMe drive.

    The class updates pieces of parameters: 1-D float32 tensors on the CPU, with their gradients
    and state. A few of them are in memory at a time. Float32 parameters on the CPU get the bits
    that the class gives them as a whole, on one thread. (torch's own kernels round the last
    elements of a thread's share differently.)

    So the class must be elementwise: an element's new value depends on that element's gradient,
    value and state, and on numbers such as ``step``. A trial at construction runs the class on
    whole parameters and on pieces of them. After each of 12 steps all bits must agree. It is
    run again when options of a group change that may decide the outcome. It does not see what
    it does not reach. SGD with momentum, Adam, AdamW, RMSprop, Adagrad, Adamax, NAdam and their
    like are elementwise. Adafactor, Muon and LBFGS are not. docs/optimizers.md lists what was
    tried, also of other packages.

    What the class writes to its group (``group["step"] += 1``) is carried from step to step,
    and is part of the ``state_dict()``. What it writes to gradients is written to yours. If the
    class has ``train()`` and ``eval()``, as schedule-free ones have, this has them too. What it
    keeps elsewhere, in itself or under another key of ``state``, is refused by name. State of a
    parameter's shape is kept on the drive, other state in memory.

    The rest is as with ``OffloadedAdamW``, which is faster than this with ``AdamW``. bfloat16
    and float16 parameters have masters (``master_param`` in a ``state_dict()``). ``state`` is
    read from the drive when it is asked for. The rules about I/O errors, threads, forks and
    pickling are the same. ``state_dict()`` is that of the class itself: either loads the
    other's. Handlers of signals, such as Ctrl-C, run when a call has ended.

    The caller's default device, inference mode, autocast and grad mode change nothing. The
    class sees torch's default dtype, as it does in memory: ``NAdam`` keeps a product in float64
    where that is the default.

    Args:
        optimizer_class: A subclass of ``torch.optim.Optimizer``.
        params: Parameters, named parameters or groups of them. They are dense, in float32,
            bfloat16 or float16.
        nvme_path: As for ``OffloadedAdamW``.
        host_memory: The most bytes of host memory for state. 768 KiB of it (less of a small
            budget) are for what the class computes in between.
        state_dict_mode: As for ``OffloadedAdamW``.
        keep_commits: As for ``OffloadedAdamW``.
        aio: What ``get_aio_config`` takes or returns. None: the defaults.
        engine: "auto", or one that ``python -m torch_ext info`` lists.
        verify: Whether checksums are kept and compared on reading.
        process_group: As for ``OffloadedAdamW``.
        options: Arguments for ``optimizer_class``, by name.

    Raises:
        OSError: The directory cannot be used.
        ValueError: The class is not elementwise or keeps no state, or a value is out of range,
            or a parameter is not dense.
        TypeError: A parameter cannot be optimized, or ``optimizer_class`` is no such class.

    Example:
        >>> optimizer = OffloadedOptimizer(
        ...     torch.optim.RMSprop, model.parameters(), lr=1e-3, nvme_path="/mnt/nvme"
        ... )
    """

    _offload: PieceState

    def __init__(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        params: Any,
        *,
        nvme_path: Directories,
        host_memory: int | str = "512MiB",
        state_dict_mode: str = "tensors",
        keep_commits: int | None = None,
        aio: AioConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        engine: str = "auto",
        verify: bool = True,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        _check_class(optimizer_class)
        check_ways(f"OffloadedOptimizer({optimizer_class.__name__})", options)
        self._pieces = PieceOptimizer(optimizer_class, options)
        self._trials = Trials(self._pieces)
        self._whole = False
        directories, place = self._place(
            nvme_path, process_group, state_dict_mode, keep_commits, verify
        )
        self._make_offload = partial(
            PieceState,
            aio=resolve_aio_config(aio, stacklevel=3),
            host_memory=parse_size(host_memory),
            engine=engine_of(engine),
            verify=bool(verify),
            optimizer=self._pieces,
            state_dict_mode="tensors" if self._refers else state_dict_mode,
        )
        self._start(self._make_offload(directories=directories, place=place))
        with self._closed_on_error():
            super().__init__(params, self._pieces.defaults)
            self._whole = True
            if isinstance(nvme_path, Found):
                self._take_found(nvme_path)
            else:
                self._check_groups(self.param_groups)

    @classmethod
    def resume(
        cls,
        path: Directories,
        optimizer_class: type[torch.optim.Optimizer],
        params: Any,
        *,
        step: int | None = None,
        **options: Any,
    ) -> OffloadedOptimizer:
        """As ``OffloadedAdamW.resume``. The commit has the options for ``optimizer_class``.

        Raises:
            ValueError: The commit is of another class. Or this class keeps something else now.
            OSError, ValueError, TypeError: As for ``OffloadedAdamW.resume``.
        """
        _check_class(optimizer_class)
        for name in sorted(options.keys() - _OF_THIS_RUN):
            raise TypeError(
                f"resume() takes no {name!r}: the commit has the options of the class"
            )

        def make(found: Found, params: Any) -> OffloadedOptimizer:
            with whole_document():
                committed = found.document["optimizer"]
                given = unpack(found.document["options"], {})
            _check_same_class(committed, optimizer_class.__name__)
            return cls(optimizer_class, params, **(options | given | {"nvme_path": found}))

        return cls._resumed(path, step, params, options, make)

    @classmethod
    def _kind(cls) -> str:
        return "OffloadedOptimizer"

    def _check_to_commit(self) -> None:
        all_kept = self._check_groups(self.param_groups)
        kept_of = {
            p: (self._slots[p], p, kept)
            for group, kept in zip(self.param_groups, all_kept, strict=True)
            for p in group["params"]
            if self._has_state(p)
        }
        with self._naming(kept_of, lambda p: self._offload.expect(*kept_of[p])):
            for expected in kept_of.values():
                self._offload.expect(*expected)

    def _said(self, packer: Packer) -> dict[str, Any]:
        options = packer.pack(self._pieces.options, f"an option of {self._pieces.name}")
        return {"optimizer": self._pieces.name, "options": options}

    def _check_same_kind(self, document: dict[str, Any]) -> None:
        with whole_document():
            committed = document["optimizer"]
        _check_same_class(committed, self._pieces.name)

    def _said_of_state(self, slot: int, packer: Packer, where: str) -> dict[str, Any]:
        kept = self._offload.kept(slot)
        return {
            "fields": [[name, name_of(f.dtype)] for name, f in kept.fields.items()],
            "names": list(kept.names),
            "default_dtype": name_of(kept.default_dtype),
            "numbers": packer.pack(self._offload.numbers(slot), where),
        }

    def _take(
        self,
        take: Take,
        entries: dict[Tensor, dict[str, Any]],
        groups: list[dict[str, Any]],
    ) -> None:
        parts = []
        all_kept = self._check_groups(groups)
        for group, kept in zip(groups, all_kept, strict=True):
            for p in group["params"]:
                with whole_document():
                    entry = entries[p]
                    own = _committed_kept(entry, kept) if "fields" in entry else None
                    numbers = unpack(entry["numbers"], {}) if own else None
                    parts.append((entry["slot"], p, own, numbers))
                if own and not own.goes_on_as(kept):
                    raise ValueError(
                        f"{self._pieces.name} keeps {list(kept.names)} with these options; the "
                        f"commit has {list(own.names)} of {self._label_of(p)}"
                    )
        self._offload.take_commit(take, parts)

    def _bind(self, offload: PieceState) -> None:
        super()._bind(offload)
        self._passes = 0  # The offload counts calls of train() and eval() as steps.

    def __getattr__(self, name: str) -> Any:
        pieces = self.__dict__.get("_pieces")
        of_class = None if name.startswith("_") or not pieces else pieces.optimizer_class
        if not callable(getattr(of_class, name, None)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in pieces.modes:
            return partial(self._switch, name)
        raise AttributeError(
            f"OffloadedOptimizer has no {name!r}, a method of {pieces.name}'s own: it runs "
            f"{', '.join(('step', *pieces.modes))} piece by piece, and nothing else"
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        check_ways(f"OffloadedOptimizer({self._pieces.name})", group)
        given = options_of(group)
        made = self._pieces.prepared(given)
        for key in differing(given, made):
            group[key] = made[key]
        if self._whole:
            self._check_groups(self.param_groups)

    def _check_groups(self, groups: list[dict[str, Any]]) -> list[Kept]:
        """Checks groups. Returns what the class keeps in each.

        Raises:
            ValueError, TypeError: A group cannot be offloaded.
        """
        for group in groups:
            check_ways(f"OffloadedOptimizer({self._pieces.name})", group)
        all_kept = self._trials.kept(groups)
        for group, kept in zip(groups, all_kept, strict=True):
            self._check_kept(group, kept)
        return all_kept

    def _check_kept(self, group: dict[str, Any], kept: Kept) -> None:
        for parameter in group["params"]:
            if not parameter.requires_grad and parameter.grad is None:
                continue  # It is frozen, whatever it is.
            if is_distributed(parameter):
                raise TypeError(
                    f"OffloadedOptimizer: {self._label_of(parameter)} is a DTensor; of these "
                    f"only OffloadedAdamW keeps state"
                )
            half = parameter.dtype != torch.float32
            if not kept.fields and not half:
                raise ValueError(
                    f"{self._pieces.name} keeps no state with these options: there is "
                    f"nothing to offload, use the class itself"
                )
            if len(kept.fields) + half > _MOST_FIELDS:
                raise ValueError(
                    f"{self._pieces.name} keeps {list(kept.fields)}: more tensors than the "
                    f"{_MOST_FIELDS} (one less for 16-bit parameters) that can be offloaded"
                )

    @undisturbed
    @plain_modes()
    def _step(self) -> None:
        self._state.flush()
        groups = []
        all_kept = self._check_groups(self.param_groups)
        for group, kept in zip(self.param_groups, all_kept, strict=True):
            trained = [
                Trained(self._slot_of(p), p, p.grad)
                for p in group["params"]
                if p.grad is not None
            ]
            groups.append(Group(group, options_of(group), kept, trained))
        self._run(groups, "step")

    @torch._disable_dynamo
    @undisturbed
    @plain_modes()
    def _switch(self, mode: str) -> None:
        """Calls ``train()`` or ``eval()`` of a class that has them."""
        self._life.check()
        self._state.flush()
        groups = []
        all_kept = self._check_groups(self.param_groups)
        for group, kept in zip(self.param_groups, all_kept, strict=True):
            slots = [(self._slot_of(p), p) for p in group["params"]]
            with_state = [
                Trained(slot, p, None)
                for slot, p in slots
                if self._offload.has_state(slot) or (kept.from_start and p.requires_grad)
            ]
            groups.append(Group(group, options_of(group), kept, with_state))
        self._run(groups, mode)
        self._passes += 1

    def _run(self, groups: list[Group], method: str) -> None:
        kept_of = {t.parameter: (t, group.kept) for group in groups for t in group.trained}
        with self._naming(kept_of, lambda p: self._offload.check(*kept_of[p])):
            self._offload.step(groups, method)
        self._state.retire(kept_of)

    def _saved_states(self, parameters: Iterable[Tensor]) -> dict[Tensor, dict[str, Any]]:
        asked = []
        all_kept = self._trials.kept(self.param_groups)
        for group, kept in zip(self.param_groups, all_kept, strict=True):
            options = options_of(group)
            asked += [
                (self._slot_of(p), p, kept, options)
                for p in group["params"]
                if self._is_kept(p) or (kept.from_start and _could_be_trained(p))
            ]
        kept_of = {p: (slot, p, kept) for slot, p, kept, _ in asked}
        with self._naming(kept_of, lambda p: self._offload.expect(*kept_of[p])):
            states = self._offload.save(asked)
        found = zip(kept_of, states, strict=True)
        return {p: state for p, state in found if state is not None}

    def _merged_groups(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        fields = {name for kept in self._trials.kept(self.param_groups) for name in kept.fields}
        saved, state = state_dict["param_groups"], state_dict["state"]
        pairs = paired(self.param_groups, saved, state, fields)
        return [_merged(*both) for both in pairs]

    @undisturbed
    def _load(self, state_dict: dict[str, Any]) -> None:
        state = state_dict["state"]
        saved = state_dict["param_groups"]
        groups = self._merged_groups(state_dict)
        labels = iter(labelled_parameters(self.param_groups))
        loaded, foreign = [], {}
        all_kept = self._check_groups(groups)
        for group, other, kept in zip(groups, saved, all_kept, strict=True):
            for key in other["params"]:
                label, p = next(labels)
                entry = state.get(key)
                if entry and not p.requires_grad and not _could_be_trained(p):
                    warnings.warn(
                        f"{label} is frozen and of a kind that cannot be trained here; its "
                        f"loaded state is left out",
                        UserWarning,
                        stacklevel=6,
                    )
                elif entry:
                    entry, foreign[p] = foreign_of(p, entry, kept.names.keys() | {MASTER})
                    if not entry and self.defaults.keys() <= other.keys():
                        continue  # It has only what others keep.
                    text = f"the loaded state of parameter {key!r}, {label}"
                    read = _read_entry(text, p, kept, entry, bool(group.get("fused")))
                    loaded.append(Loaded(self._slot_of(p), p, kept, read))
        with self._naming([entry.parameter for entry in loaded], self._check_part):
            self._offload.load(loaded)
        self.param_groups = groups
        self._state.loaded(foreign, others_of(state_dict))
        self._let_go()

    @undisturbed
    @plain_modes()
    def plan(self) -> OffloadPlan:
        """As ``OffloadedAdamW.plan``."""
        self._life.check()
        all_kept = self._trials.kept(self.param_groups)
        for group, kept in zip(self.param_groups, all_kept, strict=True):
            for p in filter(self._is_kept, group["params"]):
                with self._naming([p]):
                    self._offload.expect(self._slot_of(p), p, kept)
        return super().plan()

    def stats(self) -> dict[str, int | float]:
        """As ``OffloadedAdamW.stats``."""
        stats = super().stats()
        return stats | {"steps": stats["steps"] - self._passes}

    def _check_part(self, parameter: Tensor) -> None:
        _C.check_parameter("OffloadedOptimizer", parameter)

    # optimizer.state -------------------------------------------------------------------

    def _shown_state(self, parameter: Tensor) -> dict[str, Any]:
        slot = self._slots[parameter]
        shown = dict.fromkeys(self._offload.names(slot))
        for name, value in self._offload.numbers(slot).items():
            shown[name] = value.item() if isinstance(value, Tensor) else value
        if parameter.dtype != torch.float32:
            shown[MASTER] = None
        return shown

    def _own_names(self, parameter: Tensor) -> frozenset[str]:
        if self._has_state(parameter):
            names = frozenset(self._offload.names(self._slots[parameter]))
        else:
            kept = self._kept_of(parameter)
            names = frozenset() if kept is None else frozenset(kept.names)
        return names if parameter.dtype == torch.float32 else names | {MASTER}

    def _kept_of(self, parameter: Tensor) -> Kept | None:
        """Returns what is kept of a parameter. One in no group counts as in the first."""
        all_kept = self._trials.kept(self.param_groups)
        for group, kept in zip(self.param_groups, all_kept, strict=True):
            if any(p is parameter for p in group["params"]):
                return kept
        return all_kept[0] if all_kept else None

    @undisturbed
    @plain_modes()
    def _read_state(self, parameter: Tensor, name: str) -> Tensor:
        self._life.check()
        tensor = self._offload.read(self._slots[parameter], parameter, name)
        return tensor.to(parameter.device)

    def _like(self, parameter: Tensor, local: Tensor) -> Tensor:
        return local

    @undisturbed
    @plain_modes()
    def _change_states(self, changes: list[tuple[Tensor, dict[str, Any]]]) -> None:
        self._life.check()
        labels = self._labels()
        read, outgrown = [], []
        for parameter, entry in changes:
            text = f"the state of {labels.get(parameter) or self._label_of(parameter)}"
            slot, kept = self._slot_of(parameter), self._kept_of(parameter)
            if kept is None:
                raise ValueError(f"{text} is assigned, and there is no parameter group")
            partly, fused = self._has_state(parameter), bool(self.defaults.get("fused"))
            whole = kept.fields.keys() <= entry.keys()
            if partly and whole and not self._offload.fits(slot, parameter, kept):
                # Rows were cut off the parameter and off its state.
                outgrown.append(slot)
                entry, partly = self._offload.numbers(slot) | entry, False
            values = _read_entry(text, parameter, kept, entry, fused, partly)
            read.append(Loaded(slot, parameter, kept, values))
        self._offload.forget(outgrown)
        self._offload.change(read)


def _check_same_class(committed: str, name: str) -> None:
    if committed != name:
        raise ValueError(
            f"the commit is of an OffloadedOptimizer with {committed}, not with {name}"
        )


def _committed_kept(entry: Mapping[str, Any], kept: Kept) -> Kept:
    """Returns what a commit has of a parameter, where ``kept`` is what the class keeps now."""
    fields = {
        name: torch.empty(0, dtype=getattr(torch, dtype), device="cpu")
        for name, dtype in entry["fields"]
    }
    names = {name: fields.get(name, kept.names.get(name)) for name in entry["names"]}
    default = getattr(torch, entry["default_dtype"])
    return replace(kept, fields=fields, names=names, default_dtype=default)


def _could_be_trained(parameter: Tensor) -> bool:
    """Whether a frozen parameter is of a kind that can be trained."""
    try:
        _C.check_parameter("OffloadedOptimizer", parameter)
    except (TypeError, ValueError):
        return False
    return not is_distributed(parameter)


def _check_class(optimizer_class: Any) -> None:
    if not (
        isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    ):
        raise TypeError(
            f"optimizer_class must be a class of optimizers such as torch.optim.RMSprop, "
            f"not {optimizer_class!r:.80}"
        )
    if issubclass(optimizer_class, OffloadedBase):
        raise TypeError(f"{optimizer_class.__name__} keeps its state on NVMe by itself")
    if optimizer_class.state_dict is not torch.optim.Optimizer.state_dict:
        raise ValueError(
            f"{optimizer_class.__name__} has its own state_dict(), which cannot be run on "
            f"pieces of parameters"
        )


def _merged(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the saved group, with this optimizer's parameters and way of computing."""
    own = {key: group[key] for key in (*WAYS, "params") if key in group}
    given = {key: deepcopy(value) for key, value in saved.items() if key not in own}
    return group | given | own


def _read_entry(
    text: str, parameter: Tensor, kept: Kept, entry: Any, fused: bool, partly: bool = False
) -> dict[str, Any]:
    """Returns a parameter's loaded state, with numbers in the form that the class keeps.

    ``partly``: ``entry`` may hold only some of it, since there is state already.

    Raises:
        ValueError, TypeError: It does not fit. The text begins with ``text``.
    """
    if not isinstance(entry, Mapping):
        raise TypeError(f"{text} must be a dict, not {type(entry).__name__}")
    given = {name: value for name, value in entry.items() if value is not None}
    for name in (*kept.fields, MASTER):
        tensor = given.get(name)
        if tensor is None and (name == MASTER or (partly and name not in entry)):
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{text} has no tensor {name!r}")
        check_saved_tensor(f"{text}: {name}", tensor, parameter)
    for name in kept.names.keys() - kept.fields.keys():
        if partly and name not in entry:
            continue
        like, value = kept.names[name], entry.get(name)
        if all(isinstance(t, Tensor) and t.is_floating_point() for t in (like, value)):
            # This is what Optimizer.load_state_dict() does, whatever the default dtype is now.
            as_saved = name == "step" and not fused
            like = like.to(value.dtype if as_saved else torch.float32)
        given[name] = _as_kept(f"{text}: {name!r}", like, value)
    return given


def _as_kept(what: str, like: Any, value: Any) -> Any:
    if like is None and value is None:
        return None
    try:
        number = value.item() if isinstance(value, Tensor) else value
        if isinstance(like, Tensor):
            return torch.full_like(like, number)
        return number if like is None else type(like)(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{what} is {value!r:.80}, which is no number") from None
