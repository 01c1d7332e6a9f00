"""``python -m benchmarks compare A B``: what changed between two reports beyond their noise.

Compared are speed-ups over the baseline of the same run, not seconds: two runs rarely find the machine in the same
mood. The baselines' seconds are printed beside them, as a note on the machines, and not judged. An arm that has no
comparable speed-up any more, because it is gone, wrong, or was measured on something else, is lost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LEAST = 0.05  # a smaller change is never called one
SAME = ("device", "size", "dtype", "H")  # where these differ, two rows of one name are two measurements


@dataclass(frozen=True)
class Change:
    """One arm in both reports."""

    key: tuple[str, str, str]
    before: dict[str, float]
    after: dict[str, float]
    verdict: str
    "``faster``, ``slower`` or ``same``"

    @property
    def ratio(self) -> float:
        """Speed-up after over before."""
        return self.after["median"] / self.before["median"]


def load(path: Path) -> list[Row]:
    """The rows of a report: its folder or its JSON file. ValueError where there is none."""
    file = path / "report.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{path}: no report.json here; give the --out folder of a run, or its JSON file.")
    content = json.loads(file.read_text())
    if not isinstance(content, dict) or "rows" not in content:
        raise ValueError(f"{file}: not a report; expected an object with 'rows'.")
    rows: list[Row] = content["rows"]
    return rows


def changes(before: list[Row], after: list[Row]) -> list[Change]:
    """Arms that have a speed-up in both, measured on the same, in the order of ``after``."""
    known = {_key(row): row for row in before if "speedup" in row}
    found = []
    for row in after:
        was = known.get(_key(row))
        if was is None or "speedup" not in row or row["arm"] == row["baseline"] or _differing(was, row):
            continue
        old, new = was["speedup"], row["speedup"]
        found.append(Change(_key(row), old, new, verdict(old, new)))
    return found


def verdict(before: dict[str, float], after: dict[str, float]) -> str:
    """Changed where the 20 to 80 % ranges do not meet and the medians are further apart than `LEAST`."""
    apart = before["high"] < after["low"] or after["high"] < before["low"]
    if not apart or abs(after["median"] / before["median"] - 1) <= LEAST:
        return "same"
    return "faster" if after["median"] > before["median"] else "slower"


def lost(before: list[Row], after: list[Row]) -> list[str]:
    """Arms that were right before and can't be compared any more, with the reason."""
    now = {_key(row): row for row in after}
    right = {_key(row): row for row in before if row["status"] == "ok"}
    reasons = {key: _loss(row, now.get(key)) for key, row in right.items()}
    return [f"{' / '.join(key)}: {why}" for key, why in reasons.items() if why]


def _loss(was: Row, row: Row | None) -> str:
    if row is None:
        return "not in the second report"
    if row["status"] != "ok":
        return f"{row['status']}, {row.get('reason', '')}"
    if differing := _differing(was, row):
        return f"not the same measurement: {differing}"
    return "it has no speed-up any more" if "speedup" in was and "speedup" not in row else ""


def _differing(was: Row, row: Row) -> str:
    """What two rows of one name were measured on, where that is not the same."""
    return ", ".join(f"{key} {was.get(key)} -> {row.get(key)}" for key in SAME if was.get(key) != row.get(key))


def baselines(before: list[Row], after: list[Row]) -> list[str]:
    """The seconds of the baselines in both reports."""
    known = {_key(row): row for row in before if _is_baseline(row)}
    return [
        f"{' / '.join(_key(row))}: {known[_key(row)]['seconds']['median']:.3g} s -> {row['seconds']['median']:.3g} s"
        for row in after
        if _is_baseline(row) and _key(row) in known
    ]


def _is_baseline(row: Row) -> bool:
    return "seconds" in row and row["arm"] == row.get("baseline")


def _key(row: Row) -> tuple[str, str, str]:
    return row["suite"], row["case"], row["arm"]


def text(before: list[Row], after: list[Row]) -> str:
    """The comparison as lines: the baselines, what changed, what is lost, then how many did not change."""
    found = changes(before, after)
    lines = [f"baseline, for information: {line}" for line in baselines(before, after)]
    for change in sorted((c for c in found if c.verdict != "same"), key=lambda c: c.ratio):
        old, new = change.before, change.after
        lines.append(
            f"{change.verdict}: {' / '.join(change.key)}: {old['median']:.2f}x ({old['low']:.2f}-{old['high']:.2f}) -> "
            f"{new['median']:.2f}x ({new['low']:.2f}-{new['high']:.2f})"
        )
    lines += [f"lost: {line}" for line in lost(before, after)]
    same = sum(c.verdict == "same" for c in found)
    lines.append(f"{same} of {len(found)} arms in both reports did not change beyond noise")
    return "\n".join(lines)
