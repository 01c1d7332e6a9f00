"""Runs cases: the correctness gate first, then interleaved rounds, then one row for each arm.

An arm whose result is wrong gets a row that says so and no time; the others are measured without it. Without a right
baseline there are times but no speed-ups.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
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
    head = {
        "suite": suite,
        "case": case.name,
        **case.about,
        "device": _device_name(plan.device),
        "seed": plan.seed,
        "started": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }
    rows = [{**head, "arm": name, "status": "absent", "reason": why} for name, why in case.absent.items()]
    try:
        arms = case.arms()
    except Exception as error:  # noqa: BLE001 (one case must not end the report)
        return [*rows, {**head, "arm": "", "status": "failed", "reason": _reason(error)}]
    warmed = {arm.name: _warm_up(arm, plan.device) for arm in arms}
    right = [arm for arm in arms if warmed[arm.name]["status"] == "ok"]
    times = timing.paired({arm.name: arm.call for arm in right}, rounds=rounds, budget=budget, clock=clock)
    baseline = arms[0].name if arms else ""
    for arm in arms:
        row = {**head, "arm": arm.name, **arm.about, **warmed[arm.name]}
        if arm.of:
            row["of"] = arm.of
        if arm.name in times:
            row |= _figures(arm, times, baseline)
            if arm.split is not None:
                row["split"] = {part: round(seconds, 6) for part, seconds in arm.split().items()}
        rows.append(row)
    return rows


def _figures(arm: Arm, times: dict[str, timing.Timing], baseline: str) -> Row:
    took = times[arm.name]
    figures: Row = {"seconds": took.summary(7), "samples": [round(s, 7) for s in took.samples]}
    if arm.about.get("flops"):
        figures["tflops"] = round(arm.about["flops"] / took.median * 1e-12, 4)
    if baseline in times and not arm.of:
        figures |= {"baseline": baseline, "speedup": times[baseline].over(took).summary(3)}
    return figures


def _warm_up(arm: Arm, device: torch.device) -> Row:
    """The first call: compiles, is checked, and shows the memory. Not timed."""
    gc.collect()
    try:
        first = time.perf_counter()
        arm.call()
        first_seconds = time.perf_counter() - first
        memory = PeakMemory(device)
        result = arm.call()
        peak = memory.mib()
        error = arm.check(result) if arm.check is not None else None
    except WrongResultError as error_found:
        return {"status": "wrong", "reason": str(error_found)}
    except Exception as error_found:  # noqa: BLE001 (an arm that can't run is a row, not the end of the report)
        return {"status": "failed", "reason": _reason(error_found)}
    row: Row = {"status": "ok", "first_call": round(first_seconds, 3)}
    if error is not None:
        row["error"] = float(f"{error:.2e}")
    if peak is not None:
        row["peak_mib"] = round(peak, 1)
    return row


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


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
