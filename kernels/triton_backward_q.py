"""dQ of block-sparse attention on a GPU: a program owns a tile of queries and goes over the list of its query block.

    P = exp(scale * Q K^T + bias - LSE)    dS = P * (dO V^T - Delta)    dQ = scale * dS K

Shapes as in `triton_backward`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import aten, triton_common, triton_configs
from .triton_backward_tiles import added_bias, constants_of, near, rows_at, tile_mask, tile_offsets
from .triton_common import LOG2E


@triton.jit
def _q_step(dq, q, do, lse2, delta, k, v, add, SCALE: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr):
    """Adds to dQ [M, D] (not yet scaled) the share of one tile of keys. ``add`` [N]: added to the scores if ADD."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    s = s * (SCALE * LOG2E)
    if ADD:
        s += add[None, :]
    p = tl.exp2(s - lse2[:, None])
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _dq_kernel(
    q,  # [B, H, S, D]
    k,  # [B, Hkv, T, D]
    v,
    bias,  # fp32 [B|1, H|1, T]
    grad_out,  # [B, H, S, D]
    lse2,  # fp32 [B, H, padded]
    delta,
    dq,  # [B, H, S, D]
    num,  # int32 [B|1, H|1, nQ]
    idx,  # int32 [B|1, H|1, nQ, cap]
    order,  # int64 [B|1, H|1, nQ]: query blocks, longest list first
    global_k,  # [B, Hkv, G, D]
    global_v,
    global_bias,  # fp32 [B|1, H|1, G]
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
    stride_dqb,
    stride_dqh,
    stride_dqs,
    stride_dqd,
    stride_nb,
    stride_nh,
    stride_nq,
    stride_ib,
    stride_ih,
    stride_iq,
    stride_ic,
    stride_rb,
    stride_rh,
    stride_gkb,
    stride_gkh,
    stride_gkt,
    stride_gkd,
    stride_gvb,
    stride_gvh,
    stride_gvt,
    stride_gvd,
    stride_gbb,
    stride_gbh,
    stride_gbt,
    H,
    S,
    T,
    G,
    nQ,
    nK,
    capacity,
    D: tl.constexpr,  # so that the compiler sees how far a row can be read in whole vectors
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_T: tl.constexpr,  # T is a multiple of BLOCK_N
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    HAS_GLOBAL_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per tile of queries."""
    Q_TILES: tl.constexpr = BLOCK_SIZE // BLOCK_M
    K_TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    ADD: tl.constexpr = HAS_BIAS or not EVEN_T
    tile = tl.program_id(0)
    bh = (tile // (nQ * Q_TILES)).to(tl.int64)
    b, h = bh // H, bh % H
    block = tile // Q_TILES % nQ
    if HAS_ORDER:
        block = tl.load(order + b * stride_rb + h * stride_rh + block).to(tl.int32)
    first = block * BLOCK_SIZE + tile % Q_TILES * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    rows = m < S
    padded = nQ * BLOCK_SIZE
    q_tile = rows_at(q + b * stride_qb + h * stride_qh, first, rows, stride_qs, stride_qd, D, BLOCK_M, BLOCK_D, EVEN_D)
    do = rows_at(
        grad_out + b * stride_gb + h * stride_gh, first, rows, stride_gs, stride_gd, D, BLOCK_M, BLOCK_D, EVEN_D
    )
    row_lse2 = tl.load(lse2 + bh * padded + m)
    row_delta = tl.load(delta + bh * padded + m)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    count = tl.load(num + b * stride_nb + h * stride_nh + block.to(tl.int64) * stride_nq)
    count = tl.where(first < S, tl.minimum(count, capacity), 0)
    entries = idx + b * stride_ib + h * stride_ih + block.to(tl.int64) * stride_iq
    k += b * stride_kb + h // GROUP * stride_kh
    v += b * stride_vb + h // GROUP * stride_vh
    bias += b * stride_bb + h * stride_bh
    # The entry is read one step ahead: the loads of a tile then don't wait for it.
    upcoming = tl.load(entries, mask=count > 0, other=0)
    for step in range(count * K_TILES):
        listed = upcoming
        after = tl.minimum((step + 1) // K_TILES, count - 1)
        upcoming = tl.load(entries + after.to(tl.int64) * stride_ic)
        real = (listed >= 0) & (listed < nK)
        start = tl.where(real, listed, 0) * BLOCK_SIZE + step % K_TILES * BLOCK_N
        add, visible = added_bias(bias, start, real & (start + tl.arange(0, BLOCK_N) < T), stride_bt, HAS_BIAS, BLOCK_N)
        k_tile = rows_at(k, start, visible, stride_kt, stride_kd, D, BLOCK_N, BLOCK_D, EVEN_D)
        v_tile = rows_at(v, start, visible, stride_vt, stride_vd, D, BLOCK_N, BLOCK_D, EVEN_D)
        listed_lse2 = tl.where(real, row_lse2, float("inf"))  # an entry that names no block counts for nothing
        acc = _q_step(acc, q_tile, do, listed_lse2, row_delta, k_tile, v_tile, add, SCALE, ADD, PRECISION)
    if HAS_GLOBAL:
        global_k += b * stride_gkb + h // GROUP * stride_gkh
        global_v += b * stride_gvb + h // GROUP * stride_gvh
        global_bias += b * stride_gbb + h * stride_gbh
        for start in range(0, G, BLOCK_N):
            add, visible = added_bias(
                global_bias, start, start + tl.arange(0, BLOCK_N) < G, stride_gbt, HAS_GLOBAL_BIAS, BLOCK_N
            )
            k_tile = rows_at(global_k, start, visible, stride_gkt, stride_gkd, D, BLOCK_N, BLOCK_D, EVEN_D)
            v_tile = rows_at(global_v, start, visible, stride_gvt, stride_gvd, D, BLOCK_N, BLOCK_D, EVEN_D)
            acc = _q_step(acc, q_tile, do, row_lse2, row_delta, k_tile, v_tile, add, SCALE, True, PRECISION)

    acc = tl.where(row_lse2[:, None] == float("inf"), 0.0, acc * SCALE)  # a row of nothing may hold a NaN query
    start = dq + b * stride_dqb + h * stride_dqh + first.to(tl.int64) * stride_dqs
    target = start + tile_offsets(stride_dqs, stride_dqd, BLOCK_M, BLOCK_D)
    tl.store(target, acc.to(dq.dtype.element_ty), mask=tile_mask(rows, D, BLOCK_D, EVEN_D))


def grad_q(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    grad_out: Tensor,
    stats: Tensor,
    num: Tensor,
    idx: Tensor,
    scale: float,
    block_size: int,
    global_k: Tensor | None,
    global_v: Tensor | None,
    global_bias: Tensor | None,
) -> Tensor:
    """The gradient of q, in the flash layout. ``stats``: LSE and Delta of the rows (`triton_backward`)."""
    (B, H, S, D), (T, nQ, capacity) = q.shape, (k.shape[2], num.shape[2], idx.shape[3])
    gk, gv = (k, v) if global_k is None or global_v is None else (near(global_k), near(global_v))
    dq = aten.flash_layout(B, H, S, D, q)
    order = triton_common.longest_first(num, B, H)
    args = (
        q,
        k,
        v,
        q if bias is None else bias,
        grad_out,
        stats[0],
        stats[1],
        dq,
        num,
        idx,
        num if order is None else order,
        gk,
        gv,
        q if global_bias is None else global_bias,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *triton_common.bias_strides(bias, B, H),
        *grad_out.stride(),
        *dq.stride(),
        *num.expand(B, H, -1).stride(),
        *idx.expand(B, H, -1, -1).stride(),
        *((0, 0) if order is None else order.stride()[:2]),
        *gk.stride(),
        *gv.stride(),
        *triton_common.bias_strides(global_bias, B, H),
        H,
        S,
        T,
        gk.shape[2],
        nQ,
        triton.cdiv(T, block_size),
        capacity,
        D,
    )
    constants = constants_of(q, k, scale, block_size) | {
        "HAS_BIAS": bias is not None,
        "HAS_ORDER": order is not None,
        "HAS_GLOBAL": global_k is not None,
        "HAS_GLOBAL_BIAS": global_bias is not None,
    }

    def call(tile: triton_configs.Config) -> None:
        grid = (B * H * nQ * (block_size // tile["BLOCK_M"]),)
        triton_common.launchable(_dq_kernel)[grid](*args, EVEN_T=T % tile["BLOCK_N"] == 0, **constants, **tile)

    triton_configs.launch("backward_q", q, block_size, call)
    return dq
