"""Rows of the digits experiment on disk: one for each arm and seed, with all that made it."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from blade_compile.distill.errors import DataError
from blade_compile.distill.export import versions

FORMAT = 1
FOLDER = Path(__file__).parent / "digits"
COMMITTED = FOLDER / "experiment.json"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the judge says about the clips of one arm and seed, and what made them."""

    arm: str
    title: str
    seed: int
    "of the training, and of the noise that the clips are sampled from"
    steps: int | None
    "model calls for a clip (twice as large ones with guidance); None: real clips"
    sparse: bool
    clips: int
    accuracy: float
    "share of clips that are read as the digit asked for"
    frame_accuracy: float
    frechet: float
    "Frechet distance of frame features to 1,000 real clips"
    motion: float
    "mean second difference of the centroid in pixels"
    density: float | None
    "kept share of the blocks as counted, mean over the attention calls; 1: dense; None: real clips"
    seconds_per_clip: float | None = None
    "compiled, in batches of ten, median; arms take turns; None: not timed"
    train_seconds: float | None = None
    "of the process that finished the training; None: nothing was trained"
    settings: Mapping[str, Any]
    made_by: Mapping[str, Any]
    "versions, machine, commit, date"


def made_by() -> dict[str, Any]:
    """Versions, machine, commit and date."""
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def machine() -> str:
    """What the times depend on."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {where}, {torch.get_num_threads()} threads"


def commit(root: Path = FOLDER.parent.parent) -> str | None:
    """The commit, with ``+`` where files differ from it; None outside a checkout of this repository."""
    if not (root / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def digest(path: Path) -> str:
    """A short name for a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def write(path: Path, content: str | bytes) -> None:
    """Write beside and rename. Raises ``DataError`` where the folder can't be written."""
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise DataError(f"can't write {path}: {error.strerror or error}; free space or give another --out") from error


def read(path: Path) -> list[Row]:
    """Rows of a file; none where there is no file.

    Raises:
        DataError: the file is not one of these.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, rows = content["format"], [Row(**row) for row in content["rows"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no rows of this experiment: {error}; move it away to start again") from error
    if found != FORMAT:
        raise DataError(f"{path} has the format {found!r}; this version reads {FORMAT}; move it away to start again")
    return rows


def save(rows: Sequence[Row], path: Path) -> None:
    """Write rows as ``read`` reads them."""
    content = {"format": FORMAT, "rows": [asdict(row) for row in rows]}
    write(path, json.dumps(content, indent=1) + "\n")


class Book:
    """The rows of one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read(path)

    def find(self, arm: str, seed: int, settings: Mapping[str, Any]) -> Row | None:
        """The finished row of an arm and seed with exactly these settings."""
        wanted = json.loads(json.dumps(settings))
        return next((r for r in self.rows if (r.arm, r.seed, r.settings) == (arm, seed, wanted)), None)

    def add(self, row: Row) -> Row:
        """Keep a row, in the place of an earlier one with the same settings, and write all."""
        row = replace(row, settings=json.loads(json.dumps(row.settings)))
        old = self.find(row.arm, row.seed, row.settings)
        self.rows = [row if r is old else r for r in self.rows] if old else [*self.rows, row]
        save(self.rows, self.path)
        return row

    def update(self, change: Callable[[Row], Row]) -> None:
        """Change every row by a function and write all."""
        self.rows = [change(row) for row in self.rows]
        save(self.rows, self.path)
