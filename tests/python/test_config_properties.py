"""Properties of get_aio_config and parse_size that hold for every input."""

from __future__ import annotations

import json
import random
import warnings

from hypothesis import given, settings
from hypothesis import strategies as st

import torch_ext

MAXIMA = {"block_size": 2**30, "queue_depth": 65536, "thread_count": 256}
FLAGS = ("single_submit", "overlap_events")
KEYS = (*MAXIMA, *FLAGS, "intra_op_parallelism", "num_threads", "use_gds", "queue_dept")


def assert_in_range(config):
    assert list(config) == [*MAXIMA, *FLAGS]
    for knob, maximum in MAXIMA.items():
        assert type(config[knob]) is int
        assert 1 <= config[knob] <= maximum
    for knob in FLAGS:
        assert type(config[knob]) is bool


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(1, 300)
    | st.floats()
    | st.floats(allow_nan=False, allow_infinity=False, width=16)
    | st.text(max_size=20)
    | st.sampled_from(["1M", "4KiB", "true", "False", "auto", "8", "0", "-1", "2G"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(KEYS) | st.text(max_size=12)
sections = st.dictionaries(keys, values, max_size=8)


def outcome(param_dict):
    """The config, or ValueError where it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch_ext.get_aio_config(param_dict)
        except ValueError:
            return ValueError


@given(sections)
@settings(max_examples=300, deadline=None)
def test_any_section_gives_five_knobs_in_range_or_value_error(items):
    config = outcome({"aio": items})
    if config is not ValueError:
        assert_in_range(config)
        assert outcome({"aio": config}) == config


@given(sections)
@settings(max_examples=300, deadline=None)
def test_dict_and_json_text_have_the_same_outcome(items):
    try:
        text = json.dumps({"aio": items}, allow_nan=False)
    except ValueError:  # JSON has no NaN.
        return
    assert outcome(text) == outcome({"aio": items})


@given(st.text() | st.text(alphabet='{}[]",:aio 0123456789eE.-+"\\u'))
@settings(max_examples=300, deadline=None)
def test_any_text_after_a_brace_is_read_or_a_value_error(text):
    config = outcome("{" + text)
    if config is not ValueError:
        assert_in_range(config)


def test_random_bytes_in_a_file_are_read_or_a_value_error(tmp_path):
    generator = random.Random(20261122)
    original = b'{"a": [1, {"aio": null}], "aio": {"block_size": "1M", "num_threads": 2.0}}'
    path = tmp_path / "ds.json"
    read = 0
    for _ in range(300):
        content = bytearray(original)
        for _ in range(generator.randrange(4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content)
        config = outcome(path)
        if config is not ValueError:
            read += 1
            assert_in_range(config)
    assert 75 <= read < 300


@given(st.integers(0, 2**63 - 1), st.sampled_from(["", "B", " B", "b"]))
def test_parse_size_reads_back_every_number_of_bytes(count, unit):
    assert torch_ext.parse_size(f"{count}{unit}") == count
    assert torch_ext.parse_size(count) == count


@given(st.text() | st.from_regex(r"[0-9]{1,22}(\.[0-9]+)? ?[kmgt]?(i?b)?", fullmatch=True))
def test_parse_size_reads_any_text_or_raises_value_error(text):
    try:
        size = torch_ext.parse_size(text)
    except ValueError:
        return
    assert 0 <= size < 2**63
