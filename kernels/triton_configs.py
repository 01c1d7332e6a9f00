"""Tile sizes of the Triton kernels: the committed table, what ``max-autotune`` tries beside it, and the way down.

``triton_configs.json`` holds a tile for each kernel, chip family, dtype width, head dim and block size, and
where it came from. ``"128x64 w8 s3 tma"``: a tile of 128 queries and 64 keys, 8 warps, 3 stages of the software
pipeline, keys and values loaded by the tensor memory accelerator; ``ws``: by warps of their own. A tile is never larger
than a block.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import triton_common

logger = logging.getLogger("blade_compile")

TABLE = Path(__file__).with_name("triton_configs.json")
KINDS = ("forward", "forward_masked", "backward_q", "backward_kv")
HEAD_DIMS = (32, 64, 128, 256)
WARP_SPECIALIZED = ("sm_100",)  # where Triton makes warps that only load, of loops with data-dependent bounds
UNKNOWN = "unknown"  # the family of a chip that the table does not know: tiles that fit everywhere
# Shared memory that one program can have, in bytes.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
SHARED |= {"gfx942": 64 << 10, UNKNOWN: 48 << 10}

Config = dict[str, Any]
Key = tuple[str, str, int, int, int]

_in_use: dict[Key, Config] = {}  # where it is not the table's: what ran after a fall, or was the fastest
_search_on = False


def family(device: torch.device) -> str:
    """The table's name for a device's chip."""
    if device.type != "cuda":
        return UNKNOWN
    if torch.version.hip:
        return amd_family(torch.cuda.get_device_properties(device).gcnArchName)
    return nvidia_family(*torch.cuda.get_device_capability(device))


def nvidia_family(major: int, minor: int) -> str:
    """The family of a compute capability: chips of a family have the same matrix instructions and shared memory."""
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_89"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(major, UNKNOWN)


def amd_family(name: str) -> str:
    """The family of an AMD chip by its name, e.g. ``gfx942:sramecc+:xnack-``."""
    return "gfx942" if name.startswith("gfx94") else UNKNOWN


def config(kind: str, device: torch.device, dtype: torch.dtype, D: int, block_size: int) -> Config:
    """The tile that a kernel runs with: what a search or a fall has found for its class, else the table's.

    Args:
        kind: one of `KINDS`.
        device: where it runs.
        dtype: of q, k and v.
        D: head dim.
        block_size: 64 or 128; a block of another power of two gets a tile that is not larger.

    Returns:
        ``BLOCK_M``, ``BLOCK_N``, ``num_warps`` and ``num_stages``; the forward's also ``TMA`` and ``WARP_SPECIALIZE``.
    """
    key = _key(kind, family(device), dtype, D, block_size)
    return dict(_in_use.get(key) or _from_table(key))


def source(kind: str, device: torch.device) -> str:
    """Where the table's tiles of a kernel come from."""
    return str(_table()[kind][family(device)]["source"])


def candidates(kind: str, chip: str, dtype: torch.dtype, D: int, block_size: int) -> list[Config]:
    """What a search tries for a chip family, the table's tile first."""
    key = _key(kind, chip, dtype, D, block_size)
    first = _from_table(key)
    found = [first]
    if chip in WARP_SPECIALIZED and first.get("TMA"):
        found.append(first | {"WARP_SPECIALIZE": True})
    for block_m in (64, 128):
        for block_n in (32, 64, 128):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
                    fits = max(block_m, block_n) <= block_size and shared_bytes(kind, tile, key) <= SHARED[chip]
                    if fits and not kind.startswith("forward"):
                        found.append(tile)
                    elif fits:
                        loads = sorted({first["TMA"], False}, reverse=True)
                        found += [tile | {"TMA": tma, "WARP_SPECIALIZE": False} for tma in loads]
    return [tile for n, tile in enumerate(found) if tile not in found[:n]]


def shared_bytes(kind: str, tile: Config, key: Key) -> int:
    """Shared memory of a tile's operands, about: the one that stays, and the pipeline's stages of the two that pass."""
    width, row = key[2] // 8, max(16, key[3])
    stays, passes = ("BLOCK_M", "BLOCK_N") if kind != "backward_kv" else ("BLOCK_N", "BLOCK_M")
    return int(width * row * (tile[stays] + 2 * (tile["num_stages"] - (key[1] != "sm_90")) * tile[passes]))


