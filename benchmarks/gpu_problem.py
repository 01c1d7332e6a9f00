"""The shapes that `benchmarks.gpu` measures, their inputs and block lists, and errors on sampled rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blade_compile.kernels import lists, ops  # noqa: F401 (ops registers the operators)

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """One model's self-attention: [1, H, S, D] in blocks, and how sparse it is run."""

    name: str
    S: int
    H: int
    D: int
    block: int = 128
    sparsities: tuple[float, ...] = SPARSITIES
    kept: int | None = None  # random lists of so many blocks for each row, instead of predicted ones

    @property
    def blocks(self) -> int:
        """Query blocks, and key blocks, of a head."""
        return -(-self.S // self.block)

    @property
    def dense_flops(self) -> float:
        """Operations of both products of a dense forward."""
        return 4.0 * self.S**2 * self.D * self.H


# In the order in which they are measured: what a time budget cuts off stands last.
SHAPES = (
    Shape("Wan2.1-1.3B", 32_760, 12, 128),
    Shape("CogVideoX-5B", 17_776, 48, 64),
    Shape("Flux 1024 px", 4_608, 24, 128),
    Shape("FlashInfer's point", 109_632, 7, 128, block=64, sparsities=(), kept=64),
    Shape("HunyuanVideo 75,600", 75_600, 24, 128),
    Shape("HunyuanVideo 118,800", 118_800, 24, 128),
)


class Problem:
    """Normal random q, k, v with the gradient of the output, and block lists for each sparsity."""

    def __init__(self, shape: Shape, device: str = "cuda", dtype: torch.dtype = DTYPE) -> None:
        self.shape = shape
        generator = torch.Generator(device).manual_seed(shape.S)
        # Memory as projections leave it: [B, S, H, D], seen as [B, H, S, D].
        sizes = (1, shape.S, shape.H, shape.D)
        made = [torch.randn(sizes, generator=generator, device=device).to(dtype).transpose(1, 2) for _ in range(4)]
        self.q, self.k, self.v, self.grad = made
        self.lists: dict[float, tuple[Tensor, Tensor]] = {s: self._predicted(s) for s in shape.sparsities}
        if shape.kept is not None:
            self.lists[1 - shape.kept / shape.blocks] = self._random(shape.kept, generator)

    def _predicted(self, sparsity: float) -> tuple[Tensor, Tensor]:
        return torch.ops.blade.mask_predict(  # type: ignore[no-any-return]
            self.q, self.k, sparsity=sparsity, block_size=self.shape.block
        )

    def _random(self, kept: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        n, device = self.shape.blocks, self.q.device
        order = torch.rand(1, self.shape.H, n, n, generator=generator, device=device).argsort(-1)[..., :kept]
        idx = torch.zeros(1, self.shape.H, n, n, dtype=torch.int32, device=device)
        idx[..., :kept] = order.sort(-1).values.to(torch.int32)
        return torch.full((1, self.shape.H, n), kept, dtype=torch.int32, device=device), idx

    def flops(self, sparsity: float) -> float:
        """Operations of both products of a forward over the kept blocks, counted as tokens: tails are no work."""
        num, idx = self.lists[sparsity]
        n, block = self.shape.blocks, self.shape.block
        sizes = torch.full((n,), block, dtype=torch.float64, device=num.device)
        sizes[-1] = self.shape.S - (n - 1) * block
        pairs = lists.kept_blocks(num, idx, n).double() @ sizes @ sizes
        return float(4 * self.shape.D * pairs.sum())

    def attend(self, sparsity: float) -> tuple[Tensor, Tensor]:
        """The attention operator alone: out, LSE."""
        num, idx = self.lists[sparsity]
        return torch.ops.blade.block_sparse_attention(  # type: ignore[no-any-return]
            self.q, self.k, self.v, num, idx, block_size=self.shape.block
        )

    def flex_mask(self, sparsity: float) -> Any:
        """The same blocks for FlexAttention, all of them full, so that no mask function runs."""
        from torch.nn.attention.flex_attention import BlockMask

        num, idx = self.lists[sparsity]
        zeros = torch.zeros_like(num), torch.zeros_like(idx)
        lengths = (self.shape.S, self.shape.S)
        return BlockMask.from_kv_blocks(*zeros, num, idx, BLOCK_SIZE=self.shape.block, seq_lengths=lengths)


def exact_rows(p: Problem, sparsity: float | None, head: int, row: int) -> tuple[Tensor, slice]:
    """fp64 output of one query block (``None``: dense), and where its rows lie."""
    S, block = p.shape.S, p.shape.block
    span = slice(row * block, min((row + 1) * block, S))
    keys = torch.arange(S, device=p.q.device)
    if sparsity is not None:
        num, idx = p.lists[sparsity]
        kept = idx[0, head, row, : int(num[0, head, row])].long()
        keys = (kept[:, None] * block + torch.arange(block, device=kept.device)).flatten()
        keys = keys[keys < S]
    q, k, v = p.q[0, head, span].double(), p.k[0, head, keys].double(), p.v[0, head, keys].double()
    return (q @ k.T * p.shape.D**-0.5).softmax(-1) @ v, span


def sampled_error(p: Problem, sparsity: float | None, out: Tensor) -> float:
    """Largest relative L2 error of three query blocks: the first, one in the middle, the last."""
    H, n = p.shape.H, p.shape.blocks
    errors = []
    for head, row in ((0, 0), (H - 1, n // 2), (H // 2, n - 1)):
        exact, span = exact_rows(p, sparsity, head, row)
        errors.append(float((out[0, head, span].double() - exact).norm() / exact.norm()))
    return max(errors) if all(e == e for e in errors) else float("nan")  # noqa: PLR0124 (NaN)
