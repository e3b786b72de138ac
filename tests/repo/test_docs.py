"""Pages are in plain English and within their size, and the site has what it should."""

import importlib
import re

import pytest
import tree


@pytest.fixture
def module():
    with tree.imports_from("tools", "docs/site"):
        yield importlib.import_module


def test_pages_are_in_plain_english(module):
    prose = module("prose")
    found = [finding for page in prose.pages() for finding in prose.findings(page)]
    assert found == []


LONG = " ".join(["we"] * 31)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.md", f"Short.\n{LONG}.\n", ["31 words"]),
        ("a.md", "- a\n- Of the two, one is right.\n", ["begins with a fragment"]),
        ("a.md", "It works. That which is left\nout does not.\n", ["begins with a fragment"]),
        ("a.md", "Then it were two.\n", ['"it were"']),
        ("a.md", f"[{'a' * 101}](b)\n", ["106 columns"]),
        ("a.md", f"| {LONG} |\n", ["31 words"]),
        ("a.md", f"| {'a ' * 29} | {'b ' * 29} |\n", []),
        ("a.md", f"```\n{LONG}, {LONG}\n```\n", []),
        ("a.md", f"<!-- figures -->\n{LONG}, {LONG}\n<!-- /figures -->\n", []),
        ("a.md", "A list of `Of the two` and [Of](b).\n", []),
        ("a.py", f'"""Short.\n\nOf x.\n"""\n# {LONG}.\n', ["begins with", "31 words"]),
        ("a.h", f"/// Of the two.\nint a;  ///< {LONG}.\n", ["begins with", "31 words"]),
        ("a.cpp", f'// Short.\n\n// {LONG[:20]}\nauto s = "http://{LONG}";\n', []),
    ],
)
def test_a_sentence_that_must_be_decoded_is_flagged(module, tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    flagged = list(module("prose").findings(tmp_path / name))
    assert len(flagged) == len(found), flagged
    assert all(part in line for part, line in zip(found, flagged, strict=True))


def test_the_architecture_is_read_in_ten_minutes():
    assert len((tree.ROOT / "docs/architecture.md").read_text().split()) <= 1800


def test_the_list_of_decisions_is_complete():
    listed = (tree.ROOT / "docs/decisions/README.md").read_text()
    pages = sorted((tree.ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert pages
    assert [page.name for page in pages if f"({page.name})" not in listed] == []


def test_every_page_has_its_place_in_the_site():
    index = (tree.ROOT / "docs/index.md").read_text().splitlines()
    pages = [page.stem for page in (tree.ROOT / "docs").glob("*.md") if page.stem != "index"]
    assert pages
    assert [page for page in pages if page not in index] == []


def test_the_reference_has_every_core_header():
    page = (tree.ROOT / "docs/reference/cpp.md").read_text()
    shown = re.findall(r"^```\{contracts\} (.*)$", page, re.MULTILINE)
    headers = [
        f.as_posix()
        for f in tree.cpp_files("include/")
        if f.parent.name != "tensor" and f.parent.name != "torch_ext"
    ]
    assert [header for header in headers if header not in shown] == []
    assert [header for header in shown if not (tree.ROOT / header).exists()] == []


def test_the_reference_has_every_public_name_of_python():
    import torch_ext

    page = (tree.ROOT / "docs/reference/python.md").read_text()
    shown = re.findall(r":: (?:torch_ext\.)?(\w+)", page)
    assert set(torch_ext.__all__) - {"__version__"} <= set(shown)


HEADER = """\
namespace torch_ext {

class Store;

/// How to make one.
struct Options {
  int depth = 8;  ///< Requests.
  /// Bytes.
  int size = {};
};

/// Keeps `things`.
/// Threads: any.
class Store {
 public:
  /// Adds one.
  explicit Store(Options options) : options_(options) { run(); }
  int size() const { return options_.size; }

 private:
  /// Not shown.
  void run();
  Options options_;
};

/// Two of them.
enum class Kind { kOne, kTwo };

/// The former name.
using Sort = Kind;
using Hidden = Kind;

namespace detail {
/// Not shown.
void help();
}  // namespace detail

/// Makes a store.
/// Errors: IoError.
Store make_store(
    Options options = {});

}  // namespace torch_ext
"""


def test_a_header_is_shown_as_its_contracts(module):
    pytest.importorskip("docutils", reason="make docs installs it")
    found = module("cpp_contracts").contracts(HEADER)
    shown = [
        (c.declaration, c.text, [(m.declaration, m.text) for m in c.members]) for c in found
    ]
    assert shown == [
        (
            "struct Options",
            "How to make one.",
            [("int depth = 8;", "Requests."), ("int size = {};", "Bytes.")],
        ),
        (
            "class Store",
            "Keeps `things`.\nThreads: any.",
            [
                ("explicit Store(Options options);", "Adds one."),
                ("int size() const;", ""),
            ],
        ),
        ("enum class Kind { kOne, kTwo };", "Two of them.", []),
        ("using Sort = Kind;", "The former name.", []),
        (
            "Store make_store(\n    Options options = {});",
            "Makes a store.\nErrors: IoError.",
            [],
        ),
    ]
