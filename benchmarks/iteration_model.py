"""The model of the optimizer's benchmarks: residual layers with bfloat16 parameters."""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / "examples"))

from gpt_training import LinearIn32Bits  # noqa: E402


class Model(nn.Module):
    """A model that returns its loss. Products are float32: see LinearIn32Bits."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LinearIn32Bits(hidden, hidden) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return x.float().square().mean()


def layers_for(parameters: int, hidden: int) -> int:
    """Returns how many layers come closest to ``parameters``."""
    return max(1, round(parameters / (hidden * (hidden + 1))))


def random_rows(job: dict[str, Any]) -> torch.Tensor:
    """Returns the batch. The more rows it has, the longer forward and backward take."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(job["rows"], job["hidden"], generator=generator).bfloat16()
