"""The files of checkpoints: brought to the disk, named once complete, compared with their hashes, removed.

``checkpoints.py`` says what lies where and writes the tensors; here are no tensors and no ranks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
RECORD = "record.json"
_NAME = re.compile(r"(?:\.replaced-)?step_(\d{8,})")

_log = logging.getLogger(__name__)


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:08d}"


def begin(folder: Path, partial: Path) -> None:
    """Make an empty folder to write into, in place of what killed writers left."""
    folder.mkdir(parents=True, exist_ok=True)
    replaced = [path for path in folder.glob(".replaced-*") if (folder / path.name.removeprefix(".replaced-")).exists()]
    for left in (*folder.glob(".partial-*"), *folder.glob(".removed-*"), *replaced):
        _remove(left)
    partial.mkdir()


def complete(partial: Path, target: Path, files: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write record and manifest beside tensors that are on the disk, and give the folder its name."""
    sealed = {**files, RECORD: _write_json(partial / RECORD, state)}
    _write_json(partial / MANIFEST, {"format": FORMAT, "files": sealed})
    _sync_folder(partial)
    # A folder with files can't be renamed over, so one of the same step is moved away first. ``found`` knows its
    # hidden name, should this process end in between.
    replaced = target.with_name(f".replaced-{target.name}")
    if target.is_symlink() or target.exists():
        _remove(replaced)
        target.rename(replaced)
    partial.rename(target)
    _sync_folder(target.parent)
    _remove(replaced)


def _write_json(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return seal(path)


def seal(path: Path) -> dict[str, Any]:
    """Bring a file to the disk; its size and hash."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems can't
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def retire(folder: Path, step: int, keep_last: int) -> None:
    """Remove what ``keep_last`` leaves out and set aside what is of a later step; neither can fail a finished save."""
    try:
        others = found(folder)
        for path in [path for other, path in others if other > step]:
            aside = folder / f"aside_{path.name.lstrip('.')}"
            _remove(aside)
            path.rename(aside)
            _log.warning("%s is of a later step than the one just saved; it is now named %s", path, aside.name)
        for path in [path for other, path in others if other < step][max(keep_last, 1) - 1 :]:
            doomed = folder / f".removed-{path.name.lstrip('.')}"  # so that a half removed one is never found
            path.rename(doomed)
            _remove(doomed)
    except OSError as error:
        _log.warning("%s: old checkpoints can't be removed: %s", folder, error)


def found(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of what may be checkpoints, newest first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    paths = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    steps = {int(path.name.split("_")[1]): path for path in paths}  # "step_" sorts after ".replaced-step_" and wins
    return sorted(steps.items(), reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, whole or not."""
    return path.is_dir() and bool(_NAME.fullmatch(path.name) or (path / MANIFEST).exists())


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def difference(path: Path, only: str | None = None, share: slice = slice(None)) -> str | None:
    """How a checkpoint differs from its manifest; None where it is whole.

    Args:
        path: of the checkpoint.
        only: one file to compare instead of all.
        share: which of the files to compare.
    """
    try:
        manifest = read_json(path / MANIFEST)
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has the format {manifest['format']!r}; this version reads {FORMAT}"
        files = manifest["files"]
        # Whoever reads the tensors takes any safetensors file that is there
        foreign = {file.name for file in path.glob("*.safetensors")} - set(files)
        if foreign:
            return f"{min(foreign)} is no part of it"
        for name in [only] if only else sorted({*files, RECORD})[share]:
            if (size := (path / name).stat().st_size) != files[name]["bytes"]:
                return f"{name} has {size} bytes instead of {files[name]['bytes']}"
            if _sha256(path / name) != files[name]["sha256"]:
                return f"the content of {name} has changed"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is malformed ({type(error).__name__}: {error})"
    return None
