"""AdaSpa and schedules decided by the device's clock: what a captured CUDA graph replays at any step.

Every call runs the same kernels, whatever the step. What a step does not need costs next to nothing: searches return at
once where they are not wanted, and one block-sparse attention serves dense steps (lists that keep every block) and
sparse ones. Slots hold all branches of guidance at fixed addresses and are written in place; they have to exist
before a graph is captured, which a first, uncaptured call sees to. The results are those of the host's path, within
the rounding of the dense attention kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import carried, dispatch, ops_carried, search
from .carried import Carrier, Slot
from .ops_carried import Call
from .schedule import Phase


def attention(call: Call, clock: Tensor, carrier: Carrier) -> Tensor:
    """Out in the flash layout. ``clock``: int32, see ``carried.CLOCK_NUMBERS``."""
    phase, level = clock[0], clock[2]
    if call.policy == "adaspa":
        return _remembering(call, clock, _slot(call, carrier))
    num, idx = _by_level(call, level, ops_carried.predict)
    return ops_carried.attend_sparsely(call, *_kept(call, phase == Phase.DENSE, num, idx))


def _remembering(call: Call, clock: Tensor, slot: Slot) -> Tensor:
    assert slot.valid is not None
    branch = clock[1:2].long()
    phase, level, nK, B = clock[0], clock[2], call.num_key_blocks, call.q.shape[0]
    lse, bits, valid = (x.index_select(0, branch)[0] for x in (slot.lse, slot.bits, slot.valid))
    # Nothing remembered yet (another size, say): search now.
    lost = (valid == 0) & ((phase == Phase.REUSE) | (phase == Phase.REFRESH))
    phase = torch.where(lost, int(Phase.SEARCH), phase)
    fresh = phase == Phase.FRESH
    again = ((phase == Phase.REFRESH) | fresh).expand(B)
    mass = None if slot.mass is None else slot.mass.index_select(0, branch)[0]
    if mass is not None:
        assert call.schedule.drift is not None
        fallen = ops_carried.probed_share(call, bits) < (1 - call.schedule.drift) * mass
        again = again | ((phase == Phase.REUSE) & fallen)
    # Outside a generation: the LSE of this call, from lists that are empty at every other time.
    everything, every_block = ops_carried._full_lists(call)
    own_lse = _attend(call, torch.where(fresh, everything, 0), every_block)[1]
    today = _search(call, torch.where(fresh, own_lse, lse), level, again)
    used = torch.where(again[:, None, None, None], today, bits)
    bits = torch.where(fresh, bits, used)
    num, idx = _kept(call, phase <= Phase.SEARCH, *carried.lists_of(used, nK))
    out, new_lse = _attend(call, num, idx)
    first = (phase == Phase.SEARCH).expand(B)
    bits = torch.where(first[:, None, None, None], _search(call, new_lse, level, first), bits)
    if mass is not None and slot.mass is not None:
        mass = torch.where(first | (again & ~fresh), ops_carried.probed_share(call, bits), mass)
        slot.mass.index_copy_(0, branch, mass[None])
    slot.bits.index_copy_(0, branch, bits[None])
    slot.lse.index_copy_(0, branch, torch.where(phase == Phase.SEARCH, new_lse, lse)[None])
    slot.valid.index_copy_(0, branch, (valid | (phase == Phase.SEARCH)).int()[None])
    return out


def _search(call: Call, lse: Tensor, level: Tensor, active: Tensor) -> Tensor:
    """Bits of new masks for the active samples; what the others get is never used."""
    sums = search.block_sums(call.q, call.k, lse, call.bias, call.scale, call.block_size, active.int())
    num, idx = _by_level(call, level, lambda own: ops_carried.select(own, sums))
    return carried.pack(num, idx, call.num_key_blocks)


def _by_level(call: Call, level: Tensor, lists_at: Callable[[Call], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Lists at the sparsity that the clock names: those of every level are made, and one is taken."""
    num, idx = lists_at(call)
    for which in range(1, len(call.schedule.levels(call.sparsity))):
        other_num, other_idx = lists_at(call.at_level(which))
        num, idx = torch.where(level == which, other_num, num), torch.where(level == which, other_idx, idx)
    return num, idx


def _kept(call: Call, everything: Tensor, num: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """The lists, or every block."""
    block = torch.arange(call.num_key_blocks, dtype=torch.int32, device=idx.device)
    return torch.where(everything, call.num_key_blocks, num), torch.where(everything, block, idx)


def _attend(call: Call, num: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, _ = dispatch.attend(
        call.q, call.k, call.v, num, idx, call.key_mask, call.scale, call.block_size, auto=False
    )
    return out, lse


def _slot(call: Call, carrier: Carrier) -> Slot:
    key = (call.site, call.sizes)
    slot = carrier.slots.get(key)
    if slot is None:
        if call.q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"site {call.site!r}: a CUDA graph is captured before blade has seen these sizes once; run one call "
                "of the model without capture first."
            )
        slot = carrier.slots[key] = _new_slot(call, carrier.branches)
    return slot


def _new_slot(call: Call, branches: int) -> Slot:
    (B, H, S, _), q = call.q.shape, call.q
    nQ, nK = -(-S // call.block_size), call.num_key_blocks
    # Ordinary tensors, also under inference_mode: they are written in place in other modes too.
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.inference_mode(False):
        return Slot(
            call.sizes,
            lse=torch.zeros(branches, B, H, S, dtype=wide, device=q.device),
            bits=torch.zeros(branches, B, H, nQ, -(-nK // 8), dtype=torch.uint8, device=q.device),
            mass=None if call.schedule.drift is None else torch.zeros(branches, B, device=q.device),
            valid=torch.zeros(branches, dtype=torch.int32, device=q.device),
        )
