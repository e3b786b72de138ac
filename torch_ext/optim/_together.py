"""The processes that commit together, and how one of them fails for all.

Each process has a store of its own. What they do to it, all do or none. A call that fails in
one process raises in all, so that none waits for another in its next collective. The error
is of the same kind everywhere, and names the rank.
"""

from __future__ import annotations

import copy
import os
import pickle
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from torch_ext._native import _C

T = TypeVar("T")

_KINDS = (TypeError, ValueError, RuntimeError)
#: See Together.count().
_counts: Counter[tuple[int, ...]] = Counter()
#: What gloo opens, besides one for each process, and some more.
_DESCRIPTORS = 16


class Together:
    """This process's rank among those of a group of ``torch.distributed``, or alone."""

    def __init__(self, group: Any = None) -> None:
        """``group`` is the group, or None for that of all processes.

        Raises:
            ValueError: This process is not in it.
        """
        self._group = group
        self._beside: Beside | None = None
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

    def count(self) -> int:
        """Returns how often this process has called it for these processes."""
        ranks: tuple[int, ...] = ()
        if self.world > 1:
            ranks = tuple(torch.distributed.get_process_group_ranks(self._group))
        _counts[ranks] += 1
        return _counts[ranks]

    def alone(self) -> Together:
        """Returns this process as one that asks no other."""
        alone = copy.copy(self)
        alone._alone_as = self.rank if self.world > 1 else None
        alone.rank, alone.world = 0, 1
        return alone

    def beside(self) -> Beside:
        """Returns the same processes, whose exchanges may go on beside all others. All call it.

        Raises:
            RuntimeError: They could not be connected, or this torch has no gloo.
            OSError: A process has too many open files.
        """
        is_connected = self._beside is not None and self._beside.is_current()
        if not all(self.exchange(is_connected)):
            self.leave()
            self.agreed(self._check_can_connect)
            self._beside = self._connected(self.from_first(lambda: uuid.uuid4().hex))
        assert self._beside is not None
        return self._beside

    def _check_can_connect(self) -> None:
        """Raises what keeps this process from it. Later the others would wait for a while."""
        if not torch.distributed.is_gloo_available():
            raise RuntimeError(
                "commit(wait=False) in several processes needs gloo, which this torch "
                "lacks: call commit() without wait=False"
            )
        with ExitStack() as opened:  # gloo may abort the process without descriptors.
            for _ in range(self.world + _DESCRIPTORS):
                opened.enter_context(open(os.devnull, "rb"))

    def _connected(self, name: str) -> Beside:
        """Returns what connects this process, if all have theirs."""
        error: Exception | None = None
        try:
            made = Beside(self, name)
        except Exception as raised:
            error = raised
        # Those that have waited in vain do not know why.
        told = self.exchange(error and f"rank {self.rank}: {error}")
        if any(told):
            raise RuntimeError(
                f"commit(wait=False) could not connect the processes: "
                f"{'; '.join(filter(None, told))}"
            ) from error
        return made

    def leave(self) -> None:
        """Lets go of the connections that ``beside()`` has made."""
        if self._beside is not None:
            self._beside.close()
        self._beside = None

    def timeout(self) -> timedelta | None:
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
        with told_of_silence(self.rank, self.world):
            if distributed.get_backend(self._group) == "gloo":
                # Its error names those that do not come.
                distributed.monitored_barrier(
                    self._group, timeout=self.timeout(), wait_all_ranks=True
                )
            yield

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
                error, told[1] = raised, said(raised)
        with self._all_here():
            torch.distributed.broadcast_object_list(told, group=self._group, group_src=0)
        if error is not None:
            raise error
        raise_for([told[1]])
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
        told = self.exchange(said(error))
        if error is not None:
            raise error
        raise_for(told)
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


class Beside:
    """Processes that talk to each other beside all else, connected by gloo on its own threads.

    So their exchanges neither wait for what the processes say to each other meanwhile, nor
    stand in its way. torch does not know of the connections. It names its groups by how many a
    process is in, so processes that are in different numbers would not find each other. And
    what it knows of goes with ``destroy_process_group()``, amid a commit too.
    """

    def __init__(self, together: Together, name: str) -> None:
        """Connects this process to the others, which do so too. ``name`` is of no other group.

        Raises:
            RuntimeError: It was not possible in time.
        """
        distributed = torch.distributed
        self.rank, self.world = together.rank, together.world
        self._timeout = together.timeout() or distributed.distributed_c10d.default_pg_timeout
        # Weak, so that the default group can go.
        self._made_in = weakref.ref(distributed.group.WORLD)
        store = distributed.distributed_c10d._get_default_store()
        # All are here already. The other half of the time is for those that have failed: they
        # wait to tell these why.
        self._gloo: Any = distributed.ProcessGroupGloo(
            distributed.PrefixStore(name, store), self.rank, self.world, self._timeout / 2
        )

    def is_current(self) -> bool:
        """Whether the default process group is the one that there was."""
        return self._made_in() is torch.distributed.group.WORLD

    def close(self) -> None:
        """Ends the connections and their threads. Nothing is exchanged later."""
        self._gloo = None

    def exchange(self, value: Any) -> list[Any]:
        """Returns the ``value`` of each process, by rank. All call it."""
        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        with told_of_silence(self.rank, self.world):
            self._gloo.monitored_barrier(self._timeout, wait_all_ranks=True)
            count = torch.tensor([packed.numel()], dtype=torch.int64, device="cpu")
            sizes = self._gather(count)
            padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8, device="cpu")
            padded[: packed.numel()] = packed
            values = self._gather(padded)
        return [pickle.loads(bytes(each.tolist())) for each in values]  # It ignores the rest.

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns the tensor of each process. They have one shape."""
        tensors = [torch.empty_like(tensor) for _ in range(self.world)]
        self._gloo.allgather([tensors], [tensor]).wait()
        return tensors


@contextmanager
def told_of_silence(rank: int, world: int) -> Iterator[None]:
    """Says what it means if the other processes do not answer."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {rank} of {world} got no answer; every process has to make the same calls: "
            f"{error}"
        ) from error


def said(error: Exception | None) -> tuple[Any, ...] | None:
    """Returns what other processes are told about an error."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return (OSError, error.errno, error.strerror, error.filename)
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
    return (kind, str(error))


def raise_for(told: list[tuple[Any, ...] | None]) -> None:
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

    def __init__(self, together: Together | Beside) -> None:
        self._together = together
        self._told: list[tuple[Any, ...] | None] = []

    def __call__(self, check: Callable[[], None]) -> bool:
        """Returns whether ``check`` raises in no process. All call it."""
        error = None
        try:
            check()
        except Exception as raised:
            error = raised
        self._told = self._together.exchange(said(error))
        return not any(self._told)

    def explain(self, error: Exception) -> None:
        """Raises what another process has failed with, if ``error`` says no more than that."""
        if str(error).startswith(_C.OTHERS_FAILED):
            raise_for(self._told)


def is_initialized() -> bool:
    """Whether this process is one of several, or could be."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()
