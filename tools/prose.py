"""Plain English: flags sentences that a reader has to decode.

Pages may have no sentence of more than 30 words, no line of more than 100 columns, no sentence
that begins with "Of" or "That which", and no ``it were``. A cell of a table is checked as a
sentence; its line may be as long as it likes. Code, pictures and what a program puts between
marks such as ``<!-- figures -->`` are left out.

    tools/prose.py [FILE ...]    without files: those that PAGES and CODE name

In Python and C++ files it reads comments and docstrings, and leaves the length of lines to the
formatters. Exit status: 1 if anything is flagged.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_WORDS = 30
MOST_COLUMNS = 100
PAGES = ("*.md", "docs/**/*.md", "benchmarks/**/*.md")
CODE = (
    *("csrc/**/*.h", "csrc/**/*.cpp", "include/**/*.h", "tests/**/*.h", "tests/**/*.cpp"),
    *("benchmarks/*.cpp", "examples/**/*.cpp"),
    *("benchmarks/*.py", "examples/*.py", "tests/**/*.py", "tools/*.py", "torch_ext/*.py"),
)

# A part of a file that is read in one go: its first line, and its text.
Block = tuple[int, str]

_BEGINNING = re.compile(r"(?:Of|That which)\b")
_GENERATED = re.compile(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->", re.DOTALL)
_FENCE = re.compile(r"^ *(```|:::).*?^ *\1 *$", re.DOTALL | re.MULTILINE)
_NEW_BLOCK = re.compile(r"^\s*(?:[-*+>]|\d+\.|#+)\s+")
_END = re.compile(r"(?<=[.!?])[)\"*]*\s+")


def main() -> int:
    files = [Path(name) for name in sys.argv[1:]] or pages()
    found = [finding for file in files for finding in findings(file)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


def pages() -> list[Path]:
    return sorted(page for pattern in PAGES + CODE for page in ROOT.glob(pattern))


def findings(file: Path) -> Iterator[str]:
    """Yields what is wrong with a file, one line each."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        text = _blank(_FENCE, _blank(_GENERATED, text))
        yield from (f"{file}:{line}: {what}" for line, what in _long_lines(text))
    blocks = {".md": _of_page, ".py": _of_python}.get(file.suffix, _of_cpp)
    for line, block in blocks(text):
        yield from (f"{file}:{line}: {what}" for what in _of_block(block))


def _of_block(block: str) -> Iterator[str]:
    plain = re.sub(r"``.*?``|`[^`]*`", "CODE", block)
    plain = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", plain)
    plain = re.sub(r"[*_]{2}|\s+", " ", plain).strip()
    for sentence in _END.split(plain):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        shown = sentence if len(sentence) < 60 else f"{sentence[:57]}..."
        if len(words) > MOST_WORDS:
            yield f"{len(words)} words: {shown}"
        if _BEGINNING.match(sentence):
            yield f"begins with a fragment: {shown}"
        if re.search(r"\bit were\b", sentence):
            yield f'"it were": {shown}'


def _blank(pattern: re.Pattern[str], text: str) -> str:
    """Takes out what matches, and keeps the numbers of the lines."""
    return pattern.sub(lambda found: "\n" * found[0].count("\n"), text)


def _long_lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        free = line.lstrip().startswith(("|", "![", "<"))
        if len(line) > MOST_COLUMNS and not free:
            yield number, f"{len(line)} columns"


def _of_page(text: str) -> Iterator[Block]:
    begin, block = 1, ""
    for number, line in enumerate(text.split("\n"), 1):
        table = line.lstrip().startswith("|")
        if table or not line.strip() or _NEW_BLOCK.match(line):
            if block:
                yield begin, block
            begin, block = number, ""
        if table:
            yield from ((number, cell) for cell in re.split(r"(?<!\\)\|", line))
        else:
            block += _NEW_BLOCK.sub("", line) + " " if line.strip() else ""
    if block:
        yield begin, block


def _paragraphs(first: int, text: str) -> Iterator[Block]:
    for number, block in _of_page(text):
        yield first + number - 1, block


def _of_python(text: str) -> Iterator[Block]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield from _paragraphs(node.body[0].lineno, docstring)
    comments: list[Block] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.append((token.start[0], token.string.lstrip("#: ")))
    yield from _runs(comments)


def _of_cpp(text: str) -> Iterator[Block]:
    lines = enumerate(text.split("\n"), 1)
    found = ((number, re.search(r"(?:^|\s)///?<? ?(.*)", line)) for number, line in lines)
    yield from _runs([(number, match[1]) for number, match in found if match])


def _runs(comments: list[Block]) -> Iterator[Block]:
    """Joins the comments of neighbouring lines."""
    first, last, run = 0, -1, ""
    for number, comment in comments:
        if number != last + 1:
            yield from _paragraphs(first, run)
            first, run = number, ""
        run += comment + "\n"
        last = number
    yield from _paragraphs(first, run)


if __name__ == "__main__":
    sys.exit(main())
