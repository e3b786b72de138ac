"""What optimizers with their state on NVMe have in common."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_ext._adamw_groups import labelled_parameters
from torch_ext._checks import Life, close_quietly, log_notes
from torch_ext._local import check_parameter, is_distributed, local_gradient, local_of
from torch_ext._modes import plain_modes
from torch_ext._plan import OffloadPlan
from torch_ext._undisturbed import undisturbed

_logger = logging.getLogger("torch_ext")
_Self = TypeVar("_Self", bound="OffloadedBase")


class OffloadedBase(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` around an engine of ``_C``.

    A subclass makes the engine, hands it to ``_own`` and calls ``super().__init__``
    afterwards, which adds the groups.
    """

    _engine: Any
    _slots: dict[Tensor, int]
    _life: Life

    def _own(self, engine: Any) -> None:
        self._slots = {}
        self._life = Life("optimizer")
        self._engine = engine
        self._notes_logged = 0
        self._log_notes()
        # At exit the I/O must have ended before the interpreter is taken down.
        self._finalizer = weakref.finalize(
            self, close_quietly, engine, os.getpid(), f"an {type(self).__name__}"
        )

    def _log_notes(self) -> None:
        notes = self._engine.notes()
        log_notes(notes[self._notes_logged :])
        self._notes_logged = len(notes)

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError or TypeError if a group's options cannot be used."""
        raise NotImplementedError

    @undisturbed
    @plain_modes()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, before or after the first step; see ``torch.optim``.

        Raises:
            ValueError, TypeError: As at construction; nothing is added then.
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
                with self._naming([p]):
                    slots[p] = self._new_slot(p)
        except Exception:
            self.param_groups.pop()
            if slots:
                self._engine.remove_from(min(slots.values()))
            raise
        self._slots.update(slots)
        self._watch(group["params"])

    def stats(self) -> dict[str, int | float]:
        """Counters since the optimizer was made.

        ``steps``; ``bytes_read`` and ``bytes_written`` (of the drive, padded; all that
        is written wears it); ``read_seconds``, ``update_seconds``, ``write_seconds``
        (while a lane was busy) and ``wait_seconds`` (that steps waited for I/O), each
        also as a share, ``read_share``, ..., of ``elapsed_seconds`` (since the first step
        began);
        ``host_memory``, ``host_bytes_peak`` (bytes in use at most); ``state_bytes`` and
        ``resident_bytes`` (of those that stay in memory); ``tile_visits`` (by steps) and
        ``tile_hits`` (those that cost no transfer); ``tiles``, ``tile_bytes`` (of a
        buffer) and ``buffers``. Also of a closed optimizer.

        Raises:
            RuntimeError: The optimizer belongs to another process.
        """
        self._life.check_process()
        stats = self._engine.stats()
        elapsed = stats["elapsed_seconds"]
        for lane in ("read", "update", "write", "wait"):
            stats[f"{lane}_share"] = stats[f"{lane}_seconds"] / elapsed if elapsed else 0.0
        return stats

    @plain_modes()
    def plan(self) -> OffloadPlan:
        """What ``host_memory`` is used for, also before the first step.

        ``print(optimizer.plan())`` says it in words.

        Raises:
            RuntimeError: The optimizer is closed or belongs to another process.
        """
        self._life.check()
        planned = [p for p in self._parameters() if self._is_kept(p)]
        with self._naming(planned, self._check_part):
            return OffloadPlan(**self._engine.plan([self._own_part(p) for p in planned]))

    def timeline(self) -> list[tuple[str, int, float, float]]:
        """What the last step did: (lane, tile, start, end) in order of start.

        The lane is "read", "update" or "write"; times are seconds since the step
        began, negative for what was read ahead.

        Raises:
            RuntimeError: The optimizer belongs to another process.
        """
        self._life.check_process()
        return self._engine.timeline()

    @property
    def engine(self) -> str:
        """The I/O engine in use. Raises RuntimeError as ``timeline`` does."""
        self._life.check_process()
        return self._engine.engine

    @undisturbed
    def close(self) -> None:
        """Waits for writes in flight and frees memory and disk space.

        Idempotent. Later calls of anything but ``stats``, ``timeline`` and ``engine``
        raise RuntimeError.

        Raises:
            OSError: An error that no call has raised; all is closed then.
            RuntimeError: The optimizer belongs to another process.
        """
        self._life.check_process()
        self._life.closed = True
        self._engine.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception:
            # The body's own exception says more than what followed from it.
            if error is None:
                raise
            _logger.exception("closing an %s after another error", type(self).__name__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"an {type(self).__name__} belongs to its process and cannot be copied or "
            f"pickled: take its state_dict()"
        )

    def _parameters(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _own_part(self, parameter: Tensor) -> tuple[int, Tensor]:
        """The engine's number for a parameter, and what this process has of it."""
        return self._slot_of(parameter), local_of(parameter)

    def _own_gradient(self, parameter: Tensor) -> Tensor:
        """What this process has of a parameter's gradient."""
        if is_distributed(parameter):
            with self._naming([parameter]):
                check_parameter(parameter)
        return local_gradient(parameter, lambda: self._label_of(parameter))

    def _label_of(self, parameter: Tensor) -> str:
        labelled = labelled_parameters(self.param_groups)
        return next(label for label, p in labelled if p is parameter)

    @contextmanager
    def _naming(
        self, parameters: Iterable[Tensor], check: Callable[[Tensor], object] | None = None
    ) -> Iterator[None]:
        """Has an error about one of these parameters begin with its name.

        Without ``check`` there is one parameter. The engine, which does not know names, has
        said what is wrong with one of many: ``check`` says it again for the one that it is.
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
        """Raises what the engine has to say of a parameter."""
        self._engine.check(*self._own_part(parameter))

    def _is_kept(self, parameter: Tensor) -> bool:
        """Whether it has a state, or is going to: frozen ones may be anything."""
        return parameter.requires_grad or self._engine.has_state(self._slot_of(parameter))

    def _slot_of(self, parameter: Tensor) -> int:
        if (slot := self._slots.get(parameter)) is not None:
            return slot
        if not self.state:
            return self._adopt(parameter)
        raise RuntimeError(
            f"{self._label_of(parameter)} is a tensor that this optimizer was not given. "
            f"Change a parameter in place (parameter.data = ...), add new ones with "
            f"add_param_group(), or make a new optimizer"
        )

    def _adopt(self, parameter: Tensor) -> int:
        """Takes a parameter that stands in the place of another: before there is any
        state accelerate puts FSDP2's shards where the whole parameters were.
        """
        with self._naming([parameter]):
            slot = self._new_slot(parameter)
        # Those that are gone shall not be kept alive.
        for gone in self._slots.keys() - set(self._parameters()):
            del self._slots[gone]
        self._watch([parameter])
        return self._slots.setdefault(parameter, slot)

    def _new_slot(self, parameter: Tensor) -> int:
        if parameter.requires_grad:
            check_parameter(parameter)
        return self._engine.add(local_of(parameter), parameter.requires_grad)

    def _watch(self, parameters: list[Tensor]) -> None:
        """Called with the parameters that are new."""
