"""What changes over the steps of a generation: dense steps, sparsity by step, and AdaSpa's searches (algorithms 3.3).

Steps are counted from 1, as in the paper. An operator carries its schedule as a JSON string.
"""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any

SEARCH_SHARES = (0.2, 0.6)
"""Where AdaSpa searches by default: steps 10 and 30 of 50."""


class Phase(IntEnum):
    """What an attention site does in one step."""

    DENSE = 0
    "every block, nothing is remembered"
    SEARCH = 1
    "every block; its LSE and a new mask are remembered (AdaSpa's fused search)"
    REUSE = 2
    "the remembered mask; a policy without one predicts as usual"
    REFRESH = 3
    "a new mask from the remembered LSE, used at once (AdaSpa's LSE-cached search)"
    FRESH = 4
    "a mask for this call alone: what happens outside a generation"


@dataclass(frozen=True)
class Schedule:
    """Settings over the steps of a generation.

    Raises ``ValueError`` for a value that is not valid.
    """

    dense_steps: int = 0
    "first steps that stay dense"
    sparsity_steps: tuple[tuple[int, float], ...] = ()
    "(step, sparsity) pairs, ascending: the sparsity from that step on"
    search_steps: tuple[int, ...] | None = None
    "AdaSpa's searches, ascending; dense before the first. None: at 20 % and 60 % of the steps"
    head_adaptive: bool = True
    "AdaSpa: three levels of sparsity over the heads"
    drift: float | None = None
    "AdaSpa: search again when the mass on a reused mask has fallen by this share; None: never"

    def __post_init__(self) -> None:
        if type(self.dense_steps) is not int or self.dense_steps < 0:
            raise ValueError(f"dense_steps={self.dense_steps!r}; valid is an integer from 0.")
        for name, steps in (
            ("search_steps", self.search_steps or ()),
            ("sparsity_steps", [step for step, _ in self.sparsity_steps]),
        ):
            ascending = all(a < b for a, b in itertools.pairwise(steps))
            if not ascending or any(type(step) is not int or step < 1 for step in steps):
                raise ValueError(f"{name} holds the steps {tuple(steps)}; valid are ascending integers from 1.")
        for _, sparsity in self.sparsity_steps:
            if not 0 <= sparsity < 1:
                raise ValueError(f"sparsity_steps holds the sparsity {sparsity}; valid is a number in [0, 1).")
        if self.search_steps == ():
            raise ValueError("search_steps is empty; give at least one step, or None for 20 % and 60 % of the steps.")
        if self.drift is not None and not 0 < self.drift < 1:
            raise ValueError(f"drift={self.drift!r}; valid is a number in (0, 1), or None.")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """A schedule from an operator's JSON; the empty string changes nothing."""
        return _parse(text)

    def to_json(self) -> str:
        """What `parse` reads; empty where nothing differs from the default."""
        return "" if self == Schedule() else json.dumps(asdict(self), sort_keys=True)

    def carries(self, policy: str) -> bool:
        """Whether a policy under this schedule has to know the step of the generation."""
        return policy == "adaspa" or bool(self.dense_steps or self.sparsity_steps)

    def searches(self, num_steps: int) -> tuple[int, ...]:
        """AdaSpa's search steps in a generation of ``num_steps``.

        A step at which the sparsity changes is one too: the remembered mask is of the old one.

        Raises:
            ValueError: a search step after the last step, or before the last dense one.
        """
        given = self.search_steps
        if given is None:
            first = self.dense_steps or _share(SEARCH_SHARES[0], num_steps)
            given = tuple(sorted({first, max(first, _share(SEARCH_SHARES[1], num_steps))}))
        if given[-1] > num_steps:
            raise ValueError(
                f"AdaSpa searches at the steps {given}, but generation(num_steps={num_steps}) ends before step "
                f"{given[-1]}; give search_steps (or dense_steps) within {num_steps}, or the right num_steps."
            )
        if self.dense_steps > given[0]:
            raise ValueError(
                f"dense_steps={self.dense_steps}, but search_steps={given} begins at step {given[0]}, after which "
                f"AdaSpa is sparse; begin at step {self.dense_steps} or lower dense_steps."
            )
        changes = {step for step, _ in self.sparsity_steps if given[0] < step <= num_steps}
        return tuple(sorted({*given, *changes}))

    def phase(self, policy: str, step: int, num_steps: int) -> Phase:
        """What a site does at a step."""
        if policy != "adaspa":
            return Phase.DENSE if step <= self.dense_steps else Phase.REUSE
        searches = self.searches(num_steps)
        if step <= searches[0]:
            return Phase.SEARCH if step == searches[0] else Phase.DENSE
        return Phase.REFRESH if step in searches else Phase.REUSE

    def level(self, step: int) -> int:
        """Which of `levels` holds at a step."""
        return sum(first <= step for first, _ in self.sparsity_steps)

    def levels(self, sparsity: float | None) -> tuple[float | None, ...]:
        """The sparsities of a generation; the first, the operator's own, holds until the first pair's step."""
        return (sparsity, *(value for _, value in self.sparsity_steps))


def _share(share: float, num_steps: int) -> int:
    return max(1, round(share * num_steps))


@functools.lru_cache(256)
def _parse(text: str) -> Schedule:
    try:
        read: dict[str, Any] = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"schedule={text!r} is not JSON ({error}).") from None
    known = {field.name for field in fields(Schedule)}
    if not isinstance(read, dict) or not read.keys() <= known:
        raise ValueError(f"schedule={text!r}; valid is a JSON object with the keys {', '.join(sorted(known))}.")
    if read.get("search_steps") is not None:
        read["search_steps"] = tuple(read["search_steps"])
    read["sparsity_steps"] = tuple((step, value) for step, value in read.get("sparsity_steps", ()))
    return Schedule(**read)
