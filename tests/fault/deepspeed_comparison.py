"""Eleven ordinary faults, and what aio_handle and DeepSpeed's handle make of them.
A twelfth row is a behaviour of DeepSpeed's that is kept on purpose.

    python tests/fault/deepspeed_comparison.py [ours] [deepspeed] [--directory DIR]
                                               [--engine NAME]

DeepSpeed's op is compiled and loaded once before any fault. Each fault befalls a
process of its own, which ends within a minute or is ended.
For each, the table says one of these:

- "reported": an exception, or -1.
- "survived": success, and the bytes are right.
- "kept": the twelfth is as it is in DeepSpeed.
- "LOST": success, and the bytes are not right.
- "ABORTED" or "HUNG".
- "NOT INJECTED": all went well, but nothing shows that the fault was there.
- "not tried", and why.

Exits with 0 if all of ours were reported, survived or kept, or not tried.
Faults need root (mount, losetup), strace, or a C compiler.

Users of NVMe offload have met these faults. Each was tried on DeepSpeed's I/O core. Faults of
the kernel's calls are named after libaio's. They are made in the calls of the engine in use, or
in the closest that it has. The table says in which, and how often.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MIB = 1 << 20
SECONDS = 60
LOAD_SECONDS = 600  # DeepSpeed compiles its op once, which takes a minute or two.
GOOD = ("reported", "survived", "kept")
WORDS = (*GOOD, "LOST", "not-tried")  # With which a child's last line begins.

#: What a child runs in where nothing has to come before it; tests have one that starts soon.
PYTHON = sys.executable


class NotTriedError(Exception):
    """The fault cannot be made here."""


def run(*command: Any) -> str:
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise NotTriedError(f"no {command[0]}") from None
    if done.returncode != 0:
        raise NotTriedError(f"{command[0]}: {(done.stderr or done.stdout).strip()[:60]}")
    return done.stdout.strip()


# In the child: one function per fault. It returns whether the bytes are right;
# whoever raises, or returns None, has reported the fault.


def outcome(count: int) -> bool:
    """Returns whether a wait has counted one operation, as it should."""
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


def nothing_pending(handle: Any, place: Path) -> bool | None:
    return handle.wait() == 0


def longer_before(handle: Any, place: Path) -> bool | str | None:
    old = b"\xff" * (2 * MIB)
    (place / "x").write_bytes(old)
    tensor = pattern(handle, MIB)
    if handle.async_pwrite(tensor, str(place / "x"), 0) != 0 or not outcome(handle.wait()):
        return None
    kept = (place / "x").read_bytes() == tensor.numpy().tobytes() + old[MIB:]
    return "kept" if kept else False


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


# What makes a fault of the kernel's in the child, and knows how often it did.


class Strace(NamedTuple):
    text: str
    calls: str
    how: str
    seen: str = ""  # In its log's lines, where only some of the calls are meant.

    def command(self, place: Path) -> list[str]:
        run("strace", "-o", "/dev/null", "true")
        # A log for each thread: no call is cut in two by another thread's.
        log = ["-ff", "-o", str(place / "log"), "-e", f"trace={self.calls}"]
        return ["strace", *log, "-e", f"inject={self.calls}:{self.how}"]

    def times(self, place: Path) -> int:
        lines = [
            line
            for log in place.glob("log.*")
            for line in log.read_text(errors="replace").splitlines()
        ]
        return sum("(INJECTED)" in line and bool(re.search(self.seen, line)) for line in lines)


class Preload(NamedTuple):
    """C code that comes before a library's function, and calls hit()."""

    text: str
    code: str
    libraries: tuple[str, ...] = ()

    def command(self, place: Path) -> list[str]:
        for name in self.libraries:
            if not is_linked(name):
                raise NotTriedError(
                    f"lib{name} is inside this build of torch_ext, so that no other "
                    f"library can come between"
                )
        source, library = place / "fault.c", place / "fault.so"
        source.write_text(PRELUDE + self.code)
        linked = ["-Wl,--no-as-needed", *(f"-l{name}" for name in self.libraries)]
        run("cc", "-shared", "-fPIC", "-o", library, source, *linked)
        return ["env", f"LD_PRELOAD={library}", f"FAULT_HITS={place / 'hits'}"]

    def times(self, place: Path) -> int:
        hits = place / "hits"
        return hits.stat().st_size if hits.exists() else 0


def is_linked(name: str) -> bool:
    """Whether torch_ext's libraries, as loaded here, call that shared library."""
    from torch_ext._native import _C

    files = {Path(_C.__file__), *Path(_C.__file__).parent.glob("lib/libtorch_ext_core.so*")}
    return any(f"lib{name}.so".encode() in file.read_bytes() for file in files)


