"""The truth of the block-sum search: exact softmax mass of each block, in plain PyTorch, slow and obvious.

AdaSpa, algorithms 3.2 and 3.3. Shapes as in reference.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import lists, reference


def block_sums(q: Tensor, k: Tensor, lse: Tensor, key_mask: Tensor | None, scale: float, block_size: int) -> Tensor:
    """Sum of exp(score - LSE) in each (query block, key block), [B, H, nQ, nK] fp32 (fp64 for fp64 inputs).

    With the LSE of these same q and k it is attention mass: a row of blocks sums to the query block's number of tokens.
    With an LSE cached from an earlier step it is that step's normalisation of today's scores, which keeps the order of
    a row's blocks for each query. A row whose LSE is minus infinity has no mass. Materialises the scores.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    S, T = q.shape[2], k.shape[2]
    k = k.to(compute).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.to(compute) @ k.transpose(-1, -2)) * scale
    bias = reference.additive_mask(key_mask, compute)
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if bias is not None:
        hidden = bias == -math.inf
        scores = scores + bias.masked_fill(hidden, 0)
    lse = lse.to(compute)[..., None]
    mass = (scores - lse).exp().masked_fill(hidden | (lse == -math.inf), 0)
    mass = torch.nn.functional.pad(mass, (0, -T % block_size, 0, -S % block_size))
    return mass.unflatten(-1, (-1, block_size)).unflatten(-3, (-1, block_size)).sum((-3, -1))


def attention_and_block_sums(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention, its LSE and the mass of each block: the fused search of a first search step."""
    nQ, nK = -(-q.shape[2] // block_size), -(-k.shape[2] // block_size)
    full = lists.full_lists(q.shape[0], q.shape[1], nQ, nK, q.device)
    out, lse = reference.block_sparse_attention(q, k, v, *full, key_mask, block_size, scale)
    return out, lse, block_sums(q, k, lse, key_mask, scale, block_size)
