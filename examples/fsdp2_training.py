"""Training with sparse attention, weights sharded over the ranks by FSDP2.

- ``torchrun --nproc-per-node=8 examples/fsdp2_training.py``: GPUs
- ``torchrun --nproc-per-node=2 examples/fsdp2_training.py --tiny``: two processes on a CPU
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from own_module import Block
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main() -> None:
    """Learn to remove noise, a few steps."""
    tiny, rank = "--tiny" in sys.argv, int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu") if tiny else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    width, tokens, layers, steps = (64, 128, 2, 3) if tiny else (2048, 16384, 24, 100)
    options = {"sparsity": 0.5, "block_size": 16, "when": "always"} if tiny else {"sparsity": 0.8, "when": "always"}

    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(*(Block(width, width // 32) for _ in range(layers))).to(device)
    for block in model:
        block.compile(backend="blade", options=options)  # blocks alone: FSDP's communication stays between them
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    torch.manual_seed(rank)  # other data on every rank
    clean = torch.randn(1, tokens, width, device=device)
    for step in range(steps):
        noise = torch.randn_like(clean)
        loss = (model(clean + noise) - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach() / mesh.size())
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
