"""The one importer of the compiled module, `_C`."""

from __future__ import annotations

import logging

import torch  # noqa: F401  Loads the libraries that _C needs.

try:
    from torch_ext import _C
except ImportError as error:
    from torch_ext import jit

    logging.getLogger("torch_ext").warning(
        "the compiled module cannot be used (%s); building it now, once", error
    )
    _C = jit.build()

__all__ = ["_C"]
