"""get_aio_config and its relatives, held against DeepSpeed's semantics."""

from __future__ import annotations

import collections
import json
import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import torch_ext
from torch_ext.config import resolve_aio_config

DEFAULTS = {
    "block_size": 1048576,
    "queue_depth": 8,
    "thread_count": 1,
    "single_submit": False,
    "overlap_events": True,
}
THREAD_COUNT_ALIASES = ("intra_op_parallelism", "num_threads")
SIZES = ("block_size",)
COUNTS = ("queue_depth", "thread_count", *THREAD_COUNT_ALIASES)
NUMBERS = SIZES + COUNTS
FLAGS = ("single_submit", "overlap_events")
MAXIMA = {"block_size": 2**30, "queue_depth": 65536, "thread_count": 256}


def section(**knobs):
    return torch_ext.get_aio_config({"aio": knobs})


def refusal(param_dict):
    with pytest.raises(ValueError, match="allowed: ") as caught:
        torch_ext.get_aio_config(param_dict)
    return str(caught.value)


# DeepSpeed's semantics ---------------------------------------------------------


def test_default_dict_has_the_values_of_deepspeed():
    assert torch_ext.AIO_DEFAULT_DICT == DEFAULTS


@pytest.mark.parametrize(
    "param_dict", [{}, {"aio": None}, {"aio": {}}, {"train_batch_size": 8}], ids=str
)
def test_missing_null_or_empty_section_gives_the_defaults(param_dict):
    assert torch_ext.get_aio_config(param_dict) == DEFAULTS
    assert torch_ext.get_aio_config(json.dumps(param_dict)) == DEFAULTS


@pytest.mark.parametrize("param_dict", [{}, {"aio": None}, {"aio": {}}], ids=str)
def test_result_is_a_new_dict_each_time(param_dict):
    first = torch_ext.get_aio_config(param_dict)
    first["queue_depth"] = 99
    assert torch_ext.get_aio_config(param_dict) == DEFAULTS
    assert torch_ext.AIO_DEFAULT_DICT == DEFAULTS


def test_given_knobs_are_read_and_the_others_keep_their_defaults():
    given_knobs = {"block_size": 4096, "queue_depth": 32, "thread_count": 2}
    assert section(**given_knobs) == DEFAULTS | given_knobs
    everything = dict(zip(DEFAULTS, (262144, 16, 4, True, False), strict=True))
    assert section(**everything) == everything


def test_the_input_is_not_changed():
    param_dict = {"aio": {"block_size": "1M", "queue_depth": None}}
    torch_ext.get_aio_config(param_dict)
    assert param_dict == {"aio": {"block_size": "1M", "queue_depth": None}}


@pytest.mark.parametrize("value", [1, 0, False, "", [], {}, "auto"], ids=repr)
def test_get_scalar_param_returns_what_is_there(value):
    assert torch_ext.get_scalar_param({"a": value}, "a", 2) is value


@pytest.mark.parametrize("param_dict", [{}, {"a": None}], ids=str)
def test_get_scalar_param_returns_the_default_for_what_is_missing_or_none(param_dict):
    get = torch_ext.get_scalar_param
    assert get(param_dict, "a", 2) == 2
    assert get(param_dict, "a", None) is None
    assert get(param_dict=param_dict, param_name="a", param_default_value=2) == 2
    assert get(param_dict, name="a", default=2) == 2  # The names of earlier releases.


def test_get_scalar_param_needs_each_argument_once():
    get = torch_ext.get_scalar_param
    for arguments in ({}, {"param_name": "a"}, {"param_default_value": 1}):
        with pytest.raises(TypeError, match="is missing"):
            get({}, **arguments)
    with pytest.raises(TypeError, match="'param_name' is given twice, also as 'name'"):
        get({}, "a", 1, name="b")


