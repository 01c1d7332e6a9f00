"""The last density of each attention site on an accelerator, read back without a stall.

Under ``tau`` the density is known only on the device. A copy is started after each prediction and read at a later
call, when it has arrived; before the first one INITIAL stands in.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

INITIAL = 0.3

_lock = threading.Lock()
_last: dict[tuple[str, str], float] = {}
_pending: dict[tuple[str, str], tuple[Tensor, Any]] = {}


def _key(site: str, device: torch.device) -> tuple[str, str]:
    return site, str(device)


def expected(site: str, device: torch.device) -> float:
    """The site's last known density."""
    key = _key(site, device)
    with _lock:
        waiting = _pending.get(key)
        if waiting is not None and waiting[1].query():
            _last[key] = float(waiting[0])
            del _pending[key]
        return _last.get(key, INITIAL)


def report(site: str, kv_num_blocks: Tensor, num_key_blocks: int) -> None:
    """Start copying the density of fresh lists to the host. Does nothing while a CUDA graph is captured."""
    device = kv_num_blocks.device
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    with _lock:
        if _key(site, device) in _pending:
            return
    mean = kv_num_blocks.float().mean() / num_key_blocks
    host = torch.empty((), dtype=torch.float32, pin_memory=True).copy_(mean, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    with _lock:
        _pending[_key(site, device)] = (host, event)
