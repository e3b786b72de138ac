"""What a model calls its tensors, and what a checkpoint may call them."""

from __future__ import annotations

from collections.abc import Container
from typing import TypeAlias

import torch

#: Name, tensor, other names in a checkpoint, and whether it is a parameter.
Named: TypeAlias = "tuple[str, torch.Tensor, list[str], bool]"


def tie_weights(model: torch.nn.Module) -> None:
    """Ties what a model of transformers ties: on the meta device it was made without.

    Its files have such a weight once.
    """
    tie = getattr(model, "tie_weights", None)
    if callable(tie) and any(parameter.is_meta for parameter in model.parameters()):
        tie()


def tensors_of(model: torch.nn.Module, left_out: Container[str]) -> list[Named]:
    """The parameters, and the buffers that are on the meta device.

    Raises:
        ValueError: A buffer there is of the kind that no checkpoint has.
    """
    names: dict[torch.Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    named: list[Named] = [
        (own[0], parameter, _with_other_prefix(model, own), True)
        for parameter, own in names.items()
        if own[0] not in left_out
    ]
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_meta}
    lost = [name for name in buffers if not _is_saved(model, name)]
    if lost:
        shown = ", ".join(repr(name) for name in lost[:10])
        raise ValueError(
            f"no checkpoint has these buffers of the meta device, as they are not persistent: "
            f"{shown}; make the model with accelerate's init_empty_weights(), which leaves "
            f"buffers on the CPU, or compute them before"
        )
    named += [
        (name, buffer, _with_other_prefix(model, [name]), False)
        for name, buffer in buffers.items()
    ]
    return named


def _is_saved(model: torch.nn.Module, name: str) -> bool:
    owner, _, own_name = name.rpartition(".")
    return own_name not in model.get_submodule(owner)._non_persistent_buffers_set


def _with_other_prefix(model: torch.nn.Module, names: list[str]) -> list[str]:
    """Models of transformers have files with and without the name of their base model."""
    prefix = getattr(model, "base_model_prefix", "")
    if not isinstance(prefix, str) or not prefix:
        return names
    others = [
        name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}"
        for name in names
    ]
    return names + others