@pytest.mark.parametrize("key", NUMBERS + FLAGS)
def test_a_key_that_is_none_has_its_default_in_every_form_of_the_configuration(key, tmp_path):
    default = torch_ext.AioConfig()
    for config in ({"aio": {key: None}}, {key: None}, {"aio": None}):
        text = json.dumps(config)
        file = tmp_path / "config.json"
        file.write_text(text)
        for form in (config, text, file):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert resolve_aio_config(form) == default
                if "aio" in config:
                    assert torch_ext.get_aio_config(form) == torch_ext.AIO_DEFAULT_DICT
    if key in torch_ext.AIO_DEFAULT_DICT:
        assert torch_ext.AioConfig(**{key: None}) == default


# Values ------------------------------------------------------------------------


@pytest.mark.parametrize("key", NUMBERS + FLAGS)
@pytest.mark.parametrize("value", [None, "auto", "AUTO"])
def test_null_or_auto_means_the_default(key, value):
    assert section(**{key: value}) == DEFAULTS


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("block_size", 1e6, 1_000_000),
        ("block_size", 1048576.0, 1048576),
        ("block_size", "1M", 1 << 20),
        ("block_size", "512KiB", 1 << 19),
        ("block_size", "2 MB", 2_000_000),
        ("block_size", "1048576", 1 << 20),
        ("block_size", 1, 1),
        ("block_size", 2**30, 2**30),
        ("block_size", np.int64(4096), 4096),
        ("queue_depth", 8.0, 8),
        ("queue_depth", "8", 8),
        ("queue_depth", np.uint8(9), 9),
        ("queue_depth", np.float64(9), 9),
        ("queue_depth", 65536, 65536),
        ("thread_count", 256, 256),
        ("thread_count", "16", 16),
        ("single_submit", True, True),
        ("single_submit", "true", True),
        ("single_submit", "TRUE", True),
        ("overlap_events", False, False),
        ("overlap_events", "False", False),
    ],
)
def test_value_is_read(key, value, expected):
    config = section(**{key: value})
    assert config == DEFAULTS | {key: expected}
    assert type(config[key]) is type(expected)


NO_NUMBERS = [
    *[0, -1, 0.0, -0.0, 1.5, -1e6, True, False, math.nan, math.inf, -math.inf, 1e300],
    *[-(2**31), 2**31, 2**32 + 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**63) - 1],
    *[10**30, 10**5000, "", "-1", "0", " 8", "8 ", "1.5", "true", "0x10", "1e3", "NaN"],
    *["18446744073709551617", "1\x002", "\ud800", "८", [], [8], {}, {"a": 8}, (8,), b"8"],
    *[object(), 8j, np.bool_(True), np.array([8, 8]), print],
]


def name_of(value):
    if isinstance(value, int) and abs(value) >= 2**70:
        return "huge"
    name = ascii(value)
    # Processes that share the tests out compare their names.
    return type(value).__name__ if " at 0x" in name else name[:40]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=name_of)
@pytest.mark.parametrize("key", NUMBERS)
def test_number_refuses_and_names_key_value_and_range(key, value):
    text = refusal({"aio": {key: value}})
    maximum = MAXIMA.get(key, MAXIMA["thread_count"])
    assert text.startswith(f"aio.{key} is ")
    assert f"allowed: an integer from 1 to {maximum}" in text


@pytest.mark.parametrize(
    "value", [0, 1, 1.0, -1, "", "1", "yes", " true", "\ud800", [], [True], {}, math.nan, 2**70]
)
@pytest.mark.parametrize("key", FLAGS)
def test_flag_refuses_and_names_key_value_and_range(key, value):
    text = refusal({"aio": {key: value}})
    assert text.startswith(f"aio.{key} is ")
    assert "allowed: true or false" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (-3, "-3"),
        (2**63, "9223372036854775808"),
        (2**64, "18446744073709551616"),
        (-(2**64), "-18446744073709551616"),
        (1.5, "1.5"),
        (math.nan, "nan"),
        (True, "true"),
        ("abc", '"abc"'),
        ([1, 2], "[1, 2]"),
        ("\ud800", '"\\ud800"'),
    ],
)
def test_refusal_shows_the_value(value, shown):
    assert refusal({"aio": {"queue_depth": value}}) == (
        f"aio.queue_depth is {shown}; allowed: an integer from 1 to 65536"
    )


