"""Committed result tables: JSON files that know which source and which versions they were made from.

A long check writes its rows as it goes, so that it resumes where it was stopped, and ``make test`` compares each
table's fingerprint with the checkout. Figures that belong to a machine (times) are not tables of this kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def fingerprint(sources: Sequence[str]) -> str:
    """Hash the files that match the patterns (relative to the repo root), names and content, as 16 hex digits.

    A pattern after ``!`` takes files out again.
    """
    found = {path for pattern in sources if pattern[0] != "!" for path in ROOT.glob(pattern) if path.is_file()}
    left_out = {path for pattern in sources if pattern[0] == "!" for path in ROOT.glob(pattern[1:])}
    paths = sorted(found - left_out)
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed versions without their build suffix: 2.13.0+cpu and 2.13.0 run the same source."""
    return {name: metadata.version(name).split("+")[0] for name in packages}


class Table:
    """Rows in ``benchmarks/results/<name>.json``, valid for one state of the sources and one set of versions.

    Args:
        name: file name without suffix.
        command: what makes the table, named to whoever finds it stale.
        sources: glob patterns, relative to the repo root, of the files that the rows depend on; after ``!``, not on.
        packages: distributions whose versions the rows depend on.
        key: the column that names a row; results are kept and replaced by it.
        about: anything else that a reader needs, stored as it is.
    """

    def __init__(
        self,
        name: str,
        *,
        command: str,
        sources: Sequence[str],
        packages: Sequence[str],
        key: str,
        about: Row | None = None,
    ) -> None:
        self.path = RESULTS / f"{name}.json"
        self.key = key
        self.head: Row = {
            "command": command,
            "sources": list(sources),
            "fingerprint": fingerprint(sources),
            "versions": versions(packages),
            "about": about or {},
        }
        found = json.loads(self.path.read_text()) if self.path.exists() else None
        current = found is not None and not stale(found)
        self.rows: dict[str, Row] = {row[key]: row for row in found["rows"]} if found is not None and current else {}

    def put(self, row: Row) -> None:
        """Add or replace a row and write the file at once: a stopped run loses nothing."""
        self.rows[row[self.key]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [self.rows[name] for name in sorted(self.rows)]
        self.path.write_text(json.dumps({**self.head, "rows": rows}, indent=1) + "\n")

    def keep_only(self, names: Sequence[str]) -> None:
        """Forget rows of cases that no longer exist."""
        self.rows = {name: row for name, row in self.rows.items() if name in set(names)}


def stale(table: Row) -> str:
    """Return why a stored table doesn't belong to this checkout, or an empty string where it does."""
    if table["fingerprint"] != fingerprint(table["sources"]):
        return f"the files it was made from have changed ({', '.join(table['sources'])}); run `{table['command']}`"
    now = versions(list(table["versions"]))
    if table["versions"] != now:
        return f"it was made with {table['versions']}, and {now} is installed; run `{table['command']}`"
    return ""
