"""Trains a small model under DeepSpeed ZeRO-3 with parameters and optimizer on NVMe.

    python train.py DIRECTORY own|ours [--steps N] [--hidden N] [--pipeline]

Prints one JSON line: the losses, the seconds of each optimizer step, and which
I/O op DeepSpeed used.
"""

import argparse
import json
import os
import sys
import time

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "0")
for name in ("RANK", "LOCAL_RANK"):
    os.environ.setdefault(name, "0")
os.environ.setdefault("WORLD_SIZE", "1")

import torch  # noqa: E402 - it reads what is set above


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("op", choices=["own", "ours"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pipeline", action="store_true")
    return parser.parse_args()


def settings(arguments):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 4 * arguments.hidden**2,
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": arguments.directory,
                "pipeline_read": arguments.pipeline,
                "pipeline_write": arguments.pipeline,
                "buffer_count": 4,
            },
            "offload_param": {
                "device": "nvme",
                "nvme_path": arguments.directory,
                "buffer_count": 8,
                "buffer_size": 4 * arguments.hidden**2,
                "max_in_cpu": 0,
            },
        },
        "aio": {
            "block_size": 1048576,
            "queue_depth": 16,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        },
    }


class Model(torch.nn.Module):
    def __init__(self, hidden, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(hidden, hidden) for _ in range(layers)
        )

    def forward(self, x, target):
        for layer in self.layers:
            x = x + torch.nn.functional.gelu(layer(x))
        return torch.nn.functional.mse_loss(x.float(), target.float())


def main():
    arguments = parse()
    import deepspeed
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if arguments.op == "ours":
        import torch_ext.deepspeed

        torch_ext.deepspeed.install()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings(arguments), dtype=torch.bfloat16):
        model = Model(arguments.hidden, arguments.layers)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=settings(arguments)
    )
    generator = torch.Generator().manual_seed(1)
    losses, seconds = [], []
    for _ in range(arguments.steps):
        x, target = torch.randn(2, 4, arguments.hidden, generator=generator).bfloat16()
        loss = engine(x, target)
        engine.backward(loss)
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    module = AsyncIOBuilder().load().aio_handle.__module__
    print(json.dumps({"losses": losses, "step_seconds": seconds, "op": module}), flush=True)
    # DeepSpeed's own handles abort at exit if anything is left to do.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
