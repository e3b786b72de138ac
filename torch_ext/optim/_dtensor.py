"""The part of a DTensor that this process has.

Optimizers work on local shards. What they show is a DTensor again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, as FSDP2 and tensor parallelism make them."""
    # Where no DTensor has been made, the module is not worth its import, and may not exist.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Any) -> Any:
    """Returns the local shard of a DTensor, and any other tensor itself."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or not is_distributed(tensor):
        return tensor
    with torch.no_grad():
        local = tensor.to_local()
    # A collective's result may still be on its way.
    return local.wait() if hasattr(local, "wait") else local


def first_element(parameter: Tensor) -> int:
    """Returns where the local shard begins in the whole: the index, in C order, of its first
    element. Shards that are no run of the whole get numbers that are far apart.
    """
    if not is_distributed(parameter):
        return 0
    coordinate = parameter.device_mesh.get_coordinate()
    if coordinate is None:
        return 0
    offset, sizes, is_run = [0] * parameter.ndim, list(parameter.shape), True
    for mesh_dim, placement in enumerate(parameter.placements):
        dim = getattr(placement, "dim", None)
        if dim is None:  # Replicated.
            continue
        step = -(-sizes[dim] // parameter.device_mesh.size(mesh_dim))
        begin = min(coordinate[mesh_dim] * step, sizes[dim])
        offset[dim] += begin
        sizes[dim] = min(step, sizes[dim] - begin)
        is_run = is_run and dim == 0
    index = 0
    for place, size in zip(offset, parameter.shape, strict=True):
        index = index * size + place
    return index if is_run else (index << 32) % 2**64


def check_parameter(parameter: Tensor) -> None:
    """Raises ValueError for a DTensor whose local shard is not what its elements are."""
    if is_distributed(parameter) and any(p.is_partial() for p in parameter.placements):
        raise ValueError(
            f"a parameter is a DTensor with placements {parameter.placements}, each of whose "
            f"elements is a sum over processes; redistribute() it first"
        )


def local_gradient(parameter: Tensor, label: Callable[[], str]) -> Tensor:
    """Returns the part of a parameter's gradient that belongs to ``local_of(parameter)``.

    Raises:
        RuntimeError: The gradient is distributed differently. The text has what ``label``
            returns.
    """
    gradient = parameter.grad
    if gradient is None or _alike(gradient, parameter):
        return local_of(gradient)
    if not is_distributed(parameter):
        advice = "give the plain tensor, as gradient.full_tensor() does"
    elif not is_distributed(gradient):
        advice = "make it a DTensor like its parameter"
    else:
        advice = (
            "bring it there before the step: p.grad = p.grad.redistribute(p.device_mesh, "
            "p.placements)"
        )
    raise RuntimeError(
        f"the gradient of {label()} is {_describe(gradient)}, the parameter is "
        f"{_describe(parameter)}; {advice}"
    )


def local_state(what: str, saved: Tensor, parameter: Tensor) -> Tensor:
    """Returns the part of a loaded tensor that belongs to ``local_of(parameter)``.

    A plain tensor is the local shard.

    Raises:
        ValueError: It is distributed differently. The text begins with ``what``.
    """
    if not is_distributed(saved):
        return saved
    if not _alike(saved, parameter):
        raise ValueError(
            f"{what} is {_describe(saved)}, its parameter is {_describe(parameter)}; "
            f"torch.distributed.checkpoint's set_optimizer_state_dict() distributes states"
        )
    if saved.shape != parameter.shape:
        raise ValueError(
            f"{what} has sizes {list(saved.shape)}, its parameter {list(parameter.shape)}"
        )
    return local_of(saved)


def like_parameter(local: Tensor, parameter: Tensor) -> Tensor:
    """Returns a tensor of the local shard's shape as a DTensor, if the parameter is one."""
    if not is_distributed(parameter):
        return local
    # DTensor.from_local() would move it to the mesh's device, and so all state to the GPU.
    spec = parameter._spec
    meta = spec.tensor_meta._replace(dtype=local.dtype)
    return type(parameter)(local, spec.shallow_copy_with_tensor_meta(meta), requires_grad=False)


def any_nonzero(tensors: Iterable[Tensor]) -> bool:
    """Whether an element is not zero. All processes that have shards get the same answer."""
    found: dict[Any, bool] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if is_distributed(tensor) else None
        found[mesh] = found.get(mesh, False) or bool(local_of(tensor).any())
    here = found.pop(None, False)
    # No short cut: each process has to ask about each mesh, whatever it has found.
    answers = [_anywhere(mesh, flag) for mesh, flag in found.items()]
    return here or any(answers)


def _anywhere(mesh: Any, here: bool) -> bool:
    from torch.distributed.tensor import DTensor, Partial

    flag = torch.tensor(float(here), dtype=torch.float32, device=mesh.device_type)
    summed = DTensor.from_local(flag, mesh, [Partial()] * mesh.ndim, run_check=False)
    return bool(summed.full_tensor())


def _alike(tensor: Tensor, parameter: Tensor) -> bool:
    if not is_distributed(parameter) or not is_distributed(tensor):
        return is_distributed(parameter) == is_distributed(tensor)
    return (
        tensor.device_mesh == parameter.device_mesh
        and tensor.placements == parameter.placements
    )


def _describe(tensor: Tensor) -> str:
    if not is_distributed(tensor):
        return "no DTensor"
    return f"a DTensor with placements {tensor.placements} on {tensor.device_mesh}"