PRELUDE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
static void hit(void) {
  int fd = open(getenv("FAULT_HITS"), O_CREAT | O_WRONLY | O_APPEND, 0600);
  if (write(fd, "x", 1) != 1) abort();
  close(fd);
}
"""

# A wheel, and what torch_ext.load() builds, makes the call without libaio.
HALF_OF_LIBAIO = r"""
static long next_syscall(long number, long a, long b, long c, long d, long e, long f) {
  static long (*next)(long, ...);
  if (next == NULL) next = dlsym(RTLD_NEXT, "syscall");
  if (number == SYS_io_submit && b > 1) {
    hit();
    b /= 2;
  }
  return next(number, a, b, c, d, e, f);
}
long syscall(long number, ...) {
  va_list list;
  long argument[6];
  va_start(list, number);
  for (int i = 0; i < 6; ++i) argument[i] = va_arg(list, long);
  va_end(list);
  return next_syscall(number, argument[0], argument[1], argument[2], argument[3],
                      argument[4], argument[5]);
}
int io_submit(void* context, long count, void** blocks) {
  long rc = next_syscall(SYS_io_submit, (long)context, count, (long)blocks, 0, 0, 0);
  return rc < 0 ? -errno : (int)rc;
}
"""

HALF_OF_IO_URING = r"""
#include <liburing.h>
int io_uring_submit(struct io_uring* ring) {
  int (*next)(struct io_uring*) = dlsym(RTLD_NEXT, "io_uring_submit");
  unsigned kept = (ring->sq.sqe_tail - ring->sq.sqe_head) / 2;
  if (kept > 0) hit();
  ring->sq.sqe_tail -= kept;
  int rc = next(ring);
  ring->sq.sqe_tail += kept;
  return rc;
}
"""

HALF_OF_A_WRITE = r"""
ssize_t pwrite(int fd, const void* data, size_t length, off_t offset) {
  size_t half = length / 2 / 4096 * 4096;
  if (half > 0) hit();
  return syscall(SYS_pwrite64, fd, data, half > 0 ? half : length, offset);
}
ssize_t pwrite64(int, const void*, size_t, off_t) __attribute__((alias("pwrite")));
"""

# The engine's are made by its I/O thread, all others by the main thread.
NO_THREADS = r"""
int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                   void* (*function)(void*), void* argument) {
  int (*next)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) =
      dlsym(RTLD_NEXT, "pthread_create");
  if (gettid() == getpid()) return next(thread, attributes, function, argument);
  hit();
  return EAGAIN;
}
"""

Injection = Strace | Preload

# By engine. strace counts each thread's calls apart. io_uring_enter both submits
# and waits: an I/O thread's first two submit; and as each is made again at once
# after EINTR, failing every other call meets waits too.
SUBMIT_EAGAIN: dict[str, Injection] = {
    "libaio": Strace("io_submit says EAGAIN", "io_submit", "error=EAGAIN:when=2..3"),
    "io_uring": Strace(
        "io_uring_enter says EAGAIN",
        "io_uring_enter",
        "error=EAGAIN:when=1..2",
        r"io_uring_enter\(\d+, [1-9]",
    ),
    "threads": Strace(
        "it submits nothing; pwrite says EAGAIN", "pwrite64", "error=EAGAIN:when=1..2"
    ),
}
SUBMIT_HALF: dict[str, Injection] = {
    "libaio": Preload("io_submit takes half", HALF_OF_LIBAIO),
    "io_uring": Preload("io_uring_submit takes half", HALF_OF_IO_URING, ("uring",)),
    "threads": Preload("it has no batches; pwrite takes half", HALF_OF_A_WRITE),
}
SETUP_REFUSED: dict[str, Injection] = {
    "libaio": Strace("io_setup says EAGAIN", "io_setup", "error=EAGAIN"),
    "io_uring": Strace("io_uring_setup says ENOMEM", "io_uring_setup", "error=ENOMEM"),
    "threads": Preload("pthread_create says EAGAIN", NO_THREADS),
}
WAIT_EINTR: dict[str, Injection] = {
    "libaio": Strace(
        "io_getevents says EINTR", "io_pgetevents,io_getevents", "error=EINTR:when=2..3"
    ),
    "io_uring": Strace(
        "io_uring_enter says EINTR", "io_uring_enter", "error=EINTR:when=1+2", "GETEVENTS"
    ),
    "threads": Strace(
        "it waits in its transfers; pwrite says EINTR", "pwrite64", "error=EINTR:when=1..2"
    ),
}


class Fault(NamedTuple):
    text: str
    action: Callable[[Any, Path], bool | str | None]
    surroundings: Callable[[Path], contextlib.AbstractContextManager[Path]] = plain
    injections: Mapping[str, Injection] | None = None


FAULTS = {
    "disk_full": Fault("4 MiB onto a file system of 2 MiB", disk_full, small),
    "file_size_limit": Fault("short write (RLIMIT_FSIZE)", file_size_limit),
    "misaligned_buffer": Fault("misaligned buffer", misaligned_buffer),
    "tail_of_512": Fault("512 byte tail, sectors of 4096", tail_of_512, sectors_of_4096),
    "device_eio": Fault("the device answers EIO to a read", read_back, broken_device),
    "truncated": Fault("file cut while it is read", truncated_meanwhile),
    "submit_eagain": Fault("io_submit says EAGAIN twice", many, plain, SUBMIT_EAGAIN),
    "submit_half": Fault("io_submit takes half of a batch", many, plain, SUBMIT_HALF),
    "setup_refused": Fault("io_setup is refused", many, plain, SETUP_REFUSED),
    "eintr": Fault("a signal while waiting for events", many, plain, WAIT_EINTR),
    "nothing_pending": Fault("wait() with nothing pending", nothing_pending),
    "longer_before": Fault("twelfth: shorter write over a longer file", longer_before),
}


def engine_in_use(who: str, engine: str) -> str:
    if who == "deepspeed":
        return "libaio"
    if engine != "auto":
        return engine
    from torch_ext._native import _C

    return next(name for name, why_not in _C.engine_info() if not why_not)


def injection_of(who: str, name: str, engine: str) -> Injection | None:
    injections = FAULTS[name].injections
    if injections is None:
        return None
    used = engine_in_use(who, engine)
    if used not in injections:
        raise NotTriedError(f"the {used} engine makes no such call")
    return injections[used]


def library_of(who: str) -> Callable[..., Any]:
    """What makes handles: imported, and DeepSpeed's compiled if it has to be."""
    if who == "ours":
        from torch_ext import aio_handle

        return aio_handle
    if who != "deepspeed":
        raise ValueError(f"{who} is neither ours nor deepspeed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().load().aio_handle


def child(who: str, name: str, place: Path, engine: str) -> int:
    try:
        make_handle = library_of(who)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"\nnot-tried {text}", flush=True)
        os._exit(0)
    if name == "load":
        print("\nsurvived", flush=True)
        os._exit(0)
    options = {"engine": engine} if who == "ours" else {}
    handle = make_handle(256 * 1024, 8, False, True, 1, **options)
    try:
        right = FAULTS[name].action(handle, place)
    except (OSError, ValueError) as error:
        print(f"\nreported {error}", flush=True)
    else:
        words = {None: "reported", True: "survived", False: "LOST"}
        word = words.get(right, right)
        what = getattr(handle, "errors", [""])[-1:]
        print(f"\n{word} {what[0] if what else ''}", flush=True)
    # Not through destructors, which have faults of their own.
    os._exit(0)


