"""Moves tensors through a TensorSwapper, all out or all in, as one transfer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from common import AIO

from torch_ext import TensorSwapper

PAGE = 4096


class Buffers:
    """Memory of ``count`` source tensors with random bytes, and as many destinations."""

    def __init__(self, count: int, size: int, device: str = "cpu") -> None:
        self.count, self.size = count, size
        self._source, self._out = (
            torch.zeros(count * size + 2 * PAGE, dtype=torch.uint8, device=device)
            for _ in range(2)
        )
        self._source.view(torch.int64).random_()

    @property
    def nbytes(self) -> int:
        return self.count * self.size

    def tensors(self, shift: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns sources and destinations that begin ``shift`` bytes into a page."""
        return self._cut(self._source, shift), self._cut(self._out, shift)

    def _cut(self, memory: torch.Tensor, shift: int) -> list[torch.Tensor]:
        first = -memory.data_ptr() % PAGE + shift
        starts = range(first, first + self.nbytes, self.size)
        return [memory[start : start + self.size] for start in starts]


class Transfer:
    """One swapper and the tensors that it moves."""

    def __init__(
        self,
        folder: Path,
        buffers: Buffers,
        *,
        shift: int = 0,
        verify: bool = True,
        engine: str = "auto",
    ) -> None:
        self.nbytes = buffers.nbytes
        self._sources, self._outs = buffers.tensors(shift)
        self._keys = [f"tensor.{i}" for i in range(buffers.count)]
        self._open = lambda: TensorSwapper(folder, AIO, engine=engine, verify=verify)
        self._synchronize: Callable[[], None] = (
            (lambda: None)
            if self._sources[0].device.type == "cpu"
            else torch.accelerator.synchronize
        )
        self._swapper = self._open()
        self.engine = self._swapper.engine
        self._filled = 0

    def fill(self) -> None:
        """Writes twice the space of the tensors, which is all that rewriting them needs."""
        spare = [f"spare.{key}" for key in self._keys]
        self._write(self._keys)
        self._write(spare)
        for key in spare:
            self._swapper.remove(key)
        self._filled = self._file_size()

    def grew(self) -> bool:
        """Whether the file is longer than fill() left it."""
        return self._file_size() > self._filled

    def renew(self) -> None:
        """Goes on with a new, empty file."""
        self._swapper.close()
        self._swapper = self._open()

    def write(self) -> None:
        self._write(self._keys)

    def read(self) -> None:
        swapper = self._swapper
        tickets = [
            swapper.swap_in(key, out=out)
            for key, out in zip(self._keys, self._outs, strict=True)
        ]
        for ticket in tickets:
            ticket.wait()
        self._synchronize()

    def check(self) -> None:
        """Reads once more and compares every byte."""
        for out in self._outs:
            out.zero_()
        self.read()
        for source, out in zip(self._sources, self._outs, strict=True):
            if not torch.equal(source, out):
                raise RuntimeError("what was read is not what was written")

    def close(self) -> None:
        self._swapper.close()

    def _file_size(self) -> int:
        return self._swapper.stats()["disk_file_size"]

    def _write(self, keys: list[str]) -> None:
        swapper = self._swapper
        tickets = [
            swapper.swap_out(key, source)
            for key, source in zip(keys, self._sources, strict=True)
        ]
        for ticket in tickets:
            ticket.wait()
