"""``blade::carried_attention``: attention whose masks are remembered from step to step of a generation.

Opaque, inference only. The host knows the step from the carrier in charge (``carried.py``) and decides here; where a
CUDA graph may be captured, the device's clock decides (``carried_graph.py``), so that a replay at another step is
right. Without a carrier AdaSpa searches at every call, and a schedule has no effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import (
    aten,
    carried,
    checks,
    dense,
    dispatch,
    lists,
    observe,
    policies,
    policy_adaspa,
    reference,
    search,
)
from .carried import Carrier, Slot
from .library import POLICY, SELECTION, TAGS, library
from .schedule import Phase, Schedule

library.define(
    "carried_attention(Tensor q, Tensor k, Tensor v, Tensor clock, Tensor? key_mask=None, float? scale=None, "
    f"SymInt[] protect_q=[], SymInt[] protect_k=[], str policy='adaspa', {SELECTION}, {POLICY}, str schedule='') "
    "-> Tensor",
    tags=TAGS,
)


@dataclass(frozen=True)
class Call:
    """One call of the operator: its tensors, and everything that its settings say."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    scale: float
    protect_q: list[int]
    protect_k: list[int]
    policy: str
    sparsity: float | None
    tau: float
    min_keep: float
    max_keep: float
    block_size: int
    probe_tokens: int
    seed: int
    when: str
    min_tokens: int
    site: str
    options: str
    head_sparsity: tuple[float, ...]
    grid: tuple[int, ...]
    order: str
    schedule: Schedule

    @property
    def num_key_blocks(self) -> int:
        """Key blocks."""
        return -(-self.k.shape[2] // self.block_size)

    @property
    def bias(self) -> Tensor | None:
        """The key mask as an additive one, [B|1, H|1, T]."""
        return dispatch.key_bias(self.key_mask, self.q.dtype)

    @property
    def sizes(self) -> tuple[Any, ...]:
        """What a slot depends on."""
        return (*self.q.shape, *self.k.shape, self.block_size, self.q.dtype, self.q.device)

    def at_level(self, level: int) -> Call:
        """The same call with the sparsity of a level of the schedule, which then holds for every head."""
        if not level:
            return self
        return dataclasses.replace(self, sparsity=self.schedule.levels(self.sparsity)[level], head_sparsity=())


def _carried_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clock: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    protect_q: Sequence[int] = (),
    protect_k: Sequence[int] = (),
    policy: str = "adaspa",
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
) -> Tensor:
    checks.attention(q, k, v, key_mask, block_size)
    call = Call(
        q,
        k,
        v,
        key_mask,
        q.shape[-1] ** -0.5 if scale is None else scale,
        list(protect_q),
        list(protect_k),
        policy,
        sparsity,
        tau,
        min_keep,
        max_keep,
        block_size,
        probe_tokens,
        seed,
        when,
        min_tokens,
        site,
        options,
        tuple(head_sparsity),
        tuple(grid),
        order,
        Schedule.parse(schedule),
    )
    if not q.numel() or not k.shape[2] or (policy == "adaspa" and _stays_dense(call)):
        return attend_densely(call)[0]
    carrier = carried.current()
    if carrier is None:
        return _once(call)
    carrier.used = True
    if carrier.on_device:
        from . import carried_graph

        return carried_graph.attention(call, clock, carrier)
    call = call.at_level(call.schedule.level(carrier.step))
    phase = call.schedule.phase(policy, carrier.step, carrier.num_steps)
    if phase == Phase.DENSE:
        return attend_densely(call)[0]
    return _remembering(call, carrier, phase) if policy == "adaspa" else _once(call)


