"""export(): a commit becomes a file or directory that other tools read.

Tensors are written while they are read. So the state never is in memory as a whole, unless a
format has no other way; then it is in a mapped file without a name.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from torch_ext._checks import Directories, directory_of
from torch_ext._committed import LOST, MASTER, VALUE, Committed
from torch_ext._native import _C
from torch_ext.optim._committing import CommittingOptimizer

_Progress = Callable[[int, int], object]

FORMATS = ("safetensors", "dcp", "torch")

#: Tensors from here on are mapped, in bytes.
_LARGE = 1 << 20


def export(
    source: Directories | CommittingOptimizer,
    out: str | os.PathLike[str],
    format: str = "safetensors",
    *,
    step: int | None = None,
    overwrite: bool = False,
    progress: _Progress | None = None,
) -> None:
    """Writes a commit in a form that other tools read, and makes it durable.

    All of the commit is exported, from whatever shards it has: parameters, the optimizer's
    state, its groups and ``extra``, of which it is that of rank 0. Until all is complete,
    nothing is at ``out``, or what was there before. No lock is taken: a training may go on.
    If it overwrites the commit meanwhile, the export begins again, once.

    - ``"safetensors"``: one file. Tensors are called ``model.0.weight``,
      ``optim.state.0.weight.exp_avg`` and so on. Options and other values are the file's
      metadata, as JSON. Memory holds a few tiles of each shard.
    - ``"dcp"``: a directory for ``dcp.load``. It has the entries that
      ``torch_ext.dcp.CommitReader`` shows. Memory holds one tensor at a time.
    - ``"torch"``: a file for ``torch.load``, with the keys ``"model"``, ``"optim"`` and
      ``"extra"``. ``load_state_dict()`` of ``torch.optim.AdamW`` takes ``"optim"``, or that of
      the class of an ``OffloadedOptimizer``. Meanwhile large tensors lie in mapped files
      without a name beside ``out``, so the drive needs twice the space.

    Args:
        source: The directory of the commit, or directories as ``nvme_path`` takes them. Or an
            optimizer: then it is the commit that it has made, resumed or gone back to last.
        out: What is made: a file, or a directory for ``"dcp"``.
        format: One of these.
        step: The caller's number of a commit that is kept. None: the newest one.
        overwrite: Whether what is at ``out`` may be replaced. A directory has to be empty or a
            checkpoint of DCP. Links, devices and pipes are never replaced.
        progress: Called with the bytes that are done and all bytes, now and then.

    Raises:
        FileNotFoundError: Nothing was committed there.
        FileExistsError: ``out`` is there already.
        ValueError: There is no such format or commit, or two keys in ``extra`` get one name, as
            ``1`` and ``"1"`` do.
        RuntimeError: The optimizer has made no commit.
        OSError: Shards are missing (ENXIO), something is damaged (EIO), the training has gone
            on twice (ESTALE), or ``out`` cannot be written. It also is if that is a link
            (ELOOP), or a device or a pipe (EINVAL).

    Example:
        >>> torch_ext.export("/mnt/nvme/run1", "run1.safetensors")
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r:.80}")
    target = os.path.abspath(os.fsdecode(directory_of(out, "out")))
    _check_target(target, format, overwrite)
    path: Any = source
    if isinstance(source, CommittingOptimizer):
        if source.committed_step is None:
            raise RuntimeError("export(): the optimizer has made no commit; call commit()")
        path = dict(source._directories)
        step = source.committed_step if step is None else step
    write = {"safetensors": _to_safetensors, "dcp": _to_dcp, "torch": _to_torch}[format]
    for is_last in (False, True):
        committed = Committed.find(path, step)
        try:
            write(committed, target, progress)
            return
        except OSError as error:
            if error.errno not in LOST or not committed.moved_on():
                raise
            if is_last or step is not None:
                raise committed.stale() from error
        finally:
            committed.close()


def _check_target(target: str, format: str, overwrite: bool) -> None:
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise OSError(
            errno.ELOOP,
            "export: it is a link, and links are not followed: give what os.path.realpath() "
            "says of it",
            target,
        )
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(
            errno.EINVAL,
            "export: it is a device, a pipe or a socket, which is not replaced: give another "
            "out",
            target,
        )
    if not overwrite:
        raise FileExistsError(
            errno.EEXIST, "export: it is there already; overwrite=True replaces it", target
        )
    if format == "dcp":
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), target)
        names = os.listdir(target)
        if names and ".metadata" not in names:
            raise FileExistsError(
                errno.EEXIST,
                "export: the directory is no checkpoint of DCP, so it is not replaced",
                target,
            )
    elif stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)


