"""What the operators accept. Every message says what was found, what is valid and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def attention(q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, block_size: int) -> None:
    """Raise ValueError unless q [B, H, S, D], k and v [B, Hkv, T, D] and key_mask [B|1, T] or [B|1, H|1, T] fit."""
    tensors = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; expected a tensor [batch, heads, tokens, head_dim].")
        if x.layout != torch.strided or x.is_nested:
            raise ValueError(f"{name} has the layout {'nested' if x.is_nested else x.layout}; give a dense tensor.")
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected 4 dimensions [batch, heads, tokens, head_dim]."
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}; "
                "give q, k and v one dtype and device."
            )
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}; valid are {', '.join(map(str, DTYPES))}. Cast q, k and v.")
    (B, H, _, D), (Bk, Hkv, T, Dk) = q.shape, k.shape
    if B != Bk or D != Dk or Hkv == 0 or H % Hkv:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} don't fit: "
            "batch and head_dim must be equal and q's heads a multiple of k's."
        )
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)} and k {tuple(k.shape)}; they must be equal.")
    if not 0 < D <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {D}; valid are 1 to {MAX_HEAD_DIM}. Use dense attention for wider heads.")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}; valid are {', '.join(map(str, BLOCK_SIZES))}.")
    if key_mask is not None:
        _key_mask(key_mask, B, H, T, q.device)


def _key_mask(key_mask: Tensor, B: int, H: int, T: int, device: torch.device) -> None:
    if not isinstance(key_mask, Tensor):
        raise ValueError(f"key_mask is a {type(key_mask).__name__}; expected a tensor [{B}, {T}], bool or float.")
    shape = tuple(key_mask.shape)
    heads = shape[1:-1]
    if len(shape) not in (2, 3) or shape[-1] != T or shape[0] not in (1, B) or (heads and heads[0] not in (1, H)):
        raise ValueError(f"key_mask has shape {shape}; expected [{B} or 1, {T}] or [{B} or 1, {H} or 1, {T}].")
    if key_mask.dtype != torch.bool and not key_mask.is_floating_point():
        raise ValueError(
            f"key_mask is {key_mask.dtype}; expected bool (True: attend) or a float that is added to the scores."
        )
    if key_mask.device != device:
        raise ValueError(f"key_mask is on {key_mask.device} but q is on {device}; move it there.")


def lists(q: Tensor, k: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, block_size: int) -> None:
    """Raise ValueError unless the lists are int32 [B|1, H|1, nQ] and [B|1, H|1, nQ, capacity] of these q and k."""
    B, H, nQ = q.shape[0], q.shape[1], -(-q.shape[2] // block_size)
    for name, x, rank in (("kv_num_blocks", kv_num_blocks, 3), ("kv_indices", kv_indices, 4)):
        if x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}; expected torch.int32 on {q.device}.")
        if x.dim() != rank or x.shape[0] not in (1, B) or x.shape[1] not in (1, H) or x.shape[2] != nQ:
            tail = "" if rank == 3 else ", capacity"
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected [{B} or 1, {H} or 1, {nQ}{tail}] "
                f"for {q.shape[2]} query tokens in blocks of {block_size}."
            )
    if kv_num_blocks.shape != kv_indices.shape[:3]:
        raise ValueError(
            f"kv_num_blocks {tuple(kv_num_blocks.shape)} and kv_indices {tuple(kv_indices.shape)} "
            "differ in their first three sizes."
        )


def bad_count(value: int, where: tuple[int, int, int], capacity: int) -> ValueError:
    """The error for a count of blocks that the lists can't hold; ``where``: batch, head, query block."""
    return ValueError(
        f"kv_num_blocks holds {value} at {_place(where)}; valid are 0 to {capacity}, the last size of kv_indices."
    )


def bad_index(value: int, where: tuple[int, int, int], num_keys: int, block_size: int) -> ValueError:
    """The error for a listed block that doesn't exist."""
    blocks = -(-num_keys // block_size)
    return ValueError(
        f"kv_indices holds {value} at {_place(where)}; valid are 0 to {blocks - 1}, "
        f"because {num_keys} key tokens make {blocks} blocks of {block_size}."
    )


def _place(where: tuple[int, int, int]) -> str:
    return "batch {}, head {}, query block {}".format(*where)


def entries(
    kv_num_blocks: Tensor, kv_indices: Tensor, num_keys: int, block_size: int, *, duplicates: bool = False
) -> None:
    """Raise ValueError where a count or a listed block is out of range. Reads the lists: waits for a device.

    ``duplicates``: also where a row lists a block twice, which a softmax would count twice.
    """
    capacity = kv_indices.shape[-1]
    wrong = (kv_num_blocks < 0) | (kv_num_blocks > capacity)
    if wrong.any():
        b, h, row = wrong.nonzero()[0].tolist()
        raise bad_count(int(kv_num_blocks[b, h, row]), (b, h, row), capacity)
    used = torch.arange(capacity, device=kv_indices.device) < kv_num_blocks[..., None]
    wrong = used & ((kv_indices < 0) | (kv_indices >= -(-num_keys // block_size)))
    if wrong.any():
        b, h, row, entry = wrong.nonzero()[0].tolist()
        raise bad_index(int(kv_indices[b, h, row, entry]), (b, h, row), num_keys, block_size)
    if duplicates:
        _no_duplicates(kv_indices, used)


def _no_duplicates(kv_indices: Tensor, used: Tensor) -> None:
    distinct = -1 - torch.arange(kv_indices.shape[-1], device=kv_indices.device)  # past the count: nothing's equal
    ordered = torch.where(used, kv_indices.long(), distinct).sort(-1).values
    twice = ordered[..., 1:] == ordered[..., :-1]
    if twice.any():
        b, h, row, entry = twice.nonzero()[0].tolist()
        raise ValueError(
            f"kv_indices lists block {int(ordered[b, h, row, entry])} twice at {_place((b, h, row))}; "
            "each key block may be listed once."
        )
