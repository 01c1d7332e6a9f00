"""README.md's result tables come from the committed reports, and only from them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
        "size": "Wan, scaled down: 2 layers", "density": 0.2, "seconds": {"median": 1.2}, "speedup": span,
        "baseline": "compiled dense",
    }  # fmt: skip
    rows = [
        {**row, "arm": "compiled dense"}, row, {**row, "arm": "wrong", "status": "wrong"},
        {**row, "suite": "ops", "arm": "an operator"},
        {**row, "suite": "headline", "case": "whole generations", "arm": "8 steps", "calculation": "8 x (step)",
         "published_speedup": 14.1, "published_on": "one H20"},
    ]  # fmt: skip
    results = tmp_path / "benchmarks" / "results"
    (results / "steps_cpu").mkdir(parents=True)
    (results / "steps_cpu" / "report.json").write_text(json.dumps({"title": "blade on a CPU", "rows": rows}))
    before = "above\n<!-- results -->\nold\n<!-- end of results -->\nbelow\n"
    lines = readme_tables.updated(before, results).splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "old" not in lines
    (link,) = (line for line in lines if "report.html" in line)
    assert (
        link
        == "a CPU, all rows in [`benchmarks/results/steps_cpu/report.html`](benchmarks/results/steps_cpu/report.html):"
    )
    body = [line for line in lines if "| 5.17x" in line]
    assert len(body) == 2
    assert body[0].startswith(
        "| wan2.1-1.3b, one step: blade asa, sparsity 0.8, scaled-down model | 0.80 | 1.2 s | 5.17x (5.00-5.30) |"
    )
    assert "14.1x (one H20)" in body[1]


def test_a_readme_without_markers_is_refused(readme_tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="no lines"):
        readme_tables.updated("text", ROOT)
