"""The operator ``blade::token_order``, and tokens permuted on the way into an attention and back on the way out.

    blade::token_order    grid, order -> the permutation and its inverse, on the device

Only the two permutations are opaque to Inductor. Tensors are permuted by ``index_select``, which it fuses into the
kernels that norm and rotate q and k, and so are their gradients.

A grid that does not multiply to the tokens gives the identity here, with one warning: a compiled model may be called
at another resolution than the one its ``grid`` was given for. ``check_grid`` is what direct calls raise with.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import compat, lists, order
from .library import TAGS, library

logger = logging.getLogger("blade_compile")

library.define(
    "token_order(SymInt[] grid, str order, int block_size, SymInt num_tokens, SymInt[] protect, Device device) "
    "-> (Tensor order, Tensor inverse)",
    tags=TAGS,
)


# --- the operator ----------------------------------------------------------------------------------------------------


def _token_order(
    grid: Sequence[int], name: str, block_size: int, num_tokens: int, protect: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where each place of the permuted sequence reads from, and the inverse: int64 [num_tokens], fresh each time.

    grid: (T, H, W) of the tokens that are not protected. protect: flat (start, length) ranges that keep their places.
    """
    key = (
        tuple(grid),
        name,
        block_size,
        num_tokens,
        tuple(protect or ()),
        str(device),
    )  # None: AOTInductor's empty list
    forward, backward = _kept(key, device)
    return forward.clone(), backward.clone()


def _token_order_fake(
    grid: Sequence[int], name: str, block_size: int, num_tokens: int, protect: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(num_tokens, dtype=torch.int64, device=device),
        torch.empty(num_tokens, dtype=torch.int64, device=device),
    )


def _by_device(*args: object) -> tuple[Tensor, Tensor]:
    """No argument is a tensor, so the dispatcher has to be told where to go on."""
    device = args[-1]
    assert isinstance(device, torch.device)
    keys = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(torch._C._dispatch_key_for_device(device.type)))
    return torch.ops.blade.token_order.default.redispatch(keys, *args)  # type: ignore[no-any-return]


library.impl("token_order", _token_order, "CompositeExplicitAutograd")
library.impl("token_order", _by_device, "BackendSelect")
torch.library.register_fake("blade::token_order", _token_order_fake, lib=library)


# --- permutations on their devices -----------------------------------------------------------------------------------

_Key = tuple[tuple[int, ...], str, int, int, tuple[int, ...], str]
_KEEP = 32
_cache: OrderedDict[_Key, tuple[Tensor, Tensor]] = OrderedDict()
_lock = threading.Lock()


def _kept(key: _Key, device: torch.device) -> tuple[Tensor, Tensor]:
    """The permutation and its inverse, copied to the device at the first call only: a CUDA graph can be captured."""
    with _lock:
        found = _cache.get(key)
        if found is None:
            found = _cache[key] = _on_device(_permutation(*key[:5]), device)
            while len(_cache) > _KEEP:
                _cache.popitem(last=False)
        _cache.move_to_end(key)
        return found


