"""Block lists of a map by a budget: the part that all policies share.

Equals ``reference.select_blocks`` exactly, whatever runs: C++ on the CPU, a Triton kernel on a GPU, else the reference.

Shapes: B batch, H query heads, nQ query blocks, nK key blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import accelerator, cpu_probe, lists, reference


def select(
    block_map: Tensor,
    sparsity: float | None = None,
    tau: float = 0.95,
    min_keep: float = 0.05,
    max_keep: float = 1.0,
    force_q: Tensor | None = None,
    force_k: Tensor | None = None,
    head_sparsity: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """``kv_num_blocks`` [B, H, nQ] and ``kv_indices`` [B, H, nQ, nK], int32, contiguous, ascending, 0 past the count.

    Args:
        block_map: fp32 (fp64: by the reference) [B, H, nQ, nK], any strides, values >= 0 or NaN (kept).
        sparsity, tau, min_keep, max_keep: the budget, see the reference.
        force_q, force_k: bool [nQ] and [nK], kept on top of the budget.
        head_sparsity: a ``sparsity`` for each head instead of the budget; empty: all have the same.

    Raises:
        ValueError: ``head_sparsity`` is not one number in [0, 1) for each head.
    """
    B, H, nQ, nK = block_map.shape
    if not block_map.numel():
        return lists.full_lists(B, H, nQ, nK, block_map.device)
    rest = (tau, min_keep, max_keep, force_q, force_k)
    if not head_sparsity:
        return _expanded(block_map, sparsity, *rest)
    if len(head_sparsity) != H or not all(0 <= s < 1 for s in head_sparsity):
        raise ValueError(f"head_sparsity={tuple(head_sparsity)}; valid are {H} numbers in [0, 1), one for each head.")
    # Neighbouring heads with equal budgets go together: slices need no index on the device.
    parts, start = [], 0
    for share, heads in itertools.groupby(head_sparsity):
        stop = start + len(list(heads))
        parts.append(_expanded(block_map[:, start:stop], float(share), *rest))
        start = stop
    return torch.cat([num for num, _ in parts], 1), torch.cat([idx for _, idx in parts], 1)


def _expanded(block_map: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    """A map that is the same for all samples or heads (an expanded dimension) is read once."""
    B, H = block_map.shape[:2]
    once = block_map[: 1 if block_map.stride(0) == 0 else B, : 1 if block_map.stride(1) == 0 else H]
    num, idx = _select(once, *how)
    return num.expand(B, H, -1).contiguous(), idx.expand(B, H, -1, -1).contiguous()


def _select(block_map: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    if block_map.dtype != torch.float32:
        return reference.select_blocks(block_map, *how)
    if block_map.device.type != "cpu":
        return accelerator.select_blocks(block_map, *how)
    return (cpu_probe.select_blocks if cpu_probe.available() else reference.select_blocks)(block_map, *how)