def test_one_beyond_each_limit_is_refused():
    for knob, maximum in MAXIMA.items():
        assert section(**{knob: maximum})[knob] == maximum
        assert str(maximum + 1) in refusal({"aio": {knob: maximum + 1}})


def test_counts_are_not_sizes():
    for key in COUNTS:
        refusal({"aio": {key: "1K"}})


class Hostile:
    def __repr__(self):
        raise RuntimeError("no")


def test_value_whose_repr_fails_is_refused_by_its_type():
    assert "Hostile" in refusal({"aio": {"queue_depth": Hostile()}})
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert "aio.queue_depth is <list>" in refusal({"aio": {"queue_depth": nested}})


# Keys --------------------------------------------------------------------------


@pytest.mark.parametrize("alias", THREAD_COUNT_ALIASES)
def test_alias_of_thread_count_is_read_without_a_warning(alias):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert section(**{alias: 4}) == DEFAULTS | {"thread_count": 4}


def test_names_of_thread_count_may_agree_but_not_differ():
    assert section(thread_count=4, num_threads="4", intra_op_parallelism=4.0) == (
        DEFAULTS | {"thread_count": 4}
    )
    assert section(thread_count=None, num_threads=4)["thread_count"] == 4
    text = refusal({"aio": {"thread_count": 1, "num_threads": 4}})
    assert "aio.thread_count is 1" in text
    assert "aio.num_threads" in text
    assert "is 4" in text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("queue_dept", "queue_depth"),
        ("Block_Size", "block_size"),
        ("thread-count", "thread_count"),
        ("num_thread", "num_threads"),
        ("overlap_event", "overlap_events"),
        ("use_gds", "GPUDirect storage is not used"),
        ("anything", "queue_depth"),
        ("\ud800", "queue_depth"),
    ],
)
@pytest.mark.parametrize("value", [3, None, [1]], ids=str)
def test_unknown_key_warns_names_the_nearest_and_changes_nothing(key, nearest, value):
    with pytest.warns(UserWarning, match=nearest) as caught:
        assert section(**{key: value, "queue_depth": 2}) == DEFAULTS | {"queue_depth": 2}
    assert len(caught) == 1
    assert ascii(key)[1:-1] in str(caught[0].message)


def test_warning_points_at_the_caller(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"aio": {"queue_dept": 1}}')
    for param_dict in ({"aio": {"queue_dept": 1}}, path.read_text(), path):
        with pytest.warns(UserWarning, match="queue_dept") as caught:
            torch_ext.get_aio_config(param_dict)
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match="queue_dept") as caught:
            resolve_aio_config(param_dict)
        assert caught[0].filename == __file__


def test_other_sections_are_not_judged():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch_ext.get_aio_config({"zero_optimization": {"aio": 5}, 3: 4, "queue": -1})


@pytest.mark.parametrize("key", [1, None, b"queue_depth", ("a",)], ids=str)
def test_key_that_is_not_a_string_is_refused(key):
    with pytest.raises(ValueError, match="which is not a string"):
        torch_ext.get_aio_config({"aio": {key: 1}})


# Sections and whole configurations ---------------------------------------------


@pytest.mark.parametrize("value", [[], [{}], "x", "auto", 5, -5, 1.5, True, False, 0, ""])
def test_section_of_another_kind_is_refused(value):
    assert refusal({"aio": value}).startswith("aio is ")
    assert refusal(json.dumps({"aio": value})).startswith("aio is ")


