"""What the pages tell people to type and to open is there."""

import re

import pytest
import tree

PAGES = [f for f in tree.files() if f.suffix == ".md"]
TARGETS = set(
    re.findall(r"^([a-z-]+):", (tree.ROOT / "Makefile").read_text(), flags=re.MULTILINE)
)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_make_targets_exist(page):
    text = (tree.ROOT / page).read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert named <= TARGETS


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_into_the_tree_lead_somewhere(page):
    text = (tree.ROOT / page).read_text()
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
        assert (tree.ROOT / page.parent / target).exists(), target


def test_figures_of_the_readme_are_those_of_the_benchmarks():
    figures = (tree.ROOT / "README.md").read_text().split("## Figures")[1].split("\n## ")[0]
    measured = (tree.ROOT / "benchmarks/README.md").read_text()
    measured = measured.split("<!-- figures -->")[1].split("<!-- /figures -->")[0]
    numbers = re.findall(r"\d+\.\d+", figures)
    assert numbers
    missing = set(numbers) - set(re.findall(r"\d+\.\d+", measured))
    assert not missing
