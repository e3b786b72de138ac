"""Eleven ordinary faults, and what aio_handle and DeepSpeed's handle make of them.

    python tests/fault/eleven.py [ours] [deepspeed] [--directory DIR] [--engine NAME]

Each fault befalls a process of its own, which ends within a minute or is ended.
The table says for each: "reported" (an exception, or -1), "survived" (success,
and the bytes are right), "LOST" (success, and they are not), "ABORTED", "HUNG",
or why it could not be tried. Exits with 0 if all of ours were reported or
survived. Faults need root (mount, losetup), strace, or a C compiler.

The list is of faults that users of NVMe offload have met, each of which was tried
on DeepSpeed's I/O core.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MIB = 1 << 20
SECONDS = 60
GOOD = ("reported", "survived")

# Takes half of what libaio is given, as the kernel may, and leaves a mark.
HALF = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
int io_submit(void* context, long count, void** blocks) {
  if (count > 1) close(open(getenv("HALF_MARK"), O_CREAT | O_WRONLY, 0600));
  long rc = syscall(SYS_io_submit, context, count > 1 ? count / 2 : count, blocks);
  return rc < 0 ? -errno : (int)rc;
}
"""


class NotTriedError(Exception):
    """The fault cannot be made here."""


def run(*command: Any) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise NotTriedError(f"{command[0]}: {(done.stderr or done.stdout).strip()[:60]}")
    return done.stdout.strip()


# In the child: one function per fault. It returns whether the bytes are right;
# whoever raises, or returns None, has reported the fault.


def outcome(count: int) -> bool:
    """Of a wait that should count one."""
    return count == 1


def write(handle: Any, tensor: Any, path: Path, offset: int = 0) -> bool | None:
    if handle.async_pwrite(tensor, str(path), offset) != 0 or not outcome(handle.wait()):
        return None
    with path.open("rb") as file:
        file.seek(offset)
        return file.read() == tensor.numpy().tobytes()


def pattern(handle: Any, size: int, shift: int = 0) -> Any:
    import torch

    whole = handle.new_cpu_locked_tensor(size + shift, torch.zeros(0, dtype=torch.uint8))
    whole.copy_(torch.arange(whole.numel()).remainder_(251))
    return whole[shift:]


def disk_full(handle: Any, place: Path) -> bool | None:
    return write(handle, pattern(handle, 4 * MIB), place / "x")


def file_size_limit(handle: Any, place: Path) -> bool | None:
    # Python ignores the signal; what is left is a short write.
    tensor = pattern(handle, 4 * MIB)
    limit = MIB + MIB // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return write(handle, tensor, place / "x")


def misaligned_buffer(handle: Any, place: Path) -> bool | None:
    return write(handle, pattern(handle, 4 * MIB, 1), place / "x")


def tail_of_512(handle: Any, place: Path) -> bool | None:
    return write(handle, pattern(handle, MIB + 512), place / "x")


def read_back(handle: Any, place: Path) -> bool | None:
    """What was written before is read with the same call that loses it."""
    import torch

    size = (place / "x").stat().st_size
    target = handle.new_cpu_locked_tensor(size, torch.zeros(0, dtype=torch.uint8))
    target.fill_(7)
    if handle.async_pread(target, str(place / "x"), 0) != 0 or not outcome(handle.wait()):
        return None
    return torch.equal(target, torch.arange(size).remainder_(251).to(torch.uint8))


def truncated_meanwhile(handle: Any, place: Path) -> bool | None:
    size = 64 * MIB
    (place / "x").write_bytes(pattern(handle, size).numpy().tobytes())
    import torch

    target = handle.new_cpu_locked_tensor(size, torch.zeros(0, dtype=torch.uint8))
    if handle.async_pread(target, str(place / "x"), 0) != 0:
        return None
    os.truncate(place / "x", MIB)
    if not outcome(handle.wait()):
        return None
    return torch.equal(target, torch.arange(size).remainder_(251).to(torch.uint8))


def many(handle: Any, place: Path) -> bool | None:
    tensor = pattern(handle, 8 * MIB)
    if write(handle, tensor, place / "x") is not True:
        return None
    return read_back(handle, place)


def longer_before(handle: Any, place: Path) -> bool | None:
    (place / "x").write_bytes(bytes(2 * MIB))
    tensor = pattern(handle, MIB)
    if handle.async_pwrite(tensor, str(place / "x"), 0) != 0 or not outcome(handle.wait()):
        return None
    return (place / "x").read_bytes() == tensor.numpy().tobytes() + bytes(MIB)


def nothing_pending(handle: Any, place: Path) -> bool | None:
    return handle.wait() == 0


# Around the child: where it works, and what runs it.


@contextlib.contextmanager
def plain(place: Path) -> Iterator[Path]:
    yield place


@contextlib.contextmanager
def small(place: Path) -> Iterator[Path]:
    run("mount", "-t", "tmpfs", "-o", "size=2m", "none", place)
    try:
        yield place
    finally:
        run("umount", place)


@contextlib.contextmanager
def sectors_of_4096(place: Path) -> Iterator[Path]:
    with loop_device(place, "--sector-size", "4096") as (_, mounted):
        yield mounted


