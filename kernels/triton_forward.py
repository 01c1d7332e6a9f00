"""Block-sparse attention forward on a GPU: one Triton kernel, softmax(scale * Q K^T + bias) V over the listed blocks.

A program owns a tile of queries and goes over the list of its query block with an online softmax (FlashAttention-2) in
units of log2. Rows of several lengths start longest first, and the hardware hands the next one to whichever
multiprocessor is free: the effect of a persistent kernel with a queue, without its counter. Global tokens (ASA_G) are
further tiles of the same softmax.

Keys and values come by the tensor memory accelerator where the tile of `triton_configs` says so and the strides allow
it, else by pointers. Warps that only load, beside warps that compute, are tried on Blackwell by a search.
Memory beyond the results: the order of the query blocks, 16 * B * H * nQ bytes where they are many.

Shapes: B batch, H query heads, Hkv key heads, S query tokens, T key tokens, D head dim, G global tokens,
nQ = ceil(S / block), nK = ceil(T / block), M and N the sizes of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aten, checks, triton_common, triton_configs
from .triton_common import LOG2E, log2_bias

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_tile(
    x,
    b,
    h,
    first,
    inside,
    stride_t,
    stride_d,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows [N, BLOCK_D] of keys or values from ``first`` on; zeros in rows not ``inside``, and from column D on.

    TMA: ``x`` describes [B, Hkv, T, D], and what lies past T is not inside. Else ``x`` points to row 0 of the head.
    """
    if TMA:
        tile = tl.reshape(x.load([b.to(tl.int32), h.to(tl.int32), first, 0]), (N, BLOCK_D))
    else:
        row = tl.arange(0, N).to(tl.int64)[:, None]
        column = tl.arange(0, BLOCK_D)[None, :]
        source = x + tl.cast(first, tl.int64) * stride_t + (row * stride_t + column.to(tl.int64) * stride_d)
        mask = inside[:, None]
        if D != BLOCK_D:
            mask = mask & (column < D)
        tile = tl.load(source, mask=mask, other=0.0)
    return tile


