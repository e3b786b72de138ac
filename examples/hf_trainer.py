"""Hugging Face's Trainer with OffloadedAdamW, beside AdamW in memory.

Trains a tiny GPT-2 with random weights on random tokens three times: with
torch.optim.AdamW(fused=True), with torch_ext.OffloadedAdamW, and with OffloadedAdamW again. The
last run is interrupted half-way, and resumed from the checkpoint that the Trainer saved. Prints
the losses. Nothing is downloaded.

    pip install transformers accelerate
    python examples/hf_trainer.py --nvme-path /mnt/nvme
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from loops_common import SEED, compare, parse
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from torch_ext import OffloadedAdamW

VOCABULARY, CONTEXT, BATCH = 128, 32, 4


class RandomTokens(torch.utils.data.Dataset):
    """Sentences in which each token is followed by the same few others."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        start = torch.randint(VOCABULARY, (count, 1), generator=generator)
        jumps = torch.randint(1, 4, (count, CONTEXT - 1), generator=generator)
        self._rows = torch.cat([start, start + jumps.cumsum(1)], 1) % VOCABULARY

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


class Interruption(TrainerCallback):
    """Saves after a step and ends the training."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            control.should_save = control.should_training_stop = True


def model() -> GPT2LMHeadModel:
    set_seed(SEED)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=96, n_layer=2, n_head=4)
    )


def train(
    output: str, steps: int, optimizer: tuple[type, dict[str, Any]], stop: int, resume: bool
) -> list[float]:
    """Trains up to ``stop``, with a schedule for ``steps``. Returns the losses of the steps."""
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )
    trainer = Trainer(
        model=model(),
        args=arguments,
        train_dataset=RandomTokens(steps * BATCH),
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[Interruption(stop)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if resume else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> int:
    options = parse(__doc__)
    steps, half = options.steps, options.steps // 2
    in_memory = (torch.optim.AdamW, {"lr": 1e-3, "fused": True})
    place = {"nvme_path": options.nvme_path, "host_memory": options.host_memory}
    offloaded = (OffloadedAdamW, {"lr": 1e-3, **place})
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        losses["in memory"] = train(f"{folder}/memory", steps, in_memory, steps, False)
        losses["offloaded"] = train(f"{folder}/nvme", steps, offloaded, steps, False)
        train(f"{folder}/half", steps, offloaded, half, False)
        losses["resumed"] = train(f"{folder}/half", steps, offloaded, steps, True)
    return compare(losses)


if __name__ == "__main__":
    sys.exit(main())
