"""Prompts from files: .txt, .jsonl, .csv, .parquet, and FastVideo's validation .json."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blade_compile.distill.errors import DataError

TEXT_COLUMNS = ("prompt", "caption")
NUMBER_COLUMNS = ("seed", "height", "width", "num_frames")


@dataclass(frozen=True)
class Prompt:
    """A prompt, with what its file says about the clip; None: as configured."""

    text: str
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None


def read_prompts(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """Read a file of prompts.

    - ``.txt``: one prompt a line; empty lines are left out.
    - ``.jsonl``: one object a line, or one string.
    - ``.csv``, ``.parquet``: a column ``prompt`` or ``caption``.
    - ``.json``: a list of objects, or FastVideo's ``{"data": [{"caption": ..}, ..]}``.

    Objects and rows may also have ``seed``, ``height``, ``width``, ``num_frames``; other columns are left alone.

    Args:
        path: the file.
        columns: other names of columns, such as ``{"prompt": "text"}``.

    Raises:
        DataError: the file is missing, empty, malformed or of another kind; the message names the line.
    """
    file = Path(path)
    if file.suffix not in _READERS:
        raise DataError(f"data.prompts: {file} ends in {file.suffix!r}; valid are {', '.join(_READERS)}")
    names = _names(columns or {})
    try:
        rows = list(_READERS[file.suffix](file))
    except FileNotFoundError:
        raise DataError(f"data.prompts: {file} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.prompts: {file} can't be read: {error}") from None
    prompts = [_prompt(file, place, row, names) for place, row in rows]
    if not prompts:
        raise DataError(f"data.prompts: {file} holds no prompt")
    return prompts


def _names(columns: Mapping[str, str]) -> dict[str, str]:
    valid = (*TEXT_COLUMNS, *NUMBER_COLUMNS)
    for name in columns:
        if name not in valid:
            raise DataError(f"data.columns: unknown name {name!r}; valid are {', '.join(valid)}")
    return {name: columns.get(name, name) for name in valid}


def _txt(file: Path) -> Iterator[tuple[str, Any]]:
    for i, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            yield f"line {i}", line.strip()


def _jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    for i, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            yield f"line {i}", _parsed(file, line, i)


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    content = _parsed(file, _text(file), 1)
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise DataError(f'data.prompts: {file}: a list, or FastVideo\'s {{"data": [..]}}, is wanted')
    for i, item in enumerate(items, 1):
        yield f"item {i}", item


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"data.prompts: {file}, line {reader.line_num}: not as many cells as in line 1")
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(f"data.prompts: {file}, line {reader.line_num}: {error}") from None


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    if not file.is_file():
        raise FileNotFoundError(file)
    for i, row in enumerate(read_parquet(file, "data.prompts"), 1):
        yield f"row {i}", row


def read_parquet(file: Path, what: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file. Raises ``DataError`` without pyarrow, and for a damaged file."""
    try:
        from pyarrow import ArrowException  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise DataError(f"{what}: {file} is Parquet, which needs pyarrow: pip install pyarrow") from None
    try:
        table = ParquetFile(file)
        for batch in table.iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{what}: {file} is no readable Parquet file: {error}") from None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig").replace("\r\n", "\n")


def _parsed(file: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"data.prompts: {file}, line {line + error.lineno - 1}: no JSON: {error.msg}") from None


def _prompt(file: Path, place: str, row: Any, names: Mapping[str, str]) -> Prompt:
    """A row as a prompt."""
    if isinstance(row, str):
        row = {names["prompt"]: row}
    if not isinstance(row, dict):
        raise DataError(f"data.prompts: {file}, {place}: a {type(row).__name__}; an object with a prompt is wanted")
    text = next((row[names[n]] for n in TEXT_COLUMNS if row.get(names[n]) is not None), None)
    if not isinstance(text, str) or not text.strip():
        wanted = " or ".join(names[n] for n in TEXT_COLUMNS)
        found = ", ".join(map(str, row)) or "nothing"
        raise DataError(f"data.prompts: {file}, {place}: no text in {wanted} (found {found}); or set data.columns")
    numbers = {n: _whole(file, place, names[n], row.get(names[n])) for n in NUMBER_COLUMNS}
    return Prompt(text.strip(), **numbers)


def _whole(file: Path, place: str, name: str, value: Any) -> int | None:
    """An integer cell; None where it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not number.is_integer() or number < 0:
        raise DataError(f"data.prompts: {file}, {place}: {name} is {value!r}; an integer is wanted")
    return int(number)


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".json": _json,
}
