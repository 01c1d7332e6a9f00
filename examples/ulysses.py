"""Context parallelism in the manner of Ulysses: tokens over the ranks outside attention, heads over the ranks inside.

Each rank holds a part of the sequence. An all-to-all gives it the whole sequence for a part of the heads, sparse
attention runs there without knowing of the others, and a second all-to-all goes back. Blocks are chosen per head, so
the result is that of one process where a head's number doesn't change how its blocks are ranked (see ``MEAN``).

    torchrun --nproc-per-node=8 examples/ulysses.py          # GPUs
    torchrun --nproc-per-node=2 examples/ulysses.py --tiny   # two processes on a CPU
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

import blade_compile

# Each rank counts its heads from 0, and which tokens the default probe samples depends on a head's number: ranks would
# keep other blocks than one process does. Means of blocks depend on nothing but the tokens.
MEAN = {"probe": "mean", "when": "always"}


def all_to_all(x: Tensor, cut: int, join: int) -> Tensor:
    """Cut dimension ``cut`` over the ranks and join dimension ``join`` from all of them. Differentiable."""
    parts = torch.stack(x.chunk(dist.get_world_size(), cut)).contiguous()  # [ranks, ...]
    got = collectives.all_to_all_single_autograd(parts, None, None, dist.group.WORLD)
    return torch.cat(got.unbind(), join)


def attention(q: Tensor, k: Tensor, v: Tensor, config: dict[str, Any]) -> Tensor:
    """q, k, v [B, H, S / ranks, D] -> the same: attention over all S tokens."""
    q, k, v = (all_to_all(t, cut=1, join=2) for t in (q, k, v))  # [B, H / ranks, S, D]
    out = blade_compile.sparse_attention(q, k, v, config=config)
    return all_to_all(out, cut=2, join=1)


def main() -> None:
    """Compare with one process, forward and backward."""
    tiny, rank = "--tiny" in sys.argv, int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu") if tiny else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if tiny else "nccl")
    heads, tokens = (4, 256) if tiny else (24, 32768)
    # Blocks of more tokens than the default probe samples (16), so that its choice would show in the difference.
    config = {"sparsity": 0.5, "block_size": 32, **MEAN} if tiny else {"sparsity": 0.8, **MEAN}

    torch.manual_seed(0)
    whole = [torch.randn(1, heads, tokens, 64, device=device, requires_grad=True) for _ in range(3)]
    own = [t.detach().chunk(dist.get_world_size(), 2)[dist.get_rank()].clone().requires_grad_() for t in whole]
    out = attention(*own, config)
    out.square().sum().backward()
    want = blade_compile.sparse_attention(*whole, config=config)
    want.square().sum().backward()

    pairs = [(out.detach(), want.detach()), *((a.grad, b.grad) for a, b in zip(own, whole, strict=True))]
    worst = max(float((a - b.chunk(dist.get_world_size(), 2)[dist.get_rank()]).abs().max()) for a, b in pairs)
    print(f"rank {dist.get_rank()}: {tokens // dist.get_world_size()} of {tokens} tokens, worst difference {worst:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