# safetensors -----------------------------------------------------------------------------


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the tensors in a value by name, and what has none in it as it is."""
    if not _has_tensors(value) or isinstance(value, Tensor):
        yield name, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items:
        yield from _flat(f"{name}.{key}", each)


def _has_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)


def _text_of(value: Any) -> str:
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it, so that people can read it."""
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _plain(each) for key, each in value.items()}
        return [[_plain(key), _plain(each)] for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (bytes, bytearray)):
        return {"base64": base64.b64encode(value).decode()}
    return value


def _to_safetensors(committed: Committed, target: str, progress: _Progress | None) -> None:
    metadata = {"format": "pt", "step": str(committed.step)}
    tensors = []
    for part, content in committed.state_dict.items():
        for name, value in _entries(part, content):
            if isinstance(value, Tensor):
                tensors.append((name, value))
            elif name in metadata:  # Those of tensors are seen when the file is written.
                raise ValueError(
                    f"the header has the entry {name!r:.200} twice: rename one of the two keys "
                    f'in extra, or give format="torch"'
                )
            else:
                metadata[name] = _text_of(value)
    _C.export_tensors(target, _streams(committed, tensors), list(metadata.items()), progress)


def _entries(part: str, content: Any) -> Iterator[tuple[str, Any]]:
    """Yields the entries of the model, the optimizer or ``extra``."""
    if part != "optim":
        yield from _flat(part, content)
        return
    yield from _flat(f"{part}.state", content["state"])
    for i, group in enumerate(content["param_groups"]):
        for key, value in group.items():
            yield from _flat(f"{part}.param_groups.{i}.{key}", value)


def _streams(committed: Committed, tensors: list[tuple[str, Tensor]]) -> list[Any]:
    """Returns the tensors in the order of the file: by field, and then by parameter."""
    order: dict[str, int] = {}
    behind = 1 << 32  # What belongs to no parameter comes after those.
    streams = []
    for i, (name, tensor) in enumerate(tensors):
        stored = committed.stored(tensor)
        if stored is None:
            what, group, args = "", i, None
        else:
            what, group = stored.what, stored.group
            group = behind + i if group < 0 else group
            args = (what, committed.shards(stored), stored.layout, stored.of_parameter)
        order.setdefault(what, len(order))
        real = tensor if stored is None else None
        place = ({MASTER: 1, VALUE: 2, "": 3}.get(what, 0), order[what], group)
        streams.append((place, (name, tensor.dtype, list(tensor.shape), group, args, real)))
    return [stream for _, stream in sorted(streams, key=lambda each: each[0])]


# torch and DCP ---------------------------------------------------------------------------


def _counted(committed: Committed, progress: _Progress | None) -> None:
    """Reports what is read."""
    if progress is None:
        return
    total, done = committed.nbytes, 0

    def count(number: int) -> None:
        nonlocal done
        done += number
        progress(done, total)

    committed.on_read = count


def _to_torch(committed: Committed, target: str, progress: _Progress | None) -> None:
    folder = os.path.dirname(target)
    _counted(committed, progress)

    def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        empty = torch.empty(shape, dtype=dtype, device="meta")
        if empty.nbytes < _LARGE:
            return torch.empty_like(empty, device="cpu")
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, empty.nbytes)  # Else a full drive kills us.
            name = f"/proc/self/fd/{file.fileno()}"
            whole = torch.from_file(name, shared=True, size=empty.numel(), dtype=dtype)
        return whole.view(shape)

    content = committed.whole(committed.state_dict, mapped)
    optimizer = content["optim"]
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    number_of = {name: i for i, name in enumerate(names)}
    content["optim"] = {
        "state": {number_of.get(name, name): s for name, s in optimizer["state"].items()},
        "param_groups": [
            group | {"params": [number_of[name] for name in group["params"]]}
            for group in optimizer["param_groups"]
        ],
    }
    file, new = _new_file(target)
    try:
        with open(file, "wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
    _sync(folder)


def _new_file(target: str) -> tuple[int, str]:
    """Returns a new file beside ``target``, with the permissions that the umask leaves."""
    folder, name = os.path.split(target)
    while True:
        new = os.path.join(folder, f".{name}.{os.urandom(8).hex()}.torch_ext-new")
        with suppress(FileExistsError):
            return os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), new


def _to_dcp(committed: Committed, target: str, progress: _Progress | None) -> None:
    from torch_ext.dcp import write_checkpoint

    folder, name = os.path.split(target)
    _counted(committed, progress)
    new = tempfile.mkdtemp(prefix=f".{name}.", suffix=".torch_ext-new", dir=folder)
    old = None
    try:
        write_checkpoint(committed, new)
        for each in os.listdir(new):
            _sync(os.path.join(new, each))
        _sync(new)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(new, 0o777 & ~umask)
        if os.path.lexists(target):
            old = tempfile.mkdtemp(prefix=f".{name}.", suffix=".torch_ext-old", dir=folder)
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if old is not None and not os.path.lexists(target):
            os.rename(old, target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync(folder)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: str) -> None:
    """Makes a file or a directory durable."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
