"""The files of a run: which configuration it has, what was measured, and where its checkpoints and its export are.

::

    <output_dir>/<name>/
      config.yaml      resolved, with versions and the command line in comments
      metrics.jsonl    one object per logged step
      samples/         step_00000100/<prompt>-<seed>.gif, prompts.json
      checkpoints/     step_00000100/
      tracker/         files of TensorBoard, wandb or trackio
      export/          what users load
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from blade_compile.distill.config import RunConfig, dump, load
from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.export import versions

_MAY_DIFFER = frozenset(
    {
        "name", "output_dir", "preset", "tracker", "loop.max_steps", "loop.stop_after_minutes", "loop.keep_last",
        "loop.checkpoint_every", "loop.sample_every", "loop.log_every",
        "loop.batch_size", "loop.grad_accumulation",  # their product with the ranks is checked by itself
    }
)  # fmt: skip


class RunFolder:
    """One run's folder; only the first rank writes into it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._metrics: TextIO | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The folder of the export."""
        return self.path / "export"

    def samples(self, step: int) -> Path:
        """The folder of the clips that were made after a step."""
        return self.path / "samples" / f"step_{step:08d}"

    def config(self) -> RunConfig:
        """The configuration of the run.

        Raises:
            ConfigError: there is none, or it is malformed.
        """
        return load(self.path / "config.yaml")

    def open(self, config: RunConfig, step: int) -> None:
        """Write the configuration, drop what was measured after a step, and open the metrics for more.

        Raises:
            DataError: the folder can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _replace(self.path / "config.yaml", _header() + dump(config))
            metrics = self.path / "metrics.jsonl"
            _replace(metrics, "".join(_until(metrics, step)))
            self._metrics = metrics.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def log(self, numbers: Mapping[str, Any]) -> None:
        """Add a line to the metrics. Raises ``DataError`` where it can't be written."""
        assert self._metrics is not None
        try:
            self._metrics.write(json.dumps(dict(numbers)) + "\n")
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def close(self) -> None:
        """Close the metrics."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def check_same(found: Mapping[str, Any], config: RunConfig, where: Path) -> None:
    """Refuse to go on with another configuration than a checkpoint's.

    Args:
        found: ``RunConfig.model_dump()`` of the checkpoint.
        config: of this run. Its length, its folder, its tracker and what is written when may be others.
        where: the checkpoint.

    Raises:
        ConfigError: naming every key that differs, with both values.
    """
    old, new = _flat(found), _flat(config.model_dump(mode="json"))
    keys = [k for k in {**old, **new} if k not in _MAY_DIFFER and old.get(k) != new.get(k)]
    if keys:
        said = "; ".join(f"{key} was {_short(old, key)} and is {_short(new, key)}" for key in keys)
        raise ConfigError(f"{where} is of another configuration: {said}. Set them back, or give another name")


def _short(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "absent"


def _flat(section: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Sections as dotted keys, in JSON's types."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{at}{key}.")
        else:
            flat[f"{at}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _header() -> str:
    """What made the run, as comments."""
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    command = shlex.join(sys.argv).replace("\n", " ")
    return f"# {command}\n# {made}, Python {platform.python_version()}\n"


def _until(metrics: Path, step: int) -> list[str]:
    """The whole lines of steps up to one."""
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
        except (ValueError, KeyError, TypeError):
            continue  # cut off while it was written
    return kept


def _replace(path: Path, text: str) -> None:
    """Beside and renamed: the file is whole, the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} can't be written: {error.strerror or error}; free space and run the same command again")
