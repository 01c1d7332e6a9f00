"""Attention as people write it: every spelling that must be rewritten, and every look-alike that must not be.

One entry is a function of tensors with inputs for it. ``code`` is what the report must say ("rewritten", a code of
``passes/codes.py``, or None where there is no attention at all). The conformance run compiles the same list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, H, S, D = 2, 4, 40, 16
SCALE = D**-0.5


@dataclass(frozen=True)
class Spelling:
    """``call(*inputs())`` with at most one attention in it."""

    name: str
    call: Callable[..., Any] = field(repr=False)
    inputs: Callable[[], tuple[Any, ...]] = field(repr=False)
    code: str | None = "rewritten"
    kind: str = "matmul"
    mask: str = "none"
    seen: str | None = None
    """the report's code where the passes see no attention: eagerly it looks like one"""


REWRITTEN: list[Spelling] = []
LEFT_ALONE: list[Spelling] = []


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def qkv(dtype: torch.dtype = torch.float32, kv_heads: int = H) -> tuple[Tensor, ...]:
    return rand(B, H, S, D, dtype=dtype), *(rand(B, kv_heads, S, D, dtype=dtype) for _ in range(2))


def half_qkv() -> tuple[Tensor, ...]:
    return qkv(torch.bfloat16)


def tokens_first() -> tuple[Tensor, ...]:
    return tuple(rand(B, S, H, D) for _ in range(3))


def with_keys(make: Callable[[], tuple[Tensor, ...]] = qkv) -> Callable[[], tuple[Tensor, ...]]:
    """Inputs and a [B, S] bool mask: the last keys of the second sample are padding."""

    def inputs() -> tuple[Tensor, ...]:
        keep = torch.ones(B, S, dtype=torch.bool)
        keep[1, S - 7 :] = False
        return *make(), keep

    return inputs


def x_only(features: int = H * D) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (rand(B, S, features),)


