"""Correctness gate of the attention benchmarks: sampled query and key blocks against fp64, on the same lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Relative L2 error against fp64 on the same inputs: a wrong mask, scale or tail is off by far more.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Problem:
    """q, k, v [1, H, S, D] of one dtype with the block lists that everybody attends over."""

    q: Tensor
    k: Tensor
    v: Tensor
    num: Tensor
    idx: Tensor
    block: int

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return self.q.shape[-1] ** -0.5

    @property
    def num_blocks(self) -> int:
        """Query blocks, and key blocks, of a head."""
        return self.q.shape[2] // self.block

    @property
    def kept_blocks(self) -> int:
        """Listed blocks of all heads and rows."""
        return int(self.num.sum())

    @property
    def flops(self) -> float:
        """Operations of both products over the kept blocks."""
        return 4.0 * self.kept_blocks * self.block**2 * self.q.shape[-1]

    def sampled_rows(self) -> list[tuple[int, int]]:
        """(head, query block) pairs that stand for all: the first, one in the middle, the last."""
        heads, blocks = self.q.shape[1], self.num_blocks
        return [(0, 0), (heads - 1, blocks // 2), (heads // 2, blocks - 1)]

    def tokens(self, block: int) -> slice:
        """Where a block lies."""
        return slice(block * self.block, (block + 1) * self.block)

    def kept(self, head: int, row: int) -> Tensor:
        """Key tokens that a query block attends to."""
        blocks = self.idx[0, head, row, : int(self.num[0, head, row])].long()
        return (blocks[:, None] * self.block + torch.arange(self.block, device=blocks.device)).flatten()


def relative(found: Tensor, exact: Tensor) -> float:
    """Relative L2 error."""
    return float((found.double() - exact).norm() / exact.norm())


def exact_rows(p: Problem, head: int, row: int) -> tuple[Tensor, Tensor]:
    """fp64 output [block, D] and LSE [block] of one query block."""
    keys = p.kept(head, row)
    q, k, v = p.q[0, head, p.tokens(row)].double(), p.k[0, head, keys].double(), p.v[0, head, keys].double()
    scores = q @ k.T * p.scale
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def forward_gate(p: Problem, strict: bool = True) -> Callable[[Tensor], float]:
    """Return a check of an output [1, H, S, D]; it gives back the largest sampled error.

    ``strict``: blade's own tolerance policy, at most twice the error of SDPA in the same dtype on the same keys.
    """
    exact = {place: exact_rows(p, *place)[0] for place in p.sampled_rows()}
    plain = {place: relative(_sdpa_rows(p, *place), out) for place, out in exact.items()}

    def check(out: Tensor) -> float:
        errors = []
        for (head, row), expected in exact.items():
            error = relative(out[0, head, p.tokens(row)], expected)
            limit = 2 * plain[head, row] + torch.finfo(out.dtype).eps if strict else LIMIT[out.dtype]
            if not error <= limit:
                raise AssertionError(f"head {head}, query block {row}: error {error:.2e}, allowed {limit:.2e}")
            errors.append(error)
        return max(errors)

    return check


def _sdpa_rows(p: Problem, head: int, row: int) -> Tensor:
    keys = p.kept(head, row)
    q, k, v = p.q[0, head, p.tokens(row)], p.k[0, head, keys], p.v[0, head, keys]
    return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]


def backward_gate(p: Problem, grad_out: Tensor) -> Callable[[tuple[Tensor, Tensor, Tensor]], float]:
    """Return a check of (dq, dk, dv): dq of a sampled query block, dk and dv of a key block that it keeps.

    dS = P * (dO V^T - <dO, O>), as in FlashAttention-2; every query block that keeps the key block takes part.
    """
    head, row = p.sampled_rows()[1]
    column = int(p.idx[0, head, row, 0])
    keepers = [i for i in range(p.num_blocks) if column in p.idx[0, head, i, : int(p.num[0, head, i])].tolist()]
    cols = p.tokens(column)
    dk, dv = (torch.zeros_like(x[0, head, cols], dtype=torch.float64) for x in (p.k, p.v))
    for i in keepers:
        weights, d_scores, q, do = _score_gradients(p, grad_out, (head, i), torch.arange(cols.start, cols.stop))
        dk += d_scores.T @ q * p.scale
        dv += weights.T @ do
    keys = p.kept(head, row)
    dq = _score_gradients(p, grad_out, (head, row), keys)[1] @ p.k[0, head, keys].double() * p.scale

    def check(grads: tuple[Tensor, Tensor, Tensor]) -> float:
        found = [grads[0][0, head, p.tokens(row)], grads[1][0, head, cols], grads[2][0, head, cols]]
        errors = [relative(f, e) for f, e in zip(found, (dq, dk, dv), strict=True)]
        limit = LIMIT[p.q.dtype]
        if not max(errors) <= limit:
            raise AssertionError(f"gradients of head {head}: errors {errors}, allowed {limit:.0e}")
        return max(errors)

    return check


def _score_gradients(
    p: Problem, grad_out: Tensor, place: tuple[int, int], keys: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and score gradients [block, keys] of one query block, its q and dO; all fp64."""
    head, row = place
    out, lse = exact_rows(p, head, row)
    q, do = (x[0, head, p.tokens(row)].double() for x in (p.q, grad_out))
    k, v = (x[0, head, keys].double() for x in (p.k, p.v))
    weights = (q @ k.T * p.scale - lse[:, None]).exp()
    return weights, weights * (do @ v.T - (do * out).sum(-1, keepdim=True)), q, do
