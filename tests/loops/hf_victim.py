"""Trains with Hugging Face's Trainer, and may die. Run by test_killed_trainers.py.

Prints "step NUMBER LOSS" for each step. With several processes, rank 0 does.
"""

import argparse
import json
import os
import re
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import torch
from hf_trainer import BATCH, SEED, RandomTokens, model
from transformers import Trainer, TrainerCallback, TrainingArguments

from torch_ext import OffloadedAdamW


def die():
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


class Report(TrainerCallback):
    def __init__(self, die_after):
        self._die_after = die_after

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs and state.is_world_process_zero:
            print("step", state.global_step, repr(logs["loss"]), flush=True)

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self._die_after:
            die()


def die_in_the_midst_of_saving(step):
    """The folder is there then, with half of this file, and not the last file."""
    save = torch.save

    def dying(obj, f, *args, **kwargs):
        if re.search(rf"checkpoint-{step}\b.*optimizer", str(f)):
            save(obj, f, *args, **kwargs)
            os.truncate(f, os.path.getsize(f) // 2)
            die()
        return save(obj, f, *args, **kwargs)

    torch.save = dying


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--optimizer", default="{}", help="JSON; none: torch's")
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--die-after", type=int)
    parser.add_argument("--die-saving", type=int)
    parser.add_argument("--resume")
    parser.add_argument("--bf16-weights", action="store_true")
    options = parser.parse_args()
    place = json.loads(options.optimizer)
    optimizer = (
        (OffloadedAdamW, {"lr": 1e-3} | place)
        if place
        else (torch.optim.AdamW, {"lr": 1e-3, "fused": True})
    )
    if options.die_saving is not None:
        die_in_the_midst_of_saving(options.die_saving)
    arguments = TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=2,
        save_total_limit=options.limit,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )
    trained = model()
    if options.bf16_weights:
        trained = trained.to(torch.bfloat16)
    trainer = Trainer(
        model=trained,
        args=arguments,
        train_dataset=RandomTokens(options.steps * BATCH * 2),
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[Report(options.die_after)],
    )
    trainer.train(resume_from_checkpoint=options.resume)


if __name__ == "__main__":
    main()
