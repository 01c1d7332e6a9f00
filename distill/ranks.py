"""The processes of a run: torchrun's, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from blade_compile.distill.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None = None
    "over all ranks; None for a single process"

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over the ranks."""
        return self._reduced(values, dist.ReduceOp.SUM, self.world)

    def highest(self, value: float) -> float:
        """A value's maximum over the ranks."""
        return self._reduced([value], dist.ReduceOp.MAX, 1)[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def _reduced(self, values: Sequence[float], how: dist.ReduceOp.RedOpType, divisor: int) -> list[float]:
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, how)
        made: list[float] = (tensor / divisor).tolist()
        return made


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the other processes that torchrun has started, if it has; leave them at the end.

    Raises:
        ConfigError: there are more processes on this machine than GPUs.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"this is process {local + 1} on a machine with {torch.cuda.device_count()} GPUs; "
                "lower torchrun's --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(rank, world, device)
        return
    joined = not dist.is_initialized()
    if joined:
        # gloo beside nccl: checkpoints exchange their plans on the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, world, device, init_device_mesh(device.type, (world,)))
    finally:
        if joined:
            dist.destroy_process_group()
