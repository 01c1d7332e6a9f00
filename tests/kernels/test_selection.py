"""Selection from a map: the reference's blocks exactly, whatever runs, and budgets for each head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blade_compile.kernels import accelerator, cpu_probe, reference, selection

CHOICES = (
    {"sparsity": 0.8},
    {"sparsity": 0.0},
    {"tau": 0.9},
    {"tau": 0.5, "min_keep": 0.2, "max_keep": 0.3},
    {"tau": 1.0, "max_keep": 0.5},
)


def map_of(B: int, H: int, nQ: int, nK: int) -> Tensor:
    """Smooth values, ties, zeros and NaN."""
    block_map = torch.rand(B, H, nQ, nK) ** 3
    block_map[:, ::2] = (block_map[:, ::2] * 8).floor() / 8
    return block_map.masked_fill(torch.rand_like(block_map) > 0.95, math.nan)


def same(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(found, want, strict=True):
        assert x.dtype == torch.int32 and x.is_contiguous() and x.shape == y.shape and torch.equal(x, y)


@pytest.fixture(params=["cpp", "reference", "triton"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What selects: the C++ kernel, the reference where it can't be built, or the Triton kernel in its interpreter."""
    if request.param == "reference":
        monkeypatch.setattr(cpu_probe, "available", lambda: False)
        monkeypatch.setattr(cpu_probe, "select_blocks", None)
    if request.param == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the interpreter is off where there is a GPU: the test marked gpu runs the kernel")
        monkeypatch.setattr(accelerator, "_chip", lambda device: "cuda-sm90")
        monkeypatch.setattr(cpu_probe, "available", lambda: True)
        monkeypatch.setattr(cpu_probe, "select_blocks", accelerator.select_blocks)
    return str(request.param)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("forced", [False, True])
def test_equals_the_reference(engine: str, choice: dict[str, float], forced: bool) -> None:
    block_map = map_of(2, 3, 5, 37)
    force = {"force_q": torch.rand(5) > 0.7, "force_k": torch.rand(37) > 0.8} if forced else {}
    how: Any = {**choice, **force}
    same(selection.select(block_map, **how), reference.select_blocks(block_map, **how))


@pytest.mark.gpu
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_equals_the_reference_on_a_gpu(choice: dict[str, float]) -> None:
    block_map, shares = map_of(2, 5, 4, 300), (0.5, 0.5, 0.9, 0.9, 0.5)
    for how in (choice, {"head_sparsity": shares}):
        num, idx = selection.select(block_map.cuda(), **how)  # type: ignore[arg-type]
        want = selection.select(block_map, **how)  # type: ignore[arg-type]
        same((num.cpu(), idx.cpu()), want)


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.9, 0.9, 0.5), (0.8,) * 5, (0.0, 0.2, 0.4, 0.6, 0.99)], ids=str)
def test_every_head_has_its_own_budget(engine: str, shares: tuple[float, ...]) -> None:
    block_map, forced = map_of(2, 5, 4, 23), torch.rand(23) > 0.8
    num, idx = selection.select(block_map, 0.5, force_k=forced, head_sparsity=shares)
    for h, share in enumerate(shares):
        want = reference.select_blocks(block_map[:, h : h + 1], share, force_k=forced)
        same((num[:, h : h + 1].contiguous(), idx[:, h : h + 1].contiguous()), want)


def test_equal_heads_are_selected_together(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    def count(block_map: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        widths.append(block_map.shape[1])
        return reference.select_blocks(block_map, *how)

    monkeypatch.setattr(selection, "_select", count)
    selection.select(torch.rand(1, 6, 2, 8), head_sparsity=[0.5, 0.5, 0.5, 0.7, 0.9, 0.9])
    assert widths == [3, 1, 2]


def test_an_expanded_map_is_selected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def count(block_map: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        seen.append(tuple(block_map.shape[:2]))
        return reference.select_blocks(block_map, *how)

    monkeypatch.setattr(selection, "_select", count)
    block_map = map_of(1, 1, 4, 9).expand(3, 5, 4, 9)
    same(selection.select(block_map, 0.5), reference.select_blocks(block_map.contiguous(), 0.5))
    shares = (0.2, 0.2, 0.7, 0.7, 0.7)
    num, _ = selection.select(block_map, head_sparsity=shares)
    assert seen == [(1, 1), (1, 1), (1, 1)]
    assert num.shape == (3, 5, 4) and torch.equal(num[:, 0], num[:, 1]) and (num[:, 0] > num[:, 2]).any()


@pytest.mark.parametrize("transposed", [(0, 1), (2, 3)])
def test_any_strides(engine: str, transposed: tuple[int, int]) -> None:
    block_map = map_of(3, 4, 6, 7).transpose(*transposed)
    same(selection.select(block_map, tau=0.7), reference.select_blocks(block_map.contiguous(), tau=0.7))


def test_double_maps_keep_their_precision() -> None:
    block_map = torch.tensor([0.5, 0.5 + 2.0**-40, 0.25], dtype=torch.float64).view(1, 1, 1, 3)
    _, idx = selection.select(block_map, 0.6)
    assert idx[0, 0, 0, 0] == 1


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_empty_maps(engine: str, shape: tuple[int, ...]) -> None:
    num, idx = selection.select(torch.zeros(shape), 0.5)
    assert num.shape == shape[:3] and idx.shape == shape and not num.any()


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.5, 1.0), (0.5, -0.1, 0.5)])
def test_bad_head_budgets_are_errors(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"valid are 3 numbers in \[0, 1\)"):
        selection.select(torch.rand(1, 3, 2, 4), head_sparsity=shares)


@given(
    seed=st.integers(0, 999),
    H=st.integers(1, 5),
    nQ=st.integers(1, 4),
    nK=st.integers(1, 40),
    shares=st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.9]), min_size=5, max_size=5),
)
def test_property_head_budgets(seed: int, H: int, nQ: int, nK: int, shares: list[float]) -> None:
    torch.manual_seed(seed)
    block_map = map_of(1, H, nQ, nK)
    num, idx = selection.select(block_map, head_sparsity=shares[:H])
    for h in range(H):
        want = reference.select_blocks(block_map[:, h : h + 1], shares[h])
        assert torch.equal(num[:, h : h + 1], want[0]) and torch.equal(idx[:, h : h + 1], want[1])
