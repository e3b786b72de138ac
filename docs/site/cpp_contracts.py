"""A directive that shows what a public header promises.

    ```{contracts} include/torch_ext/swap/swapper.h
    ```

It shows each declaration that has a comment with ``///``, and the comment: classes and structs
with their public members, enumerations, functions. The headers are the one source; nothing is
parsed but comments, braces and the ends of declarations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

_NAMED = re.compile(r"(?:template <.*?>\s*)?(?:class|struct|enum(?: class)?) (\w+)")
_ACCESS = re.compile(r"(public|protected|private):")
_HIDDEN = re.compile(r"namespace (?:detail|internal|impl)\b|namespace \{")


@dataclass
class Contract:
    """A declaration, without its body, and what its comment says."""

    declaration: str
    text: str
    members: list[Contract] = field(default_factory=list)


def contracts(source: str) -> list[Contract]:
    """Those of a header."""
    lines = source.split("\n")
    found, _ = _block(lines, 0, None)
    return found


def _block(lines: list[str], at: int, kind: str | None) -> tuple[list[Contract], int]:
    """Reads what stands between two braces; ``kind``: of what the braces are."""
    found: list[Contract] = []
    comment: list[str] = []
    # A namespace's forward declarations have nothing to say.
    shown = kind != "class"
    while at < len(lines):
        line = lines[at].strip()
        if line.startswith("}"):
            return found, at + 1
        if line.startswith("///"):
            comment.append(line[3:].removeprefix(" "))
            at += 1
        elif line.startswith("namespace torch_ext"):
            inner, at = _block(lines, at + 1, None)
            found += inner
        elif _HIDDEN.match(line):
            _, at = _skip(lines, at)
        elif access := _ACCESS.match(line):
            shown, comment = access[1] == "public", []
            at += 1
        elif not line or (
            line.startswith(("//", "#", "using ", "friend "))
            # Another name of something public, which says so.
            and not (line.startswith("using ") and comment and kind is None)
        ):
            comment = comment if line and line.startswith("//") else []
            at += 1
        else:
            begin = at
            declaration, at = _skip(lines, begin)
            text, behind = _text(comment, declaration)
            comment = []
            named = _NAMED.match(declaration)
            forward = kind is None and not text and "(" not in declaration
            if not shown or forward:
                continue
            item = Contract(_head(behind), text)
            if named and "{" in declaration:
                word = declaration.split(named[1])[0].split()[-1]
                word = "enum" if "enum" in declaration.split(named[1])[0] else word
                opening = begin + declaration.split("{")[0].count("\n") + 1
                item.declaration = declaration.split("{")[0].strip()
                if word == "enum":
                    item.declaration = _whole(declaration)
                elif opening < at:
                    item.members, _ = _block(lines, opening, word)
            found.append(item)
    return found, at


def _skip(lines: list[str], at: int) -> tuple[str, int]:
    """A declaration, with what stands in its braces, and the line behind it."""
    begin, depth, opened = at, 0, False
    while at < len(lines):
        code = re.sub(r'"(?:\\.|[^"])*"', '""', lines[at].split("//")[0])
        depth += code.count("{") + code.count("(") - code.count("}") - code.count(")")
        opened |= "{" in code
        at += 1
        ends = code.rstrip().endswith((";", "}")) if opened else code.rstrip().endswith(";")
        if depth == 0 and ends:
            break
    return "\n".join(lines[begin:at]), at


def _text(comment: list[str], declaration: str) -> tuple[str, str]:
    """The comment before a declaration, or the one behind it; and the declaration without."""
    behind = re.findall(r"///< ?(.*)", declaration)
    rest = re.sub(r"\s*///<.*", "", declaration)
    following = [line.strip()[3:] for line in rest.split("\n") if line.strip()[:3] == "///"]
    if comment or "{" in rest and not following:
        return "\n".join(comment) or " ".join(behind[:1]), rest
    return " ".join(behind), rest


def _head(declaration: str) -> str:
    """A declaration without the body of its function."""
    text = "\n".join(line for line in declaration.split("\n") if line.strip()[:2] != "//")
    depth = 0
    for at, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if sign == "{" and depth == 0 and ")" in text[:at]:
            text = text[:at]
            break
    text = re.sub(r"\n\s*:(?!:)[^;]*$", "", text.rstrip())
    text = re.sub(r"\)\s*:\s[^;]*$", ")", text)
    return _whole(text).rstrip(";").rstrip() + ";"


def _whole(declaration: str) -> str:
    """The declaration with the indentation of its first line taken away."""
    lines = declaration.strip("\n").split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines)


class ContractsDirective(Directive):
    """Shows the contracts of the header that is its argument."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        environment = self.state.document.settings.env
        path = Path(environment.srcdir, self.arguments[0])
        environment.note_dependency(str(path))
        found = contracts(path.read_text(encoding="utf-8"))
        if not found:
            raise self.error(f"{self.arguments[0]} has no contracts")
        shown: list[nodes.Node] = []
        include = self.arguments[0].removeprefix("include/")
        shown.append(_code(f'#include "{include}"'))
        for contract in found:
            shown += _nodes(contract)
        return shown


def _code(text: str) -> nodes.literal_block:
    return nodes.literal_block(text, text, language="cpp")


def _nodes(contract: Contract) -> list[nodes.Node]:
    shown: list[nodes.Node] = [_code(contract.declaration)]
    about = nodes.container()
    about += [_paragraph(text) for text in contract.text.split("\n\n") if text.strip()]
    members = nodes.block_quote()
    for member in contract.members:
        members += _nodes(member)
    shown += [part for part in (about, members) if len(part)]
    return shown


def _paragraph(text: str) -> nodes.paragraph:
    paragraph = nodes.paragraph()
    for number, part in enumerate(text.replace("\n", " ").split("`")):
        if number % 2:
            paragraph += nodes.literal(part, part)
        elif part:
            paragraph += nodes.Text(part)
    return paragraph


def setup(app) -> dict[str, bool]:
    app.add_directive("contracts", ContractsDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
