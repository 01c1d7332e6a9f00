"""The truth: probe, selection and block-sparse attention in plain PyTorch, slow and obvious.

Every kernel is tested against this file. Shapes: B batch, H query heads, Hkv key heads, S query tokens,
T key tokens, D head dim, p probe tokens per block, nQ = ceil(S / block), nK = ceil(T / block).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .lists import kept_blocks

# Selection masses are integers of this resolution: integer sums do not depend on their order, so a parallel
# kernel can equal this file exactly.
MASS_BITS = 40


def _hash32(x: Tensor) -> Tensor:
    """The murmur3 finaliser on int64 tensors that hold 32-bit values (any device can repeat it exactly)."""
    mask = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)


def probe_positions(
    num_tokens: int,
    block_size: int,
    probe_tokens: int,
    num_heads: int,
    seed: int,
    side: str,
    device: torch.device | None = None,
) -> Tensor:
    """Token indices that the probe reads, [H, nB, p] int64; -1 fills a last block of fewer than p tokens.

    A block of n tokens is cut into min(n, p) strata of nearly equal length and one token is drawn from each, by a
    hash of (seed, side, head, block, stratum): not of the batch, the layer or the global generator.
    """
    num_blocks = -(-num_tokens // block_size)
    head = torch.arange(num_heads, device=device).view(-1, 1, 1)
    block = torch.arange(num_blocks, device=device).view(1, -1, 1)
    stratum = torch.arange(min(probe_tokens, block_size), device=device).view(1, 1, -1)
    length = (num_tokens - block * block_size).clamp(max=block_size)  # [1, nB, 1]
    count = length.clamp(max=stratum.shape[-1])
    low = stratum * length // count
    high = (stratum + 1) * length // count
    key = _hash32(torch.full_like(head, seed & 0xFFFFFFFF) ^ (0x9E3779B9 if side == "k" else 0))
    for part in (head, block, stratum):
        key = _hash32((key * 31 + part + 1) & 0xFFFFFFFF)
    token = block * block_size + low + key % (high - low).clamp(min=1)
    return torch.where(stratum < count, token, torch.full_like(token, -1))


def additive_mask(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A key mask (bool [B|1, T] or [B|1, H|1, T], or additive) as an additive one of shape [B|1, H|1, 1, T]."""
    if key_mask is None:
        return None
    if key_mask.dtype == torch.bool:
        key_mask = torch.zeros((), dtype=dtype, device=key_mask.device).masked_fill(~key_mask, -math.inf)
    if key_mask.dim() == 2:
        key_mask = key_mask[:, None]
    return key_mask.to(dtype)[:, :, None]


