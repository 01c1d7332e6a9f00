"""Other attention libraries, if they are installed: one small adapter each, skipped with a line where it is not.

An adapter maps q, k, v [B, H, S, D] to an output of the same shape. All of these need a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A library's entry point. ``layout``: "BHSD", or "BSHD" where it wants tokens before heads."""

    name: str
    module: str
    function: str
    layout: str
    keywords: tuple[tuple[str, object], ...] = ()
    exact: bool = True
    "whether it computes attention as it is; the others quantise or choose blocks: only their distance is shown"
    arguments: Callable[[Tensor], dict[str, object]] | None = None
    "more keywords, made once for a query of the size"
    density: Callable[[Tensor], float] | None = lambda q: 1.0
    "share of the keys that a query of the size attends to; None: only the library knows"

    def find(self, q: Tensor | None = None) -> Attention | str:
        """The call for queries like ``q``, or why there is none."""
        try:
            found = getattr(importlib.import_module(self.module), self.function)
        except ImportError:
            return f"{self.module} is not installed"
        except AttributeError:
            return f"{self.module} has no {self.function}: another version than the adapter was written for"
        except Exception as error:  # noqa: BLE001 (a broken install must not end the report)
            return f"{self.module} can't be imported: {type(error).__name__}: {error}"
        keywords = dict(self.keywords)
        if self.arguments is not None and q is not None:
            keywords |= self.arguments(q)
        if self.layout == "BHSD":
            return lambda q, k, v: found(q, k, v, **keywords)  # type: ignore[no-any-return]
        return lambda q, k, v: found(*(t.transpose(1, 2) for t in (q, k, v)), **keywords).transpose(1, 2)  # type: ignore[no-any-return]


KEPT = 0.2  # share of the blocks that peers with a choice of blocks keep


def _tiles(q: Tensor) -> dict[str, object]:
    """VSA's tiles of 4 x 4 x 4 tokens, all full, and how many of them a query keeps."""
    count, topk = _kept_tiles(q)
    sizes = torch.full((count,), 64, dtype=torch.int32, device=q.device)
    return {"variable_block_sizes": sizes, "q_variable_block_sizes": sizes, "topk": topk}


def _kept_tiles(q: Tensor) -> tuple[int, int]:
    count = q.shape[2] // 64
    return count, max(1, round(KEPT * count))


def _share_of_tiles(q: Tensor) -> float:
    count, topk = _kept_tiles(q)
    return topk / count


PEERS = (
    Peer("flash-attn", "flash_attn", "flash_attn_func", "BSHD"),
    Peer("FlashAttention-3", "flash_attn_interface", "flash_attn_func", "BSHD"),
    Peer("xformers", "xformers.ops", "memory_efficient_attention", "BSHD"),
    Peer("SageAttention", "sageattention", "sageattn", "BHSD", (("tensor_layout", "HND"),), exact=False),
    Peer(
        f"SpargeAttn, keep {KEPT}", "spas_sage_attn", "spas_sage2_attn_meansim_topk_cuda", "BHSD", (("topk", KEPT),),
        exact=False, density=None,
    ),
    Peer(
        f"VSA, keep {KEPT}", "fastvideo_kernel", "video_sparse_attn", "BHSD", (("block_size", (4, 4, 4)),), False,
        _tiles, _share_of_tiles,
    ),
)  # fmt: skip


def absent(device: torch.device) -> dict[str, str]:
    """Peers that can't take part, and why."""
    if device.type != "cuda":
        return {peer.name: "needs a GPU" for peer in PEERS}
    return {peer.name: why for peer in PEERS if isinstance(why := peer.find(), str)}


def calls(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Peer, Callable[[], Tensor]]]:
    """(peer, call without arguments) of each peer that is there."""
    if q.device.type != "cuda":
        return
    for peer in PEERS:
        call = peer.find(q)
        if not isinstance(call, str):
            yield peer, lambda call=call: call(q, k, v)
