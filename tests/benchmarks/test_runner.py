"""The runner and the comparison, on a clock that only moves when an arm says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, report_html, runner
from benchmarks.__main__ import main, write
from benchmarks.registry import SUITES, Arm, Case, Plan, WrongResultError, suite

PLAN = Plan(torch.device("cpu"))


class Clock:
    """Seconds that pass only by `spend`, with some noise that repeats."""

    def __init__(self, noise: float = 0.0) -> None:
        self.now, self.noise, self.calls = 0.0, noise, 0

    def spend(self, seconds: float) -> float:
        self.calls += 1
        self.now += seconds * (1 + self.noise * ((self.calls * 7919 % 13) / 6 - 1))
        return seconds

    def __call__(self) -> float:
        return self.now


def _rows(seconds: dict[str, float], noise: float = 0.0, check: Any = None) -> list[dict[str, Any]]:
    clock = Clock(noise)
    arms = [
        Arm(name, lambda s=s: clock.spend(s), check if name == "blade" else None, about={"flops": 1e12})
        for name, s in seconds.items()
    ]
    case = Case("a case", lambda: arms, {"S": 8}, absent={"peer": "is not installed"})
    return runner.run_case("ops", case, PLAN, rounds=9, budget=None, clock=clock)


def _row(rows: list[dict[str, Any]], arm: str) -> dict[str, Any]:
    return next(row for row in rows if row["arm"] == arm)


def test_a_row_has_its_figures() -> None:
    rows = _rows({"dense": 0.4, "blade": 0.1}, check=lambda result: result * 1e-3)
    blade = _row(rows, "blade")
    assert blade["speedup"]["median"] == pytest.approx(4.0)
    assert blade["baseline"] == "dense"
    assert blade["seconds"]["median"] == pytest.approx(0.1)
    assert len(blade["samples"]) == blade["seconds"]["samples"] == 9
    assert blade["tflops"] == pytest.approx(10.0)
    assert blade["error"] == pytest.approx(1e-4)
    assert {"suite", "case", "device", "seed", "started", "S", "first_call"} <= blade.keys()
    assert _row(rows, "peer")["status"] == "absent"


def test_a_wrong_result_is_never_timed_and_hides_nobody() -> None:
    def check(result: float) -> float:
        raise WrongResultError("error 1.0e+00, allowed 1.0e-05")

    rows = _rows({"dense": 0.4, "blade": 0.1, "flex": 0.2}, check=check)
    blade = _row(rows, "blade")
    assert blade["status"] == "wrong"
    assert not {"speedup", "seconds", "tflops"} & blade.keys()
    assert "allowed" in blade["reason"]
    assert _row(rows, "flex")["speedup"]["median"] == pytest.approx(2.0)


def test_without_a_right_baseline_there_is_no_speedup() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel\nand a long trace")

    case = Case("a case", lambda: [Arm("dense", broken), Arm("blade", lambda: None)])
    rows = runner.run_case("ops", case, PLAN, rounds=3)
    assert _row(rows, "dense") | {"status": "failed", "reason": "RuntimeError: no kernel"} == _row(rows, "dense")
    assert "seconds" in _row(rows, "blade")
    assert "speedup" not in _row(rows, "blade")


def test_a_case_that_cannot_be_built_is_a_row() -> None:
    rows = runner.run_case("ops", Case("a case", lambda: 1 / 0), PLAN)  # type: ignore[arg-type, return-value]
    assert [row["status"] for row in rows] == ["failed"]


def test_a_planted_slow_down_is_found_and_noise_is_not() -> None:
    before = _rows({"dense": 0.4, "blade": 0.1}, noise=0.2)
    again = _rows({"dense": 0.41, "blade": 0.1025}, noise=0.2)
    slower = _rows({"dense": 0.4, "blade": 0.16}, noise=0.05)
    assert [c.verdict for c in compare.changes(before, again)] == ["same"]
    (change,) = compare.changes(before, slower)
    assert change.verdict == "slower"
    assert "slower: ops / a case / blade" in compare.text(before, slower)
    (back,) = compare.changes(slower, before)
    assert back.verdict == "faster"


def test_a_slower_machine_is_no_slow_down() -> None:
    before, after = _rows({"dense": 0.4, "blade": 0.1}), _rows({"dense": 0.8, "blade": 0.2})
    assert [c.verdict for c in compare.changes(before, after)] == ["same"]


def test_a_result_that_became_wrong_is_reported() -> None:
    def check(result: float) -> float:
        raise WrongResultError("error 1")

    before, after = _rows({"dense": 0.4, "blade": 0.1}), _rows({"dense": 0.4, "blade": 0.1}, check=check)
    assert "lost: ops / a case / blade: wrong, error 1" in compare.text(before, after)


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seconds in (("a", 0.1), ("b", 0.2)):
        (tmp_path / name).mkdir()
        rows = _rows({"dense": 0.4, "blade": seconds})
        (tmp_path / name / "report.json").write_text(json.dumps({"rows": rows}))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert "1 of 1 arms in both reports did not change" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "a"), str(tmp_path / "none")])
    assert "no report.json" in capsys.readouterr().err


def test_memory_of_a_call_is_seen() -> None:
    memory = runner.PeakMemory(torch.device("cpu"))
    block = torch.ones(16 << 20, dtype=torch.uint8)
    del block
    peak = memory.mib()
    assert peak is None or 15 < peak < 64


def test_a_suite_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        suite("ops")(SUITES["ops"])


def test_the_page_holds_every_row_and_needs_no_network(tmp_path: Path) -> None:
    rows = _rows({"dense": 0.4, "blade <b>": 0.1})
    site = {
        "name": "blocks.0.attn1",
        "kind": "sdpa",
        "code": "rewritten",
        "density": 0.2,
        "reason": "runs block-sparse",
    }
    content = {
        "title": "t", "command": "c", "setup": _setup(), "notes": [], "rows": rows, "not_run": ["suite x: not run"],
        "sites": {"m": {"headline": "1 of 1", "sites": [site]}},
    }  # fmt: skip
    write(content, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "blade &lt;b&gt;" in page
    assert "4.00x (4.00-4.00)" in page
    assert "peer (is not installed)" in page
    assert "blocks.0.attn1" in page
    assert "suite x: not run" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == rows


def _setup() -> dict[str, str]:
    from benchmarks import setup_info

    return setup_info.collect()


def _ops_row(**more: Any) -> dict[str, Any]:
    span = {"median": 4.0, "low": 3.5, "high": 4.5}
    row = {
        "suite": "ops",
        "case": "c",
        "kind": "forward",
        "policy": "asa",
        "block": 128,
        "density": 0.2,
        "arm": "blade",
    }
    return {**row, "dtype": "float32", "D": 64, "S": 2048, "sparsity": 0.8, "speedup": span, **more}


def test_plots_are_drawn_from_rows_and_take_the_pages_ink() -> None:
    from benchmarks import plots

    rows = [_ops_row(), _ops_row(S=4096), _ops_row(S=4096, sparsity=0.5, density=0.5)]
    model = {**_ops_row(suite="models", arm="blade asa, sparsity 0.8", model="wan", error=0.1), "kind": ""}
    rows.append({**model, "split": {"prediction": 0.1, "attention": 0.2, "rest": 1.0}})
    for draw in plots.PLOTS.values():
        svg = draw(rows)
        assert svg is not None
        assert "currentColor" in svg
        assert plots.INK not in svg
        assert draw([]) is None


def test_quantities() -> None:
    assert [report_html.quantity(s) for s in (2.0, 0.0125, 3e-5, 4e-7, None)] == [
        "2 s",
        "12.5 ms",
        "30 µs",
        "0.4 µs",
        "",
    ]
