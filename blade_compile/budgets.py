"""A calibration file: what is in it, and whether it belongs to a configuration."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from .passes.decide import Budget

FORMAT = 1
KEPT_OPTIONS = (
    "policy",
    "block_size",
    "probe_tokens",
    "seed",
    "probe",
    "global_window",
    "order",
    "grid",
    "protect",
    "include",
    "exclude",
)
"""Fields of ``BladeConfig`` that the budgets were found under"""


def load(path: Any) -> dict[str, Any]:
    """The content of a calibration file.

    Raises:
        ValueError: the file is missing, is no calibration, or is of another format.
    """
    file = Path(path)
    try:
        stamp = file.stat().st_mtime_ns
    except OSError as error:
        raise ValueError(
            f"calibration={str(path)!r}: {error.strerror}; give the path that calibrate returned."
        ) from None
    return _load(str(file), stamp)


@functools.lru_cache(16)
def _load(path: str, stamp: int) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
        found, sites = content["format"], content["sites"]
        for site in sites.values():
            assert len(site["sparsity"]) == site["heads"] and len(site["tokens"]) == 2
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise ValueError(
            f"calibration={path!r} is no calibration file; write one by blade_compile.calibrate."
        ) from None
    if found != FORMAT:
        raise ValueError(f"calibration={path!r} has format {found}, this version reads {FORMAT}; calibrate again.")
    return content  # type: ignore[no-any-return]


def budgets(path: Any) -> tuple[tuple[str, Budget], ...]:
    """The budgets of a calibration file, by site."""
    return tuple(
        (name, Budget(tuple(site["sparsity"]), S=site["tokens"][0], T=site["tokens"][1], D=site["head_dim"]))
        for name, site in load(path)["sites"].items()
    )


def kept_options(path: Any) -> dict[str, Any]:
    """The options that the budgets were found under, as ``BladeConfig`` holds them."""
    options = {name: load(path)["options"][name] for name in KEPT_OPTIONS if name in load(path)["options"]}
    return {name: _tuples(value) for name, value in options.items()}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
