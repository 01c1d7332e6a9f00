"""The files of a model in diffusers format: in a local folder, or on the hub, fetched one by one when asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blade_compile.distill.errors import ConfigError


@dataclass(frozen=True)
class ModelFiles:
    """A model folder."""

    source: str
    "a folder, or a hub id such as ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``"
    revision: str | None = None
    "branch, tag or commit on the hub"

    def __post_init__(self) -> None:
        local = Path(self.source).expanduser()
        looks_local = self.source.startswith((".", "/", "~")) or self.source.count("/") != 1
        if looks_local and not local.is_dir():
            raise ConfigError(
                f"model.path: {self.source!r} is no folder; give one in diffusers format, or a hub id owner/name"
            )

    @property
    def is_local(self) -> bool:
        """Whether the source is a folder on this machine."""
        return Path(self.source).expanduser().is_dir()

    @property
    def location(self) -> str:
        """What diffusers' ``from_pretrained`` takes."""
        return str(Path(self.source).expanduser()) if self.is_local else self.source

    def json(self, name: str, optional: bool = False) -> dict[str, Any]:
        """The content of a JSON file; {} where an optional one is missing.

        Raises:
            ConfigError: the file is missing or is no JSON object.
        """
        path = self._path(name)
        if path is None:
            if optional:
                return {}
            raise ConfigError(f"{self.source} has no {name}; a model in diffusers format is wanted")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}; the model folder is damaged, fetch it again") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds a {type(content).__name__}; a JSON object is wanted")
        return content

    def _path(self, name: str) -> Path | None:
        if self.is_local:
            path = Path(self.source).expanduser() / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.source, name, revision=self.revision))
        except LocalEntryNotFoundError:
            raise ConfigError(
                f"model.path: {self.source!r} is no folder here, and the hub can't be reached; "
                "give a local folder in diffusers format, or fetch the model while online"
            ) from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise ConfigError(f"model.path: {self.source!r} on the hub: {' '.join(str(error).split())}") from None