def rewritten(
    name: str, inputs: Callable[[], tuple[Any, ...]] = qkv, kind: str = "matmul", mask: str = "none"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(call: Callable[..., Any]) -> Callable[..., Any]:
        REWRITTEN.append(Spelling(name, call, inputs, "rewritten", kind, mask))
        return call

    return keep


def left_alone(
    name: str,
    code: str | None,
    inputs: Callable[[], tuple[Any, ...]] = qkv,
    kind: str = "matmul",
    mask: str = "none",
    seen: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(call: Callable[..., Any]) -> Callable[..., Any]:
        LEFT_ALONE.append(Spelling(name, call, inputs, code, kind, mask, seen))
        return call

    return keep


# ---- F.scaled_dot_product_attention ----------------------------------------------------------------------------------
@rewritten("sdpa", kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@rewritten("sdpa, keywords and scale", kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, scale=0.3)


@rewritten("sdpa, all positional", kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, False)


@rewritten("sdpa, tokens first", tokens_first, kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).reshape(B, S, H * D)


@rewritten("sdpa, native grouped heads", lambda: qkv(kv_heads=2), kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@rewritten("sdpa, repeated key heads", lambda: qkv(kv_heads=2), kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


@rewritten("sdpa, one key head broadcast", lambda: qkv(kv_heads=1), kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.expand(-1, H, -1, -1), v.expand(-1, H, -1, -1))


@rewritten("sdpa, no heads", lambda: tuple(rand(B, S, D) for _ in range(3)), kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@rewritten("sdpa, five dimensions", lambda: tuple(rand(2, 3, 2, S, D) for _ in range(3)), kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@rewritten("sdpa, bool key mask [B, 1, 1, T]", with_keys(), kind="sdpa", mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])


@rewritten("sdpa, bool key mask expanded over queries", with_keys(), kind="sdpa", mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :].expand(B, H, S, S))


@rewritten("sdpa, key mask [T]", lambda: (*qkv(), torch.arange(S) < S - 5), kind="sdpa", mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep.view(1, S))


@rewritten("sdpa, float bias of -10000 per head", with_keys(), kind="sdpa", mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    bias = (1 - keep.to(q.dtype)) * -10000.0
    bias = bias[:, None, :].repeat_interleave(H, dim=0).view(B, H, 1, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@rewritten("sdpa, key mask written out over queries", with_keys(), kind="sdpa", mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    bias = torch.zeros(B, 1, S, S, dtype=q.dtype).masked_fill(~keep[:, None, None, :].expand(B, 1, S, S), float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@rewritten("sdpa, scale from a tensor", lambda: (*qkv(), torch.tensor(0.3)), kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q * temperature, k, v, scale=1.0)


@rewritten("sdpa, packed qkv by chunk", x_only(3 * H * D), kind="sdpa")
def _(x: Tensor) -> Tensor:
    q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in x.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v)


@rewritten("sdpa, packed qkv by unbind", x_only(3 * H * D), kind="sdpa")
def _(x: Tensor) -> Tensor:
    q, k, v = x.reshape(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, H * D)


@rewritten("sdpa, view of the output", kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).contiguous().view(B * H, S, D)


@rewritten("sdpa, rotation written into the queries", kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q + 0
    q[:, :, 8:] = q[:, :, 8:] * 0.5
    return F.scaled_dot_product_attention(q, k, v)


# ---- matmul, softmax, matmul -----------------------------------------------------------------------------------------
@rewritten("matmul, scale after")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * SCALE, dim=-1) @ v


@rewritten("matmul, divide")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.mT) / math.sqrt(D), dim=-1), v)


@rewritten("matmul, scale before")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * SCALE) @ k.transpose(2, 3)).softmax(-1).matmul(v)


@rewritten("matmul, scale split over q and k")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.Softmax(dim=-1)((q * D**-0.25) @ (k * D**-0.25).mT) @ v


@rewritten("matmul, no scale")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(dim=-1) @ v


@rewritten("matmul, in-place scale")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.mul_(SCALE)
    scores /= 2
    return scores.softmax(-1) @ v


@rewritten("matmul, dropout 0")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(F.softmax(q @ k.mT * SCALE, -1), 0.0, training=True) @ v


@rewritten("matmul, dropout in eval")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(F.softmax(q @ k.mT * SCALE, -1), 0.3, training=False) @ v


@rewritten("matmul, upcast softmax", half_qkv)
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@rewritten("matmul, all in fp32 and back", half_qkv)
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.softmax(q.float() @ k.float().mT * SCALE, -1) @ v.float()).type_as(q)


@rewritten("matmul, row maximum subtracted")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


@rewritten("matmul, maximum subtracted before softmax")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return (scores - scores.max(dim=-1, keepdim=True).values).softmax(-1) @ v


@rewritten("matmul, by log-sum-exp")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v


@rewritten("matmul, learned temperature", lambda: (*qkv(), torch.rand(H, 1, 1) + 0.5))
def _(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * temperature).softmax(-1) @ v


@rewritten("matmul, additive key mask", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    bias = (1.0 - keep[:, None, None, :].float()) * torch.finfo(torch.float32).min
    return (q @ k.mT / math.sqrt(D) + bias).softmax(-1) @ v


@rewritten("matmul, mask before the scale", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    bias = torch.where(keep, 0.5, -40000.0)[:, None, None]
    return ((q @ k.mT + bias) * SCALE).softmax(-1) @ v


@rewritten("matmul, masked_fill -inf", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~keep[:, None, None], float("-inf")).softmax(-1) @ v


@rewritten("matmul, masked_fill -1e9", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(keep[:, None, None].logical_not(), -1e9).softmax(-1) @ v


@rewritten("matmul, masked_fill in place", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= SCALE
    scores.masked_fill_(keep[:, None, None] == 0, -torch.inf)
    return scores.softmax(-1) @ v


@rewritten("matmul, where", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.where(keep[:, None, None], scores, torch.finfo(q.dtype).min).softmax(-1) @ v


@rewritten("matmul, two masks", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    bias = torch.linspace(-1, 1, S)
    scores = (q @ k.mT * SCALE + bias).masked_fill(~keep[:, None, None], float("-inf"))
    return scores.softmax(-1) @ v


@rewritten("matmul, row maximum by max().values and unsqueeze")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return (scores - scores.max(-1).values.unsqueeze(-1)).softmax(-1) @ v


@rewritten("matmul, sum clamped where it can't be lower")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1).unsqueeze(-1).clamp_min(1e-9) @ v


@rewritten("matmul, factor of a cast constant")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * torch.full((), 1.5).to(torch.int32)).softmax(-1) @ v


@rewritten("matmul, dropout 0 on the scores")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(q @ k.mT * SCALE, 0.0).softmax(-1) @ v


@rewritten("matmul, where with a tensor of -inf", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep[:, None, None], q @ k.mT * SCALE, torch.tensor(float("-inf"))).softmax(-1) @ v


@rewritten("matmul, where with new_tensor", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.where(keep[:, None, None], scores, scores.new_tensor(-1e9)).softmax(-1) @ v


@rewritten("matmul, masked_fill with a tensor", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(~keep[:, None, None], torch.tensor(-1e9)).softmax(-1) @ v


@rewritten("matmul, where with full_like", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.where(keep[:, None, None], scores, torch.full_like(scores, -1e9)).softmax(-1) @ v


@rewritten("matmul, grouped heads expanded", lambda: qkv(kv_heads=2))
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :, None].expand(B, 2, 2, S, D).reshape(B, H, S, D) for x in (k, v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@rewritten("matmul, grouped heads in five dimensions", lambda: qkv(kv_heads=2))
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.view(B, 2, 2, S, D)
    return ((grouped @ k[:, :, None].mT * SCALE).softmax(-1) @ v[:, :, None]).reshape(B, H, S, D)


@rewritten("matmul, packed qkv", x_only(3 * H * D))
def _(x: Tensor) -> Tensor:
    q, k, v = x.reshape(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
    return ((q * SCALE) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


@rewritten("matmul, single head", lambda: tuple(rand(B, S, D) for _ in range(3)))
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * SCALE).softmax(-1), v)


@rewritten("matmul, window batches in five dimensions", lambda: tuple(rand(2, 3, 2, S, D) for _ in range(3)))
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * SCALE).softmax(-1) @ v


# ---- bmm on merged heads ---------------------------------------------------------------------------------------------
def _merged(x: Tensor) -> Tensor:
    return x.reshape(B * H, S, D)


@rewritten("bmm, merged heads")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.bmm(_merged(q), _merged(k).transpose(1, 2)) * SCALE).softmax(-1)
    return torch.bmm(weights, _merged(v)).view(B, H, S, D)


@rewritten("baddbmm, alpha", tokens_first)
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3).reshape(B * H, S, D) for x in (q, k, v))
    scores = torch.baddbmm(torch.empty(B * H, S, S), q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    out = torch.bmm(scores.softmax(dim=-1), v)
    return out.reshape(B, H, S, D).permute(0, 2, 1, 3).reshape(B, S, H * D)


@rewritten("baddbmm, key mask, upcast", with_keys(half_qkv), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    bias = ((~keep) * -10000.0)[:, None, :].repeat_interleave(H, dim=0).float()
    q, k, v = (_merged(x) for x in (q, k, v))
    scores = torch.baddbmm(bias.expand(-1, S, -1), q.float(), k.float().transpose(1, 2), beta=1, alpha=SCALE)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(B, H, S, D)


@rewritten("bmm, masked in four dimensions", with_keys(), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    q, k, v = (_merged(x) for x in (q, k, v))
    scores = torch.bmm(q * SCALE, k.transpose(1, 2)).view(B, H, S, S) + (~keep)[:, None, None] * -1e9
    weights = scores.view(B * H, S, S).softmax(-1)
    return torch.bmm(weights, v).view(B, H, S, D)


@rewritten("bmm, values on the left", lambda: tuple(rand(B, D, S) for _ in range(3)))
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.bmm(q.permute(0, 2, 1), k) * SCALE).softmax(dim=2)
    return torch.bmm(v, weights.permute(0, 2, 1))


# ---- einsum ----------------------------------------------------------------------------------------------------------
@rewritten("einsum")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("bhqd,bhkd->bhqk", q, k) * SCALE).softmax(dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


@rewritten("einsum, tokens first", tokens_first)
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.einsum("blhe,bshe->bhls", q, k) * SCALE, dim=-1)
    return torch.einsum("bhls,bshd->blhd", weights, v)


@rewritten("einsum, heads last in the scores", with_keys(tokens_first), mask="key")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bijh", q, k) * SCALE
    weights = scores.masked_fill(~keep[:, None, :, None], float("-inf")).softmax(dim=2)
    return torch.einsum("bijh,bjhd->bihd", weights, v)


@rewritten("einsum, ellipsis and one key head", lambda: (rand(B, H, S, D), rand(B, S, D), rand(B, S, D)))
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("bhid,bjd->bhij", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, v)


@rewritten("einsum, operands swapped")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("...jd,...id->...ij", k, q) * SCALE).softmax(-1)
    return torch.einsum("...jd,...ij->...id", v, weights)


# ---- library modules -------------------------------------------------------------------------------------------------
def _module(make: Callable[[], nn.Module], **call: Any) -> Callable[[Tensor], Any]:
    torch.manual_seed(0)
    module = make()
    return lambda x: module(x, x, x, **call)[0] if isinstance(module, nn.MultiheadAttention) else module(x, **call)


def mha(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(H * D, H, batch_first=True, **options)


def layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(H * D, H, 128, dropout=0.0, batch_first=True, **options)


for _name, _call, _kind in (
    ("MultiheadAttention", _module(mha, need_weights=False), "mha"),
    ("MultiheadAttention, weights asked for and dropped", _module(mha), "mha"),
    ("MultiheadAttention, eval", _module(lambda: mha().eval()), "mha"),
    ("TransformerEncoderLayer, train", _module(layer), "mha"),
    ("TransformerEncoderLayer, eval", _module(lambda: layer().eval()), "encoder_layer"),
    ("TransformerEncoderLayer, eval, norm first", _module(lambda: layer(norm_first=True).eval()), "encoder_layer"),
):
    REWRITTEN.append(Spelling(_name, _call, x_only(), "rewritten", _kind))


# ---- what must be left alone -----------------------------------------------------------------------------------------
@left_alone("sdpa, causal", "causal", kind="sdpa", mask="causal")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@left_alone("sdpa, dropout", "dropout", kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


@left_alone("sdpa, pair mask", "pair-mask", lambda: (*qkv(), rand(S, S)), kind="sdpa", mask="pairwise")
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@left_alone("sdpa, pair mask written in place", "pair-mask", kind="sdpa", mask="pairwise")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(1, 1, S, S, dtype=torch.bool)
    mask[:, :, :8, 8:] = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@left_alone("sdpa, padding of queries and keys", "pair-mask", with_keys(), kind="sdpa", mask="pairwise")
def _(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, :, None] & keep[:, None, None, :])


@left_alone(
    "sdpa, longer keys from elsewhere", "cross", lambda: (*qkv()[:1], *(rand(B, H, S + 9, D) for _ in "kv")), "sdpa"
)
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@left_alone("sdpa, other value width", "head-dim", lambda: (*qkv()[:2], rand(B, H, S, 2 * D)), kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@left_alone("sdpa, wide heads", "head-dim", lambda: tuple(rand(1, 1, S, 320) for _ in range(3)), kind="sdpa")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@left_alone("matmul, tril mask", "causal", mask="causal")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    return (q @ k.mT * SCALE).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@left_alone("matmul, band mask", "window", mask="window")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(S, S, dtype=torch.bool).tril(4).triu(-4)
    return (q @ k.mT * SCALE).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@left_alone("matmul, relative position bias", "pair-mask", lambda: (*qkv(), rand(H, S, S)), mask="pairwise")
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + bias).softmax(-1) @ v


@left_alone("matmul, weights returned", "weights-used")
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v, weights


@left_alone("matmul, log-sum-exp returned", "weights-used")
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * SCALE
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@left_alone("matmul, dropout in training", "dropout")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT * SCALE).softmax(-1), 0.5, training=True) @ v


@left_alone("matmul, softcap", "softcap")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT * SCALE / 20.0) * 20.0).softmax(-1) @ v


@left_alone("matmul, learned sink", "sink", lambda: (*qkv(), rand(1, H, 1, 1)))
def _(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT * SCALE, sink.expand(B, H, S, 1)], dim=-1)
    return scores.softmax(-1)[..., :-1] @ v


@left_alone("matmul, clamped scores", "scores-modified")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).clamp(-5, 5).softmax(-1) @ v


