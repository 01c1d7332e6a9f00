"""The runner and the comparison, on a clock that only moves when an arm says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, runner
from benchmarks.__main__ import main
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
    assert {"suite", "case", "S", "first_call"} <= blade.keys()
    assert all(blade[name] for name in ("device", "clocks", "driver", "versions", "commit", "time"))
    assert blade["seed"] == 0
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


def test_an_arm_is_as_wrong_as_the_one_that_certifies_it() -> None:
    def check(result: float) -> float:
        raise WrongResultError("error 1, allowed 0")

    arms = [
        Arm("dense", lambda: 1.0),
        Arm("every block", lambda: 1.0, check, timed=False),
        Arm("sparse", lambda: 1.0, certified_by="every block"),
        Arm("other", lambda: 1.0, certified_by="dense"),
    ]
    rows = runner.run_case("models", Case("a case", lambda: arms), PLAN, rounds=3)
    sparse = _row(rows, "sparse")
    assert sparse["status"] == "wrong"
    assert "'every block', which is wrong: error 1" in sparse["reason"]
    assert not {"speedup", "seconds", "samples"} & sparse.keys()
    assert "speedup" in _row(rows, "other")


def test_arms_that_only_certify_are_not_timed() -> None:
    arms = [Arm("dense", lambda: 1.0), Arm("every block", lambda: 1.0, timed=False)]
    rows = runner.run_case("models", Case("a case", lambda: arms), PLAN, rounds=3)
    assert _row(rows, "every block")["status"] == "ok"
    assert "seconds" not in _row(rows, "every block")


def test_what_is_measured_after_the_clock_is_in_the_row() -> None:
    arms = [Arm("dense", lambda: 1.0), Arm("sparse", lambda: 1.0, after=lambda: {"density": 0.25})]
    rows = runner.run_case("models", Case("a case", lambda: arms), PLAN, rounds=3)
    assert _row(rows, "sparse")["density"] == 0.25


def test_rows_of_other_processes_are_stamped_too() -> None:
    case = Case("a case", about={"S": 8}, rows=lambda: [{"arm": "cold", "seconds": 1.0}])
    (row,) = runner.run_case("compile", case, PLAN)
    assert (row["arm"], row["status"], row["S"], row["seconds"]) == ("cold", "ok", 8, 1.0)
    assert row["commit"]

    def wrong() -> list[dict[str, Any]]:
        raise WrongResultError("error 1")

    (row,) = runner.run_case("compile", Case("a case", rows=wrong), PLAN)
    assert (row["status"], row["reason"]) == ("wrong", "error 1")


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
