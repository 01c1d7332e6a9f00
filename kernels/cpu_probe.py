"""ASA mask prediction on the CPU: checks and launches of ``cpu_probe.cpp`` (BLADE section 3.2, algorithms 1.2).

Equals ``reference.py``: maps within fp32 rounding, selections of one map exactly. A sample's result has the same bits
alone and in a batch, on any number of threads. Memory beyond the outputs, per thread: the sampled keys of one head
(nK * p * D fp32), one strip (nK * 64 fp32) and the map rows of up to 64 / p query blocks.

Shapes: B batch, H query heads, Hkv key heads, S query tokens, T key tokens, D head dim, p probe tokens per block,
nQ = ceil(S / block), nK = ceil(T / block).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import cpu_build
from .reference import keep_count

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in cpu_simd.h
_NO_MEMORY = 1  # Status in cpu_tensor.h


class _Tensor(ctypes.Structure):
    """Tensor in cpu_tensor.h."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4)]


class _Selection(ctypes.Structure):
    """Selection in cpu_select.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "low", "high")),
        ("tau", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("force_q", "force_k")),
    ]


class _Probe(ctypes.Structure):
    """Probe in cpu_probe.cpp."""

    _fields_ = [
        *((name, _Tensor) for name in ("q", "k")),
        ("bias", ctypes.c_void_p),
        ("bias_stride", ctypes.c_int64 * 3),
        *((name, ctypes.c_void_p) for name in ("pos_q", "pos_k", "map", "num", "idx")),
        ("selection", _Selection),
        *((name, ctypes.c_int64) for name in ("type", "B", "H", "Hkv", "S", "T", "D", "block", "pq", "pk")),
        ("scale", ctypes.c_double),
    ]


def available() -> bool:
    """Whether the C++ library could be built; the first call builds it."""
    return cpu_build.load() is not None


def probe_map(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_size: int,
    positions_q: Tensor,
    positions_k: Tensor,
    isa: str | None = None,
) -> Tensor:
    """Predicted importance of each block, fp32 [B, H, nQ, nK]; see ``reference.probe_map``.

    Args:
        q, k: [B, H, S, D] and [B, Hkv, T, D], fp32, bf16 or fp16, any strides.
        key_bias: fp32 [B|1, H|1, T] added to the scores (-inf: never attended to), or None.
        scale: factor of the scores.
        block_size: tokens in a query block and in a key block.
        positions_q, positions_k: int32 or int64 [H, nQ, p] and [H, nK, p] sampled tokens, -1: none.
        isa: forces a variant of the library; see ``cpu_build``.

    Raises:
        ValueError: inputs of another dtype, device or shape.
        RuntimeError: the library could not be built (see ``available``).
    """
    args, keep_alive = _arguments(q, k, key_bias, scale, block_size, positions_q, positions_k)
    block_map = torch.empty(args.B, args.H, positions_q.shape[1], positions_k.shape[1])
    args.map = block_map.data_ptr()
    _call(isa, "blade_probe", ctypes.byref(args))
    del keep_alive
    return block_map


def predict(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_size: int,
    positions_q: Tensor,
    positions_k: Tensor,
    sparsity: float | None = None,
    tau: float = 0.95,
    min_keep: float = 0.05,
    max_keep: float = 1.0,
    force_q: Tensor | None = None,
    force_k: Tensor | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``select_blocks(probe_map(...))`` without ever holding the map; arguments as there.

    Returns:
        ``kv_num_blocks`` int32 [B, H, nQ] and ``kv_indices`` int32 [B, H, nQ, nK], ascending, 0 past the count.
    """
    args, keep_alive = _arguments(q, k, key_bias, scale, block_size, positions_q, positions_k)
    nQ, nK = positions_q.shape[1], positions_k.shape[1]
    args.selection, forced = _selection(nQ, nK, sparsity, tau, min_keep, max_keep, force_q, force_k)
    num, idx = _empty_lists(args.B, args.H, nQ, nK)
    args.num, args.idx = num.data_ptr(), idx.data_ptr()
    _call(isa, "blade_probe", ctypes.byref(args))
    del keep_alive, forced
    return num, idx


