"""The knobs without `aio` around them, in each form, and AioConfig itself."""

import json
import warnings

import pytest

from torch_ext import AioConfig, get_aio_config
from torch_ext.config import resolve_aio_config


@pytest.fixture(params=["dict", "text", "file", "path text"])
def given(request, tmp_path):
    """Turns a dict into each form that a configuration may have."""

    def give(config):
        text = json.dumps(config)
        path = tmp_path / "config.json"
        path.write_text(text)
        return {"dict": config, "text": text, "file": path, "path text": str(path)}[
            request.param
        ]

    return give


def warnings_of(config):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resolved = resolve_aio_config(config)
    assert all(w.filename == __file__ for w in caught)
    return resolved, [str(w.message) for w in caught]


def test_knobs_without_a_section_are_read(given):
    config = {"queue_depth": "3", "block_size": "2M", "num_threads": None}
    assert warnings_of(given(config)) == (AioConfig(queue_depth=3, block_size=2 << 20), [])
    assert resolve_aio_config(given({"num_threads": 2})).thread_count == 2


@pytest.mark.parametrize("value", [-5, 0, [8], {"a": 8}, 1.5, "many"], ids=str)
def test_a_wrong_knob_without_a_section_is_refused(given, value):
    with pytest.raises(ValueError, match=r"aio\.queue_depth is .*; allowed: an integer from 1"):
        resolve_aio_config(given({"queue_depth": value}))


def test_an_unknown_key_beside_a_knob_is_named(given):
    config, messages = warnings_of(given({"queue_depth": 3, "block_sise": 4096}))
    assert config == AioConfig(queue_depth=3)
    assert messages == ["aio.block_sise is unknown and ignored; did you mean block_size?"]


def test_a_section_goes_before_knobs_beside_it(given):
    ignored = ["queue_depth is not in the aio section and is ignored"]
    assert warnings_of(given({"queue_depth": -1, "aio": {"queue_depth": 4}})) == (
        AioConfig(queue_depth=4),
        ignored,
    )
    assert warnings_of(given({"aio": None, "queue_depth": -1})) == (AioConfig(), ignored)


def test_keys_that_mean_nothing_give_one_warning_in_the_same_words(given):
    for config in ({"queue_dept": 3}, {"zero_optimization": {"stage": 3}, "train": [1]}):
        assert warnings_of(given(config)) == (
            AioConfig(),
            [
                "the configuration has neither an aio section nor a key of one; "
                "the defaults are used"
            ],
        )
    assert warnings_of(given({})) == (AioConfig(), [])


def test_a_deepspeed_configuration_is_read_by_its_section_alone(given):
    with pytest.warns(UserWarning, match="^queue_depth is not in the aio section") as caught:
        assert get_aio_config(given({"queue_depth": -1}))["queue_depth"] == 8
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_aio_config(given({"zero_optimization": {}, "queue": 1}))["queue_depth"] == 8


def test_a_config_can_be_made_with_keywords_that_are_checked():
    config = AioConfig(block_size="512K", queue_depth=4.0, overlap_events="false")
    assert config == resolve_aio_config(
        {"block_size": 1 << 19, "queue_depth": 4, "overlap_events": False}
    )
    assert AioConfig(queue_depth=None) == AioConfig()
    for knob in ("block_size", "queue_depth", "thread_count"):
        with pytest.raises(ValueError, match=rf"aio\.{knob} is 0; allowed"):
            AioConfig(**{knob: 0})
    with pytest.raises(ValueError, match=r"aio\.single_submit is 3; allowed: true or false"):
        AioConfig(single_submit=3)
    with pytest.raises(TypeError, match="queue_depth"):
        AioConfig(queue=3)
    with pytest.raises(TypeError):
        AioConfig(4096)
