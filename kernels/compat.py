"""What another version of PyTorch, Triton or the system may lack, asked for by feature, never by version number.

Features of Triton's language are asked for where Triton is imported, in ``triton_common.py``: this file loads nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

try:
    from torch._functorch.utils import enable_single_level_autograd_function as single_level_functions
except ImportError:  # then functorch's transforms refuse a direct call, as they do for most custom operators
    single_level_functions = contextlib.nullcontext  # type: ignore[assignment]

try:
    from filelock import FileLock
except ImportError:  # it comes with torch, but torch does not promise it
    FileLock = None  # type: ignore[assignment, misc]


def after_fork(function: Callable[[], None]) -> None:
    """Run a function in children of ``os.fork``, where there is one."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


@functools.cache
def triton_version() -> str:
    """The installed Triton's version, for cache keys; "none" without one."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def known_settings(config: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Those of the wanted settings that a config module has."""
    return {name: value for name, value in wanted.items() if hasattr(config, name)}
