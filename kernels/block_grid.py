"""Where blocks lie on the token grid: what policies that rank by position need.

Everything is integers, computed once on the host from the sizes alone and copied from pinned memory, so that the CPU
and a GPU rank alike and a CUDA graph can be captured.

Shapes: N tokens, P tokens on the grid, nB = ceil(N / block).
"""

from __future__ import annotations

import functools
import math
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import order as token_orders
from .policies import Request

UNITS = 64
"""A centre is given in units of 1 / UNITS of a token."""

Integers = NDArray[np.int64]
Layout = tuple[tuple[int, int, int], str, int, int, tuple[tuple[int, int], ...]]
"""grid, order, block size, number of tokens, ranges that are not on the grid"""


def layouts(request: Request) -> tuple[Layout, Layout]:
    """What the queries' and the keys' positions follow from.

    Raises:
        ValueError: the grid holds another number of tokens.
    """
    return _layout(request, request.q.shape[2], "query"), _layout(request, request.k.shape[2], "key")


def _layout(request: Request, num_tokens: int, side: str) -> Layout:
    assert request.grid is not None
    on_grid, off_grid = math.prod(request.grid), sum(length for _, length in request.protect)
    if num_tokens == on_grid + off_grid:
        return request.grid, request.order, request.block_size, num_tokens, request.protect
    if num_tokens == on_grid:  # queries without the text tokens that only the keys have
        return request.grid, request.order, request.block_size, num_tokens, ()
    raise ValueError(
        f"grid={request.grid} holds {on_grid} tokens, but {num_tokens - off_grid} of the {num_tokens} {side} tokens "
        "are not protected; correct grid or protect."
    )


def centers(layout: Layout, device: torch.device) -> Tensor:
    """Mean (t, h, w) of each block's grid tokens, a token being 1 wide: int64 [nB, 3] in 1 / UNITS; -1: no token."""
    return _sent("centers", layout, device)


def middles(layout: Layout, device: torch.device) -> Tensor:
    """Coordinates (t, h, w) of each block's middle grid token, int64 [nB, 3]; -1: no token."""
    return _sent("middles", layout, device)


def first_frame(layout: Layout, device: torch.device) -> Tensor:
    """Whether a block holds a token of frame 0, int64 [nB, 1]."""
    return _sent("first_frame", layout, device)


def _centers(layout: Layout) -> Integers:
    block, where, count = _places(layout)
    total = np.zeros((len(count), 3), dtype=np.int64)
    np.add.at(total, block, where)
    mean = (2 * total + count[:, None]) * (UNITS // 2) // np.maximum(count, 1)[:, None]
    return np.where(count[:, None] > 0, mean, -1)


def _middles(layout: Layout) -> Integers:
    _, where, count = _places(layout)
    middle = np.cumsum(count) - count + count // 2
    found: Integers = np.where(count[:, None] > 0, where[np.minimum(middle, len(where) - 1)], -1)
    return found


def _first_frame(layout: Layout) -> Integers:
    block, where, count = _places(layout)
    found = np.zeros((len(count), 1), dtype=np.int64)
    found[block[where[:, 0] == 0]] = 1
    return found


_TABLES = {"centers": _centers, "middles": _middles, "first_frame": _first_frame}


def _places(layout: Layout) -> tuple[Integers, Integers, Integers]:
    """Block [P] and coordinates [P, 3] of the grid tokens in the order they are in; how many each block holds [nB]."""
    grid, order, block_size, num_tokens, protect = layout
    raster = np.asarray(token_orders.token_order(order, grid, block_size))
    where = np.stack(np.unravel_index(raster, grid), axis=1).astype(np.int64)
    free = np.ones(num_tokens, dtype=bool)
    for start, length in protect:
        free[start : start + length] = False
    block = np.flatnonzero(free) // block_size
    return block, where, np.bincount(block, minlength=-(-num_tokens // block_size))


@functools.lru_cache(maxsize=64)
def _table(name: str, layout: Layout) -> Integers:
    return _TABLES[name](layout)


_pinned: dict[tuple[str, Layout], Tensor] = {}
_pinned_lock = threading.Lock()


def _sent(name: str, layout: Layout, device: torch.device) -> Tensor:
    """A table on a device. The pinned copies are kept for good: a captured graph reads them at every replay."""
    if device.type != "cuda":
        return torch.from_numpy(_table(name, layout).copy()).to(device)
    with _pinned_lock:
        if (name, layout) not in _pinned:
            _pinned[name, layout] = torch.from_numpy(_table(name, layout).copy()).pin_memory()
        return _pinned[name, layout].to(device, non_blocking=True)


def as_map(cost: Tensor, largest: int, request: Request, off_q: Tensor, off_k: Tensor) -> Tensor:
    """A cost int64 [nQ, nK], 0 to ``largest``, as a map [1, H, nQ, nK] in (0, 1]: the cheaper, the larger.

    The scale is a power of two: equal and unequal costs stay so, up to 2^24. ``off_q`` bool [nQ], ``off_k`` bool [nK]:
    blocks that are not on the grid at all get NaN. A block of which no key is visible gets 0.
    """
    scale = 2.0 ** -max(1, math.ceil(math.log2(largest + 1)))
    block_map = ((largest + 1 - cost).float() * scale).masked_fill(off_q[:, None] | off_k, math.nan)
    H, block = request.q.shape[1], request.block_size
    if request.bias is None:
        return block_map.expand(1, H, *block_map.shape)
    hidden = torch.nn.functional.pad(request.bias == -math.inf, (0, -request.k.shape[2] % block), value=True)
    unseen = hidden.unflatten(-1, (-1, block)).all(-1)[:, :, None]  # [1, h, 1, nK]
    return block_map.masked_fill(unseen, 0).expand(1, H, *block_map.shape)
