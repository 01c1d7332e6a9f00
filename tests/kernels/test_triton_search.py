"""The Triton block-sum search: masses within the tolerance policy, rows that sum to their queries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from blade_compile.kernels import reference, reference_search, triton_search
from tests.tools import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # NaN on purpose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies the bits of bf16 as integers.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
# B, H, Hkv, S, T, D, block
SIZES = {
    "even": (1, 2, 2, 128, 256, 64, 64),
    "ragged-gqa": (2, 2, 1, 150, 200, 40, 64),
    "large-block": (1, 2, 1, 200, 300, 72, 128),
    "half-a-block": (1, 1, 1, 97, 170, 128, 128),
    "wide-head": (1, 1, 1, 63, 111, 256, 64),
    "single": (1, 1, 1, 1, 1, 1, 64),
}


def make(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    B, H, Hkv, S, T, D, _ = size
    q, (k, v) = 2 * torch.randn(B, H, S, D), torch.randn(2, B, Hkv, T, D)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def masks(B: int, H: int, T: int) -> dict[str, Tensor | None]:
    return {
        "none": None,
        "holes": torch.rand(B, T) > 0.3,
        "padding": torch.arange(T).expand(1, T) < T // 2 + 1,
        "additive": (3 * torch.randn(1, H, T)).masked_fill(torch.rand(1, H, T) > 0.8, -math.inf),
        "empty": torch.zeros(B, T, dtype=torch.bool),
    }


def run(q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, block: int) -> Tensor:
    bias = reference.additive_mask(mask, torch.float32)
    bias = None if bias is None else bias.squeeze(2).to(DEVICE)
    q, k, lse = (x.to(DEVICE) for x in (q, k, lse))
    return triton_search.block_sums(q, k, lse, bias, q.shape[-1] ** -0.5, block).cpu()


def lse_of(q: Tensor, k: Tensor, mask: Tensor | None, block: int) -> Tensor:
    return reference_search.attention_and_block_sums(q, k, k, mask, q.shape[-1] ** -0.5, block)[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sums_are_close_to_the_references(size: str, dtype: torch.dtype) -> None:
    B, H, _, S, T, D, block = SIZES[size]
    q, k, _ = make(SIZES[size], dtype)
    for name, mask in masks(B, H, T).items():
        lse = lse_of(q, k, mask, block)
        found = run(q, k, lse, mask, block)
        wide = (x.double() for x in (q, k, lse))
        exact = reference_search.block_sums(*wide, mask, D**-0.5, block)
        assert_close(found, exact, reference_search.block_sums(q, k, lse, mask, D**-0.5, block), name)
        tokens = torch.tensor([min(block, S - n * block) for n in range(found.shape[2])], dtype=torch.float32)
        tokens = tokens * (name != "empty")
        torch.testing.assert_close(found.sum(-1), tokens.expand(B, H, -1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["none", "holes"])
def test_two_passes_give_attention_its_lse_and_the_sums(kind: str) -> None:
    B, H, _, _, T, D, block = size = (1, 2, 1, 150, 200, 64, 64)
    q, k, v = make(size)
    mask = masks(B, H, T)[kind]
    bias = reference.additive_mask(mask, torch.float32)
    bias = None if bias is None else bias.squeeze(2).to(DEVICE)
    inputs = [x.to(DEVICE) for x in (q, k, v)]
    found = triton_search.attention_and_block_sums(*inputs, bias, D**-0.5, block)
    plain = reference_search.attention_and_block_sums(q, k, v, mask, D**-0.5, block)
    exact = reference_search.attention_and_block_sums(q.double(), k.double(), v.double(), mask, D**-0.5, block)
    for name, x, y, z in zip(("out", "lse", "sums"), found, exact, plain, strict=True):
        assert_close(x.cpu(), y, z, name)


def test_a_cached_lse_of_earlier_keys() -> None:
    """The one-pass form: another step's normalisation, rows that saw nothing then have no mass now."""
    q, k, v = make((1, 2, 2, 130, 200, 64, 64))
    lse = lse_of(q, v, None, 64)
    lse[0, 0, 3], lse[0, 1, 64:] = -math.inf, -math.inf
    found = run(q, k, lse, None, 64)
    torch.testing.assert_close(found, reference_search.block_sums(q, k, lse, None, 0.125, 64), rtol=2e-5, atol=1e-6)
    assert (found[0, 1, 1:] == 0).all()


