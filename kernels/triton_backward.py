"""Block-sparse attention backward on a GPU: Triton kernels for Delta, dQ, and dK/dV.

    P = exp(scale * Q K^T + bias - LSE)    dV = P^T dO
    dS = P * (dO V^T - Delta)              dQ = scale * dS K     dK = scale * dS^T Q
    Delta = <dO, O> - dLSE

(FlashAttention-2's recomputation, with the gradient of the log-sum-exp.) A program owns a tile of dQ and goes over the
list of its query block; another owns a tile of dK and dV and goes over the transposed list of its key block, for each
query head that shares the key head. Nothing is summed by atomics: results are equal bit by bit from run to run.

Memory beyond the gradients: LSE and Delta in 2 * B * H * nQ * block fp32; the transposed lists and their map,
5 * B * H * nQ * nK bytes; with global tokens 2 * parts * B * Hkv * G * D fp32, parts about 256 / (B * Hkv * G / 64).

Shapes: B batch, H query heads, Hkv key heads, S query tokens, T key tokens, D head dim, G global tokens,
nQ = ceil(S / block), nK = ceil(T / block).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, triton_common
from .triton_backward_kv import grad_kv
from .triton_backward_q import grad_q
from .triton_backward_tiles import near, rows_at
from .triton_common import LARGEST, LOG2E
from .triton_transpose import transpose_lists


@triton.jit
def _delta_kernel(
    grad_out,  # [B, H, S, D]
    grad_lse,  # fp32 [B, H, S]
    out,  # [B, H, S, D]
    lse,  # fp32 [B, H, S]
    lse2,  # fp32 [B, H, padded]: LSE in log2 units; +inf where a row attends to nothing, and past S: P is 0 there
    delta,  # fp32 [B, H, padded]
    stride_gb,
    stride_gh,
    stride_gs,
    stride_gd,
    stride_lgb,
    stride_lgh,
    stride_lgs,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    stride_lb,
    stride_lh,
    stride_ls,
    H,
    S,
    padded,
    D: tl.constexpr,  # so that the compiler sees how far a row can be read in whole vectors
    HAS_GRAD_LSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    tiles = padded // ROWS
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * ROWS
    b, h = bh // H, bh % H
    m = first + tl.arange(0, ROWS)
    rows = m < S
    do = rows_at(grad_out + b * stride_gb + h * stride_gh, first, rows, stride_gs, stride_gd, D, ROWS, BLOCK_D, EVEN_D)
    o = rows_at(out + b * stride_ob + h * stride_oh, first, rows, stride_os, stride_od, D, ROWS, BLOCK_D, EVEN_D)
    d = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    place = m.to(tl.int64)
    if HAS_GRAD_LSE:
        d -= tl.load(grad_lse + b * stride_lgb + h * stride_lgh + place * stride_lgs, mask=rows, other=0.0)
    row_lse = tl.load(lse + b * stride_lb + h * stride_lh + place * stride_ls, mask=rows, other=-float("inf"))
    empty = row_lse == -float("inf")
    scaled = tl.where(row_lse < 0, tl.maximum(row_lse * LOG2E, -LARGEST), row_lse * LOG2E)
    tl.store(lse2 + bh * padded + m, tl.where(empty, float("inf"), scaled))
    tl.store(delta + bh * padded + m, tl.where(empty, 0.0, d))


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num: Tensor,
    idx: Tensor,
    bias: Tensor | None,
    scale: float,
    block_size: int,
    *,
    global_k: Tensor | None = None,
    global_v: Tensor | None = None,
    global_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, and of the global keys and values if there are any, in the flash layout.

    Args:
        grad_out, out: [B, H, S, D], any strides.
        grad_lse, lse: fp32 [B, H, S]; natural logarithm.
        q: [B, H, S, D], fp16, bf16 or fp32.
        k, v: [B, Hkv, T, D].
        num, idx: block lists, int32 [B|1, H|1, nQ] and [B|1, H|1, nQ, cap].
        bias: fp32 [B|1, H|1, T], added to the scores; minus infinity hides a key.
        scale: of the scores.
        block_size: 64 or 128 tokens.
        global_k, global_v: [B, Hkv, G, D], keys that every query attends to in the same softmax.
        global_bias: fp32 [B|1, H|1, G].

    Returns:
        (dq, dk, dv), or (dq, dk, dv, d global_k, d global_v). Keys that nobody may attend to get exact zeros.
    """
    if triton_common.debug():
        checks.entries(num, idx, k.shape[2], block_size, duplicates=True)
        triton_common.check_memory(q=q, k=k, v=v, out=out, grad_out=grad_out, lse=lse, num=num, idx=idx, bias=bias)
    with triton_common.on_device(q):
        q, k, v, out, grad_out = (near(x) for x in (q, k, v, out, grad_out.to(q.dtype)))
        stats = _row_stats(grad_out, grad_lse, out, lse, block_size)
        transposed = transpose_lists(num, idx, triton.cdiv(k.shape[2], block_size))
        dq = grad_q(q, k, v, bias, grad_out, stats, num, idx, scale, block_size, global_k, global_v, global_bias)
        grads = dq, *grad_kv(q, k, v, bias, grad_out, stats, transposed, scale, block_size)
        if global_k is None or global_v is None:
            return grads
        return *grads, *grad_kv(
            q, near(global_k), near(global_v), global_bias, grad_out, stats, None, scale, block_size
        )


def _row_stats(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, block_size: int) -> Tensor:
    """LSE in log2 units and Delta of each query, rounded up to whole blocks: fp32 [2, B, H, padded]."""
    B, H, S, D = grad_out.shape
    padded = triton.cdiv(S, block_size) * block_size
    stats = lse.new_empty(2, B, H, padded, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(D))
    rows = min(64, max(16, 8192 // block_d))
    triton_common.launchable(_delta_kernel)[(B * H * padded // rows,)](
        grad_out,
        lse if grad_lse is None else grad_lse,
        out,
        lse,
        stats[0],
        stats[1],
        *grad_out.stride(),
        *(lse if grad_lse is None else grad_lse).stride(),
        *out.stride(),
        *lse.stride(),
        H,
        S,
        padded,
        D,
        HAS_GRAD_LSE=grad_lse is not None,
        ROWS=rows,
        BLOCK_D=block_d,
        EVEN_D=block_d == D,
        num_warps=4,
    )
    return stats
