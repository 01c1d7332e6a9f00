"""The runner and the comparison, on a clock that only moves when an arm says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import compare, runner, setup_info
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
    assert not {"seconds", "first_call", "peak_mib"} & _row(rows, "every block").keys()


def test_what_is_measured_after_the_clock_is_in_the_row() -> None:
    arms = [Arm("dense", lambda: 1.0), Arm("sparse", lambda: 1.0, after=lambda: {"density": 0.25})]
    rows = runner.run_case("models", Case("a case", lambda: arms), PLAN, rounds=3)
    assert _row(rows, "sparse")["density"] == 0.25


def test_a_figure_that_cannot_be_looked_into_is_no_figure() -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("no lists")

    arms = [Arm("dense", lambda: 1.0), Arm("sparse", lambda: 1.0, after=broken)]
    row = _row(runner.run_case("models", Case("a case", lambda: arms), PLAN, rounds=3), "sparse")
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: no lists")
    assert not {"speedup", "seconds", "samples"} & row.keys()


def test_clocks_are_read_after_the_rounds_on_the_device_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(setup_info, "stamp", lambda device: order.append(f"stamp {device.type}") or {"clocks": "x"})
    arms = [Arm("dense", lambda: order.append("call"))]
    gpu = Plan(torch.device("meta"))
    (row,) = runner.run_case("ops", Case("c", lambda: arms, device=PLAN.device), gpu, rounds=3)
    assert (order[-1], order.count("stamp cpu"), row["clocks"]) == ("stamp cpu", 1, "x")
    runner.run_case("ops", Case("c", rows=list), gpu)
    assert order[-1] == "stamp meta"


@pytest.mark.parametrize(
    ("uuid", "visible", "expected"), [("ab-c", "2,3", "GPU-ab-c"), (None, "2,3", "3"), (None, "", "1")]
)
def test_the_driver_is_asked_for_the_device_that_pytorch_uses(
    monkeypatch: pytest.MonkeyPatch, uuid: str | None, visible: str, expected: str
) -> None:
    properties = SimpleNamespace(uuid=uuid) if uuid else SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert setup_info.driver_id(1) == expected


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


def test_an_arm_that_is_gone_or_was_measured_elsewhere_is_lost() -> None:
    before = _rows({"dense": 0.4, "blade": 0.1})
    assert compare.lost(before, before) == []
    dense = [row for row in before if row["arm"] == "dense"]
    assert compare.lost(before, dense) == ["ops / a case / blade: not in the second report"]
    baseline_gone = [{k: v for k, v in row.items() if k != "speedup"} for row in before]
    assert "lost: ops / a case / blade: it has no speed-up any more" in compare.text(before, baseline_gone)
    for key, value in (("device", "a GPU"), ("size", "published")):
        other = [{**row, key: value} for row in _rows({"dense": 0.4, "blade": 0.01})]
        assert compare.changes(before, other) == []
        assert len(compare.lost(before, other)) == 2
        assert f"{key} {before[0].get(key)} -> {value}" in compare.text(before, other)


def test_seconds_of_the_baseline_are_printed() -> None:
    before, after = _rows({"dense": 0.4, "blade": 0.1}), _rows({"dense": 0.8, "blade": 0.2})
    assert "baseline, for information: ops / a case / dense: 0.4 s -> 0.8 s" in compare.text(before, after)


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
