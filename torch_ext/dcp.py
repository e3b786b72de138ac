"""torch.distributed.checkpoint on commits.

``CommitReader`` is a ``StorageReader``: any program that loads a checkpoint with ``dcp.load``
can load a commit, in any division, as if ``dcp.save`` had written it. Elements go from the
store to the program's tensors; nothing is exported before.
"""

from __future__ import annotations

import dataclasses
import io
import os
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    FileSystemWriter,
    Metadata,
    StorageReader,
)
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    WriteItem,
)
from torch.futures import Future

from torch_ext._checks import Directories
from torch_ext._committed import LOST, Committed

__all__ = ["CommitReader"]


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """What a plan says of the commit. One process has chosen it for all."""

    division: tuple[int, int]  #: Epoch and world.
    generation: int
    is_alone: bool = False


class CommitReader(StorageReader):
    """Reads a commit with ``torch.distributed.checkpoint``.

    The commit looks like what ``dcp.save`` makes of ``{"model": model.state_dict(), "optim":
    get_optimizer_state_dict(model, optimizer), "extra": extra}``, where ``optimizer`` is a
    ``torch.optim.AdamW``. So it has entries such as ``model.0.weight``,
    ``optim.state.0.weight.exp_avg``, ``optim.state.0.weight.step`` and
    ``optim.param_groups.0.lr``. Parameters of 16 bits have ``master_param`` too, and an
    ``OffloadedOptimizer`` has what its class keeps. ``extra`` is that of rank 0.

    Each process may ask for any part of a tensor, in any dtype and on any device. All processes
    have to see all shards of the commit. They read one generation, the newest that one of them
    has seen when its reader was made.

    No lock is taken, so a training may go on and commit meanwhile. If it overwrites what is
    read, a process that loads alone begins again at the newest commit, once. Several cannot,
    and get the error.

    Args:
        path: The directory of the commit, or directories as ``nvme_path`` takes them.
        step: The caller's number of a commit that is kept. None: the newest one.
        model: The name of the model in the state dict that is loaded. ``""``: the model is the
            state dict, as in ``dcp.load(model.state_dict(), ...)``.
        optimizer: The name of the optimizer there.
        flatten_optimizer_state_dict: Whether options are called ``optim.param_groups.NAME.lr``,
            by parameter, as the option of that name in ``StateDictOptions`` has it.

    Raises:
        FileNotFoundError: Nothing was committed there.
        ValueError: There is no commit of ``step``; the text says which there are.
        OSError: Shards are missing (ENXIO; the text says which), or damaged (EIO). While
            ``dcp.load`` runs it raises its own error, which has this one's text.

    Example:
        >>> state = {"model": model.state_dict()}
        >>> dcp.load(state, storage_reader=torch_ext.dcp.CommitReader("/mnt/nvme/run1"))
    """

    def __init__(
        self,
        path: Directories,
        step: int | None = None,
        *,
        model: str = "model",
        optimizer: str = "optim",
        flatten_optimizer_state_dict: bool = False,
    ) -> None:
        for name, value in (("model", model), ("optimizer", optimizer)):
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a str, not {type(value).__name__}")
        if len({"extra", model, optimizer}) < 3:
            raise ValueError(
                f"model={model!r} and optimizer={optimizer!r} must differ from each other, and "
                f'from "extra"'
            )
        self._how = {"model": model, "optimizer": optimizer}
        self._flat_groups = bool(flatten_optimizer_state_dict)
        self._path, self._step = path, step
        self._error: Exception | None = None
        self._look()

    @property
    def step(self) -> int:
        """The caller's number of the commit that is read."""
        return self._committed.step

    @property
    def generation(self) -> int:
        """The store's number of the commit that is read."""
        return self._committed.generation

    def _look(self, generation: int | None = None) -> None:
        step = self._step if generation is None else None
        self._committed = Committed.find(self._path, step, generation=generation, **self._how)
        self._entries, self._paths = self._flat()

    def _flat(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the entries that DCP makes of the state dict, and their paths in it."""
        called = self._how["optimizer"]
        state_dict = dict(self._committed.state_dict)
        if self._flat_groups:
            state_dict[called] = _flattened(state_dict[called])
        try:
            entries, paths = flatten_state_dict(state_dict)
        except ValueError:
            # The keys of extra may be such that two get one name, as 1 and "1" do.
            extra = state_dict.pop("extra")
            entries, paths = flatten_state_dict(state_dict)
            entries["extra"], paths["extra"] = extra, ("extra",)
        return (
            {name.removeprefix("."): value for name, value in entries.items()},
            {
                name.removeprefix("."): path[1:] if path[0] == "" else path
                for name, path in paths.items()
            },
        )

    # What DCP calls ------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins a load. ``checkpoint_id`` is the directory of another commit."""
        self._error = None
        if checkpoint_id is None:
            return
        self._path = checkpoint_id
        try:
            self._look()
        except (OSError, ValueError) as error:
            # DCP waits for all processes later. Then they hear of it.
            self._error = error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns what the commit has."""
        return Metadata(
            {name: self._described(value) for name, value in self._entries.items()},
            planner_data=dict(self._paths),
            storage_meta=StorageMeta(),
        )

    def _described(self, value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if not isinstance(value, Tensor):
            return BytesStorageMetadata()
        stored = self._committed.stored(value)
        boxes = stored.boxes if stored else [((0,) * value.dim(), tuple(value.shape))]
        return TensorStorageMetadata(
            TensorProperties(dtype=value.dtype),
            value.shape,
            [ChunkStorageMetadata(*map(torch.Size, box)) for box in boxes],
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Raises what went wrong when the load began, where DCP tells all processes."""
        if self._error is not None:
            raise self._error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Says which commit this process has found."""
        division = self._committed.division
        chosen = _Chosen((division.epoch, division.world), self.generation)
        return dataclasses.replace(plan, storage_data=chosen)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Chooses the commit that all processes read."""
        found = [plan.storage_data for plan in plans]
        if len({each.division for each in found}) > 1:
            raise ValueError(
                "the processes see commits of different divisions: another run has taken the "
                "place of the one that committed. Load again"
            )
        newest = max(each.generation for each in found)
        chosen = dataclasses.replace(found[0], generation=newest, is_alone=len(plans) == 1)
        return [dataclasses.replace(plan, storage_data=chosen) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads what the plan says, before it returns."""
        chosen = plan.storage_data
        if chosen.generation != self.generation:
            self._look_again(chosen.generation)
        try:
            self._read(plan, planner)
        except OSError as error:
            if error.errno not in LOST or not self._committed.moved_on():
                raise
            if not chosen.is_alone or self._step is not None:
                raise self._committed.stale() from error
            self._look_again()
            try:
                self._read(plan, planner)
            except OSError as again:
                if again.errno in LOST and self._committed.moved_on():
                    raise self._committed.stale() from again
                raise
        finally:
            self._committed.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _look_again(self, generation: int | None = None) -> None:
        """Takes another commit, to which the plan must fit too."""
        before, stale = self.read_metadata(), self._committed.stale()
        try:
            self._look(generation)
        except (OSError, ValueError) as error:
            raise stale from error
        if self.read_metadata() != before:
            raise stale

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        by_store: dict[Any, list[tuple[ReadItem, Any, Any]]] = defaultdict(list)
        for item in plan.items:
            value = self._entries[item.storage_index.fqn]
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, self._bytes_of(value))
                continue
            stored = self._committed.stored(value)
            box = self._box_of(item.storage_index, value, stored)
            rank = (
                next((s.rank for s in stored.shards if s.begin == box[0]), 0) if stored else -1
            )
            by_store[rank].append((item, value, box))
        # One store after the other, so that only one has tiles in memory.
        for rank in sorted(by_store):
            for item, value, box in by_store[rank]:
                self._read_tensor(planner, item, value, box)
            self._committed.close()

    def _box_of(self, index: MetadataIndex, value: Tensor, stored: Any) -> Any:
        boxes = stored.boxes if stored else [((0,) * value.dim(), tuple(value.shape))]
        if index.offset is None:
            return boxes[index.index or 0]
        return next(box for box in boxes if box[0] == tuple(index.offset))

    def _read_tensor(
        self, planner: LoadPlanner, item: ReadItem, value: Tensor, box: Any
    ) -> None:
        out = planner.resolve_tensor(item)
        target = out.detach()
        if target.shape != item.lengths:
            raise ValueError(
                f"the planner gives {list(target.shape)} for {list(item.lengths)} elements of "
                f"{item.storage_index.fqn}"
            )
        stored = self._committed.stored(value)
        offsets = tuple(item.storage_offsets)
        if stored is None:
            for dim, (begin, size) in enumerate(zip(offsets, item.lengths, strict=True)):
                value = value.narrow(dim, begin, size)
            target.copy_(value)
        else:
            begin = tuple(a + b for a, b in zip(box[0], offsets, strict=True))
            self._committed.read(stored, begin, target, box)
        planner.commit_tensor(item, out)

    def _bytes_of(self, value: Any) -> io.BytesIO:
        """Returns what ``torch.load()`` makes a value of: DCP has no other form for it."""
        stream = io.BytesIO()
        torch.save(self._committed.whole(value), stream)
        stream.seek(0)
        return stream

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns whether this may be the directory of a commit."""
        return os.path.isdir(checkpoint_id)


def _flattened(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's state dict as ``StateDictOptions`` has it flattened."""
    flat = {
        f"state.{name}.{key}": value
        for name, values in optimizer["state"].items()
        for key, value in values.items()
    }
    for group in optimizer["param_groups"]:
        for name in group["params"]:
            options = {key: value for key, value in group.items() if key != "params"}
            flat |= {f"param_groups.{name}.{key}": value for key, value in options.items()}
    return flat


class _Planner(DefaultSavePlanner):
    """Plans with stand-ins, and reads each tensor when it is its turn to be written."""

    def __init__(self, committed: Committed) -> None:
        super().__init__()
        self._committed = committed

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return super().transform_object(write_item, self._committed.whole(object))


def write_checkpoint(committed: Committed, directory: str) -> None:
    """Writes a commit as DCP does, in this process alone.

    Raises:
        Exception: What DCP would wrap in its own error.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")
        try:
            dcp.save(
                committed.state_dict,
                # Copies ahead are for tensors on a device, and these are not.
                storage_writer=FileSystemWriter(directory, per_thread_copy_ahead=0),
                planner=_Planner(committed),
                no_dist=True,
            )
        except CheckpointException as error:
            failure, _ = next(iter(error.failures.values()))
            raise failure from error