@contextlib.contextmanager
def loop_device(place: Path, *options: str) -> Iterator[tuple[Path, Path]]:
    image, mounted = place / "image", place / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    device = run("losetup", "--find", "--show", *options, image)
    try:
        run("mkfs.ext4", "-q", "-F", device)
        run("mount", device, mounted)
        try:
            yield image, mounted
        finally:
            subprocess.run(["umount", mounted], check=False, capture_output=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=False)


@contextlib.contextmanager
def broken_device(place: Path) -> Iterator[Path]:
    """A file whose blocks the device cannot read any more: its image is cut."""
    with loop_device(place) as (image, mounted):
        (mounted / "x").write_bytes(bytes(i % 251 for i in range(251)) * (16 * MIB // 251))
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        os.truncate(image, 8 * MIB)
        yield mounted


def strace(fault: str) -> Callable[[Path], list[str]]:
    def command(place: Path) -> list[str]:
        if shutil.which("strace") is None:
            raise NotTriedError("no strace")
        return ["strace", "-f", "-o", "/dev/null", "-e", f"inject={fault}"]

    return command


def half_batches(place: Path) -> list[str]:
    source, library = place / "half.c", place / "half.so"
    source.write_text(HALF)
    run("cc", "-shared", "-fPIC", "-o", library, source)
    return ["env", f"LD_PRELOAD={library}", f"HALF_MARK={place / 'mark'}"]


def directly(place: Path) -> list[str]:
    return []


Fault = tuple[str, Callable[..., bool | None], Callable[..., Any], Callable[[Path], list[str]]]
FAULTS: dict[str, Fault] = {
    "disk_full": ("4 MiB onto a file system of 2 MiB", disk_full, small, directly),
    "file_size_limit": ("short write (RLIMIT_FSIZE)", file_size_limit, plain, directly),
    "misaligned_buffer": ("misaligned buffer", misaligned_buffer, plain, directly),
    "tail_of_512": ("512 byte tail, sectors of 4096", tail_of_512, sectors_of_4096, directly),
    "device_eio": ("the device answers EIO to a read", read_back, broken_device, directly),
    "truncated": ("file cut while it is read", truncated_meanwhile, plain, directly),
    "submit_eagain": (
        "io_submit says EAGAIN twice",
        many,
        plain,
        strace("io_submit:error=EAGAIN:when=2..3"),
    ),
    "submit_half": ("io_submit takes half of a batch", many, plain, half_batches),
    "setup_refused": ("io_setup is refused", many, plain, strace("io_setup:error=EAGAIN")),
    "eintr": (
        "a signal while waiting for events",
        many,
        plain,
        strace("io_pgetevents,io_getevents:error=EINTR:when=2..3"),
    ),
    "nothing_pending": ("wait() with nothing pending", nothing_pending, plain, directly),
}


def make_handle(who: str, engine: str) -> Any:
    settings = (256 * 1024, 8, False, True, 1)
    if who == "ours":
        import torch_ext

        return torch_ext.aio_handle(*settings, engine=engine)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().load().aio_handle(*settings)


def child(who: str, name: str, place: Path, engine: str) -> int:
    _, action, _, _ = FAULTS[name]
    handle = make_handle(who, engine)
    try:
        right = action(handle, place)
    except (OSError, ValueError) as error:
        print(f"\nreported {error}", flush=True)
    else:
        word = "reported" if right is None else "survived" if right else "LOST"
        what = getattr(handle, "errors", [""])[-1:]
        print(f"\n{word} {what[0] if what else ''}", flush=True)
    # Not through destructors, which have faults of their own.
    os._exit(0)


def trial(who: str, name: str, directory: str, engine: str) -> tuple[str, str]:
    """What became of it, and in which words."""
    _, _, surroundings, prefix = FAULTS[name]
    place = Path(tempfile.mkdtemp(prefix="torch_ext_test.", dir=directory))
    try:
        with surroundings(place) as where:
            arguments = [
                sys.executable,
                __file__,
                "--child",
                who,
                name,
                where,
                "--engine",
                engine,
            ]
            child = subprocess.Popen(
                [*prefix(place), *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            try:
                output, _ = child.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
                return "HUNG", ""
        lines = [line for line in output.splitlines() if line.split(" ")[0] in (*GOOD, "LOST")]
        if prefix is half_batches and lines and not (place / "mark").exists():
            return "not tried", "io_submit was not called with more than one request"
        if not lines:
            return "ABORTED", f"exit status {child.returncode}"
        word, _, text = lines[-1].partition(" ")
        return word, text
    except NotTriedError as error:
        return "not tried", str(error)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("who", nargs="*", default=["ours"], help="ours, deepspeed")
    parser.add_argument("--directory", default="/var/tmp")
    parser.add_argument("--engine", default="auto", help="of ours")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        who, name, place = arguments.child
        return child(who, name, Path(place), arguments.engine)
    failed = 0
    print("| fault |", " | ".join(arguments.who), "|")
    print("|---|" + "---|" * len(arguments.who))
    for name, (text, *_) in FAULTS.items():
        cells = []
        for who in arguments.who:
            word, words = trial(who, name, arguments.directory, arguments.engine)
            cells.append(f"{word}: {words}" if words else word)
            failed += who == "ours" and word not in (*GOOD, "not tried")
        print(f"| {text} |", " | ".join(cells), "|", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
