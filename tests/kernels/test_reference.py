"""The reference against independent arithmetic and its own invariants."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from blade_compile.kernels import lists, reference
from tests.kernels.attention_cases import Case, padding_mask


def test_positions_lie_in_their_blocks_without_repeats() -> None:
    positions = reference.probe_positions(333, 128, 16, 3, seed=7, side="q")
    assert positions.shape == (3, 3, 16)
    for head in positions:
        for block, row in enumerate(head):
            assert (row // 128 == block).all() and len(set(row.tolist())) == 16 and (row < 333).all()


def test_short_last_block_is_read_whole() -> None:
    last = reference.probe_positions(128 + 5, 128, 16, 1, seed=0, side="k")[0, -1]
    assert last.tolist() == [128, 129, 130, 131, 132] + [-1] * 11


def test_sample_depends_on_seed_side_head_and_block_only() -> None:
    base = reference.probe_positions(1024, 128, 16, 4, 0, "q")
    assert torch.equal(base, reference.probe_positions(4096, 128, 16, 8, 0, "q")[:4, :8])
    assert not torch.equal(base, reference.probe_positions(1024, 128, 16, 4, 1, "q"))
    assert not torch.equal(base, reference.probe_positions(1024, 128, 16, 4, 0, "k"))
    offsets = base % 128
    assert not torch.equal(offsets[0], offsets[1]) and not torch.equal(offsets[:, 0], offsets[:, 1])


def test_every_token_can_be_drawn() -> None:
    seen = {int(t) for seed in range(200) for t in reference.probe_positions(32, 32, 8, 1, seed, "q").flatten()}
    assert seen == set(range(32))


def test_map_with_every_token_sampled_is_the_pooled_softmax() -> None:
    q, k = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 96, 16)
    got = reference.probe_map(q, k, None, 0.25, 32, 32, 0)
    probs = (q @ k.mT * 0.25).softmax(-1).unflatten(-1, (3, 32)).unflatten(-3, (2, 32))
    torch.testing.assert_close(got, probs.amax((3, 5)))


def test_padding_edge_is_never_lost() -> None:
    q, k = torch.randn(1, 1, 64, 16), torch.randn(1, 1, 128, 16)
    open_key = next(
        t for t in range(32, 64) if t not in reference.probe_positions(128, 32, 4, 1, 0, "k")[0, 1].tolist()
    )
    mask = torch.zeros(1, 128, dtype=torch.bool)
    mask[0, :32], mask[0, open_key] = True, True
    block_map = reference.probe_map(q, k, mask, 0.25, 32, 4, 0)
    num, idx = reference.select_blocks(block_map, sparsity=0.9)
    assert block_map[0, 0, :, 1].isnan().all() and (block_map[0, 0, :, 2:] == 0).all()
    assert lists.kept_blocks(num, idx, 4)[0, 0, :, :2].all()


def test_sparsity_keeps_the_best_and_breaks_ties_low() -> None:
    block_map = torch.tensor([0.1, 0.5, 0.5, 0.0, 0.5]).view(1, 1, 1, 5)
    num, idx = reference.select_blocks(block_map, sparsity=0.6)
    assert num.item() == 2 and idx[0, 0, 0].tolist() == [1, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("tau", "kept"), [(0.5, [1]), (0.51, [1, 2]), (0.8, [1, 2]), (0.81, [1, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_tau_keeps_the_crossing_block(tau: float, kept: list[int]) -> None:
    block_map = torch.tensor([0, 40, 24, 16]).div(128).view(1, 1, 1, 4)
    num, idx = reference.select_blocks(block_map, tau=tau, min_keep=0.01)
    assert idx[0, 0, 0, : num.item()].tolist() == kept


def test_caps_bound_the_count() -> None:
    block_map = torch.rand(1, 2, 8, 40)
    num, _ = reference.select_blocks(block_map, tau=1.0, max_keep=0.17)
    assert (num == 6).all()
    one_sided = torch.zeros(1, 1, 4, 40).index_fill(-1, torch.tensor([3]), 1.0)
    num, _ = reference.select_blocks(one_sided, tau=0.95, min_keep=0.05)
    assert (num == 2).all()


def test_protected_blocks_come_on_top() -> None:
    block_map = torch.arange(10.0).div(10).expand(1, 1, 10, 10)
    force = torch.zeros(10, dtype=torch.bool).index_fill(0, torch.tensor([9]), True)
    num, idx = reference.select_blocks(block_map, sparsity=0.8, force_q=force, force_k=force)
    assert num[0, 0].tolist() == [3] * 9 + [10]
    assert idx[0, 0, 0, :3].tolist() == [7, 8, 9]


def test_nan_is_kept() -> None:
    block_map = torch.tensor([0.5, math.nan, 0.2, 0.1]).view(1, 1, 1, 4)
    num, idx = reference.select_blocks(block_map, sparsity=0.75)
    assert idx[0, 0, 0, : num.item()].tolist() == [0, 1]


@given(nQ=st.integers(1, 6), nK=st.integers(1, 40), sparsity=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_budget_is_kept_exactly(nQ: int, nK: int, sparsity: float, seed: int) -> None:
    block_map = torch.rand(2, 2, nQ, nK, generator=torch.Generator().manual_seed(seed))
    num, idx = reference.select_blocks(block_map, sparsity=sparsity)
    assert (num == max(1, math.floor((1 - sparsity) * nK + 1e-6))).all()
    kept = lists.kept_blocks(num, idx, nK)
    assert (kept.sum(-1) == num).all()
    worst_kept = block_map.masked_fill(~kept, 2).amin(-1)
    assert (worst_kept >= block_map.masked_fill(kept, -1).amax(-1)).all()


def test_lists_are_flex_attentions() -> None:
    from torch.nn.attention.flex_attention import BlockMask

    num, idx = reference.select_blocks(torch.rand(1, 2, 4, 4), sparsity=0.5)
    none = torch.zeros_like(num), torch.zeros_like(idx)
    mask = BlockMask.from_kv_blocks(*none, num, idx, BLOCK_SIZE=32, seq_lengths=(128, 128))
    assert torch.equal(mask.to_dense().bool(), lists.kept_blocks(num, idx, 4))


@pytest.mark.parametrize("kind", ["none", "bool", "inf"])
def test_every_block_is_dense_attention(kind: str) -> None:
    case = Case(Hkv=2)
    q, k, v = case.qkv(torch.float64)
    mask = padding_mask(case.B, case.T, kind)
    out, lse = reference.block_sparse_attention(q, k, v, *case.full_lists(), key_mask=mask, block_size=case.block)
    bias = reference.additive_mask(mask, torch.float64)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(out, want)
    scores = q @ k.repeat_interleave(2, 1).mT / 8 + (0 if bias is None else bias)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_forced_blocks_of_ranges() -> None:
    device = torch.device("cpu")
    assert lists.forced_blocks([], 100, 16, device) is None and lists.forced_blocks([4, 0], 100, 16, device) is None
    assert lists.forced_blocks([15, 2, -1, 1], 100, 16, device).nonzero().flatten().tolist() == [0, 1, 6]  # type: ignore[union-attr]
