"""What can be measured: suites of cases, each with the arms that are timed against each other.

A suite is a function that yields cases; ``@suite("ops")`` puts it into `SUITES`. A case is built only when it is its
turn, and freed after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Arm:
    """One contender: a call without arguments, and what is known of it.

    ``check`` gets the warm-up's result, returns its error against the reference (None: it has none to compare with) and
    raises `WrongResultError` where that is above what is allowed; an arm without a check has no result that could be
    wrong (a part, timed for the split).
    ``of``: the arm that this is a part of. ``about``: columns of the row, e.g. density, FLOPs, policy.
    ``certified_by``: the arm whose right result this one's rests on, where leaving blocks out changes the result and
    only the arm that keeps all can be compared: if that one is wrong, so is this.
    """

    name: str
    call: Call
    check: Callable[[Any], float | None] | None = None
    of: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    certified_by: str | None = None
    after: Callable[[], dict[str, Any]] | None = None
    "more columns, from calls of their own after the clock: the density as counted, the parts of the time"
    timed: bool = True
    "False: only checked, for others to rest on"


@dataclass(frozen=True)
class Case:
    """Arms on the same inputs, the first of which is the baseline of the speed-ups."""

    name: str
    arms: Callable[[], list[Arm]] = list
    about: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    "arms that can't run here, and why"
    sites: Callable[[], dict[str, Any]] | None = None
    "`explain`'s report of the model, as a dictionary"
    rows: Callable[[], list[dict[str, Any]]] | None = None
    "instead of arms: rows of what no call in this process can show (fresh processes, errors without a time)"
    device: torch.device | None = None
    "where it runs, if that is not the plan's device"


@dataclass(frozen=True)
class Plan:
    """What a suite is asked for."""

    device: torch.device
    quick: bool = False
    seed: int = 0


class WrongResultError(AssertionError):
    """A result that failed its gate: it is never timed."""


Suite = Callable[[Plan], Iterator[Case]]
SUITES: dict[str, Suite] = {}


def suite(name: str) -> Callable[[Suite], Suite]:
    """Register a function under a suite's name; its docstring's first line describes it."""

    def register(function: Suite) -> Suite:
        if name in SUITES:
            raise ValueError(f"suite {name!r} is registered twice.")
        SUITES[name] = function
        return function

    return register
