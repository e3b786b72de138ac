"""Whole models on NVMe: parameters that come when an operator needs them."""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from torch_ext._checks import Directories, directories_of, engine_of
from torch_ext._closable import Closable
from torch_ext._model_checkpoint import tensors_of, tie_weights
from torch_ext._model_hold import Blocks, HeldBlocks, blocks_of, check_room
from torch_ext._native import _C
from torch_ext.config import AioConfig, parse_size, resolve_aio_config


@dataclass(frozen=True)
class ModelPlan:
    """Where the parameters of a model are. ``print(plan)`` says it in words.

    Sizes are in bytes.
    """

    #: Parameters on the drive, by name of the first that has the storage.
    offloaded: dict[str, int]
    #: Those that stay in host memory too, once they have been read.
    resident: frozenset[str]
    #: Parameters that stay in memory, and why.
    staying: dict[str, str]
    #: Bytes of parameters that stay in memory.
    staying_bytes: int
    #: Bytes of host memory for the offloaded ones.
    host_memory: int

    def __str__(self) -> str:
        total = sum(self.offloaded.values())
        kept = sum(self.offloaded[name] for name in self.resident)
        lines = [
            f"{total:,} bytes of {len(self.offloaded)} parameters on the drive, "
            f"{self.host_memory:,} bytes of host memory for them",
            f"{kept:,} bytes stay in host memory, the others come and go",
            f"{self.staying_bytes:,} bytes of {len(self.staying)} parameters stay in memory",
        ]
        for name, why in self.staying.items():
            if "64 KiB" not in why:
                lines.append(f"  {name}: {why}")
        return "\n".join(lines)


class ModelOffload(Closable):
    """The parameters of a model on NVMe. ``torch_ext.offload()`` makes it.

    It may be dropped: the parameters stay offloaded for as long as the model lives.
    """

    _instead = "; save the model's state_dict()"

    def __init__(self, offload: _C.ModelOffload) -> None:
        self._offload = offload
        #: Makes copies for state_dict().
        self._hook: RemovableHandle | None = None
        #: Bytes of parameters in memory of other processes or files.
        self._shared: dict[str, int] = {}
        #: Blocks of gathered() that run now.
        self._gathered: weakref.WeakSet[_Gathered] = weakref.WeakSet()
        #: Blocks of the model whose parameters are kept while they run.
        self._held = HeldBlocks((), self._gather)
        self._own(offload, "model offload", _Left())

    def plan(self) -> ModelPlan:
        """Returns which parameters are on the drive, and which stay in memory and why.

        Raises:
            RuntimeError: It is closed or belongs to another process.
        """
        self._life.check()
        offloaded, resident, staying, staying_bytes = {}, set(), {}, 0
        for name, size, stays, is_resident in self._offload.plan():
            if stays:
                staying[name] = stays
                staying_bytes += size
                continue
            offloaded[name] = size
            if is_resident:
                resident.add(name)
        for name, size in self._shared.items():
            staying[name] = "its memory is shared with other processes, or is that of a file"
            staying_bytes += size
        host_memory = self._offload.stats()["host_bytes"]
        return ModelPlan(offloaded, frozenset(resident), staying, staying_bytes, host_memory)

    def stats(self) -> dict[str, float]:
        """Returns counters since the model was offloaded.

        ``touches`` counts parameters that operators needed, those of one after the other once.
        ``foreseen`` of them were expected next. ``hits`` found the parameter in host memory,
        ``late`` found it being read, and ``misses`` began to read it.
        ``wait_seconds`` is what operators waited. ``plans`` says how often an order of touches
        was learnt. In bytes: ``bytes_read``, ``bytes_written``, ``host_bytes`` (there are),
        ``host_bytes_in_use``, ``host_bytes_peak``, ``resident_bytes``.

        Raises:
            RuntimeError: It belongs to another process.
        """
        self._life.check_process()
        return self._offload.stats()

    def gathered(
        self,
        parameters: torch.nn.Module | torch.Tensor | Iterable[torch.Tensor],
        write: bool = False,
    ) -> AbstractContextManager[None]:
        """Gives parameters an address while a ``with`` block runs.

        Operators need no such block. It is for what reads memory itself: NumPy, ``data_ptr()``,
        ``torch.save`` of a parameter, kernels called by pointer.

        Args:
            parameters: A module, a tensor, or several. What is not offloaded is left out.
            write: Whether the block changes them through their addresses. Operators may change
                them in any case.

        Raises:
            MemoryError: They do not fit into host memory together.
            OSError: One of them cannot be read.
            RuntimeError: It is closed or belongs to another process. Or what this returned is
                used for a block within its own block.
        """
        self._life.check()
        if isinstance(parameters, torch.nn.Module):
            tensors = list(parameters.parameters())
        elif isinstance(parameters, torch.Tensor):
            tensors = [parameters]
        else:
            tensors = list(parameters)
        return self._gathered_of(tensors, bool(write), _C.ModelPass.NONE)

    def _hold(self, blocks: Sequence[torch.nn.Module]) -> None:
        self._held = HeldBlocks(blocks, self._gather)

    def _gather(self, module: torch.nn.Module, in_pass: _C.ModelPass) -> _Gathered:
        return self._gathered_of(list(module.parameters()), False, in_pass)

    def _gathered_of(
        self, tensors: list[torch.Tensor], write: bool, in_pass: _C.ModelPass
    ) -> _Gathered:
        gathered = self._offload.gathered(tensors, write, in_pass)
        return _Gathered(gathered, self._gathered)

    @property
    def engine(self) -> str:
        """The name of the I/O engine in use."""
        self._life.check_process()
        return self._offload.engine

    def close(self) -> None:
        """Brings all parameters back into memory. It may be called again.

        Raises:
            ValueError: Memory has no room for them.
            OSError: One of them cannot be read. What has not come back is still offloaded.
            RuntimeError: It belongs to another process, or a block of gathered() runs.
        """
        self._life.check_process()
        if self._life.closed:
            return
        self._held.drop_failed()
        if self._gathered:
            raise RuntimeError(
                "parameters are gathered, so they cannot be given other memory: call close() "
                "after the block of `with offload.gathered(...):`"
            )
        self._offload.close()
        self._held.remove()
        if self._hook is not None:
            self._hook.remove()
        self._life.closed = True
        self._log_notes()


