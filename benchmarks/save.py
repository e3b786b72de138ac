"""torch_ext.save and load beside fio, safetensors, torch.save, DCP and FastFileWriter.

Each save makes a new file and is durable when its clock stops: the others are followed by an
fsync of their files. fio writes as many bytes to a new file and syncs it. Loads are cold: the
page cache is asked to forget the file, and every page of the result is touched. In every round
all do the same, one right after the other, and another one goes first.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch
from common import AIO, GIB, MIB, Json, Rate

import torch_ext

OURS = "ours"
Tensors = dict[str, torch.Tensor]


class Contender:
    """Saves tensors durably under a path, and loads them."""

    def __init__(
        self,
        name: str,
        save: Callable[[Tensors, Path], Any],
        load: Callable[[Path], Tensors] | None,
        syncs_itself: bool = False,
    ) -> None:
        self.name, self.load = name, load
        self._save, self._syncs_itself = save, syncs_itself

    def save(self, tensors: Tensors, path: Path) -> Rate:
        remove(path)

        def run() -> None:
            self._save(tensors, path)
            if not self._syncs_itself:
                sync(path)

        return common.rate_of(run, size_of(tensors))

    def load_cold(self, tensors: Tensors, path: Path) -> Rate:
        forget(path)
        loaded: Tensors = {}

        def run() -> None:
            loaded.update(self.load(path))
            for tensor in loaded.values():
                tensor.view(torch.uint8).flatten()[::4096].sum()

        rate = common.rate_of(run, size_of(tensors))
        if any(not torch.equal(loaded[name], each) for name, each in tensors.items()):
            raise RuntimeError(f"{self.name}: other bytes came back")
        return rate


def main() -> None:
    options = parse()
    machine = common.machine(options.directory)
    tensors = {
        f"layers.{i}.weight": torch.randn(options.elements).to(torch.bfloat16)
        for i in range(options.size // (2 * options.elements))
    }
    # What a model has besides: small ones, and one of another dtype.
    tensors |= {f"layers.{i}.norm": torch.randn(1000) for i in range(len(tensors))}
    contenders = make_contenders()
    samples: dict[str, list[Json]] = {"save": [], "load": []}
    with common.work_folder(options.directory) as folder:
        paths = {c.name: folder / c.name.replace(" ", "_") for c in contenders}
        for round_ in range(options.rounds):
            common.say(f"save: round {round_ + 1} of {options.rounds}")
            measured: dict[str, dict[str, Rate]] = {"save": {}, "load": {}}
            first = round_ % len(contenders)
            order = contenders[first:] + contenders[:first]
            fio_first = round_ % 2 == 0
            if fio_first:
                beside_fio(measured, folder, size_of(tensors))
            for contender in order:
                path = paths[contender.name]
                measured["save"][contender.name] = contender.save(tensors, path)
                if contender.load is not None:
                    measured["load"][contender.name] = contender.load_cold(tensors, path)
                remove(path)
            if not fio_first:
                beside_fio(measured, folder, size_of(tensors))
            for operation, rates in measured.items():
                samples[operation].append({who: asdict(rate) for who, rate in rates.items()})
    title = f"{len(tensors)} tensors, {size_of(tensors) / GIB:.2f} GiB"
    result = {"measurements": samples, "tables": [tabulate(title, samples)]}
    common.publish("save", options, {"machine": machine, **result})


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--size", type=common.size, default=2 * GIB, help="of all tensors (2 GiB)"
    )
    options = parser.parse_args()
    options.elements = 8 * MIB
    if options.quick:
        options.rounds, options.size, options.elements = 1, 4 * MIB, MIB
    return options


def make_contenders() -> list[Contender]:
    found = [
        Contender(OURS, torch_ext.save, torch_ext.load, syncs_itself=True),
        Contender("torch.save", torch.save, torch.load),
        Contender("DCP", save_dcp, load_dcp),
    ]
    try:
        from safetensors.torch import load_file, save_file

        found.append(Contender("safetensors", save_file, load_file))
    except ImportError:
        common.say("safetensors is not installed (pip install safetensors): it is left out")
    fast = fast_file_writer()
    if fast is not None:
        found.append(Contender("FastFileWriter", fast, torch.load))
    return found


def save_dcp(tensors: Tensors, path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    # Copies ahead are for tensors on a device, and these are not.
    writer = dcp.FileSystemWriter(path, per_thread_copy_ahead=0)
    dcp.save(tensors, storage_writer=writer, no_dist=True)


def load_dcp(path: Path) -> Tensors:
    """DCP fills tensors that are there, so their memory is made first, as in the others."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(path)
    state: dict[str, Any] = {
        name: torch.empty(each.size, dtype=each.properties.dtype, device="cpu")
        for name, each in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def fast_file_writer() -> Callable[[Tensors, Path], None] | None:
    """Returns a save with DeepSpeed's FastFileWriter, with its op compiled, or None."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.io import FastFileWriter, FastFileWriterConfig
        from deepspeed.io import fast_file_writer as module
        from deepspeed.ops.op_builder import AsyncIOBuilder

        op = AsyncIOBuilder().load()
    except ImportError:
        common.say("DeepSpeed is not installed (pip install deepspeed): it is left out")
        return None
    except (OSError, RuntimeError) as error:
        common.say(f"DeepSpeed's op cannot be had, so it is left out: {error}")
        return None
    arguments = AIO["block_size"], AIO["queue_depth"], False, True, AIO["thread_count"]
    handle = op.aio_handle(*arguments)
    pinned = torch.zeros(64 * MIB, dtype=torch.uint8)

    # Its helper for this has no version for the CPU.
    class Utils:
        def load(self) -> Any:
            return self

        def cast_to_byte_tensor(self, given: Any) -> Any:
            if isinstance(given, list):
                return [self.cast_to_byte_tensor(each) for each in given]
            return given.view(-1).view(torch.uint8)

    module.UtilsBuilder = Utils

    def save(tensors: Tensors, path: Path) -> None:
        config = FastFileWriterConfig(
            dnvme_handle=handle, pinned_tensor=pinned, double_buffer=True
        )
        writer = FastFileWriter(file_path=os.fspath(path), config=config)
        torch.save(tensors, writer, _use_new_zipfile_serialization=False)
        writer.close()

    return save


def beside_fio(measured: dict[str, dict[str, Rate]], folder: Path, size: int) -> None:
    if not common.have_fio():
        return
    path, block = folder / "fio", AIO["block_size"]
    more = {"mem": "mmaphuge"} if has_huge_pages(2 * block * AIO["queue_depth"]) else {}
    total = -(-size // block) * block
    measured["save"]["fio"] = common.fio("write", path, total, block, end_fsync=1, **more)
    measured["load"]["fio"] = common.fio("read", path, total, block, **more)
    remove(path)


def has_huge_pages(count: int) -> bool:
    found = re.search(r"HugePages_Free:\s*(\d+)", Path("/proc/meminfo").read_text())
    return found is not None and int(found[1]) * 2 * MIB >= count


def size_of(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def sync(path: Path) -> None:
    """Makes the files durable, and their names."""
    folders = {path.parent} | ({path} if path.is_dir() else set())
    for each in [*files_of(path), *folders]:
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def forget(path: Path) -> None:
    for each in files_of(path):
        with each.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tabulate(title: str, cases: dict[str, list[Json]]) -> Json:
    others = ["fio", "safetensors", "torch.save", "DCP", "FastFileWriter"]
    header = ["", "GiB/s ours", *[f"ours / {who}" for who in others], "CPU s/GiB ours"]
    rows = []
    for operation, samples in cases.items():
        name = "save, durable" if operation == "save" else "load, cold"
        cells = [name, common.cell(column(samples, OURS))]
        cells += [common.cell(ratios(samples, who)) for who in others]
        cells.append(common.cell(column(samples, OURS, "cpu_seconds_per_gib")))
        rows.append(cells)
    return common.table(title, header, rows)


def column(samples: list[Json], who: str, what: str = "gib_per_second") -> list[float]:
    return [sample[who][what] for sample in samples if who in sample]


def ratios(samples: list[Json], who: str) -> list[float]:
    there = [sample for sample in samples if who in sample]
    return [s[OURS]["gib_per_second"] / s[who]["gib_per_second"] for s in there]


if __name__ == "__main__":
    main()
