"""Paired, interleaved timing: every round runs each case once, so that drift and neighbours hit all of them alike.

The first call of each case is its warm-up and is never timed; its result goes through a correctness gate, and nothing
is timed when the gate closes. Ratios are taken round by round, then their median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Case = Callable[[], Any]
Gate = Callable[[str, Any], None]
SHORTEST_SAMPLE = 0.002  # seconds; a quicker case is repeated within a round until a sample is this long


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one case: one sample for each round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The 50th percentile."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """The 20th percentile."""
        return percentile(self.samples, 0.2)

    @property
    def high(self) -> float:
        """The 80th percentile."""
        return percentile(self.samples, 0.8)

    def over(self, other: Timing) -> Timing:
        """Return this divided by another case of the same run, round by round: ``dense.over(blade)`` is a speed-up."""
        return Timing(tuple(a / b for a, b in zip(self.samples, other.samples, strict=True)))

    def summary(self, digits: int = 6) -> dict[str, float | int]:
        """Median, percentiles and number of samples, for a result file."""
        numbers = {name: round(getattr(self, name), digits) for name in ("median", "low", "high")}
        return {**numbers, "samples": len(self.samples)}


def percentile(values: tuple[float, ...], share: float) -> float:
    """Linear between the nearest two samples."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def paired(
    cases: Mapping[str, Case],
    *,
    rounds: int = 5,
    gate: Gate | None = None,
    budget: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] | None = None,
    known: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Time several cases against each other.

    Args:
        cases: name -> a call without arguments.
        rounds: samples of each case. Every other round runs in reverse order, so that nobody always follows the same
            neighbour's caches.
        gate: called with each case's name and its warm-up result before anything is timed; raises where it is wrong.
        budget: seconds after which no further round starts; three are always run.
        clock: ``time.process_time`` counts only this process: for one thread on a busy machine.
        on_round: called with the number of finished rounds.
        known: about how many seconds each case takes, from a caller that has warmed up and checked them itself.

    Raises:
        Whatever a case or the gate raises: a wrong result is never timed.
    """
    if known is not None:
        repeats = {name: _repeats(known[name]) for name in cases}
    else:
        repeats = {name: _warm_up(name, case, gate, clock) for name, case in cases.items()}
    samples: dict[str, list[float]] = {name: [] for name in cases}
    start = time.perf_counter()
    for done in range(rounds):
        if budget is not None and done >= 3 and time.perf_counter() - start > budget:
            break
        for name in list(cases) if done % 2 == 0 else reversed(cases):
            samples[name].append(sample(cases[name], repeats[name], clock))
        if on_round is not None:
            on_round(done + 1)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _warm_up(name: str, case: Case, gate: Gate | None, clock: Callable[[], float]) -> int:
    """Run a case once, check its result, and return how often a sample has to repeat it."""
    result = case()
    if gate is not None:
        gate(name, result)
    del result
    return _repeats(sample(case, 1, clock))


def _repeats(seconds: float) -> int:
    return max(1, round(SHORTEST_SAMPLE / max(seconds, 1e-7))) if seconds < SHORTEST_SAMPLE else 1


def sample(case: Case, repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, the mean of ``repeats``; the device has finished before and after."""
    _synchronize()
    start = clock()
    for _ in range(repeats):
        case()
    _synchronize()
    return (clock() - start) / repeats


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
