"""The committed tiles, and the way down where a chip can't run one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from blade_compile.kernels import triton_configs

CPU = torch.device("cpu")
NAMES = {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}
CELLS = list(itertools.product(triton_configs.KINDS, triton_configs.SHARED, (torch.float16, torch.float32), (64, 128)))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    triton_configs.forget()
    yield
    triton_configs.forget()


@pytest.mark.parametrize(("kind", "chip", "dtype", "block"), CELLS)
def test_every_chip_has_a_tile_for_every_size(
    kind: str, chip: str, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_configs, "family", lambda device: chip)
    for D in (1, 32, 33, 40, 64, 80, 128, 200, 256):
        tile = triton_configs.config(kind, CPU, dtype, D, block)
        assert tile.keys() == (NAMES | {"TMA", "WARP_SPECIALIZE"} if kind.startswith("forward") else NAMES)
        for name in ("BLOCK_M", "BLOCK_N"):
            assert tile[name] in (16, 32, 64, 128) and block % tile[name] == 0
        assert tile["num_warps"] in (1, 2, 4, 8) and 1 <= tile["num_stages"] <= 5
        found = triton_configs.candidates(kind, chip, dtype, D, block)
        assert found[0] == tile
        assert all(found.count(one) == 1 and max(one["BLOCK_M"], one["BLOCK_N"]) <= block for one in found)
    assert "offline" in triton_configs.source(kind, CPU) or "measured" in triton_configs.source(kind, CPU)


def test_tensor_memory_accelerator_only_where_there_is_one() -> None:
    for chip, cells in triton_configs._table()["forward"].items():
        texts = [text for bits in ("16", "32") for row in cells[bits].values() for text in row.values()]
        assert chip in ("sm_90", "sm_100") or not any("tma" in text for text in texts)


def test_families() -> None:
    found = {c: triton_configs.nvidia_family(*c) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 1), (7, 5))}
    assert list(found.values()) == ["sm_80", "sm_89", "sm_89", "sm_90", "sm_100", "sm_120", "unknown"]
    assert triton_configs.amd_family("gfx942:sramecc+:xnack-") == "gfx942"
    assert triton_configs.amd_family("gfx1100") == "unknown"
    assert triton_configs.family(CPU) == "unknown"


def test_cells_read_as_they_are_written() -> None:
    for text in ("128x64 w8 s3 tma", "64x32 w4 s1", "128x64 w8 s3 tma ws"):
        assert triton_configs.as_text(triton_configs.parse(text)) == text


def test_the_way_down_ends_at_a_tile_that_fits_everywhere() -> None:
    steps = list(triton_configs.ladder(triton_configs.parse("128x128 w8 s3 tma ws")))
    assert steps[0] == triton_configs.parse("128x128 w8 s3 tma ws")
    sizes = [one["BLOCK_M"] * one["BLOCK_N"] for one in steps]
    assert sizes == sorted(sizes, reverse=True)
    assert [triton_configs.as_text(one) for one in steps[1:4]] == [
        "128x128 w8 s3 tma", "128x128 w8 s3", "128x128 w8 s2"
    ]  # fmt: skip
    assert triton_configs.as_text(steps[-1]) == "16x16 w4 s1"


def needing(limit: int, tried: list[dict[str, Any]]) -> Any:
    """A launch that a chip refuses for tiles of more than ``limit`` scores."""

    def call(tile: dict[str, Any]) -> None:
        tried.append(tile)
        if tile["BLOCK_M"] * tile["BLOCK_N"] > limit:
            raise OutOfResources(1 << 20, 1 << 16, "shared memory")

    return call


def test_a_tile_that_does_not_fit_is_replaced_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_configs, "family", lambda device: "sm_90")
    q = torch.empty(1, 1, 1, 128, dtype=torch.float16)
    tried: list[dict[str, Any]] = []
    with caplog.at_level(logging.INFO, "blade_compile"):
        triton_configs.launch("forward", q, 128, needing(64 * 64, tried))
        assert len(tried) > 1 and (tried[-1]["BLOCK_M"], tried[-1]["BLOCK_N"]) == (64, 64)
        first = len(tried)
        triton_configs.launch("forward", q, 128, needing(64 * 64, tried))
        assert len(tried) == first + 1, "what fitted is remembered"
    assert len(caplog.records) == 1 and "64x64" in caplog.text
    assert triton_configs.config("forward", CPU, torch.float16, 128, 128) == tried[-1]
    assert triton_configs.config("forward", CPU, torch.float16, 64, 128) != tried[-1], "of its class only"


def test_what_fits_nowhere_is_an_error() -> None:
    q = torch.empty(1, 1, 1, 64)
    with pytest.raises(OutOfResources):
        triton_configs.launch("forward", q, 64, needing(0, []))


def test_other_errors_pass() -> None:
    def call(tile: dict[str, Any]) -> None:
        raise RuntimeError("no tile's fault")

    with pytest.raises(RuntimeError, match="no tile's fault"):
        triton_configs.launch("forward", torch.empty(1, 1, 1, 64), 64, call)


def test_a_search_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    def bench(call: Any, **kwargs: Any) -> float:
        call()
        return tried[-1]["BLOCK_N"] + 100.0 * (tried[-1]["num_stages"] != 4)

    tried: list[dict[str, Any]] = []
    monkeypatch.setattr("triton.testing.do_bench", bench)
    monkeypatch.setattr(triton_configs, "_may_search", lambda x: True)
    monkeypatch.setattr(triton_configs, "family", lambda device: "sm_90")
    q = torch.empty(1, 1, 1, 64, dtype=torch.float16)
    triton_configs.launch("forward", q, 128, needing(128 * 64, tried))
    assert len(tried) == len(triton_configs.candidates("forward", "sm_90", q.dtype, 64, 128)) + 1
    assert (tried[-1]["BLOCK_N"], tried[-1]["num_stages"]) == (32, 4)
    triton_configs.launch("forward", q, 128, needing(128 * 64, tried))
    assert tried[-1] == tried[-2]


def test_a_search_is_only_made_where_it_may_wait_for_the_device() -> None:
    with triton_configs.searching():
        assert not triton_configs._may_search(torch.empty(1))
