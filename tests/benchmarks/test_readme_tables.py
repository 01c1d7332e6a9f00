"""README.md's result tables come from the committed reports, and only from them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import tables

ROOT = Path(__file__).resolve().parents[2]
SOURCES = "<!-- sources -->\n<!-- end of sources -->\n"


@pytest.fixture(scope="module")
def readme_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "scripts" / "readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_current(readme_tables: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    assert readme_tables.updated(text) == text, "run scripts/readme_tables.py"


SPAN = {"median": 5.17, "low": 5.0, "high": 5.3}
ROW: dict[str, Any] = {
    "suite": "models", "case": "wan2.1-1.3b, one step", "arm": "blade asa, sparsity 0.8", "status": "ok",
    "size": "Wan, scaled down: 2 layers", "density": 0.2, "seconds": {"median": 1.2, "samples": 7}, "speedup": SPAN,
    "baseline": "compiled dense",
}  # fmt: skip
SINGLE = {"suite": "ops", "kind": "forward", "S": 8192, "case": "forward float32 D=64 S=8192", "baseline": "dense"}
HEADLINE = {
    "suite": "headline", "case": "whole generations", "calculation": "8 x (step)", "over_compiled": SPAN,
    "over_few": {**SPAN, "median": 1.4}, "published_speedup": 14.1, "published_on": "one H20", "arm": "8 steps",
}  # fmt: skip


def readme(module: ModuleType, results: Path, **reports: dict[str, Any]) -> list[str]:
    """The lines of a README that has these reports beside it."""
    for name, content in reports.items():
        (results / name).mkdir(parents=True, exist_ok=True)
        (results / name / "report.json").write_text(json.dumps(content))
    before = f"above\n<!-- results -->\nold\n<!-- end of results -->\n{SOURCES}below\n"
    lines: list[str] = module.updated(before, results).splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "old" not in lines
    return lines


def report(*rows: dict[str, Any], load: str = "0.8") -> dict[str, Any]:
    return {"title": "blade on a CPU", "rows": [*rows], "setup": {"load": load, "commit": "abc"}}


def test_reports_become_tables(readme_tables: ModuleType, tmp_path: Path) -> None:
    dense, wrong = {**ROW, "arm": "compiled dense"}, {**ROW, "arm": "wrong", "status": "wrong"}
    steps = report(dense, wrong, ROW, {**ROW, "arm": "another policy"})
    ops = report(*({**ROW, **SINGLE, "arm": f"{who}, sparsity 0.8, block 128"} for who in ("blade asa", "Flex")))
    results = tmp_path / "benchmarks" / "results"
    itself = {"median": 1.0, "low": 1.0, "high": 1.0}
    many = {**ROW, **HEADLINE, "arm": "50 steps, compiled dense", "over_compiled": itself, "over_few": SPAN}
    few = {**ROW, **HEADLINE}
    lines = readme(readme_tables, results, steps=steps, ops=ops, head=report(many, few))
    (links,) = (line for line in lines if "report.html" in line)
    page = "(benchmarks/results/{0}/report.html)".format
    named = [f"[{name}]{page(name)}" for name in ("head", "ops", "steps")]
    assert links == f"a CPU; commit abc; all rows in {', '.join(named)}:"
    body = [line for line in lines if "| 5.17x" in line]
    single, flex, step, against, generation = body
    assert "| 5.17x (5.00-5.30) |  |  | 14.1x" in against
    assert "blade asa" in single and "Flex" in flex
    assert step == (
        "| wan2.1-1.3b, one step: blade asa, sparsity 0.8, scaled-down model | 0.80 | 1.2 s | 7 | 5.17x (5.00-5.30) "
        "| compiled dense |"
    )
    assert generation.endswith("| 5.17x (5.00-5.30) | 1.40x (5.00-5.30) | 14.1x (one H20) |")
    assert "| over 50 eager dense | over 50 compiled dense | over as few dense | published |" in "\n".join(lines)


def test_a_machine_that_was_not_quiet_has_a_heading_of_its_own(readme_tables: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    lines = readme(readme_tables, results, quiet=report(ROW), noisy=report(ROW, load="2.6"), none=report())
    noisy, quiet = (line for line in lines if "report.html" in line)
    assert noisy.startswith("a CPU; not quiet, load 2.6 before the run; commit abc; all rows in [noisy]")
    assert quiet.startswith("a CPU; commit abc; all rows in [none]") and "[quiet]" in quiet


def test_other_lengths_and_sparsities_stay_in_the_report(readme_tables: ModuleType, tmp_path: Path) -> None:
    right = {**ROW, **SINGLE, "arm": "blade asa, sparsity 0.8, block 128"}
    others = {**right, "S": 4096}, {**right, "kind": "backward"}, {**right, "arm": "blade asa, sparsity 0.5, block 128"}
    lines = readme(readme_tables, tmp_path / "benchmarks" / "results", ops=report(right, *others))
    assert sum("5.17x" in line for line in lines) == 1


def test_prediction_is_in_every_figure_of_the_first_table(readme_tables: ModuleType) -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / "cpu_attention.json").read_text())
    rows = [row for name, part in content["parts"].items() if name.startswith("forward") for row in part]
    at = [row for row in rows if row["S"] == 8192 and row["sparsity"] == 0.8 and row["dtype"] == "bfloat16"]
    worst = min(row["over_flex_with_prediction"]["median"] for row in at)
    assert f"x | {worst:.1f}x |" in readme_tables.attention_table(content)[-1]


def test_it_is_said_which_source_a_result_is_of(readme_tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "timed.json").write_text(json.dumps({"setup": {"commit": "abc"}}))
    table = {"sources": ["Makefile"], "command": "make it"}
    for name, fingerprint in (("old", "0"), ("new", tables.fingerprint(["Makefile"]))):
        (tmp_path / f"{name}.json").write_text(json.dumps({**table, "fingerprint": fingerprint}))
    (tmp_path / "old.md").touch()
    measured, outdated = readme_tables.sources(tmp_path).splitlines()
    assert measured.endswith(": `timed.json` abc.")
    assert outdated.endswith(": `old.md` (`make it` makes it again).")


def test_a_readme_without_markers_is_refused(readme_tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="no lines"):
        readme_tables.updated("text")
