"""The block-sum search of AdaSpa (algorithms 3.2 and 3.3): exact softmax mass of each block, on any device.

On the CPU, and where the Triton kernel does not run, strips of query blocks go through ATen: one matrix product, one
exponential, one sum, all in place. bf16 and fp16 are widened first, because the CPU's products of them round their
results, which would show in the masses. Memory beyond the results: the keys of one sample in the compute dtype, and one
strip of at most CHUNK_ELEMENTS scores or one query block's. Equals ``reference_search`` within rounding.

Shapes: B batch, H query heads, Hkv key heads, S query tokens, T key tokens, D head dim, nQ = ceil(S / block),
nK = ceil(T / block).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import accelerator

CHUNK_ELEMENTS = 1 << 22  # 16 MB: few enough strips that starting the threads for each operator costs nothing


def block_sums(
    q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, scale: float, block_size: int, active: Tensor | None = None
) -> Tensor:
    """Sum of exp(score - LSE) in each block, [B, H, nQ, nK] fp32 (fp64 for fp64 inputs).

    Args:
        q, k: [B, H, S, D] and [B, Hkv, T, D], any float dtype, any strides.
        lse: [B, H, S] natural logarithm, of these q and k or cached from an earlier step; a row of minus infinity has
            no mass.
        bias: [B|1, H|1, T] added to the scores (-inf: never attended to), or None.
        scale: factor of the scores.
        block_size: tokens in a block.
        active: int32 [B]; where it is 0 the sample is not searched and its sums are 0. On a GPU nobody waits for it.
    """

    def with_triton() -> Tensor:
        return _triton().block_sums(q, k, lse, bias, scale, block_size, active)  # type: ignore[no-any-return]

    def with_aten() -> Tensor:
        return _from_lse(q, k, lse, bias, scale, block_size, active)

    return accelerator._run(q, block_size, with_triton, with_aten)


def lse_and_block_sums(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, block_size: int
) -> tuple[Tensor, Tensor]:
    """LSE [B, H, S] of the scores and the mass of each block [B, H, nQ, nK]; arguments as in `block_sums`.

    One pass over the scores on the CPU. The Triton kernels need two: attention for its LSE, then the sums.
    """

    def with_triton() -> tuple[Tensor, Tensor]:
        return _triton().attention_and_block_sums(q, k, k, bias, scale, block_size)[1:]  # type: ignore[no-any-return]

    return accelerator._run(q, block_size, with_triton, lambda: _with_lse(q, k, bias, scale, block_size))


@functools.cache
def _triton() -> Any:
    from . import triton_search

    return triton_search


@dataclass(frozen=True)
class _Strip:
    """Some query blocks of the heads that share a key head."""

    batch: int
    heads: slice
    tokens: slice
    blocks: slice
    scores: Tensor
    "[group, rows, nK * block], minus infinity past T; a buffer that the next strip overwrites"
    hidden: Tensor | None
    "bool [group|1, 1, nK * block], None: nothing is hidden"


def _strips(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, block: int, rows: list[int]) -> Iterator[_Strip]:
    """Scaled scores plus bias, strip by strip; ``rows``: the samples that are wanted."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    (_, H, S, D), (_, Hkv, T, _) = q.shape, k.shape
    group, width = H // Hkv, -(-T // block) * block
    step = max(1, CHUNK_ELEMENTS // (width * group * block)) * block
    buffer = q.new_empty(group * min(step, S) * width, dtype=compute)
    for b in rows:
        keys = torch.nn.functional.pad(k[b].to(compute), (0, 0, 0, width - T)).transpose(-1, -2)  # [Hkv, D, width]
        for g in range(Hkv):
            heads = slice(g * group, (g + 1) * group)
            added, hidden = _bias_of(bias, b, heads, T, width, compute, q)
            for start in range(0, S, step):
                tokens = slice(start, min(start + step, S))
                some = (q[b, heads, tokens].to(compute) * scale).reshape(-1, D)  # [group * rows, D]
                scores = torch.mm(some, keys[g], out=buffer[: len(some) * width].view(-1, width)).view(group, -1, width)
                if added is not None:
                    scores += added
                blocks = slice(start // block, -(-tokens.stop // block))
                yield _Strip(b, heads, tokens, blocks, scores, hidden)


def _bias_of(
    bias: Tensor | None, b: int, heads: slice, T: int, width: int, dtype: torch.dtype, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores [group|1, 1, width], and where they are hidden; None for nothing at all."""
    if bias is None and T == width:
        return None, None
    own = like.new_zeros(1, T, dtype=dtype)
    if bias is not None:
        own = bias[b if bias.shape[0] > 1 else 0].to(dtype)
        own = own[heads] if own.shape[0] > 1 else own
    own = torch.nn.functional.pad(own, (0, width - T), value=-math.inf)[:, None]
    return own, own == -math.inf


def _block_rows(cells: Tensor, block: int) -> Tensor:
    """Row sums [group, rows, nK] -> sums over query blocks [group, blocks, nK]; the last block may be short."""
    tail = -cells.shape[1] % block
    if tail:
        cells = torch.nn.functional.pad(cells, (0, 0, 0, tail))
    return cells.unflatten(1, (-1, block)).sum(2)


def _from_lse(
    q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, scale: float, block: int, active: Tensor | None
) -> Tensor:
    (B, H, S, _), T = q.shape, k.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    sums = q.new_zeros(B, H, -(-S // block), -(-T // block), dtype=compute)
    empty = lse == -math.inf
    # Waiting for a GPU here would break its graphs: there every sample is searched and the idle ones are cleared.
    host = q.device.type == "cpu"
    rows = list(range(B)) if active is None or not host else active.nonzero().flatten().tolist()
    for strip in _strips(q, k, bias, scale, block, rows):
        at = (strip.batch, strip.heads, strip.tokens)
        # Subtracting plus infinity leaves no mass, unless the score is a NaN: those rows are cleared below.
        weights = strip.scores.sub_(lse[at].to(compute).masked_fill(empty[at], math.inf)[..., None]).exp_()
        if strip.hidden is not None:
            weights.masked_fill_(strip.hidden, 0)
        cells = weights.unflatten(-1, (-1, block)).sum(-1).masked_fill(empty[at][..., None], 0)
        sums[strip.batch, strip.heads, strip.blocks] = _block_rows(cells, block)
    if active is not None and not host:
        sums.masked_fill_((active == 0)[:, None, None, None], 0)
    return sums


def _with_lse(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, block: int) -> tuple[Tensor, Tensor]:
    (B, H, S, _), T = q.shape, k.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    sums = q.new_zeros(B, H, -(-S // block), -(-T // block), dtype=compute)
    lse = q.new_full((B, H, S), -math.inf, dtype=compute)
    if not T:
        return lse, sums
    for strip in _strips(q, k, bias, scale, block, list(range(B))):
        scores = strip.scores
        if strip.hidden is not None:
            scores.masked_fill_(strip.hidden, -math.inf)
        top = scores.amax(-1, keepdim=True)
        empty = top == -math.inf
        weights = scores.sub_(top.masked_fill(empty, 0)).exp_()
        cells = weights.unflatten(-1, (-1, block)).sum(-1)  # [group, rows, nK]
        total = cells.sum(-1, keepdim=True)
        lse[strip.batch, strip.heads, strip.tokens] = (top + total.log()).squeeze(-1)
        cells = cells / total.masked_fill(empty, 1)
        sums[strip.batch, strip.heads, strip.blocks] = _block_rows(cells, block)
    return lse, sums
