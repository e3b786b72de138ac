"""Saves in children, cuts the power of their file system, and says what is there then.

One process for a contender on a file system. Its mounts are its own: they go when it does, and
the loop device with them. For each cut there is a child that saves, and after it a child that
looks. The result is a line of JSON for each.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import torch_ext

Tensors = dict[str, torch.Tensor]
Json = dict[str, Any]
PARTS = 4
MISSES = 3  # So many saves in a row have ended before the cut: time one again.
SECONDS = 120  # For a child. It is generous.


class AbsentError(Exception):
    """What the machine lacks, in words."""


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)  # Children are forked, and threads are not.
    try:
        contender = CONTENDERS[job["contender"]](job["bytes"])
        contender.get_ready()
        with LoopDisk(Path(job["folder"]), job["file_system"]) as disk:
            for moment in job["moments"]:
                run(job, contender, disk, moment)
    except AbsentError as reason:
        tell(absent=str(reason), no_file_system=isinstance(reason, NoFileSystemError))


def tell(**said: Any) -> None:
    print(json.dumps(said), flush=True)


def run(job: Json, contender: Contender, disk: LoopDisk, moment: str) -> None:
    draw = random.Random(job["contender"])
    took = seconds_of_a_save(contender, disk) if moment == "under way" else 0.0
    cuts = 1 if moment == "none" else job["cuts"]
    done = misses = 0
    for attempt in range(100 * cuts):
        with folder_for(disk, f"{moment}-{attempt}") as folder:
            delay = draw.random() * took
            was_cut = save_in_child(contender, disk, folder / "saved", moment, delay)
            disk.restart()
            if was_cut:
                outcome, detail = look_in_child(
                    contender, folder / "saved", 1 if moment == "first" else 2
                )
                tell(moment=moment, outcome=outcome, detail=detail, delay=delay)
                done += 1
                misses = 0
            else:
                misses += 1
        if done == cuts:
            return
        if misses == MISSES:  # The machine was slower when a save was timed.
            took, misses = seconds_of_a_save(contender, disk), 0
    raise RuntimeError(f"{contender}: the save has nearly always ended before the cut")


def seconds_of_a_save(contender: Contender, disk: LoopDisk) -> float:
    with folder_for(disk, "timed") as folder:
        return save_in_child(contender, disk, folder / "saved", "timed", 0.0)


@contextmanager
def folder_for(disk: LoopDisk, name: str) -> Iterator[Path]:
    folder = disk.place / name.replace(" ", "_")
    folder.mkdir()
    disk.sync()
    yield folder
    shutil.rmtree(folder)


# Children ---------------------------------------------------------------------------


@contextmanager
def child(work: Callable[[int], None], is_cut_off: bool = False) -> Iterator[int]:
    """Runs ``work`` in a child, and gives what it writes to its descriptor. Ends it at last.

    ``is_cut_off``: errors are what happens.
    """
    ours, theirs = os.pipe()
    number = os.fork()
    if number == 0:
        status = 1
        try:
            os.close(ours)
            work(theirs)
            status = 0
        except BaseException:
            if not is_cut_off:
                traceback.print_exc()
        finally:
            os._exit(status)
    os.close(theirs)
    try:
        yield ours
    finally:
        os.close(ours)
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)


def heard(descriptor: int, seconds: float) -> bytes:
    """Returns what a child says within that time. Nothing: it is silent, or it has ended."""
    ready, _, _ = select.select([descriptor], [], [], seconds)
    return os.read(descriptor, 4096) if ready else b""


def save_in_child(
    contender: Contender, disk: LoopDisk, place: Path, moment: str, delay: float
) -> Any:
    """Saves twice, or once, and cuts the power. Returns whether it was the moment.

    "timed": nothing is cut. Returns the seconds of the second save.
    """

    def work(told: int) -> None:
        contender.begin(place)
        contender.prepare(1)
        contender.save(place)
        if moment == "first":
            disk.cut()
            os.write(told, b"cut")
            return
        disk.sync()
        contender.prepare(2)
        if moment == "under way":
            os.write(told, b"begins")
        start = time.perf_counter()
        contender.save(place)
        seconds = time.perf_counter() - start
        if moment == "second":
            disk.cut()
        os.write(told, str(seconds).encode() if moment == "timed" else b"cut")

    with child(work, is_cut_off=moment == "under way") as told:
        said = heard(told, SECONDS)
        if moment == "under way" and said == b"begins":
            time.sleep(delay)
            if heard(told, 0):  # It has ended, well or not.
                return False
            disk.cut()
            return True
        if not said:
            raise RuntimeError(f"a save of {contender} has failed; see above")
        return float(said) if moment == "timed" else True


def look_in_child(contender: Contender, place: Path, saves: int) -> tuple[str, str]:
    """Returns what is there, and what an error says."""

    def work(told: int) -> None:
        os.write(told, json.dumps(look(contender, place, saves)).encode())

    with child(work) as told:
        said = heard(told, SECONDS)
    outcome, detail = json.loads(said) if said else ("damaged", "the reader has died")
    return outcome, detail


def look(contender: Contender, place: Path, saves: int) -> tuple[str, str]:
    try:
        found = contender.load(place)
    except FileNotFoundError as error:
        return "lost", str(error)[:500]
    except Exception as error:
        return "damaged", f"{type(error).__name__}: {str(error)[:500]}"
    for version, outcome in ((saves, "new"), (saves - 1, "old")):
        if version > 0 and same(found, contender.expected(version)):
            return outcome, ""
    return "damaged", "values of neither save, or of both"


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


# The disk ---------------------------------------------------------------------------


class NoFileSystemError(AbsentError):
    pass


class LoopDisk:
    """A file system in a file, mounted where only this process and its children see it."""

    def __init__(self, folder: Path, file_system: str) -> None:
        self.place = folder / f"{file_system}-mounted"
        self._image = folder / f"{file_system}-image"
        self._type = file_system
        self._libc = ctypes.CDLL(None, use_errno=True)

    def __enter__(self) -> LoopDisk:
        new_mounts, private, recursive = 0x20000, 1 << 18, 1 << 14
        if self._libc.unshare(new_mounts) != 0 or self._libc.mount(
            b"none", b"/", None, private | recursive, None
        ):
            raise NoFileSystemError("this process may not have mounts of its own")
        if shutil.which(f"mkfs.{self._type}", path=_path()) is None:
            raise NoFileSystemError(f"mkfs.{self._type} is not installed")
        self.place.mkdir(exist_ok=True)
        with self._image.open("wb") as file:
            file.truncate(1 << 30)  # It is sparse.
        _command(f"mkfs.{self._type}", "-q", self._image)
        self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        self._unmount()
        self._image.unlink()

    def _mount(self) -> None:
        _command("mount", "-t", self._type, "-o", "loop", self._image, self.place)

    def _unmount(self) -> None:
        # The kernel may close a dead process's files a little later.
        end = time.monotonic() + 20
        while True:
            try:
                return _command("umount", self.place)
            except NoFileSystemError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.01)

    def restart(self) -> None:
        """Mounts it again, as after a power cut, or in good order if there was none."""
        self._unmount()
        self._mount()

    def sync(self) -> None:
        """Makes all durable that was written."""
        descriptor = os.open(self.place, os.O_RDONLY)
        try:
            if self._libc.syncfs(descriptor) != 0:
                raise OSError(ctypes.get_errno(), "syncfs")
        finally:
            os.close(descriptor)

    def cut(self) -> None:
        """Ends the file system as it is, without what its log has not written."""
        shutdown, without_log = 0x8004587D, 2
        descriptor = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, shutdown, struct.pack("I", without_log))
        finally:
            with suppress(OSError):
                os.close(descriptor)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"


def _command(*words: str | Path) -> None:
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=os.environ | {"PATH": _path()}
    )
    if done.returncode != 0:
        raise NoFileSystemError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


# Contenders -------------------------------------------------------------------------


class Contender:
    """Saves tensors under a path, and finds them. Errors of the start: AbsentError."""

    def __init__(self, size: int) -> None:
        self.elements = size // 4 // PARTS

    def get_ready(self) -> None:
        """Makes here what each child would have to make."""
        for version in (1, 2):
            self.expected(version)

    def begin(self, place: Path) -> None:
        """Called in the child that will save."""

    def prepare(self, version: int) -> None:
        self.tensors = self.expected(version)

    @functools.cache  # noqa: B019 - it lives as long as the process
    def expected(self, version: int) -> Tensors:
        """Returns what that save has."""
        tensors = {f"layers.{i}": drawn(self.elements, version, i) for i in range(PARTS)}
        return tensors | {"step": torch.tensor([version])}

    def save(self, place: Path) -> None:
        raise NotImplementedError

    def load(self, place: Path) -> Tensors:
        """Errors: FileNotFoundError if there is nothing."""
        raise NotImplementedError

    def empty(self) -> Tensors:
        return {name: torch.zeros_like(t) for name, t in self.expected(1).items()}

    def __str__(self) -> str:
        return type(self).__name__


@functools.cache
def drawn(elements: int, *seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash(seed) % (1 << 62))
    return torch.randn(elements, generator=generator)


class Ours(Contender):
    def save(self, place: Path) -> None:
        torch_ext.save(self.tensors, place)

    def load(self, place: Path) -> Tensors:
        return torch_ext.load(place)


class TorchSave(Contender):
    def save(self, place: Path) -> None:
        torch.save(self.tensors, place)

    def load(self, place: Path) -> Tensors:
        return torch.load(place)


class Safetensors(Contender):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        try:
            import safetensors.torch
        except ImportError:
            raise AbsentError(
                "safetensors is not installed (pip install safetensors)"
            ) from None
        self._library = safetensors.torch

    def save(self, place: Path) -> None:
        self._library.save_file(self.tensors, place)

    def load(self, place: Path) -> Tensors:
        return self._library.load_file(place)


class Dcp(Contender):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        # Here and not in each child.
        import torch.distributed.checkpoint as dcp

        self._dcp = dcp
        # It says at each call that there is one process, and that it overwrites.
        warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")

    def save(self, place: Path) -> None:
        # Copies ahead are for tensors on a device, and these are not. Files are synced: that
        # is the default.
        writer = self._dcp.FileSystemWriter(place, per_thread_copy_ahead=0)
        self._dcp.save(self.tensors, storage_writer=writer, no_dist=True)

    def load(self, place: Path) -> Tensors:
        reader = self._dcp.FileSystemReader(place)
        reader.read_metadata()  # FileNotFoundError is wrapped below.
        state = self.empty()
        self._dcp.load(state, storage_reader=reader, no_dist=True)
        return state


class DcpSafetensors(Dcp):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        Safetensors(size)

    def save(self, place: Path) -> None:
        writer = self._dcp.HuggingFaceStorageWriter(os.fspath(place))
        writer.per_thread_copy_ahead = 0  # As in Dcp. It cannot be given.
        self._dcp.save(self.tensors, storage_writer=writer, no_dist=True)

    def load(self, place: Path) -> Tensors:
        if not list(place.glob("*.safetensors")):
            raise FileNotFoundError(f"{place} has no file")
        state = self.empty()
        reader = self._dcp.HuggingFaceStorageReader(os.fspath(place))
        self._dcp.load(state, storage_reader=reader, no_dist=True)
        # Other readers find the files by the index.
        json.loads((place / "model.safetensors.index.json").read_text())
        return state


class DeepSpeed(Contender):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            from deepspeed.io import fast_file_writer
            from deepspeed.ops.op_builder import AsyncIOBuilder

            self._op = AsyncIOBuilder().load()
        except ImportError:
            raise AbsentError("DeepSpeed is not installed (pip install deepspeed)") from None
        except Exception as error:
            raise AbsentError(f"DeepSpeed's op cannot be had: {error}") from None
        self._io = fast_file_writer
        # It has no build for the CPU, and only views tensors as bytes.
        fast_file_writer.UtilsBuilder = _ViewsAsBytes

    def begin(self, place: Path) -> None:
        self._handle = self._op.aio_handle(1 << 20, 32, False, True, 1)
        self._pinned = torch.zeros(16 << 20, dtype=torch.uint8)

    def save(self, place: Path) -> None:
        config = self._io.FastFileWriterConfig(
            dnvme_handle=self._handle, pinned_tensor=self._pinned, double_buffer=True
        )
        writer = self._io.FastFileWriter(file_path=os.fspath(place), config=config)
        torch.save(self.tensors, writer, _use_new_zipfile_serialization=False)
        writer.close()

    def load(self, place: Path) -> Tensors:
        return torch.load(place)


class _ViewsAsBytes:
    def load(self) -> _ViewsAsBytes:
        return self

    def cast_to_byte_tensor(self, given: Any) -> Any:
        if isinstance(given, list):
            return [each.reshape(-1).view(torch.uint8) for each in given]
        return given.reshape(-1).view(torch.uint8)


class Commit(Contender):
    """An optimizer that commits. A save is of parameters and of both moments."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        import torch._dynamo  # noqa: F401 - torch's optimizers import it, in each child

    def begin(self, place: Path) -> None:
        place.mkdir()
        self._parameters = self._first()
        self._optimizer = torch_ext.OffloadedAdamW(
            self._parameters.items(), lr=1e-2, nvme_path=place, host_memory="16MiB"
        )

    def _first(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"p{i}": torch.nn.Parameter(drawn(self.elements, 0, i).clone())
            for i in range(PARTS)
        }

    def _step(self, optimizer: Any, parameters: dict[str, Any], version: int) -> None:
        for i, parameter in enumerate(parameters.values()):
            parameter.grad = drawn(self.elements, version, i).clone()
        optimizer.step()

    def prepare(self, version: int) -> None:
        self._step(self._optimizer, self._parameters, version)
        self._version = version

    def save(self, place: Path) -> None:
        self._optimizer.commit(self._version)

    def load(self, place: Path) -> Tensors:
        parameters = self._first()
        optimizer = torch_ext.OffloadedAdamW.resume(
            place, parameters.items(), host_memory="16MiB"
        )
        return self._all_of(optimizer, parameters)

    @functools.cache  # noqa: B019 - it lives as long as the process
    def expected(self, version: int) -> Tensors:
        parameters = self._first()
        optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-2, fused=True)
        for number in range(1, version + 1):
            self._step(optimizer, parameters, number)
        return self._all_of(optimizer, parameters)

    def _all_of(self, optimizer: Any, parameters: dict[str, Any]) -> Tensors:
        state = optimizer.state_dict()["state"]
        found = {name: p.detach() for name, p in parameters.items()}
        for i in range(PARTS):
            found |= {f"{name} {i}": state[i][name] for name in ("exp_avg", "exp_avg_sq")}
        return found


CONTENDERS: dict[str, type[Contender]] = {
    "commit": Commit,
    "ours": Ours,
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "dcp": Dcp,
    "dcp_safetensors": DcpSafetensors,
    "deepspeed": DeepSpeed,
}


if __name__ == "__main__":
    main()
