"""PyTorch Lightning with OffloadedAdamW, beside AdamW in memory.

Trains a small network on random data twice: with torch.optim.AdamW(fused=True) and with
torch_ext.OffloadedAdamW. Both are interrupted half-way. They go on, in a new model, from the
checkpoint that Lightning saved. Prints the losses. Nothing is downloaded.

    pip install lightning
    python examples/lightning_train.py --nvme-path /mnt/nvme
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from typing import Any

import lightning
import torch
from loops_common import SEED, compare, parse

from torch_ext import OffloadedAdamW

BATCH, WIDTH = 16, 64


class Network(lightning.LightningModule):
    """A small network. ``place`` is where OffloadedAdamW keeps its state; None: AdamW in
    memory."""

    def __init__(self, steps: int, place: dict[str, Any] | None) -> None:
        super().__init__()
        self._steps, self._place = steps, place
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 4 * WIDTH),
            torch.nn.GELU(),
            torch.nn.Linear(4 * WIDTH, WIDTH),
        )
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        (x,) = batch
        loss = torch.nn.functional.mse_loss(self.layers(x), x.roll(1, 1))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        if self._place is None:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)
        else:
            optimizer = OffloadedAdamW(self.parameters(), lr=1e-2, **self._place)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self._steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def train(options: argparse.Namespace, place: dict[str, Any] | None) -> list[float]:
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        for stop in (options.steps // 2, options.steps):
            lightning.seed_everything(SEED, verbose=False)
            network = Network(options.steps, place)
            trainer = lightning.Trainer(
                accelerator="cpu",
                max_steps=stop,
                gradient_clip_val=1.0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            data = torch.utils.data.TensorDataset(torch.randn(options.steps * BATCH, WIDTH))
            loader = torch.utils.data.DataLoader(data, BATCH)
            trainer.fit(network, loader, ckpt_path=checkpoint)
            checkpoint = f"{folder}/{stop}.ckpt"
            trainer.save_checkpoint(checkpoint)
            losses += network.losses
    return losses


def main() -> int:
    options = parse(__doc__)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    place = {"nvme_path": options.nvme_path, "host_memory": options.host_memory}
    return compare({"in memory": train(options, None), "offloaded": train(options, place)})


if __name__ == "__main__":
    sys.exit(main())