def test_any_strides_and_native_gqa() -> None:
    q, k, _ = make((2, 4, 2, 100, 130, 35, 64))
    lse = lse_of(q, k, None, 64)
    expected = run(q, k, lse, None, 64)
    assert torch.equal(run(q, k.repeat_interleave(2, 1), lse, None, 64), expected)
    layouts = {
        "flash": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    }
    strided_lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    for name, layout in layouts.items():
        assert torch.equal(run(layout(q), layout(k), strided_lse, None, 64), expected), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["none", "holes", "padding"])
def test_bad_values_end_where_the_reference_has_them(value: float, kind: str) -> None:
    q, k, _ = make((1, 2, 2, 130, 200, 64, 64))
    mask = masks(1, 2, 200)[kind]
    q[0, 0, 70, 7] = value
    k[0, 1, 100, 9] = value
    if mask is not None:
        mask[0, 100] = True
        k[:, :, ~mask[0]] = math.nan  # hidden: seen by nothing
    lse = lse_of(q, k, mask, 64)
    found, expected = run(q, k, lse, mask, 64), reference_search.block_sums(q, k, lse, mask, 0.125, 64)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_the_lowest_finite_bias_hides_nothing() -> None:
    q, k, _ = make((1, 1, 1, 64, 128, 16, 64))
    mask = torch.zeros(1, 128).masked_fill(torch.arange(128) > 99, torch.finfo(torch.float32).min)
    for bias in (mask, torch.full_like(mask, -1e30)):
        lse = lse_of(q, k, bias, 64)
        torch.testing.assert_close(run(q, k, lse, bias, 64), reference_search.block_sums(q, k, lse, bias, 0.25, 64))


def test_only_active_samples_are_searched() -> None:
    q, k, _ = make((3, 2, 1, 130, 200, 40, 64))
    lse = lse_of(q, k, None, 64)
    everything = run(q, k, lse, None, 64)
    q[1] = math.nan  # never read
    active = torch.tensor([1, 0, 7], dtype=torch.int32, device=DEVICE)
    found = triton_search.block_sums(*(x.to(DEVICE) for x in (q, k, lse)), None, q.shape[-1] ** -0.5, 64, active).cpu()
    assert torch.equal(found[::2], everything[::2]) and not found[1].any()


@given(st.data())
def test_search_property(data: st.DataObject) -> None:
    H, Hkv = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))
    S, T, D = (data.draw(st.integers(1, n)) for n in (150, 150, 80))
    block, dtype = data.draw(st.sampled_from([16, 32, 64, 128])), data.draw(st.sampled_from(DTYPES))
    q, k, _ = make((1, H, Hkv, S, T, D, block), dtype)
    mask = torch.rand(1, T) > data.draw(st.floats(0, 1)) if data.draw(st.booleans()) else None
    lse = lse_of(q, k, mask, block)
    expected = reference_search.block_sums(q, k, lse, mask, D**-0.5, block)
    torch.testing.assert_close(run(q, k, lse, mask, block), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
def test_repeated_runs_have_the_same_bits_and_a_graph_replays() -> None:
    q, k, _ = (x.cuda() for x in make((1, 4, 2, 3000, 2000, 128, 128), torch.bfloat16))
    lse = lse_of(q, k, None, 128)
    expected = triton_search.block_sums(q, k, lse, None, 128**-0.5, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = triton_search.block_sums(q, k, lse, None, 128**-0.5, 128)
    graph.replay()
    assert torch.equal(found, expected)
