"""sources.json is the one list of sources, so it has to be right."""

import json
from collections import Counter
from pathlib import Path

import tree


def listed():
    return json.loads((tree.ROOT / "csrc/sources.json").read_text())


def test_every_source_is_listed_and_exists():
    # The module compiles some of what a LibTorch program compiles too: these stand twice.
    sources = {source for sources in listed().values() for source in sources}
    there = {
        f.relative_to("csrc").as_posix() for f in tree.cpp_files("csrc/") if f.suffix == ".cpp"
    }
    assert sources == there


def test_no_list_has_a_source_twice():
    for sources in listed().values():
        assert len(sources) == len(set(sources))


def test_lists_are_sorted_and_the_core_has_no_bindings():
    for sources in listed().values():
        assert sources == sorted(sources)
    assert not [s for s in listed()["core"] if s.startswith("bindings/")]


def test_base_names_differ_because_torch_puts_all_objects_in_one_folder():
    sources = listed()["core"] + listed()["bindings"]
    names = Counter(Path(source).stem for source in sources)
    assert not [name for name, count in names.items() if count > 1]
