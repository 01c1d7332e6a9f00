"""The sampled block map of ASA on a GPU (BLADE section 3.2, algorithms 1.2): two Triton kernels.

Equals ``reference.probe_map`` within fp32 rounding, on exactly the same sampled tokens. The first kernel gathers each
head's sampled keys; the second holds the sampled queries of several blocks and goes over those keys twice: for the
largest score and the denominator of each row, then for the largest weight of each cell.

Memory beyond the map: the gathered keys, B * H * nK' * p' rows of D' elements in k's dtype, where p' and D' are p and
D rounded up to powers of two and nK' is nK rounded up to whole tiles (at most 128 / p' blocks); with a key bias, or
where samples are missing, another B * H * nK' * (p' + 1) fp32. Nothing has the size of tokens times blocks.

Shapes: B batch, H query heads, Hkv key heads, S query tokens, T key tokens, D head dim, p probe tokens per block,
nQ = ceil(S / block), nK = ceil(T / block).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_common, triton_configs

LOG2E = 1.4426950408889634
SIDE_K = 0x9E3779B9


@triton.jit
def _mix(x):
    """The murmur3 finaliser, uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def sampled_tokens(seed, head, block, stratum, num_tokens, BLOCK_SIZE: tl.constexpr, PROBE: tl.constexpr):
    """The token drawn from a stratum of a block, or -1: ``reference.probe_positions``. ``seed``: `hashed_seed`'s."""
    length = tl.minimum(num_tokens - block * BLOCK_SIZE, BLOCK_SIZE)
    # A block of fewer tokens than strata has one stratum for each token.
    whole = length >= PROBE
    low = tl.where(whole, stratum * length // PROBE, stratum)
    high = tl.where(whole, (stratum + 1) * length // PROBE, stratum + 1)
    key = tl.cast(seed, tl.uint32)
    key = _mix(key * 31 + tl.cast(head, tl.uint32) + 1)
    key = _mix(key * 31 + block.to(tl.uint32) + 1)
    key = _mix(key * 31 + stratum.to(tl.uint32) + 1)
    draw = key % tl.maximum(high - low, 1).to(tl.uint32)
    token = block * BLOCK_SIZE + low + draw.to(tl.int32)
    return tl.where(stratum < tl.minimum(length, PROBE), token, -1)


@triton.jit
def _gather_kernel(
    k,  # [B, Hkv, T, D]
    bias,  # fp32 [B|1, H|1, T]
    keys,  # [B * H, tiles, BLOCK_N, BLOCK_D]: the sampled keys, zeros where there is none
    key_bias,  # fp32 [B * H, tiles, BLOCK_N] in log2 units, -inf: hidden or no token
    unseen,  # fp32 [B * H, tiles, BLOCK_N // SLOTS]: NaN where open keys exist and none was sampled, else 0
    stride_kb,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_bb,
    stride_bh,
    stride_bt,
    H,
    GROUP,
    T,
    tiles,
    seed,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROBE: tl.constexpr,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    head, batch = (tile // tiles % H).to(tl.int32), tile // tiles // H
    WIDTH: tl.constexpr = BLOCK_N // SLOTS  # key blocks of a tile
    # Strata lie WIDTH apart, so that a tensor core's thread holds one block's scores of a row and needs no exchange.
    slot = tl.arange(0, BLOCK_N)
    first = (tile % tiles).to(tl.int32) * WIDTH
    token = sampled_tokens(seed, head, first + slot % WIDTH, slot // WIDTH, T, BLOCK_SIZE, PROBE)
    exists = token >= 0
    place = tl.maximum(token, 0).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    source = k + batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh
    source = source + place[:, None] * stride_kt + dim[None, :].to(tl.int64) * stride_kd
    rows = tl.load(source, mask=exists[:, None] & (dim < D)[None, :], other=0.0)
    tl.store(keys + (tile * BLOCK_N + slot)[:, None] * BLOCK_D + dim[None, :], rows)
    if MASKED:
        added = tl.where(exists, 0.0, -float("inf"))
        if HAS_BIAS:
            source = bias + batch * stride_bb + head.to(tl.int64) * stride_bh
            added, visible = triton_common.log2_bias(source, place * stride_bt, exists)
            sampled = tl.max(tl.reshape(visible.to(tl.int32), (SLOTS, WIDTH)), 0)
            block = tl.arange(0, WIDTH)
            tokens = (first + block)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
            each = tl.load(source + tokens.to(tl.int64) * stride_bt, mask=tokens < T, other=-float("inf"))
            some = tl.max((each > -float("inf")).to(tl.int32), 1)
            tl.store(unseen + tile * WIDTH + block, tl.where((some > 0) & (sampled == 0), float("nan"), 0.0))
        tl.store(key_bias + tile * BLOCK_N + slot, added)


@triton.jit
def chunked_dot(
    q_tile,
    q_rows,
    q_mask,
    stride_qd,
    k_rows,
    k_mask,
    stride_kd,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    K_MASKED: tl.constexpr,
):
    """Products q k^T, fp32 [BLOCK_M, BLOCK_N] from pointers to the rows; ``q_tile`` is q where CHUNK_D holds all of D.

    "ieee": a block list must not depend on the precision that a user allows to matrix products.
    """
    if CHUNK_D == BLOCK_D:
        dim = tl.arange(0, BLOCK_D)
        source = k_rows[:, None] + dim[None, :].to(tl.int64) * stride_kd
        if K_MASKED or D != BLOCK_D:
            k = tl.load(source, mask=k_mask[:, None] & (dim < D)[None, :], other=0.0)
        else:
            k = tl.load(source)
        scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee")
    else:
        scores = tl.zeros((q_rows.shape[0], k_rows.shape[0]), tl.float32)
        for start in range(0, BLOCK_D, CHUNK_D):
            dim = start + tl.arange(0, CHUNK_D)
            inside = (dim < D)[None, :]
            q = tl.load(q_rows[:, None] + dim[None, :].to(tl.int64) * stride_qd, q_mask[:, None] & inside, other=0.0)
            k = tl.load(k_rows[:, None] + dim[None, :].to(tl.int64) * stride_kd, k_mask[:, None] & inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
    return scores


@triton.jit
def _tile_scores(
    tile,
    q_tile,
    q_rows,
    q_mask,
    stride_qd,
    keys,
    key_bias,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores [BLOCK_M, BLOCK_N] of a tile of sampled keys in log2 units, minus infinity where hidden."""
    slot = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    everywhere = tl.full((BLOCK_N,), True, tl.int1)
    scores = chunked_dot(
        q_tile, q_rows, q_mask, stride_qd, keys + slot * BLOCK_D, everywhere, 1, D, BLOCK_D, CHUNK_D, False
    )
    scores = scores * SCALE
    if MASKED:
        added = tl.load(key_bias + slot)
        scores = tl.where((added == -float("inf"))[None, :], -float("inf"), scores + added[None, :])
    return scores


@triton.jit
def _add_scores(scores, top, total):
    """Running maximum and denominator of each row. A NaN goes into the denominator."""
    higher = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
    return higher, total


@triton.jit
def _store_cells(
    tile, scores, shift, factor, broken, out, block_q, nQ, nK, unseen, WIDTH: tl.constexpr, HAS_UNSEEN: tl.constexpr
):
    """The largest weight of each cell of a tile. ``out``: the head's map."""
    ROWS: tl.constexpr = block_q.shape[0]  # query blocks of the tile
    M: tl.constexpr = scores.shape[0]
    best = tl.max(tl.reshape(scores, (M, scores.shape[1] // WIDTH, WIDTH)), 1)
    weights = tl.exp2(best - shift[:, None]) * factor[:, None]  # [M, WIDTH]
    cells = tl.max(tl.reshape(weights, (ROWS, M // ROWS, WIDTH)), 1)
    cells = tl.where((broken > 0)[:, None], float("nan"), cells)
    block_k = tile * WIDTH + tl.arange(0, WIDTH)
    if HAS_UNSEEN:
        cells = cells + tl.load(unseen + block_k)[None, :]
    inside = (block_q < nQ)[:, None] & (block_k < nK)[None, :]
    tl.store(out + block_q.to(tl.int64)[:, None] * nK + block_k[None, :], cells, mask=inside)


@triton.jit
def _probe_kernel(
    q,  # [B, H, S, D]
    keys,
    key_bias,
    unseen,  # what _gather_kernel wrote
    out,  # fp32 [B * H, nQ, nK]
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    H,
    S,
    nQ,
    nK,
    q_tiles,
    tiles,
    seed,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROBE: tl.constexpr,
    SLOTS: tl.constexpr,
    MASKED: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // q_tiles  # batch * H + head
    head = sample % H
    ROWS: tl.constexpr = BLOCK_M // SLOTS
    WIDTH: tl.constexpr = BLOCK_N // SLOTS
    first = (program % q_tiles).to(tl.int32) * ROWS
    row = tl.arange(0, BLOCK_M)
    token = sampled_tokens(seed, head, first + row // SLOTS, row % SLOTS, S, BLOCK_SIZE, PROBE)
    exists = token >= 0
    q_rows = q + sample // H * stride_qb + head * stride_qh + tl.maximum(token, 0).to(tl.int64) * stride_qs
    q_tile = 0
    if CHUNK_D == BLOCK_D:
        dim = tl.arange(0, BLOCK_D)
        source = q_rows[:, None] + dim[None, :].to(tl.int64) * stride_qd
        q_tile = tl.load(source, mask=exists[:, None] & (dim < D)[None, :], other=0.0)
    keys += sample * tiles * BLOCK_N * BLOCK_D
    key_bias += sample * tiles * BLOCK_N
    unseen += sample * tiles * WIDTH
    out += sample * nQ * nK

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for tile in range(tiles - TAIL):
        scores = _tile_scores(
            tile, q_tile, q_rows, exists, stride_qd, keys, key_bias, SCALE, D, BLOCK_D, CHUNK_D, BLOCK_N, MASKED
        )
        top, total = _add_scores(scores, top, total)
    if TAIL:
        scores = _tile_scores(
            tiles - 1, q_tile, q_rows, exists, stride_qd, keys, key_bias, SCALE, D, BLOCK_D, CHUNK_D, BLOCK_N, True
        )
        top, total = _add_scores(scores, top, total)

    # A NaN wins: it would get lost in a maximum, so it is carried by a flag of the query block.
    block_q = first + tl.arange(0, ROWS)
    broken = tl.max(tl.reshape(((~(total >= 0)) & exists).to(tl.int32), (ROWS, SLOTS)), 1)
    shift = tl.where(top == -float("inf"), 0.0, top)
    factor = tl.where(exists, 1.0 / tl.where(total == 0, 1.0, total), 0.0)
    for tile in range(tiles - TAIL):
        scores = _tile_scores(
            tile, q_tile, q_rows, exists, stride_qd, keys, key_bias, SCALE, D, BLOCK_D, CHUNK_D, BLOCK_N, MASKED
        )
        _store_cells(tile, scores, shift, factor, broken, out, block_q, nQ, nK, unseen, WIDTH, HAS_BIAS)
    if TAIL:
        scores = _tile_scores(
            tiles - 1, q_tile, q_rows, exists, stride_qd, keys, key_bias, SCALE, D, BLOCK_D, CHUNK_D, BLOCK_N, True
        )
        _store_cells(tiles - 1, scores, shift, factor, broken, out, block_q, nQ, nK, unseen, WIDTH, HAS_BIAS)


def probe_map(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, block_size: int, probe_tokens: int, seed: int
) -> Tensor:
    """Predicted importance of each block, fp32 [B, H, nQ, nK]; see ``reference.probe_map``.

    Args:
        q, k: [B, H, S, D] and [B, Hkv, T, D], fp32, bf16 or fp16, any strides.
        bias: fp32 [B|1, H|1, T] added to the scores (-inf: never attended to), or None.
        scale: factor of the scores.
        block_size: tokens in a block, a power of two.
        probe_tokens: tokens sampled from each block.
        seed: what the sample depends on, beside head and block.
    """
    if triton_common.debug():
        triton_common.check_memory(q=q, k=k, bias=bias)
    (B, H, S, D), (_, Hkv, T, _) = q.shape, k.shape
    nQ, nK = triton.cdiv(S, block_size), triton.cdiv(T, block_size)
    probe = min(probe_tokens, block_size)
    slots = triton.next_power_of_2(probe)
    tile = _tiles(triton_configs.family(q.device), q.dtype, D, slots)
    width, block_n = tile["BLOCK_N"] // slots, tile["BLOCK_N"]
    tiles, q_tiles = triton.cdiv(nK, width), triton.cdiv(nQ, tile["BLOCK_M"] // slots)
    short = T - (nK - 1) * block_size < probe  # the last key block has fewer tokens than strata
    masked = bias is not None or probe != slots
    tail = not masked and (short or nK % width != 0)
    block_map = q.new_empty(B, H, nQ, nK, dtype=torch.float32)
    keys = k.new_empty(B * H, tiles * block_n, tile["BLOCK_D"])
    key_bias = keys.new_empty((B * H, tiles * block_n) if masked or tail else (0,), dtype=torch.float32)
    unseen = keys.new_empty((B * H, tiles * width) if bias is not None else (0,), dtype=torch.float32)
    sizes = {name: tile[name] for name in ("BLOCK_D", "BLOCK_N")}
    sizes |= {"D": D, "BLOCK_SIZE": block_size, "PROBE": probe, "SLOTS": slots, "HAS_BIAS": bias is not None}
    with triton_common.on_device(q):
        triton_common.launchable(_gather_kernel)[(B * H * tiles,)](
            k,
            k if bias is None else bias,
            keys,
            key_bias,
            unseen,
            *k.stride(),
            *triton_common.bias_strides(bias, B, H),
            H,
            H // Hkv,
            T,
            tiles,
            hashed_seed(seed, SIDE_K),
            **sizes,
            MASKED=masked or tail,
        )
        triton_common.launchable(_probe_kernel)[(B * H * q_tiles,)](
            q,
            keys,
            key_bias,
            unseen,
            block_map,
            *q.stride(),
            H,
            S,
            nQ,
            nK,
            q_tiles,
            tiles,
            hashed_seed(seed, 0),
            SCALE=scale * LOG2E,
            **sizes,
            CHUNK_D=tile["CHUNK_D"],
            BLOCK_M=tile["BLOCK_M"],
            MASKED=masked,
            TAIL=tail,
            num_warps=tile["num_warps"],
            num_stages=tile["num_stages"],
        )
    return block_map


def _tiles(chip: str, dtype: torch.dtype, D: int, slots: int) -> dict[str, int]:
    """Tile sizes that hold whole blocks of samples. fp32 and wide heads go through D in chunks.

    Compiled offline for every family (registers, spills, shared memory), not measured.
    """
    wide = chip in ("sm_90", "sm_100") and dtype != torch.float32  # room for a larger tile
    block_n = max(128 if wide else 64, slots)
    return {"BLOCK_M": 128, "BLOCK_N": block_n, **chunks(chip, dtype, D, block_n), "num_warps": 8}


def chunks(chip: str, dtype: torch.dtype, D: int, block_n: int) -> dict[str, int]:
    """How `chunked_dot` goes through D: BLOCK_D, CHUNK_D, num_stages. Tiles of up to 128 rows and ``block_n`` keys."""
    block_d = max(16, triton.next_power_of_2(D))
    shared = triton_configs.SHARED[chip]
    chunk = 128 if shared >= (96 << 10 if block_n <= 64 else 200 << 10) else 64
    if dtype == torch.float32:
        chunk = 16
    return {"BLOCK_D": block_d, "CHUNK_D": min(block_d, chunk), "num_stages": 3 if shared >= 96 << 10 else 2}


def hashed_seed(seed: int, side: int) -> int:
    """The start of a sample's hash, as the int32 of the same bits."""
    mask = 0xFFFFFFFF
    x = (seed ^ side) & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    x ^= x >> 16
    return x - (1 << 32) if x >> 31 else x
