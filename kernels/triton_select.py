"""Which blocks of a map are kept, on a GPU: one fused Triton kernel, a few map rows per program.

Equals ``reference.select_blocks`` exactly: integers and comparisons only. Nothing is sorted. The bits of floats >= 0
order like integers, so the score at which a row's budget is spent is found bit by bit: 31 counts over a row that stays
in registers. No memory beyond the lists, no host sync. Rows of more than MAX_BLOCKS blocks go to the reference.

Shapes: B batch, H query heads, nQ query blocks, nK key blocks.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference, triton_common

MAX_BLOCKS = 8192  # a row of more would no longer fit into one program's registers

# A float's value is mantissa * 2^(exponent - 150); masses are in units of 2^-MASS_BITS.
_EXPONENT_OF_ONE_UNIT = tl.constexpr(150 - reference.MASS_BITS)


@triton.jit
def _mass(key):
    """floor(score * 2^40) in int64 from the score's bits, int32: exact, and no fp64, which is slow on most chips."""
    exponent = key >> 23
    mantissa = ((key & 0x7FFFFF) | 0x800000).to(tl.int64)  # a denormal's hidden bit is shifted out like the rest
    shift = exponent - _EXPONENT_OF_ONE_UNIT
    left = mantissa << tl.minimum(tl.maximum(shift, 0), 39).to(tl.int64)
    right = mantissa >> tl.minimum(tl.maximum(-shift, 0), 31).to(tl.int64)
    return tl.where(shift >= 0, left, right)


@triton.jit
def _enough(count, mass, low, high, target, HAS_TAU: tl.constexpr):
    """Whether ``count`` blocks that hold ``mass`` are all that a row keeps: monotone in both."""
    if HAS_TAU:
        return (count >= high) | ((count >= low) & (mass.to(tl.float64) >= target))
    else:
        return count >= high


@triton.jit
def _budget_threshold(key, mass, low, high, target, HAS_TAU: tl.constexpr):
    """The score (its bits) of a row's last block within the budget: the largest down to which it is enough to go."""
    threshold = tl.zeros_like(high)
    for bit in range(31):
        candidate = threshold | (1 << (30 - bit))
        above = key >= candidate[:, None]
        count = tl.sum(above.to(tl.int32), 1)
        held = tl.sum(tl.where(above, mass, 0), 1) if HAS_TAU else 0
        threshold = tl.where(_enough(count, held, low, high, target, HAS_TAU), candidate, threshold)
    return threshold


@triton.jit
def _ties_kept(key, mass, threshold, low, high, target, HAS_TAU: tl.constexpr):
    """How many of the blocks that score exactly ``threshold`` are kept: the fewest that are enough, by bisection."""
    better = key > threshold[:, None]
    count = tl.sum(better.to(tl.int32), 1)
    kept = high - count
    if HAS_TAU:
        held = tl.sum(tl.where(better, mass, 0), 1)
        each = tl.max(tl.where(key == threshold[:, None], mass, 0), 1)  # all of them weigh the same
        short = tl.zeros_like(high)  # the most ties that are not enough
        for bit in range(14):
            candidate = short + (8192 >> bit)
            enough = _enough(count + candidate, held + each * candidate, low, high, target, HAS_TAU)
            short = tl.where(enough, short, candidate)
        kept = short + 1
    return kept