def ladder(first: Config) -> Iterator[Config]:
    """A tile, and then ever smaller ones."""
    step = dict(first)
    yield dict(step)
    for extra in ("WARP_SPECIALIZE", "TMA"):
        if step.get(extra):
            step[extra] = False
            yield dict(step)
    while step["num_stages"] > 2:
        step["num_stages"] -= 1
        yield dict(step)
    while max(step["BLOCK_M"], step["BLOCK_N"]) > 16:
        name = "BLOCK_N" if step["BLOCK_N"] >= step["BLOCK_M"] else "BLOCK_M"
        step[name] //= 2
        if step["BLOCK_M"] * step["BLOCK_N"] <= 64 * 64:
            step["num_warps"] = min(step["num_warps"], 4)
        yield dict(step)
    step["num_stages"] = 1
    yield dict(step)


def launch(kind: str, x: Tensor, block_size: int, call: Callable[[Config], None]) -> None:
    """Launch with the tile of `config`; one that the chip can't run is replaced by a smaller one, with one log line.

    Args:
        kind: one of `KINDS`.
        x: a tensor of the call, [..., D].
        block_size: of the lists.
        call: launches the kernel with a tile.
    """
    key = _key(kind, family(x.device), x.dtype, x.shape[-1], block_size)
    if _may_search(x) and key not in _in_use:
        _search(key, block_size, x.dtype, call)
    steps = list(ladder(_in_use.get(key) or _from_table(key)))
    for tile, smaller in zip(steps, [*steps[1:], None]):
        try:
            call(dict(tile))
        except _too_large() as error:
            if smaller is None:
                raise
            logger.debug("tile %s: %s", tile, error)
            continue
        if tile != steps[0]:
            _in_use[key] = tile
            logger.warning("%s: this chip can't run tile %s; %s is used.", kind, as_text(steps[0]), as_text(tile))
        return


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """``max-autotune``: the first launch of each class times the `candidates` and keeps the fastest."""
    global _search_on
    before, _search_on = _search_on, True
    try:
        yield
    finally:
        _search_on = before


def search_from_now_on() -> None:
    """`searching` for the rest of the process: the fastest tile belongs to the chip, not to one model."""
    global _search_on
    _search_on = True


def forget() -> None:
    """Back to the table."""
    _in_use.clear()


def parse(text: str) -> Config:
    """A table cell, e.g. ``128x64 w8 s3 tma``."""
    found = re.fullmatch(r"(\d+)x(\d+) w(\d+) s(\d+)( tma)?( ws)?", text)
    assert found, f"no tile: {text!r}"
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return {**dict(zip(names, map(int, found.groups()[:4]))), "TMA": bool(found[5]), "WARP_SPECIALIZE": bool(found[6])}


def as_text(tile: Config) -> str:
    """A tile as a table cell."""
    text = "{BLOCK_M}x{BLOCK_N} w{num_warps} s{num_stages}".format_map(tile)
    return text + " tma" * bool(tile.get("TMA")) + " ws" * bool(tile.get("WARP_SPECIALIZE"))


def _key(kind: str, chip: str, dtype: torch.dtype, D: int, block_size: int) -> Key:
    return kind, chip, 8 * dtype.itemsize, next(d for d in HEAD_DIMS if d >= D), block_size


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
    return table


def _from_table(key: Key) -> Config:
    kind, chip, bits, D, block_size = key
    tile = parse(_table()[kind][chip][str(bits)][str(D)]["128" if block_size >= 128 else "64"])
    for name in ("BLOCK_M", "BLOCK_N"):
        tile[name] = min(tile[name], block_size)
    if not kind.startswith("forward"):
        del tile["TMA"], tile["WARP_SPECIALIZE"]
    return tile


def _too_large() -> tuple[type[Exception], ...]:
    """What Triton raises for a kernel that needs more than the chip has."""
    from triton.runtime import errors

    return tuple(getattr(errors, name) for name in ("OutOfResources", "PTXASError") if hasattr(errors, name))


def _may_search(x: Tensor) -> bool:
    """A search waits for the device, which a graph's capture doesn't allow."""
    on = _search_on and x.is_cuda and not triton_common.tracing()
    return on and not torch.cuda.is_current_stream_capturing()


def _search(key: Key, block_size: int, dtype: torch.dtype, call: Callable[[Config], None]) -> None:
    """Time each candidate; the launch writes the same result each time."""
    from triton.testing import do_bench

    times: dict[str, tuple[float, Config]] = {}
    for tile in candidates(key[0], key[1], dtype, key[3], block_size):
        try:
            times[as_text(tile)] = do_bench(lambda tile=tile: call(dict(tile)), warmup=10, rep=50), tile
        except Exception as error:  # noqa: BLE001 (what a compiler can't make is no candidate)
            logger.debug("tile %s: %s", as_text(tile), error)
    if times:
        fastest, _in_use[key] = min(times.values(), key=lambda timed: timed[0])
        logger.info("%s: of %d tiles %s is the fastest (%.3f ms).", key, len(times), as_text(_in_use[key]), fastest)
