"""The `aio` section of a DeepSpeed configuration."""

from __future__ import annotations

import operator
import os
import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

from torch_ext._native import _C

AioConfig = _C.AioConfig

_KNOBS = ("block_size", "queue_depth", "thread_count", "single_submit", "overlap_events")

_OMITTED: Any = object()

_Config = Mapping[str, Any] | str | os.PathLike[str]
#: With what the user should be told.
_Parsed = tuple[AioConfig, list[str]]


def _as_dict(config: AioConfig) -> dict[str, int | bool]:
    return {knob: getattr(config, knob) for knob in _KNOBS}


#: The five knobs at their defaults, for reading: get_aio_config() makes copies.
AIO_DEFAULT_DICT: dict[str, int | bool] = _as_dict(AioConfig())


def get_scalar_param(
    param_dict: Mapping[str, Any],
    param_name: Any = _OMITTED,
    param_default_value: Any = _OMITTED,
    *,
    name: Any = _OMITTED,
    default: Any = _OMITTED,
) -> Any:
    """Returns ``param_dict[param_name]``, or the default where it is missing or None.

    DeepSpeed's function of this name passes None through. Here a null in a configuration
    means the default, as everywhere in the ``aio`` section.

    Args:
        param_dict: A configuration or a section of one.
        param_name: The key.
        param_default_value: What is returned where there is no value.
        name: The former name of ``param_name``.
        default: The former name of ``param_default_value``.
    """
    key = _given("param_name", param_name, "name", name)
    fallback = _given("param_default_value", param_default_value, "default", default)
    value = param_dict.get(key)
    return fallback if value is None else value


def _given(name: str, value: Any, old_name: str, old: Any) -> Any:
    """Returns the value under the one of an argument's two names that the caller has used."""
    if (value is _OMITTED) == (old is _OMITTED):
        how = "is missing" if value is _OMITTED else f"is given twice, also as {old_name!r}"
        raise TypeError(f"get_scalar_param(): the argument {name!r} {how}")
    return old if value is _OMITTED else value


def get_aio_config(param_dict: _Config) -> dict[str, int | bool]:
    """Reads the `aio` section of a DeepSpeed configuration.

    Args:
        param_dict: The configuration as a dict, as JSON text (which begins with
            ``{``) or as the path of a JSON file.

    Returns:
        A new dict with ``block_size``, ``queue_depth``, ``thread_count``,
        ``single_submit`` and ``overlap_events``. What is missing, null or ``"auto"`` has its
        default. Unknown keys in ``aio`` are ignored with a UserWarning. So are the five keys
        outside ``aio``, which other functions take alone: see ``resolve_aio_config``.

    Raises:
        ValueError: A value is wrong, or the JSON is bad. The text names key, value and what is
            allowed.
        OSError: The file cannot be read.
        TypeError: ``param_dict`` is none of the above.
    """
    return _as_dict(_warned(_read(param_dict, bare=False), stacklevel=3))


def resolve_aio_config(config: AioConfig | _Config | None, stacklevel: int = 2) -> AioConfig:
    """Returns the AioConfig that ``config`` means.

    It takes what get_aio_config() takes, None (the defaults), and an AioConfig. It also takes
    the knobs without ``aio`` around them, as get_aio_config() returns them, as a dict, JSON
    text or file. A configuration that has keys, but neither ``aio`` nor a knob, gives a
    UserWarning.

    Args:
        config: What the user gave.
        stacklevel: The frame that warnings name; 2 is the caller.
    """
    if config is None:
        return AioConfig()
    if isinstance(config, AioConfig):
        return config
    return _warned(_read(config, bare=True), stacklevel + 1)


def parse_size(value: int | str) -> int:
    """Returns the bytes that a size such as 4096, "64MiB" or "1.5G" means.

    K, M, G, T and KiB to TiB are powers of 1024. KB to TB are powers of 1000.

    Raises:
        ValueError: The size is negative, 2^63 or more, or cannot be read.
        TypeError: ``value`` is neither an integer nor a string.
    """
    if isinstance(value, str):
        return _C.parse_size(value.encode("utf-8", "backslashreplace"))
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"a size is an int or a str such as '64MiB', not {value!r}")
    size = operator.index(value)
    if not 0 <= size < 2**63:
        raise ValueError(f"the size {value!r} is not from 0 to 2^63 - 1")
    return size


def _read(config: _Config, bare: bool) -> _Parsed:
    """``bare``: the configuration may be a section itself."""
    if isinstance(config, Mapping):
        return _read_dict(config, bare)
    parse = _C.parse_aio_settings if bare else _C.parse_aio_config
    if isinstance(config, str) and config.lstrip("\ufeff \t\r\n").startswith("{"):
        # A lone surrogate becomes bytes that the parser refuses. It names their place.
        return parse(config.encode("utf-8", "surrogatepass"))
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(
            f"a configuration is a dict, JSON text or the path of a JSON file, "
            f"not {reprlib.repr(config)}"
        )
    with open(config, "rb") as file:
        text = file.read()
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(config)}: {error}") from None


def _read_dict(config: Mapping[Any, Any], bare: bool) -> _Parsed:
    section = config.get("aio")
    if section is not None and not isinstance(section, Mapping):
        raise ValueError(f"aio is {reprlib.repr(section)}; allowed: a dict or None")
    if bare and "aio" not in config and any(key in config for key in _C.aio_keys()):
        top = dict(config)
    else:  # Only the keys count.
        top = dict.fromkeys(str(key) for key in config if key != "aio")
    return _C.read_aio_config(top, dict(section or {}) if "aio" in config else None, bare)


def _warned(parsed: _Parsed, stacklevel: int) -> AioConfig:
    config, messages = parsed
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel)
    return config
