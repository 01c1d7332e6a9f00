"""AdaSpa's choice of blocks: exact block sums, head-adaptive sparsity in three levels (algorithms 3.2 to 3.5).

arXiv 2502.21079. Per-row top-k; protected blocks come on top of the budget. This file ranks and selects within one
step; what is remembered from step to step is the business of ``ops_carried.py``.

Shapes: B batch, H heads, nQ and nK query and key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import search, selection
from .lists import kept_blocks
from .policies import MapPolicy, Request, register

GOOD_RECALL = 0.8
LARGEST = 1e30  # an LSE cached long ago may be far too small: sums stay finite, so that they can be ranked and added


def block_map(request: Request) -> Tensor:
    """Mass of each block by the LSE of the same pass, [B, H, nQ, nK]: rows sum to their query block's tokens."""
    return search.lse_and_block_sums(request.q, request.k, request.bias, request.scale, request.block_size)[1]


def select(
    sums: Tensor,
    sparsity: float | None,
    tau: float,
    min_keep: float,
    max_keep: float,
    force_q: Tensor | None,
    force_k: Tensor | None,
    head_sparsity: Sequence[float] = (),
    *,
    head_adaptive: bool = True,
) -> tuple[Tensor, Tensor]:
    """Block lists of a map of block sums; arguments as for ``selection.select``.

    ``head_adaptive``: of the heads of each sample, ``min(n, H // 2)`` with the best recall drop (1 + s) / 2 and as many
    with the worst (3 s - 1) / 2, where n heads have a recall above 0.8 at the base sparsity s; the mean stays s. Below
    s = 1/3 the lower level would be negative, and every head keeps s. Never waits for the device.
    """
    sums = sums.clamp(max=LARGEST).float()
    rest = (tau, min_keep, max_keep, force_q, force_k)
    num, idx = selection.select(sums, sparsity, *rest, head_sparsity)
    if head_sparsity or not head_adaptive or sparsity is None or sparsity < 1 / 3 or sums.shape[1] < 2:
        return num, idx
    level = head_levels(head_recall(sums, num, idx))[:, :, None]
    for which, share in ((1, (1 + sparsity) / 2), (-1, (3 * sparsity - 1) / 2)):
        other_num, other_idx = selection.select(sums, share, *rest, ())
        num = torch.where(level == which, other_num, num)
        idx = torch.where((level == which)[..., None], other_idx, idx)
    return num, idx


def head_recall(sums: Tensor, num: Tensor, idx: Tensor) -> Tensor:
    """Share of a head's mass in the listed blocks, [B, H]; NaN counts as no mass. One head at a time: less memory."""
    shares = []
    for own, count, index in zip(*(x.flatten(0, 1) for x in (sums, num, idx)), strict=True):
        mass = own.nan_to_num(nan=0.0)
        total = mass.sum()
        shares.append((mass * kept_blocks(count, index, own.shape[-1])).sum() / total.masked_fill(total == 0, 1))
    return torch.stack(shares).view(sums.shape[:2])


def head_levels(recall: Tensor) -> Tensor:
    """1 for heads that may drop more, -1 for as many that have to drop less, 0 for the others: [B, H] int64.

    Equal recalls: the lower head counts as the better.
    """
    H = recall.shape[1]
    count = (recall > GOOD_RECALL).sum(1, keepdim=True).clamp(max=H // 2)  # min(n, H // 2): the groups never overlap
    order = recall.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(H, device=recall.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return (rank < count).long() - (rank >= H - count).long()


register(MapPolicy("adaspa", block_map, {"block_size": 64, "sparsity": 0.8}, {"head_adaptive": True}))
