"""The central operators of the ``blade`` namespace: schemas, fake kernels, autograd, autocast.

    blade::sparse_sdpa                      composite; one node before autograd, what the passes insert
    blade::mask_predict                     q, k -> block lists (no gradient)
    blade::block_sparse_attention           q, k, v, lists -> out, LSE (differentiable)
    blade::block_sparse_attention_backward  their gradients

Importing this file registers all operators, those of ``ops_*.py`` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import checks, compat, dispatch, global_tokens, observe, ops_order, policies
from .library import POLICY, SELECTION, TAGS, library

library.define(
    "mask_predict(Tensor q, Tensor k, Tensor? key_mask=None, float? scale=None, SymInt[] protect_q=[], "
    f"SymInt[] protect_k=[], {SELECTION}, str policy='asa', {POLICY}) -> (Tensor kv_num_blocks, Tensor kv_indices)",
    tags=TAGS,
)
library.define(
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor kv_num_blocks, Tensor kv_indices, "
    "Tensor? key_mask=None, float? scale=None, int block_size=128, str when='always', str site='') "
    "-> (Tensor out, Tensor lse)",
    tags=TAGS,
)
library.define(
    "block_sparse_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor kv_num_blocks, Tensor kv_indices, Tensor? key_mask=None, float? scale=None, "
    "int block_size=128, str site='') -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=TAGS,
)
library.define(
    "sparse_sdpa(Tensor q, Tensor k, Tensor v, Tensor? key_mask=None, float? scale=None, SymInt[] protect_q=[], "
    f"SymInt[] protect_k=[], str policy='asa', {SELECTION}, {POLICY}, str schedule='', Tensor? clock=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


# --- kernels ---------------------------------------------------------------------------------------------------------


def _mask_predict(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    protect_q: list[int] | None = None,
    protect_k: list[int] | None = None,
    sparsity: float | None = None,
    tau: float = 0.95,
    min_keep: float = 0.05,
    max_keep: float = 1.0,
    block_size: int = 128,
    probe_tokens: int = 16,
    seed: int = 0,
    when: str = "always",
    min_tokens: int = 2048,
    site: str = "",
    policy: str = "asa",
    options: str = "",
    head_sparsity: Sequence[float] = (),
    grid: Sequence[int] = (),
    order: str = "none",
) -> tuple[Tensor, Tensor]:
    checks.attention(q, k, None, key_mask, block_size)
    # AOTInductor hands over empty lists as None.
    rule = dispatch.Rule(policy, options, tuple(head_sparsity or ()), tuple(grid or ()), order)
    sel = dispatch.Selection(sparsity, tau, min_keep, max_keep, block_size, probe_tokens, seed, rule)
    num, idx, path = dispatch.predict(
        q,
        k,
        key_mask,
        _scale(scale, q),
        sel,
        protect_q or [],
        protect_k or [],
        auto=when == "auto",
        min_tokens=min_tokens,
        site=site,
    )
    if observe.listening():
        observe.notify(observe.Event("mask_predict", site, path, (q, k), num, idx, block_size))
    return num, idx


def _block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    block_size: int = 128,
    when: str = "always",
    site: str = "",
) -> tuple[Tensor, Tensor]:
    checks.attention(q, k, v, key_mask, block_size)
    checks.lists(q, k, kv_num_blocks, kv_indices, block_size)
    out, lse, path = dispatch.attend(
        q, k, v, kv_num_blocks, kv_indices, key_mask, _scale(scale, q), block_size, auto=when == "auto"
    )
    if observe.listening():
        lists = (kv_num_blocks, kv_indices)
        observe.notify(
            observe.Event("block_sparse_attention", site, path, (q, k, v), *lists, block_size, key_mask=key_mask)
        )
    return out, lse


def _block_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    block_size: int = 128,
    site: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    grads = dispatch.attend_backward(
        grad_out, grad_lse, q, k, v, out, lse, kv_num_blocks, kv_indices, key_mask, _scale(scale, q), block_size
    )
    if observe.listening():
        path = dispatch.family(q.device, q.dtype)
        event = observe.Event(
            "block_sparse_attention_backward", site, path, (q, k, v), kv_num_blocks, kv_indices, block_size
        )
        observe.notify(event)
    return grads


for _name, _kernel in (
    ("mask_predict", _mask_predict),
    ("block_sparse_attention", _block_sparse_attention),
    ("block_sparse_attention_backward", _block_sparse_attention_backward),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")


# --- fake kernels: sizes, dtypes and strides of the real ones ---------------------------------------------------------


def _flash_layout(like: Tensor) -> Tensor:
    B, H, N, D = like.shape
    return like.new_empty((B, N, H, D)).transpose(1, 2)


def _mask_predict_fake(
    q: Tensor, k: Tensor, *args: Any, block_size: int | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    block = block_size if block_size is not None else (args[8] if len(args) > 8 else 128)
    B, H, S, _ = q.shape
    nQ, nK = (S + block - 1) // block, (k.shape[2] + block - 1) // block
    return q.new_empty((B, H, nQ), dtype=torch.int32), q.new_empty((B, H, nQ, nK), dtype=torch.int32)


def _block_sparse_attention_fake(q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _flash_layout(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _block_sparse_attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _flash_layout(q), _flash_layout(k), _flash_layout(v)


torch.library.register_fake("blade::mask_predict", _mask_predict_fake, lib=library)
torch.library.register_fake("blade::block_sparse_attention", _block_sparse_attention_fake, lib=library)
torch.library.register_fake(
    "blade::block_sparse_attention_backward", _block_sparse_attention_backward_fake, lib=library
)


# --- autograd --------------------------------------------------------------------------------------------------------


# Single-level functions: inside an operator functorch has already peeled one transform off, and the ordinary
# `autograd.Function` would start over at the top. So torch.func.grad works.
class _BlockSparseAttention(_SingleLevelFunction):
    """Differentiable once in q, k, v, through the output and through the LSE; forward-mode derivatives raise."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.blade.block_sparse_attention.default(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, num, idx, key_mask, scale, block_size, _, site = inputs
        ctx.save_for_backward(q, k, v, *output, num, idx, key_mask)
        ctx.scalars = (scale, block_size, site)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse, num, idx, key_mask = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 10
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = torch.ops.blade.block_sparse_attention_backward.default(
            grad_out, grad_lse, q, k, v, out, lse, num, idx, key_mask, *ctx.scalars
        )
        return *grads, *(None,) * 7


