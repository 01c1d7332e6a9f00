"""``python -m benchmarks compare A B``: what changed between two reports beyond their noise.

Compared are speed-ups over the baseline of the same run, not seconds: two runs rarely find the machine in the same
mood. The baseline itself is compared by its seconds, as a note on the machines.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LEAST = 0.05  # a smaller change is never called one


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
    """Arms that have a speed-up in both, in the order of ``after``."""
    known = {_key(row): row["speedup"] for row in before if "speedup" in row}
    found = []
    for row in after:
        if "speedup" not in row or row["arm"] == row["baseline"] or _key(row) not in known:
            continue
        old, new = known[_key(row)], row["speedup"]
        found.append(Change(_key(row), old, new, verdict(old, new)))
    return found


def verdict(before: dict[str, float], after: dict[str, float]) -> str:
    """Changed where the 20 to 80 % ranges do not meet and the medians are further apart than `LEAST`."""
    apart = before["high"] < after["low"] or after["high"] < before["low"]
    if not apart or abs(after["median"] / before["median"] - 1) <= LEAST:
        return "same"
    return "faster" if after["median"] > before["median"] else "slower"


def lost(before: list[Row], after: list[Row]) -> list[str]:
    """Arms that were right before and are not any more, with the reason."""
    right = {_key(row) for row in before if row["status"] == "ok"}
    return [
        f"{' / '.join(_key(row))}: {row['status']}, {row.get('reason', '')}"
        for row in after
        if row["status"] in ("wrong", "failed") and _key(row) in right
    ]


def _key(row: Row) -> tuple[str, str, str]:
    return row["suite"], row["case"], row["arm"]


def text(before: list[Row], after: list[Row]) -> str:
    """The comparison as lines: what changed, then how many did not."""
    found = changes(before, after)
    lines = []
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
