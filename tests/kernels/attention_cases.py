"""Cases and oracles that the kernel tests share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blade_compile.kernels import lists, reference


@dataclass(frozen=True)
class Case:
    """Sizes of one attention call."""

    B: int = 2
    H: int = 4
    Hkv: int = 4
    S: int = 200
    T: int = 200
    D: int = 64
    block: int = 64

    def __str__(self) -> str:
        return f"B{self.B}H{self.H}kv{self.Hkv}S{self.S}T{self.T}D{self.D}b{self.block}"

    @property
    def nQ(self) -> int:
        return -(-self.S // self.block)

    @property
    def nK(self) -> int:
        return -(-self.T // self.block)

    def qkv(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        q = torch.randn(self.B, self.H, self.S, self.D)
        k, v = torch.randn(2, self.B, self.Hkv, self.T, self.D)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def random_lists(self, *, empty_row: bool = True) -> tuple[Tensor, Tensor]:
        """Counts from 0 to nK, indices in random order, garbage past the count."""
        num = torch.randint(0, self.nK + 1, (self.B, self.H, self.nQ), dtype=torch.int32)
        if empty_row:
            num[0, 0, 0] = 0
        idx = torch.rand(self.B, self.H, self.nQ, self.nK).argsort(-1).to(torch.int32)
        past = torch.arange(self.nK) >= num[..., None]
        return num, idx.masked_fill(past, 2**31 - 1)

    def full_lists(self) -> tuple[Tensor, Tensor]:
        return lists.full_lists(self.B, self.H, self.nQ, self.nK, torch.device("cpu"))


ODD_CASES = (
    Case(),
    Case(S=63, T=97, block=32),
    Case(S=1, T=1, block=16),
    Case(B=1, H=6, Hkv=2, S=130, T=257, D=40, block=128),
    Case(B=1, H=2, Hkv=1, S=111, T=64, D=256, block=64),
    Case(S=128, T=128, D=96, block=128),
    Case(B=3, H=1, Hkv=1, S=48, T=300, D=72, block=16),
)


def plain_sdpa(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, block: int, scale: float | None = None) -> Tensor:
    """F.scaled_dot_product_attention with the kept blocks as a bool mask: plain PyTorch in the same precision."""
    mask = keep.repeat_interleave(block, -2)[..., : q.shape[2], :].repeat_interleave(block, -1)[..., : k.shape[2]]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return torch.where(mask.any(-1, keepdim=True), out, 0)


def exact(q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    """The reference in fp64."""
    mask = kwargs.pop("key_mask", None)
    if isinstance(mask, Tensor) and mask.is_floating_point():
        mask = mask.double()
    return reference.block_sparse_attention(q.double(), k.double(), v.double(), num, idx, key_mask=mask, **kwargs)  # type: ignore[arg-type]


def padding_mask(B: int, T: int, kind: str) -> Tensor | None:
    """Key masks of every kind: the first sample sees everything, the others a growing tail less."""
    if kind == "none":
        return None
    length = torch.tensor([max(1, T - b * T // 3) for b in range(B)])
    mask = torch.arange(T) < length[:, None]
    if kind == "bool":
        return mask
    if kind == "nothing":
        return mask & (torch.arange(B) > 0)[:, None]
    bias = torch.randn(B, T)
    return bias.masked_fill(~mask, -math.inf if kind == "inf" else -1e4)
