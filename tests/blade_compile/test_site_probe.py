"""Recall against the exact attention weights, written out."""

from __future__ import annotations

import pytest
import torch

from blade_compile import site_probe
from blade_compile.kernels import lists, reference


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("strip", [1, 1 << 26])
def test_recall_is_the_exact_mass_on_kept_blocks(mask, strip, monkeypatch) -> None:
    monkeypatch.setattr(site_probe, "STRIP_BYTES", strip)
    B, H, Hkv, S, T, D, block = 2, 4, 2, 37, 53, 16, 16
    q, k = torch.randn(B, H, S, D), torch.randn(B, Hkv, T, D)
    key_mask = {None: None, "bool": torch.rand(B, T) > 0.3, "float": torch.randn(B, T)}[mask]
    block_map = torch.rand(B, H, 3, 4)
    num, idx = reference.select_blocks(block_map, sparsity=0.5, tau=1.0, min_keep=0.1, max_keep=1.0)
    found = site_probe.recall(q, k, num, idx, block, key_mask=key_mask, scale=0.3)

    scores = 0.3 * q @ k.repeat_interleave(H // Hkv, 1).transpose(-1, -2)
    bias = reference.additive_mask(key_mask, torch.float32)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    kept = lists.kept_blocks(num, idx, 4).repeat_interleave(block, -1)[..., :T].repeat_interleave(block, -2)[..., :S, :]
    assert found == pytest.approx((weights * kept).sum(-1).mean().item(), abs=1e-6)


def test_rows_without_any_key_are_left_out() -> None:
    q, k = torch.randn(1, 1, 32, 16), torch.randn(1, 1, 32, 16)
    num, idx = lists.full_lists(1, 1, 2, 2, q.device)
    nothing = torch.zeros(1, 32, dtype=torch.bool)
    assert site_probe.recall(q, k, num, idx, 16, key_mask=nothing) is None
    assert site_probe.recall(q, k, num, idx, 16) == pytest.approx(1)


def test_paired_times_take_turns() -> None:
    turns: list[str] = []
    site_probe.paired_times(lambda: turns.append("a"), lambda: turns.append("b"), torch.device("cpu"))
    assert "".join(turns) == "ab" * (1 + site_probe.PAIRS)
