"""The Triton kernels on random problems: sizes, lists, masks, strides; forward and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from tests.kernels import test_triton_backward as backward
from tests.kernels import test_triton_forward as forward
from tests.kernels.attention_cases import Case, padding_mask

SIZES = {
    "B": st.integers(1, 2),
    "group": st.integers(1, 2),
    "Hkv": st.integers(1, 2),
    "S": st.integers(1, 150),
    "T": st.integers(1, 150),
    "D": st.integers(1, 80),
    "block": st.sampled_from([64, 128]),
    "dtype": st.sampled_from([torch.float32, torch.float16]),
    "seed": st.integers(0, 1000),
}


def _case(B: int, group: int, Hkv: int, S: int, T: int, D: int, block: int) -> Case:
    return Case(B=B, H=group * Hkv, Hkv=Hkv, S=S, T=T, D=D, block=block)


def _strided(x: Tensor) -> Tensor:
    return F.pad(x, (1, 2, 0, 3))[:, :, : x.shape[2], 1:-2]


@given(**SIZES, mask=st.sampled_from(["none", "bool", "inf", "-1e4", "nothing"]), strided=st.booleans())
def test_forward(B, group, Hkv, S, T, D, block, dtype, seed, mask, strided) -> None:
    torch.manual_seed(seed)
    case = _case(B, group, Hkv, S, T, D, block)
    qkv = case.qkv(dtype)
    if strided:
        qkv = tuple(map(_strided, qkv))
    num, idx = case.random_lists()
    key_mask = padding_mask(B, T, mask)
    bias = None if key_mask is None else forward.dispatch.key_bias(key_mask, dtype)
    forward.check(forward.forward(case, qkv, num, idx, bias), case, qkv, num, idx, key_mask)


@given(**SIZES, mask=st.sampled_from(["none", "bool", "-1e4"]), pooled=st.integers(0, 70), with_lse=st.booleans())
def test_gradients(B, group, Hkv, S, T, D, block, dtype, seed, mask, pooled, with_lse) -> None:
    torch.manual_seed(seed)
    key_mask = padding_mask(B, T, mask)
    bias = None if key_mask is None else forward.dispatch.key_bias(key_mask, dtype)
    case = _case(B, group, Hkv, S, T, D, block)
    problem = backward.problem(case, dtype, bias=bias, global_tokens=pooled, with_lse=with_lse)
    want, out, lse = problem.forward()
    # Absolute: where a row has one key its gradient is 0, and what is left is the rounding of dP - Delta. The tolerance
    # policy is applied in test_triton_backward, on sizes where a gradient is more than that.
    rough = {torch.float32: 2e-5, torch.float16: 3e-2}[dtype]
    for got, exact in zip(problem.run(out, lse), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=rough, atol=rough)
