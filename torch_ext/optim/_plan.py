"""How an optimizer uses its budget of host memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch_ext._size import size, size_up


@dataclass(frozen=True)
class OffloadPlan:
    """How ``host_memory`` is shared out, in bytes. ``str()`` says it in words."""

    #: The budget.
    host_memory: int
    #: The part of the budget for what is converted, or on its way to and from a device.
    scratch_bytes: int
    #: The state of all parameters, in the state format.
    state_bytes: int
    #: State is read and written in tiles of at most this size.
    tile_bytes: int
    tiles: int
    #: Buffers that tiles pass through: read, updated, written.
    lane_buffers: int
    #: Tiles that stay in memory and cost no I/O.
    resident_tiles: int
    resident_bytes: int
    #: What a step of all parameters reads and writes together.
    step_bytes: int
    #: An optimizer with this ``host_memory`` or more would move nothing.
    host_memory_for_all: int
    #: What commits with ``keep=1`` take up on the drives: state and parameters twice. Each
    #: further commit that ``keep`` retains takes up half as much again. Scratch takes up the
    #: state alone. A drive's file grows by 16 MiB.
    commit_bytes: int

    def __str__(self) -> str:
        moved = self.tiles - self.resident_tiles
        share = self.resident_bytes / self.state_bytes if self.state_bytes else 1.0
        lines = [
            f"state:    {size(self.state_bytes)} in {self.tiles} tiles of up to "
            f"{size(self.tile_bytes)} (a 256th of the budget, 1 to 16 MiB, or less than 1 MiB "
            f"where that is an eighth)",
            f"budget:   {size(self.host_memory)}: {size(self.scratch_bytes)} scratch, "
            f"{self.lane_buffers} lane buffers, {self.resident_tiles} resident tiles",
            f"resident: {size(self.resident_bytes)} ({share:.0%}) stay in memory, spread "
            f"evenly over the order of visits",
        ]
        if moved:
            lines.append(
                f"a step:   reads and writes {moved} tiles, {size(self.step_bytes)} together; "
                f"up to {self.lane_buffers} are read ahead of it; with "
                f"host_memory={size_up(self.host_memory_for_all)!r} nothing would be moved"
            )
        else:
            lines.append("a step:   reads and writes nothing")
        lines.append(
            f"drives:   {size(self.state_bytes)}, or with commits {size(self.commit_bytes)}: "
            f"state and parameters twice"
        )
        return "\n".join(lines)
