"""The Triton probe: sampled tokens exactly the reference's, maps within the tolerance policy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from blade_compile.kernels import reference, triton_probe
from tests.tools import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # NaN on purpose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies the bits of bf16 as integers.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
# B, H, Hkv, S, T, D, block, probe tokens
SIZES = {
    "even": (1, 2, 2, 128, 512, 64, 64, 16),
    "ragged-gqa": (2, 2, 1, 150, 457, 40, 64, 16),
    "odd-probe": (1, 2, 1, 200, 640, 72, 128, 5),
    "wide-head": (1, 1, 1, 97, 300, 256, 64, 32),
    "whole-blocks": (1, 1, 1, 200, 300, 128, 128, 128),
    "one-token": (2, 1, 1, 77, 333, 33, 16, 1),
    "single": (1, 1, 1, 1, 1, 1, 64, 16),
    "many-blocks": (1, 1, 1, 600, 1100, 32, 16, 4),
}


@triton.jit
def _positions_kernel(out, seed, tokens, blocks, BLOCK_SIZE: tl.constexpr, PROBE: tl.constexpr, SLOTS: tl.constexpr):
    head, block = tl.program_id(0), tl.program_id(1)
    stratum = tl.arange(0, SLOTS)
    token = triton_probe.sampled_tokens(seed, head, block, stratum, tokens, BLOCK_SIZE, PROBE)
    tl.store(out + (head * blocks + block) * PROBE + stratum, token, mask=stratum < PROBE)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1, -1, 123456789012])
def test_sampled_tokens_are_exactly_the_references(seed: int) -> None:
    for tokens, block, probe in ((1, 64, 16), (333, 64, 16), (1000, 128, 5), (517, 128, 128), (100, 16, 1)):
        for side, salt in (("q", 0), ("k", triton_probe.SIDE_K)):
            expected = reference.probe_positions(tokens, block, probe, 2, seed, side).to(torch.int32)
            found = torch.empty(expected.shape, dtype=torch.int32, device=DEVICE)
            blocks, slots = found.shape[1], triton.next_power_of_2(probe)
            start = triton_probe.hashed_seed(seed, salt)
            _positions_kernel[(2, blocks)](found, start, tokens, blocks, block, probe, slots)
            assert torch.equal(found.cpu(), expected), (tokens, block, probe, side)


def make(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """q and k; scores of a few units, so that the softmax is neither flat nor one-hot."""
    B, H, Hkv, S, T, D, *_ = size
    return (2 * torch.randn(B, H, S, D)).to(dtype), torch.randn(B, Hkv, T, D).to(dtype)


def run(q: Tensor, k: Tensor, mask: Tensor | None, block: int, p: int, seed: int = 0) -> Tensor:
    bias = reference.additive_mask(mask, torch.float32)
    bias = None if bias is None else bias.squeeze(2).to(DEVICE)
    return triton_probe.probe_map(q.to(DEVICE), k.to(DEVICE), bias, q.shape[-1] ** -0.5, block, p, seed).cpu()


def truth(q: Tensor, k: Tensor, mask: Tensor | None, block: int, p: int) -> Tensor:
    return reference.probe_map(q, k, mask, q.shape[-1] ** -0.5, block, p, 0)


def masks(B: int, H: int, T: int) -> dict[str, Tensor | None]:
    return {
        "none": None,
        "holes": torch.rand(B, T) > 0.3,
        "padding": torch.arange(T).expand(1, T) < T // 2 + 1,
        "additive": (3 * torch.randn(1, H, T)).masked_fill(torch.rand(1, H, T) > 0.8, -math.inf),
        "empty": torch.zeros(B, T, dtype=torch.bool),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_map_is_close_to_the_references(size: str, dtype: torch.dtype) -> None:
    B, H, _, _, T, _, block, p = SIZES[size]
    q, k = make(SIZES[size], dtype)
    for name, mask in masks(B, H, T).items():
        found = run(q, k, mask, block, p)
        assert found.is_contiguous() and (found.nan_to_num() <= 1 + 1e-6).all()
        assert_close(found, truth(q.double(), k.double(), mask, block, p), truth(q, k, mask, block, p), name)


def test_a_sample_alone_and_in_a_batch_has_the_same_bits() -> None:
    q, k = make((3, 2, 1, 150, 300, 40))
    mask = torch.rand(3, 300) > 0.3
    together = run(q, k, mask, 64, 16)
    for b in range(3):
        alone = run(q[b : b + 1], k[b : b + 1], mask[b : b + 1], 64, 16)
        assert torch.equal(alone.view(torch.int32), together[b : b + 1].view(torch.int32))


def test_native_gqa_equals_expanded_heads() -> None:
    q, k = make((2, 4, 2, 130, 200, 64))
    assert torch.equal(run(q, k, None, 64, 16), run(q, k.repeat_interleave(2, 1), None, 64, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    q, k = make((2, 2, 2, 130, 200, 35), dtype)
    expected = run(q, k, None, 64, 16)
    layouts = {
        "flash": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "part of a larger one": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    }
    for name, layout in layouts.items():
        assert not layout(q).is_contiguous()
        assert torch.equal(run(layout(q), layout(k), None, 64, 16), expected), name


def test_nothing_outside_the_samples_and_the_open_keys_is_used() -> None:
    H, S, T, block, p = 2, 200, 300, 64, 8
    q, k = make((1, H, H, S, T, 64))
    mask = torch.rand(1, T) > 0.4
    expected = run(q, k, mask, block, p)
    sampled_q = reference.probe_positions(S, block, p, H, 0, "q")
    sampled_k = reference.probe_positions(T, block, p, H, 0, "k")
    for h in range(H):
        unread_q, unread_k = torch.ones(S, dtype=torch.bool), torch.ones(T, dtype=torch.bool)
        unread_q[sampled_q[h][sampled_q[h] >= 0]] = False
        unread_k[sampled_k[h][sampled_k[h] >= 0]] = False
        q[:, h, unread_q] = math.nan
        k[:, h, unread_k | ~mask[0]] = math.nan
    assert torch.equal(run(q, k, mask, block, p).nan_to_num(2), expected.nan_to_num(2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("kind", ["none", "holes"])
def test_bad_values_end_where_the_reference_has_them(value: float, kind: str) -> None:
    H, S, T, block, p = 2, 256, 300, 64, 16
    q, k = make((1, H, H, S, T, 64))
    mask = masks(1, H, T)[kind]
    q[0, 0, reference.probe_positions(S, block, p, H, 0, "q")[0, 3, 5], 7] = value  # a row of one query block
    k[0, 1, reference.probe_positions(T, block, p, H, 0, "k")[1, 3, 2], 9] = value  # a key: every row of the head
    found, expected = run(q, k, mask, block, p), truth(q, k, mask, block, p)
    assert torch.equal(found.isnan(), expected.isnan())
    if not math.isnan(value):
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-6)


def test_a_bad_query_that_sees_nothing_gives_zeros() -> None:
    q, k = make((1, 1, 1, 64, 128, 16))
    nothing = torch.zeros(1, 128, dtype=torch.bool)
    assert (run(torch.full_like(q, math.nan), k, nothing, 64, 16) == 0).all()


def test_the_lowest_finite_bias_hides_nothing() -> None:
    """Libraries write it for minus infinity. In a row of nothing else plain attention is flat, not empty."""
    q, k = make((1, 1, 1, 64, 256, 16))
    lowest = torch.finfo(torch.float32).min
    for mask in (torch.full((1, 256), lowest), torch.zeros(1, 256).masked_fill(torch.arange(256) > 99, lowest)):
        torch.testing.assert_close(run(q, k, mask, 64, 16), truth(q, k, mask, 64, 16))


def test_scores_too_large_for_exp_are_still_a_softmax() -> None:
    q, k = make((1, 1, 1, 128, 128, 64))
    for factor in (30.0, 1e4, 1e30):
        found, expected = run(q * factor, k, None, 64, 16), truth(q.double() * factor, k.double(), None, 64, 16)
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_edge_of_a_padding_is_never_lost() -> None:
    q, k = make((1, 1, 1, 64, 192, 16))
    sampled = reference.probe_positions(192, 64, 4, 1, 0, "k")[0]
    for edge in (1, 3, 64, 65, 66, 127, 128, 129, 131, 190):
        block = (edge - 1) // 64
        found = run(q, k, (torch.arange(192) < edge)[None], 64, 4)[0, 0, 0]
        assert bool(found[block].isnan()) != bool((sampled[block] < edge).any()), edge
        assert not found[:block].isnan().any() and (found[block + 1 :] == 0).all(), edge


@given(st.data())
def test_probe_property(data: st.DataObject) -> None:
    H, Hkv = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))
    S, T, D = (data.draw(st.integers(1, n)) for n in (150, 150, 80))
    block, p = data.draw(st.sampled_from([16, 32, 64, 128])), data.draw(st.integers(1, 128))
    dtype, masked = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    q, k = make((1, H, Hkv, S, T, D), dtype)
    mask = torch.rand(1, T) > data.draw(st.floats(0, 1)) if masked else None
    found, expected = run(q, k, mask, block, p), truth(q.float(), k.float(), mask, block, p)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=2e-5, atol=1e-7)


@pytest.mark.gpu
def test_memory_is_the_stated_formula_and_a_graph_replays() -> None:
    B, H, S, D, block, p = 1, 4, 8192, 96, 64, 16
    q, k = (torch.randn(B, H, S, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bias = torch.zeros(B, 1, S, device="cuda")
    probe = (q, k, bias, 0.1, block, p, 0)
    triton_probe.probe_map(*probe)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, blocks = torch.cuda.memory_allocated(), S // block
    expected = triton_probe.probe_map(*probe)
    stated = B * H * blocks * (p * 128 * 2 + (p + 1) * 4)
    assert torch.cuda.max_memory_allocated() - before <= expected.numel() * 4 + stated + 4096
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = triton_probe.probe_map(*probe)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(found, triton_probe.probe_map(*probe)) and not torch.equal(found, expected)
