"""The ATen path against the fp64 reference: outputs, LSE, gradients, chunking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blade_compile.kernels import aten, dispatch, lists
from tests.kernels.attention_cases import ODD_CASES, Case, exact, padding_mask, plain_sdpa
from tests.tools import assert_close


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    q, k, v = case.qkv(dtype)
    num, idx = case.random_lists()
    out, lse = aten.attention_forward(q, k, v, num, idx, None, case.D**-0.5, case.block)
    want, want_lse = exact(q, k, v, num, idx, block_size=case.block)
    plain = plain_sdpa(q, k, v, lists.kept_blocks(num, idx, case.nK), case.block)
    assert_close(out, want, plain.to(dtype))
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert (out[0, 0, : case.block] == 0).all() and (lse[0, 0, : case.block] == -torch.inf).all()
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kind", ["bool", "inf", "-1e4", "nothing"])
def test_key_masks(kind: str) -> None:
    case = Case(S=100, T=150, block=32)
    q, k, v = case.qkv()
    num, idx = case.random_lists()
    mask = padding_mask(case.B, case.T, kind)
    out, lse = aten.attention_forward(q, k, v, num, idx, dispatch.key_bias(mask, q.dtype), 0.2, 32)
    want, want_lse = exact(q, k, v, num, idx, key_mask=mask, block_size=32, scale=0.2)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_gradients_equal_autograd_through_the_reference(case: Case, mask: str) -> None:
    q, k, v = (x.requires_grad_() for x in case.qkv(torch.float64))
    num, idx = case.random_lists()
    key_mask = padding_mask(case.B, case.T, mask)
    out, lse = exact(q, k, v, num, idx, key_mask=key_mask, block_size=case.block)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    live = lse.isfinite()
    want = torch.autograd.grad((out * grad_out).sum() + (lse[live] * grad_lse[live]).sum(), (q, k, v))
    with torch.no_grad():
        bias = dispatch.key_bias(key_mask, q.dtype)
        args = (q, k, v, out, lse, num, idx, bias, case.D**-0.5, case.block)
        got = aten.attention_backward(grad_out, grad_lse, *args)
    for name, g, w in zip("qkv", got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("chunk", [1, 40_000])
def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    case = Case(S=300, T=300, block=32)
    q, k, v = case.qkv()
    num, idx = case.random_lists()
    select = (q, k, None, 0.1, 32, 8, 0, 0.5, 0.95, 0.05, 1.0, None, None)

    def run() -> tuple[torch.Tensor, ...]:
        out, lse = aten.attention_forward(q, k, v, num, idx, None, 0.1, 32)
        grads = aten.attention_backward(out, lse.nan_to_num(neginf=0), q, k, v, out, lse, num, idx, None, 0.1, 32)
        return out, lse, *grads, *aten.select(*select)

    whole = run()
    monkeypatch.setattr(aten, "CHUNK_ELEMENTS", chunk)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class _Largest(TorchDispatchMode):
    """The most elements that any operator's result holds."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= t.numel():
                self.elements = max(self.elements, t.numel())
        return out


def test_temporaries_stay_within_the_stated_bound() -> None:
    case = Case(B=1, H=8, Hkv=8, S=4096, T=4096, D=32, block=64)
    q, k, v = case.qkv()
    num, idx = case.full_lists()
    with _Largest() as forward:
        out, lse = aten.attention_forward(q, k, v, num, idx, None, 0.1, 64)
    with _Largest() as backward:
        aten.attention_backward(out, None, q, k, v, out, lse, num, idx, None, 0.1, 64)
    with _Largest() as probe:
        aten.select(q, k, None, 0.1, 64, 16, 0, 0.5, 0.95, 0.05, 1.0, None, None)
    inputs = q.numel()
    bound = max(aten.CHUNK_ELEMENTS, 4096 * 64, inputs)
    assert max(forward.elements, backward.elements) <= bound < 4096 * 4096
    assert probe.elements <= max(bound, 8 * 16 * 64 * 16) < 8 * 1024 * 1024


def test_bad_values_stay_where_they_are() -> None:
    case = Case(B=1, H=1, Hkv=1, S=64, T=64, block=16)
    q, k, v = case.qkv()
    num = torch.tensor([[[1, 1, 4, 0]]], dtype=torch.int32)
    idx = torch.tensor([0, 1, 2, 3], dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    idx[0, 0, 1, 0] = 3
    q[0, 0, 5], v[0, 0, 50] = torch.nan, torch.nan  # query row 5; value in block 3
    out, _ = aten.attention_forward(q, k, v, num, idx, None, 0.25, 16)
    bad = out[0, 0].isnan().any(-1)
    assert bad.nonzero().flatten().tolist() == [5, *range(16, 48)]
