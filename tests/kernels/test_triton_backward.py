"""The Triton backward against autograd through the fp64 reference: every gradient, also of global tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from blade_compile.kernels import lists, reference, triton_backward, triton_common, triton_configs
from tests.kernels.attention_cases import Case
from tests.tools import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bf16 tiles wrongly.
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
CASES = (
    Case(B=1, H=4, Hkv=2, S=130, T=97, D=40),
    Case(B=2, H=2, Hkv=2, S=111, T=257, D=64, block=128),
    Case(B=1, H=2, Hkv=1, S=200, T=150, D=128, block=128),
    Case(B=1, H=2, Hkv=1, S=100, T=170, D=256),
)
SMALL = Case(B=2, H=2, Hkv=1, S=100, T=170, D=24)


@dataclass
class Problem:
    """One call: its inputs, what flows back, and the gradients that it has to give."""

    case: Case
    inputs: list[Tensor]  # q, k, v and, if there are any, global k and v
    num: Tensor
    idx: Tensor
    bias: Tensor | None
    global_bias: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor | None

    def forward(self) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The gradients by autograd through the reference in fp64, and its out and LSE as the kernels get them."""
        inputs = [x.detach().double().requires_grad_() for x in self.inputs]
        q, k, v, keep, bias = _joined(self, inputs)
        rows = reference.lists_from_mask(keep)
        out, lse = reference.block_sparse_attention(q, k, v, *rows, key_mask=bias.double(), block_size=self.case.block)
        total = (out * self.grad_out.double()).sum()
        if self.grad_lse is not None:
            total = total + (lse * self.grad_lse.double())[lse.isfinite()].sum()
        return torch.autograd.grad(total, inputs), out.detach().to(self.inputs[0].dtype), lse.detach().float()

    def check(self) -> tuple[Tensor, ...]:
        """Run the kernels and compare; returns the gradients."""
        want, out, lse = self.forward()
        plain = _plain(self, out, lse)
        got = self.run(out, lse)
        assert len(got) == len(want)
        for name, g, w, p in zip(("dq", "dk", "dv", "dgk", "dgv"), got, want, plain, strict=False):
            assert g.transpose(1, 2).is_contiguous(), name
            assert_close(g, w, p, name)
        return got

    def run(self, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        def there(x: Tensor | None) -> Tensor | None:
            # not .to() alone: a test's strides have to survive
            return (
                None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)
            )

        q, k, v, *more = (there(x) for x in self.inputs)
        grad_out = self.grad_out.to(DEVICE)
        named = dict(zip(("global_k", "global_v"), more, strict=False))
        lse_grad = None if self.grad_lse is None else self.grad_lse.to(DEVICE)
        rest = (self.num.to(DEVICE), self.idx.to(DEVICE), there(self.bias), self.case.D**-0.5, self.case.block)
        got = triton_backward.attention_backward(
            grad_out,
            lse_grad,
            q,
            k,
            v,
            out.to(DEVICE),
            lse.to(DEVICE),
            *rest,
            **named,
            global_bias=there(self.global_bias),
        )
        return tuple(g.cpu() for g in got)


def problem(
    case: Case, dtype: torch.dtype, *, bias: Tensor | None = None, global_tokens: int = 0, with_lse: bool = True
) -> Problem:
    num, idx = case.random_lists()
    inputs, global_bias = list(case.qkv(dtype)), None
    if global_tokens:
        inputs += torch.randn(2, case.B, case.Hkv, global_tokens, case.D).to(dtype)
        global_bias = torch.rand(1, 1, global_tokens) * 4
    grad_lse = torch.randn(case.B, case.H, case.S) if with_lse else None
    grad_out = torch.randn(case.B, case.H, case.S, case.D).to(dtype)
    return Problem(case, inputs, num, idx, bias, global_bias, grad_out, grad_lse)