@pytest.mark.parametrize(
    "value", [None, 5, 1.5, b"{}", [("aio", {})], {1}, object()], ids=name_of
)
def test_configuration_of_another_kind_is_a_type_error(value):
    with pytest.raises(TypeError, match="a configuration is a dict, JSON text or the path"):
        torch_ext.get_aio_config(value)


def test_any_mapping_will_do():
    inner = collections.ChainMap({"queue_depth": 3}, {"block_size": "4K"})
    config = torch_ext.get_aio_config(collections.UserDict(aio=inner))
    assert config == DEFAULTS | {"queue_depth": 3, "block_size": 4096}


@pytest.mark.parametrize("prefix", ["", "\ufeff", " \n\t\r"])
def test_json_text_may_begin_with_white_space_or_a_byte_order_mark(prefix):
    text = prefix + '{"aio": {"queue_depth": 3}}'
    assert torch_ext.get_aio_config(text)["queue_depth"] == 3


@pytest.mark.parametrize(
    ("text", "byte"),
    [
        ("{", 2),
        ('{"aio": {"queue_depth": 8,}}', 27),
        ('{"aio": {"queue_depth": NaN}}', 25),
        ('{"aio": {}} // comment', 13),
        ("{'aio': {}}", 2),
        ('{"a": "\ud800"}', 9),
        ('{"a": "\\ud800"}', 14),
        ('{"a": \0}', 7),
        ('{"aio": ' + "[" * 1_000_000, 1_000_009),
    ],
    ids=lambda value: None,
)
def test_bad_json_is_refused_with_its_position(text, byte):
    if "[[" in text:
        text = text.replace("aio", "x")
        byte -= 2
    with pytest.raises(ValueError, match=rf"^bad JSON at byte {byte}\b"):
        torch_ext.get_aio_config(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"aio": {"queue_depth": 1, "queue_depth": 1}}',
        '{"aio": {"x": 1, "x": 2}}',
        '{"aio": {}, "aio": null}',
        '{"a": 1, "a": 1}',
    ],
)
def test_duplicate_keys_are_refused(text):
    with pytest.raises(ValueError, match="is given twice"):
        torch_ext.get_aio_config(text)


def test_overflowing_number_in_json_names_key_value_and_range():
    assert refusal('{"aio": {"queue_depth": 1e400}}') == (
        "aio.queue_depth is 1e400; allowed: an integer from 1 to 65536"
    )


def test_deep_nesting_and_long_text_are_read():
    deep = "[" * 1_000_000 + "]" * 1_000_000
    long = '"' + "x" * 20_000_000 + '"'
    text = f'{{"a": {deep}, "b": {long}, "aio": {{"queue_depth": 3}}}}'
    assert torch_ext.get_aio_config(text)["queue_depth"] == 3


# Files -------------------------------------------------------------------------


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", ["ds.json", "ds config.txt", "größe.json"])
@pytest.mark.parametrize("kind", [Path, str])
def test_path_of_a_file_is_read(tmp_path, name, kind):
    path = write(tmp_path / name, '\ufeff{"aio": {"queue_depth": 3}}')
    assert torch_ext.get_aio_config(kind(path)) == DEFAULTS | {"queue_depth": 3}


def test_path_that_is_not_utf8_is_read(tmp_path):
    path = write(tmp_path / os.fsdecode(b"\xff.json"), '{"aio": {"queue_depth": 0}}')
    with pytest.raises(ValueError, match="queue_depth is 0") as caught:
        torch_ext.get_aio_config(path)
    assert os.fspath(path) in str(caught.value)


