"""Order, gate and arithmetic of paired timing; no time is asserted."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.timing import Timing, paired, percentile


def test_every_round_runs_each_case_in_turns_of_direction() -> None:
    calls: list[str] = []
    ticks = iter(range(10_000))  # one second passes between any two looks at the clock: nothing is repeated
    cases = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}
    times = paired(cases, rounds=4, clock=lambda: float(next(ticks)))
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]  # warm-up, then a look at how long it takes
    assert calls[6:] == [*"abc", *"cba", *"abc", *"cba"]
    assert all(timing.samples == (1.0,) * 4 for timing in times.values())


def test_quick_cases_are_repeated_until_a_sample_is_long_enough() -> None:
    calls: Counter[str] = Counter()
    now = [0.0]

    def case() -> None:
        calls["a"] += 1
        now[0] += 0.0005

    timing = paired({"a": case}, rounds=3, clock=lambda: now[0])["a"]
    assert calls["a"] == 2 + 3 * 4
    assert timing.median == pytest.approx(0.0005)


def test_a_wrong_result_is_never_timed() -> None:
    calls: list[str] = []

    def gate(name: str, result: str) -> None:
        assert result == "right", name

    cases = {"good": lambda: "right", "bad": lambda: calls.append("bad") or "wrong"}
    with pytest.raises(AssertionError, match="bad"):
        paired(cases, gate=gate)
    assert calls == ["bad"]


def test_budget_stops_after_three_rounds_at_the_earliest() -> None:
    assert len(paired({"a": lambda: None}, rounds=50, budget=0.0)["a"].samples) == 3


def test_ratios_are_taken_round_by_round() -> None:
    slow, fast = Timing((2.0, 4.0, 90.0)), Timing((1.0, 2.0, 30.0))
    assert slow.over(fast).samples == (2.0, 2.0, 3.0)
    assert slow.over(fast).median == 2.0
    assert slow.summary()["samples"] == 3


def test_percentiles_lie_between_samples() -> None:
    assert percentile((3.0, 1.0, 2.0), 0.5) == 2.0
    assert percentile((0.0, 10.0), 0.2) == pytest.approx(2.0)
    assert percentile((7.0,), 0.8) == 7.0
