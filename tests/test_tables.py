"""The committed result tables belong to this source and these versions, and hold no failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tables
from tests import conformance

REQUIRED = ("conformance", "fuzz", "offline")
BEHIND: tuple[str, ...] = ()
"""Tables of an earlier source, complete and without a failure then, which the README says are to be made again."""
FILES = sorted(path for path in tables.RESULTS.glob("*.json") if "fingerprint" in json.loads(path.read_text()))


def test_all_tables_are_there() -> None:
    assert {path.stem for path in FILES} == set(REQUIRED)


def test_the_conformance_table_is_complete() -> None:
    problems = [line for line in conformance.check_current() if "have changed" not in line]
    assert not problems
    behind = "conformance" in BEHIND
    assert behind == bool(conformance.check_current()), "a table that is current again leaves BEHIND"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_table_is_current(path: Path) -> None:
    table = json.loads(path.read_text())
    reason = tables.stale(table)
    assert path.stem in BEHIND or not reason, f"{path.name}: {reason}"
    assert table["rows"]
    assert not [row for row in table["rows"] if row.get("outcome") == "failed"]


def test_a_table_resumes_and_goes_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    (tmp_path / "a.py").write_text("one")

    def load() -> tables.Table:
        return tables.Table("t", command="make t", sources=["*.py"], packages=["torch"], key="case")

    load().put({"case": "x", "value": 1})
    assert load().rows == {"x": {"case": "x", "value": 1}}
    assert not tables.stale(json.loads(load().path.read_text()))

    (tmp_path / "a.py").write_text("two")
    assert load().rows == {}
    assert "run `make t`" in tables.stale(json.loads(load().path.read_text()))

    (tmp_path / "a.py").write_text("one")
    monkeypatch.setattr(tables, "versions", lambda packages: dict.fromkeys(packages, "0"))
    assert "is installed" in tables.stale(json.loads(load().path.read_text()))
