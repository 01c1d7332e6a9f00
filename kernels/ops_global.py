"""The operator ``blade::global_sparse_attention``: kept blocks and global tokens in one softmax (algorithms 1.3).

    blade::global_sparse_attention           q, k, v, lists, global tokens -> out, LSE (differentiable)
    blade::global_sparse_attention_backward  their gradients

The gradients are exact, also through the LSE: global keys are keys like any other. ``global_bias`` is a function of the
key mask alone and has none.

Global tokens stand for what was dropped: a head whose lists drop nothing attends densely, without them. So do dense
steps, heads with a budget of everything, and sites that ``when="auto"`` keeps dense; the lists say so, in both
directions, and nobody waits for a device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from . import accelerator, aten, checks, compat, cpu, cpu_build, dense, dispatch, global_blocks, observe, ops
from .global_blocks import GlobalTokens
from .library import TAGS, library

library.define(
    "global_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, Tensor kv_indices, Tensor global_k, "
    "Tensor global_v, Tensor global_bias, Tensor? key_mask=None, float? scale=None, int block_size=128, "
    "str when='always', str site='') -> (Tensor out, Tensor lse)",
    tags=TAGS,
)
library.define(
    "global_sparse_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor kv_num_blocks, Tensor kv_indices, Tensor global_k, Tensor global_v, Tensor global_bias, "
    "Tensor? key_mask=None, float? scale=None, int block_size=128, str when='always', str site='') "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dglobal_k, Tensor dglobal_v)",
    tags=TAGS,
)


# --- kernels ---------------------------------------------------------------------------------------------------------


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    global_bias: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    block_size: int = 128,
    when: str = "always",
    site: str = "",
) -> tuple[Tensor, Tensor]:
    checks.attention(q, k, v, key_mask, block_size)
    checks.lists(q, k, kv_num_blocks, kv_indices, block_size)
    _check(q, k, global_k, global_v, global_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tokens = _visible(GlobalTokens(global_k, global_v, global_bias), k, kv_num_blocks, block_size)
    out, lse, path = _attend(q, k, v, kv_num_blocks, kv_indices, tokens, key_mask, scale, block_size, when)
    if observe.listening():
        lists = (kv_num_blocks, kv_indices)
        observe.notify(
            observe.Event("global_sparse_attention", site, path, (q, k, v), *lists, block_size, key_mask=key_mask)
        )
    return out, lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor,
    idx: Tensor,
    tokens: GlobalTokens,
    key_mask: Tensor | None,
    scale: float,
    block_size: int,
    when: str,
) -> tuple[Tensor, Tensor, str]:
    """Out in the flash layout, LSE, and what ran."""
    if not tokens.k.shape[2]:
        return dispatch.attend(q, k, v, num, idx, key_mask, scale, block_size, auto=when == "auto")
    if when == "auto" and dispatch._runs_dense(q, k, num, block_size):
        return *dense.attention(q, k, v, key_mask, scale), "sdpa"
    k, v = _with_heads_of(tokens.k, k, v)
    call = (q, k, v, num, idx, dispatch.key_bias(key_mask, q.dtype), scale, block_size, tokens)
    if q.device.type != "cpu":
        return accelerator.global_forward(*call)
    checks.entries(num, idx, k.shape[2], block_size)  # the kernels would take a wrong entry for a global block
    if dispatch._kernel_runs(q):
        return *global_blocks.forward(cpu.attention_forward, *call), f"cpu-{cpu_build.loaded_isa()}"
    return *global_blocks.forward(aten.attention_forward, *call), "aten"


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    global_bias: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    block_size: int = 128,
    when: str = "always",
    site: str = "",
) -> tuple[Tensor, ...]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tokens = _visible(GlobalTokens(global_k, global_v, global_bias), k, kv_num_blocks, block_size)
    results = (out, lse, kv_num_blocks, kv_indices)
    if not global_k.shape[2]:
        own = dispatch.attend_backward(grad_out, grad_lse, q, k, v, *results, key_mask, scale, block_size)
        grads: tuple[Tensor, ...] = (*own, _flash_layout(global_k), _flash_layout(global_v))
    else:
        keys, values = _with_heads_of(global_k, k, v)
        bias = dispatch.key_bias(key_mask, q.dtype)
        call = (grad_out, grad_lse, q, keys, values, *results, bias, scale, block_size, tokens)
        if q.device.type != "cpu":
            grads = accelerator.global_backward(*call)
        else:
            run = cpu.attention_backward if dispatch._kernel_runs(q) else aten.attention_backward
            grads = global_blocks.backward(run, *call)
        grads = (grads[0], _summed(grads[1], k), _summed(grads[2], v), *grads[3:])
    if observe.listening():
        path = dispatch.family(q.device, q.dtype)
        name = "global_sparse_attention_backward"
        observe.notify(observe.Event(name, site, path, (q, k, v), kv_num_blocks, kv_indices, block_size))
    return grads


def _visible(tokens: GlobalTokens, k: Tensor, num: Tensor, block_size: int) -> GlobalTokens:
    """The global tokens, hidden from heads whose lists drop nothing. Decided on the device."""
    if not num.numel():
        return tokens
    full = (num >= -(-k.shape[2] // block_size)).all(-1, keepdim=True)  # [B|1, H|1, 1]
    return tokens._replace(bias=tokens.bias.masked_fill(full, -math.inf))


def _with_heads_of(global_k: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat k and v where the global tokens have more heads: where query heads have masks of their own."""
    group = global_k.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of what `_with_heads_of` repeated, in the flash layout."""
    if grad.shape[1] == like.shape[1]:
        return grad
    total = grad.float() if grad.dtype != torch.float64 else grad
    return _flash_layout(like).copy_(total.unflatten(1, (like.shape[1], -1)).sum(2))


def _check(q: Tensor, k: Tensor, global_k: Tensor, global_v: Tensor, global_bias: Tensor) -> None:
    """Raise ValueError unless the global tokens fit q and k."""
    (B, H, _, D), Hkv = q.shape, k.shape[1]
    for name, x in (("global_k", global_k), ("global_v", global_v)):
        if x.dim() != 4 or x.shape[0] != B or x.shape[3] != D or x.shape[1] not in (Hkv, H):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [{B}, {Hkv} or {H}, tokens, {D}].")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; give one of each.")
    G = global_k.shape[2]
    shape, compute = tuple(global_bias.shape), torch.float64 if q.dtype == torch.float64 else torch.float32
    fits = len(shape) == 3 and shape[0] in (1, B) and shape[1] in (1, H) and shape[2] == G
    if global_v.shape != global_k.shape or not fits or global_bias.dtype != compute:
        raise ValueError(
            f"global_v has shape {tuple(global_v.shape)} and global_bias is {global_bias.dtype} {shape}; expected "
            f"{tuple(global_k.shape)}, the shape of global_k, and {compute} [{B} or 1, {H} or 1, {G}]."
        )


library.impl("global_sparse_attention", _forward, "CompositeExplicitAutograd")
library.impl("global_sparse_attention_backward", _backward, "CompositeExplicitAutograd")


# --- fake kernels: sizes, dtypes and strides of the real ones ---------------------------------------------------------


def _flash_layout(like: Tensor) -> Tensor:
    B, H, N, D = like.shape
    return aten.flash_layout(B, H, N, D, like)


def _forward_fake(q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _flash_layout(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    return tuple(map(_flash_layout, (q, k, v, global_k, global_v)))


torch.library.register_fake("blade::global_sparse_attention", _forward_fake, lib=library)
torch.library.register_fake("blade::global_sparse_attention_backward", _backward_fake, lib=library)


# --- autograd: as in ops.py ------------------------------------------------------------------------------------------


class _GlobalSparseAttention(_SingleLevelFunction):
    """Differentiable once in q, k, v, global_k and global_v, through the output and through the LSE."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.blade.global_sparse_attention.default(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, num, idx, *tokens_and_mask, scale, block_size, when, site = inputs
        ctx.save_for_backward(q, k, v, *output, num, idx, *tokens_and_mask)
        ctx.scalars = (scale, block_size, when, site)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_out is None and grad_lse is None:
            return (None,) * 13
        q, k, v, out, *rest = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        dq, dk, dv, *of_tokens = torch.ops.blade.global_sparse_attention_backward.default(
            grad_out, grad_lse, q, k, v, out, *rest, *ctx.scalars
        )
        return dq, dk, dv, None, None, *of_tokens, *(None,) * 6


