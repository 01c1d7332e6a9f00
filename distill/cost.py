"""What a model costs, from one forward pass on the meta device: attention calls, operations, saved activations.

Nothing is computed and nothing is allocated, so the model's full size is used, on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Call:
    """One call of scaled_dot_product_attention."""

    queries: int
    keys: int
    heads: int
    flops: int
    "of both products, dense: 4 B H S T D"

    @property
    def is_self(self) -> bool:
        """As many keys as queries."""
        return self.queries == self.keys


@dataclass(frozen=True)
class Pass:
    """One forward pass of a batch."""

    calls: tuple[Call, ...]
    flops: int
    "of all matrix products, attention included, dense"
    saved_bytes: int
    "kept for the backward pass, without checkpointing"

    @property
    def attention_flops(self) -> int:
        """Of the self-attention calls, dense."""
        return sum(call.flops for call in self.calls if call.is_self)


class _AttentionRecorder(TorchFunctionMode):
    """Notes each attention call and answers with an output of the right shape."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.saved = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        q, k, v = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(names))
        *batch, queries, dim = q.shape
        keys = k.shape[-2]
        flops = 2 * math.prod(batch) * queries * keys * (dim + v.shape[-1])
        self.calls.append(Call(queries, keys, batch[-1] if batch else 1, flops))
        self.saved += sum(t.numel() * t.element_size() for t in (q, k, v))
        # Linear in q, k and v, so that the backward graph reaches all three; nothing is computed on meta.
        rest = (k.sum(-2, keepdim=True).sum(-1, keepdim=True) + v.sum(-2, keepdim=True)).to(q.dtype)
        if rest.shape[-3:-2] != q.shape[-3:-2]:
            rest = rest.repeat_interleave(q.shape[-3] // rest.shape[-3], dim=-3)
        return q.sum(-1, keepdim=True) + rest


def forward_cost(run: Callable[[], Tensor], model: nn.Module) -> Pass:
    """Cost of one forward pass with gradients.

    Args:
        run: calls the model with inputs on the meta device and returns its output.
        model: whose parameters are not counted among the saved tensors.

    Raises:
        Exception: what the model raises where it reads values, which meta tensors don't have.
    """
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # an address counts once only while its owner lives
        return tensor

    recorder = _AttentionRecorder()
    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), counter, recorder:
        run()
    flops = counter.get_total_flops() + sum(call.flops for call in recorder.calls)
    return Pass(tuple(recorder.calls), flops, sum(kept.values()) + recorder.saved)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a large matrix product: what a dense model can hope for."""
    import time

    size = 4096 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    product, count = a @ a, 0
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        product = a @ a
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    del product
    return count * 2 * size**3 / (time.perf_counter() - start)
