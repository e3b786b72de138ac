"""The processes that commit together, and how one of them fails for all.

Each process has a store of its own. What they do to it, all do or none. A call that fails in
one process raises in all, so that none waits for another in its next collective. The error
is of the same kind everywhere, and names the rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from torch_ext._native import _C

T = TypeVar("T")

_KINDS = (TypeError, ValueError, RuntimeError)


class Together:
    """This process's rank among those of a group of ``torch.distributed``, or alone."""

    def __init__(self, group: Any = None) -> None:
        """``group`` is the group, or None for that of all processes.

        Raises:
            ValueError: This process is not in it.
        """
        self._group = group
        #: The same processes in a group of its own.
        self._beside: Together | None = None
        #: Its rank, of an object that asks no other.
        self._alone_as: int | None = None
        self.rank, self.world = 0, 1
        if is_initialized():
            self.rank = torch.distributed.get_rank(group)
            self.world = torch.distributed.get_world_size(group)
        elif group is not None:
            raise ValueError("process_group is given, and torch.distributed is not initialized")
        if self.rank < 0:
            raise ValueError("this process is not in process_group")

    def alone(self) -> Together:
        """Returns this process as one that asks no other."""
        alone = copy.copy(self)
        alone._alone_as = self.rank if self.world > 1 else None
        alone.rank, alone.world = 0, 1
        return alone

    def beside(self) -> Together:
        """Returns the same processes, whose exchanges may go on beside all others. All call it.

        They are gloo's, on a thread of their own. So they neither wait for what the processes
        say to each other meanwhile, nor stand in its way.

        Raises:
            RuntimeError: This torch has no gloo.
        """
        if self.world > 1 and self._beside is None:
            distributed = torch.distributed
            if not distributed.is_gloo_available():
                raise RuntimeError(
                    "commit(wait=False) in several processes needs gloo, which this torch "
                    "lacks: call commit() without wait=False"
                )
            beside = copy.copy(self)
            beside._group = distributed.new_group(
                distributed.get_process_group_ranks(self._group),
                timeout=self._timeout(),
                backend="gloo",
                use_local_synchronization=True,
            )
            self._beside = beside
        return self._beside or self

    def _timeout(self) -> timedelta | None:
        """Returns after how long the group gives up waiting, as far as it says so."""
        group = self._group or torch.distributed.group.WORLD
        try:
            return group._get_backend(torch.device("cpu")).options._timeout
        except (AttributeError, RuntimeError):
            return None

    def check(self, call: str) -> None:
        """Raises RuntimeError if this process may not call it, or there are more by now."""
        if self._alone_as:
            raise RuntimeError(
                f'{call} in rank {self._alone_as}: with state_dict_mode="commit", '
                f"rank 0 commits for all"
            )
        if (
            self.world > 1
            or self._alone_as == 0
            or self._group is not None
            or not is_initialized()
        ):
            return
        if (now := torch.distributed.get_world_size()) > 1:
            raise RuntimeError(
                f"{call} in one of {now} processes: make the optimizer after "
                f"init_process_group(), so that it knows of the others"
            )

    def exchange(self, value: Any) -> list[Any]:
        """Returns the ``value`` of each process, by rank. All call it."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        with self._all_here():
            torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def _all_here(self) -> Iterator[None]:
        """Says which process does not take part in what follows, as far as that can be told."""
        distributed = torch.distributed
        try:
            if distributed.get_backend(self._group) == "gloo":
                # Its error names those that do not come.
                distributed.monitored_barrier(
                    self._group, timeout=self._timeout(), wait_all_ranks=True
                )
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.world} got no answer; every process has to make "
                f"the same calls: {error}"
            ) from error

    def from_first(self, call: Callable[[], Any]) -> Any:
        """Returns what ``call`` returns in rank 0, the only one that calls it. All call this.

        Raises:
            Exception: What it raises there.
        """
        if self.world == 1:
            return call()
        told: list[Any] = [None, None]
        error = None
        if self.rank == 0:
            try:
                told[0] = call()
            except Exception as raised:
                error, told[1] = raised, self.said(raised)
        with self._all_here():
            torch.distributed.broadcast_object_list(told, group=self._group, group_src=0)
        if error is not None:
            raise error
        self.raise_for([told[1]])
        return told[0]

    def agreed(self, call: Callable[[], T]) -> T:
        """Returns what ``call`` returns here, if it raises in no process.

        Raises:
            Exception: What it raises in this process, or else in another one.
        """
        result, error = None, None
        try:
            result = call()
        except Exception as raised:
            error = raised
        told = self.exchange(self.said(error))
        if error is not None:
            raise error
        self.raise_for(told)
        return result

    def same(self, value: Any, what: str) -> None:
        """Raises ValueError in all processes if they have different values."""
        values = self.exchange(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"{what} is {values[0]} on rank 0 and {other} on rank {rank}: it must be "
                    f"the same in all processes"
                )

    def said(self, error: Exception | None) -> tuple[Any, ...] | None:
        """Returns what other processes are told about an error."""
        if error is None:
            return None
        if isinstance(error, OSError) and error.errno is not None:
            return (OSError, error.errno, error.strerror, error.filename)
        kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
        return (kind, str(error))

    def raise_for(self, told: list[tuple[Any, ...] | None]) -> None:
        """Raises the error of the first process that has one."""
        for rank, error in enumerate(told):
            if error is None:
                continue
            kind, *details = error
            if kind is OSError:
                number, text, path = details
                raise OSError(number, f"rank {rank}: {text}", path)
            raise kind(f"rank {rank}: {details[0]}")


class Vote:
    """Whether all processes have done their part: see GroupVote in C++."""

    def __init__(self, together: Together) -> None:
        self._together = together
        self._told: list[tuple[Any, ...] | None] = []

    def __call__(self, check: Callable[[], None]) -> bool:
        """Returns whether ``check`` raises in no process. All call it."""
        error = None
        try:
            check()
        except Exception as raised:
            error = raised
        self._told = self._together.exchange(self._together.said(error))
        return not any(self._told)

    def explain(self, error: Exception) -> None:
        """Raises what another process has failed with, if ``error`` says no more than that."""
        if str(error).startswith(_C.OTHERS_FAILED):
            self._together.raise_for(self._told)


def is_initialized() -> bool:
    """Whether this process is one of several, or could be."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()
