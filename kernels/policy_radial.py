"""Policy ``radial``: attention that decays with the distance in space and time (Radial Attention, arXiv 2506.19852,
section 4.2).

    cost(i, j) = 2^floor(log2(max(|t_i - t_j|, 1))) * (|s_i - s_j| + 1)

t is the frame and s the raster index in the frame, both of a block's middle token. The paper keeps what costs at most a
width: the band of neighbours halves each time the frames are twice as far apart. Here the budget sets that width. The
block itself comes first, then those with a token of frame 0, to which every query attends (the sink). The paper's
thinning of the diagonals between very distant frames is not needed: those come last anyway.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import block_grid
from .policies import MapPolicy, Request, register


def block_map(request: Request) -> Tensor:
    """The cost, turned around, [1, H, nQ, nK]; reads no score."""
    of_q, of_k = block_grid.layouts(request)
    device = request.q.device
    q, k = (block_grid.middles(layout, device) for layout in (of_q, of_k))
    assert request.grid is not None
    T, H, W = request.grid
    frames = (q[:, None, 0] - k[:, 0]).abs()
    step = torch.ones_like(frames)
    for bit in range(1, T.bit_length()):
        step = torch.where(frames >= 2**bit, 2**bit, step)
    space = (q[:, 1] * W + q[:, 2])[:, None] - (k[:, 1] * W + k[:, 2])
    cost = 1 + step * (space.abs() + 1)
    cost = torch.where(block_grid.first_frame(of_k, device)[:, 0] > 0, 1, cost)
    cost = torch.where((frames == 0) & (space == 0), 0, cost)
    largest = 1 + 2 ** math.floor(math.log2(max(T - 1, 1))) * H * W
    return block_grid.as_map(cost.clamp(max=largest), largest, request, q[:, 0] < 0, k[:, 0] < 0)


register(MapPolicy("radial", block_map, defaults={"sparsity": 0.8}, needs_grid=True))
