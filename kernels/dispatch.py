"""Which implementation runs a call: the C++ kernel, ATen, or dense SDPA; decided from concrete sizes at run time.

Deciding inside the operators means that no size is guarded in the compiled graph: one graph serves every length.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import (
    accelerator,
    aten,
    checks,
    cost,
    cpu,
    cpu_build,
    cpu_probe,
    dense,
    density,
    lists,
    policies,
    policy_adaspa,
    reference,
    selection,
)

logger = logging.getLogger("blade_compile")

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Lists on an accelerator that keep everything and were predicted to run as SDPA: (device, address of kv_num_blocks).
_dense_lists: set[tuple[torch.device, int]] = set()
_dense_lists_lock = threading.Lock()


@dataclass(frozen=True)
class Rule:
    """By what blocks are ranked: a policy of ``policies.py`` and what it needs to know."""

    policy: str = "asa"
    options: str = ""
    "the policy's own options as JSON"
    head_sparsity: tuple[float, ...] = ()
    "a budget for each head; empty: the same for all"
    grid: tuple[int, ...] = ()
    "(T, H, W) of the tokens that are not protected; empty: unknown"
    order: str = "none"
    "the order that the tokens are in"

    @property
    def is_plain_asa(self) -> bool:
        """Whether sampled tokens rank the blocks and every head has the same budget: one fused kernel does that."""
        sampled = policies.options_of(self.options).get("probe", "sample") == "sample"
        return self.policy in ("asa", "asa_g") and sampled and not self.head_sparsity


@dataclass(frozen=True)
class Selection:
    """How blocks are chosen (contract: ``BladeConfig``)."""

    sparsity: float | None
    tau: float
    min_keep: float
    max_keep: float
    block_size: int
    probe_tokens: int
    seed: int
    rule: Rule = Rule()


def family(device: torch.device, dtype: torch.dtype) -> str:
    """The cost table's entry for what runs a call here."""
    if device.type != "cpu":
        return accelerator.family(device, dtype)
    isa = cpu_build.loaded_isa() if dtype in KERNEL_DTYPES else None
    if isa is None:
        return "cpu-aten"
    # Dense attention there is another program (matrix tiles on Intel, other libraries on Arm) that nobody measured.
    if not cpu_build.is_x86():
        return "cpu-arm"
    return "cpu-amx" if dtype != torch.float32 and cpu_build.has_matrix_tiles() else f"cpu-{isa}"