def _stays_dense(call: Call) -> bool:
    """Whether dense attention is predicted to be as fast: a matter of sizes, the same at every step."""
    if call.when != "auto" or call.q.numel() == 0:
        return False
    T, nK = call.k.shape[2], call.num_key_blocks
    # The sparsest step decides: a site is one thing throughout a generation.
    shares = [1 - level for level in call.schedule.levels(call.sparsity) if level is not None] or [call.min_keep]
    if call.head_sparsity:
        shares[0] = 1 - sum(call.head_sparsity) / len(call.head_sparsity)
    kept = reference.keep_count(min(shares), nK) / nK
    # Nothing is probed at most steps, and a search is rare: the smallest probe stands for both.
    return call.min_tokens > T or dispatch.decide(call.q, call.k, call.block_size, 1, kept) != "sparse"


# --- one call --------------------------------------------------------------------------------------------------------


def attend_densely(call: Call) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention: out in the flash layout, LSE."""
    if not call.q.numel() or not call.k.shape[2]:
        return _carried_attention_fake(call.q).zero_(), call.q.new_full(
            call.q.shape[:3], -torch.inf, dtype=torch.float32
        )
    out, lse = dense.attention(call.q, call.k, call.v, call.key_mask, call.scale)
    if observe.listening():
        _tell(call, "block_sparse_attention", "sdpa", *_full_lists(call))
    return out, lse


def attend_sparsely(call: Call, num: Tensor, idx: Tensor, when: str = "always") -> Tensor:
    """Attention over the listed blocks, with the global tokens of ``asa_g``.

    ``when="auto"`` is for lists that ``mask_predict`` has just made: it knows which of them should run as SDPA.
    """
    rest = (call.key_mask, call.scale, call.block_size, when, call.site)
    if call.policy == "asa_g":
        from . import global_tokens, ops_global  # noqa: F401 (registers the operator)

        window = policies.global_window(call.options)
        pooled = global_tokens.pooled(call.k, call.v, call.key_mask, window, call.protect_k)
        op = torch.ops.blade.global_sparse_attention.default
        return op(call.q, call.k, call.v, num, idx, *pooled, *rest)[0]  # type: ignore[no-any-return]
    op = torch.ops.blade.block_sparse_attention.default
    return op(call.q, call.k, call.v, num, idx, *rest)[0]  # type: ignore[no-any-return]


def predict(call: Call) -> tuple[Tensor, Tensor]:
    """The lists of this call alone, as without a generation."""
    if call.policy == "adaspa":
        _, sums = search.lse_and_block_sums(call.q, call.k, call.bias, call.scale, call.block_size)
        return select(call, sums)
    num, idx = torch.ops.blade.mask_predict.default(
        call.q,
        call.k,
        call.key_mask,
        call.scale,
        call.protect_q,
        call.protect_k,
        call.sparsity,
        call.tau,
        call.min_keep,
        call.max_keep,
        call.block_size,
        call.probe_tokens,
        call.seed,
        call.when,
        call.min_tokens,
        call.site,
        policy=call.policy,
        options=call.options,
        head_sparsity=call.head_sparsity,
        grid=call.grid,
        order=call.order,
    )
    return num, idx


def select(call: Call, sums: Tensor) -> tuple[Tensor, Tensor]:
    """AdaSpa's lists of a map of block sums."""
    force_q = lists.forced_blocks(call.protect_q, call.q.shape[2], call.block_size, call.q.device)
    force_k = lists.forced_blocks(call.protect_k, call.k.shape[2], call.block_size, call.q.device)
    how = (call.sparsity, call.tau, call.min_keep, call.max_keep, force_q, force_k, call.head_sparsity)
    return policy_adaspa.select(sums, *how, head_adaptive=call.schedule.head_adaptive)


def _once(call: Call) -> Tensor:
    num, idx = predict(call)
    if call.policy != "adaspa":
        return attend_sparsely(call, num, idx, call.when)
    _tell(call, "mask_predict", "search", num, idx)
    return attend_sparsely(call, num, idx)


# --- AdaSpa, decided on the host -------------------------------------------------------------------------------------


