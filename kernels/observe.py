"""What the operators did at run time: the report, the conformance run and tests listen here.

The operators are opaque to the compiler, so this also sees graphs that came out of the compile cache.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

ATTENTIONS = ("block_sparse_attention", "global_sparse_attention")
"""Operators that attend over block lists"""


@dataclass(frozen=True)
class Event:
    """One execution of an operator."""

    op: str
    "``mask_predict``, ``block_sparse_attention`` or ``block_sparse_attention_backward``"
    site: str
    "the attention site's name, empty for direct calls"
    path: str
    "what ran: ``cpu-<isa>``, ``aten``, ``sdpa`` (dense), ``full`` (lists that keep everything, not predicted)"
    inputs: tuple[Tensor, ...]
    "q, k (and v)"
    kv_num_blocks: Tensor
    kv_indices: Tensor
    block_size: int
    key_mask: Tensor | None = None
    "in the order of the keys"

    @property
    def density(self) -> float:
        """Kept share of the blocks, counted from the lists; 1 where there are none, since nothing was dropped."""
        num_key_blocks = -(-self.inputs[1].shape[2] // self.block_size)
        if not num_key_blocks or not self.kv_num_blocks.numel():
            return 1.0
        return self.kv_num_blocks.double().mean().item() / num_key_blocks


_lock = threading.Lock()
_listeners: list[list[Event]] = []


@contextlib.contextmanager
def record() -> Iterator[list[Event]]:
    """Collect the events of every thread while the context is open."""
    events: list[Event] = []
    with _lock:
        _listeners.append(events)
    try:
        yield events
    finally:
        with _lock:
            _listeners[:] = [seen for seen in _listeners if seen is not events]


def listening() -> bool:
    """Whether anybody records: callers skip building the event otherwise."""
    return bool(_listeners)


def notify(event: Event) -> None:
    """Give an event to every open recorder."""
    for events in _listeners:
        events.append(event)