def _shifted(shift: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * SCALE
        return (scores - shift(scores)).softmax(-1) @ v

    return call


for _name, _shift in {
    "maximum over the queries": lambda s: s.amax(-2, keepdim=True),
    "max().values over the queries": lambda s: s.max(-2, keepdim=True).values,
    "log-sum-exp over the queries": lambda s: s.logsumexp(-2, keepdim=True),
    "maximum over the heads": lambda s: s.amax(1, keepdim=True),
    "maximum over the batch": lambda s: s.amax(0),
    "row maximum along the keys": lambda s: s.amax(-1).unsqueeze(-2),
}.items():
    left_alone(f"matmul, {_name} subtracted", "scores-modified")(_shifted(_shift))


@left_alone("matmul, row sums along the keys", None, seen="unreadable")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).exp()
    return (weights / weights.sum(-1).unsqueeze(-2)) @ v


@left_alone("matmul, row sums clamped", None, seen="unreadable")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * SCALE).exp()
    return (weights / weights.sum(-1, keepdim=True).clamp_min(1e3)) @ v


@left_alone("matmul, twice the log-sum-exp", None, seen="unreadable")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.exp(torch.sub(scores, scores.logsumexp(-1, keepdim=True), alpha=2)) @ v


@left_alone("matmul, log-sum-exp along the keys", None)
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE)[0, 0]
    return torch.exp(scores - scores.logsumexp(-1)) @ v[0, 0]


