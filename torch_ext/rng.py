"""The states of the random number generators, for a commit's ``extra``."""

from __future__ import annotations

import logging
import random
import sys
from typing import Any

import torch

_logger = logging.getLogger("torch_ext")


def rng_state() -> dict[str, Any]:
    """Returns the states of Python's, NumPy's and torch's generators, on all devices.

    NumPy's is that of ``numpy.random``, if NumPy was imported. A commit can keep what is
    returned (``extra``).
    """
    state: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    numpy = sys.modules.get("numpy")
    # With another bit generator, which has no legacy state, numpy.random is the caller's.
    if numpy is not None and isinstance(numpy.random.get_state(), tuple):
        name, keys, *rest = numpy.random.get_state(legacy=True)
        state["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *rest)
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Sets the generators to what ``rng_state()`` returned.

    A state of more or fewer CUDA devices sets those that there are, and a warning is logged.

    Raises:
        KeyError, TypeError, ValueError: ``state`` is something else.
    """
    cuda = state["cuda"]
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(cuda) != devices:
        _logger.warning(
            "the random numbers were those of %d CUDA devices, and there are %d here: %s",
            len(cuda),
            devices,
            "the others go on as they are" if len(cuda) < devices else "the rest is left out",
        )
        cuda = cuda[:devices]
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"].cpu())
    for device, each in enumerate(cuda):
        torch.cuda.set_rng_state(each.cpu(), device)
    if "numpy" in state:
        import numpy

        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
