"""Several ranks: weights sharded over them (FSDP2), or a copy on each with averaged gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

BUCKET = 1 << 25
"""Elements that are averaged in one message"""


def shard(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype | None = None,
    kept: Sequence[nn.Module] = (),
) -> None:
    """Shard a module's parameters over the ranks, block by block, in place; moves them to the mesh's device.

    Args:
        module: whose parameters become DTensors under the same names.
        blocks: gathered one by one.
        mesh: one-dimensional.
        dtype: in which weights are gathered and used; None: their own. Gradients are always averaged in fp32.
        kept: modules within whose weights are gathered in their own dtype in any case.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if dtype is not None:
        own = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in kept:
            fully_shard(part, mesh=mesh, mp_policy=own)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Also the rest is freed after every forward pass: it would be stale where no backward pass follows.
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """All ranks' shards together, on every rank, without gradient; all ranks have to call this."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over the ranks; all ranks need gradients of the same parameters."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        flat = torch.cat([g.flatten().float() for g in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket])):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket
