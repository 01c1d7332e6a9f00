"""Block-sparse attention on the CPU: allocates the results and calls the C++ kernels of cpu_forward.cpp and
cpu_backward.cpp through ctypes.

Results are bit-equal between runs and do not depend on the number of threads: each task owns what it writes and sums
in the order of its list.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from . import checks, cpu_build

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OK, _NO_MEMORY, _BAD_COUNT, _BAD_INDEX = range(4)


class _Tensor(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64 * 4))


class _Lists(ctypes.Structure):
    _fields_ = (
        ("count", c_void_p),
        ("index", c_void_p),
        ("count_stride", c_int64 * 3),
        ("index_stride", c_int64 * 3),
        ("capacity", c_int64),
        ("query_blocks", c_int64),
        ("key_blocks", c_int64),
    )


class _Problem(ctypes.Structure):
    _fields_ = (
        ("q", _Tensor),
        ("k", _Tensor),
        ("v", _Tensor),
        ("lists", _Lists),
        ("bias", c_void_p),
        ("bias_stride", c_int64 * 3),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "dim", "block")),
        ("scale", c_float),
        ("dtype", c_int32),
    )


class _BadEntry(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("batch", "head", "row", "value"))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the listed blocks.

    Args:
        q: [B, H, S, D] fp32, bf16 or fp16; k and v: [B, Hkv, T, D]; any strides (a last stride other than 1 costs a
            copy of k or v).
        kv_num_blocks, kv_indices: int32 lists [B|1, H|1, nQ] and [B|1, H|1, nQ, capacity], any order.
        key_bias: None or fp32 [B|1, H|1, T], added to the scaled scores; -inf hides a key.

    Returns:
        out [B, H, S, D] in q's dtype (a view of a contiguous [B, S, H, D]) and the natural log-sum-exp [B, H, S] in
        fp32. Rows with nothing to attend to hold 0 and -inf.

    Raises:
        ValueError: a count or an index of the lists is out of range.
    """
    problem, kept_alive = _describe(q, k, v, kv_num_blocks, kv_indices, key_bias, scale, block_size)
    out = _empty_like_flash(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    _call("blade_attention_forward", problem, (_tensor(out), lse.data_ptr()))
    del kept_alive
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    key_bias: Tensor | None,
    scale: float,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention_forward`` with respect to q, k and v, given its results and their gradients.

    Returns:
        dq, dk, dv in the dtype of q; each a view of a contiguous [batch, tokens, heads, dim]. dk and dv are sums over
        the query heads of a group, in fp32 until the end.
    """
    problem, kept_alive = _describe(q, k, v, kv_num_blocks, kv_indices, key_bias, scale, block_size)
    grad_out, lse = grad_out.to(q.dtype), lse.contiguous()
    dq, dk, dv = _empty_like_flash(q), _empty_like_flash(k), _empty_like_flash(v)
    if grad_lse is not None:
        grad_lse = grad_lse.to(torch.float32).contiguous()
    pointers = (lse.data_ptr(), None if grad_lse is None else grad_lse.data_ptr())
    _call("blade_attention_backward", problem, (*map(_tensor, (out, grad_out)), *pointers, *map(_tensor, (dq, dk, dv))))
    del kept_alive
    return dq, dk, dv


def _empty_like_flash(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape, in the layout that projections around attention read without a copy."""
    B, H, S, D = x.shape
    return torch.empty(B, S, H, D, dtype=x.dtype).transpose(1, 2)


def _tensor(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), (c_int64 * 4)(*x.stride()))


def _describe(
    q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, bias: Tensor | None, scale: float, block_size: int
) -> tuple[_Problem, tuple[Tensor | None, ...]]:
    """The C structure, and tensors that have to outlive its use."""
    (B, H, S, D), (_, Hkv, T, _) = q.shape, k.shape
    nQ, nK = -(-S // block_size), -(-T // block_size)
    if idx.stride(-1) != 1:
        idx = idx.contiguous()
    num_rows, idx_rows = num.expand(B, H, nQ), idx.expand(B, H, nQ, idx.shape[-1])  # broadcast: stride 0
    lists = _Lists(
        num.data_ptr(),
        idx.data_ptr(),
        (c_int64 * 3)(*num_rows.stride()),
        (c_int64 * 3)(*idx_rows.stride()[:3]),
        idx.shape[-1],
        nQ,
        nK,
    )
    strides: tuple[int, ...] = (0, 0, 0)
    if bias is not None:
        bias = bias.to(torch.float32)
        strides = bias.expand(B, H, T).stride()
    problem = _Problem(
        *map(_tensor, (q, k, v)),
        lists,
        None if bias is None else bias.data_ptr(),
        (c_int64 * 3)(*strides),
        *(B, H, Hkv, S, T, D, block_size),
        scale,
        _DTYPES[q.dtype],
    )
    return problem, (idx, bias)


def _call(name: str, problem: _Problem, arguments: tuple[_Tensor | int | None, ...]) -> None:
    """Run a kernel; its status as an exception. ctypes releases the GIL meanwhile."""
    library = cpu_build.load()
    if library is None:
        raise RuntimeError("the C++ kernels could not be built here; use the ATen path")
    bad = _BadEntry()
    passed = [ctypes.byref(a) if isinstance(a, _Tensor) else c_void_p(a) for a in arguments]
    status = getattr(library, name)(
        ctypes.byref(problem), *passed, ctypes.byref(bad), c_void_p(cpu_build.parallel_for())
    )
    if status == _OK:
        return
    if status == _NO_MEMORY:
        raise MemoryError("blade's CPU attention could not allocate its scratch memory")
    where = (bad.batch, bad.head, bad.row)
    if status == _BAD_COUNT:
        raise checks.bad_count(bad.value, where, problem.lists.capacity)
    if status == _BAD_INDEX:
        raise checks.bad_index(bad.value, where, problem.keys, problem.block)
    raise ValueError(f"block_size is {problem.block}; valid are 16, 32, 64 and 128.")
