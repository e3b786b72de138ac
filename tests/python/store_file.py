"""A reader of stores that was written from docs/file_format.md alone."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Extent:
    size: int
    slot: int
    offsets: list[int]
    sums: int = 0


class StoreFile:
    """What docs/file_format.md says of a file of drive 0."""

    def __init__(self, path):
        self.path = Path(path)
        self.data = self.path.read_bytes()
        assert self.data[:8] == b"txSTORE\n"
        self.drive, self.drives, self.rank, self.world, self.epoch = struct.unpack_from(
            "<5I", self.data, 48
        )
        self.granule, self.block = struct.unpack_from("<QQ", self.data, 72)
        self.roots = [self._root(65536), self._root(131072)]
        newest = max((r for r in self.roots if r), key=lambda root: root["generation"])
        self.slot = self.roots.index(newest)
        self.tables = newest["tables"]
        self._table(self.tables[0].offsets[0])

    def _place(self, at):
        size, slot = struct.unpack_from("<QQ", self.data, at)
        return Extent(
            size, slot, list(struct.unpack_from(f"<{self.drives}Q", self.data, at + 16))
        )

    def _root(self, at):
        if self.data[at : at + 8] != b"txROOT \n":
            return None
        kind, _, generation, step = struct.unpack_from("<IIQQ", self.data, at + 24)
        assert kind == 1
        place = 16 + 8 * self.drives
        tables = [self._place(at + 56), self._place(at + 56 + place)]
        return {"generation": generation, "step": step, "tables": tables}

    def _table(self, at):
        assert self.data[at : at + 8] == b"txTABLE\n"
        numbers = struct.unpack_from("<QQqQQQ", self.data, at + 24)
        self.generation, self.step, self.time, kept, document, extents = numbers
        place = 16 + 8 * self.drives
        at += 72
        self.kept = [
            [self._place(at + i * (24 + 2 * place) + 24 + j * place) for j in (0, 1)]
            for i in range(kept)
        ]
        at += kept * (24 + 2 * place)
        lines = self.data[at : at + document].decode().split("\n")
        self.layout, self.changing = map(json.loads, lines)
        self.caller = json.loads(self.changing["caller"])
        at += document
        self.extents = []
        for _ in range(extents):
            extent = self._place(at)
            blocks = -(-self.padded(extent) // self.block)
            at += place + 8 * blocks
            self.extents.append(extent)

    def padded(self, extent):
        return -(-extent.size // self.granule) * self.granule

    def tile_of(self, name, *, values):
        """Extent, and the first byte of the parameter's part in it."""
        entry = self.caller["parameters"][name]
        state = self.layout["tiles"]
        tiles = self.layout["value_tiles"] if values else state
        number = entry["value" if values else "slot"]
        for i, (_, segments) in enumerate(tiles):
            for parameter, first, _, offset in segments:
                if (parameter, first) == (number, 0):
                    return self.extents[i + (len(state) if values else 0)], offset
        raise KeyError(name)

    def names_in(self, extent, begin, end):
        """The parameters that have bytes in a part of an extent."""
        index = self.extents.index(extent)
        state = self.layout["tiles"]
        key = "slot" if index < len(state) else "value"
        _, segments = [*state, *self.layout["value_tiles"]][index]
        offsets = sorted(offset for _, _, _, offset in segments)
        ends = dict(zip(offsets, [*offsets[1:], 2**62], strict=True))
        return {
            name
            for name, entry in self.caller["parameters"].items()
            for number, _, _, offset in segments
            if number == entry[key] and offset < end and begin < ends[offset]
        }
