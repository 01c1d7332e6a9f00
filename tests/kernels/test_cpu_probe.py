"""The C++ probe against the reference: maps within fp32 rounding, selections exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blade_compile.kernels import cpu_build, cpu_probe, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# B, H, Hkv, S, T, D, block, probe tokens
SIZES = {
    "even": (2, 2, 2, 256, 256, 64, 64, 16),
    "ragged-gqa": (2, 4, 2, 300, 457, 40, 32, 16),
    "odd-probe": (1, 2, 1, 513, 640, 72, 64, 12),
    "whole-blocks": (1, 1, 1, 200, 300, 256, 128, 128),
    "more-than-a-tile": (1, 1, 1, 333, 300, 96, 128, 100),
    "one-token": (2, 2, 2, 77, 33, 33, 16, 1),
    "single": (1, 1, 1, 1, 1, 1, 16, 16),
    "many-blocks": (1, 1, 1, 2048, 1100, 32, 16, 4),
}
SELECTIONS = (
    {"sparsity": 0.8},
    {"sparsity": 0.0},
    {"sparsity": 0.999},
    {"tau": 0.95},
    {"tau": 0.3, "min_keep": 0.01},
    {"tau": 1.0, "max_keep": 0.5},
    {"tau": 1.0},
    {"tau": 0.9, "min_keep": 0.5, "max_keep": 0.2},
)


@pytest.fixture(autouse=True)
def _library() -> None:
    assert cpu_probe.available(), "the machine that runs the tests has a C++ compiler"


def make(B: int, H: int, Hkv: int, S: int, T: int, D: int, block: int, p: int, dtype: torch.dtype = torch.float32):
    """q, k and positions; scores of a few units, so that the softmax is neither flat nor one-hot."""
    q, k = (2 * torch.randn(B, H, S, D)).to(dtype), torch.randn(B, Hkv, T, D).to(dtype)
    return q, k, positions(H, S, block, p, "q"), positions(H, T, block, p, "k")


def positions(H: int, tokens: int, block: int, p: int, side: str, seed: int = 0) -> Tensor:
    return reference.probe_positions(tokens, block, p, H, seed, side)


def additive(mask: Tensor | None) -> Tensor | None:
    bias = reference.additive_mask(mask, torch.float32)
    return None if bias is None else bias.squeeze(2)


def run(
    q: Tensor, k: Tensor, mask: Tensor | None, block: int, pos_q: Tensor, pos_k: Tensor, isa: str | None = None
) -> Tensor:
    return cpu_probe.probe_map(q, k, additive(mask), q.shape[-1] ** -0.5, block, pos_q, pos_k, isa=isa)


def exact(q: Tensor, k: Tensor, mask: Tensor | None, block: int, p: int) -> Tensor:
    return reference.probe_map(q, k, mask, q.shape[-1] ** -0.5, block, p, 0)


def masks(B: int, H: int, T: int) -> dict[str, Tensor | None]:
    return {
        "none": None,
        "holes": torch.rand(B, T) > 0.3,
        "padding": torch.arange(T).expand(1, T) < T // 2 + 1,
        "additive": (3 * torch.randn(1, H, T)).masked_fill(torch.rand(1, H, T) > 0.8, -math.inf),
        "empty": torch.zeros(B, T, dtype=torch.bool),
    }


def largest_score(q: Tensor, k: Tensor, mask: Tensor | None) -> float:
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    bias = additive(mask)
    return float(scores.abs().max() + (0 if bias is None else bias.masked_fill(bias == -math.inf, 0).abs().max()))


def assert_relatively_close(found: Tensor, truth: Tensor, plain: Tensor, largest: float, name: str) -> None:
    """Relative errors at most twice plain PyTorch's, plus the step of fp32 at the largest score.

    A score is rounded to fp32 in every implementation, and a map entry has the absolute error of its score as its
    relative error. Zeros and NaN have to stand in the same places.
    """
    assert torch.equal(found.isnan(), truth.isnan()) and torch.equal(found == 0, truth == 0), name
    error, plain_error = (float(((x.double() - truth).abs() / truth).nan_to_num(0).max()) for x in (found, plain))
    bound = 2 * plain_error + torch.finfo(torch.float32).eps * (1 + largest)
    assert error <= bound, f"{name}: relative error {error:.2e}, allowed {bound:.2e} (plain: {plain_error:.2e})"


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, x, y in zip(("kv_num_blocks", "kv_indices"), found, expected, strict=True):
        assert x.dtype == y.dtype == torch.int32 and torch.equal(x, y), f"{name}: {x} is not {y}"


BEST, *OTHERS = cpu_build.available_isas()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("isa", "size"),
    [*itertools.product([BEST], SIZES), *itertools.product(OTHERS, ["ragged-gqa", "odd-probe", "more-than-a-tile"])],
)
def test_map_and_fused_selection_equal_the_reference(isa, size, dtype):
    B, H, Hkv, S, T, D, block, p = SIZES[size]
    q, k, pos_q, pos_k = make(*SIZES[size], dtype)
    for name, mask in masks(B, H, T).items():
        found = run(q, k, mask, block, pos_q, pos_k, isa)
        truth = exact(q.double(), k.double(), mask, block, p)
        plain = exact(q.float(), k.float(), mask, block, p)
        assert_relatively_close(found, truth, plain, largest_score(q, k, mask), name)
        assert found.nan_to_num().max() <= 1
        for choice in ({"sparsity": 0.7}, {"tau": 0.8}):
            fused = cpu_probe.predict(q, k, additive(mask), D**-0.5, block, pos_q, pos_k, **choice, isa=isa)
            assert_same(fused, reference.select_blocks(found, **choice))


def test_a_sample_alone_and_in_a_batch_has_the_same_bits():
    B, block, p = 3, 32, 16
    for dtype in DTYPES:
        q, k, pos_q, pos_k = make(B, 4, 2, 300, 457, 40, block, p, dtype)
        mask = torch.rand(B, 457) > 0.3
        together = run(q, k, mask, block, pos_q, pos_k)
        for b in range(B):
            alone = run(q[b : b + 1], k[b : b + 1], mask[b : b + 1], block, pos_q, pos_k)
            assert torch.equal(alone.view(torch.int32), together[b : b + 1].view(torch.int32))


def test_the_number_of_threads_does_not_change_a_bit():
    q, k, pos_q, pos_k = make(2, 3, 3, 700, 500, 64, 32, 16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(q, k, None, 32, pos_q, pos_k))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_without_libtorchs_threads_the_result_is_the_same(monkeypatch):
    q, k, pos_q, pos_k = make(1, 3, 3, 300, 300, 64, 32, 16)
    threaded = run(q, k, None, 32, pos_q, pos_k)
    monkeypatch.setattr(cpu_build, "parallel_for", lambda: None)
    assert torch.equal(run(q, k, None, 32, pos_q, pos_k), threaded)


def test_native_gqa_equals_expanded_heads():
    q, k, pos_q, pos_k = make(2, 6, 2, 200, 300, 64, 32, 16)
    expanded = k.repeat_interleave(3, 1)
    assert torch.equal(run(q, k, None, 32, pos_q, pos_k), run(q, expanded, None, 32, pos_q, pos_k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    q, k, pos_q, pos_k = make(2, 2, 2, 200, 300, 35, 32, 16, dtype)
    expected = run(q, k, None, 32, pos_q, pos_k)
    layouts = {
        "flash": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "part of a larger one": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    }
    for name, layout in layouts.items():
        assert not layout(q).is_contiguous()
        assert torch.equal(run(layout(q), layout(k), None, 32, pos_q, pos_k), expected), name
    one = q[:1, :1].expand(2, 2, -1, -1)
    assert torch.equal(run(one, k, None, 32, pos_q, pos_k), run(one.contiguous(), k, None, 32, pos_q, pos_k))


def test_nothing_outside_the_samples_and_the_open_keys_is_used():
    B, H, T, block, p = 1, 2, 300, 64, 8
    q, k, pos_q, pos_k = make(B, H, H, 200, T, 64, block, p)
    mask = torch.rand(B, T) > 0.4
    expected = run(q, k, mask, block, pos_q, pos_k)
    for h in range(H):
        unread_q, unread_k = torch.ones(200, dtype=torch.bool), torch.ones(T, dtype=torch.bool)
        unread_q[pos_q[h][pos_q[h] >= 0]] = False
        unread_k[pos_k[h][pos_k[h] >= 0]] = False
        q[:, h, unread_q] = math.nan
        k[:, h, unread_k | ~mask[0]] = math.nan
    assert torch.equal(run(q, k, mask, block, pos_q, pos_k).nan_to_num(2), expected.nan_to_num(2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("isa", cpu_build.available_isas())
def test_bad_values_end_where_the_reference_has_them(isa, value):
    B, H, Hkv, S, T, D, block, p = sizes = (1, 2, 2, 256, 300, 64, 32, 16)
    q, k, pos_q, pos_k = make(*sizes)
    q[0, 0, pos_q[0, 3, 5], 7] = value  # one row of one query block
    k[0, 1, pos_k[1, 4, 2], 9] = value  # one key: every row of the head
    found, truth = run(q, k, None, block, pos_q, pos_k, isa), exact(q, k, None, block, p)
    assert torch.equal(found.isnan(), truth.isnan())
    if not math.isnan(value):
        torch.testing.assert_close(found, truth, equal_nan=True, rtol=1e-4, atol=1e-6)
    num, _ = cpu_probe.predict(q, k, None, D**-0.5, block, pos_q, pos_k, sparsity=0.9, isa=isa)
    assert torch.equal(num[truth.isnan().all(-1)], num.new_full((int(truth.isnan().all(-1).sum()),), truth.shape[-1]))


def test_scores_too_large_for_exp_are_still_a_softmax():
    q, k, pos_q, pos_k = make(1, 1, 1, 128, 128, 64, 32, 16)
    for factor in (30.0, 1e4, 1e30):
        found, truth = run(q * factor, k, None, 32, pos_q, pos_k), exact(q.double() * factor, k.double(), None, 32, 16)
        torch.testing.assert_close(found.double(), truth, rtol=1e-2, atol=1e-2)


def test_edge_of_a_padding_is_never_lost():
    T, block = 256, 32
    q, k, pos_q, pos_k = make(1, 1, 1, 64, T, 32, block, 4)
    for edge in range(1, T):
        mask = (torch.arange(T) < edge)[None]
        num, idx = cpu_probe.predict(q, k, additive(mask), 0.1, block, pos_q, pos_k, sparsity=0.9)
        sampled = pos_k[0, (edge - 1) // block] < edge
        if not sampled.any():
            assert bool((idx[0, 0, :, : num.min()] == (edge - 1) // block).any(-1).all()), edge


@pytest.mark.parametrize("choice", SELECTIONS, ids=str)
@pytest.mark.parametrize("isa", cpu_build.available_isas())
def test_selection_of_one_map_is_exactly_the_references(isa, choice):
    for nK in (1, 2, 7, 64, 300):
        smooth = torch.rand(2, 3, 5, nK) ** 4
        coarse = (smooth * 4).floor() / 4  # ties everywhere
        spiky = torch.where(torch.rand_like(smooth) > 0.9, smooth, -0.0)
        tiny = smooth * 1e-38
        broken = torch.where(torch.rand_like(smooth) > 0.8, math.nan, smooth)
        force_q, force_k = torch.rand(5) > 0.7, torch.rand(nK) > 0.8
        maps = (smooth, coarse, spiky, tiny, broken, torch.zeros_like(smooth), smooth.transpose(0, 1))
        for block_map, forced_q, forced_k in itertools.product(maps, (None, force_q), (None, force_k)):
            forced = {"force_q": forced_q, "force_k": forced_k}
            found = cpu_probe.select_blocks(block_map, **choice, **forced, isa=isa)
            assert_same(found, reference.select_blocks(block_map, **choice, **forced))


EDGES = [0.0, -0.0, 1.0, 0.5, 2.0**-40, 2.0**-41, 1e-45, 1 / 3, 0.1, math.nan]
VALUES = st.sampled_from(EDGES) | st.floats(0, 1, width=32)
SHARES = st.sampled_from([1e-6, 0.05, 0.25, 1 / 3, 0.5, 0.95, 1.0]) | st.floats(1e-6, 1)


@given(st.data())
def test_selection_property(data):
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
    assert_same(cpu_probe.select_blocks(block_map, **choice), reference.select_blocks(block_map, **choice))


@given(st.data())
def test_prediction_property(data):
    H, Hkv = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 2)]))
    S, T, D = (data.draw(st.integers(1, n)) for n in (150, 150, 80))
    block, p = data.draw(st.sampled_from([16, 32, 64, 128])), data.draw(st.integers(1, 128))
    dtype, masked = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    q, k, pos_q, pos_k = make(2, H, Hkv, S, T, D, block, min(p, block), dtype)
    mask = torch.rand(2, T) > data.draw(st.floats(0, 1)) if masked else None
    found = run(q, k, mask, block, pos_q, pos_k)
    torch.testing.assert_close(found, exact(q.float(), k.float(), mask, block, p), equal_nan=True, rtol=2e-5, atol=1e-7)
    fused = cpu_probe.predict(q, k, additive(mask), D**-0.5, block, pos_q, pos_k, tau=0.7, min_keep=0.1)
    assert_same(fused, reference.select_blocks(found, tau=0.7, min_keep=0.1))


def test_bad_inputs_are_named():
    q, k, pos_q, pos_k = make(1, 2, 2, 64, 64, 32, 32, 8)
    good = {"q": q, "k": k, "key_bias": None, "scale": 1.0, "block_size": 32}
    good |= {"positions_q": pos_q, "positions_k": pos_k}
    for change, words in (
        ({"q": q.double(), "k": k.double()}, "float64"),
        ({"k": k.half()}, "float16"),
        ({"k": k[:, :1].expand(1, 3, 64, 32)}, "multiple of Hkv"),
        ({"k": k[..., :16]}, "multiple of Hkv"),
        ({"q": q[0]}, "multiple of Hkv"),
        ({"positions_q": pos_q[:, :1]}, "positions_q"),
        ({"positions_k": pos_k + 64}, "position"),
        ({"key_bias": torch.zeros(1, 1, 32)}, "key_bias"),
        ({"key_bias": torch.zeros(1, 1, 64, dtype=torch.bfloat16)}, "key_bias"),
    ):
        with pytest.raises(ValueError, match=words):
            cpu_probe.probe_map(**{**good, **change})
    with pytest.raises(ValueError, match="block_map"):
        cpu_probe.select_blocks(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="force_k"):
        cpu_probe.select_blocks(torch.zeros(1, 1, 2, 3), force_k=torch.ones(2, dtype=torch.bool))
