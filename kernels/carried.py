"""State that is carried over the steps of a generation: who holds it, and how masks are stored.

A `Carrier` belongs to one compiled graph on one set of parameters within one generation; its slots keep the attention
sites and the branches of classifier-free guidance apart, and every tensor in a slot keeps the samples of the batch
apart. `blade_compile.carriers` makes carriers and says which one is in charge of the running call; the operator
``blade::carried_attention`` reads and writes its slots.

**Memory** of a slot: LSE fp32 [B, H, S] and masks of one bit per block, uint8 [B, H, nQ, ceil(nK / 8)]: together
``B * H * (4 * S + nQ * ceil(nK / 8))`` bytes per site and branch (`slot_bytes`), twice 4 * S for fp64 inputs.
HunyuanVideo at 110,000 tokens (60 layers of 24 heads, blocks of 64): 0.63 GB of LSE and 0.53 GB of masks per branch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .lists import kept_blocks
from .schedule import Phase, Schedule

__all__ = ["CLOCK", "CLOCK_NUMBERS", "Carrier", "Phase", "Schedule", "Slot", "carries", "current", "using"]

CLOCK = "blade_clock"
"""Name of the hidden input of a compiled graph."""
CLOCK_NUMBERS = ("phase", "branch", "level", "step")
"""What the clock holds, int32: see `Phase`, the branch of guidance, the index into `Schedule.levels`, the step."""

_UNPACKED_ELEMENTS = 1 << 22


def carries(policy: str, schedule: Schedule) -> bool:
    """Whether a configuration needs a clock."""
    return schedule.carries(policy)


@dataclass
class Slot:
    """What one site remembers in one branch. Stacked for captured graphs: a leading dimension of branches."""

    sizes: tuple[Any, ...]
    "what the slot was made for: a call of other sizes starts a new one"
    lse: Tensor
    "[B, H, S] of the first search"
    bits: Tensor
    "the mask, uint8 [B, H, nQ, ceil(nK / 8)]"
    mass: Tensor | None = None
    "probed share of the mass on the mask when it was searched, fp32 [B]; None without a drift check"
    valid: Tensor | None = None
    "stacked slots: int32 [branches], 1 once a branch was searched"

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Those that are there, by name."""
        named = [(name, getattr(self, name)) for name in ("lse", "bits", "mass", "valid")]
        return [(name, value) for name, value in named if value is not None]


class Carrier:
    """The state of one graph on one set of parameters, and where its generation stands."""

    def __init__(self, num_steps: int, branches: int = 1, *, on_device: bool = False) -> None:
        self.num_steps = num_steps
        self.branches = branches
        self.on_device = on_device  # the device's clock decides, as CUDA graphs need; else the host does
        self.step = 0
        self.branch = 0
        self.used = False  # whether an attention site has asked for the step
        self.slots: dict[tuple[Any, ...], Slot] = {}

    def begin(self, step: int, branch: int) -> None:
        """A model call of this step, counted from 1, and branch, counted from 0, begins."""
        self.step, self.branch = step, branch

    def clock(self, policy: str, schedule: Schedule) -> tuple[int, ...]:
        """What the device's clock has to show, in the order of CLOCK_NUMBERS; step 0 stands outside a generation."""
        if not self.step:
            return int(Phase.FRESH if policy == "adaspa" else Phase.REUSE), 0, 0, 0
        phase = schedule.phase(policy, self.step, self.num_steps)
        return int(phase), self.branch, schedule.level(self.step), self.step

    def settle(self) -> None:
        """Move stacked slots into memory of their own: what is allocated while a graph warms up is the graph's."""
        for slot in self.slots.values():
            for name, value in slot.tensors():
                setattr(slot, name, value.clone())

    def take(self) -> dict[Any, dict[str, Tensor]]:
        """Copies of what all slots hold, for `put`."""
        return {key: {name: value.clone() for name, value in slot.tensors()} for key, slot in self.slots.items()}

    def put(self, contents: dict[Any, dict[str, Tensor]]) -> None:
        """Fill the slots in place, as captured graphs need; slots without content forget what they held."""
        for key, slot in self.slots.items():
            for name, value in slot.tensors():
                if key in contents:
                    value.copy_(contents[key][name])
                elif name == "valid":
                    value.zero_()

    def clear(self) -> None:
        """Free every slot."""
        self.slots.clear()


