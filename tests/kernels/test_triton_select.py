"""The Triton selection keeps exactly the blocks that the reference keeps of the same map."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from blade_compile.kernels import reference, triton_select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SELECTIONS = (
    {"sparsity": 0.8},
    {"sparsity": 0.0},
    {"sparsity": 0.999},
    {"tau": 0.95},
    {"tau": 0.3, "min_keep": 0.01},
    {"tau": 0.0, "min_keep": 0.01},
    {"tau": 1.0, "max_keep": 0.5},
    {"tau": 1.0},
    {"tau": 0.9, "min_keep": 0.5, "max_keep": 0.2},
)


def check(block_map: Tensor, **choice: object) -> None:
    found = triton_select.select(block_map.to(DEVICE), **_to_device(choice))  # type: ignore[arg-type]
    expected = reference.select_blocks(block_map, **choice)  # type: ignore[arg-type]
    for name, x, y in zip(("kv_num_blocks", "kv_indices"), found, expected, strict=True):
        assert x.dtype == torch.int32 and x.is_contiguous() and torch.equal(x.cpu(), y), f"{name}: {x} is not {y}"


def _to_device(choice: dict[str, object]) -> dict[str, object]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in choice.items()}


def all_kinds(H: int, nQ: int, nK: int) -> Tensor:
    """Maps of every kind, one per sample: smooth, tied, mostly zeros of both signs, denormal, with NaN, zero, flat."""
    smooth = torch.rand(H, nQ, nK) ** 4
    tied = (smooth * 4).floor() / 4
    spiky = torch.where(torch.rand_like(smooth) > 0.9, smooth, -0.0)
    broken = torch.where(torch.rand_like(smooth) > 0.8, math.nan, smooth)
    sums = smooth * 128  # what a search gives: mass of a block of 128 queries
    zero, flat = torch.zeros_like(smooth), torch.full_like(smooth, 1 / 3)
    return torch.stack([smooth, tied, spiky, smooth * 1e-38, smooth * 2.0**-35, broken, sums, zero, flat])


@pytest.mark.parametrize("choice", SELECTIONS, ids=str)
def test_every_kind_of_map(choice: dict[str, float]) -> None:
    for nK in (1, 7, 64):
        block_map = all_kinds(2, 3, nK)
        check(block_map, **choice)
        check(block_map, **choice, force_q=torch.rand(3) > 0.7, force_k=torch.rand(nK) > 0.7)


@pytest.mark.parametrize("nK", [257, 2048, 4099])
def test_long_rows(nK: int) -> None:
    block_map = all_kinds(1, 1, nK)
    check(block_map[:6], sparsity=0.8)
    check(block_map[1:6], tau=0.9, min_keep=0.01, force_k=torch.rand(nK) > 0.95)


def test_rows_beyond_the_kernels_limit_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_select, "MAX_BLOCKS", 32)
    check(torch.rand(1, 2, 2, 33), tau=0.5)


def test_any_strides() -> None:
    block_map = torch.rand(2, 3, 4, 20)
    check(block_map.transpose(0, 1), sparsity=0.5)
    check(block_map.transpose(2, 3), sparsity=0.5)
    check(block_map[:, :1].expand(2, 3, 4, 20)[..., ::2], tau=0.5)
    flags = torch.rand(40) > 0.5
    check(block_map, sparsity=0.5, force_k=flags[::2])


def test_tau_is_compared_in_double() -> None:
    """Masses whose shares are tau itself, its neighbours, and what tau would be in fp32."""
    weights = torch.tensor([[19, 1, 0, 0], [9, 1, 5, 5], [6, 6, 4, 4], [1, 2, 3, 14]]).view(1, 1, 4, 4) / 32
    for tau in (0.95, 0.7, 0.45, 0.3, 0.1, 0.85):
        for near in (tau, math.nextafter(tau, 0), math.nextafter(tau, 1), float(torch.tensor(tau)), 1 - 2**-53):
            check(weights, tau=near, min_keep=0.01)
    check(torch.full((1, 1, 1, 64), 0.1), tau=1 / 3, min_keep=0.01)
    check(torch.tensor([[[[1.0, *[2.0**-40] * 9]]]]), tau=math.nextafter(1, 0), min_keep=0.01)


def test_negative_entries_count_as_zero() -> None:
    block_map = torch.tensor([-0.5, 0.0, 0.25, -3.0, 0.0]).view(1, 1, 1, 5)
    num, idx = triton_select.select(block_map.to(DEVICE), sparsity=0.4)
    assert num.item() == 3 and idx.flatten().tolist() == [0, 1, 2, 0, 0]


EDGES = [0.0, -0.0, 1.0, 0.5, 2.0**-40, 2.0**-41, 1e-45, 1 / 3, 0.1, math.nan]
VALUES = st.sampled_from(EDGES) | st.floats(0, 1, width=32)
SHARES = st.sampled_from([1e-6, 0.05, 0.25, 1 / 3, 0.5, 0.95, 1.0]) | st.floats(1e-6, 1)


@settings(max_examples=max(50, settings().max_examples))
@given(st.data())
def test_selection_property(data: st.DataObject) -> None:
    nQ, nK = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    block_map = torch.tensor(data.draw(st.lists(VALUES, min_size=nQ * nK, max_size=nQ * nK))).view(1, 1, nQ, nK)
    choice = {
        "sparsity": data.draw(st.none() | st.floats(0, 0.9999)),
        "tau": data.draw(SHARES),
        "min_keep": data.draw(SHARES),
        "max_keep": data.draw(SHARES),
        "force_q": data.draw(st.none() | st.lists(st.booleans(), min_size=nQ, max_size=nQ).map(torch.tensor)),
        "force_k": data.draw(st.none() | st.lists(st.booleans(), min_size=nK, max_size=nK).map(torch.tensor)),
    }
    check(block_map, **choice)


def test_bad_inputs_are_named() -> None:
    for block_map in (torch.zeros(2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="block_map"):
            triton_select.select(block_map)
    with pytest.raises(ValueError, match="force_k"):
        triton_select.select(torch.zeros(1, 1, 2, 3), force_k=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="force_q"):
        triton_select.select(torch.zeros(1, 1, 2, 3), force_q=torch.ones(2))


@pytest.mark.gpu
def test_a_graph_replays_on_new_maps() -> None:
    block_map = torch.rand(1, 2, 8, 300, device="cuda")
    triton_select.select(block_map, tau=0.9)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        num, idx = triton_select.select(block_map, tau=0.9)
    block_map.copy_(torch.rand_like(block_map) ** 4)
    graph.replay()
    expected = reference.select_blocks(block_map, tau=0.9)
    assert torch.equal(num, expected[0]) and torch.equal(idx, expected[1])
