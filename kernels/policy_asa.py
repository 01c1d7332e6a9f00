"""Policies ``asa`` and ``asa_g``: sampled or mean-pooled tokens of each block (BLADE section 3.2, algorithms 1.2).

Option ``probe``: ``sample``: ``probe_tokens`` tokens of each block, the largest probability in each cell;
``mean``: one mean of each block, as the baselines do. `asa_g` ranks in the same way; its pooled tokens are in
``global_tokens.py``, and its option ``global_window`` is read there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import accelerator, aten, cpu_probe, policy_vsa, reference
from .policies import MapPolicy, Request, register


def block_map(request: Request) -> Tensor:
    """The predicted importance of each block, [1, H, nQ, nK]."""
    probe = request.options["probe"]
    if probe == "mean":
        return policy_vsa.block_map(request)
    if probe == "sample":
        return sampled(request)
    raise ValueError(f"probe={probe!r}; valid are 'sample' and 'mean'.")


def sampled(request: Request) -> Tensor:
    """`reference.probe_map` by whatever is fastest here."""
    q, k, bias, block, H = request.q, request.k, request.bias, request.block_size, request.q.shape[1]
    probe = (block, request.probe_tokens, request.seed)
    if q.device.type != "cpu":
        return accelerator.probe_map(q, k, bias, request.scale, *probe)
    if q.dtype != torch.float64 and cpu_probe.available():
        sides = ((q, "q"), (k, "k"))
        of_q, of_k = (reference.probe_positions(x.shape[2], *probe[:2], H, probe[2], side) for x, side in sides)
        return cpu_probe.probe_map(q, k, bias, request.scale, block, of_q, of_k)
    return aten.probe_map(q, k, bias, request.scale, *probe)


register(MapPolicy("asa", block_map, options={"probe": "sample"}))
register(MapPolicy("asa_g", block_map, options={"probe": "sample", "global_window": 30}))
