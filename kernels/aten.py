"""Block-sparse attention from ATen operators alone: any device, any dtype, no compiler.

Kept key blocks are gathered, a chunk of heads and query blocks at a time, and attended to densely. Memory beyond
copies of inputs and outputs in the compute dtype is a few temporaries, each of at most CHUNK_ELEMENTS or what one query
block of one group of heads needs, whichever is more: B * group * (tokens of the longest row) * max(D, block). The probe
goes in strips of query blocks of at most CHUNK_ELEMENTS scores, or one block's. Never S x T.
Used where the C++ kernel can't be built, for fp64, and on accelerators without a kernel of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference

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

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """(heads, query blocks): whole groups of heads, as many as fit, then as many query blocks of them."""
        per_head = max(1, self.B * self.idx.shape[-1] * self.block * max(self.D, self.block))
        heads = max(1, CHUNK_ELEMENTS // (per_head * self.group)) * self.group
        step = max(1, CHUNK_ELEMENTS // (per_head * min(heads, self.H)))
        for first in range(0, self.H, heads):
            for start in range(0, self.nQ, step):
                yield slice(first, min(first + heads, self.H)), slice(start, min(start + step, self.nQ))

    def address(self, chunk: tuple[slice, slice]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index tensors (b, query head, key head, block) [B, h, n, w] of a chunk, and where an entry counts."""
        heads, rows = chunk
        idx = self.idx[:, heads, rows]
        valid = torch.arange(idx.shape[-1], device=idx.device) < self.num[:, heads, rows, None]
        b = torch.arange(self.B, device=idx.device).view(-1, 1, 1, 1)
        h = torch.arange(heads.start, heads.stop, device=idx.device).view(1, -1, 1, 1)
        return b, h, torch.where(valid, idx, 0).long(), valid

    def scores(
        self, q: Tensor, k: Tensor, chunk: tuple[slice, slice], scale: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Scores [B, h, n, block, w * block] (minus infinity where hidden), hidden mask, address of the keys."""
        b, h, idx, valid = self.address(chunk)
        keys = k[b, h // self.group, idx].flatten(3, 4)  # [B, h, n, w * block, D]
        bias = self.bias[b, h, idx].masked_fill(~valid[..., None], -math.inf).flatten(3)[:, :, :, None]
        hidden = bias == -math.inf
        s = (q[:, chunk[0], chunk[1]] @ keys.transpose(-1, -2)) * scale + bias.masked_fill(hidden, 0)
        return s.masked_fill(hidden, -math.inf), hidden, (b, h // self.group, idx)


def _gather_values(v: Tensor, where: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
    """Kept value blocks [B, H, n, w * block, D]; hidden rows are zero, so that 0 * NaN can't reach a row."""
    return v[where].flatten(3, 4).masked_fill(hidden.transpose(-1, -2), 0)


def select(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float,
    block_size: int,
    probe_tokens: int,
    seed: int,
    sparsity: float | None,
    tau: float,
    min_keep: float,
    max_keep: float,
    force_q: Tensor | None,
    force_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Block lists by the reference, one sample at a time: that bounds the memory and keeps a sample's mask its own."""
    parts = []
    for b in range(q.shape[0]):
        mask = bias if bias is None or bias.shape[0] == 1 else bias[b : b + 1]
        block_map = probe_map(q[b : b + 1], k[b : b + 1], mask, scale, block_size, probe_tokens, seed)
        parts.append(reference.select_blocks(block_map, sparsity, tau, min_keep, max_keep, force_q, force_k))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def probe_map(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, block_size: int, probe_tokens: int, seed: int
) -> Tensor:
    """`reference.probe_map` in strips of query blocks."""
    strips = _strips(q, k, block_size, probe_tokens)
    parts = [reference.probe_map(q, k, bias, scale, block_size, probe_tokens, seed, strip) for strip in strips]
    return torch.cat(parts, dim=2)


def _strips(q: Tensor, k: Tensor, block_size: int, probe_tokens: int) -> Iterator[slice]:
    """Query blocks whose sampled scores fit into a chunk."""
    nQ, nK = -(-q.shape[2] // block_size), -(-k.shape[2] // block_size)
    step = max(1, CHUNK_ELEMENTS // max(1, q.shape[1] * nK * probe_tokens**2))
    for start in range(0, nQ, step):
        yield slice(start, start + step)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, bias: Tensor | None, scale: float, block_size: int
) -> tuple[Tensor, Tensor]:
    """Forward: out [B, H, S, D] in the flash layout, LSE [B, H, S]. ``bias``: [B|1, H|1, T] or None."""
    plan = _Blocks(q, k, num, idx, bias, block_size)
    qb, kb, vb = plan.cut(q, plan.nQ), plan.cut(k, plan.nK), plan.cut(v, plan.nK)
    out = flash_layout(plan.B, plan.H, plan.S, plan.D, q)
    lse = q.new_empty(plan.B, plan.H, plan.S, dtype=plan.compute)
    for heads, rows in plan.chunks():
        s, hidden, where = plan.scores(qb, kb, (heads, rows), scale)
        row_lse = s.logsumexp(-1, keepdim=True)
        p = (s - row_lse.masked_fill(row_lse == -math.inf, 0)).exp().masked_fill(hidden, 0)
        o = p @ _gather_values(vb, where, hidden)
        span = slice(rows.start * block_size, min(rows.stop * block_size, plan.S))
        size = span.stop - span.start
        out[:, heads, span] = o.flatten(2, 3)[:, :, :size].to(q.dtype)
        lse[:, heads, span] = row_lse.flatten(2)[:, :, :size]
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
    for chunk in plan.chunks():
        at = (slice(None), *chunk)
        s, hidden, where = plan.scores(qb, kb, chunk, scale)
        p = (s - lb[at]).exp().masked_fill(hidden, 0)
        values = _gather_values(vb, where, hidden)
        dp = gb[at] @ values.transpose(-1, -2)
        ds = (p * (dp - db[at])).masked_fill(hidden, 0) * scale
        keys = kb[where].flatten(3, 4).masked_fill(hidden.transpose(-1, -2), 0)
        dq[at] = ds @ keys
        shape = (-1, block_size)
        dk.index_put_(where, (ds.transpose(-1, -2) @ qb[at]).unflatten(3, shape), accumulate=True)
        dv.index_put_(where, (p.transpose(-1, -2) @ gb[at]).unflatten(3, shape), accumulate=True)
    return tuple(_uncut(g, x) for g, x in ((dq, q), (dk, k), (dv, v)))  # type: ignore[return-value]


def _uncut(grad: Tensor, like: Tensor) -> Tensor:
    B, H, N, D = like.shape
    result = flash_layout(B, H, N, D, like)
    result.copy_(grad.flatten(2, 3)[:, :, :N])
    return result