def probe_map(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    scale: float,
    block_size: int,
    probe_tokens: int,
    seed: int,
    rows: slice = slice(None),
) -> Tensor:
    """Predicted importance of each block, [B, H, nQ, nK], values in [0, 1] (BLADE section 3.2, algorithms 1.2).

    Softmax over the sampled keys with its true denominator, then the maximum over each cell of sampled queries and
    keys. NaN wins. fp32 scores (fp64 for fp64 inputs). A block of which no sampled key may be attended to while
    another of its keys may gets NaN, which the selection keeps: the edge of a padding is never lost by bad luck.
    ``rows``: only these query blocks of the map; they don't depend on the others.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    (B, H, S, _), T = q.shape, k.shape[2]
    pos_q = probe_positions(S, block_size, probe_tokens, H, seed, "q", q.device)[:, rows]
    pos_k = probe_positions(T, block_size, probe_tokens, H, seed, "k", q.device)
    k = k.repeat_interleave(H // k.shape[1], 1)
    heads = torch.arange(H, device=q.device)[:, None]
    qs = q[:, heads, pos_q.clamp(min=0).flatten(1)].to(compute)  # [B, H, nQ * p, D]
    ks = k[:, heads, pos_k.clamp(min=0).flatten(1)].to(compute)  # [B, H, nK * p, D]
    scores = (qs @ ks.transpose(-1, -2)) * scale
    hidden = (pos_k < 0).flatten(1)[None, :, None]  # [1, H, 1, nK * p]
    bias = additive_mask(key_mask, compute)
    if bias is not None:
        bias = bias.expand(B, H, 1, T)
        sampled = bias.gather(-1, pos_k.clamp(min=0).flatten(1)[None, :, None].expand(B, H, 1, -1))
        scores = scores + sampled.masked_fill(sampled == -math.inf, 0)
        hidden = hidden | (sampled == -math.inf)
    scores = scores.masked_fill(hidden, -math.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top == -math.inf, 0)).exp().masked_fill(hidden, 0)
    total = weights.sum(-1, keepdim=True)
    probs = weights / total.masked_fill(total == 0, 1)
    cells = probs.unflatten(-1, pos_k.shape[1:]).unflatten(-3, pos_q.shape[1:])  # [B, H, nQ, p, nK, p]
    cells = cells.masked_fill((pos_q < 0)[None, :, :, :, None, None], 0)
    block_map = cells.amax((3, 5))
    if bias is None:
        return block_map
    unseen = hidden.expand(B, H, 1, -1).unflatten(-1, pos_k.shape[1:]).all(-1)  # [B, H, 1, nK]
    open_tokens = torch.nn.functional.pad(bias > -math.inf, (0, -T % block_size)).unflatten(-1, (-1, block_size))
    return block_map.masked_fill(unseen & open_tokens.any(-1), math.nan)


def keep_count(share: float, num_blocks: int) -> int:
    """Blocks in a share of a row: max(1, floor(share * nK + 1e-6))."""
    return max(1, math.floor(share * num_blocks + 1e-6))


def select_blocks(
    block_map: Tensor,
    sparsity: float | None = None,
    tau: float = 0.95,
    min_keep: float = 0.05,
    max_keep: float = 1.0,
    force_q: Tensor | None = None,
    force_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Block lists from a map [B, H, nQ, nK]: ``kv_num_blocks`` [B, H, nQ] and ``kv_indices`` [B, H, nQ, nK], int32.

    ``sparsity``: the keep_count(1 - sparsity) best blocks of each row. ``tau``: the fewest blocks that hold a share
    ``tau`` of the row's mass, the crossing block included, between min_keep and max_keep. Ties go to the lower index.
    Forced blocks (force_q bool [nQ] rows, force_k bool [nK] columns, NaN entries) are always kept; the budget is
    spent on the others.
    """
    nQ, nK = block_map.shape[-2:]
    free = ~block_map.isnan()
    if force_k is not None:
        free = free & ~force_k
    if force_q is not None:
        free = free & ~force_q[:, None]
    num_free = free.sum(-1)
    score = torch.where(free, block_map, -1.0) + 0.0  # free blocks first, -0.0 becomes 0.0
    order = score.argsort(dim=-1, descending=True, stable=True)
    if sparsity is not None:
        count = torch.full_like(num_free, keep_count(1 - sparsity, nK))
    else:
        low, high = keep_count(min_keep, nK), keep_count(max_keep, nK)
        count = _tau_count(block_map, free, order, tau).clamp(min=min(low, high), max=high)
    count = torch.minimum(count, num_free)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(nK, device=order.device).expand_as(order))
    return lists_from_mask(~free | (rank < count[..., None]))


def _tau_count(block_map: Tensor, free: Tensor, order: Tensor, tau: float) -> Tensor:
    """Smallest m whose m first blocks in ``order`` hold tau of the free blocks' mass, [B, H, nQ] int64."""
    if tau >= 1:
        return free.sum(-1)
    mass = torch.where(free, block_map, 0.0).double().mul(2.0**MASS_BITS).floor().long()
    prefix = mass.gather(-1, order).cumsum(-1)
    reached = prefix.double() >= tau * prefix[..., -1:].double()
    return reached.long().argmax(-1) + 1


def lists_from_mask(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending lists, zeros past the count, from a bool mask [B, H, nQ, nK]."""
    nK = keep.shape[-1]
    num = keep.sum(-1, dtype=torch.int32)
    index = torch.arange(nK, device=keep.device)
    kept_first = torch.where(keep, index, index + nK).sort(-1).values
    return num, torch.where(kept_first < nK, kept_first, 0).to(torch.int32)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    key_mask: Tensor | None = None,
    block_size: int = 128,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks: (out [B, H, S, D] in q's dtype, LSE [B, H, S] in fp32 or fp64).

    Materialises the scores [B, H, S, T]. A row with nothing to attend to gives zeros and minus infinity.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    (_, H, S, D), T = q.shape, k.shape[2]
    group = H // k.shape[1]
    k, v = (x.to(compute).repeat_interleave(group, 1) for x in (k, v))
    scores = (q.to(compute) @ k.transpose(-1, -2)) * (D**-0.5 if scale is None else scale)
    keep = kept_blocks(kv_num_blocks, kv_indices, -(-T // block_size))
    hidden = ~keep.repeat_interleave(block_size, -2)[..., :S, :].repeat_interleave(block_size, -1)[..., :T]
    bias = additive_mask(key_mask, compute)
    if bias is not None:
        hidden = hidden | (bias == -math.inf)
        scores = scores + bias.masked_fill(bias == -math.inf, 0)
    hidden = hidden.expand_as(scores)
    scores = scores.masked_fill(hidden, -math.inf)
    lse = scores.logsumexp(-1)
    probs = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp().masked_fill(hidden, 0)
    # A hidden NaN or Inf in v must not leak through 0 * NaN: each row sums only over keys it attends to.
    if not v.isfinite().all():
        out = torch.where(hidden[..., None], 0.0, probs[..., None] * v[:, :, None]).sum(-2)
    else:
        out = probs @ v
    return out.to(q.dtype), lse
