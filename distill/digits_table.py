"""The table of the digits experiment, and what its rows say about the aim: met, not met, or not to be decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from blade_compile.distill.digits_rows import Row

TEACHER_BAR = 0.95
"accuracy of the teacher's clips, below which nothing may be claimed"
JUDGE_BAR = 0.98
"accuracy on real clips, likewise"
SEEDS_WANTED = 3
DENSITY_BAR = 0.25
"the aim speaks of a sparsity of 0.75 to 0.8"
METRICS = {"accuracy": 1, "frechet": -1}
"the aim's metrics; 1: more is better, -1: less is"

NAMES = {"accuracy": "accuracy", "frechet": "Frechet distance"}

Outcome = Literal["met", "not met", "undecided", "open"]
"""undecided: the mean is on the right side, but not every seed is; open: rows are missing"""

JOINT, TEACHER, REAL = "joint", "teacher", "real"
RIVALS = ("sparsify_after", "sparsify_after_tuned", "distil_after")
"the sequential orders, which the joint student has to beat"


@dataclass(frozen=True)
class Spread:
    """A number over the seeds."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Mean, least and largest."""
        return cls(fmean(values), min(values), max(values))

    def show(self, form: str) -> str:
        """``mean (low to high)``, or one value where there is no spread to speak of."""
        mean, low, high = (format(value, form) for value in (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low} to {high})"


@dataclass(frozen=True)
class Claim:
    """One comparison of the joint student, over the seeds that both sides have."""

    metric: str
    against: str
    strict: bool
    "it has to be better; False: at least as good"
    outcome: Outcome
    mine: float | None = None
    theirs: float | None = None
    wins: int = 0
    "seeds on which it holds"
    seeds: int = 0

    def sentence(self, title: str) -> str:
        """In words."""
        wanted = "better than" if self.strict else "at least as good as"
        said = f"{NAMES[self.metric]} {wanted} {title}: {self.outcome}"
        if self.mine is None or self.theirs is None:
            return f"{said} (no rows of the same seeds)"
        few = f"; {SEEDS_WANTED} seeds are wanted" if self.seeds < SEEDS_WANTED else ""
        numbers = f"{_number(self.metric, self.mine)} against {_number(self.metric, self.theirs)}"
        return f"{said} ({numbers}; on {self.wins} of {self.seeds} seeds{few})"


@dataclass(frozen=True)
class Verdict:
    """What may be said about the aim."""

    outcome: Outcome
    reasons: tuple[str, ...]
    "why nothing may be claimed; empty where claims may be made"
    claims: tuple[Claim, ...]


def _number(metric: str, value: float) -> str:
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.2f}"


def of_arm(rows: Sequence[Row], name: str) -> dict[int, Row]:
    """The rows of an arm by seed."""
    return {row.seed: row for row in rows if row.arm == name}


def claim(rows: Sequence[Row], metric: str, against: str, *, strict: bool) -> Claim:
    """Compare the joint student with another arm, seed by seed (equal noise and labels).

    Met where its mean and every seed hold; undecided where the mean holds and a seed doesn't; not met where the mean
    doesn't hold, a tie included where it has to be better. Open without rows of ``SEEDS_WANTED`` common seeds.

    Args:
        rows: of the experiment.
        metric: ``accuracy`` or ``frechet``.
        against: the other arm.
        strict: it has to be better, not only as good.
    """
    mine, theirs = of_arm(rows, JOINT), of_arm(rows, against)
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return Claim(metric, against, strict, "open")
    pairs = [(getattr(mine[s], metric), getattr(theirs[s], metric)) for s in seeds]
    gains = [METRICS[metric] * (a - b) for a, b in pairs]
    hold = [gain > 0 if strict else gain >= 0 for gain in gains]
    means = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
    gain = METRICS[metric] * (means[0] - means[1])
    outcome: Outcome = "met" if all(hold) else "undecided" if (gain > 0 if strict else gain >= 0) else "not met"
    if len(seeds) < SEEDS_WANTED:
        outcome = "open"
    return Claim(metric, against, strict, outcome, *means, sum(hold), len(seeds))


