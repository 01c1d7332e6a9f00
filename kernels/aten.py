"""Block-sparse attention from ATen operators alone: any device, any dtype, no compiler.

Kept key blocks are gathered, a chunk of query blocks at a time, and attended to densely. Memory beyond inputs and
outputs is bounded by CHUNK_ELEMENTS of gathered keys and values and the scores of the same chunk: never S x T.
Used where the C++ kernel can't be built, for fp64, and on accelerators without a kernel of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20


def flash_layout(B: int, H: int, S: int, D: int, like: Tensor) -> Tensor:
    """An uninitialised [B, H, S, D] that lies as [B, S, H, D]: the output projection then reads it without a copy."""
    return like.new_empty(B, S, H, D).transpose(1, 2)


class _Blocks:
    """One call's tensors cut into blocks, padded at the ragged ends, and its chunks of query blocks."""

    def __init__(self, q: Tensor, k: Tensor, num: Tensor, idx: Tensor, bias: Tensor | None, block: int) -> None:
        self.B, self.H, self.S, self.D = q.shape
        self.T, self.group, self.block = k.shape[2], q.shape[1] // k.shape[1], block
        self.compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.nQ, self.nK = -(-self.S // block), -(-self.T // block)
        # The longest row sets the gather's width. Reading it would stall an accelerator: there the capacity serves.
        width = int(num.max()) if num.device.type == "cpu" and num.numel() else idx.shape[-1]
        self.num = num.expand(self.B, self.H, -1)
        self.idx = idx.expand(self.B, self.H, -1, -1)[..., : max(width, 1)]
        open_bias = q.new_zeros(1, 1, self.T, dtype=self.compute) if bias is None else bias.to(self.compute)
        tail = torch.nn.functional.pad(open_bias, (0, self.nK * block - self.T), value=-math.inf)
        self.bias = tail.view(*tail.shape[:2], self.nK, block).expand(self.B, self.H, -1, -1)

    def cut(self, x: Tensor, count: int) -> Tensor:
        """[B, h, N, D] -> [B, h, count, block, D] in the compute dtype, zeros past N."""
        x = torch.nn.functional.pad(x.to(self.compute), (0, 0, 0, count * self.block - x.shape[2]))
        return x.unflatten(2, (count, self.block))

    def chunks(self) -> Iterator[slice]:
        per_row = self.B * self.H * self.idx.shape[-1] * self.block * max(self.D, self.block)
        step = max(1, CHUNK_ELEMENTS // max(per_row, 1))
        for start in range(0, self.nQ, step):
            yield slice(start, min(start + step, self.nQ))

    def address(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index tensors (b, query head, key head, block) [B, H, n, w] of a chunk, and where an entry counts."""
        idx = self.idx[:, :, rows]
        valid = torch.arange(idx.shape[-1], device=idx.device) < self.num[:, :, rows, None]
        b = torch.arange(self.B, device=idx.device).view(-1, 1, 1, 1)
        h = torch.arange(self.H, device=idx.device).view(1, -1, 1, 1)
        return b, h, torch.where(valid, idx, 0).long(), valid

    def scores(self, q: Tensor, k: Tensor, rows: slice, scale: float) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Scores [B, H, n, block, w * block] (minus infinity where hidden), hidden mask, address of the keys."""
        b, h, idx, valid = self.address(rows)
        keys = k[b, h // self.group, idx].flatten(3, 4)  # [B, H, n, w * block, D]
        bias = self.bias[b, h, idx].masked_fill(~valid[..., None], -math.inf).flatten(3)[:, :, :, None]
        hidden = bias == -math.inf
        s = (q[:, :, rows] @ keys.transpose(-1, -2)) * scale + bias.masked_fill(hidden, 0)
        return s.masked_fill(hidden, -math.inf), hidden, (b, h // self.group, idx)


def _gather_values(v: Tensor, where: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
    """Kept value blocks [B, H, n, w * block, D]; hidden rows are zero, so that 0 * NaN can't reach a row."""
    return v[where].flatten(3, 4).masked_fill(hidden.transpose(-1, -2), 0)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, bias: Tensor | None, scale: float, block_size: int
) -> tuple[Tensor, Tensor]:
    """Forward: out [B, H, S, D] in the flash layout, LSE [B, H, S]. ``bias``: [B|1, H|1, T] or None."""
    plan = _Blocks(q, k, num, idx, bias, block_size)
    qb, kb, vb = plan.cut(q, plan.nQ), plan.cut(k, plan.nK), plan.cut(v, plan.nK)
    out = flash_layout(plan.B, plan.H, plan.S, plan.D, q)
    lse = q.new_empty(plan.B, plan.H, plan.S, dtype=plan.compute)
    for rows in plan.chunks():
        s, hidden, where = plan.scores(qb, kb, rows, scale)
        row_lse = s.logsumexp(-1, keepdim=True)
        p = (s - row_lse.masked_fill(row_lse == -math.inf, 0)).exp().masked_fill(hidden, 0)
        o = p @ _gather_values(vb, where, hidden)
        span = slice(rows.start * block_size, min(rows.stop * block_size, plan.S))
        size = span.stop - span.start
        out[:, :, span] = o.flatten(2, 3)[:, :, :size].to(q.dtype)
        lse[:, :, span] = row_lse.flatten(2)[:, :, :size]
    return out, lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. dS = P * (dP - Delta), Delta = <dO, O> - dLSE (FlashAttention-2, with the LSE's term)."""
    plan = _Blocks(q, k, num, idx, bias, block_size)
    qb, kb, vb = plan.cut(q, plan.nQ), plan.cut(k, plan.nK), plan.cut(v, plan.nK)
    delta = (grad_out.to(plan.compute) * out.to(plan.compute)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.to(plan.compute)[..., None]
    gb, db = plan.cut(grad_out, plan.nQ), plan.cut(delta, plan.nQ)
    lb = plan.cut(lse[..., None].masked_fill(lse[..., None] == -math.inf, 0), plan.nQ)
    dq, dk, dv = torch.zeros_like(qb), torch.zeros_like(kb), torch.zeros_like(vb)
    for rows in plan.chunks():
        s, hidden, where = plan.scores(qb, kb, rows, scale)
        p = (s - lb[:, :, rows]).exp().masked_fill(hidden, 0)
        values = _gather_values(vb, where, hidden)
        dp = gb[:, :, rows] @ values.transpose(-1, -2)
        ds = (p * (dp - db[:, :, rows])).masked_fill(hidden, 0) * scale
        keys = kb[where].flatten(3, 4).masked_fill(hidden.transpose(-1, -2), 0)
        dq[:, :, rows] = ds @ keys
        shape = (-1, block_size)
        dk.index_put_(where, (ds.transpose(-1, -2) @ qb[:, :, rows]).unflatten(3, shape), accumulate=True)
        dv.index_put_(where, (p.transpose(-1, -2) @ gb[:, :, rows]).unflatten(3, shape), accumulate=True)
    return tuple(_uncut(g, x) for g, x in ((dq, q), (dk, k), (dv, v)))  # type: ignore[return-value]


def _uncut(grad: Tensor, like: Tensor) -> Tensor:
    B, H, N, D = like.shape
    result = flash_layout(B, H, N, D, like)
    result.copy_(grad.flatten(2, 3)[:, :, :N])
    return result
