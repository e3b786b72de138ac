"""Checks of arguments that swapper, handle and optimizers share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence


def directory_of(value: str | os.PathLike[str], name: str) -> str | bytes:
    """Returns the argument ``name`` as a path that the system can look for.

    Raises:
        TypeError: It is no path.
        ValueError: No path can look like this.
    """
    try:
        path = os.fspath(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a str or os.PathLike, not {type(value).__name__}"
        ) from None
    if not path:
        raise ValueError(f"{name} is empty; '.' is the current directory")
    if (b"\0" if isinstance(path, bytes) else "\0") in path:
        raise ValueError(f"{name} has a NUL character: {path!r}")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} has a character that no file name can have: {path!r}"
        ) from None
    return path


#: Where a store may be: a directory, several, or several with their weights.
Directories = (
    str
    | os.PathLike[str]
    | Sequence[str | os.PathLike[str]]
    | Mapping[str | os.PathLike[str], int]
)


def directories_of(value: Directories, name: str) -> list[tuple[str | bytes, int]]:
    """Returns the directories of the argument ``name`` with their weights.

    Raises:
        TypeError: It is neither a path nor paths, or a weight is no int.
        ValueError: There is none, no path can look like this, or a weight is
            out of range.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, Mapping)):
        return [(directory_of(value, name), 1)]
    several = value.items() if isinstance(value, Mapping) else [(path, 1) for path in value]
    weights: dict[str | bytes, int] = {}
    for path, weight in several:
        directory = directory_of(path, name)
        if directory in weights:
            raise ValueError(f"{name} has {directory!r} twice")
        if isinstance(weight, bool) or not isinstance(weight, int):
            raise TypeError(
                f"{name}: the weight of {directory!r} must be an int, not "
                f"{type(weight).__name__}"
            )
        if not 1 <= weight <= 100:
            raise ValueError(
                f"{name}: the weight of {directory!r} must be from 1 to 100, got {weight}"
            )
        weights[directory] = weight
    if not weights:
        raise ValueError(f"{name} names no directory")
    return list(weights.items())


def engine_of(value: str) -> str:
    """Returns the argument ``engine``. The compiled library knows the names."""
    if not isinstance(value, str):
        raise TypeError(
            f"engine must be a str such as 'auto' or 'libaio', not {type(value).__name__}"
        )
    return value.encode("utf-8", "backslashreplace").decode()


def state_format_of(value: str) -> str:
    """Returns the argument ``state_format``. The compiled library knows the names."""
    if not isinstance(value, str):
        raise TypeError(f"state_format must be a str, not {type(value).__name__}")
    return value


def state_dict_mode_of(value: str) -> str:
    """Returns the argument ``state_dict_mode``."""
    if not isinstance(value, str):
        raise TypeError(f"state_dict_mode must be a str, not {type(value).__name__}")
    if value not in ("tensors", "mapped", "commit"):
        raise ValueError(
            f'state_dict_mode must be "tensors", "mapped" or "commit", got {value!r:.80}'
        )
    return value


def keep_commits_of(value: int | None, state_dict_mode: str) -> int:
    """Returns the argument ``keep_commits``, with its default."""
    if state_dict_mode != "commit":
        if value is not None:
            raise ValueError(
                f'keep_commits is for state_dict_mode="commit", not for {state_dict_mode!r}; '
                f"commit() has keep="
            )
        return 1
    if value is None:
        return 2
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"keep_commits must be an int, not {type(value).__name__}")
    if not 1 <= value < 2**63:
        raise ValueError(f"keep_commits must be from 1 to 2**63 - 1, got {value}")
    return value


def max_grad_norm_of(value: float | None) -> float | None:
    """Returns the argument ``max_grad_norm``."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"max_grad_norm must be a number, not {type(value).__name__}")
    if not value > 0:
        raise ValueError(f"max_grad_norm must be more than 0, got {value}")
    return float(value)


def update_on_of(value: str) -> str:
    """Returns the argument ``update_on``. The compiled library knows the names."""
    if not isinstance(value, str):
        raise TypeError(f"update_on must be 'cpu' or 'cuda', not {type(value).__name__}")
    return value


def seed_of(value: int) -> int:
    """Returns the argument ``seed``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"seed must be an int, not {type(value).__name__}")
    if not 0 <= value < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, got {value}")
    return value