def test_file_that_cannot_be_read_is_an_os_error_with_the_path(tmp_path):
    missing = tmp_path / "missing.json"
    with pytest.raises(FileNotFoundError) as caught:
        torch_ext.get_aio_config(missing)
    assert os.fspath(caught.value.filename) == os.fspath(missing)
    with pytest.raises(IsADirectoryError):
        torch_ext.get_aio_config(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        torch_ext.get_aio_config("")
    with pytest.raises(ValueError, match="null"):
        torch_ext.get_aio_config("a\0b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "bad JSON at byte 1"),
        ("[]", "the configuration is a list; allowed: an object"),
        ("8", "the configuration is 8; allowed: an object"),
        (b"{\xff}", "bad JSON at byte 2"),
        ('{"aio": {"queue_depth": 0}}', "aio.queue_depth is 0; allowed: "),
    ],
)
def test_bad_file_is_a_value_error_that_begins_with_its_path(tmp_path, content, message):
    path = write(tmp_path / "ds.json", content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {message}")):
        torch_ext.get_aio_config(path)


# resolve_aio_config, AioConfig, parse_size -------------------------------------


def test_resolve_takes_whatever_means_a_configuration(tmp_path):
    expected = resolve_aio_config({"aio": {"queue_depth": 3}})
    assert isinstance(expected, torch_ext.AioConfig)
    assert expected.queue_depth == 3
    assert resolve_aio_config(expected) is expected
    assert resolve_aio_config({"queue_depth": 3}) == expected
    assert resolve_aio_config(torch_ext.get_aio_config({"aio": {"queue_depth": 3}})) == expected
    assert resolve_aio_config('{"aio": {"queue_depth": 3}}') == expected
    path = write(tmp_path / "ds.json", '{"aio": {"queue_depth": 3}}')
    assert resolve_aio_config(path) == resolve_aio_config(str(path)) == expected
    for alias in THREAD_COUNT_ALIASES:
        assert resolve_aio_config({alias: 2}).thread_count == 2


def test_resolve_gives_defaults_for_nothing():
    default = torch_ext.AioConfig()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in (None, {}, {"aio": None}):
            assert resolve_aio_config(config) == default


def test_resolve_warns_where_no_key_is_known():
    with pytest.warns(UserWarning, match="the defaults are used") as caught:
        assert resolve_aio_config({"queue_dept": 3}) == torch_ext.AioConfig()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("config", [5, [], b"{}"])
def test_resolve_refuses_other_types(config):
    with pytest.raises(TypeError):
        resolve_aio_config(config)


def test_resolve_checks_values():
    with pytest.raises(ValueError, match=r"aio\.queue_depth is 0; allowed"):
        resolve_aio_config({"queue_depth": 0})


def test_aio_config_is_read_only_and_says_what_it_holds():
    config = torch_ext.AioConfig()
    with pytest.raises(AttributeError):
        config.queue_depth = 3
    assert repr(config) == (
        "AioConfig(block_size=1048576, queue_depth=8, thread_count=1, "
        "single_submit=False, overlap_events=True)"
    )
    assert config == torch_ext.AioConfig()
    assert config != resolve_aio_config({"queue_depth": 3})
    assert config != 5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(0, 0), (4096, 4096), (2**63 - 1, 2**63 - 1), (np.int64(7), 7)],
        *[("4096", 4096), ("1K", 1024), ("1KB", 1000), ("1.5 GiB", 3 << 29), ("2t", 2 << 40)],
    ],
)
def test_parse_size_reads(value, expected):
    assert torch_ext.parse_size(value) == expected
    assert type(torch_ext.parse_size(value)) is int


@pytest.mark.parametrize(
    "value", [-1, 2**63, "", "1X", "-1K", "0.5", "8388608T", "\ud800", "1\0"]
)
def test_parse_size_refuses_values(value):
    with pytest.raises(ValueError, match="size"):
        torch_ext.parse_size(value)


@pytest.mark.parametrize("value", [None, True, 1.5, 1e9, b"1K", [1]], ids=str)
def test_parse_size_refuses_types(value):
    with pytest.raises(TypeError, match="a size is an int or a str"):
        torch_ext.parse_size(value)
