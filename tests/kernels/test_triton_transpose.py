"""Transposed block lists are equal to those made from the mask, or wrong."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from blade_compile.kernels import lists, reference, triton_transpose
from tests.kernels.attention_cases import Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(num: torch.Tensor, idx: torch.Tensor, nK: int) -> None:
    keep = lists.kept_blocks(num, idx, nK)
    want = reference.lists_from_mask(keep.transpose(-1, -2))
    got = triton_transpose.transpose_lists(num.to(DEVICE), idx.to(DEVICE), nK)
    for name, g, w in zip(("num", "idx"), got, want, strict=True):
        assert g.dtype == torch.int32 and g.is_contiguous()
        assert g.cpu().equal(w), name


@pytest.mark.parametrize(
    "case", [Case(), Case(B=1, H=2, S=900, T=130), Case(H=3, S=64, T=500), Case(S=1, T=1)], ids=str
)
def test_equal_to_the_transposed_mask(case: Case) -> None:
    check(*case.random_lists(), case.nK)


def test_several_chunks_of_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_transpose, "LARGEST_CHUNK", 32)
    case = Case(B=1, H=2, S=64 * 70, T=64 * 65)
    check(*case.random_lists(), case.nK)


def test_every_block_and_none() -> None:
    case = Case(B=1, H=2)
    num, idx = case.full_lists()
    check(num, idx, case.nK)
    check(torch.zeros_like(num), torch.full_like(idx, 7), case.nK)


def test_lists_of_one_head_with_strides() -> None:
    case = Case(B=2, H=1, S=300, T=400)
    num, idx = case.random_lists()
    wide = torch.full((2, 1, case.nQ, 2 * case.nK), -5, dtype=torch.int32)
    wide[..., ::2] = idx
    check(num[:1].expand(2, 3, -1), wide[:1, :, :, ::2].expand(2, 3, -1, -1), case.nK)
    got, _ = triton_transpose.transpose_lists(num.to(DEVICE), idx[:, :, :, :3].to(DEVICE), case.nK)
    assert got.shape == (2, 1, case.nK)


def test_counts_above_the_capacity_and_indices_outside() -> None:
    num = torch.tensor([[[9, 2]]], dtype=torch.int32)
    idx = torch.tensor([[[[1, -1, 3], [2**31 - 1, 0, 1]]]], dtype=torch.int32)
    got_num, got_idx = triton_transpose.transpose_lists(num.to(DEVICE), idx.to(DEVICE), 3)
    assert got_num.tolist() == [[[1, 1, 0]]]
    assert got_idx.tolist() == [[[[1, 0], [0, 0], [0, 0]]]]


def test_no_block_at_all() -> None:
    num, idx = torch.zeros(1, 2, 0, dtype=torch.int32), torch.zeros(1, 2, 0, 3, dtype=torch.int32)
    got_num, got_idx = triton_transpose.transpose_lists(num, idx, 3)
    assert got_num.tolist() == [[[0] * 3] * 2]
    assert got_idx.shape == (1, 2, 3, 0)
