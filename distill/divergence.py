"""Losses and gradients that are no numbers any more, or explode: seen in the step in which it happens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_FACTOR = 1e3
_MEMORY = 0.98
_FIRST = 20
_SMALL = 1e-2  # where a student starts as its target, the first losses are rounding errors


class Divergence:
    """Watches some numbers of each step.

    A number has exploded where it is a thousand times its running average (of about 50 steps, once there are 20): far
    above what a noisy loss does, and far below what fp32 can hold, so that it is told before the weights are NaN.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        """Start, or go on from ``state``."""
        self.average: dict[str, float] = dict((state or {}).get("average", {}))
        self.seen: int = int((state or {}).get("seen", 0))

    def state(self) -> dict[str, Any]:
        """For a checkpoint, in JSON's types."""
        return {"average": dict(self.average), "seen": self.seen}

    def find(self, numbers: Mapping[str, float]) -> str | None:
        """Take in one step's numbers; what is wrong with them, or None."""
        for name, value in numbers.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
            usual = self.average.get(name, value)
            if self.seen >= _FIRST and abs(value) > _FACTOR * max(abs(usual), _SMALL):
                return f"{name} is {value:.4g}, {_FACTOR:.0f} times its average of {usual:.4g}"
            self.average[name] = _MEMORY * usual + (1 - _MEMORY) * value
        self.seen += 1
        return None
