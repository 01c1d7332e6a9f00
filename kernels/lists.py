"""Block lists in FlexAttention's format: checks, conversions, counts.

``kv_num_blocks`` int32 [B|1, H|1, nQ] and ``kv_indices`` int32 [B|1, H|1, nQ, cap]: the first kv_num_blocks entries
of a row name the key blocks that the query block attends to, in any order; later entries are never read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kept_blocks(kv_num_blocks: Tensor, kv_indices: Tensor, num_key_blocks: int) -> Tensor:
    """The lists as a bool mask [B|1, H|1, nQ, nK]."""
    capacity = kv_indices.shape[-1]
    valid = torch.arange(capacity, device=kv_indices.device) < kv_num_blocks[..., None]
    # Entries past the count may hold anything: send them to an extra column that is cut off.
    column = torch.where(valid, kv_indices.long(), num_key_blocks)
    keep = torch.zeros(*kv_indices.shape[:-1], num_key_blocks + 1, dtype=torch.bool, device=kv_indices.device)
    return keep.scatter_(-1, column, True)[..., :num_key_blocks]


def full_lists(B: int, H: int, nQ: int, nK: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lists that keep every block, contiguous."""
    num = torch.full((B, H, nQ), nK, dtype=torch.int32, device=device)
    return num, torch.arange(nK, dtype=torch.int32, device=device).expand(B, H, nQ, nK).contiguous()


def spans(ranges: Sequence[int], num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Flat (start, length, start, length, ...) ranges as ascending, disjoint (start, length) pairs within the tokens.

    A negative start counts from the end; what lies outside the tokens is cut off.
    """
    begins = [start if start >= 0 else start + num_tokens for start in ranges[::2]]
    cut = sorted((max(s, 0), min(s + n, num_tokens)) for s, n in zip(begins, ranges[1::2], strict=True))
    merged: list[tuple[int, int]] = []
    for start, end in cut:
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple((start, end - start) for start, end in merged)


def forced_blocks(ranges: Sequence[int], num_tokens: int, block_size: int, device: torch.device) -> Tensor | None:
    """Blocks that hold a token of the flat ranges (see `spans`): bool [nB], None for no token."""
    found = spans(ranges, num_tokens)
    if not found:
        return None
    forced = torch.zeros(-(-num_tokens // block_size), dtype=torch.bool, device=device)
    for start, length in found:
        forced[start // block_size : (start + length - 1) // block_size + 1] = True
    return forced