def _on_device(forward: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    both = torch.stack((forward, order.inverse(forward)))
    if device.type != "cuda":
        both = both.to(device)
        return both[0], both[1]
    # A CUDA graph that is being made owns what its thread allocates, and takes it back: another thread allocates.
    moved: list[Tensor] = []
    stream = torch.cuda.current_stream(device)

    def move() -> None:
        with torch.cuda.stream(stream):
            moved.append(both.to(device))

    worker = threading.Thread(target=move)
    worker.start()
    worker.join()
    if not moved:
        raise RuntimeError(f"the token order could not be copied to {device}; run the model once before capturing it.")
    return moved[0][0], moved[0][1]


def _permutation(
    grid: tuple[int, ...], name: str, block_size: int, num_tokens: int, protect: tuple[int, ...]
) -> Tensor:
    """int64 [num_tokens] on the CPU; the identity, with a warning, where the grid does not fit."""
    out = torch.arange(num_tokens)
    free = torch.ones(num_tokens, dtype=torch.bool)
    for start, length in lists.spans(protect, num_tokens):
        free[start : start + length] = False
    places = out[free]
    if prod(grid) != places.numel():
        _warn_once(f"{_misfit(grid, num_tokens, places.numel())} The tokens stay in their order.")
        return out
    out[free] = places[order.token_order(name, grid, block_size)]
    return out


@functools.cache
def _warn_once(message: str) -> None:
    """One warning per distinct message and process."""
    logger.warning("%s", message)


def _misfit(grid: Sequence[int], num_tokens: int, free: int) -> str:
    product = " x ".join(map(str, grid))
    protected = f" ({num_tokens} tokens, {num_tokens - free} of them protected)" if num_tokens != free else ""
    return f"grid is {product} = {prod(grid)} tokens, but {free} tokens are to be ordered{protected}."


def check_grid(grid: Sequence[int], num_tokens: int, protect: Sequence[int] = ()) -> None:
    """Raise ValueError unless the sizes (T, H, W) multiply to the tokens less those in the flat ranges ``protect``."""
    if len(grid) != 3 or any(size < 1 for size in grid):
        raise ValueError(f"grid is {tuple(grid)}; expected three sizes (T, H, W), each at least 1.")
    free = num_tokens - sum(length for _, length in lists.spans(protect, num_tokens))
    if prod(grid) != free:
        raise ValueError(
            f"{_misfit(grid, num_tokens, free)} Give the grid of this call, name all tokens outside it in protect, or "
            "leave order='none'."
        )


# --- around an attention ---------------------------------------------------------------------------------------------


def reordered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    grid: Sequence[int],
    name: str,
    block_size: int,
    protect_q: Sequence[int],
    protect_k: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k, v and the key mask with their tokens in the order ``name``; and the inverse for ``restored``.

    A side whose unprotected tokens are known not to be those of the grid stays as it is (keys = cache + new chunk);
    the inverse is None where that is the queries' side. Sizes and ranges may be symbolic: nothing is guarded on.

    Args:
        q, k, v: [B, H, S, D] and [B, Hkv, T, D].
        key_mask: [B|1, T] or [B|1, H|1, T], bool or additive, or None.
        grid: (T, H, W), or empty for an unknown one; then nothing is reordered.
        name: "none", "gilbert" or "tile".
        block_size: tokens in a block: what a tile holds.
        protect_q, protect_k: flat (start, length) ranges outside the grid, which keep their places.
    """
    if name == "none" or not grid:
        return q, k, v, key_mask, None
    S, T = q.shape[2], k.shape[2]
    order_q = order_k = inverse_q = None
    if _may_fit(grid, S, protect_q):
        order_q, inverse_q = torch.ops.blade.token_order.default(grid, name, block_size, S, protect_q, q.device)
    if _alike((S, *protect_q), (T, *protect_k)):
        order_k = order_q
    elif _may_fit(grid, T, protect_k):
        order_k, _ = torch.ops.blade.token_order.default(grid, name, block_size, T, protect_k, q.device)
    if order_q is not None:
        q = permuted(q, order_q)
    if order_k is not None:
        k, v = permuted(k, order_k), permuted(v, order_k)
        key_mask = None if key_mask is None else key_mask.index_select(-1, order_k)
    return q, k, v, key_mask, inverse_q


def restored(out: Tensor, inverse: Tensor | None) -> Tensor:
    """The output [B, H, S, D] of an attention over reordered queries, its tokens in their places again."""
    return out if inverse is None else permuted(out, inverse)


def permuted(x: Tensor, places: Tensor) -> Tensor:
    """Tokens ``places`` (a permutation, int64 [N]) of x [B, H, N, D]."""
    if torch.is_grad_enabled() and x.requires_grad:
        with compat.single_level_functions():
            return _Permuted.apply(x, places)  # type: ignore[attr-defined, no-any-return]
    return x.index_select(2, places)


class _Permuted(_SingleLevelFunction):
    """``index_select`` whose gradient is one too: PyTorch's own adds with atomics, as if an index could come twice."""

    @staticmethod
    def forward(x: Tensor, places: Tensor) -> Tensor:
        return x.index_select(2, places)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        ascending = torch.arange(places.shape[0], dtype=places.dtype, device=places.device)
        return permuted(grad, torch.empty_like(places).scatter(0, places, ascending)), None


def _alike(one: Sequence[int], two: Sequence[int]) -> bool:
    """Whether sizes are equal, for all values of their symbols; nothing is guarded on."""
    return len(one) == len(two) and all(statically_known_true(a == b) for a, b in zip(one, two))


def _may_fit(grid: Sequence[int], num_tokens: int, protect: Sequence[int]) -> bool:
    """False where the grid is known not to multiply to the unprotected tokens."""
    if all(isinstance(n, int) for n in (num_tokens, *protect)):
        protect = [n for span in lists.spans(protect, num_tokens) for n in span]  # clipped, and merged
    free = num_tokens - sum(protect[1::2])
    return not statically_known_true(prod(grid) != free)
