"""Policy ``sparge``: attention between block means where a mean stands for its block (SpargeAttn, arXiv 2502.18137,
section 3.2).

    sim(X) = mean over pairs of tokens of their cosine       (self-similarity of a block)
    map = softmax over the key blocks with sim >= similarity of scale * mean(Q_i) mean(K_j)^T

A key block whose tokens are not alike is left out of the softmax and always kept; a query block of that kind keeps its
whole row. Published: the cumulative sum of the map up to ``tau``, blocks of 128 queries and 64 keys; here both have the
block size.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import normalize

from .block_pooling import all_heads, block_scores, cut, cut_bias, key_heads, softmax, token_weights, weighted_mean
from .policies import MapPolicy, Request, register


def block_map(request: Request) -> Tensor:
    """Compressed attention [1, H, nQ, nK]; NaN where a mean doesn't stand for its block."""
    least, H = request.options["similarity"], request.q.shape[1]
    if not isinstance(least, (int, float)) or not -1 <= least <= 1:
        raise ValueError(f"similarity={least!r}; valid is a number in [-1, 1], the mean cosine inside a block.")
    q, similar_q, _ = _summary(request.q, request, None)
    k, similar_k, added = _summary(key_heads(request.k, H, request.bias), request, request.bias)
    scores, hidden = block_scores(q, k, added, request.scale)
    # NaN is not alike: it counts as a block of its own and reaches no other.
    odd_q = ~(similar_q >= least)[..., None]
    odd_k = ~(all_heads(similar_k, H) >= least)[:, :, None] & ~hidden
    return softmax(scores, hidden | odd_k).masked_fill(odd_k, math.nan).masked_fill(odd_q & ~hidden, math.nan)


def _summary(x: Tensor, request: Request, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Means [1, h, nB, D], self-similarity [1, h, nB] and the blocks' bias [1, h|1, nB]."""
    blocks = cut(x, request.block_size, request.compute)
    weights, added = token_weights(cut_bias(bias, x.shape[2], request.block_size, blocks))
    # The mean over pairs of a product is the product of the means: |mean of the unit vectors|^2.
    directions = weighted_mean(normalize(blocks, dim=-1), weights)
    return weighted_mean(blocks, weights), directions.square().sum(-1), added


register(MapPolicy("sparge", block_map, defaults={"tau": 0.9}, options={"similarity": 0.6}))
