"""What a rewritten site did, measured on the tensors that it got: density, recall, times.

Everything is computed as the call happens and only numbers are kept, so that a report of a large model holds the
tensors of one site at a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blade_compile.kernels import cost, dispatch, lists, observe, reference

SAMPLED_ROWS = 64
"query rows per head on which recall is computed"
STRIP_BYTES = 1 << 26
"largest strip of exact scores that is held at a time"
PAIRS, SECONDS = 5, 2.0
"pairs of timed runs, fewer (but three) where they take longer than this"


@dataclass
class Observation:
    """One call of a site."""

    shape: tuple[int, int, int, int, int]
    dtype: str
    block_size: int
    ran: str
    density: float | None
    "None where dense SDPA ran"
    recall: float | None = None
    measured_dense: float | None = None
    measured_sparse: float | None = None


def observe_call(
    op: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], *, first: bool, measure: bool
) -> tuple[Tensor, Observation]:
    """Run ``blade::sparse_sdpa`` and say what it did.

    Args:
        op, args, kwargs: the call as it stands in the graph.
        first: whether recall and times are wanted too (they cost more than the call).
        measure: whether to time dense and sparse attention.
    """
    with observe.record() as events:
        out = op(*args, **kwargs)
    event = next(e for e in reversed(events) if e.op in observe.ATTENTIONS)
    q, k = (x.detach() for x in event.inputs[:2])
    dense = event.path == "sdpa"
    seen = Observation(
        shape=(*q.shape[:3], k.shape[2], q.shape[3]),
        dtype=str(q.dtype).removeprefix("torch."),
        block_size=event.block_size,
        ran=event.path,
        density=None if dense else event.density,
    )
    if first and not dense:
        mask, scale = (args[i] if len(args) > i else kwargs.get(name) for i, name in ((3, "key_mask"), (4, "scale")))
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            lists_of = (event.kv_num_blocks, event.kv_indices)
            seen.recall = recall(q, k, *lists_of, event.block_size, key_mask=event.key_mask, scale=scale)
            if measure:
                dq, dk, dv = (x.detach() for x in args[:3])
                timed = lambda: op(dq, dk, dv, *args[3:], **kwargs)  # noqa: E731
                seen.measured_dense, seen.measured_sparse = paired_times(
                    dense_sdpa(dq, dk, dv, mask, scale), timed, q.device
                )
    return out, seen


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float | None) -> Callable[[], Tensor]:
    """The same attention by ``F.scaled_dot_product_attention``, ready to run."""
    mask = reference.additive_mask(key_mask, q.dtype)
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def recall(
    q: Tensor,
    k: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    block_size: int,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> float | None:
    """Share of the exact softmax mass that lies on kept blocks, mean over SAMPLED_ROWS evenly spread query rows.

    q [B, H, S, D], k [B, Hkv, T, D]; the lists as in FlexAttention. fp32 scores, held in strips of STRIP_BYTES. None
    where no sampled row may attend to any key.
    """
    (B, H, S, D), (_, Hkv, T, _) = q.shape, k.shape
    scale = D**-0.5 if scale is None else scale
    rows = torch.linspace(0, S - 1, min(S, SAMPLED_ROWS), device=q.device).round().long()
    bias = dispatch.key_bias(key_mask, q.dtype)
    keep = lists.kept_blocks(kv_num_blocks, kv_indices, -(-T // block_size))
    total, count = 0.0, 0
    heads = max(1, STRIP_BYTES // (4 * len(rows) * T))
    for b in range(B):
        for start in range(0, H, heads):
            h = torch.arange(start, min(start + heads, H), device=q.device)
            scores = scale * (q[b, h][:, rows].float() @ k[b, h // (H // Hkv)].float().transpose(-1, -2))
            if bias is not None:
                some = bias[min(b, bias.shape[0] - 1)]
                scores += some[h if some.shape[0] > 1 else slice(None)].float().unsqueeze(-2)
            kept = keep[min(b, keep.shape[0] - 1)]
            kept = (kept[h] if kept.shape[0] > 1 else kept)[:, rows // block_size]
            mass = _mass_on(scores.softmax(-1), kept, block_size)
            mass = mass[~mass.isnan()]
            total, count = total + mass.double().sum().item(), count + mass.numel()
    return total / count if count else None


def _mass_on(weights: Tensor, kept: Tensor, block_size: int) -> Tensor:
    """[h, R]: the sum of each row of weights [h, R, T] over its kept blocks [h|1, R, nK]."""
    pad = kept.shape[-1] * block_size - weights.shape[-1]
    blocks = torch.nn.functional.pad(weights, (0, pad)).unflatten(-1, (-1, block_size)).sum(-1)
    return torch.where(kept, blocks, 0.0).sum(-1)


def paired_times(one: Callable[[], object], other: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Median seconds of two functions run in turns, after one untimed run of each."""
    _seconds(one, device)
    _seconds(other, device)
    pairs: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(pairs) < PAIRS and (len(pairs) < 3 or time.perf_counter() - begin < SECONDS):
        pairs.append((_seconds(one, device), _seconds(other, device)))
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def predicted(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, block_size: int, probe_tokens: int, density: float
) -> tuple[float, float]:
    """Seconds of SDPA and of sparse attention (prediction included) by the cost model.

    Its constants are for one core; the cores in use are taken to share the work evenly.
    """
    sizes = dict(zip(("B", "H", "S", "T", "D"), shape, strict=True), block=block_size, probe=probe_tokens)
    family, name = dispatch.family(device, dtype), str(dtype).removeprefix("torch.")
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    dense = cost.seconds(family, name, "dense", **sizes, density=1.0)
    sparse = sum(cost.seconds(family, name, what, **sizes, density=density) for what in ("predict", "attention"))
    return dense / cores, sparse / cores
