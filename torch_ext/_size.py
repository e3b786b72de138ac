"""Sizes as text. They need no compiled module: ``python -m torch_ext info`` may lack it."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """Returns ``count`` bytes as a reader wants them: "1.5 GiB"."""
    power = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{count / 1024**power:.4g} {_UNITS[power]}"


def size_up(count: int) -> str:
    """Returns the bytes as an argument for a size, rounded up to whole MiB or KiB."""
    power = 2 if count >= 16 << 20 else 1
    return f"{-(-count // 1024**power)} {_UNITS[power]}"
