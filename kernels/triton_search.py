"""The block-sum search on a GPU (AdaSpa, algorithms 3.3): exact softmax mass of each block from a cached LSE.

One pass over Q and K, no V, nothing of the size of tokens times tokens: a program holds a query block and walks the
keys. Equals ``reference_search.block_sums`` within fp32 rounding and is deterministic: no atomics. The two-pass form
attends densely first, which gives the LSE. No memory beyond the results.

Shapes: B batch, H query heads, Hkv key heads, S query tokens, T key tokens, D head dim, nQ = ceil(S / block),
nK = ceil(T / block).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lists, triton_common, triton_configs, triton_forward
from .triton_common import LOG2E
from .triton_probe import chunked_dot, chunks


@triton.jit
def _block_mass(
    block,
    q_tile,
    q_rows,
    q_mask,
    stride_qd,
    lse,
    real,
    k,
    stride_kt,
    stride_kd,
    bias,
    stride_bt,
    T,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Mass of a key block over the rows that are ``real``."""
    total = 0.0
    for part in tl.static_range(0, BLOCK_SIZE, BLOCK_N):
        token = block * BLOCK_SIZE + part + tl.arange(0, BLOCK_N)
        inside = token < T
        place = token.to(tl.int64)
        k_rows = k + place * stride_kt
        scores = chunked_dot(q_tile, q_rows, q_mask, stride_qd, k_rows, inside, stride_kd, D, BLOCK_D, CHUNK_D, MASKED)
        # Natural units up to the difference: scores and LSE in log2 units would both be rounded, for all rows alike.
        scores = scores * SCALE
        visible = inside
        if HAS_BIAS:
            added = tl.load(bias + place * stride_bt, mask=inside, other=-float("inf"))
            visible = added != -float("inf")
            scores += added[None, :]
        weights = tl.exp2((scores - lse[:, None]) * LOG2E)
        # Zeroed last: a NaN of the row's own LSE must not reach blocks that it can't attend to.
        if HAS_BIAS or MASKED:
            weights = tl.where(visible[None, :], weights, 0.0)
        total += tl.sum(tl.where(real[:, None], weights, 0.0))
    return total


@triton.jit
def _block_sums_kernel(
    q,  # [B, H, S, D]
    k,  # [B, Hkv, T, D]
    lse,  # fp32 [B, H, S], natural logarithm
    bias,  # fp32 [B|1, H|1, T]
    active,  # int32 [B]
    sums,  # fp32 [B * H, nQ, nK]
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_lb,
    stride_lh,
    stride_ls,
    stride_bb,
    stride_bh,
    stride_bt,
    H,
    GROUP,
    S,
    T,
    nQ,
    nK,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    block_q, head, batch = program % nQ, program // nQ % H, program // nQ // H
    if HAS_ACTIVE:  # noqa: SIM102 (the outer one is decided by the compiler)
        if tl.load(active + batch) == 0:
            return
    row = block_q * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    exists = row < S
    q_rows = q + batch * stride_qb + head * stride_qh + row * stride_qs
    q_tile = 0
    if CHUNK_D == BLOCK_D:
        dim = tl.arange(0, BLOCK_D)
        source = q_rows[:, None] + dim[None, :].to(tl.int64) * stride_qd
        q_tile = tl.load(source, mask=exists[:, None] & (dim < D)[None, :], other=0.0)
    k += batch * stride_kb + head // GROUP * stride_kh
    bias += batch * stride_bb + head * stride_bh
    log_sum = tl.load(lse + batch * stride_lb + head * stride_lh + row * stride_ls, mask=exists, other=-float("inf"))
    real = log_sum != -float("inf")  # the others attend to nothing, or do not exist
    log_sum = tl.where(real, log_sum, 0.0)
    sums += program * nK
    for block in range(nK - TAIL):
        mass = _block_mass(
            block, q_tile, q_rows, exists, stride_qd, log_sum, real, k, stride_kt, stride_kd, bias, stride_bt, T,
            SCALE, D, BLOCK_D, CHUNK_D, BLOCK_SIZE, BLOCK_N, False, HAS_BIAS,
        )  # fmt: skip
        tl.store(sums + block, mass)
    if TAIL:
        mass = _block_mass(
            nK - 1, q_tile, q_rows, exists, stride_qd, log_sum, real, k, stride_kt, stride_kd, bias, stride_bt, T,
            SCALE, D, BLOCK_D, CHUNK_D, BLOCK_SIZE, BLOCK_N, True, HAS_BIAS,
        )  # fmt: skip
        tl.store(sums + nK - 1, mass)


def block_sums(
    q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, scale: float, block_size: int, active: Tensor | None = None
) -> Tensor:
    """Exact softmax mass of each block, fp32 [B, H, nQ, nK]; see ``reference_search.block_sums``.

    Args:
        q, k: [B, H, S, D] and [B, Hkv, T, D], fp32, bf16 or fp16, any strides.
        lse: fp32 [B, H, S], of these q and k or cached from an earlier step.
        bias: fp32 [B|1, H|1, T] added to the scores (-inf: never attended to), or None.
        scale: factor of the scores.
        block_size: tokens in a block, a power of two.
        active: int32 [B], or None. Where it is 0 nothing is read and the sums are 0: a captured graph searches at the
            steps that its clock names, without the host.
    """
    if triton_common.debug():
        triton_common.check_memory(q=q, k=k, lse=lse, bias=bias)
    (B, H, S, D), (_, Hkv, T, _) = q.shape, k.shape
    nQ, nK = triton.cdiv(S, block_size), triton.cdiv(T, block_size)
    sums = (q.new_empty if active is None else q.new_zeros)(B, H, nQ, nK, dtype=torch.float32)
    with triton_common.on_device(q):
        triton_common.launchable(_block_sums_kernel)[(B * H * nQ,)](
            q,
            k,
            lse,
            lse if bias is None else bias,
            lse if active is None else active.contiguous(),
            sums,
            *q.stride(),
            *k.stride(),
            *lse.stride(),
            *triton_common.bias_strides(bias, B, H),
            H,
            H // Hkv,
            S,
            T,
            nQ,
            nK,
            SCALE=scale,
            D=D,
            BLOCK_SIZE=block_size,
            TAIL=T % block_size != 0,
            HAS_BIAS=bias is not None,
            HAS_ACTIVE=active is not None,
            **_tiles(triton_configs.family(q.device), q.dtype, D, block_size),
        )
    return sums


def attention_and_block_sums(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, its LSE and the mass of each block, in two passes; arguments as in `block_sums`.

    Returns:
        out [B, H, S, D] in the flash layout, LSE fp32 [B, H, S], sums fp32 [B, H, nQ, nK].
    """
    nQ, nK = triton.cdiv(q.shape[2], block_size), triton.cdiv(k.shape[2], block_size)
    full = lists.full_lists(1, 1, nQ, nK, q.device)
    out, lse = triton_forward.attention_forward(q, k, v, *full, bias, scale, block_size)
    return out, lse, block_sums(q, k, lse, bias, scale, block_size)


def _tiles(chip: str, dtype: torch.dtype, D: int, block_size: int) -> dict[str, int]:
    """Tile sizes. Compiled offline for every family (registers, spills, shared memory), not measured."""
    block_n = min(64, block_size)
    return {"BLOCK_N": block_n, **chunks(chip, dtype, D, block_n), "num_warps": 8 if block_size > 64 else 4}