class _Backward(_SingleLevelFunction):
    """The gradients, which have no gradients of their own: as for PyTorch's attention, asking for them raises."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.blade.block_sparse_attention_backward.default(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("block-sparse attention is differentiable once: it has no second derivatives.")


def _differentiates(*tensors: Tensor | None) -> bool:
    """Whether a derivative of any kind passes through the tensors here."""
    given = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given)


def _block_sparse_attention_backward_autograd(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> Any:
    if _differentiates(grad_out, grad_lse, *rest[:3]):
        with compat.single_level_functions():
            return _Backward.apply(grad_out, grad_lse, *rest)  # type: ignore[attr-defined]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.blade.block_sparse_attention_backward.default(grad_out, grad_lse, *rest)


def _block_sparse_attention_autograd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    block_size: int = 128,
    when: str = "always",
    site: str = "",
) -> tuple[Tensor, Tensor]:
    args = (q, k, v, kv_num_blocks, kv_indices, key_mask, scale, block_size, when, site)
    if _differentiates(q, k, v):
        with compat.single_level_functions():
            return _BlockSparseAttention.apply(*args)  # type: ignore[attr-defined, no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.blade.block_sparse_attention.default(*args)  # type: ignore[no-any-return]


library.impl("block_sparse_attention", _block_sparse_attention_autograd, "Autograd")
library.impl("block_sparse_attention_backward", _block_sparse_attention_backward_autograd, "Autograd")


# --- the composite ---------------------------------------------------------------------------------------------------


def _sparse_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    protect_q: list[int] | None = None,
    protect_k: list[int] | None = None,
    policy: str = "asa",
    sparsity: float | None = None,
    tau: float = 0.95,
    min_keep: float = 0.05,
    max_keep: float = 1.0,
    block_size: int = 128,
    probe_tokens: int = 16,
    seed: int = 0,
    when: str = "always",
    min_tokens: int = 2048,
    site: str = "",
    options: str = "",
    head_sparsity: Sequence[float] = (),
    grid: Sequence[int] = (),
    order: str = "none",
    schedule: str = "",
    clock: Tensor | None = None,
) -> Tensor:
    protect_q, protect_k = protect_q or [], protect_k or []
    q, k, v, key_mask, inverse = ops_order.reordered(q, k, v, key_mask, grid, order, block_size, protect_q, protect_k)
    selection = (sparsity, tau, min_keep, max_keep, block_size, probe_tokens, seed, when, min_tokens, site)
    how = {"options": options, "head_sparsity": head_sparsity, "grid": grid, "order": order}
    if clock is not None and not _differentiates(q, k, v):
        out = torch.ops.blade.carried_attention.default(
            q, k, v, clock, key_mask, scale, protect_q, protect_k, policy, *selection, **how, schedule=schedule
        )
    else:
        hidden = None if key_mask is None else key_mask.detach()
        num, idx = torch.ops.blade.mask_predict.default(
            q.detach(), k.detach(), hidden, scale, protect_q, protect_k, *selection, policy=policy, **how
        )
        if policy == "asa_g" and not dispatch.keeps_all(sparsity, tau, max_keep, head_sparsity):
            window = policies.global_window(options)
            pooled = global_tokens.pooled(k, v, key_mask, window, protect_k)
            out = torch.ops.blade.global_sparse_attention.default(
                q, k, v, num, idx, *pooled, key_mask, scale, block_size, when, site
            )[0]
        else:
            out = torch.ops.blade.block_sparse_attention.default(
                q, k, v, num, idx, key_mask, scale, block_size, when, site
            )[0]
    return ops_order.restored(out, inverse)


library.impl("sparse_sdpa", _sparse_sdpa, "CompositeImplicitAutograd")


# --- autocast: like F.scaled_dot_product_attention, run in the autocast dtype ---------------------------------------


def _autocast(op: Any, device: str, num_tensors: int) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        cast = lambda x: x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x  # noqa: E731
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(cast(x) for x in args[:num_tensors]), *args[num_tensors:], **kwargs)

    return run


for _device in ("cpu", "cuda"):
    for _name, _count in (("sparse_sdpa", 3), ("mask_predict", 2), ("block_sparse_attention", 3)):
        _op = getattr(torch.ops.blade, _name).default
        library.impl(_name, _autocast(_op, _device, _count), f"Autocast{_device.upper()}")


from . import ops_carried, ops_global  # noqa: E402, F401 (they register the other operators, with what is above)
