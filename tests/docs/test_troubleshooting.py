"""The troubleshooting page has an entry for each code, warning, note and variable of the package, and none besides."""

from __future__ import annotations

import ast
import re

import pytest

from blade_compile.passes.codes import SENTENCES
from blade_compile.report import RUN_CODES
from tests.docs.messages import FIELD, FOLDERS, ROOT, notes, template, warnings

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
WARNINGS = warnings()
NOTES = notes()


def section(title: str) -> str:
    """From a heading to the next of its level."""
    return re.split(r"^## ", PAGE.split(f"## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(title: str) -> list[str]:
    """First cells of a section's tables."""
    return re.findall(r"^\| `([^`]+)` \|", section(title), re.MULTILINE)


def entries(title: str) -> list[str]:
    """Terms of a section's definition lists, each of which has an explanation."""
    return [text for _, text in re.findall(r"^(`+)(.+?) ?\1\n: \S", section(title), re.MULTILINE)]


def test_every_code_has_one_row() -> None:
    assert sorted(rows("Codes")) == sorted(SENTENCES.keys() | RUN_CODES.keys())


@pytest.mark.parametrize(("title", "found"), [("Warnings", WARNINGS), ("Notes of a report", NOTES)])
def test_every_message_has_one_entry(title: str, found: dict[str, str]) -> None:
    told = entries(title)
    assert len(told) == len(set(told))
    for place, text in found.items():
        assert text in told, f"{place} warns {text!r}, and docs/troubleshooting.md has no entry for it"
    for text in told:
        assert text in found.values(), f"docs/troubleshooting.md explains {text!r}, which nothing says"


def test_every_variable_is_named() -> None:
    source = "".join(path.read_text() for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
    assert set(re.findall(r"\bBLADE_[A-Z_]*[A-Z]\b", source)) <= set(re.findall(r"BLADE_[A-Z_]+", PAGE))


def test_messages_are_found() -> None:
    assert len(WARNINGS) > 20
    for code in ("f'a {x} b'", "'a %s b'", "'a ' + str(x) + ' b'"):
        assert template(ast.parse(code, mode="eval").body) == f"a {FIELD} b"
