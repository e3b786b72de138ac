"""Trains with Lightning, and may die. Run by test_killed_trainers.py.

Prints "step NUMBER LOSS" for each step.
"""

import argparse
import json
import os
import signal
import sys
import warnings

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from torch_ext import OffloadedAdamW

BATCH, WIDTH = 16, 64


def die():
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


class Network(lightning.LightningModule):
    def __init__(self, steps, place):
        super().__init__()
        self._steps, self._place = steps, place
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 4 * WIDTH),
            torch.nn.GELU(),
            torch.nn.Linear(4 * WIDTH, WIDTH),
        )

    def training_step(self, batch, index):
        # Lightning begins the data anew when it resumes, so they come from the step's number.
        generator = torch.Generator().manual_seed(self.global_step)
        x = torch.randn(BATCH, WIDTH, generator=generator)
        loss = torch.nn.functional.mse_loss(self.layers(x), x.roll(1, 1))
        print("step", self.global_step + 1, repr(loss.item()), flush=True)
        return loss

    def configure_optimizers(self):
        if self._place:
            optimizer = OffloadedAdamW(self.parameters(), lr=1e-2, **self._place)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, self._steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Death(Callback):
    def __init__(self, after, saving):
        self._after, self._saving = after, saving

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self._after:
            die()

    def on_save_checkpoint(self, trainer, *_):
        # Called when the optimizer's state_dict() has been taken, and nothing is written.
        if trainer.global_step == self._saving:
            die()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--optimizer", default="{}")
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--die-after", type=int)
    parser.add_argument("--die-saving", type=int)
    parser.add_argument("--resume")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    lightning.seed_everything(1, verbose=False)
    network = Network(options.steps, json.loads(options.optimizer))
    saver = ModelCheckpoint(
        options.output,
        filename="{step}",
        every_n_train_steps=2,
        save_top_k=options.limit,
        monitor="step",
        mode="max",
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[saver, Death(options.die_after, options.die_saving)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.TensorDataset(torch.zeros(options.steps))
    trainer.fit(network, torch.utils.data.DataLoader(data), ckpt_path=options.resume)


if __name__ == "__main__":
    main()