class _Gathered(AbstractContextManager[None]):
    """A block of gathered(), which is in ``running`` while it runs."""

    def __init__(
        self, gathered: _C.GatheredTensors, running: weakref.WeakSet[_Gathered]
    ) -> None:
        self._gathered = gathered
        self._running = running

    def __enter__(self) -> None:
        if self in self._running:
            raise RuntimeError("this gathered() has a block that runs: call gathered() again")
        # Before the parameters come: close() must not come between.
        self._running.add(self)
        try:
            self._gathered.__enter__()
        except BaseException:
            self._running.discard(self)
            raise

    def __exit__(self, *error: object) -> None:
        self._gathered.__exit__(*error)
        self._running.discard(self)


class _Left:
    """Stands for what needs no close(): the parameters live on in NVMe."""

    def close(self) -> None:
        pass


def offload(
    model: torch.nn.Module,
    nvme_path: Directories,
    *,
    host_memory: int | str,
    hold: Blocks | Iterable[Blocks] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    aio: AioConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    engine: str = "auto",
    verify: bool = True,
) -> ModelOffload:
    """Puts the parameters of a model on NVMe, in place.

    The model is used as before: any operator that touches a parameter brings it into host
    memory, and what is changed is written back. The parameters stay the same objects. Results,
    gradients and updates have the same bits. From the second forward pass on, the order is
    known, and parameters are read ahead.

    Between operators an offloaded parameter has no address. ``numpy()``, ``data_ptr()`` and
    whatever else takes one raises RuntimeError with the parameter's name, except inside
    ``gathered()``. ``model.state_dict()`` has copies in a file, which can be saved and loaded.
    Changing one raises RuntimeError, since the model would not change. With ``keep_vars=True``
    it has the parameters themselves. Parameters below 64 KiB stay in memory, and so do those
    whose memory something else shares.

    Args:
        model: Its parameters are dense and on the CPU, or on the meta device.
        nvme_path: Where the scratch file is made: as ``directory`` of TensorSwapper.
        host_memory: Bytes of host memory for all offloaded parameters together, such as
            "8GiB". At least twice the largest parameter.
        hold: Blocks whose parameters are kept during their forward and backward, for kernels
            that are no operators of torch: torch.compile, Triton. A class of modules, the name
            of a class or of a module, or several. ``host_memory`` must have room for all
            parameters of a block.
        checkpoint: Where parameters and buffers on the meta device have their values: a
            safetensors file, an index of several, or a directory with either. Parameters are
            read there whenever they come, and nothing is written until one is changed. Nobody
            may write to the files meanwhile.
        aio: What ``get_aio_config`` takes or returns. None: the defaults.
        engine: "auto", or one that ``python -m torch_ext info`` lists.
        verify: Whether blocks carry checksums, which are compared on reading.

    Raises:
        ValueError: ``host_memory`` is too small; the text says what would do. Or the
            checkpoint lacks a tensor, or has another dtype or shape; the text has the names.
        OSError: The directory cannot be used, or the drive has no room.
        TypeError: The model or a parameter is of a kind that cannot be offloaded.
        RuntimeError: A parameter is offloaded already, by this or by another library.
        The model is unchanged after an error.

    Example:
        >>> offload = torch_ext.offload(model, nvme_path="/mnt/nvme", host_memory="8GiB")
        >>> output = model(input)
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    _check_hooks(model)
    if checkpoint is not None:
        tie_weights(model)
    blocks = blocks_of(model, hold)
    memory = parse_size(host_memory)
    check_room(model, blocks, memory)
    parameters = list(model.named_parameters())
    shared = _shared_names(parameters)
    if checkpoint is not None and not os.fspath(checkpoint):
        raise ValueError("checkpoint must name a file or directory, not ''")
    made = _C.ModelOffload(
        tensors_of(model, shared),
        directories_of(nvme_path, "nvme_path"),
        resolve_aio_config(aio, stacklevel=3),
        memory,
        engine_of(engine),
        bool(verify),
        "" if checkpoint is None else os.fspath(checkpoint),
    )
    _adapt_torch()
    result = ModelOffload(made)
    result._hold(blocks)
    for name, parameter in parameters:
        if name in shared:
            result._shared[name] = parameter.nbytes
    result._hook = model.register_state_dict_post_hook(_Snapshots(made))
    return result


def _shared_names(parameters: list[tuple[str, torch.Tensor]]) -> set[str]:
    """Names of those in memory that other processes or a file have too.

    A storage could tell, but its object in Python stays, and counts as one more user.
    """
    shared = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, mode = line.split(maxsplit=2)[:2]
            if mode.endswith("s"):
                begin, end = span.split("-")
                shared.append(range(int(begin, 16), int(end, 16)))
    addresses = {name: _address_of(parameter) for name, parameter in parameters}
    return {
        name for name, address in addresses.items() if any(address in each for each in shared)
    }


def _address_of(parameter: torch.Tensor) -> int:
    """0 for what has no address. offload() refuses it, or leaves it where it is."""
    try:
        return parameter.data_ptr() if parameter.is_cpu else 0
    except (RuntimeError, ValueError):
        return 0


class _Snapshots:
    """A hook of state_dict() that puts copies in place of what has no address."""

    def __init__(self, offload: _C.ModelOffload) -> None:
        self._offload = offload

    def __call__(
        self,
        module: torch.nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
    ) -> None:
        names = [name for name, value in state.items() if _needs_copy(value)]
        if not names:
            return
        copies = self._offload.snapshot([state[name] for name in names])
        for name, copied in zip(names, copies, strict=True):
            state[name] = _with_lazy_bits(copied, state[name])

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy of the model is not offloaded, and may be loaded without this library. It gets
        # a hook that takes anything and does nothing.
        idle = contextlib.nullcontext().__exit__
        state = (idle, (), {}, {"_from_public_api": True})
        return functools.partial, (idle,), state


def _needs_copy(value: Any) -> bool:
    """With keep_vars=True a state dict has the parameters themselves, as was asked."""
    return (
        isinstance(value, torch.Tensor)
        and not isinstance(value, torch.nn.Parameter)
        and _C.is_touched(value)
    )


def _with_lazy_bits(copied: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """A view whose elements are conjugated or negated when they are read, as the original's."""
    with torch.inference_mode():
        if original.is_conj():
            copied = copied.conj()
        return torch._neg_view(copied) if original.is_neg() else copied


