"""Direct calls: mask prediction and block-sparse attention as functions on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import BladeConfig
from .kernels import checks, lists, ops, ops_order, policies  # noqa: F401 (ops registers the operators)
from .kernels.policies import register as register_policy

__all__ = ["block_sparse_attention", "mask_predict", "register_policy", "sparse_attention"]


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    config: BladeConfig | Mapping[str, Any] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Predict a block mask and attend over it (BLADE, arXiv 2508.10774, section 3). Differentiable in q, k and v.

    Args:
        q: [B, H, S, D] in fp32, bf16, fp16 or fp64; any strides, D up to 256.
        k, v: [B, Hkv, T, D] of the same dtype; H is a multiple of Hkv.
        key_mask: bool [B, T] (True: attend) or float [B, T], added to the scores.
        config: how blocks are chosen; ``protect="auto"`` protects nothing here, since there is no graph to search.
        scale: of the scores; default D ** -0.5.

    Returns:
        [B, H, S, D] in q's dtype.

    Raises:
        ValueError: for shapes, dtypes or settings that don't fit.
    """
    cfg = BladeConfig.of(config)
    q, k, v = _autocast(q, k, v)
    _check(q, k, v, key_mask, cfg.block, scale)
    if cfg.policy == "dense" or cfg.when == "never":
        return _dense(q, k, v, key_mask, scale)
    protect_q, protect_k = _protected(cfg, q.shape[2]), _protected(cfg, k.shape[2])
    grid = _grid(cfg, q.shape[2], protect_q, ordering=True)
    if grid:
        _grid(cfg, k.shape[2], protect_k, ordering=True)
    chosen = (cfg.budget, cfg.mass, cfg.min_keep, cfg.max_keep, cfg.block, cfg.probe_tokens, cfg.seed)
    how = {"options": cfg.policy_options, "grid": grid, "order": cfg.inner_order}
    return torch.ops.blade.sparse_sdpa.default(  # type: ignore[no-any-return]
        q, k, v, key_mask, scale, protect_q, protect_k, cfg.policy, *chosen, cfg.when, cfg.min_tokens, **how
    )


def mask_predict(
    q: Tensor,
    k: Tensor,
    *,
    key_mask: Tensor | None = None,
    config: BladeConfig | Mapping[str, Any] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The blocks that `sparse_attention` would keep, whatever ``when`` says.

    Arguments as there. Returns FlexAttention's lists: ``kv_num_blocks`` int32 [B, H, nQ] and ``kv_indices`` int32
    [B, H, nQ, nK], ascending, zero past the count. No gradient.
    """
    cfg = BladeConfig.of(config)
    q, k = _autocast(q, k)
    _check(q, k, None, key_mask, cfg.block, scale)
    if cfg.policy == "dense":
        nQ, nK = -(-q.shape[2] // cfg.block), -(-k.shape[2] // cfg.block)
        return lists.full_lists(q.shape[0], q.shape[1], nQ, nK, q.device)
    protect_q, protect_k = _protected(cfg, q.shape[2]), _protected(cfg, k.shape[2])
    grid = _grid(cfg, k.shape[2], protect_k, ordering=False)
    chosen = (cfg.budget, cfg.mass, cfg.min_keep, cfg.max_keep, cfg.block, cfg.probe_tokens, cfg.seed)
    how = {"policy": cfg.policy, "options": cfg.policy_options, "grid": grid}
    return torch.ops.blade.mask_predict.default(  # type: ignore[no-any-return]
        q.detach(), k.detach(), key_mask, scale, protect_q, protect_k, *chosen, "always", **how
    )


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    key_mask: Tensor | None = None,
    block_size: int = 128,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the listed key blocks only, exact on them. Differentiable in q, k, v, and through the LSE.

    Args:
        q, k, v, key_mask, scale: as in `sparse_attention`.
        kv_num_blocks: int32 [B or 1, H or 1, nQ], kept blocks of each query block.
        kv_indices: int32 [B or 1, H or 1, nQ, capacity], their indices in any order, without duplicates; entries past
            the count are never read.
        block_size: tokens in a query block and in a key block: 16, 32, 64 or 128.
        return_lse: also return the log-sum-exp of each row, [B, H, S], natural logarithm, fp32 (fp64 for fp64).

    Returns:
        [B, H, S, D] in q's dtype; or (output, LSE). A row with no kept block gives zeros and minus infinity.

    Raises:
        ValueError: for shapes or dtypes that don't fit, or an index outside the key blocks.
    """
    q, k, v = _autocast(q, k, v)
    _check(q, k, v, key_mask, block_size, scale)
    checks.lists(q, k, kv_num_blocks, kv_indices, block_size)
    out, lse = torch.ops.blade.block_sparse_attention.default(
        q, k, v, kv_num_blocks, kv_indices, key_mask, scale, block_size
    )
    return (out, lse) if return_lse else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as the operators get them under autocast, so that mixed dtypes are no error there."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _check(
    q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, block_size: int, scale: float | None
) -> None:
    checks.attention(q, k, v, key_mask, block_size)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise ValueError(f"scale is {scale!r}; expected a number, or None for head_dim ** -0.5.")
    if key_mask is not None and key_mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("key_mask requires a gradient, and none flows to it; pass key_mask.detach().")


def _protected(cfg: BladeConfig, num_tokens: int) -> list[int]:
    """The configured ranges, flat; each must lie inside the tokens."""
    if isinstance(cfg.protect, str):
        return []
    for start, length in cfg.protect:
        begin = start if start >= 0 else start + num_tokens
        if begin < 0 or begin + length > num_tokens:
            raise ValueError(
                f"protect range ({start}, {length}) doesn't lie inside the {num_tokens} tokens; shorten or move it."
            )
    return [number for item in cfg.protect for number in item]


def _grid(cfg: BladeConfig, num_tokens: int, protect: list[int], *, ordering: bool) -> tuple[int, ...]:
    """The configured grid, which has to hold the tokens that are not protected; empty where nothing asks for one."""
    needed = policies.needs_grid(cfg.policy) or (ordering and cfg.inner_order != "none")
    if cfg.grid is None:
        if needed:
            what = f"policy={cfg.policy!r}" if policies.needs_grid(cfg.policy) else f"order={cfg.order!r}"
            raise ValueError(f"{what} needs the token grid, and a direct call has no graph to find it in; set grid.")
        return ()
    ops_order.check_grid(cfg.grid, num_tokens, protect)
    return cfg.grid if needed else ()


def _dense(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Tensor:
    mask = None if key_mask is None else key_mask[:, None, None] if key_mask.dim() == 2 else key_mask[:, :, None]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
