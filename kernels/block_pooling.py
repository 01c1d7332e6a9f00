"""Means over the tokens of blocks, under a key mask, and the softmax over blocks: what content-based policies share.

A mean is weighted by exp(bias): a hidden token counts nothing, and with a bool mask all visible tokens count the same.
Memory: copies of one sample's q or k in the compute dtype.

Shapes: H query heads, Hkv key heads, N tokens, D head dim, nB = ceil(N / block).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cut(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """[..., N, D] -> [..., nB, block, D] in a dtype, zeros past N."""
    return torch.nn.functional.pad(x.to(dtype), (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block))


def cut_bias(bias: Tensor | None, num_tokens: int, block: int, like: Tensor) -> Tensor:
    """A bias [1, h, N] (None: zeros) -> [1, h, nB, block] in ``like``'s dtype, minus infinity past N."""
    if bias is None:
        bias = like.new_zeros(1, 1, num_tokens)
    return torch.nn.functional.pad(bias.to(like.dtype), (0, -num_tokens % block), value=-math.inf).unflatten(
        -1, (-1, block)
    )


def token_weights(bias: Tensor) -> tuple[Tensor, Tensor]:
    """Of a cut bias [1, h, nB, block]: the share of each token in its block's mean, and log mean exp(bias) over the
    visible tokens [1, h, nB], which is 0 for a bool mask and minus infinity where nothing is visible.
    """
    lse = bias.logsumexp(-1, keepdim=True)
    empty = lse == -math.inf
    weights = (bias - lse.masked_fill(empty, 0)).exp()  # zeros in an empty block
    visible = (bias != -math.inf).sum(-1)
    added = lse.squeeze(-1) - visible.clamp(min=1).to(bias.dtype).log()
    return weights, added


def weighted_mean(blocks: Tensor, weights: Tensor) -> Tensor:
    """[1, h, nB, block, D] and [1, h|1, nB, block] -> [1, h, nB, D]; tokens of weight 0 may hold NaN."""
    return (weights[..., None, :] @ blocks.masked_fill(weights[..., None] == 0, 0)).squeeze(-2)


def all_heads(x: Tensor, num_heads: int) -> Tensor:
    """[1, h, ...] -> [1, H, ...]: what belongs to a key head, for each query head that reads it."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def key_heads(k: Tensor, num_heads: int, bias: Tensor | None) -> Tensor:
    """K with a head for each query head where the mask differs between them, else as it is."""
    return all_heads(k, num_heads) if bias is not None and bias.shape[1] > 1 else k


def mean_pooled(x: Tensor, block: int, dtype: torch.dtype, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means of blocks [1, h, nB, D] and what the bias adds to their scores [1, h|1, nB]."""
    blocks = cut(x, block, dtype)
    weights, added = token_weights(cut_bias(bias, x.shape[-2], block, blocks))
    return weighted_mean(blocks, weights), added


def softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    """Over the last dimension without the hidden entries, which get 0; all 0 where everything is hidden. NaN stays."""
    scores = scores.masked_fill(hidden, -math.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top.masked_fill(top == -math.inf, 0)).exp().masked_fill(hidden, 0)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1)


def block_scores(q: Tensor, k: Tensor, added: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores of pooled queries [1, H, nQ, D] and keys [1, h, nK, D] with a bias [1, h', nK]: [1, H, nQ, nK], and which
    of them are hidden [1, h', 1, nK].
    """
    added = added[:, :, None]
    hidden = added == -math.inf
    scores = q @ all_heads(k, q.shape[1]).transpose(-1, -2)
    return scores * scale + added.masked_fill(hidden, 0), hidden
