"""Random numbers as pure functions of (seed, step, global sample index, purpose).

No stream is continued from one draw to the next. So nothing about them has to be saved, a resumed run draws what the
uninterrupted one would have drawn, and a sample's numbers don't depend on the rank or the accumulation pass that it
falls to. All are drawn on the CPU and moved, so every device sees the same ones.

torch's CPU generator takes 32 bits as its seed. Among the millions of draws of a long run a few pairs are therefore
equal, at unrelated steps; two equal ones within one step are as good as impossible (one in 10^6 for 100 draws).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Device = torch.device | str | None


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator of its own for every key; ``1`` and ``"1"`` are different keys."""
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def _of(seed: int, step: int, sample: int, purpose: str) -> torch.Generator:
    return generator(seed, "sample", step, sample, purpose)


def normal(
    shape: Sequence[int], seed: int, step: int, samples: Sequence[int], purpose: str, device: Device = None
) -> Tensor:
    """Standard normal numbers.

    Args:
        shape: of one sample.
        seed: of the run.
        step: of the training.
        samples: B global sample indices.
        purpose: what they are for; others give independent numbers.
        device: where they go.

    Returns:
        fp32 ``[B, *shape]``.
    """
    out = torch.empty(len(samples), *shape)
    for row, sample in enumerate(samples):
        out[row].normal_(generator=_of(seed, step, sample, purpose))
    return out.to(device)


def uniform(seed: int, step: int, samples: Sequence[int], purpose: str, device: Device = None) -> Tensor:
    """Uniform numbers in [0, 1), fp64 ``[B]``; arguments as in ``normal``."""
    drawn = [torch.rand((), dtype=torch.float64, generator=_of(seed, step, sample, purpose)) for sample in samples]
    return torch.tensor(drawn, dtype=torch.float64, device=device)


def integers(high: int, seed: int, step: int, samples: Sequence[int], purpose: str, device: Device = None) -> Tensor:
    """Integers from 0 to ``high - 1``, int64 ``[B]``; arguments as in ``normal``."""
    drawn = [int(torch.randint(high, (), generator=_of(seed, step, sample, purpose))) for sample in samples]
    return torch.tensor(drawn, dtype=torch.int64, device=device)


def choice(options: Sequence[int], seed: int, step: int, purpose: str) -> int:
    """One of several values for a whole step, the same on all ranks."""
    return options[int(torch.randint(len(options), (), generator=generator(seed, "choice", step, purpose)))]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of ``count`` prompts in an epoch: a permutation, int64 ``[count]``."""
    return _order(count, seed, epoch).clone()


def prompt_of(seed: int, count: int, position: int) -> int:
    """The prompt of a position in the endless sequence of shuffled epochs.

    Args:
        seed: of the run.
        count: of prompts.
        position: step * samples per step + global sample index.
    """
    epoch, place = divmod(position, count)
    return int(_order(count, seed, epoch)[place])
