"""Global tokens as further key blocks: one softmax over kept blocks and global tokens from any block-sparse kernel.

The global keys and values are put behind the others, at the start of a block of their own, and their blocks at the
head of every list. A kernel that knows nothing of global tokens then gives the exact results and gradients. Memory
beyond the kernel's: copies of k, v and the lists.

Shapes: B batch, H query heads, Hkv key heads, S query tokens, T key tokens, G global tokens, D head dim, nK key blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import aten


class GlobalTokens(NamedTuple):
    """Keys that every query attends to."""

    k: Tensor
    "[B, Hkv, G, D]"
    v: Tensor
    "[B, Hkv, G, D]"
    bias: Tensor
    "added to their scores, fp32 (fp64 for fp64) [B|1, H|1, G]"

    def named(self) -> dict[str, Tensor]:
        """As the arguments of the Triton launchers."""
        return {"global_k": self.k, "global_v": self.v, "global_bias": self.bias}


def forward(
    run: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor,
    idx: Tensor,
    bias: Tensor | None,
    scale: float,
    block_size: int,
    tokens: GlobalTokens,
) -> tuple[Tensor, Tensor]:
    """Out and LSE by ``run``, an ``attention_forward`` of `aten` or `cpu`."""
    keys, values, lists, added = _appended(k, v, num, idx, bias, block_size, tokens)
    return run(q, keys, values, *lists, added, scale, block_size)


def backward(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]],
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
    tokens: GlobalTokens,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, global keys and values by ``run``, an ``attention_backward`` of `aten` or `cpu`."""
    keys, values, lists, added = _appended(k, v, num, idx, bias, block_size, tokens)
    dq, dkeys, dvalues = run(grad_out, grad_lse, q, keys, values, out, lse, *lists, added, scale, block_size)
    start, T, G = keys.shape[2] - tokens.k.shape[2], k.shape[2], tokens.k.shape[2]
    grads = (_own(grad, 0, T) for grad in (dkeys, dvalues))
    return dq, *grads, *(_own(grad, start, G) for grad in (dkeys, dvalues))


def _own(x: Tensor, start: int, length: int) -> Tensor:
    """A copy of some tokens in the flash layout."""
    B, H, _, D = x.shape
    return aten.flash_layout(B, H, length, D, x).copy_(x[:, :, start : start + length])


def _appended(
    k: Tensor, v: Tensor, num: Tensor, idx: Tensor, bias: Tensor | None, block: int, tokens: GlobalTokens
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Keys and values [B, Hkv, nK * block + G, D], their lists, and their bias [B|1, H|1, nK * block + G]."""
    tail = -k.shape[2] % block
    keys, values = (torch.cat([pad(x, (0, 0, 0, tail)), y], 2) for x, y in ((k, tokens.k), (v, tokens.v)))
    own = tokens.bias.new_zeros(1, 1, k.shape[2]) if bias is None else bias
    own = pad(own, (0, tail), value=-math.inf)
    B, H = (max(x, y) for x, y in zip(own.shape[:2], tokens.bias.shape[:2]))
    added = torch.cat([own.expand(B, H, -1), tokens.bias.expand(B, H, -1)], 2)
    first, G = (k.shape[2] + tail) // block, -(-tokens.k.shape[2] // block)
    blocks = torch.arange(first, first + G, dtype=idx.dtype, device=idx.device)
    return keys, values, (num + G, torch.cat([blocks.expand(*idx.shape[:3], G), idx], 3)), added