@functools.cache
def why_not_loaded(who: str) -> str:
    """Loads it in a process of its own, where nothing is broken; empty if that went well."""
    word, text = outcome_of([PYTHON, __file__, "--child", who, "load", "."], LOAD_SECONDS)
    if word == "HUNG":
        return (
            f"its op did not load within {LOAD_SECONDS} s; a build that was killed leaves "
            f"a file named lock in {extensions_folder()}, which has to be deleted"
        )
    return "" if word == "survived" else text


def extensions_folder() -> str:
    """Where torch.utils.cpp_extension builds; found without importing torch."""
    return os.environ.get("TORCH_EXTENSIONS_DIR") or str(
        Path.home() / ".cache/torch_extensions"
    )


def outcome_of(command: list[str], seconds: float = SECONDS) -> tuple[str, str]:
    """Runs a child. Returns its outcome in one word, and what there is to say about it."""
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return "HUNG", ""
    lines = [line for line in output.splitlines() if line.split(" ")[0] in WORDS]
    if not lines:
        return "ABORTED", f"exit status {child.returncode}"
    word, _, text = lines[-1].partition(" ")
    return word.replace("-", " "), text


def trial(who: str, name: str, directory: str, engine: str) -> tuple[str, str]:
    """What became of it, and in which words."""
    if why_not := why_not_loaded(who):
        return "not tried", why_not
    place = Path(tempfile.mkdtemp(prefix="torch_ext_test.", dir=directory))
    try:
        injection = injection_of(who, name, engine)
        prefix = injection.command(place) if injection else []
        with FAULTS[name].surroundings(place) as where:
            arguments = ["--child", who, name, str(where), "--engine", engine]
            python = sys.executable if prefix else PYTHON
            word, text = outcome_of([*prefix, python, __file__, *arguments])
        if injection is None or word == "not tried":
            return word, text
        times = injection.times(place)
        if times == 0 and word in GOOD:
            word = "NOT INJECTED"
        return word, f"{injection.text} ({times}x){text and '; '}{text}"
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
