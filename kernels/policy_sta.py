"""Policy ``sta``: a window of tiles around the query's tile (Sliding Tile Attention, arXiv 2502.04507, section 3.2).

A window is a box that covers the same share of the grid along each axis; it is centred on the query block and shifted
inwards at the borders, so that every query sees a window of the same size. Here a block's place is the mean place of
its tokens, and its cost for a query block is the share at which the growing window first holds that place: along an
axis of length n, with the query block at c and the key block at x >= c,

    smallest length of a window with x inside = min(2 (x - c), x)      (centred; shifted against the border at 0)

and the mirror image for x < c. The largest of the three shares counts. The budget then sets the window's size, the
same number of blocks for every query. Blocks are tiles in ``order="tile"``. The paper's windows tuned for each head
are the business of `head_sparsity`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import block_grid
from .policies import MapPolicy, Request, register


def block_map(request: Request) -> Tensor:
    """1 - share of the smallest window that holds the key block, [1, H, nQ, nK]; reads no score."""
    of_q, of_k = block_grid.layouts(request)
    q, k = (block_grid.centers(layout, request.q.device) for layout in (of_q, of_k))
    assert request.grid is not None
    volume = math.prod(request.grid)
    cost = torch.zeros((), dtype=torch.int64, device=q.device)
    for axis, size in enumerate(request.grid):
        cost = torch.maximum(cost, _window(q[:, None, axis], k[:, axis], size) * (volume // size))
    # In units of UNITS * volume: brought below 2^24, where floats are exact.
    largest = block_grid.UNITS * volume
    shift = max(0, largest.bit_length() - 24)
    return block_grid.as_map(cost >> shift, largest >> shift, request, q[:, 0] < 0, k[:, 0] < 0)


def _window(c: Tensor, x: Tensor, size: int) -> Tensor:
    """Length of the smallest window around c, shifted inwards at the borders, that holds x; in 1 / UNITS of a token."""
    length = block_grid.UNITS * size
    above, below = torch.minimum(2 * (x - c), x), torch.minimum(2 * (c - x), length - x)
    return torch.where(x >= c, above, below)


register(MapPolicy("sta", block_map, defaults={"sparsity": 0.8, "order": "tile"}, needs_grid=True))