def _adapt_torch() -> None:
    """Adapts some functions of torch, for offloaded tensors only.

    ``repr()`` reads elements by address: it gets a copy. ``new_tensor()`` and ``new()`` look at
    dispatch keys, and do not know the one of offloaded tensors: they get an empty tensor of the
    same kind. So does ``is_shared()``: it takes an address, and ends the process at an error.
    """
    _adapt(torch._tensor_str, "_str", _copy_of)
    _adapt(torch.Tensor, "new_tensor", _empty_like)
    _adapt(torch.Tensor, "new", _empty_like)
    _adapt(torch.Tensor, "is_shared", _empty_like)
    _adapt_is_shared_of_storages()


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.clone().requires_grad_(tensor.requires_grad)


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(0)


def _adapt(owner: Any, name: str, other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "knows_offloaded"):
        return

    @functools.wraps(original)
    def adapted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, torch.Tensor) and _C.is_touched(self):
            self = other(self)
        return original(self, *args, **kwargs)

    adapted.knows_offloaded = True  # type: ignore[attr-defined]
    setattr(owner, name, adapted)


def _adapt_is_shared_of_storages() -> None:
    original = torch.UntypedStorage.is_shared
    if hasattr(original, "knows_offloaded"):
        return

    @functools.wraps(original)
    def is_shared(self: torch.UntypedStorage) -> bool:
        # The storage of an offloaded tensor is one of these.
        if self.device.type == "cpu" and not self.resizable():
            self.data_ptr()  # Raises an error with the parameter's name.
        return original(self)

    is_shared.knows_offloaded = True  # type: ignore[attr-defined]
    torch.UntypedStorage.is_shared = is_shared  # type: ignore[method-assign]


def _check_hooks(model: torch.nn.Module) -> None:
    """Raises RuntimeError if another library brings and takes the parameters."""
    for name, module in model.named_modules():
        of = name or "the model"
        if hasattr(module, "_hf_hook"):
            raise RuntimeError(
                f"{of} has hooks of accelerate, which move parameters themselves: call "
                f"accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
            )
        if hasattr(module, "_diffusers_hook"):
            raise RuntimeError(
                f"{of} has hooks of diffusers, which may move parameters themselves: "
                f"offload it before they are added, or without them"
            )
        if hasattr(module, "ds_id") or type(module).__name__ == "DeepSpeedEngine":
            raise RuntimeError(f"{of} belongs to DeepSpeed, which moves parameters itself")