@left_alone("matmul, scores rounded", "scores-modified")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).to(torch.int32).float().softmax(-1) @ v


@left_alone("matmul, weights as bool", "weights-modified")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-1).to(torch.bool).float() @ v


@left_alone("matmul, fill from an input", "scores-modified", lambda: (*qkv(), torch.tensor(-1e9)))
def _(q: Tensor, k: Tensor, v: Tensor, fill: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).masked_fill(torch.arange(S) < 3, fill).softmax(-1) @ v


@left_alone("matmul, dropout on the scores", "dropout")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(q @ k.mT * SCALE, 0.5, training=True).softmax(-1) @ v


@left_alone("matmul, gated weights", "weights-modified", lambda: (*qkv(), torch.rand(H, 1, 1)))
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    return ((q @ k.mT * SCALE).softmax(-1) * gate) @ v


@left_alone("matmul, softmax over queries", "softmax-dim")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-2) @ v


@left_alone("matmul, stale view of scores changed in place", "mutation")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    alias = scores.view(B, H, S, S)
    scores.mul_(SCALE)
    return alias.softmax(-1) @ v


@left_alone("matmul, queries changed in place on the way", "mutation")
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q + 0
    weights = (q @ k.mT * SCALE).softmax(-1)
    q.add_(1)
    return weights @ v + q


@left_alone("MultiheadAttention, weights used", "weights-used", x_only(), kind="mha")
def _(x: Tensor, module: nn.Module = mha()) -> tuple[Tensor, Tensor]:  # noqa: B008
    return module(x, x, x)


@left_alone("router", None, x_only())
def _(x: Tensor, gate: nn.Module = nn.Linear(H * D, 8)) -> Tensor:  # noqa: B008
    return gate(x).softmax(-1).topk(2).values


@left_alone("mixture of experts", None, lambda: (rand(S, 32), nn.Parameter(rand(32, 8)), nn.Parameter(rand(8, 32))))
def _(x: Tensor, gate: Tensor, experts: Tensor) -> Tensor:
    return (x @ gate).softmax(-1) @ experts


@left_alone("classifier", None, x_only())
def _(x: Tensor, head: nn.Module = nn.Linear(H * D, 10)) -> Tensor:  # noqa: B008
    return head(x.mean(1)).softmax(-1) + 1


@left_alone("linear attention", None)
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@left_alone("similarity without values", None)
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).amax(-1)
