"""Which of PyTorch's dense attention kernels is the fastest on this device: what sparse attention has to beat."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu_cases import BACKENDS, dense_call, usable

Context = Callable[[], contextlib.AbstractContextManager[Any]]


@functools.cache
def best(device: torch.device, dtype: torch.dtype, H: int, S: int, D: int, visible: int | None = None) -> str:
    """The quickest backend's name for attention of this size, or ``default`` where PyTorch has only one (a CPU).

    ``visible``: keys that a mask [1, 1, 1, S] lets through, for a model that hands one over: FlashAttention takes none.
    """
    if device.type != "cuda":
        return "default"
    inputs = [torch.randn(1, H, S, D, device=device, dtype=dtype) for _ in range(3)]
    if visible is not None:
        inputs.append((torch.arange(S, device=device) < visible)[None, None, None])
    cases, _ = usable({name: dense_call(name, *inputs) for name in BACKENDS})
    if not cases:
        return "default"
    times = timing.paired(cases, rounds=5, budget=10)
    return min(times, key=lambda name: times[name].median)


def preferring(name: str) -> Context:
    """A context in which SDPA takes this backend wherever it can: compile and call inside it.

    The others stay allowed behind it, for calls with masks that the best one doesn't take.
    """
    if name == "default":
        return contextlib.nullcontext
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [name, *(other for other in BACKENDS if other != name)]
    return lambda: sdpa_kernel([getattr(SDPBackend, BACKENDS[b]) for b in order], set_priority=True)
