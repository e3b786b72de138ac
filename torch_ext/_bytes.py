"""The bytes of tensors."""

from __future__ import annotations

import torch


def bytes_view(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a contiguous tensor, in the same memory.

    ``view()`` would keep the stride of a single element, whatever it is, and could not go on
    from there.
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
