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


def test_a_report_becomes_a_table(readme_tables: ModuleType, tmp_path: Path) -> None:
    span = {"median": 5.17, "low": 5.0, "high": 5.3}
    row: dict[str, Any] = {
        "suite": "models", "case": "wan2.1-1.3b, one step", "arm": "blade asa, sparsity 0.8", "status": "ok",
        "size": "Wan, scaled down: 2 layers", "density": 0.2, "seconds": {"median": 1.2, "samples": 7}, "speedup": span,
        "baseline": "compiled dense",
    }  # fmt: skip
    rows = [
        {**row, "arm": "compiled dense"}, row, {**row, "arm": "wrong", "status": "wrong"},
        {**row, "suite": "ops", "arm": "an operator"},
        {**row, "suite": "headline", "case": "whole generations", "arm": "8 steps", "calculation": "8 x (step)",
         "over_compiled": {**span, "median": 3.9}, "over_few": {**span, "median": 1.4}, "published_speedup": 14.1,
         "published_on": "one H20"},
    ]  # fmt: skip
    results = tmp_path / "benchmarks" / "results"
    (results / "steps_cpu").mkdir(parents=True)
    content = {"title": "blade on a CPU", "rows": rows, "setup": {"load": "2.6", "commit": "abc"}}
    (results / "steps_cpu" / "report.json").write_text(json.dumps(content))
    before = f"above\n<!-- results -->\nold\n<!-- end of results -->\n{SOURCES}below\n"
    lines = readme_tables.updated(before, results).splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "old" not in lines
    (link,) = (line for line in lines if "report.html" in line)
    page = "benchmarks/results/steps_cpu/report.html"
    assert link == f"a CPU; not quiet, load 2.6 before the run; commit abc; all rows in [`{page}`]({page}):"
    body = [line for line in lines if "| 5.17x" in line]
    assert len(body) == 2
    assert body[0].startswith(
        "| wan2.1-1.3b, one step: blade asa, sparsity 0.8, scaled-down model | 0.80 | 1.2 s | 7 | 5.17x (5.00-5.30) |"
    )
    assert body[1].endswith("| 3.90x (5.00-5.30) | 1.40x (5.00-5.30) | 14.1x (one H20) |")
    assert "| over | over 50 compiled dense | over as few dense | published |" in "\n".join(lines)
    content["setup"]["load"] = "0.8"
    (results / "steps_cpu" / "report.json").write_text(json.dumps(content))
    assert "a CPU; commit abc; all rows" in readme_tables.updated(before, results)


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