def key_bias(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The key mask as an additive one, [B|1, H|1, T], fp32 (fp64 for fp64)."""
    bias = reference.additive_mask(key_mask, torch.float64 if dtype == torch.float64 else torch.float32)
    return None if bias is None else bias.squeeze(2)


def decide(q: Tensor, k: Tensor, block_size: int, probe_tokens: int, kept: float) -> str:
    """``sparse``, ``full`` or ``sdpa`` for these sizes at an expected density."""
    (B, H, S, D), T = q.shape, k.shape[2]
    dtype = str(q.dtype).removeprefix("torch.")
    # A continuous density would fill the cache with one entry per call.
    kept = math.ceil(kept * 64) / 64
    return cost.choose(family(q.device, q.dtype), dtype, (B, H, S, T, D, block_size), probe_tokens, kept)


def keeps_all(
    sparsity: float | None, tau: float, max_keep: float, head_sparsity: Sequence[float] | None = None
) -> bool:
    """Whether the settings keep every block, whatever the scores."""
    if head_sparsity:
        return not any(head_sparsity)
    return sparsity == 0 or (sparsity is None and tau >= 1 and max_keep >= 1)


def _expected_density(
    q: Tensor, k: Tensor, sel: Selection, protect_q: list[int], protect_k: list[int], site: str
) -> float:
    nK = -(-k.shape[2] // sel.block_size)
    if sel.rule.head_sparsity:
        share = 1 - sum(sel.rule.head_sparsity) / len(sel.rule.head_sparsity)
    elif sel.sparsity is not None:
        share = reference.keep_count(1 - sel.sparsity, nK) / nK
    elif q.device.type == "cpu":
        share = reference.keep_count(sel.min_keep, nK) / nK  # optimistic: the CPU decides again once it has counted
    else:
        return density.expected(site, q.device)
    if sel.rule.policy == "asa_g":
        share += 1 / policies.global_window(sel.rule.options)
    rows = _forced_share(protect_q, q.shape[2], sel.block_size)
    columns = _forced_share(protect_k, k.shape[2], sel.block_size)
    return rows + (1 - rows) * min(1.0, share + columns)


def _forced_share(ranges: list[int], num_tokens: int, block_size: int) -> float:
    """Counted on the host: reading a device's memory would stall it."""
    forced = lists.forced_blocks(ranges, num_tokens, block_size, torch.device("cpu"))
    return 0.0 if forced is None else forced.double().mean().item()


def predict(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    scale: float,
    sel: Selection,
    protect_q: list[int],
    protect_k: list[int],
    *,
    auto: bool,
    min_tokens: int,
    site: str,
) -> tuple[Tensor, Tensor, str]:
    """Block lists and what made them; under ``auto`` full lists where dense is predicted to be as fast."""
    (B, H, S, _), T = q.shape, k.shape[2]
    nQ, nK = -(-S // sel.block_size), -(-T // sel.block_size)
    if not q.numel() or not T:
        return *lists.full_lists(B, H, nQ, nK, q.device), "full"
    # Lists are small: forced blocks are found on the host and sent along.
    forced_q = lists.forced_blocks(protect_q, S, sel.block_size, q.device)
    forced_k = lists.forced_blocks(protect_k, T, sel.block_size, q.device)
    keep_all = keeps_all(sel.sparsity, sel.tau, sel.max_keep, sel.rule.head_sparsity)
    keep_all = keep_all or _misses_its_grid(sel.rule, T, protect_k, site)
    if auto:
        kept = 1.0 if keep_all else _expected_density(q, k, sel, protect_q, protect_k, site)
        choice = "sdpa" if min_tokens > T else decide(q, k, sel.block_size, sel.probe_tokens, kept)
        keep_all = keep_all or choice != "sparse"
    if keep_all:
        num, idx = lists.full_lists(B, H, nQ, nK, q.device)
        _remember(num, dense=auto and choice == "sdpa")
        return num, idx, "full"
    bias = key_bias(key_mask, q.dtype)
    if sel.rule.is_plain_asa:
        num, idx, path = _select(q, k, bias, scale, sel, forced_q, forced_k)
    else:
        num, idx, path = _select_by_policy(q, k, bias, scale, sel, protect_k, forced_q, forced_k)
    _remember(num, dense=False)
    if auto and sel.sparsity is None:
        if q.device.type == "cpu":
            counted = num.double().mean().item() / nK
            if decide(q, k, sel.block_size, sel.probe_tokens, counted) != "sparse":
                return *lists.full_lists(B, H, nQ, nK, q.device), "full"
        else:
            density.report(site, num, nK)
    return num, idx, path


def _misses_its_grid(rule: Rule, num_tokens: int, protect: list[int], site: str) -> bool:
    """Whether a compiled site has met a resolution that its policy's grid doesn't fit: it keeps every block there."""
    if not site or not policies.needs_grid(rule.policy):
        return False
    free = num_tokens - sum(length for _, length in lists.spans(protect, num_tokens))
    if math.prod(rule.grid) == free:
        return False
    _warn_once(
        f"policy {rule.policy!r} was compiled for the grid {rule.grid}, but attention here runs over {free} tokens: "
        "every block is kept."
    )
    return True


@functools.cache
def _warn_once(message: str) -> None:
    """One warning per distinct message and process."""
    logger.warning("%s", message)


def _select(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float,
    sel: Selection,
    forced_q: Tensor | None,
    forced_k: Tensor | None,
) -> tuple[Tensor, Tensor, str]:
    chosen: tuple[Any, ...] = (sel.sparsity, sel.tau, sel.min_keep, sel.max_keep, forced_q, forced_k)
    if _kernel_runs(q):
        (S, T), H = (q.shape[2], k.shape[2]), q.shape[1]
        pos_q = positions_cached(S, sel.block_size, sel.probe_tokens, H, sel.seed, "q")
        pos_k = positions_cached(T, sel.block_size, sel.probe_tokens, H, sel.seed, "k")
        num, idx = cpu_probe.predict(q, k, bias, scale, sel.block_size, pos_q, pos_k, *chosen)
        return num, idx, f"cpu-{cpu_build.loaded_isa()}"
    probe: tuple[Any, ...] = (sel.block_size, sel.probe_tokens, sel.seed)
    if q.device.type != "cpu":
        return accelerator.select(q, k, bias, scale, *probe, *chosen)
    return *aten.select(q, k, bias, scale, *probe, *chosen), "aten"


def _select_by_policy(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float,
    sel: Selection,
    protect_k: list[int],
    forced_q: Tensor | None,
    forced_k: Tensor | None,
) -> tuple[Tensor, Tensor, str]:
    rule = sel.rule
    request = policies.Request(
        q=q,
        k=k,
        bias=bias,
        scale=scale,
        block_size=sel.block_size,
        probe_tokens=sel.probe_tokens,
        seed=sel.seed,
        grid=tuple(rule.grid) or None,  # type: ignore[arg-type]
        order=rule.order,
        protect=lists.spans(protect_k, k.shape[2]),
        options=policies.options_of(rule.options),
    )
    block_map = policies.get(rule.policy).block_map(request)
    chosen = (sel.sparsity, sel.tau, sel.min_keep, sel.max_keep, forced_q, forced_k, rule.head_sparsity)
    if rule.policy == "adaspa":
        adaptive = request.options.get("head_adaptive", True)
        return *policy_adaspa.select(block_map, *chosen, head_adaptive=adaptive), rule.policy
    return *selection.select(block_map, *chosen), rule.policy


_positions: dict[tuple[int, int, int, int, int, str], Tensor] = {}


def positions_cached(
    num_tokens: int, block_size: int, probe_tokens: int, num_heads: int, seed: int, side: str
) -> Tensor:
    """`reference.probe_positions` on the CPU, remembered: it depends on sizes alone."""
    key = (num_tokens, block_size, probe_tokens, num_heads, seed, side)
    found = _positions.get(key)
    if found is None:
        if len(_positions) >= 64:
            _positions.clear()
        found = _positions[key] = reference.probe_positions(*key).to(torch.int32)
    return found


def _kernel_runs(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in KERNEL_DTYPES and cpu_build.load() is not None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor,
    idx: Tensor,
    key_mask: Tensor | None,
    scale: float,
    block_size: int,
    *,
    auto: bool,
) -> tuple[Tensor, Tensor, str]:
    """Out in the flash layout, LSE, and what ran. ``auto``: full lists may run as dense SDPA where that is faster."""
    if auto and _runs_dense(q, k, num, block_size):
        return *dense.attention(q, k, v, key_mask, scale), "sdpa"
    bias = key_bias(key_mask, q.dtype)
    if _kernel_runs(q):
        return *cpu.attention_forward(q, k, v, num, idx, bias, scale, block_size), f"cpu-{cpu_build.loaded_isa()}"
    if q.device.type != "cpu":
        return accelerator.attention_forward(q, k, v, num, idx, bias, scale, block_size)
    checks.entries(num, idx, k.shape[2], block_size)
    return *aten.attention_forward(q, k, v, num, idx, bias, scale, block_size), "aten"


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num: Tensor,
    idx: Tensor,
    key_mask: Tensor | None,
    scale: float,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in the flash layout."""
    run = cpu.attention_backward if _kernel_runs(q) else aten.attention_backward
    if q.device.type != "cpu":
        run = accelerator.attention_backward
    return run(grad_out, grad_lse, q, k, v, out, lse, num, idx, key_bias(key_mask, q.dtype), scale, block_size)


def _remember(num: Tensor, *, dense: bool) -> None:
    """Note whether fresh lists on an accelerator are to run as SDPA. Lists that outlive their prediction (a pinned
    mask) keep their address; a copy of them has another one and runs as what it says, which is always right.
    """
    if num.device.type == "cpu" or not (dense or _dense_lists):
        return
    key = (num.device, num.data_ptr())
    with _dense_lists_lock:
        if dense:
            _dense_lists.add(key)
        else:
            _dense_lists.discard(key)


def _runs_dense(q: Tensor, k: Tensor, num: Tensor, block_size: int) -> bool:
    """Whether lists that keep everything should run as SDPA. Counting them would stall an accelerator: there the
    prediction that made these lists has decided.
    """
    if q.device.type != "cpu":
        return (num.device, num.data_ptr()) in _dense_lists
    nK = -(-k.shape[2] // block_size)
    full = bool(q.numel() and num.numel() and nK) and int(num.min()) == nK
    return full and decide(q, k, block_size, 16, 1.0) != "full"
