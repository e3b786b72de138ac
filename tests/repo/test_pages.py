"""What the pages tell people to type and to open is there."""

import re

import tree

PAGES = [f for f in tree.files() if f.suffix == ".md"]
TARGETS = set(
    re.findall(r"^([a-z-]+):", (tree.ROOT / "Makefile").read_text(), flags=re.MULTILINE)
)


def found_in_pages(pattern):
    return [
        (page, found)
        for page in PAGES
        for found in re.findall(pattern, (tree.ROOT / page).read_text(), flags=re.MULTILINE)
    ]


def test_make_targets_exist():
    named = found_in_pages(r"(?:`|^)make ([a-z-]+)")
    assert named
    assert [(page, target) for page, target in named if target not in TARGETS] == []


def test_links_into_the_tree_lead_somewhere():
    links = found_in_pages(r"\]\((?!\w+:|#)([^)#\s]+)")
    assert links
    broken = [
        (page, target)
        for page, target in links
        if not (tree.ROOT / page.parent / target).exists()
    ]
    assert broken == []


def test_figures_of_the_readme_are_those_of_the_benchmarks():
    figures = (tree.ROOT / "README.md").read_text().split("## Figures")[1].split("\n## ")[0]
    measured = (tree.ROOT / "benchmarks/README.md").read_text()
    measured = measured.split("<!-- figures -->")[1].split("<!-- /figures -->")[0]
    numbers = re.findall(r"\d+\.\d+", figures)
    assert numbers
    missing = set(numbers) - set(re.findall(r"\d+\.\d+", measured))
    assert not missing
