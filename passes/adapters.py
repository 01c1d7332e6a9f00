"""Attention operators of other libraries, read by argument name: flash-attn 2 and 3, xformers, ATen's own kernels.

They are opaque calls on [B, S, H, D] (ATen's scaled-dot-product family: [B, H, S, D]) whose first result is the
output. One table of names serves all: a call is an attention that we can read if every argument beside queries, keys,
values and the scale is neutral. The other results (LSE, random state) must be unused.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from blade_compile.passes.codes import Refusal
from blade_compile.passes.dims import Roles
from blade_compile.passes.fx_utils import arguments, is_call, is_tensor, shape_of, value_of
from blade_compile.passes.match import Match, Operand, _sdpa_mask, _sdpa_operands, check_no_dropout
from blade_compile.passes.scores import constant_of

KINDS = {
    "flash_attn::_flash_attn_forward": "flash_attn",
    "flash_attn::_flash_attn_varlen_forward": "flash_attn",
    "flash_attn_2::_flash_attn_forward": "flash_attn",
    "flash_attn_3::_flash_attn_forward": "flash_attn_3",
    "flash_attn_3::fwd": "flash_attn_3",
    "_diffusers_flash_attn_3::_flash_attn_forward": "flash_attn_3",
    "xformers_flash::flash_fwd": "xformers",
    "xformers_flash3::flash_fwd": "xformers",
    "aten::_efficient_attention_forward": "xformers",
    "aten::_flash_attention_forward": "flash_attn",
    "aten::_scaled_dot_product_flash_attention": "sdpa",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "sdpa",
    "aten::_scaled_dot_product_efficient_attention": "sdpa",
    "aten::_scaled_dot_product_cudnn_attention": "sdpa",
}
HEADS_FIRST = "aten::_scaled_dot_product"

_QUERY, _KEY, _VALUE = ("q", "query"), ("k", "key"), ("v", "value")
_SCALE = ("softmax_scale", "scale")
_DROPOUT = ("dropout_p", "p", "p_dropout")
_CAUSAL = ("causal", "is_causal", "custom_mask_type")
_MASK = ("attn_bias", "attn_mask", "bias")
_WINDOW = ("window_size_left", "window_size_right", "window_left", "window_right", "attention_chunk")
_VARLEN = (
    "cu_seqlens_q", "cu_seqlens_k", "cum_seq_q", "cum_seq_k", "seqused_q", "seqused_k", "seqstart_q", "seqstart_k",
    "leftpad_k", "seqlen_k", "page_table", "block_table", "block_tables", "kv_batch_idx",
)  # fmt: skip
_HARMLESS = (
    "return_softmax", "return_debug_mask", "compute_log_sumexp", "compute_logsumexp", "num_splits", "pack_gqa",
    "deterministic", "sm_margin", "max_seqlen_q", "max_seqlen_k", "max_q", "max_k", "zero_tensors", "return_lse",
    "is_rotary_interleaved", "rotary_interleaved",
)  # fmt: skip


def kind_of(node: fx.Node) -> str | None:
    """The kind of a foreign attention call; "foreign" for an attention operator that no table knows."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name
    if name in KINDS:
        return KINDS[name]
    namespace, _, short = name.partition("::")
    forward = any(word in short for word in ("attn", "attention", "fmha")) and "backward" not in short
    return "foreign" if forward and namespace not in ("aten", "prims", "blade") else None


def match(node: fx.Node) -> Match:
    """Read a foreign call. Raises the refusal where an argument cannot be honoured."""
    name = node.target._schema.name  # type: ignore[union-attr]
    if name not in KINDS:
        raise Refusal("foreign-op", name)
    args = arguments(node)
    for key in _VARLEN:
        if args.get(key) is not None:
            raise Refusal("varlen", key)
    q, k, v = (_named(args, names) for names in (_QUERY, _KEY, _VALUE))
    if not all(is_tensor(x) and len(shape_of(x)) == 4 for x in (q, k, v)):
        raise Refusal("foreign-op", name)
    _check_neutral(args, name)
    found = _operands(node, q, k, v, heads_first=name.startswith(HEADS_FIRST))
    found.scale = constant_of(_named(args, _SCALE))
    if found.scale is None and _named(args, _SCALE) is not None:
        found.scale, found.factors = 1.0, [(_named(args, _SCALE), (), False)]
    mask = _named(args, _MASK)
    if mask is not None:
        roles, row = found.roles, found.out.layout
        heads_first = (row[0], row[2], (found.queries,), (found.keys,)) if row[1] == (found.queries,) else None
        found.masks.append(_sdpa_mask(mask, heads_first or (*row[:2], (found.queries,), (found.keys,))))
        found.roles = roles
    return found


def _named(args: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((args[name] for name in names if args.get(name) is not None), None)


def _check_neutral(args: dict[str, Any], name: str) -> None:
    for key, value in args.items():
        if key in (*_QUERY, *_KEY, *_VALUE, *_SCALE, *_MASK, *_VARLEN, *_HARMLESS) or value is None:
            continue
        if key in _DROPOUT:
            check_no_dropout(value)
        elif key in _CAUSAL:
            if constant_of(value) != 0.0:
                raise Refusal("causal", f"{key}={value}")
        elif key in _WINDOW:
            if constant_of(value) not in ((0.0,) if key == "attention_chunk" else (-1.0,)):
                raise Refusal("window", f"{key}={value}")
        elif key == "softcap":
            if constant_of(value) not in (0.0, -1.0):
                raise Refusal("softcap")
        elif constant_of(value) != 0.0:  # an argument with a meaning that we don't know
            raise Refusal("foreign-op", f"{name} with {key}")


def _operands(node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node, *, heads_first: bool) -> Match:
    out = _only_output(node)
    roles = Roles()
    operands, (s, t, d, e) = _sdpa_operands(roles, q, k, v, gqa=True, heads_first=heads_first)
    q_, k_, v_ = operands
    batch, heads = _row(q_, s, d)
    layout = (batch, heads, (s,), (e,)) if heads_first else (batch, (s,), heads, (e,))
    return Match("", roles, Operand(out, layout), q_, k_, v_, s, t, d, e, region=[node, out])


def _row(operand: Operand, s: int, d: int) -> list[Any]:
    return [dim for dim in operand.layout if dim not in ((s,), (d,))]


def _only_output(node: fx.Node) -> fx.Node:
    """The node of the first result; the others must have no reader."""
    if not isinstance(value_of(node), (tuple, list)):
        return node
    for user in node.users:
        if not is_call(user, operator.getitem):
            raise Refusal("unreadable", "the results are passed on as a tuple")
        if user.args[1] != 0 and user.users:
            raise Refusal("weights-used", "log-sum-exp or random state")
    out = next((user for user in node.users if user.args[1] == 0), None)
    if out is None:
        raise Refusal("unreadable", "the output is not used")
    return out