_running = threading.local()


def current() -> Carrier | None:
    """The carrier of the running call, None outside a generation."""
    return getattr(_running, "carrier", None)


@contextlib.contextmanager
def using(carrier: Carrier | None) -> Iterator[None]:
    """Put a carrier in charge of this thread's calls."""
    before = current()
    _running.carrier = carrier
    try:
        yield
    finally:
        _running.carrier = before


def slot_bytes(B: int, H: int, S: int, T: int, block_size: int, lse_bytes: int = 4) -> tuple[int, int]:
    """Bytes of a slot's LSE and of its mask."""
    nQ, nK = -(-S // block_size), -(-T // block_size)
    return B * H * S * lse_bytes, B * H * nQ * -(-nK // 8)


# --- masks of one bit per block --------------------------------------------------------------------------------------


def pack(num: Tensor, idx: Tensor, num_key_blocks: int) -> Tensor:
    """Block lists as bits: uint8 [B, H, nQ, ceil(nK / 8)], bit j of byte i is block 8 i + j."""
    B, H, nQ = num.shape
    bits = num.new_empty(B * H, nQ, -(-num_key_blocks // 8), dtype=torch.uint8)
    shift = torch.arange(8, dtype=torch.uint8, device=num.device)
    flat_num, flat_idx = num.flatten(0, 1), idx.flatten(0, 1)
    for part in _parts(bits, num_key_blocks):
        keep = kept_blocks(flat_num[part], flat_idx[part], num_key_blocks)
        keep = torch.nn.functional.pad(keep, (0, -num_key_blocks % 8)).unflatten(-1, (-1, 8))
        bits[part] = (keep.to(torch.uint8) << shift).sum(-1, dtype=torch.uint8)
    return bits.unflatten(0, (B, H))


def unpack(bits: Tensor, num_key_blocks: int) -> Tensor:
    """The bits as a bool mask [..., nK]."""
    shift = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> shift) & 1).flatten(-2)[..., :num_key_blocks].bool()


def lists_of(bits: Tensor, num_key_blocks: int) -> tuple[Tensor, Tensor]:
    """Block lists, ascending with 0 past the count, from bits: no sort, a bounded part of the heads at a time."""
    B, H, nQ, _ = bits.shape
    num = bits.new_empty(B * H, nQ, dtype=torch.int32)
    idx = bits.new_empty(B * H, nQ, num_key_blocks, dtype=torch.int32)
    block = torch.arange(num_key_blocks, dtype=torch.int32, device=bits.device)
    flat = bits.flatten(0, 1)
    for part in _parts(flat, num_key_blocks):
        keep = unpack(flat[part], num_key_blocks)
        rank = keep.cumsum(-1, dtype=torch.int32)  # kept blocks up to and with this one
        num[part] = rank[..., -1]
        # A permutation: kept blocks to the front, the others, as zeros, behind them.
        place = torch.where(keep, rank - 1, rank[..., -1:] + block - rank)
        idx[part] = torch.zeros_like(rank).scatter_(-1, place.long(), torch.where(keep, block, 0))
    return num.unflatten(0, (B, H)), idx.unflatten(0, (B, H))


def _parts(rows: Tensor, num_key_blocks: int) -> Iterator[slice]:
    """Slices of the first dimension that hold a bounded number of blocks."""
    step = max(1, _UNPACKED_ELEMENTS // max(1, rows.shape[1] * num_key_blocks))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)
