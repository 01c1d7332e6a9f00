"""Runs cases: the correctness gate first, then interleaved rounds, then one row for each arm.

An arm whose result is wrong gets a row that says so and no time; the others are measured without it. Without a right
baseline there are times but no speed-ups.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import setup_info, timing
from benchmarks.registry import Arm, Case, Plan, WrongResultError

Row = dict[str, Any]


def run_case(
    suite: str,
    case: Case,
    plan: Plan,
    *,
    rounds: int = 7,
    budget: float | None = 30.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """The rows of a case. Never raises for an arm that fails: its row holds the reason."""
    rows: list[Row] = [{"arm": name, "status": "absent", "reason": why} for name, why in case.absent.items()]
    try:
        if case.rows is not None:
            rows += [{"status": "ok", **row} for row in case.rows()]
        else:
            rows += _rows_of_arms(case.arms(), plan, rounds, budget, clock)
    except Exception as error:  # noqa: BLE001 (one case must not end the report)
        rows.append({"arm": "", "status": status_of(error), "reason": _reason(error)})
    # Stamped at the end: the clocks are those that a device has after the rounds, not at rest.
    stamp = setup_info.stamp(case.device or plan.device)
    return [{"suite": suite, "case": case.name, **case.about, **stamp, "seed": plan.seed, **row} for row in rows]


def _rows_of_arms(
    arms: list[Arm], plan: Plan, rounds: int, budget: float | None, clock: Callable[[], float]
) -> list[Row]:
    rows = []
    checked, took = warm_up(arms, plan.device, clock)
    calls = {arm.name: arm.call for arm in arms if arm.name in took and arm.timed}
    times = timing.paired(calls, rounds=rounds, budget=budget, clock=clock, known=took)
    baseline = arms[0].name if arms else ""
    for arm in arms:
        row = {"arm": arm.name, **arm.about, **checked[arm.name]}
        if arm.of:
            row["of"] = arm.of
        if arm.name in times:
            try:
                more = arm.after() if arm.after is not None else {}
            except Exception as error:  # noqa: BLE001 (a figure that nobody could look into has no row)
                row |= {"status": status_of(error), "reason": _reason(error)}
            else:
                row |= _figures(arm, times, baseline) | more
        rows.append(row)
    return rows


def warm_up(
    arms: list[Arm], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, Row], dict[str, float]]:
    """Run and check every arm; what is known of each, and about how many seconds those that are right take."""
    gc.collect()  # what the last case left
    checked: dict[str, Row] = {}
    took: dict[str, float] = {}
    for arm in arms:
        checked[arm.name], seconds = _warm_up(arm, device, clock)
        took[arm.name] = seconds
    for arm in arms:
        witness = checked[arm.certified_by] if arm.certified_by else {"status": "ok"}
        if checked[arm.name]["status"] == "ok" and witness["status"] != "ok":
            why = f"rests on {arm.certified_by!r}, which is {witness['status']}: {witness['reason']}"
            checked[arm.name] = {"status": "wrong", "reason": why}
    return checked, {name: seconds for name, seconds in took.items() if checked[name]["status"] == "ok"}


def _figures(arm: Arm, times: dict[str, timing.Timing], baseline: str) -> Row:
    took = times[arm.name]
    figures: Row = {"seconds": took.summary(7), "samples": [round(s, 7) for s in took.samples]}
    if arm.about.get("flops"):
        figures["tflops"] = round(arm.about["flops"] / took.median * 1e-12, 4)
    if baseline in times and not arm.of:
        figures |= {"baseline": baseline, "speedup": times[baseline].over(took).summary(3)}
    return figures


def _warm_up(arm: Arm, device: torch.device, clock: Callable[[], float]) -> tuple[Row, float]:
    """The first call compiles, the second one is checked and shows the memory. Neither counts as a sample."""
    try:
        first_seconds = timing.sample(arm.call, clock=clock)
        memory = PeakMemory(device)
        start = clock()
        result = arm.call()
        peak = memory.mib()
        seconds = clock() - start
        error = arm.check(result) if arm.check is not None else None
    except Exception as error_found:  # noqa: BLE001 (an arm that can't run is a row, not the end of the report)
        return {"status": status_of(error_found), "reason": _reason(error_found)}, 0.0
    row: Row = {"status": "ok", "first_call": round(first_seconds, 3)} if arm.timed else {"status": "ok"}
    if error is not None:
        row["error"] = float(f"{error:.2e}")
    if peak is not None and arm.timed:
        row["peak_mib"] = round(peak, 1)
    return row, seconds


class PeakMemory:
    """Memory that a call takes on top of what was there: allocated on a GPU, resident on a CPU (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)  # memory that the first call freed would hide what the second one takes
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        except (OSError, AttributeError):
            self.before = -1
            return
        self.before = _resident_bytes("VmRSS")

    def mib(self) -> float | None:
        """MiB since construction at their highest; None where the system doesn't tell."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20
        if self.before < 0:
            return None
        return max(0, _resident_bytes("VmHWM") - self.before) / 2**20


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return -1


def status_of(error: Exception) -> str:
    """``wrong`` for a result that failed its gate, ``failed`` for everything else."""
    return "wrong" if isinstance(error, WrongResultError) else "failed"


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    said = text[0][:200] if text else ""
    return said if isinstance(error, WrongResultError) else f"{type(error).__name__}: {said}"