@triton.jit(do_not_specialize=["low", "high", "tau_high", "tau_low"])
def _select_kernel(
    block_map,  # fp32 [B, H, nQ, nK], values >= 0 or NaN
    force_q,  # uint8 [nQ]
    force_k,  # uint8 [nK]
    num,  # int32 [B, H, nQ]
    idx,  # int32 [B, H, nQ, nK]
    stride_b,
    stride_h,
    stride_q,
    stride_k,
    num_rows,
    H,
    nQ,
    nK,
    low,
    high,
    tau_high,
    tau_low,
    HAS_TAU: tl.constexpr,
    FORCE_Q: tl.constexpr,
    FORCE_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    block_q = row % nQ
    base = row // nQ // H * stride_b + row // nQ % H * stride_h + block_q * stride_q
    column = tl.arange(0, BLOCK)[None, :]
    inside = real[:, None] & (column < nK)
    score = tl.load(block_map + base[:, None] + column.to(tl.int64) * stride_k, mask=inside, other=0.0)
    bits = score.to(tl.int32, bitcast=True)
    free = inside & ((bits & 0x7FFFFFFF) <= 0x7F800000)  # not NaN
    if FORCE_K:
        free = free & (tl.load(force_k + column, mask=column < nK, other=0) == 0)
    if FORCE_Q:
        free = free & (tl.load(force_q + block_q, mask=real, other=0) == 0)[:, None]
    key = tl.where(free, tl.maximum(bits, 0), -1)  # -0.0 is a negative integer: it becomes 0.0

    high = tl.minimum(high, tl.sum(free.to(tl.int32), 1))
    mass, target = 0, 0.0
    if HAS_TAU:
        mass = tl.where(free, _mass(key), 0)
        # tau comes in two halves: a float argument would lose half of its bits.
        halves = (tl.cast(tau_high, tl.int64) << 32) | (tl.cast(tau_low, tl.int64) & 0xFFFFFFFF)
        target = halves.to(tl.float64, bitcast=True) * tl.sum(mass, 1).to(tl.float64)
    threshold = _budget_threshold(key, mass, low, high, target, HAS_TAU)
    ties = _ties_kept(key, mass, threshold, low, high, target, HAS_TAU)
    tie = key == threshold[:, None]
    within = tl.cumsum(tie.to(tl.int32), 1) <= ties[:, None]
    keep = inside & ((~free) | (key > threshold[:, None]) | (tie & within))

    kept = tl.sum(keep.to(tl.int32), 1)
    place = tl.cumsum(keep.to(tl.int32), 1) - 1
    tl.store(num + row, kept, mask=real)
    tl.store(idx + row[:, None] * nK + place, tl.broadcast_to(column, (ROWS, BLOCK)), mask=keep)
    tl.store(idx + row[:, None] * nK + column, tl.zeros_like(place), mask=inside & (column >= kept[:, None]))


def select(
    block_map: Tensor,
    sparsity: float | None = None,
    tau: float = 0.95,
    min_keep: float = 0.05,
    max_keep: float = 1.0,
    force_q: Tensor | None = None,
    force_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``reference.select_blocks`` for a GPU: ``kv_num_blocks`` [B, H, nQ] and ``kv_indices`` [B, H, nQ, nK], int32.

    Args:
        block_map: fp32 [B, H, nQ, nK], any strides, values >= 0 (a negative one counts as 0) or NaN (kept).
        sparsity, tau, min_keep, max_keep: the budget, see the reference.
        force_q, force_k: bool [nQ] and [nK], kept on top of the budget.
    """
    if block_map.dim() != 4 or block_map.dtype != torch.float32:
        raise ValueError(f"block_map is {block_map.dtype} {list(block_map.shape)}; it has to be fp32 [B, H, nQ, nK]")
    if triton_common.debug():
        triton_common.check_memory(block_map=block_map, force_q=force_q, force_k=force_k)
    B, H, nQ, nK = block_map.shape
    if nK > MAX_BLOCKS:
        return reference.select_blocks(block_map, sparsity, tau, min_keep, max_keep, force_q, force_k)
    num = block_map.new_empty(B, H, nQ, dtype=torch.int32)
    idx = block_map.new_empty(B, H, nQ, nK, dtype=torch.int32)
    low, high = _caps(nK, sparsity, tau, min_keep, max_keep)
    block = max(16, triton.next_power_of_2(nK))
    rows = max(1, 1024 // block)
    with triton_common.on_device(block_map):
        triton_common.launchable(_select_kernel)[(triton.cdiv(num.numel(), rows),)](
            block_map,
            _flags(force_q, nQ, "force_q", num),
            _flags(force_k, nK, "force_k", num),
            num,
            idx,
            *block_map.stride(),
            num.numel(),
            H,
            nQ,
            nK,
            low,
            high,
            *struct.unpack("<ii", struct.pack("<d", tau))[::-1],
            HAS_TAU=sparsity is None and tau < 1,
            FORCE_Q=force_q is not None,
            FORCE_K=force_k is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=min(16, max(2, block // 512)),
        )
    return num, idx


def _caps(nK: int, sparsity: float | None, tau: float, min_keep: float, max_keep: float) -> tuple[int, int]:
    """Fewest and most free blocks of a row. Without a mass to reach both are the same."""
    if sparsity is not None:
        count = reference.keep_count(1 - sparsity, nK)
        return count, count
    high = reference.keep_count(max_keep, nK)
    return (high, high) if tau >= 1 else (min(reference.keep_count(min_keep, nK), high), high)


def _flags(force: Tensor | None, size: int, name: str, unused: Tensor) -> Tensor:
    """A bool vector as bytes; any tensor where there is none."""
    if force is None:
        return unused
    if force.dtype != torch.bool or force.shape != (size,):
        raise ValueError(f"{name} is {force.dtype} {list(force.shape)}; it has to be bool [{size}]")
    return force.contiguous().view(torch.uint8)
