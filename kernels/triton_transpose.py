"""Block lists transposed on a GPU: for each key block, the query blocks that read it. Two Triton kernels, no host sync.

The first marks each listed pair in a map of bytes, the second reads a row of the map into an ascending list: the result
does not depend on the order in which programs run. Memory beyond the lists: the map, B * H * nQ * nK bytes.

Shapes: B batch, H query heads, nQ query blocks, nK key blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_common

LARGEST_CHUNK = 1024  # list entries that a program holds at a time


@triton.jit
def _mark_kernel(
    num,  # int32 [B|1, H|1, nQ]
    idx,  # int32 [B|1, H|1, nQ, cap]
    marks,  # uint8 [B, H, nK, nQ], zeros
    stride_nb,
    stride_nh,
    stride_nq,
    stride_ib,
    stride_ih,
    stride_iq,
    stride_ic,
    H,
    nQ,
    nK,
    capacity,
    CHUNK: tl.constexpr,
):
    """One program per list: entry n of query block m sets marks[n, m]."""
    row = tl.program_id(0).to(tl.int64)
    bh, m = row // nQ, row % nQ
    b, h = bh // H, bh % H
    count = tl.minimum(tl.load(num + b * stride_nb + h * stride_nh + m * stride_nq), capacity)
    entries = idx + b * stride_ib + h * stride_ih + m * stride_iq
    for start in range(0, count, CHUNK):
        place = start + tl.arange(0, CHUNK)
        n = tl.load(entries + place.to(tl.int64) * stride_ic, mask=place < count, other=-1)
        inside = (n >= 0) & (n < nK)
        tl.store(marks + (bh * nK + n) * nQ + m, tl.full((CHUNK,), 1, tl.uint8), mask=inside)


@triton.jit
def _compact_kernel(
    marks,  # uint8 [B, H, nK, nQ]
    num,  # int32 [B, H, nK]
    idx,  # int32 [B, H, nK, nQ]
    nQ,
    CHUNK: tl.constexpr,
):
    """One program per key block: the places of the marks in ascending order, then zeros."""
    row = tl.program_id(0).to(tl.int64)
    kept = tl.zeros((), tl.int32)
    for start in range(0, nQ, CHUNK):
        m = start + tl.arange(0, CHUNK)
        mark = tl.load(marks + row * nQ + m, mask=m < nQ, other=0).to(tl.int32)
        place = kept + tl.cumsum(mark, 0) - 1
        tl.store(idx + row * nQ + place, m, mask=mark != 0)
        kept += tl.sum(mark, 0)
    tl.store(num + row, kept)
    for start in range(0, nQ, CHUNK):
        m = start + tl.arange(0, CHUNK)
        tl.store(idx + row * nQ + m, tl.zeros((CHUNK,), tl.int32), mask=(m >= kept) & (m < nQ))


def transpose_lists(num: Tensor, idx: Tensor, num_key_blocks: int) -> tuple[Tensor, Tensor]:
    """For each key block, the query blocks whose lists name it, ascending and 0 past the count.

    Args:
        num: ``kv_num_blocks``, int32 [B|1, H|1, nQ], any strides; a count above the capacity counts as the capacity.
        idx: ``kv_indices``, int32 [B|1, H|1, nQ, cap], any strides; what names no key block is ignored.
        num_key_blocks: nK.

    Returns:
        ``q_num_blocks`` int32 [B|1, H|1, nK] and ``q_indices`` int32 [B|1, H|1, nK, nQ], contiguous.
    """
    (B, H), nQ = torch.broadcast_shapes(num.shape[:2], idx.shape[:2]), num.shape[2]
    num, idx = num.expand(B, H, -1), idx.expand(B, H, -1, -1)
    marks = num.new_zeros(B, H, num_key_blocks, nQ, dtype=torch.uint8)
    q_num = num.new_empty(B, H, num_key_blocks, dtype=torch.int32)
    q_idx = num.new_empty(B, H, num_key_blocks, nQ, dtype=torch.int32)
    capacity = idx.shape[3]
    if not marks.numel():
        return q_num.zero_(), q_idx
    with triton_common.on_device(num):
        if capacity:
            triton_common.launchable(_mark_kernel)[(B * H * nQ,)](
                num,
                idx,
                marks,
                *num.stride(),
                *idx.stride(),
                H,
                nQ,
                num_key_blocks,
                capacity,
                CHUNK=_chunk(capacity),
                num_warps=1,
            )
        compact = triton_common.launchable(_compact_kernel)[(q_num.numel(),)]
        compact(marks, q_num, q_idx, nQ, CHUNK=_chunk(nQ), num_warps=_warps(nQ))
    return q_num, q_idx


def _chunk(size: int) -> int:
    return min(LARGEST_CHUNK, max(32, triton.next_power_of_2(size)))


def _warps(size: int) -> int:
    """A warp per 256 entries, at most 4."""
    return min(4, max(1, _chunk(size) // 256))
