"""Counts the attention calls of an eager forward, whatever the graph passes later make of them.

This is the independent witness of the conformance run: it sees each `F.scaled_dot_product_attention`, each
multi-head attention module and each hand-written softmax over scores, so a site that the rewrite missed shows up as
a difference between two counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.attention.flex_attention as flex_module
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)
_MODULE = (F.multi_head_attention_forward, torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention)


@dataclass(frozen=True)
class Call:
    """One attention call: `form` is sdpa, softmax, module or flex; sizes as in [B, H, S, D] x [B, H, T, D].

    `mask` is none, key (the same for every query), pair,
    causal or unknown. `peak` is the mean over queries of the largest
    probability, `uniform` what it would be if attention were uniform (the mean of 1 / keys allowed).
    """

    form: str
    queries: int
    keys: int
    head_dim: int
    mask: str
    peak: float
    uniform: float

    @property
    def square(self) -> bool:
        return self.queries == self.keys


class AttentionCalls(TorchFunctionMode):
    """Context manager that appends a `Call` to `.calls` for each attention call inside it. Values are computed in
    the call's own dtype and nothing is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __enter__(self) -> AttentionCalls:
        # FlexAttention is a higher-order operator behind a plain function, which no function mode sees.
        self._flex = flex_module.flex_attention
        flex_module.flex_attention = self._flex_seen  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        flex_module.flex_attention = self._flex
        super().__exit__(*exception)

    def _flex_seen(self, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nan = float("nan")
        self.calls.append(Call("flex", query.shape[-2], key.shape[-2], query.shape[-1], "unknown", nan, nan))
        return self._flex(query, key, *args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.calls.append(_sdpa_call(*args, **kwargs))
        elif func in _SOFTMAX and isinstance(out, torch.Tensor) and out.ndim >= 3 and out.shape[-1] > 1:
            self.calls.append(_softmax_call(out))
        elif func in _MODULE:
            self.calls.append(_module_call(func, args))
        return out


def _sdpa_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    probability = scores.softmax(-1).nan_to_num(0)
    peak, uniform = _sharpness(probability)
    kind = "causal" if is_causal else _mask_kind(attn_mask)
    return Call("sdpa", query.shape[-2], key.shape[-2], query.shape[-1], kind, peak, uniform)


def _softmax_call(probability: torch.Tensor) -> Call:
    peak, uniform = _sharpness(probability)
    return Call("softmax", probability.shape[-2], probability.shape[-1], 0, "unknown", peak, uniform)


def _module_call(func: Any, args: tuple[Any, ...]) -> Call:
    # F.multi_head_attention_forward takes tokens first, the fused module functions take the batch first.
    axis = 0 if func is F.multi_head_attention_forward else 1
    keys = args[1] if func is not torch._transformer_encoder_layer_fwd else args[0]
    nan = float("nan")
    return Call("module", args[0].shape[axis], keys.shape[axis], 0, "unknown", nan, nan)


def _sharpness(probability: torch.Tensor) -> tuple[float, float]:
    allowed = (probability > 1e-12).sum(-1).clamp(min=1)
    return probability.amax(-1).mean().item(), (1 / allowed).mean().item()


def _mask_kind(mask: torch.Tensor | None) -> str:
    """none, key (equal for every query) or pair, from the mask's values."""
    if mask is None:
        return "none"
    if mask.ndim < 2 or mask.shape[-2] == 1 or bool((mask == mask[..., :1, :]).all()):
        return "key"
    return "pair"