def _joined(p: Problem, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, mask of kept blocks and bias with the global tokens as further blocks, which every row keeps."""
    q, k, v, *more = inputs
    case = p.case
    keep = lists.kept_blocks(p.num.expand(case.B, case.H, -1), p.idx.expand(case.B, case.H, -1, -1), case.nK)
    bias = torch.zeros(1, 1, case.T) if p.bias is None else p.bias
    parts, biases = [(k, v)], [bias]
    if more:
        parts.append((more[0], more[1]))
        count = more[0].shape[2]
        biases.append(torch.zeros(1, 1, count) if p.global_bias is None else p.global_bias)
        extra = torch.ones(*keep.shape[:3], -(-count // case.block), dtype=torch.bool)
        keep = torch.cat([keep, extra], -1)
    k, v = (
        torch.cat([F.pad(x, (0, 0, 0, -x.shape[2] % case.block)) for x in side], 2) for side in zip(*parts, strict=True)
    )
    padded = [F.pad(x, (0, -x.shape[2] % case.block), value=-math.inf).expand(case.B, case.H, -1) for x in biases]
    return q, k, v, keep, torch.cat(padded, -1)


def _plain(p: Problem, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Flash attention's backward as one writes it in plain PyTorch: products in the inputs' dtype, the rest in fp32."""
    inputs = [x.detach().requires_grad_() for x in p.inputs]
    case, dtype = p.case, out.dtype
    q, k, v, keep, bias = _joined(p, inputs)
    wide_k, wide_v = (x.repeat_interleave(case.H // case.Hkv, 1) for x in (k, v))
    hidden = ~keep.repeat_interleave(case.block, -2)[:, :, : case.S].repeat_interleave(case.block, -1)
    hidden = hidden | (bias == -math.inf)[:, :, None]
    finite = [x.masked_fill(x == -math.inf, 0)[..., None] for x in (lse, bias)]
    with torch.no_grad():
        delta = (p.grad_out.float() * out.float()).sum(-1, keepdim=True)
        if p.grad_lse is not None:
            delta -= p.grad_lse[..., None]
        scores = (q @ wide_k.transpose(-1, -2)).float() * case.D**-0.5 + finite[1].transpose(-1, -2)
        probs = (scores - finite[0]).exp().masked_fill(hidden, 0)
        ds = probs * ((p.grad_out @ wide_v.transpose(-1, -2)).float() - delta) * case.D**-0.5
        ds, probs = ds.to(dtype), probs.to(dtype)
    # The chain rule beyond keys and values that were repeated, padded and joined is autograd's.
    grads = (ds @ wide_k, ds.transpose(-1, -2) @ q, probs.transpose(-1, -2) @ p.grad_out)
    return torch.autograd.grad((q, wide_k, wide_v), inputs, [g.detach() for g in grads])


def hiding_bias(case: Case, heads: int = 1) -> Tensor:
    """A finite bias on every key, and every third key hidden."""
    bias = torch.randn(case.B, heads, case.T)
    bias[..., 1::3] = -math.inf
    return bias


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_gradients(case: Case, dtype: torch.dtype) -> None:
    problem(case, dtype).check()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_key_bias(dtype: torch.dtype, heads: int) -> None:
    p = problem(SMALL, dtype, bias=hiding_bias(SMALL, heads))
    _, dk, dv = p.check()
    if heads == 1:
        assert (dk[:, :, 1::3] == 0).all()
        assert (dv[:, :, 1::3] == 0).all()


def test_without_a_gradient_of_the_lse() -> None:
    problem(SMALL, torch.float32, with_lse=False).check()


def test_one_list_for_all_heads() -> None:
    p = problem(SMALL, torch.float32)
    p.num, p.idx = p.num[:1, 1:].expand(-1, 2, -1), p.idx[:1, 1:]
    p.check()


def test_every_block_and_no_block() -> None:
    p = problem(SMALL, torch.float32)
    p.num, p.idx = SMALL.full_lists()
    p.check()
    p.num = torch.zeros_like(p.num)
    assert all((g == 0).all() for g in p.check())


def test_a_key_block_that_nobody_lists_gets_zeros() -> None:
    p = problem(SMALL, torch.float32)
    p.num, p.idx = torch.ones_like(p.num), torch.full_like(p.idx, 1)
    _, dk, dv = p.check()
    for grad in (dk, dv):
        assert (grad[:, :, :64] == 0).all()
        assert (grad[:, :, 128:] == 0).all()
        assert (grad[:, :, 64:128] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_global_tokens(dtype: torch.dtype) -> None:
    problem(SMALL, dtype, global_tokens=70).check()


def test_global_tokens_without_bias_beside_hidden_keys() -> None:
    p = problem(SMALL, torch.float32, bias=hiding_bias(SMALL), global_tokens=64, with_lse=False)
    p.global_bias = None
    p.check()


def test_long_lists_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_common, "SORT_FROM", 0)
    p = problem(SMALL, torch.float32)
    p.check()
    p.num, p.idx = p.num[:, :1], p.idx[:, :1]
    p.check()


@pytest.mark.parametrize("tile", [(64, 64), (64, 128), (128, 64), (32, 128)], ids=str)
def test_tiles_smaller_than_a_block(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]) -> None:
    M, N = tile
    tile = {"BLOCK_M": M, "BLOCK_N": N, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(triton_configs, "_from_table", lambda key: tile)
    problem(Case(B=1, H=2, Hkv=1, S=150, T=300, D=16, block=128), torch.float32, global_tokens=30).check()


def test_strided_inputs_and_gradients() -> None:
    case = Case(B=2, H=2, Hkv=2, S=80, T=80, D=16)
    p = problem(case, torch.float32)
    packed = torch.randn(case.B, case.S, 3, case.H, case.D).permute(2, 0, 3, 1, 4)
    p.inputs = [packed[0], packed[1], packed[2].transpose(-1, -2).contiguous().transpose(-1, -2)]
    p.grad_out = torch.randn(case.B, case.S, case.H, 2 * case.D).transpose(1, 2)[..., ::2]
    p.grad_lse = torch.randn(case.S).expand(case.B, case.H, -1)
    p.check()
    p.grad_out = torch.ones(()).expand(case.B, case.H, case.S, case.D)  # what .sum().backward() sends
    p.check()


def test_hidden_nan_stays_hidden() -> None:
    bias = hiding_bias(SMALL)
    p = problem(SMALL, torch.float32, bias=bias)
    want = p.check()
    _, out, lse = p.forward()
    for x in p.inputs[1:]:
        x[:, :, 1::3] = math.nan
    for name, g, w in zip(("dq", "dk", "dv"), p.run(out, lse), want, strict=True):
        assert g.equal(w), name


def test_rows_of_nothing_give_zeros_whatever_they_hold() -> None:
    p = problem(SMALL, torch.float32, bias=torch.zeros(2, 1, SMALL.T))
    p.bias[1, :, :64] = -math.inf  # type: ignore[index]
    p.num, p.idx = torch.ones_like(p.num), torch.zeros_like(p.idx)
    _, out, lse = p.forward()
    p.inputs[0][1], p.grad_lse[1] = math.nan, math.nan  # type: ignore[index]
    dq, dk, dv = p.run(out, lse)
    assert (lse[1] == -math.inf).all()
    assert all((g[1] == 0).all() for g in (dq, dk, dv))
    assert dq[0].isfinite().all()


def test_entries_that_name_no_block_count_for_nothing() -> None:
    p = problem(SMALL, torch.float32)
    p.num, p.idx = torch.ones_like(p.num), torch.zeros_like(p.idx)
    _, out, lse = p.forward()
    want = p.run(out, lse)
    for bad in (-1, SMALL.nK, 2**31 - 1):
        p.num, p.idx[..., 1] = torch.full_like(p.num, 2), bad
        assert all(g.equal(w) for g, w in zip(p.run(out, lse), want, strict=True)), bad


def test_equal_bit_by_bit_when_repeated() -> None:
    p = problem(SMALL, torch.float16, global_tokens=40)
    _, out, lse = p.forward()
    first = p.run(out, lse)
    assert all(a.equal(b) for a, b in zip(p.run(out, lse), first, strict=True))
