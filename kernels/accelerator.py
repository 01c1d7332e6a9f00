"""What runs a call on an accelerator: the Triton kernels where chip, dtype and sizes allow it, else ATen operators.

Nothing here loads Triton before the first call that needs it. Where it is missing or can't compile, ATen runs and one
warning says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import aten, checks, global_blocks, reference

logger = logging.getLogger("blade_compile")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK_SIZES = (64, 128)
OLDEST = (8, 0)  # the first NVIDIA chips that multiply bf16 matrices

_launched = False
_broken = False
Result = TypeVar("Result")


def family(device: torch.device, dtype: torch.dtype) -> str:
    """The cost table's entry for what runs a call on the device."""
    chip = _chip(device) if dtype in DTYPES else None
    return "accelerator-aten" if chip is None or _launchers() is None else chip


def search_tiles() -> None:
    """``max-autotune``: from now on the first launch of each kernel class tries more tiles than the table's."""
    if torch.cuda.is_available() and _launchers() is not None:
        from . import triton_configs

        triton_configs.search_from_now_on()


def runs_triton(q: Tensor, block_size: int) -> bool:
    """Whether the Triton kernels run a call; ATen does otherwise."""
    fits = q.dtype in DTYPES and block_size in BLOCK_SIZES and q.shape[-1] <= checks.MAX_HEAD_DIM
    return fits and not _broken and _chip(q.device) is not None and _launchers() is not None


def select(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float,
    block_size: int,
    probe_tokens: int,
    seed: int,
    *how: Any,
) -> tuple[Tensor, Tensor, str]:
    """Block lists as `aten.select` makes them, and what ran."""
    probe = (block_size, probe_tokens, seed)

    def with_triton() -> tuple[Tensor, Tensor]:
        block_map = _use().probe_map(q, k, bias, scale, *probe)
        return _use().select(block_map, *how)  # type: ignore[no-any-return]

    return *_run(q, block_size, with_triton, lambda: aten.select(q, k, bias, scale, *probe, *how)), path(q, block_size)


def probe_map(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, block_size: int, probe_tokens: int, seed: int
) -> Tensor:
    """The map of sampled tokens, [B, H, nQ, nK]; see `reference.probe_map`."""
    call = (q, k, bias, scale, block_size, probe_tokens, seed)
    return _run(q, block_size, lambda: _use().probe_map(*call), lambda: aten.probe_map(*call))


def select_blocks(block_map: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    """`reference.select_blocks` of a map that a policy made."""
    if _broken or _chip(block_map.device) is None or _launchers() is None:
        return reference.select_blocks(block_map, *how)
    return _or_aten(lambda: _use().select(block_map, *how), lambda: reference.select_blocks(block_map, *how))


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, bias: Tensor | None, scale: float, block_size: int
) -> tuple[Tensor, Tensor, str]:
    """Out in the flash layout, LSE, and what ran."""
    call = (q, k, v, num, idx, bias, scale, block_size)
    found = _run(q, block_size, lambda: _use().attention_forward(*call), lambda: aten.attention_forward(*call))
    return *found, path(q, block_size)


def global_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num: Tensor,
    idx: Tensor,
    bias: Tensor | None,
    scale: float,
    block_size: int,
    tokens: global_blocks.GlobalTokens,
) -> tuple[Tensor, Tensor, str]:
    """`attention_forward` with global tokens in the same softmax."""
    call = (q, k, v, num, idx, bias, scale, block_size)

    def with_triton() -> tuple[Tensor, Tensor]:
        return _use().attention_forward(*call, **tokens.named())  # type: ignore[no-any-return]

    found = _run(q, block_size, with_triton, lambda: global_blocks.forward(aten.attention_forward, *call, tokens))
    return *found, path(q, block_size)


def traceable_forward(
    q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, bias: Tensor | None, scale: float, block_size: int
) -> tuple[Tensor, Tensor]:
    """The Triton forward for a tracer: each kernel launch becomes a node of its graph."""
    from . import triton_common

    with triton_common.traceable():
        return _use().attention_forward(q, k, v, num, idx, bias, scale, block_size)  # type: ignore[no-any-return]


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num: Tensor,
    idx: Tensor,
    bias: Tensor | None,
    scale: float,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in the flash layout."""
    call = (grad_out, grad_lse, q, k, v, out, lse, num, idx, bias, scale, block_size)
    return _run(q, block_size, lambda: _use().attention_backward(*call), lambda: aten.attention_backward(*call))


def global_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num: Tensor,
    idx: Tensor,
    bias: Tensor | None,
    scale: float,
    block_size: int,
    tokens: global_blocks.GlobalTokens,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of the global keys and values."""
    call = (grad_out, grad_lse, q, k, v, out, lse, num, idx, bias, scale, block_size)

    def with_triton() -> tuple[Tensor, ...]:
        return _use().attention_backward(*call, **tokens.named())  # type: ignore[no-any-return]

    return _run(q, block_size, with_triton, lambda: global_blocks.backward(aten.attention_backward, *call, tokens))


def path(q: Tensor, block_size: int) -> str:
    """What the report calls the implementation of a call."""
    return "triton" if runs_triton(q, block_size) else "aten"


def _run(q: Tensor, block_size: int, with_triton: Callable[[], Result], with_aten: Callable[[], Result]) -> Result:
    """One of the two."""
    return _or_aten(with_triton, with_aten) if runs_triton(q, block_size) else with_aten()


def _or_aten(with_triton: Callable[[], Result], with_aten: Callable[[], Result]) -> Result:
    """A Triton that has never launched anything and fails is broken: ATen runs from then on."""
    global _launched, _broken
    try:
        result = with_triton()
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if _launched:
            raise
        _broken = True
        logger.warning("Triton can't run here (%s: %s): the slower ATen path is used.", type(error).__name__, error)
        logger.debug("details", exc_info=True)
        return with_aten()
    _launched = True
    return result


def _chip(device: torch.device) -> str | None:
    """``cuda-sm90`` or ``hip-gfx942``; None for a device that the kernels are not written for."""
    if device.type != "cuda":
        return None
    return _chip_of(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _chip_of(index: int) -> str | None:
    if torch.version.hip:
        return f"hip-{torch.cuda.get_device_properties(index).gcnArchName.split(':')[0]}"
    capability = torch.cuda.get_device_capability(index)
    return f"cuda-sm{capability[0]}{capability[1]}" if capability >= OLDEST else None


def _use() -> SimpleNamespace:
    launchers = _launchers()
    assert launchers is not None
    return launchers


@functools.cache
def _launchers() -> SimpleNamespace | None:
    """The launchers of the Triton kernels, loaded at first use; None and one warning where there is no Triton."""
    try:
        from . import triton_backward, triton_forward, triton_probe, triton_select
    except Exception as error:  # noqa: BLE001 (a broken installation raises anything)
        logger.warning(
            "Triton is not available and the slower ATen path is used (%s: %s).", type(error).__name__, error
        )
        return None
    return SimpleNamespace(
        attention_forward=triton_forward.attention_forward,
        attention_backward=triton_backward.attention_backward,
        probe_map=triton_probe.probe_map,
        select=triton_select.select,
    )
