"""The block-sum search from ATen operators: equal to its reference, bounded in memory, and one pass over the scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blade_compile.kernels import dispatch, reference_search, search
from tests.tools import assert_close

# B, H, Hkv, S, T, D, block
SIZES = {
    "even": (1, 2, 2, 64, 128, 32, 32),
    "ragged-gqa": (2, 4, 2, 97, 111, 24, 16),
    "one-block": (1, 2, 1, 7, 9, 8, 64),
    "one-token": (1, 1, 1, 1, 1, 1, 16),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, H, Hkv, S, T, D, _ = size
    return (2 * torch.randn(B, H, S, D)).to(dtype), torch.randn(B, Hkv, T, D).to(dtype)


def masks(B: int, H: int, T: int) -> dict[str, Tensor | None]:
    return {
        "none": None,
        "holes": torch.rand(B, T) > 0.3,
        "additive": (3 * torch.randn(1, H, T)).masked_fill(torch.rand(1, H, T) > 0.8, -math.inf),
        "empty": torch.zeros(B, T, dtype=torch.bool),
    }


def truth(q: Tensor, k: Tensor, mask: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    return reference_search.attention_and_block_sums(q, k, k, mask, q.shape[-1] ** -0.5, block)[1:]


@pytest.mark.parametrize("chunk", [1, search.CHUNK_ELEMENTS], ids=["strips-of-one-block", "one-strip"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sums_and_lse_are_close_to_the_reference(
    size: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "CHUNK_ELEMENTS", chunk)
    B, H, _, _, T, D, block = SIZES[size]
    q, k = make(SIZES[size], dtype)
    for name, mask in masks(B, H, T).items():
        exact_lse, exact = truth(q.double(), k.double(), mask, block)
        plain_lse, plain = truth(q, k, mask, block)
        bias = dispatch.key_bias(mask, dtype)
        lse, one_pass = search.lse_and_block_sums(q, k, bias, D**-0.5, block)
        from_lse = search.block_sums(q, k, plain_lse, bias, D**-0.5, block)
        assert_close(lse, exact_lse, plain_lse, f"{name}: lse")
        assert_close(one_pass, exact, plain, f"{name}: one pass")
        assert_close(from_lse, exact, plain, f"{name}: from the LSE")


def test_fp64_stays_fp64() -> None:
    q, k = make(SIZES["ragged-gqa"], torch.float64)
    lse, sums = search.lse_and_block_sums(q, k, None, 0.2, 16)
    assert lse.dtype == sums.dtype == torch.float64
    expected = reference_search.block_sums(q, k, lse, None, 0.2, 16)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)


def test_rows_of_blocks_sum_to_their_queries() -> None:
    q, k = make(SIZES["ragged-gqa"], torch.float32)
    _, sums = search.lse_and_block_sums(q, k, None, 0.2, 16)
    tokens = torch.tensor([16.0] * 6 + [1.0])
    torch.testing.assert_close(sums.sum(-1), tokens.expand(2, 4, -1), rtol=1e-5, atol=0)


def test_a_cached_lse_and_rows_that_saw_nothing() -> None:
    q, k = make(SIZES["ragged-gqa"], torch.float32)
    lse = torch.randn(2, 4, 97) + 3
    lse[0, 1, 16:32] = -math.inf
    found = search.block_sums(q, k, lse, None, 0.2, 16)
    torch.testing.assert_close(found, reference_search.block_sums(q, k, lse, None, 0.2, 16), rtol=1e-5, atol=1e-6)
    assert (found[0, 1, 1] == 0).all()


def test_only_active_samples_are_searched() -> None:
    q, k = make((3, 2, 1, 40, 50, 16, 16), torch.float32)
    lse = truth(q, k, None, 16)[0]
    everything = search.block_sums(q, k, lse, None, 0.25, 16)
    found = search.block_sums(q, k, lse, None, 0.25, 16, torch.tensor([0, 1, 0], dtype=torch.int32))
    assert torch.equal(found[1], everything[1]) and not found[::2].any()


def test_a_sample_has_the_same_bits_alone_and_in_a_batch() -> None:
    q, k = make((3, 4, 2, 97, 111, 24, 16), torch.bfloat16)
    lse, sums = search.lse_and_block_sums(q, k, None, 0.2, 16)
    alone = search.lse_and_block_sums(q[1:2], k[1:2], None, 0.2, 16)
    assert torch.equal(lse[1:2], alone[0]) and torch.equal(sums[1:2], alone[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_end_where_the_reference_has_them(value: float) -> None:
    q, k = make((1, 2, 2, 60, 70, 16, 16), torch.float32)
    mask = torch.rand(1, 70) > 0.3
    mask[0, 20] = True
    q[0, 0, 33, 7] = value
    k[0, 1, 20, 9] = value
    k[:, :, ~mask[0]] = math.nan  # hidden: seen by nothing
    lse, expected = truth(q, k, mask, 16)
    bias = dispatch.key_bias(mask, torch.float32)
    found = search.block_sums(q, k, lse, bias, 0.25, 16)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_memory_is_one_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    """No score matrix: the largest temporary is a strip, far below S x T."""
    monkeypatch.setattr(search, "CHUNK_ELEMENTS", 1 << 14)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return out

    q, k = make((1, 2, 2, 512, 512, 16, 16), torch.float32)
    with Watch():
        search.lse_and_block_sums(q, k, None, 0.25, 16)
    assert largest <= max(1 << 14, q.numel())


@given(st.data())
def test_search_property(data: st.DataObject) -> None:
    H, Hkv = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))
    S, T, D = (data.draw(st.integers(1, n)) for n in (150, 150, 40))
    block, dtype = data.draw(st.sampled_from([16, 32, 64, 128])), data.draw(st.sampled_from(DTYPES))
    q, k = make((2, H, Hkv, S, T, D, block), dtype)
    mask = torch.rand(2, T) > data.draw(st.floats(0, 1)) if data.draw(st.booleans()) else None
    lse, expected = truth(q, k, mask, block)
    bias = dispatch.key_bias(mask, dtype)
    found_lse, found = search.lse_and_block_sums(q, k, bias, D**-0.5, block)
    torch.testing.assert_close(found_lse, lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(search.block_sums(q, k, lse, bias, D**-0.5, block), expected, rtol=2e-5, atol=2e-5)
