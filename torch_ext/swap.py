"""Tensors on NVMe under a name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from torch_ext._checks import Directories, directories_of, engine_of
from torch_ext._closable import Closable
from torch_ext._modes import check_no_fake_mode
from torch_ext._native import _C
from torch_ext.config import AioConfig, parse_size, resolve_aio_config

#: swap_out() and swap_in() return this. See TensorSwapper.
TensorTicket = _C.TensorTicket
#: The former name, for one release.
SwapTicket = TensorTicket


class TensorSwapper(Closable):
    """Moves tensors between CPU or accelerator memory and a scratch file.

    ``swap_out`` and ``swap_in`` return a ticket at once. Copies and I/O run behind the
    computation, in the order of the current stream:

    * ``ticket.wait_source(timeout=None)`` returns when work that is queued from now on may
      overwrite the tensor that was swapped out. Dropping the tensor is always safe.
    * ``ticket.wait(timeout=None)`` returns when the bytes are on disk. For a swap-in, work that
      is queued from now on sees the bytes.
    * ``ticket.result(timeout=None)`` is ``wait()``, and returns the tensor that was swapped in.
    * ``ticket.done()`` tells whether the bytes are in place. It never blocks.

    The waits raise the operation's error, an OSError with errno, filename, offset and length.
    They raise TimeoutError after ``timeout`` seconds, while the operation goes on, and
    KeyboardInterrupt on Ctrl-C. An error that no ticket has raised is raised by the next
    ``swap_out`` or ``swap_in`` of that key, which then does nothing, or else by ``close()``.

    Operations on one key take effect in the order of the calls. A rewrite that fails leaves the
    old value. A key can be read many times. The file has no name. It is gone when the swapper
    is closed or the process ends, however it ends. Every block has a checksum in memory, which
    is compared on reading.

    Threads may share a swapper. A forked child may not use it (RuntimeError).

    Args:
        directory: Where the scratch file is made, on the drive to be used. For several drives,
            it is a list with a directory on each, or a dict of directories and weights. The
            blocks of each tensor go to them in turn, in proportion to the weights (1 to 100;
            all 1 for a list). Each drive has I/O threads of its own. A drive that fails or is
            full is an error that names its directory.
        config: What ``get_aio_config`` takes or returns. None: the defaults.
        host_memory: Bytes of page-locked host buffers, such as 2**28 or "256MiB"; at least
            ``block_size``.
        engine: "auto", or one that ``python -m torch_ext info`` lists.
        verify: Whether blocks carry checksums.

    Raises:
        OSError: The directory cannot be used.
        ValueError: A value is out of range. The text says which, and the range.

    Example:
        >>> with TensorSwapper("/mnt/nvme") as swapper:
        ...     swapper.swap_out("layer.0", tensor).wait_source()
        ...     tensor = swapper.swap_in("layer.0").result()
    """

    def __init__(
        self,
        directory: Directories,
        config: AioConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        host_memory: int | str = "256MiB",
        engine: str = "auto",
        verify: bool = True,
    ) -> None:
        self._swapper = _C.TensorSwapper(
            directories_of(directory, "directory"),
            resolve_aio_config(config, stacklevel=3),
            parse_size(host_memory),
            engine_of(engine),
            bool(verify),
        )
        self._own(self._swapper, "swapper")

    def swap_out(self, key: str, tensor: torch.Tensor) -> TensorTicket:
        """Stores the tensor's elements under ``key``. Returns a ticket at once.

        The tensor may have any dtype and shape. A view stores exactly its elements. A
        tensor that is not contiguous is packed first. The key's old value is replaced once the
        new one is complete.

        Raises:
            TypeError: The tensor has no plain memory. It is sparse, meta, quantized, nested, or
                of a subclass such as DTensor.
            RuntimeError: The swapper is closed or belongs to another process, or the current
                stream is being captured into a graph, or a FakeTensorMode is active.
        """
        check_no_fake_mode()
        try:
            return self._swapper.swap_out(key, tensor)
        except TypeError:
            _check_arguments(key, "tensor", tensor)
            raise

    def swap_in(
        self,
        key: str,
        out: torch.Tensor | None = None,
        device: torch.device | str | int | None = None,
        *,
        prefetch: bool = False,
    ) -> TensorTicket:
        """Brings the key's tensor back. Returns a ticket at once.

        Args:
            key: As given to ``swap_out``.
            out: Where the elements go, outside autograd. It may be any view with the stored
                shape and dtype, but on a device no lazily conjugate or negative one. It belongs
                to the swapper until the ticket's ``wait()``. None: a new tensor.
            device: Where the new tensor is made. None: where the old one was.
            prefetch: Whether the tensor is only needed later. What is needed now goes first,
                even if it is called afterwards. If they wait, one request in 16 is for what is
                prefetched, and one for what is written.

        Raises:
            KeyError: There is no such key.
            ValueError: Shape, dtype or device of ``out`` are not as asked for, or its elements
                share memory.
            TypeError, RuntimeError: As for ``swap_out``.
        """
        check_no_fake_mode()
        if device is not None:
            device = torch.device(device)
            if device.type == "cpu":
                device = torch.device("cpu")  # "cpu:0" is the same, but not equal.
            elif device.index is None:
                device = torch.empty(0, dtype=torch.uint8, device=device).device
        try:
            return self._swapper.swap_in(key, out, device, prefetch)
        except TypeError:
            _check_arguments(key, "out", out)
            raise

    def remove(self, key: str) -> None:
        """Forgets the key at once, whatever became of its operations.

        Operations that were already called still end. Then the key's space is used again. If
        nobody has seen their error, ``close()`` raises it, and neither this call nor later
        calls for the key.

        Raises:
            KeyError: There is no such key.
        """
        try:
            self._swapper.remove(key)
        except TypeError:
            _check_arguments(key)
            raise

    #: The former name of ``remove``.
    delete = remove

    def keys(self) -> list[str]:
        """Returns the keys that have a value, or will have one when their write ends."""
        return self._swapper.keys()

    def __contains__(self, key: object) -> bool:
        return key in set(self._swapper.keys())

    def __len__(self) -> int:
        return len(self._swapper.keys())

    def stats(self) -> dict[str, int]:
        """Returns counters since the swapper was made, also of a closed one.

        In bytes: ``bytes_out`` and ``bytes_in`` (of tensors whose operations ended well),
        ``host_bytes`` (of buffers), ``host_bytes_peak`` (the most in use at once),
        ``disk_bytes_written`` and ``disk_bytes_read`` (padded), ``disk_bytes_allocated``,
        ``disk_file_size``. Operations: ``operations``, ``failures``, ``in_flight``.

        Raises:
            RuntimeError: The swapper belongs to another process.
        """
        self._life.check_process()
        self._log_notes()
        return self._swapper.stats()

    @property
    def engine(self) -> str:
        """The name of the I/O engine in use. Raises RuntimeError as ``stats`` does."""
        self._life.check_process()
        return self._swapper.engine

    def close(self) -> None:
        """Waits for all operations, then frees memory and disk space.

        It may be called again. Later calls of anything but ``stats`` and ``engine`` raise
        RuntimeError.

        Raises:
            OSError: The first error that nobody has seen. Everything is closed then.
            RuntimeError: The swapper belongs to another process.
        """
        self._life.check_process()
        self._life.closed = True
        self._log_notes()
        self._swapper.close()


def _check_arguments(key: Any, name: str = "", tensor: Any = None) -> None:
    """Says in plain words what the compiled module has refused."""
    if not isinstance(key, str):
        raise TypeError(f"a key must be a str, not {type(key).__name__}") from None
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the key {key!r} cannot be written in UTF-8") from None
    if not isinstance(tensor, torch.Tensor) and (tensor is not None or name == "tensor"):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}") from None
