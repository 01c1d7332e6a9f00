"""Dense attention with its LSE: what a rewritten site runs when sparse would not be faster."""

from __future__ import annotations

import torch
from torch import Tensor

from . import aten, lists, reference


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The device's own SDPA: out [B, H, S, D] in the flash layout, LSE [B, H, S]."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = reference.additive_mask(key_mask, q.dtype)
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out, lse = _native(q, k, v, mask, scale)
    B, H, S, D = q.shape
    result = aten.flash_layout(B, H, S, D, q)
    result.copy_(out)
    return result, lse.contiguous()


def _native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    ops = torch.ops.aten
    if q.device.type == "cpu":
        return ops._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    if q.device.type == "cuda" and mask is None and q.dtype in (torch.float16, torch.bfloat16):
        return ops._scaled_dot_product_flash_attention.default(q, k, v, 0.0, False, False, scale=scale)[:2]
    if q.device.type == "cuda" and q.dtype != torch.float64:
        out, lse, *_ = ops._scaled_dot_product_efficient_attention.default(q, k, v, mask, True, 0.0, False, scale=scale)
        return out, lse[..., : q.shape[2]]
    nQ, nK = -(-q.shape[2] // 128), -(-k.shape[2] // 128)
    num, idx = lists.full_lists(1, 1, nQ, nK, q.device)
    bias = None if mask is None else mask[:, :, 0]
    return aten.attention_forward(q, k, v, num, idx, bias, scale, 128)
