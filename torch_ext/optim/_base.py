"""The base class of the optimizers that have their state on NVMe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from torch_ext._closable import Closable
from torch_ext._modes import plain_modes
from torch_ext._quiet import undisturbed
from torch_ext.optim._dtensor import check_parameter, is_distributed, local_gradient, local_of
from torch_ext.optim._plan import OffloadPlan
from torch_ext.optim._state import OptimizerState
from torch_ext.optim._state_dict import COMMIT, check_state_dict, labelled_parameters

_logger = logging.getLogger("torch_ext")


class OffloadedBase(Closable, torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` around an offload of ``_C``.

    A subclass makes the offload and hands it to ``_start``. Then it calls ``super().__init__``,
    which adds the groups.
    """

    _offload: Any
    _slots: dict[Tensor, int]
    _state: OptimizerState

    _instead = ": take its state_dict()"

    def _start(self, offload: Any) -> None:
        self._state = OptimizerState._of(self)
        self._bind(offload)

    def _bind(self, offload: Any) -> None:
        """Takes an offload in which no parameter has a slot yet."""
        self._slots = {}
        self._offload = offload
        self._own(offload, "optimizer")

    @property
    def _engine(self) -> Any:
        """The former name of ``_offload``, for programs that reach behind the class."""
        return self._offload

    @_engine.setter
    def _engine(self, value: Any) -> None:
        self._offload = value

    @property
    def state(self) -> OptimizerState:
        """The state of each parameter, as in ``torch.optim``: one dict for each.

        ``state[p]["exp_avg"]`` reads that tensor from the drive. Assigning to it, or writing to
        what was read, counts in the next step. Writing to it after that step makes the next
        call raise RuntimeError, once. A loop over items finds the numbers, keys that others
        have put there, and None for each tensor. ``del state[p]``, ``state.clear()`` and an
        empty dict in its place start anew. Keys of others stay, and are in ``state_dict()``.
        ``step()`` and ``state_dict()`` check an assigned value when they use it.

        State belongs to its parameter: taking the parameter out of all groups leaves it.
        """
        self._state.follow()
        return self._state

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        if value is not self._state:
            self._state._become(value)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError or TypeError if a group's options cannot be used."""
        raise NotImplementedError

    @undisturbed
    @plain_modes()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, before or after the first step. See ``torch.optim``.

        Raises:
            ValueError, TypeError: As at construction. Nothing is added then.
            RuntimeError: The optimizer is closed or belongs to another process.
        """
        self._life.check()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        slots: dict[Tensor, int] = {}
        try:
            self._check_group(group)
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError("a parameter group has the same parameter twice")
            for p in group["params"]:
                if p in self._slots:
                    continue
                with self._naming([p]):
                    slots[p] = self._new_slot(p)
        except Exception:
            self.param_groups.pop()
            for slot in reversed(slots.values()):
                self._offload.remove(slot)
            raise
        self._slots.update(slots)
        self._watch(list(slots))

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs a step. Returns what ``closure``, if given, returned.

        When it returns, the parameters are updated. The last tiles of the state may still be on
        their way to the drive.

        ``OffloadedAdamW``: A first step with a learning rate of 0 and gradients that are all 0
        makes the state and does not count. ``torch.distributed.checkpoint`` asks for state in
        this way.

        Raises:
            OSError: Reading or writing failed, now or since the last call.
            FileExistsError: With ``state_dict_mode="commit"``, before the first step: another
                run has committed in ``nvme_path``, so this one could not.
            RuntimeError: A gradient is sparse, or a DTensor on another mesh or with other
                placements than its parameter. Or a tensor of ``state`` was read, and written to
                after the next step. Or the optimizer is closed or belongs to another process.
            RuntimeError: The class of an ``OffloadedOptimizer`` does something that it did not
                do in the trial, and that pieces cannot share. The state is half updated then.
            ValueError, TypeError: A parameter, a gradient, an option or what was assigned to
                ``state`` cannot be used. Nothing has changed then.
            Exception: What that class raises. The state is half updated then.
        """
        self._life.check()
        self._check_may_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        raise NotImplementedError

    def _check_may_step(self) -> None:
        """Raises OSError if training would end in a state that cannot be saved."""

    @torch._disable_dynamo
    @plain_modes()
    def state_dict(self) -> dict[str, Any]:
        """Returns the state as the class that runs in memory does: either loads the other's.

        ``state_dict_mode`` says where its tensors are. bfloat16 and float16 parameters also
        have ``master_param``, in float32. ``exp_avg`` and ``exp_avg_sq`` of ``OffloadedAdamW``
        are float32 whatever the parameter is. State of a DTensor is a DTensor, with the same
        mesh and placements.

        With "commit" it has no tensors: it refers to a commit, and only these classes take it.

        Raises:
            OSError: Reading failed, or there is no room for a copy: no memory (ENOMEM) or no
                space. All is as before then.
            RuntimeError: As for ``step``.
            OSError, TypeError, ValueError: With "commit", as for ``commit()``.
        """
        self._life.check()
        self._check_may_save()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._saved()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        return state_dict

    def _check_may_save(self) -> None:
        """Raises RuntimeError while a step is not complete."""

    @undisturbed
    def _saved(self) -> dict[str, Any]:
        self._state.flush()
        number_of = self._numbers_of_saved()
        groups = self._packed_groups(number_of)
        state = {number_of[p]: entry for p, entry in self._saved_states(number_of).items()}
        return {"state": self._with_foreign(state, number_of), "param_groups": groups}

    def _packed_groups(self, number_of: Mapping[Tensor, int]) -> list[dict[str, Any]]:
        groups = []
        for group in self.param_groups:
            packed = {key: value for key, value in group.items() if key != "params"}
            groups.append(packed | {"params": [number_of[p] for p in group["params"]]})
        return groups

    def _saved_states(self, parameters: Iterable[Tensor]) -> dict[Tensor, dict[str, Any]]:
        """Returns the state of each of these parameters that has one."""
        raise NotImplementedError

    @torch._disable_dynamo
    @plain_modes()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of this class, or of the one that runs in memory.

        Tensors may have any floating dtype and any device. They are read one part after the
        other, and the dict is not copied. Those of a DTensor parameter have its mesh and
        placements, or are plain tensors: the local shards. A bfloat16 or float16 parameter
        whose ``master_param`` is missing, or does not round to it, is its own master. Keys that
        the class does not keep stay in ``state``.

        A dict of ``state_dict_mode="commit"`` leads to its commit, in ``nvme_path`` or where it
        was. This optimizer becomes the owner of that store, whatever its own mode is. So
        counters begin anew. If it has the commit itself, it goes back to it. All processes call
        this together.

        Raises:
            ValueError, TypeError: The state does not fit. Nothing has changed then. The text
                names the parameter.
            ValueError: The commit is gone: the text says which there are. Or another store is
                in ``nvme_path``: it names both. Nothing has changed then.
            FileNotFoundError, BlockingIOError: The store is nowhere, or another process uses
                it. Nothing has changed then.
            RuntimeError: As for ``step``.
            OSError: Writing failed. The old state is gone.
        """
        self._life.check()
        check_state_dict(state_dict)
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        check_state_dict(state_dict)
        if COMMIT in state_dict:
            self._load_reference(state_dict)
        else:
            self._load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError

    def _load_reference(self, state_dict: dict[str, Any]) -> None:
        """Takes a commit that the dict refers to."""
        raise NotImplementedError

    def stats(self) -> dict[str, int | float]:
        """Returns counters since the optimizer was made, also of a closed one.

        * ``steps``.
        * ``bytes_read`` and ``bytes_written``, on the drive and padded. Writing wears it.
        * ``read_seconds``, ``update_seconds`` and ``write_seconds``, while a lane was busy.
        * ``wait_seconds``, in which steps waited for I/O.
        * ``elapsed_seconds``, since the first step began. ``read_share`` and so on are the
          shares of them.
        * ``host_memory``, and ``host_bytes_peak``, the most bytes in use.
        * ``state_bytes``, and ``resident_bytes``, those that stay in memory.
        * ``tile_visits`` by steps, and ``tile_hits``, the visits that cost no transfer.
        * ``tiles``, ``tile_bytes`` (of a buffer) and ``buffers``.

        Raises:
            RuntimeError: The optimizer belongs to another process.
        """
        self._life.check_process()
        stats = self._offload.stats()
        elapsed = stats["elapsed_seconds"]
        for lane in ("read", "update", "write", "wait"):
            stats[f"{lane}_share"] = stats[f"{lane}_seconds"] / elapsed if elapsed else 0.0
        return stats

    @plain_modes()
    def plan(self) -> OffloadPlan:
        """Returns what ``host_memory`` and the drives are used for, also before the first step.

        ``print(optimizer.plan())`` says it in words.

        Raises:
            RuntimeError: The optimizer is closed or belongs to another process.
        """
        self._life.check()
        planned = [p for p in self._parameters() if self._is_kept(p)]
        with self._naming(planned, self._check_part):
            parts = [self._own_part(p) for p in planned]
            plan = self._offload.plan(parts)
        parameters = sum(part.nbytes for _, part in parts)
        return OffloadPlan(**plan, commit_bytes=2 * (plan["state_bytes"] + parameters))

    def timeline(self) -> list[tuple[str, int, float, float]]:
        """Returns what the last step did: (lane, tile, start, end), in order of start.

        The lane is "read", "update" or "write". Times are seconds since the step began. They
        are negative for what was read ahead.

        Raises:
            RuntimeError: The optimizer belongs to another process.
        """
        self._life.check_process()
        return self._offload.timeline()

    @property
    def engine(self) -> str:
        """The name of the I/O engine in use. Raises RuntimeError as ``timeline`` does."""
        self._life.check_process()
        return self._offload.engine

    @undisturbed
    def close(self) -> None:
        """Waits for writes in flight, then frees memory and disk space.

        It may be called again. Later calls of anything but ``stats``, ``timeline`` and
        ``engine`` raise RuntimeError.

        Raises:
            OSError: An error that no call has raised. Everything is closed then.
            RuntimeError: The optimizer belongs to another process.
        """
        self._life.check_process()
        self._life.closed = True
        self._offload.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch.optim's, which assigns what it is given."""
        rest = {name: value for name, value in state.items() if name != "state"}
        super().__setstate__(rest)
        if "state" in state:
            self.state = state["state"]

    def _parameters(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _own_part(self, parameter: Tensor) -> tuple[int, Tensor]:
        """Returns the offload's number for a parameter, and this process's part of it."""
        return self._slot_of(parameter), local_of(parameter)

    def _own_gradient(self, parameter: Tensor) -> Tensor:
        """Returns this process's part of a parameter's gradient."""
        if is_distributed(parameter):
            with self._naming([parameter]):
                check_parameter(parameter)
        return local_gradient(parameter, lambda: self._label_of(parameter))

    def _label_of(self, parameter: Tensor) -> str:
        labelled = labelled_parameters(self.param_groups)
        in_no_group = f"a parameter in no group, of sizes {list(parameter.shape)}"
        return next((label for label, p in labelled if p is parameter), in_no_group)

    @contextmanager
    def _naming(
        self, parameters: Iterable[Tensor], check: Callable[[Tensor], object] | None = None
    ) -> Iterator[None]:
        """Makes an error about one of these parameters begin with its name.

        The offload does not know names. It has said what is wrong with one of many parameters,
        and ``check`` says it again for the one that it is. Without ``check`` there is one
        parameter.
        """
        try:
            yield
        except (TypeError, ValueError, RuntimeError) as error:
            for p in parameters:
                found: Exception = error
                if check is not None:
                    try:
                        check(p)
                        continue
                    except (TypeError, ValueError, RuntimeError) as again:
                        found = again
                if type(found) is not type(error) or str(found) != str(error):
                    continue
                label = self._label_of(p)
                if str(error).startswith(label):
                    break
                about = f"{label} ({p.dtype}, sizes {list(p.shape)})"
                raise type(error)(f"{about}: {error}") from None
            raise

    def _check_part(self, parameter: Tensor) -> None:
        """Raises the offload's error about a parameter, if it has one."""
        self._offload.check(*self._own_part(parameter))

    def _is_kept(self, parameter: Tensor) -> bool:
        """Whether the parameter has a state, or will get one. Frozen ones may be anything."""
        return parameter.requires_grad or self._offload.has_state(self._slot_of(parameter))

    def _slot_of(self, parameter: Tensor) -> int:
        if (slot := self._slots.get(parameter)) is not None:
            return slot
        return self._adopt(parameter)

    def _adopt(self, parameter: Tensor) -> int:
        """Takes a parameter that was put into a group by hand.

        accelerate puts FSDP2's shards where the whole parameters were. Whoever prunes rows puts
        what is left of a parameter in its place.
        """
        with self._naming([parameter]):
            self._slots[parameter] = slot = self._new_slot(parameter)
        self._watch([parameter])
        self._let_go()
        return slot

    def _let_go(self) -> None:
        """Lets go of parameters that are in no group and have no state."""
        if not self._is_between_steps():
            return
        # The last first: the numbers that are given again do not depend on the set's order.
        left_out = self._slots.keys() - set(self._parameters())
        for gone in sorted(left_out, key=self._slots.__getitem__, reverse=True):
            if not self._offload.has_state(self._slots[gone]):
                self._unwatch(gone)
                self._offload.remove(self._slots.pop(gone))

    def _new_slot(self, parameter: Tensor) -> int:
        if parameter.requires_grad:
            check_parameter(parameter)
        return self._offload.add(local_of(parameter), parameter.requires_grad)

    def _watch(self, parameters: list[Tensor]) -> None:
        """Called with new parameters."""

    def _unwatch(self, parameter: Tensor) -> None:
        """Called with a parameter that is gone."""

    # optimizer.state -------------------------------------------------------------------

    def _known(self) -> Iterable[Tensor]:
        return list(self._slots)

    def _takes_part(self, parameter: Tensor) -> bool:
        return parameter in self._slots or any(p is parameter for p in self._parameters())

    def _has_state(self, parameter: Tensor) -> bool:
        slot = self._slots.get(parameter)
        return slot is not None and self._offload.has_state(slot)

    def _state_of(self, parameter: Tensor) -> dict[str, Any] | None:
        return self._shown_state(parameter) if self._has_state(parameter) else None

    def _shown_state(self, parameter: Tensor) -> dict[str, Any]:
        """Returns an entry of ``state``, with all keys and without tensors.

        accelerate and Lightning would move tensors to the GPU. torch.distributed.checkpoint
        looks for the names.
        """
        raise NotImplementedError

    @undisturbed
    def _forget_states(self, parameters: list[Tensor]) -> None:
        self._life.check()
        self._offload.forget([self._slots[p] for p in parameters if p in self._slots])
        self._let_go()

    def _is_between_steps(self) -> bool:
        return True

    def _check_between_steps(self, what: str) -> None:
        if self._is_between_steps():
            return
        raise RuntimeError(
            f'{what} between backward() and step(), with overlap_backward="update": the step '
            f"that backward has begun is not complete. Call step() first"
        )

    def _labels(self) -> dict[Tensor, str]:
        return {p: label for label, p in labelled_parameters(self.param_groups)}

    def _numbers_of_saved(self, call: str = "state_dict()") -> dict[Tensor, int]:
        """Returns the number that stands for each parameter in a ``state_dict()``."""
        number_of = {p: i for i, p in enumerate(self._parameters())}
        if left_out := [p for p in self._known() if p not in number_of and self._has_state(p)]:
            _logger.warning(
                "%s leaves out the state of %d parameters that are in no group: nothing could "
                "load it. Delete it from the optimizer's state if they are gone",
                call,
                len(left_out),
            )
        return number_of

    def _with_foreign(
        self, state: dict[Any, Any], number_of: dict[Tensor, int]
    ) -> dict[Any, Any]:
        """Returns a saved state, with what others keep in it."""
        for parameter, number in number_of.items():
            if foreign := self._state.foreign(parameter):
                state[number] = state.get(number, {}) | foreign
        return {number: state[number] for number in number_of.values() if number in state} | (
            self._state.others()
        )