def verdict(rows: Sequence[Row]) -> Verdict:
    """What the rows say about the aim of the experiment.

    The aim: the joint sparse student is at least as good as its 50-step teacher in accuracy and Frechet distance, and
    better than both sequential orders. Nothing may be claimed with a poor teacher or a judge that misreads real clips.
    """
    reasons = []
    bars = ((REAL, JUDGE_BAR, "real clips"), (TEACHER, TEACHER_BAR, "the teacher's clips"))
    for name, bar, what in bars:
        found = [row.accuracy for row in of_arm(rows, name).values()]
        if not found:
            reasons.append(f"there is no row of {what}")
        elif fmean(found) < bar:
            reasons.append(f"{what} are read correctly {fmean(found):.1%} of the time; {bar:.0%} are wanted")
    densities = [row.density for row in of_arm(rows, JOINT).values() if row.density is not None]
    if densities and max(densities) > DENSITY_BAR + 1e-6:
        reasons.append(f"the joint student keeps {max(densities):.1%} of the blocks; at most {DENSITY_BAR:.0%} count")
    pairs = [(TEACHER, False), *((rival, True) for rival in RIVALS)]
    claims = tuple(claim(rows, metric, other, strict=strict) for other, strict in pairs for metric in METRICS)
    outcomes = {one.outcome for one in claims}
    order: tuple[Outcome, ...] = ("open", "not met", "undecided", "met")
    whole = "open" if reasons else next(one for one in order if one in outcomes)
    return Verdict(whole, tuple(reasons), claims)


def sentences(rows: Sequence[Row], titles: dict[str, str]) -> list[str]:
    """The verdict in words, one line each.

    Args:
        rows: of the experiment.
        titles: of the arms by name.
    """
    found = verdict(rows)
    said = [one.sentence(titles.get(one.against, one.against)) for one in found.claims]
    if found.reasons:
        return [f"Nothing may be claimed: {'; '.join(found.reasons)}.", *said]
    ending = ": rows are missing" if found.outcome == "open" else ""
    return [f"Aim of the experiment: {found.outcome}{ending}.", *said]


_WIDE = 140
HEADER = ("model", "attention", "steps", "seeds", *NAMES.values(), "motion", "blocks kept", "s / clip")


def line(rows: Sequence[Row], title: str) -> tuple[str, ...]:
    """One line of the table: the rows of one arm over its seeds, in the columns of ``HEADER``."""
    first = rows[0]

    def over(name: str, form: str) -> str:
        values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        return Spread.of(values).show(form) if values else "-"

    return (
        title,
        "-" if first.steps is None else "sparse" if first.sparse else "dense",
        "-" if first.steps is None else str(first.steps),
        str(len(rows)),
        over("accuracy", ".3f"),
        over("frechet", ".2f"),
        over("motion", ".3f"),
        over("density", ".3f"),
        over("seconds_per_clip", ".3g"),
    )


def lines(rows: Sequence[Row], titles: dict[str, str], *, mark: str = "") -> list[tuple[str, ...]]:
    """The lines of all arms, in the order of the titles.

    Args:
        rows: of one experiment.
        titles: of the arms by name; rows of others come after them.
        mark: put before each title.
    """
    known = titles | {row.arm: row.title for row in rows if row.arm not in titles}
    groups = ((title, list(of_arm(rows, name).values())) for name, title in known.items())
    return [line(group, mark + title) for title, group in groups if group]


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Lines as a markdown table, its columns aligned so that it also reads as plain text."""
    shown = [HEADER, *table]
    widths = [max(len(row[i]) for row in shown) for i in range(len(HEADER))]
    shown.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in shown) + "\n"


def rich_table(table: Sequence[Sequence[str]], title: str, width: int) -> Any:
    """Lines for a terminal.

    Args:
        table: from ``lines``.
        title: above it.
        width: of the terminal; a narrow one gets the columns that the titles don't already say.
    """
    from rich.table import Table

    left_out = {"attention", "seeds", "blocks kept"} if width < _WIDE else set()
    chosen = [i for i, name in enumerate(HEADER) if name not in left_out]
    shown = Table(title=title, title_justify="left")
    for i in chosen:
        shown.add_column(HEADER[i], justify="left" if i < 2 else "right", min_width=16 if i == 0 else None)
    for row in table:
        shown.add_row(*(row[i] for i in chosen), style="bold" if row[0].startswith(">") else None)
    return shown