class _Backward(_SingleLevelFunction):
    """The gradients, which have no gradients of their own: as for PyTorch's attention, asking for them raises."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.blade.global_sparse_attention_backward.default(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("block-sparse attention is differentiable once: it has no second derivatives.")


def _forward_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    global_k: Tensor,
    global_v: Tensor,
    global_bias: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    block_size: int = 128,
    when: str = "always",
    site: str = "",
) -> tuple[Tensor, Tensor]:
    tokens = (global_k, global_v, global_bias)
    args = (q, k, v, kv_num_blocks, kv_indices, *tokens, key_mask, scale, block_size, when, site)
    if ops._differentiates(q, k, v, global_k, global_v):
        with compat.single_level_functions():
            return _GlobalSparseAttention.apply(*args)  # type: ignore[attr-defined, no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.blade.global_sparse_attention.default(*args)  # type: ignore[no-any-return]


def _backward_autograd(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> Any:
    if ops._differentiates(grad_out, grad_lse, *rest[:3], *rest[7:9]):
        with compat.single_level_functions():
            return _Backward.apply(grad_out, grad_lse, *rest)  # type: ignore[attr-defined]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.blade.global_sparse_attention_backward.default(grad_out, grad_lse, *rest)


library.impl("global_sparse_attention", _forward_autograd, "Autograd")
library.impl("global_sparse_attention_backward", _backward_autograd, "Autograd")


# --- autocast: like F.scaled_dot_product_attention, run in the autocast dtype ---------------------------------------


def _autocast(device: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def run(q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, gk: Tensor, gv: Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        given = (q, k, v, gk, gv)
        q, k, v, gk, gv = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in given)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.blade.global_sparse_attention.default(q, k, v, num, idx, gk, gv, *rest)

    return run


for _device in ("cpu", "cuda"):
    library.impl("global_sparse_attention", _autocast(_device), f"Autocast{_device.upper()}")
