"""A small diffusion transformer, written by hand, that the backend tests compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Multi-head attention as diffusion transformers write it; ``context`` makes it cross-attention."""

    def __init__(self, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        for layer in (self.to_q, self.to_k):  # sharp scores: a dropped block must show
            layer.weight.data.mul_(6)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width), Attention(width)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class TinyDiT(nn.Module):
    """x [B, S, 16], text [B, L, 64] -> [B, S, 16]."""

    def __init__(self, layers: int = 2, width: int = 64, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, width), nn.Linear(width, 16)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, text, use_reentrant=False) if self.checkpointed else block(x, text)
        return self.head(x)


def inputs(S: int = 96, B: int = 2) -> tuple[Tensor, Tensor]:
    """Video tokens and text tokens."""
    return torch.randn(B, S, 16), torch.randn(B, 8, 64)


ALWAYS = {"when": "always", "block_size": 16, "probe_tokens": 8}
DENSE = {**ALWAYS, "sparsity": 0.0}
HALF = {**ALWAYS, "sparsity": 0.5}
