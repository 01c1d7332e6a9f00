"""A model of one's own, with attention written out by hand: nothing in it knows of blade.

Run it: ``python examples/own_module.py [--tiny]``
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import blade_compile


class Block(nn.Module):
    """Self-attention and a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, width] -> the same."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)  # [B, H, S, S]
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.ff(self.norm2(x))


def main() -> None:
    """Compile, explain, and compare with dense attention."""
    tiny = "--tiny" in sys.argv
    width, tokens, layers = (64, 256, 2) if tiny else (512, 8192, 4)
    options = {"sparsity": 0.5, "block_size": 16, "when": "always"} if tiny else {"sparsity": 0.8}
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width, width // 32) for _ in range(layers))).eval()
    x = torch.randn(1, tokens, width)
    with torch.inference_mode():
        sparse = torch.compile(model, backend="blade", options=options)
        out = sparse(x)
        print(blade_compile.explain(sparse, x))
        want = model(x)
        print(f"relative difference from dense attention: {(out - want).norm() / want.norm():.3f}")


if __name__ == "__main__":
    main()
