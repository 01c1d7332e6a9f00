"""What the backward kernels share: tiles of rows, biases of keys, and what both are compiled for."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import triton_common

LARGEST_TILE = 128  # rows


@triton.jit
def tile_offsets(stride_row, stride_column, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [ROWS, BLOCK_D] within a tile; in 32 bits (`_near`), which saves the registers that would spill."""
    return tl.arange(0, ROWS)[:, None] * stride_row + tl.arange(0, BLOCK_D)[None, :] * stride_column


@triton.jit
def tile_mask(rows, D, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """Mask [ROWS, BLOCK_D] of the rows marked in ``rows`` and the first D columns."""
    mask = rows[:, None]
    if not EVEN_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < D)
    return mask


@triton.jit
def rows_at(
    base, first, rows, stride_row, stride_column, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr
):
    """A tile [ROWS, BLOCK_D] from row ``first`` on; zeros in the rows not marked in ``rows``, and from column D on."""
    start = base + tl.cast(first, tl.int64) * stride_row
    mask = tile_mask(rows, D, BLOCK_D, EVEN_D)
    return tl.load(start + tile_offsets(stride_row, stride_column, ROWS, BLOCK_D), mask=mask, other=0.0)


@triton.jit
def added_bias(bias, first, inside, stride, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr):
    """What is added to the scores of the ``ROWS`` keys from ``first`` on, in log2 units, and which are visible."""
    if HAS_BIAS:
        place = (first + tl.arange(0, ROWS)).to(tl.int64) * stride
        added, visible = triton_common.log2_bias(bias, place, inside)
    else:
        added, visible = tl.where(inside, 0.0, -float("inf")), inside
    return added, visible


def near(x: Tensor) -> Tensor:
    """The tensor, copied if the offsets within a tile of it don't fit into 32 bits."""
    span = LARGEST_TILE * x.stride(-2) + x.shape[-1] * x.stride(-1)
    return x if span < 2**31 else x.contiguous()


def constants_of(q: Tensor, k: Tensor, scale: float, block_size: int) -> dict[str, Any]:
    """What both kernels are compiled for. As a constant, the scale can't become an fp64 argument."""
    D = q.shape[-1]
    block_d = max(16, triton.next_power_of_2(D))
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "SCALE": float(scale),
        "BLOCK_SIZE": block_size,
        "BLOCK_D": block_d,
        "EVEN_D": block_d == D,
        "PRECISION": triton_common.precision(),
    }
