"""Tensors on the GPU, in host memory and on NVMe, moved while others compute.

Public names are imported when they are first used. So `import torch_ext` costs nothing, and
works where the compiled module does not.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_ext import dcp
    from torch_ext._export import export
    from torch_ext._model import ModelOffload, ModelPlan, offload
    from torch_ext.config import (
        AIO_DEFAULT_DICT,
        AioConfig,
        get_aio_config,
        get_scalar_param,
        parse_size,
    )
    from torch_ext.handle import aio_handle, gds_handle
    from torch_ext.jit import build
    from torch_ext.optim import Commit, OffloadedAdamW, OffloadedOptimizer
    from torch_ext.rng import rng_state, set_rng_state
    from torch_ext.swap import SwapTicket, TensorSwapper, TensorTicket
    from torch_ext.tensor_file import load, load_metadata, save

__version__ = "0.1.0"

#: For CMAKE_PREFIX_PATH, so that `find_package(torch_ext)` finds the C++ package.
cmake_prefix_path = str(Path(__file__).parent / "share" / "cmake")

# Where each public name is defined.
_MODULE_OF = {
    "AIO_DEFAULT_DICT": "config",
    "AioConfig": "config",
    "Commit": "optim",
    "ModelOffload": "_model",
    "ModelPlan": "_model",
    "OffloadedAdamW": "optim",
    "OffloadedOptimizer": "optim",
    "SwapTicket": "swap",
    "TensorSwapper": "swap",
    "TensorTicket": "swap",
    "aio_handle": "handle",
    "build": "jit",
    "export": "_export",
    "gds_handle": "handle",
    "get_aio_config": "config",
    "get_scalar_param": "config",
    "load": "tensor_file",
    "load_metadata": "tensor_file",
    "offload": "_model",
    "parse_size": "config",
    "rng_state": "rng",
    "save": "tensor_file",
    "set_rng_state": "rng",
}

__all__ = [
    "AIO_DEFAULT_DICT",
    "AioConfig",
    "Commit",
    "ModelOffload",
    "ModelPlan",
    "OffloadedAdamW",
    "OffloadedOptimizer",
    "SwapTicket",
    "TensorSwapper",
    "TensorTicket",
    "__version__",
    "aio_handle",
    "build",
    "cmake_prefix_path",
    "dcp",
    "export",
    "gds_handle",
    "get_aio_config",
    "get_scalar_param",
    "load",
    "load_metadata",
    "offload",
    "parse_size",
    "rng_state",
    "save",
    "set_rng_state",
]


def __getattr__(name: str) -> Any:
    if name == "dcp":
        return importlib.import_module("torch_ext.dcp")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
