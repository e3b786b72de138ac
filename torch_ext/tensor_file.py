"""save() and load(): a dict of tensors as a safetensors file."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from torch_ext._checks import directory_of
from torch_ext._modes import check_no_fake_mode
from torch_ext._native import _C

_Path = str | os.PathLike[str]

# Tells a path that was left out from None.
_NO_PATH: Any = object()


def save(
    state_dict: Mapping[str, torch.Tensor],
    path: _Path,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a dict of tensors as a safetensors file, and makes it durable.

    When it returns, the file survives a power cut. Until then, ``path`` has the file that it
    had before: a save that fails or is killed changes nothing. ``torch_ext.load`` and the
    safetensors library read the file.

    Tensors may be on the CPU or an accelerator, views, and not contiguous. They have any dtype
    that safetensors knows. They may not change during the call, which Ctrl-C ends. Links are
    followed. The file gets the permissions of the one that it replaces, or those that the umask
    leaves.

    Args:
        state_dict: Tensors by name, such as ``model.state_dict()``. No two may share memory.
        path: The file.
        metadata: Text by key, which ``load_metadata`` returns. Hugging Face's libraries want
            ``{"format": "pt"}``.

    Raises:
        TypeError: Something is no tensor, or a tensor that has no plain memory or whose dtype
            safetensors lacks: a DTensor, a sparse, quantized or meta tensor, complex128.
        ValueError: Tensors share memory, or a name cannot be written.
        OSError: The system refused. The old file is as it was.

    Example:
        >>> torch_ext.save(model.state_dict(), "model.safetensors")
        >>> model.load_state_dict(torch_ext.load("model.safetensors"))
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict must be a dict of tensors by name, such as model.state_dict(), not "
            f"{type(state_dict).__name__}"
        )
    file = os.path.realpath(directory_of(path, "path"))
    tensors = [(_name_of(name), _tensor_of(name, each)) for name, each in state_dict.items()]
    texts = _texts_of({} if metadata is None else metadata)
    check_no_fake_mode()
    _C.save_tensors(file, tensors, texts)


def load(
    path: _Path = _NO_PATH,
    map_location: str | torch.device | None = None,
    mmap: bool = False,
    **former: Any,
) -> dict[str, torch.Tensor]:
    """Reads a safetensors file, by ``torch_ext.save`` or any other writer.

    Bytes go from the drive into new memory by direct I/O, past the page cache. No file can run
    code, or take more memory than it has bytes. Links are followed.

    Args:
        path: The file.
        map_location: The device of the tensors. None: the CPU, since the file has no devices.
        mmap: Whether the tensors are a private mapping of the file. It is read when they are
            used, through the page cache. Changes to them stay in this process. If the file is
            cut meanwhile, the process gets SIGBUS; ``save`` never cuts one. With another device
            than the CPU, the tensors are copied there from the mapping.

    Returns:
        Tensors by name, in the file's order.

    Raises:
        ValueError: The file is no whole safetensors file, or torch lacks a dtype of it. The
            text says what is wrong.
        TypeError: ``map_location`` is something else. Functions and dicts have no meaning here.
        OSError: The file cannot be read, or memory is too small for it (ENOMEM).
    """
    if path is _NO_PATH:
        return _former_load(former)
    if former:
        raise TypeError(
            f"load() got an unexpected keyword argument {next(iter(former))!r}: it takes path, "
            f"map_location and mmap. What compiles the extension is torch_ext.build()."
        )
    device = _device_of(map_location)
    file = os.path.realpath(directory_of(path, "path"))
    check_no_fake_mode()
    if mmap and device.type not in ("cpu", "meta"):
        mapped = _C.load_tensors(file, torch.device("cpu"), True)
        return {name: each.to(device) for name, each in mapped.items()}
    return _C.load_tensors(file, device, bool(mmap) and device.type == "cpu")


def load_metadata(path: _Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file.

    Raises:
        OSError, ValueError: As ``load``.
    """
    return _C.load_metadata(os.path.realpath(directory_of(path, "path")))


def _former_load(arguments: dict[str, Any]) -> Any:
    """What ``load()`` without a path was, for one release."""
    from torch_ext import jit

    warnings.warn(
        "torch_ext.load() without a path compiles the extension; call torch_ext.build() for "
        "that, since load(path) reads a file",
        DeprecationWarning,
        stacklevel=3,
    )
    return jit.build(**arguments)


def _name_of(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(
            f"the names of tensors must be str, not {type(name).__name__}: {name!r}"
        )
    return _utf8(name, "the name")


def _utf8(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} {text!r} cannot be written in UTF-8") from None
    return text


def _tensor_of(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        if isinstance(value, (Mapping, list, tuple)):
            remedy = 'give each tensor in it a name of its own, such as "optimizer.0.exp_avg"'
        else:
            remedy = "make it a tensor, or text in metadata="
        raise TypeError(
            f"state_dict[{name!r}] is a {type(value).__name__}, and a safetensors file has "
            f"nothing but tensors by name: {remedy}. torch.save takes everything."
        )
    if torch.nn.parameter.is_lazy(value):
        raise TypeError(
            f"state_dict[{name!r}] is a parameter or buffer that has no shape yet: run the "
            f"model once before it is saved"
        )
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(value, distributed.DTensor):
        raise TypeError(
            f"state_dict[{name!r}] is a DTensor, of which this process has a part: save "
            f".full_tensor() (called on all ranks), or use torch.distributed.checkpoint"
        )
    return value


def _texts_of(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a dict of str, not {type(metadata).__name__}")
    for key, value in metadata.items():
        for text in (key, value):
            if not isinstance(text, str):
                raise TypeError(
                    f"metadata[{key!r}]: keys and values must be str, not "
                    f"{type(text).__name__}; json.dumps() makes text of numbers and lists"
                )
            _utf8(text, "metadata: the text")
    return list(metadata.items())


def _device_of(map_location: Any) -> torch.device:
    if map_location is None:
        return torch.device("cpu")
    if not isinstance(map_location, (str, torch.device)):
        raise TypeError(
            f"map_location must be a device, its name or None, not "
            f"{type(map_location).__name__}: a safetensors file has no devices that a function "
            f"or dict could map"
        )
    device = torch.device(map_location)
    if device.type in ("cpu", "meta"):
        return torch.device(device.type)
    # This also initialises the device, and says what is wrong with it.
    return torch.empty(0, dtype=torch.uint8, device=device).device
