"""AdamW with its state on NVMe."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from torch_ext._checks import (
    Directories,
    engine_of,
    max_grad_norm_of,
    seed_of,
    state_format_of,
    update_on_of,
)
from torch_ext._modes import plain_modes
from torch_ext._native import _C
from torch_ext._quiet import undisturbed
from torch_ext.config import AioConfig, parse_size, resolve_aio_config
from torch_ext.optim._adamw_groups import (
    as_lists,
    asks_for_state_only,
    check_foreach,
    check_group,
    early_bytes_of,
    hyper,
    merged,
    read_change,
    read_entry,
)
from torch_ext.optim._base import OffloadedBase
from torch_ext.optim._commit import Packer, whole_document
from torch_ext.optim._committing import Take
from torch_ext.optim._dtensor import (
    check_parameter,
    first_element,
    is_distributed,
    like_parameter,
    local_of,
)
from torch_ext.optim._found import Found
from torch_ext.optim._overlap import (
    Overlap,
    TakenGradient,
    is_nested,
    overlap_of,
    with_gradient,
)
from torch_ext.optim._reference import ReferringOptimizer
from torch_ext.optim._state_dict import foreign_of, labelled_parameters, others_of, paired

_logger = logging.getLogger("torch_ext")

#: The tensors of the state, as AdamWFields counts them.
_TENSORS = ("exp_avg", "exp_avg_sq", "master_param")
_NAMES = frozenset(("step", *_TENSORS[:2]))

_KIND = "OffloadedAdamW"


class OffloadedAdamW(ReferringOptimizer):
    """``torch.optim.AdamW`` whose state lives in a file on an NVMe drive.

    For float32 parameters on the CPU, the result equals that of
    ``torch.optim.AdamW(fused=True)`` bit for bit. bfloat16 and float16 parameters have a
    float32 master, of which the file holds what the parameter lacks. Each step updates the
    master and rounds it to the parameter. Writes to the parameter between steps
    (``model.load_state_dict``, ``clamp_``) count. Parameters on another device are updated
    where ``update_on`` says. Each process updates its shard of a DTensor. Processes may share
    ``nvme_path``.

    A step reads, updates and writes the state tile by tile, all three at once. The buffers
    together take no more than ``host_memory``. The first tiles of the next step are read while
    the model computes. Parameters without a gradient cost nothing, except space on the drive
    with ``overlap_backward="update"``. Frozen ones (``requires_grad=False``) may be of any
    kind, quantized too. They are left alone until a step finds a gradient. An error about a
    parameter names it.

    ``state_dict()`` returns what ``torch.optim.AdamW`` would, and loads what that returned. Its
    tensors are a copy in memory, which later steps do not change. ``state_dict_mode="mapped"``
    is for state larger than memory. ``state`` is as in ``torch.optim``, but its tensors are
    read from the drive one by one, when they are asked for by name: see there. What outlives
    the optimizer is a ``state_dict()``, or what ``commit()`` has made durable for ``resume()``.

    After an I/O error in the midst of a step the state may be half updated. Each later step
    raises the error again until a state is loaded. After any other error, such as one of
    ``state_dict()``, all is as it was. Threads: any, one call at a time.

    If a signal, such as Ctrl-C, comes during a call, its handler runs when the call has ended.
    During a closure it runs at once. So no step is left half done, and a handler saves the
    state before or after a whole step. The caller's default dtype and device, inference mode,
    autocast and grad mode change nothing. A forked child may not use the optimizer
    (RuntimeError). Pickling and copying raise TypeError.

    Args:
        params: As for ``torch.optim.AdamW``: parameters, named parameters or groups of them.
            They are dense, in float32, bfloat16 or float16.
        lr: Learning rate; a number or a tensor of one element.
        betas: Coefficients of the running averages.
        eps: Added to the denominator.
        weight_decay: Coefficient of decoupled weight decay.
        amsgrad: Must be False.
        maximize: Whether the objective is maximized.
        foreach: As ``fused``.
        capturable: Must be False: a step reads and writes files.
        differentiable: Must be False.
        fused: Taken for programs that were written for ``torch.optim.AdamW``. It has no effect:
            the result is that of ``fused=True``. The groups say what was given, True for None.
            So ``torch.optim.AdamW`` goes on in that way if it loads the state.
        nvme_path: Directory on the drive to be used. Several drives are given as to
            ``TensorSwapper``. The first has room for a mapped ``state_dict()``.
        host_memory: The most bytes of host memory for buffers, such as 2**29 or "512MiB"; at
            least 240 KiB.
        overlap_backward: What runs during backward. With False and "prefetch", parameters are
            updated in ``step()``. The first tiles of the state are read before it, while
            forward and backward run. Loops that clip, scale, accumulate or skip steps work
            unchanged.

            With "prefetch", gradients on a device are copied to the host while backward goes
            on. They take at most a quarter of ``host_memory``, if that is 1 MiB or more. This
            is for parameters that are on the device when the optimizer is made. ``step()``
            copies again what has changed since, for example by clipping, and what had no room.
            On the CPU the two are the same.

            With "update", parameters are updated while backward goes on, as soon as their
            gradients are final. These gradients are freed: after ``backward()`` any use of one
            raises RuntimeError. ``step()`` updates the rest. Options of the groups are those at
            the time of ``backward()``. Parameters are being updated from then to the end of
            ``step()``. Using their values raises RuntimeError, also in what activation
            checkpointing computes again during backward. If the options, or parameters on the
            CPU, were changed all the same, ``step()`` makes the step and raises RuntimeError.
            Every backward pass of a step but the last goes inside ``with
            optimizer.accumulate():``.

            With "update" some gradients wait for ``step()``. With reentrant checkpointing,
            which ``use_reentrant=False`` avoids, they come in parts. Gradients in page-locked
            memory may still be on their way: FSDP2's ``CPUOffloadPolicy`` brings them from the
            GPU until backward ends. docs/guide.md has the cases. "update" does not work with
            ``DistributedDataParallel``, which changes gradients later: ``backward()`` raises
            RuntimeError. Nor does it work with parameters that are views of one tensor: PyTorch
            takes the update of one for a change of all, and raises.
        max_grad_norm: ``step()`` first clips gradients to this norm, as
            ``torch.nn.utils.clip_grad_norm_`` does, and leaves the norm in ``grad_norm``.
            "update" then behaves as "prefetch", since the norm needs all gradients.
        state_format: What the drive holds of each moment: "exact" (float32), "bf16", or "int8"
            (8 bits, and a scale for each 256 elements). The last two are rounded
            stochastically. See docs/formats.md.
        seed: The seed of that rounding, 0 to 2**64 - 1. The same seed gives the same bits.
        update_on: Where parameters on a device are updated. With "cpu", they and their
            gradients are copied to the host and back. With "cuda", their state is copied to the
            device and back, and torch's fused kernel of the device updates them. That needs
            ``state_format="exact"`` and no parameters on the CPU. The results are those of
            torch's kernel for the CPU or for the device. These round differently, so the choice
            is never made for you.
        state_dict_mode: Where the tensors of a ``state_dict()`` are. With "tensors" they are in
            memory; if there is not enough, it raises OSError (ENOMEM). With "mapped" they are
            in a file without a name in ``nvme_path``, which is gone with the last of them. They
            cost memory as far as they are touched. If the drive did not take all bytes,
            ``state_dict()`` raises OSError. But if the drive fails while they are in use, the
            system ends the process (SIGBUS), as with every mapped file: save them at once.

            With "commit" there are none. ``state_dict()`` commits the state where it is,
            without the parameters, and says where that is: a kilobyte for a trainer to save
            beside the parameters. ``load_state_dict()`` goes back to that commit. Load the
            parameters that were saved with it, too. Before the first step it is the groups
            alone. With DistributedDataParallel, rank 0 commits for all, and all load its
            ``state_dict()``. See docs/checkpoints.md.
        keep_commits: With "commit", how many of the newest commits stay on the drive; None: 2.
            One that was loaded counts as the newest. A checkpoint that is being written refers
            to a commit already, so take one more than there are complete checkpoints.
        aio: What ``get_aio_config`` takes or returns. None: the defaults.
        engine: "auto", or one that ``python -m torch_ext info`` lists.
        verify: Whether checksums are kept and compared on reading.
        process_group: The processes that commit together; None: all. Each has a store of its
            own in its ``nvme_path``, which they may share.

    Raises:
        OSError: The directory cannot be used.
        ValueError: A value is out of range, or a parameter is not dense. Or options exclude
            each other.
        TypeError: A parameter cannot be optimized.

    Example:
        >>> optimizer = OffloadedAdamW(model.parameters(), lr=3e-4, nvme_path="/mnt/nvme")
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        nvme_path: Directories,
        host_memory: int | str = "512MiB",
        overlap_backward: bool | str = False,
        max_grad_norm: float | None = None,
        state_format: str = "exact",
        seed: int = 0,
        update_on: str = "cpu",
        state_dict_mode: str = "tensors",
        keep_commits: int | None = None,
        aio: AioConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        engine: str = "auto",
        verify: bool = True,
        process_group: Any = None,
    ) -> None:
        # These are the keys of torch.optim.AdamW, so that either loads the other's state.
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            # So a state that is loaded elsewhere gives the same bits.
            "fused": not foreach if fused is None else fused,
            "decoupled_weight_decay": True,
        }
        check_group(defaults)
        check_foreach(defaults)
        self._max_grad_norm = max_grad_norm_of(max_grad_norm)
        #: The norm that the last step with ``max_grad_norm`` has found.
        self.grad_norm: Tensor | None = None
        overlap = overlap_of(overlap_backward)
        # Whether gradients are taken during backward. The norm is known only when all are.
        self._takes = overlap == "update" and max_grad_norm is None
        early_bytes = 0
        if overlap and not self._takes:
            params = as_lists(params)
            early_bytes = min(early_bytes_of(params), 2**63)
        self._hooks = self._takes or early_bytes > 0
        directories, place = self._place(
            nvme_path, process_group, state_dict_mode, keep_commits, verify
        )
        self._make_offload = partial(
            _C.AdamWOffload,
            aio=resolve_aio_config(aio, stacklevel=3),
            host_memory=parse_size(host_memory),
            engine=engine_of(engine),
            verify=bool(verify),
            state_format=state_format_of(state_format),
            seed=seed_of(seed),
            update_on=update_on_of(update_on),
            early_bytes=early_bytes,
            state_dict_mode="tensors" if self._refers else state_dict_mode,
        )
        self._start(self._make_offload(directories=directories, place=place))
        self._kept_options = {"seed": seed_of(seed), "state_format": state_format}
        with self._closed_on_error():
            super().__init__(params, defaults)
            if isinstance(nvme_path, Found):
                self._take_found(nvme_path)

    @classmethod
    def resume(
        cls, path: Directories, params: Any, *, step: int | None = None, **options: Any
    ) -> OffloadedAdamW:
        """Makes the optimizer that was committed in ``path``, as it was then.

        ``params`` has the model's parameters, as at construction. The commit tells their
        values, which are written in place, the groups with their options, ``state_format`` and
        ``seed``. Options in groups of ``params`` do not count, as with ``load_state_dict``. The
        other options are this run's. ``committed_step`` and ``committed_extra`` say where the
        run was. ``step`` picks one of the commits that ``keep=`` has retained, by the caller's
        number; None takes the last one.

        The run may be divided in another way: more processes or fewer, other shards, another
        ``state_format``, or less ``host_memory`` than the tiles need. ``nvme_path`` says where
        the state is to live from now on, if not in ``path``. Then new state is made of the old.
        The old stores are removed by the first commit, but not if ``nvme_path`` is elsewhere.

        Raises:
            FileNotFoundError: Nothing was committed there.
            BlockingIOError: Another process uses the store.
            OSError: The shards of some processes are missing (ENXIO): the text says whose.
            ValueError: The parameters are others. The text lists the first ten that differ. Or
                there is no commit of ``step``: the text says which there are.
            ValueError, TypeError: As at construction.
            OSError: Reading failed, or what is there is damaged. Some of the parameters may be
                the commit's then.
        """

        def make(found: Found, params: Any) -> OffloadedAdamW:
            with whole_document():
                kept = {name: found.document[name] for name in ("state_format", "seed")}
            wanted = {k: v for k, v in options.items() if v is not None or k not in kept}
            return cls(params, **(kept | wanted | {"nvme_path": found}))

        return cls._resumed(path, step, params, options, make)

    _of_commit = frozenset(
        ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "seed")
    )

    @classmethod
    def _kind(cls) -> str:
        return _KIND

    def _check_to_commit(self) -> None:
        for i, group in enumerate(self.param_groups):
            try:
                check_group(group)
            except KeyError as error:
                raise ValueError(f"param_groups[{i}] has no option {error}") from None
        with_state = [p for p in self._parameters() if self._has_state(p)]
        with self._naming(with_state, self._check_part):
            for p in with_state:
                self._check_part(p)

    def _said(self, packer: Packer) -> dict[str, Any]:
        return dict(self._kept_options)

    def _check_same_kind(self, document: dict[str, Any]) -> None:
        for name, own in self._kept_options.items():
            with whole_document():
                committed = document[name]
            if committed != own:
                raise ValueError(
                    f"the commit has {name}={committed!r}, this optimizer {own!r}: make it "
                    f"with the commit's"
                )

    def _take(
        self,
        take: Take,
        entries: dict[Tensor, dict[str, Any]],
        groups: list[dict[str, Any]],
    ) -> None:
        for group in groups:
            check_group(group)
        try:
            super()._take(take, entries, groups)
        finally:
            if not self._offload.in_step():
                self._release(self._backward.reset())

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group)

    def _new_slot(self, parameter: Tensor) -> int:
        if parameter.requires_grad:
            check_parameter(parameter)
        self._check_replicated(parameter)
        part, first = local_of(parameter), first_element(parameter)
        return self._offload.add(part, parameter.requires_grad, first)

    def _bind(self, offload: Any) -> None:
        super()._bind(offload)
        self._backward = _C.BackwardStep(offload, self._takes)
        self._overlap: Overlap | None = None
        if self._hooks:
            self._overlap = Overlap(self._on_gradient, self._backward)

    def _unbind(self) -> None:
        if self._overlap is not None:
            self._overlap.stop()

    def _leave(self, before: Mapping[str, Any]) -> None:
        if before["_overlap"] is not None:
            before["_overlap"].stop()
        self._release(before["_backward"].reset())
        super()._leave(before)

    def _watch(self, parameters: list[Tensor]) -> None:
        if self._overlap is not None:
            self._overlap.watch(parameters)

    def _unwatch(self, parameter: Tensor) -> None:
        if self._overlap is not None:
            self._overlap.unwatch(parameter)

    @undisturbed
    def close(self) -> None:
        self._life.check_process()
        if self._overlap is not None:
            self._overlap.stop()
        if self._backward.is_open():
            _logger.warning(
                "an OffloadedAdamW is closed between backward() and step(): some parameters "
                "are updated, others not"
            )
            self._release(self._backward.reset())
        super().close()

    close.__doc__ = OffloadedBase.close.__doc__

    def accumulate(self) -> AbstractContextManager[None]:
        """A context for every backward pass of a step but the last.

        ``with optimizer.accumulate(): loss.backward()`` leaves gradients where they are, so
        that the next pass adds to them. ``overlap_backward="update"`` needs it. With "prefetch"
        it saves copies. With False it has no effect.
        """
        return nullcontext() if self._overlap is None else self._overlap.accumulate()

    @undisturbed
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients, as in ``torch.optim``.

        With ``set_to_none=False``, gradients that were taken get memory again, with zeros.
        """
        for p in self._parameters():
            if isinstance(p.grad, TakenGradient):
                p.grad = None if set_to_none else TakenGradient.zeros_instead(p)
        super().zero_grad(set_to_none)

    @undisturbed
    @plain_modes()
    def _step(self) -> None:
        complaint = ""
        if self._is_between_steps():
            self._state.flush()
        trained = [(group, with_gradient(group)) for group in self.param_groups]
        if self._max_grad_norm is not None:
            clipped = list(chain.from_iterable(group for _, group in trained))
            self.grad_norm = (
                torch.nn.utils.clip_grad_norm_(clipped, self._max_grad_norm)
                if clipped
                else torch.zeros((), dtype=torch.float32, device="cpu")
            )
        if self._has_no_state() and self._is_between_steps() and asks_for_state_only(trained):
            parameters = [p for _, group in trained for p in group]
            with self._naming(parameters, self._check_part):
                self._offload.init([self._own_part(p) for p in parameters])
        elif self._takes:
            parameters, complaint = self._finish(trained)
        else:
            parameters = [p for _, group in trained for p in group]
            groups = [
                (hyper(group), [(*self._own_part(p), self._own_gradient(p)) for p in own])
                for group, own in trained
            ]
            with self._naming(parameters, self._check_trained):
                self._offload.step(groups)
        self._log_notes()
        self._state.retire(parameters)
        for p in parameters:
            if is_distributed(p) and not self._takes:
                # The offload has told autograd only that the shard has changed.
                torch.autograd.graph.increment_version(p)
        if complaint:
            raise RuntimeError(complaint)

    def _check_may_save(self) -> None:
        if not self._is_between_steps():
            raise RuntimeError(
                "state_dict() between backward() and step(), with overlap_backward="
                '"update": the step that backward has begun is not complete. Call step() '
                "first, also to keep what an interrupted backward has left"
            )

    def _saved_states(self, parameters: Iterable[Tensor]) -> dict[Tensor, dict[str, Any]]:
        by_slot = {self._slot_of(p): p for p in parameters}
        stepped = [p for p in by_slot.values() if self._has_state(p)]
        with self._naming(stepped, self._check_part):
            saved = self._offload.save([self._own_part(p) for p in stepped])
        states = {}
        for slot, step, tensors in saved:
            parameter = by_slot[slot]
            entry = {"step": torch.tensor(float(step), dtype=torch.float32, device="cpu")}
            for name, tensor in zip(_TENSORS, tensors, strict=False):
                entry[name] = like_parameter(tensor, parameter)
            states[parameter] = entry
        return states

    def _merged_groups(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        pairs = paired(
            self.param_groups, state_dict["param_groups"], state_dict["state"], _TENSORS
        )
        return [merged(group, saved, self.defaults) for group, saved in pairs]

    @undisturbed
    def _load(self, state_dict: dict[str, Any]) -> None:
        groups = self._merged_groups(state_dict)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        entries, foreign = [], {}
        for key, (label, p) in zip(ids, labelled_parameters(self.param_groups), strict=True):
            if entry := state_dict["state"].get(key):
                own, foreign[p] = foreign_of(p, entry, _NAMES | {"master_param"})
                if own:
                    entries.append((p, read_entry(f"parameter {key!r}, {label}", p, own)))
        try:
            with self._naming([p for p, _ in entries], self._check_part):
                self._offload.load([(*self._own_part(p), *entry) for p, entry in entries])
        except BaseException:
            if not self._offload.in_step():
                self._release(self._backward.reset())
            raise
        self._release(self._backward.reset())
        self.param_groups = groups
        self._state.loaded(foreign, others_of(state_dict))
        self._let_go()

    def _check_trained(self, parameter: Tensor) -> None:
        self._offload.check(*self._own_part(parameter), self._own_gradient(parameter))

    def _on_gradient(self, parameter: Tensor) -> None:
        """Takes a gradient, or starts to copy it to the host. Called by hooks."""
        self._life.check()
        slot, gradient = self._slots.get(parameter), local_of(parameter.grad)
        if slot is None or not self._backward.wants(slot, parameter, gradient, is_nested):
            return
        if not self._takes:
            self._offload.prefetch(slot, local_of(parameter), gradient)
            return
        self._begin()
        if (number := self._backward.group_of(slot)) is not None:
            self._hand_over(parameter, number)

    def _begin(self) -> None:
        """Begins a step that takes gradients, unless one has begun."""
        if not self._is_between_steps():
            return
        self._check_may_step()
        self._state.flush()
        trained = [p for p in self._parameters() if p.requires_grad]
        with self._naming(trained, self._check_part):
            parts = [self._own_part(p) for p in trained]
            self._backward.begin(self._slots_of_groups(), parts)

    def _hand_over(self, parameter: Tensor, number: int) -> None:
        """Hands over a gradient that is final, with the number of the parameter's group."""
        if not self._fix(parameter, number):
            return  # It is in no group any more.
        slot, part = self._own_part(parameter)
        gradient = self._own_gradient(parameter)
        with self._naming([parameter]):
            self._backward.take(number, slot, part, gradient, parameter)
        Overlap.mark(parameter)

    def _fix(self, parameter: Tensor, number: int) -> bool:
        """Fixes the options of the parameter's group, which may have another place by now."""

        def options() -> Any:
            holding = (g for g in self.param_groups if any(p is parameter for p in g["params"]))
            group = next(holding, None)
            return None if group is None else hyper(group)

        return self._backward.fix(number, options)

    def _finish(
        self, trained: list[tuple[dict[str, Any], list[Tensor]]]
    ) -> tuple[list[Tensor], str]:
        """Ends a step of which some gradients may have been taken.

        Returns the parameters that took part, and what the caller has done that is not allowed.
        """
        for p in self._parameters():
            if p.grad is None:
                continue
            is_mark = isinstance(p.grad, TakenGradient)
            if refusal := self._backward.refusal(self._slot_of(p), is_mark):
                raise RuntimeError(f"{self._label_of(p)} {refusal}")
        found = [(now, p) for now, (_, own) in enumerate(trained) for p in own]
        for _, p in found:
            with self._naming([p]):
                self._check_trained(p)
        if found:
            self._begin()
        left = [(p, self._backward.group_or(self._slot_of(p), now)) for now, p in found]
        for p, number in left:  # Bad options are refused before anything is taken.
            self._fix(p, number)
        for p, number in left:
            self._hand_over(p, number)
        taken = self._backward.taken()
        options = [_hyper_or_none(group) for group in self.param_groups]
        try:
            complaint, about = self._backward.finish(self._slots_of_groups(), options)
        finally:
            self._release(taken)
        return taken, complaint if about is None else f"{self._label_of(about)} {complaint}"

    def _release(self, taken: list[Tensor]) -> None:
        """Lets go of parameters that are not being updated any more."""
        Overlap.release(taken)
        for p in set(taken) - set(self._parameters()):  # zero_grad() does not see these.
            if isinstance(p.grad, TakenGradient):
                p.grad = None

    def _slots_of_groups(self) -> list[list[int]]:
        known = self._slots
        return [[known[p] for p in g["params"] if p in known] for g in self.param_groups]

    def _has_no_state(self) -> bool:
        return not any(map(self._offload.has_state, self._slots.values()))

    # optimizer.state -------------------------------------------------------------------

    def _is_between_steps(self) -> bool:
        return not self._backward.is_open()

    def _shown_state(self, parameter: Tensor) -> dict[str, int | None]:
        shown: dict[str, int | None] = {"step": self._offload.step_of(self._slots[parameter])}
        shown |= {"exp_avg": None, "exp_avg_sq": None}
        if parameter.dtype != torch.float32:
            shown["master_param"] = None
        return shown

    def _own_names(self, parameter: Tensor) -> frozenset[str]:
        return _NAMES if parameter.dtype == torch.float32 else _NAMES | {"master_param"}

    @undisturbed
    @plain_modes()
    def _read_state(self, parameter: Tensor, name: str) -> Tensor:
        self._life.check()
        slot, part = self._own_part(parameter)
        return self._offload.read(slot, part, _TENSORS.index(name)).to(part.device)

    def _like(self, parameter: Tensor, local: Tensor) -> Tensor:
        return like_parameter(local, parameter)

    @undisturbed
    @plain_modes()
    def _change_states(self, changes: list[tuple[Tensor, dict[str, Any]]]) -> None:
        self._life.check()
        labels = self._labels()
        read, outgrown = [], []
        for parameter, entry in changes:
            label = labels.get(parameter) or self._label_of(parameter)
            slot, part = self._own_part(parameter)
            step = self._offload.step_of(slot) if self._has_state(parameter) else None
            whole = self._own_names(parameter) - entry.keys() <= {"step", "master_param"}
            if step is not None and whole and not self._offload.fits(slot, part):
                # Rows were cut off the parameter and off its state.
                outgrown.append(slot)
                entry, step = {"step": step} | entry, None
            read.append((slot, part, *read_change(label, parameter, entry, step)))
        self._offload.forget(outgrown)
        self._offload.change(read)


def _hyper_or_none(group: dict[str, Any]) -> _C.AdamWHyper | None:
    try:
        return hyper(group)
    except (KeyError, TypeError, ValueError):
        return None