def select_blocks(
    block_map: Tensor,
    sparsity: float | None = None,
    tau: float = 0.95,
    min_keep: float = 0.05,
    max_keep: float = 1.0,
    force_q: Tensor | None = None,
    force_k: Tensor | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Block lists of a map of values >= 0 or NaN, fp32 [B, H, nQ, nK]; see ``reference.select_blocks``.

    Args:
        sparsity: share of the blocks to drop by score, or None: ``tau``, ``min_keep`` and ``max_keep`` decide.
        force_q, force_k: bool [nQ] and [nK], rows and columns that are kept whole, on top of the budget; or None.
    """
    if block_map.dim() != 4 or block_map.dtype != torch.float32 or block_map.device.type != "cpu":
        raise ValueError(f"block_map must be fp32 [B, H, nQ, nK] on the CPU, found {_describe(block_map)}")
    block_map = block_map.contiguous()
    B, H, nQ, nK = block_map.shape
    selection, forced = _selection(nQ, nK, sparsity, tau, min_keep, max_keep, force_q, force_k)
    num, idx = _empty_lists(B, H, nQ, nK)
    sizes = (ctypes.c_int64(n) for n in (num.numel(), nQ, nK))
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (num, idx))
    _call(isa, "blade_select", ctypes.c_void_p(block_map.data_ptr()), *sizes, ctypes.byref(selection), *pointers)
    del forced
    return num, idx


def _empty_lists(B: int, H: int, nQ: int, nK: int) -> tuple[Tensor, Tensor]:
    return torch.empty(B, H, nQ, dtype=torch.int32), torch.empty(B, H, nQ, nK, dtype=torch.int32)


def _arguments(
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_size: int,
    positions_q: Tensor,
    positions_k: Tensor,
) -> tuple[_Probe, list[Tensor]]:
    """The C structure without outputs and selection, and the tensors that must outlive the call."""
    _check_inputs(q, k, key_bias, block_size, positions_q, positions_k)
    (B, H, S, D), (_, Hkv, T, _) = q.shape, k.shape
    keep_alive = [x.to(torch.int32).contiguous() for x in (positions_q, positions_k)]
    args = _Probe(q=_tensor(q), k=_tensor(k), type=_DTYPES[q.dtype], B=B, H=H, Hkv=Hkv, S=S, T=T, D=D, block=block_size)
    args.pos_q, args.pos_k = (x.data_ptr() for x in keep_alive)
    args.pq, args.pk, args.scale = positions_q.shape[-1], positions_k.shape[-1], scale
    if key_bias is not None:
        key_bias = key_bias.expand(B, H, T)
        keep_alive.append(key_bias)
        args.bias, args.bias_stride = key_bias.data_ptr(), (ctypes.c_int64 * 3)(*key_bias.stride())
    return args, keep_alive


def _check_inputs(
    q: Tensor, k: Tensor, key_bias: Tensor | None, block_size: int, positions_q: Tensor, positions_k: Tensor
) -> None:
    if q.dtype not in _DTYPES or k.dtype != q.dtype or q.device.type != "cpu" or k.device.type != "cpu":
        raise ValueError(
            f"q and k must share one of fp32, bf16, fp16 on the CPU, found {_describe(q)} and {_describe(k)}"
        )
    fits = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape[1] > 0
    if not fits or q.shape[1] % k.shape[1] or not min(*q.shape, *k.shape):
        raise ValueError(
            "q must be [B, H, S, D] and k [B, Hkv, T, D] with H a multiple of Hkv and no empty dimension, "
            f"found {_describe(q)} and {_describe(k)}"
        )
    for name, positions, tokens in (("positions_q", positions_q, q.shape[2]), ("positions_k", positions_k, k.shape[2])):
        blocks = (q.shape[1], -(-tokens // block_size))
        if positions.dim() != 3 or positions.shape[:2] != blocks or not 1 <= positions.shape[2] <= block_size:
            raise ValueError(
                f"{name} must be [H, nB, p], (H, nB) = {blocks}, p in 1..{block_size}, found {_describe(positions)}"
            )
    if key_bias is not None:
        full = (q.shape[0], q.shape[1], k.shape[2])
        fits = key_bias.dim() == 3 and all(n in (1, m) for n, m in zip(key_bias.shape, full, strict=True))
        if not fits or key_bias.shape[2] != full[2] or key_bias.dtype != torch.float32:
            raise ValueError(f"key_bias must be fp32 [B|1, H|1, T] = {full}, found {_describe(key_bias)}")


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"


def _tensor(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), (ctypes.c_int64 * 4)(*x.stride()))


def _selection(
    nQ: int,
    nK: int,
    sparsity: float | None,
    tau: float,
    min_keep: float,
    max_keep: float,
    force_q: Tensor | None,
    force_k: Tensor | None,
) -> tuple[_Selection, list[Tensor]]:
    """The C structure, and the tensors that must outlive the call."""
    low, high = keep_count(min_keep, nK), keep_count(max_keep, nK)
    selection = _Selection(count=0, low=min(low, high), high=high, tau=tau)
    if sparsity is not None:
        selection.count = keep_count(1 - sparsity, nK)
    keep_alive = []
    for name, forced, blocks in (("force_q", force_q, nQ), ("force_k", force_k, nK)):
        if forced is None:
            continue
        if forced.shape != (blocks,) or forced.dtype != torch.bool:
            raise ValueError(f"{name} must be bool [{blocks}], found {_describe(forced)}")
        keep_alive.append(forced.cpu().contiguous())
        setattr(selection, name, keep_alive[-1].data_ptr())
    return selection, keep_alive


def _call(isa: str | None, name: str, *args: object) -> None:
    library = cpu_build.load(isa)
    if library is None:
        raise RuntimeError("blade's C++ kernels could not be built here: see the warning of the logger blade_compile")
    status = getattr(library, name)(*args, ctypes.c_void_p(cpu_build.parallel_for()))
    if status == _NO_MEMORY:
        raise MemoryError(f"{name}: no memory for one strip per thread")
    if status:
        raise ValueError("a sampled position is not a token: positions must be below the number of tokens, -1 for none")