def _remembering(call: Call, carrier: Carrier, phase: Phase) -> Tensor:
    key = (call.site, carrier.branch)
    slot = carrier.slots.get(key)
    if phase == Phase.SEARCH or slot is None or slot.sizes != call.sizes:
        out, carrier.slots[key] = _first_search(call)
        return out
    stale = _stale(call, slot, phase)
    # Nobody waits for an accelerator: there the search kernel itself skips what is not stale.
    searched = stale is not None and (stale.device.type != "cpu" or bool(stale.any()))
    if stale is not None and searched:
        _search_again(call, slot, stale)
    num, idx = carried.lists_of(slot.bits, call.num_key_blocks)
    _tell(call, "mask_predict", "search" if searched else "reuse", num, idx)
    return attend_sparsely(call, num, idx)


def _first_search(call: Call) -> tuple[Tensor, Slot]:
    """Dense attention gives this step's output and the LSE; a second pass over Q and K the mask of the next steps."""
    out, lse = attend_densely(call)
    sums = search.block_sums(call.q, call.k, lse, call.bias, call.scale, call.block_size)
    bits = carried.pack(*select(call, sums), call.num_key_blocks)
    mass = None if call.schedule.drift is None else probed_share(call, bits)
    return out, Slot(call.sizes, lse, bits, mass)


def _search_again(call: Call, slot: Slot, stale: Tensor) -> None:
    """New masks for the samples that are stale, from the LSE of the first search."""
    sums = search.block_sums(call.q, call.k, slot.lse, call.bias, call.scale, call.block_size, stale.int())
    bits = carried.pack(*select(call, sums), call.num_key_blocks)
    slot.bits = torch.where(stale[:, None, None, None], bits, slot.bits)
    if slot.mass is not None:
        slot.mass = torch.where(stale, probed_share(call, slot.bits), slot.mass)


def _stale(call: Call, slot: Slot, phase: Phase) -> Tensor | None:
    """Samples whose mask has to be searched again, bool [B]; None: none."""
    if phase == Phase.REFRESH:
        return torch.ones(call.q.shape[0], dtype=torch.bool, device=call.q.device)
    if call.schedule.drift is None or slot.mass is None:
        return None
    return probed_share(call, slot.bits) < (1 - call.schedule.drift) * slot.mass


def probed_share(call: Call, bits: Tensor) -> Tensor:
    """Share of the probed mass on a mask, mean over heads and query blocks: fp32 [B]. The drift check.

    The probe is ASA's (sampled tokens, the maximum in each block; algorithms 1.2): 1/16 of a search at 16 of 64 tokens.
    """
    probe_tokens = min(call.probe_tokens, call.block_size)
    tokens = (call.block_size, probe_tokens, call.seed)
    request = policies.Request(call.q, call.k, call.bias, call.scale, *tokens, None, "none", ())
    block_map = policies.get("asa").block_map(request).nan_to_num(nan=0.0)
    kept = torch.where(carried.unpack(bits, call.num_key_blocks), block_map, 0.0).sum(-1)
    total = block_map.sum(-1)
    return (kept / total.masked_fill(total == 0, 1)).float().mean((1, 2))


# --- what the report hears -------------------------------------------------------------------------------------------


def _full_lists(call: Call) -> tuple[Tensor, Tensor]:
    B, H, S, _ = call.q.shape
    return lists.full_lists(B, H, -(-S // call.block_size), call.num_key_blocks, call.q.device)


def _tell(call: Call, op: str, path: str, num: Tensor, idx: Tensor) -> None:
    if observe.listening():
        observe.notify(
            observe.Event(
                op, call.site, path, (call.q, call.k, call.v), num, idx, call.block_size, key_mask=call.key_mask
            )
        )


def _carried_attention_fake(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    B, H, S, D = q.shape
    return aten.flash_layout(B, H, S, D, q)


library.impl("carried_attention", _carried_attention, "CompositeExplicitAutograd")
torch.library.register_fake("blade::carried_attention", _carried_attention_fake, lib=library)
