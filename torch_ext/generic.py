"""The former module of ``OffloadedOptimizer``, for one release."""

from torch_ext.optim.generic import OffloadedOptimizer

__all__ = ["OffloadedOptimizer"]
