"""Optimizers whose state lives on NVMe."""

from torch_ext.optim._committing import Commit
from torch_ext.optim.adamw import OffloadedAdamW
from torch_ext.optim.generic import OffloadedOptimizer

__all__ = ["Commit", "OffloadedAdamW", "OffloadedOptimizer"]
