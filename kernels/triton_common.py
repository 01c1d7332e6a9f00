"""What the Triton kernels and launchers share: device guard, tracing, the checks of ``BLADE_DEBUG=1``, key biases.

Shapes: B batch, H query heads, nQ query blocks, nK key blocks, T key tokens.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)

# From this many programs on, the longest lists of a head start first. Fewer run all at once, and sorting only costs.
SORT_FROM = 512

_tracing = threading.local()


@triton.jit
def log2_bias(bias, place, inside):
    """A bias at ``place`` in log2 units, and which of its keys are visible. Keys not ``inside`` are hidden.

    Only minus infinity hides a key: a finite bias stays finite, and NaN stays NaN (a maximum would lose it).
    """
    raw = tl.load(bias + place, mask=inside, other=-float("inf"))
    visible = inside & (raw != -float("inf"))
    return tl.where(visible, tl.where(raw * LOG2E < -LARGEST, -LARGEST, raw * LOG2E), -float("inf")), visible


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def debug() -> bool:
    """Whether launchers check block lists and memory; that waits for the device."""
    return os.environ.get("BLADE_DEBUG", "") not in ("", "0") and not tracing()


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Launches of this thread become nodes of a traced graph."""
    before, _tracing.on = tracing(), True
    try:
        yield
    finally:
        _tracing.on = before


def tracing() -> bool:
    """Whether launches are traced, not made."""
    return getattr(_tracing, "on", False)


def launchable(kernel: Any) -> Any:
    """The kernel, in the form that is launched or traced: ``launchable(kernel)[grid](...)``."""
    return torch.library.wrap_triton(kernel) if tracing() else kernel


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the current one for a launch. Triton itself takes the device's current stream."""
    return torch.cuda.device_of(x) if x.is_cuda and not tracing() else contextlib.nullcontext()


def precision() -> str:
    """How fp32 matrices are multiplied, as the user has set it for PyTorch; the 16-bit dtypes don't care."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def bias_strides(bias: Tensor | None, B: int, H: int) -> tuple[int, ...]:
    """Strides of a bias [B|1, H|1, T] or [T] read as [B, H, T]."""
    return (0, 0, 0) if bias is None else bias.expand(B, H, -1).stride()


def longest_first(num: Tensor, B: int, H: int) -> Tensor | None:
    """The query blocks of each head by falling count, int64 [B, H, nQ]; None where so few run that it is no use.

    Sorted within heads, not across: programs that run together should share keys in the cache, and only what starts
    last can leave the chip idle.
    """
    if B * H * num.shape[2] < SORT_FROM:
        return None
    return num.sort(dim=-1, descending=True, stable=True).indices.expand(B, H, -1)


def check_memory(**tensors: Tensor | None) -> None:
    """Tensors that a kernel can't read as they lie. What it writes is always new, so inputs may overlap.

    Raises:
        ValueError: an address that is no multiple of the element's size, or different devices.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    devices = {name: x.device for name, x in given.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"tensors of one call lie on different devices: {devices}. Move them to one.")
    for name, x in given.items():
        if x.data_ptr() % x.element_size():
            raise ValueError(
                f"{name} begins at address {x.data_ptr():#x}, no multiple of its element size {x.element_size()}: "
                "clone it."
            )
