"""dK and dV of block-sparse attention on a GPU: a program owns a tile of keys and goes over the transposed list of its
key block, for each query head that shares the key head. Nothing is summed by atomics.

    P = exp(scale * Q K^T + bias - LSE)    dV = P^T dO    dS = P * (dO V^T - Delta)    dK = scale * dS^T Q

Shapes as in `triton_backward`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aten, triton_common, triton_configs
from .triton_backward_tiles import added_bias, constants_of, rows_at, tile_mask, tile_offsets
from .triton_common import LOG2E

# Every query reads a global token: the queries are cut into parts until about this many programs share the work.
GLOBAL_PROGRAMS = 256


@triton.jit
def _kv_step(
    dk, dv, k, v, q, do, lse2, delta, add, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    """Adds to dK (not yet scaled) and dV [N, D] the share of one tile of queries.

    Scores are transposed, [N, M]: as P^T and dS^T they are then left operands, which stay in registers.
    Rows of keys past the end hold anything: each row is a sum of its own, and they are not stored.
    """
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    s = s * (SCALE * LOG2E)
    if HAS_BIAS:
        s += add[:, None]
    p = tl.exp2(s - lse2[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv_kernel(
    q,  # [B, H, S, D]
    k,  # [B, Hkv, T, D]
    v,
    bias,  # fp32 [B|1, H|1, T]
    grad_out,  # [B, H, S, D]
    lse2,  # fp32 [B, H, padded]
    delta,
    dk,  # [parts, B, Hkv, T, D]
    dv,
    num,  # int32 [B|1, H|1, nK]: transposed lists, all entries in range
    idx,  # int32 [B|1, H|1, nK, nQ], contiguous
    order,  # int64 [B|1, Hkv|1, nK]: key blocks, longest list first
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_vd,
    stride_bb,
    stride_bh,
    stride_bt,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_gd,
    stride_dp,
    stride_db,
    stride_dh,
    stride_dt,
    stride_dd,
    stride_nb,
    stride_nh,
    stride_rb,
    stride_rh,
    Hkv,
    S,
    T,
    nQ,
    nK,
    D: tl.constexpr,  # so that the compiler sees how far a row can be read in whole vectors
    parts,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    DENSE: tl.constexpr,  # every query reads every key: no lists, and part i of the queries sums into dk[i], dv[i]
    PRECISION: tl.constexpr,
):
    """One program per tile of keys (and part of the queries)."""
    Q_TILES: tl.constexpr = BLOCK_SIZE // BLOCK_M
    K_TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    tile = tl.program_id(0)
    bh = (tile // (nK * K_TILES * parts)).to(tl.int64)
    b, hk = bh // Hkv, bh % Hkv
    part = tile // (nK * K_TILES) % parts
    block = tile // K_TILES % nK
    if HAS_ORDER:
        block = tl.load(order + b * stride_rb + hk * stride_rh + block).to(tl.int32)
    first = block * BLOCK_SIZE + tile % K_TILES * BLOCK_N
    columns = first + tl.arange(0, BLOCK_N) < T
    padded = nQ * BLOCK_SIZE
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    seen = tl.zeros((BLOCK_N,), tl.int1)
    k += b * stride_kb + hk * stride_kh
    v += b * stride_vb + hk * stride_vh
    for member in range(GROUP):
        h = hk * GROUP + member
        # A key may be hidden from one head and not from another: its row is zero for the former, so that NaN stays out.
        add, visible = added_bias(bias + b * stride_bb + h * stride_bh, first, columns, stride_bt, HAS_BIAS, BLOCK_N)
        seen = seen | visible
        k_tile = rows_at(k, first, visible, stride_kt, stride_kd, D, BLOCK_N, BLOCK_D, EVEN_D)
        v_tile = rows_at(v, first, visible, stride_vt, stride_vd, D, BLOCK_N, BLOCK_D, EVEN_D)
        q_head = q + b * stride_qb + h * stride_qh
        do_head = grad_out + b * stride_gb + h * stride_gh
        stats = (b * Hkv * GROUP + h) * padded
        entries = idx + b * stride_nb * nQ + h * stride_nh * nQ + block.to(tl.int64) * nQ
        if DENSE:
            steps = tl.cdiv(S, BLOCK_M)
            begin, end = steps * part // parts, steps * (part + 1) // parts
            upcoming = 0
        else:
            begin, end = 0, tl.load(num + b * stride_nb + h * stride_nh + block) * Q_TILES
            upcoming = tl.load(entries, mask=end > 0, other=0)
        end = tl.where(first < T, end, begin)
        for step in range(begin, end):
            if DENSE:
                start = step * BLOCK_M
            else:
                start = upcoming * BLOCK_SIZE + step % Q_TILES * BLOCK_M
                upcoming = tl.load(entries + tl.minimum((step + 1) // Q_TILES, nQ - 1))
            m = start + tl.arange(0, BLOCK_M)
            q_tile = rows_at(q_head, start, m < S, stride_qs, stride_qd, D, BLOCK_M, BLOCK_D, EVEN_D)
            do = rows_at(do_head, start, m < S, stride_gs, stride_gd, D, BLOCK_M, BLOCK_D, EVEN_D)
            row_lse2 = tl.load(lse2 + stats + m)
            row_delta = tl.load(delta + stats + m)
            dk_acc, dv_acc = _kv_step(
                dk_acc, dv_acc, k_tile, v_tile, q_tile, do, row_lse2, row_delta, add, SCALE, HAS_BIAS, PRECISION
            )

    dk_acc *= SCALE
    if HAS_BIAS:
        dk_acc = tl.where(seen[:, None], dk_acc, 0.0)
        dv_acc = tl.where(seen[:, None], dv_acc, 0.0)
    start = part.to(tl.int64) * stride_dp + b * stride_db + hk * stride_dh + first.to(tl.int64) * stride_dt
    target = start + tile_offsets(stride_dt, stride_dd, BLOCK_N, BLOCK_D)
    mask = tile_mask(columns, D, BLOCK_D, EVEN_D)
    tl.store(dk + target, dk_acc.to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + target, dv_acc.to(dv.dtype.element_ty), mask=mask)


def grad_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    grad_out: Tensor,
    stats: Tensor,
    transposed: tuple[Tensor, Tensor] | None,
    scale: float,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of listed keys and values; without lists, of keys that every query reads."""
    (B, H, S, D), (Hkv, T) = q.shape, k.shape[1:3]
    nQ, nK = triton.cdiv(S, block_size), triton.cdiv(T, block_size)
    if transposed is None:
        parts = min(nQ, max(1, GLOBAL_PROGRAMS // max(1, B * Hkv * triton.cdiv(T, 64))))
        num, idx, order = stats, stats, None  # not read
        dk, dv = (q.new_empty(parts, B, T, Hkv, D, dtype=torch.float32).transpose(2, 3) for _ in "kv")
    else:
        parts, (num, idx) = 1, transposed
        by_key_head = num if num.shape[1] == 1 else num.unflatten(1, (Hkv, H // Hkv)).sum(2)
        order = triton_common.longest_first(by_key_head, B, Hkv)
        dk, dv = (aten.flash_layout(B, Hkv, T, D, q)[None] for _ in "kv")
    args = (
        q,
        k,
        v,
        q if bias is None else bias,
        grad_out,
        stats[0],
        stats[1],
        dk,
        dv,
        num,
        idx,
        num if order is None else order,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *triton_common.bias_strides(bias, B, H),
        *grad_out.stride(),
        *dk.stride(),
        *((0, 0) if transposed is None else num.expand(B, H, -1).stride()[:2]),
        *((0, 0) if order is None else order.stride()[:2]),
        Hkv,
        S,
        T,
        nQ,
        nK,
        D,
        parts,
    )
    constants = constants_of(q, k, scale, block_size) | {
        "HAS_BIAS": bias is not None,
        "HAS_ORDER": order is not None,
        "DENSE": transposed is None,
    }

    def call(tile: triton_configs.Config) -> None:
        grid = (B * Hkv * nK * (block_size // tile["BLOCK_N"]) * parts,)
        triton_common.launchable(_dkv_kernel)[grid](*args, **constants, **tile)

    triton_configs.launch("backward_kv", q, block_size, call)
    if transposed is None:
        dk, dv = (x.transpose(2, 3).sum(0, keepdim=True).to(q.dtype).transpose(2, 3) for x in (dk, dv))
    return dk[0], dv[0]