@triton.jit
def _attend(
    acc, total, top, q, k, v, left, added, visible, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    """The online softmax with one more tile of keys.

    acc fp32 [M, D], total and top fp32 [M]: weighted values, denominator and maximum so far. q [M, D]; k, v [N, D].
    ``left``: how many of the keys exist; any number. With a bias: what it adds [N], and which keys are ``visible``.
    """
    N: tl.constexpr = k.shape[0]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N]
    # Scores are scaled within exp2's argument, in one multiply-add, where that doesn't turn the maximum around.
    LATE: tl.constexpr = SCALE > 0 and not HAS_BIAS
    FACTOR: tl.constexpr = SCALE * LOG2E if LATE else 1.0
    if not LATE:
        scores = scores * (SCALE * LOG2E)
    if HAS_BIAS:
        scores = tl.where(visible[None, :], scores + added[None, :], -float("inf"))
    elif left < N:  # the last block, or an entry that names no block: all programs but a few skip this
        scores = tl.where((tl.arange(0, N) < left)[None, :], scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * FACTOR)
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp2(scores * FACTOR - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, higher


@triton.jit
def _forward_kernel(
    q,  # [B, H, S, D]
    k,  # [B, Hkv, T, D], or its descriptor
    v,  # the same
    bias,  # fp32 [B, H, T]
    num,  # int32 [B, H, nQ]
    idx,  # int32 [B, H, nQ, capacity]
    order,  # int64 [B, H, nQ]
    global_k,  # [B, Hkv, G, D]
    global_v,  # [B, Hkv, G, D]
    global_bias,  # fp32 [B, H, G]
    out,  # [B, H, S, D]
    lse,  # fp32 [B, H, S], contiguous
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
    stride_nb,
    stride_nh,
    stride_nq,
    stride_ib,
    stride_ih,
    stride_iq,
    stride_ic,
    stride_rb,
    stride_rh,
    stride_rq,
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
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    H,
    S,
    T,
    G,
    nQ,
    nK,
    capacity,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    HAS_GLOBAL_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    Q_PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_M
    K_PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    bh = (tl.program_id(0) // (nQ * Q_PARTS)).to(tl.int64)
    place = tl.program_id(0) % (nQ * Q_PARTS)
    b, h = bh // H, bh % H
    kh = h // GROUP
    block_q = place // Q_PARTS
    if HAS_ORDER:
        block_q = tl.load(order + b * stride_rb + h * stride_rh + block_q * stride_rq).to(tl.int32)
    first_q = block_q * BLOCK_SIZE + place % Q_PARTS * BLOCK_M
    row = first_q + tl.arange(0, BLOCK_M)
    row64 = row.to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = (row < S)[:, None] & (column < D)[None, :]
    dims = column.to(tl.int64)[None, :]
    source = q + b * stride_qb + h * stride_qh + row64[:, None] * stride_qs + dims * stride_qd
    q_tile = tl.load(source, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    slot = tl.arange(0, BLOCK_N)

    if HAS_GLOBAL:
        global_k += b * stride_gkb + kh * stride_gkh
        global_v += b * stride_gvb + kh * stride_gvh
        global_bias += b * stride_gbb + h * stride_gbh
        for first in tl.range(0, G, BLOCK_N):
            added, visible = 0.0, slot < G - first
            if HAS_GLOBAL_BIAS:
                added, visible = log2_bias(global_bias, (first + slot).to(tl.int64) * stride_gbt, visible)
            k_tile = _load_tile(
                global_k, b, kh, first, slot < G - first, stride_gkt, stride_gkd, D, BLOCK_N, BLOCK_D, False
            )
            v_tile = _load_tile(global_v, b, kh, first, visible, stride_gvt, stride_gvd, D, BLOCK_N, BLOCK_D, False)
            acc, total, top = _attend(
                acc, total, top, q_tile, k_tile, v_tile, G - first, added, visible, SCALE, HAS_GLOBAL_BIAS, PRECISION
            )

    if not TMA:
        k += b * stride_kb + kh * stride_kh
        v += b * stride_vb + kh * stride_vh
    bias += b * stride_bb + h * stride_bh
    count = tl.load(num + b * stride_nb + h * stride_nh + tl.cast(block_q, tl.int64) * stride_nq)
    count = tl.minimum(count, capacity)
    entries = idx + b * stride_ib + h * stride_ih + tl.cast(block_q, tl.int64) * stride_iq
    # Each entry is loaded a step before it is needed, so that the keys' addresses never wait for it.
    entry = tl.load(entries, mask=count > 0, other=0)
    for step in tl.range(0, count * K_PARTS, warp_specialize=WARP_SPECIALIZE):
        block_k = entry
        entry = tl.load(entries + tl.minimum((step + 1) // K_PARTS, count - 1).to(tl.int64) * stride_ic)
        exists = (block_k >= 0) & (block_k < nK)
        first = tl.where(exists, block_k * BLOCK_SIZE + step % K_PARTS * BLOCK_N, T)  # at T nothing is read
        left = T - first
        added, visible = 0.0, slot < left
        if HAS_BIAS:
            added, visible = log2_bias(bias, (first + slot).to(tl.int64) * stride_bt, visible)
        k_tile = _load_tile(k, b, kh, first, slot < left, stride_kt, stride_kd, D, BLOCK_N, BLOCK_D, TMA)
        # A hidden NaN must not reach a row through 0 * NaN: hidden values are zeros.
        v_tile = _load_tile(v, b, kh, first, visible, stride_vt, stride_vd, D, BLOCK_N, BLOCK_D, TMA)
        acc, total, top = _attend(
            acc, total, top, q_tile, k_tile, v_tile, left, added, visible, SCALE, HAS_BIAS, PRECISION
        )

    total = tl.where(total == 0, 1.0, total)  # no key: acc is 0 and top minus infinity
    acc = acc * (1.0 / total)[:, None]
    target = out + b * stride_ob + h * stride_oh + row64[:, None] * stride_os + dims * stride_od
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + bh * S + row, (top + tl.log2(total)) * _LN2, mask=row < S)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor,
    idx: Tensor,
    bias: Tensor | None,
    scale: float,
    block_size: int,
    *,
    global_k: Tensor | None = None,
    global_v: Tensor | None = None,
    global_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks, and over the global tokens if there are any, in one softmax.

    Args:
        q: [B, H, S, D], fp16, bf16 or fp32, any strides; D up to 256.
        k, v: [B, Hkv, T, D]; query head h reads key head h // (H // Hkv).
        num, idx: block lists, int32 [B|1, H|1, nQ] and [B|1, H|1, nQ, cap], any strides. A count above the capacity
            counts as the capacity, and an entry that names no key block is ignored.
        bias: fp32 [B|1, H|1, T], added to the scores; minus infinity hides a key.
        scale: of the scores.
        block_size: 64 or 128 tokens.
        global_k, global_v: [B, Hkv, G, D], keys that every query attends to.
        global_bias: fp32 [G] or [B|1, H|1, G].

    Returns:
        out [B, H, S, D] in the flash layout, LSE fp32 [B, H, S]. A row without a key: zeros and minus infinity.
    """
    (B, H, S, D), (Hkv, T) = q.shape, k.shape[1:3]
    nQ, nK = triton.cdiv(S, block_size), triton.cdiv(T, block_size)
    if triton_common.debug():
        checks.entries(num, idx, k.shape[2], block_size, duplicates=True)
        triton_common.check_memory(q=q, k=k, v=v, num=num, idx=idx, bias=bias, global_k=global_k, global_v=global_v)
    out = aten.flash_layout(B, H, S, D, q)
    lse = q.new_empty(B, H, S, dtype=torch.float32)
    if not lse.numel():
        return out, lse
    gk, gv = (k, v) if global_k is None or global_v is None else (global_k, global_v)
    block_d = max(16, triton.next_power_of_2(D))
    # Hidden values have to be zeros, which only loads by pointers can make of them. These need other tiles.
    describable = bias is None and _describable(k) and _describable(v)
    pointers = not describable and triton_configs.config("forward", q.device, q.dtype, D, block_size)["TMA"]
    # Global tokens take registers too.
    kind = "forward_masked" if bias is not None or pointers or global_k is not None else "forward"

    def launch(tile: dict[str, Any]) -> None:
        tma = tile.pop("TMA") and describable
        keys, values = (_described(x, tile["BLOCK_N"], block_d) if tma else x for x in (k, v))
        triton_common.launchable(_forward_kernel)[(B * H * nQ * (block_size // tile["BLOCK_M"]),)](
            q,
            keys,
            values,
            q if bias is None else bias,
            num,
            idx,
            num if order is None else order,
            gk,
            gv,
            q if global_bias is None else global_bias,
            out,
            lse,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *triton_common.bias_strides(bias, B, H),
            *num.expand(B, H, -1).stride(),
            *idx.expand(B, H, -1, -1).stride(),
            *((0, 0, 0) if order is None else order.stride()),
            *gk.stride(),
            *gv.stride(),
            *triton_common.bias_strides(global_bias, B, H),
            *out.stride(),
            H,
            S,
            T,
            gk.shape[2],
            nQ,
            nK,
            idx.shape[3],
            GROUP=H // Hkv,
            SCALE=float(scale),
            D=D,
            BLOCK_D=block_d,
            BLOCK_SIZE=block_size,
            HAS_BIAS=bias is not None,
            HAS_ORDER=order is not None,
            HAS_GLOBAL=global_k is not None,
            HAS_GLOBAL_BIAS=global_bias is not None,
            PRECISION=triton_common.precision(),
            TMA=tma,
            WARP_SPECIALIZE=tile.pop("WARP_SPECIALIZE") and tma,
            **tile,
        )

    with triton_common.on_device(q):
        order = triton_common.longest_first(num, B, H)
        triton_configs.launch(kind, q, block_size, launch)
    return out, lse


def _describable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read a tensor as it lies."""
    if _descriptor() is None or triton_common.tracing() or not x.numel():
        return False
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.stride(-1) == 1 and all(n > 0 and n % 16 == 0 for n in steps) and x.data_ptr() % 16 == 0


def _described(x: Tensor, rows: int, columns: int) -> Any:
    """A tensor's descriptor for tiles of a head. What lies outside the tensor reads as zero."""
    descriptor = _descriptor()
    assert descriptor is not None
    return descriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, columns])


def _descriptor() -> Any:
    """Triton's tensor descriptor, None in a Triton without one."""
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:
        return None
    return TensorDescriptor
