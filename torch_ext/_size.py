"""Sizes as text. Needs no compiled module, which ``python -m torch_ext info`` may lack."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """``count`` bytes for a reader: "1.5 GiB"."""
    power = min(max(count.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{count / 1024**power:.4g} {_UNITS[power]}"


def size_up(count: int) -> str:
    """As the argument of a size: no fewer bytes, rounded up to whole MiB or KiB."""
    power = 2 if count >= 16 << 20 else 1
    return f"{-(-count // 1024**power)} {_UNITS[power]}"
