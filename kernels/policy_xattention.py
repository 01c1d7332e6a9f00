"""Policy ``xattention``: sums along the antidiagonals of each block (XAttention, arXiv 2503.16428, section 2.1).

In each square of ``stride`` x ``stride`` scores one antidiagonal is summed, which meets every row and every column:

    A[i, j] = scale / stride * sum over r of q[i * stride + stride - 1 - r] k[j * stride + r]^T

Softmax over j, then the sum of the probabilities in each block. Tokens past the end and hidden keys add nothing to A.
Published: stride 16 (8 in the finer variant), blocks of 128, the fewest blocks that reach ``tau`` = 0.9.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import aten
from .block_pooling import all_heads, block_scores, cut, cut_bias, key_heads, softmax, token_weights
from .policies import MapPolicy, Request, register


def block_map(request: Request) -> Tensor:
    """Attention between strided tokens, summed in each block, [1, H, nQ, nK], in strips of query blocks."""
    stride, block, H = request.options["stride"], request.block_size, request.q.shape[1]
    if type(stride) is not int or stride < 1 or block % stride:
        raise ValueError(f"stride={stride!r}; valid is a divisor of the block size {block}, such as 8 or 16.")
    q = cut(request.q, stride, request.compute).flip(-2).flatten(-2)  # [1, H, S / stride, stride * D]
    keys = cut(key_heads(request.k, H, request.bias), stride, request.compute)
    bias = cut_bias(request.bias, request.k.shape[2], stride, keys)
    _, added = token_weights(bias)
    k = all_heads(keys.masked_fill((bias == -math.inf)[..., None], 0).flatten(-2), H)
    per_block = block // stride
    step = max(1, aten.CHUNK_ELEMENTS // max(1, H * k.shape[2] * per_block)) * per_block
    strips = []
    for rows in q.split(step, dim=2):
        probs = softmax(*block_scores(rows, k, added, request.scale / stride))
        probs = pad(probs, (0, -probs.shape[-1] % per_block, 0, -probs.shape[-2] % per_block))
        strips.append(probs.unflatten(-1, (-1, per_block)).unflatten(-3, (-1, per_block)).sum((-3, -1)))
    return torch.cat(strips, dim=2)


register(MapPolicy("xattention", block_map, defaults={"tau": 0.9}, options={"stride": 16}))
