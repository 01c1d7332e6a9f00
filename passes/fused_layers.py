"""ATen's fused transformer layers written out, so that the attention inside them can be seen and replaced.

``nn.TransformerEncoderLayer`` in eval mode without gradients calls one opaque operator; Dynamo has taken that path
before any pass runs. The shadow trace runs these equivalents instead. A layer whose attention is not rewritten keeps
its fused operator. Masks of the fused operators are True (or non-zero) where a key is *ignored*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_PAIRS, MASK_KEYS = 0, 1
"""``mask_type``: [S, S], [B, S]; anything else is already [B, H, S, S]"""


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``aten::_transformer_encoder_layer_fwd``: [B, S, C] to [B, S, C]."""

    def attend(x: Tensor) -> Tensor:
        return _attend(x, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attend(src))
    return norm_2(x + feed_forward(x))


def native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``aten::_native_multi_head_attention`` for self-attention without returned weights."""
    if need_weights or query is not key or key is not value:
        raise NotImplementedError("only self-attention without weights is written out")
    out = _attend(query, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)
    return out, out.new_empty((0,))


def _attend(
    x: Tensor,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None,
    mask_type: int | None,
) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in F.linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1))
    attend = None if mask is None else ~mask.to(torch.bool)  # the operator's mask says which keys to ignore
    if attend is not None and mask_type == MASK_KEYS:
        attend = attend[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
    return F.linear(out.transpose(1, 2).flatten(-2), proj_weight, proj_bias)


EQUIVALENTS: dict[Any, Callable[..., Any]] = {}
for _name, _function in (
    ("_transformer_encoder_layer_fwd", encoder_layer),
    ("_native_multi_head_attention", native_attention),
):
    for _home in (getattr(torch, _name, None), getattr(torch.ops.aten, _name).default):
        if _home is not None:
            EQUIVALENTS[_home] = _function
