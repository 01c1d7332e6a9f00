"""Trackers beside ``metrics.jsonl``: TensorBoard, wandb and trackio, each imported only where it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from blade_compile.distill.config import RunConfig
from blade_compile.distill.errors import ConfigError

_RUN_ID = "run_id"


class Tracker(Protocol):
    """Takes numbers of a step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers by name, measured after a step."""

    def close(self) -> None:
        """Write what is left."""


class _TensorBoard:
    """Event files; those of steps that are made again are hidden by ``purge_step``."""

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        writer: Any = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(log_dir=str(folder), purge_step=step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One run of the project ``blade-distill``, which a resumed process goes on with."""

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        wandb = _module("wandb", "wandb")
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / _RUN_ID
        known = record.read_text(encoding="utf-8").strip() if record.exists() else uuid4().hex[:8]
        record.write_text(known, encoding="utf-8")
        self._run = wandb.init(
            project="blade-distill", name=config.name, id=known, resume="allow", dir=str(folder),
            config=config.model_dump(mode="json"),
        )  # fmt: skip

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """One run of the project ``blade-distill``, by the name of the run."""

    def __init__(self, config: RunConfig, folder: Path, step: int) -> None:
        self._trackio = _module("trackio", "trackio")
        self._trackio.init(
            project="blade-distill", name=config.name, resume="allow", config=config.model_dump(mode="json")
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        self._trackio.finish()


_TRACKERS: dict[str, tuple[Any, str]] = {
    "tensorboard": (_TensorBoard, "torch.utils.tensorboard"),
    "wandb": (_Wandb, "wandb"),
    "trackio": (_Trackio, "trackio"),
}


def check_tracker(config: RunConfig) -> None:
    """Raise ``ConfigError`` where the tracker's package is not installed."""
    if config.tracker != "none":
        _module(_TRACKERS[config.tracker][1], config.tracker)


def open_tracker(config: RunConfig, folder: Path, step: int) -> Tracker | None:
    """The tracker of a run; None for ``none``.

    Args:
        config: of the run.
        folder: for the tracker's files.
        step: the last one that stays; numbers of later steps come again.

    Raises:
        ConfigError: its package is not installed, or it can't be started.
    """
    if config.tracker == "none":
        return None
    check_tracker(config)
    try:
        made: Tracker = _TRACKERS[config.tracker][0](config, folder, step)
    except Exception as error:  # a service may fail in ways of its own
        said = " ".join(str(error).split())
        raise ConfigError(
            f"tracker: {config.tracker} can't be started: {said}; set it up, or set tracker=none"
        ) from error
    return made


def _module(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(
            f"tracker is {package}, which is not installed; pip install 'blade-compile[{package}]', or set tracker=none"
        ) from None
