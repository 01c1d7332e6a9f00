"""The pages are built without a warning, their links lead somewhere, and what is generated in them is current."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables
from tests.docs.stand_ins import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "examples" / "README.md"]


def test_built_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-E", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*build, "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = {path.stem for path in (tmp_path / "html").glob("*.html")}
    assert {path.stem for path in DOCS.glob("*.md")} <= made
    _check_links(tmp_path / "html")


def _check_links(html: Path) -> None:
    """Each link within the built pages leads to a file, and to an element of it where it names one."""
    texts = {path: path.read_text() for path in html.glob("*.html")}
    for path, text in texts.items():
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            if re.match(r"[a-z]+:|#$|//", target):
                continue
            file, _, anchor = target.partition("#")
            other = (path.parent / file.partition("?")[0]).resolve() if file else path
            assert other.is_file(), f"{path.name} links to {target}"
            assert not anchor or f'id="{anchor}"' in texts[other], f"{path.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_in_the_repository(page: Path) -> None:
    """What a reader of the repository follows: relative paths, and headings of Markdown files."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        assert path.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_tables_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_place_is_filled() -> None:
    made = runpy.run_path(str(DOCS / "generate.py"))
    places = [match[2] for page in DOCS.glob("*.md") for match in made["PLACE"].finditer(page.read_text())]
    assert sorted(places) == sorted(made["TABLES"])


def test_a_page_behind_its_results_is_found() -> None:
    made = runpy.run_path(str(DOCS / "generate.py"))
    text = "before\n<!-- generated: calibration -->\n| an old table |\n<!-- end -->\nafter"
    new = made["filled"](text)
    assert new.startswith("before\n") and new.endswith("\nafter") and "an old table" not in new
    assert made["filled"](new) == new


def test_a_run_of_an_earlier_source_is_said() -> None:
    made = runpy.run_path(str(DOCS / "generate.py"))
    now = {"sources": ["Makefile"], "fingerprint": tables.fingerprint(["Makefile"])}
    assert [made["_outdated"]({**now, **other}) for other in ({}, {"fingerprint": "0"})] == [False, True]
    behind = made["_outdated"](made["load"]("conformance"))
    assert ("a run of an earlier source" in (DOCS / "compatibility.md").read_text()) == behind


def test_the_picture_is_of_this_pass() -> None:
    drawing = runpy.run_path(str(DOCS / "graph_picture.py"))
    before, after = (drawing["nodes"](dump) for dump in drawing["dumps"]())
    assert drawing["picture"](before, after) == (DOCS / "graph.svg").read_text(), "run python docs/graph_picture.py"
    gone, new = {node.name for node in before}, {node.name for node in after}
    assert len(gone - new) == 5 and len(new - gone) == 1  # what docs/how_it_works.md says
