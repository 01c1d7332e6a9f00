"""The registered operators: opcheck, strides, autograd, autocast, threads, determinism, bad input."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blade_compile.kernels import dispatch, lists, observe, ops, reference
from tests.kernels.attention_cases import Case, exact, padding_mask
from tests.tools import assert_close

blade = torch.ops.blade
LAYOUTS = ("contiguous", "packed", "flash", "expanded")


def laid_out(case: Case, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as models make them: contiguous, slices of a packed projection, token-major, expanded over the batch."""
    if layout == "packed":
        qkv = torch.randn(case.B, case.S, 3, case.H, case.D).to(dtype)
        return tuple(x.transpose(1, 2) for x in qkv.unbind(2))  # type: ignore[return-value]
    q, k, v = case.qkv(dtype)
    if layout == "flash":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if layout == "expanded":
        k, v = (x[:1].expand_as(x) for x in (k, v))
    return q, k, v


OPCHECKS = [(layout, torch.float32, grad) for layout in LAYOUTS for grad in (False, True)]
OPCHECKS += [("packed", dtype, True) for dtype in (torch.bfloat16, torch.float16, torch.float64)]


@pytest.mark.parametrize(("layout", "dtype", "grad"), OPCHECKS, ids=str)
def test_opcheck(layout: str, dtype: torch.dtype, grad: bool) -> None:
    case = Case(B=2, H=2, Hkv=2, S=70, T=70, D=32, block=32)
    q, k, v = (x.detach().requires_grad_(grad) for x in laid_out(case, layout, dtype))
    num, idx = lists.full_lists(case.B, case.H, case.nQ, case.nK, q.device)
    mask = padding_mask(case.B, case.T, "bool")
    torch.library.opcheck(
        blade.mask_predict.default,
        (q.detach(), k.detach(), mask),
        {"sparsity": 0.5, "block_size": 32, "probe_tokens": 8},
    )
    torch.library.opcheck(blade.block_sparse_attention.default, (q, k, v, num, idx, mask, None, 32))
    torch.library.opcheck(
        blade.sparse_sdpa.default, (q, k, v, mask), {"sparsity": 0.5, "block_size": 32, "probe_tokens": 8}
    )
    out, lse = blade.block_sparse_attention(q.detach(), k.detach(), v.detach(), num, idx, mask, None, 32)
    arguments = (torch.randn_like(out), None, q.detach(), k.detach(), v.detach(), out, lse, num, idx, mask, None, 32)
    torch.library.opcheck(blade.block_sparse_attention_backward.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_strides_equal_the_real_ones(layout: str) -> None:
    case = Case(S=70, T=70, D=40, block=32)
    q, k, v = laid_out(case, layout, torch.float32)
    real = blade.block_sparse_attention(q, k, v, *case.full_lists(), None, None, 32)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_args = [mode.from_tensor(x) for x in (q, k, v, *case.full_lists())]
        fake = blade.block_sparse_attention(*fake_args, None, None, 32)
    for r, f in zip(real, fake, strict=True):
        assert r.shape == f.shape and r.stride() == f.stride() and r.dtype == f.dtype


@pytest.mark.parametrize("mask", ["none", "bool", "inf", "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_follow_the_tolerance_policy(mask: str, dtype: torch.dtype) -> None:
    case = Case(B=2, H=4, Hkv=2, S=100, T=150, D=40, block=32)
    leaves = [x.requires_grad_() for x in case.qkv(dtype)]
    num, idx = case.random_lists()
    key_mask = padding_mask(case.B, case.T, mask)
    out, lse = blade.block_sparse_attention(*leaves, num, idx, key_mask, None, 32)
    weight, lse_weight = torch.randn(out.shape).to(dtype), torch.randn(lse.shape)

    def loss(o: Tensor, l: Tensor) -> Tensor:
        live = l.isfinite()
        return (o * weight.to(o.dtype)).sum() + (l[live] * lse_weight[live].to(l.dtype)).sum()

    got = torch.autograd.grad(loss(out, lse), leaves)
    double = [x.detach().double().requires_grad_() for x in leaves]
    want = torch.autograd.grad(loss(*exact(*double, num, idx, key_mask=key_mask, block_size=32)), double)
    plain_leaves = [x.detach().clone().requires_grad_() for x in leaves]
    plain_out, plain_lse = plain_attention(*plain_leaves, num, idx, key_mask, 32)
    plain = torch.autograd.grad(loss(plain_out, plain_lse), plain_leaves)
    for name, g, w, p in zip("qkv", got, want, plain, strict=True):
        assert_close(g, w, p, f"d{name}")


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, key_mask: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """Attention as PyTorch writes it (scores and probabilities in the input dtype), with its LSE."""
    keep = lists.kept_blocks(num, idx, -(-k.shape[2] // block))
    hidden = ~keep.repeat_interleave(block, -2)[..., : q.shape[2], :].repeat_interleave(block, -1)[..., : k.shape[2]]
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[-1] ** -0.5
    bias = reference.additive_mask(key_mask, scores.dtype)
    if bias is not None:
        hidden = hidden | (bias == -torch.inf)
        scores = scores + bias.clamp(min=torch.finfo(scores.dtype).min / 2)
    hidden = hidden.expand_as(scores)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.float().logsumexp(-1)
    probs = scores.softmax(-1).masked_fill(hidden, 0)
    return probs @ v.repeat_interleave(group, 1), lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [32, 40, 64, 72, 80, 96, 128, 256])
def test_every_block_kept_is_as_exact_as_sdpa(dtype: torch.dtype, D: int) -> None:
    case = Case(B=1, H=2, Hkv=2, S=300, T=300, D=D, block=128)
    q, k, v = case.qkv(dtype)
    got = blade.sparse_sdpa(q, k, v, sparsity=0.0)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert_close(got, want, F.scaled_dot_product_attention(q, k, v))


@given(
    B=st.integers(1, 3),
    group=st.integers(1, 3),
    Hkv=st.integers(1, 2),
    S=st.integers(1, 200),
    T=st.integers(1, 200),
    D=st.integers(1, 100),
    block=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    mask=st.sampled_from(["none", "bool", "inf", "-1e4", "nothing"]),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_property_forward(B, group, Hkv, S, T, D, block, dtype, mask, strided, seed) -> None:
    torch.manual_seed(seed)
    case = Case(B=B, H=group * Hkv, Hkv=Hkv, S=S, T=T, D=D, block=block)
    q, k, v = case.qkv(dtype)
    if strided:
        q, k, v = (F.pad(x, (1, 2, 0, 3))[:, :, : x.shape[2], 1:-2] for x in (q, k, v))
    num, idx = case.random_lists()
    key_mask = padding_mask(B, T, mask)
    out, lse = blade.block_sparse_attention(q, k, v, num, idx, key_mask, None, block)
    want, want_lse = exact(q, k, v, num, idx, key_mask=key_mask, block_size=block)
    plain, _ = plain_attention(q, k, v, num, idx, key_mask, block)
    assert_close(out, want, plain)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"tau": 0.8}], ids=str)
def test_a_samples_mask_is_the_same_alone_and_in_a_batch(options: dict[str, float]) -> None:
    case = Case(B=3, H=4, Hkv=4, S=512, T=512, block=32)
    q, k, _ = case.qkv()
    q = q * 4
    mask = padding_mask(3, 512, "bool")
    num, idx = blade.mask_predict(q, k, mask, block_size=32, probe_tokens=8, **options)
    for b in range(3):
        alone = blade.mask_predict(
            q[b : b + 1], k[b : b + 1], mask[b : b + 1], block_size=32, probe_tokens=8, **options
        )
        assert torch.equal(alone[0][0], num[b]) and torch.equal(alone[1][0], idx[b])


def test_expanded_heads_choose_the_blocks_of_native_gqa() -> None:
    case = Case(H=4, Hkv=2, S=256, T=256, block=32)
    q, k, _ = case.qkv()
    native = blade.mask_predict(q, k, sparsity=0.5, block_size=32)
    expanded = blade.mask_predict(q, k.repeat_interleave(2, 1), sparsity=0.5, block_size=32)
    assert torch.equal(native[0], expanded[0]) and torch.equal(native[1], expanded[1])


def test_global_generator_is_neither_read_nor_advanced() -> None:
    q, k, v = Case(S=256, T=256, block=32).qkv()
    state = torch.get_rng_state()
    first = blade.sparse_sdpa(q, k, v, sparsity=0.5, block_size=32)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, blade.sparse_sdpa(q, k, v, sparsity=0.5, block_size=32))


def test_autocast_runs_in_the_autocast_dtype() -> None:
    q, k, v = Case(S=128, T=128).qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = blade.sparse_sdpa(q, k.bfloat16(), v, sparsity=0.0)
        want = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


def test_inference_mode() -> None:
    with torch.inference_mode():
        q, k, v = Case(S=128, T=128).qkv()
        out = blade.sparse_sdpa(q, k, v, sparsity=0.5, block_size=32)
    assert out.is_inference()


def test_threads_do_not_disturb_each_other() -> None:
    cases = [Case(B=1, S=100 + 37 * i, T=100 + 37 * i, block=32) for i in range(6)]
    inputs = [case.qkv() for case in cases]
    alone = [blade.sparse_sdpa(*x, sparsity=0.5, block_size=32) for x in inputs]
    together: list[Tensor | None] = [None] * len(cases)

    def work(i: int) -> None:
        for _ in range(5):
            together[i] = blade.sparse_sdpa(*inputs[i], sparsity=0.5, block_size=32)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(alone, together, strict=True):
        assert b is not None and torch.equal(a, b)


def test_repeats_are_bit_equal_forward_and_backward() -> None:
    case = Case(Hkv=2, S=300, T=300)
    torch.use_deterministic_algorithms(True)

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        leaves = [x.requires_grad_() for x in case.qkv()]
        out = blade.sparse_sdpa(*leaves, sparsity=0.5, block_size=64)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_auto_never_changes_numbers_where_it_stays_dense() -> None:
    q, k, v = Case(S=128, T=128).qkv()
    with observe.record() as events:
        out = blade.sparse_sdpa(q, k, v, sparsity=0.9, when="auto", min_tokens=4096)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    assert events[0].density == 1.0


@pytest.mark.parametrize("mask", ["none", "bool", "inf"])
@pytest.mark.parametrize("choice", ["sdpa", "full"])
def test_dense_choices_under_auto_differentiate(monkeypatch: pytest.MonkeyPatch, mask: str, choice: str) -> None:
    monkeypatch.setattr(dispatch, "decide", lambda *args: choice)
    case = Case(Hkv=2, S=90, T=90, block=32)
    leaves = [x.requires_grad_() for x in case.qkv()]
    key_mask = padding_mask(case.B, case.T, mask)
    with observe.record() as events:
        out = blade.sparse_sdpa(*leaves, key_mask, sparsity=0.5, block_size=32, when="auto", min_tokens=0)
    assert events[1].path.startswith("sdpa" if choice == "sdpa" else "cpu")
    weight = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, weight)
    bias = reference.additive_mask(key_mask, torch.float32)
    want_out = F.scaled_dot_product_attention(*leaves, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(out, want_out)
    for g, w in zip(got, torch.autograd.grad(want_out, leaves, weight), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)


def test_without_a_compiler_the_aten_path_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(S=300, T=300)
    q, k, v = case.qkv()
    kernel = blade.sparse_sdpa(q, k, v, sparsity=0.5, block_size=64)
    monkeypatch.setattr(dispatch, "_kernel_runs", lambda q: False)
    torch.testing.assert_close(blade.sparse_sdpa(q, k, v, sparsity=0.5, block_size=64), kernel, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # the C++ kernel and the ATen path
@pytest.mark.parametrize(
    ("what", "value", "valid"),
    [
        ("kv_indices", 7, "0 to 1"),
        ("kv_indices", -1, "0 to 1"),
        ("kv_num_blocks", 3, "0 to 2"),
        ("kv_num_blocks", -2, "0 to 2"),
    ],
)
def test_a_broken_list_is_an_error(dtype: torch.dtype, what: str, value: int, valid: str) -> None:
    q, k, v = Case(S=128, T=128).qkv(dtype)
    num, idx = Case(S=128, T=128).full_lists()
    if what == "kv_indices":
        idx[0, 1, 1, 0] = value
    else:
        num[0, 1, 1] = value
    with pytest.raises(ValueError, match=rf"{what} holds {value} at batch 0, head 1, query block 1; valid are {valid}"):
        blade.block_sparse_attention(q, k, v, num, idx, None, None, 64)


@pytest.mark.parametrize("when", ["auto", "always"])
@pytest.mark.parametrize(("B", "S", "T"), [(0, 64, 64), (1, 0, 64), (1, 64, 0), (1, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_empty_tensors(when: str, B: int, S: int, T: int, dtype: torch.dtype) -> None:
    q = torch.randn(B, 2, S, 16, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(B, 2, T, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    with observe.record() as events:
        out = blade.sparse_sdpa(q, k, v, sparsity=0.5, block_size=16, when=when, min_tokens=0)
    assert out.shape == q.shape and not out.any()
    assert [event.density for event in events] == [1.0, 1.0]
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == x.shape and not grad.any()


def _attend() -> tuple[Any, torch.Tensor]:
    q, k, v = Case(S=64, T=64).qkv()
    num, idx = blade.mask_predict(q, k, sparsity=0.5, block_size=16)
    return lambda z: blade.block_sparse_attention(z, k, v, num, idx, block_size=16)[0], q


def test_functional_gradients_equal_ordinary_ones() -> None:
    attend, q = _attend()
    z = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(attend(z).square().sum(), z)
    torch.testing.assert_close(torch.func.grad(lambda z: attend(z).square().sum())(q), want)


def test_derivatives_that_do_not_exist_raise_instead_of_being_zero() -> None:
    attend, q = _attend()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(attend, (q,), (torch.ones_like(q),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        attend(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)))
    z = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad((attend(z) + z**3).square().sum(), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


def test_a_dense_choice_belongs_to_its_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator: what another site was predicted to do must not reach this one's lists."""
    q, k, _ = Case(S=64, T=64).qkv()
    away = q.to("meta")
    dense, sparse = (torch.ones(1, 1, 4, dtype=torch.int32) for _ in range(2))
    monkeypatch.setattr(dispatch, "_dense_lists", {(dense.device, dense.data_ptr())})
    assert dispatch._runs_dense(away, k, dense, 16)
    assert not dispatch._runs_dense(away, k, sparse, 16)
    assert not dispatch._runs_dense(away, k, dense.clone(), 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "4 dimensions"),
        (lambda q, k, v: (q, k.double(), v), "one dtype"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "Cast"),
        (lambda q, k, v: (q, k[:, :3], v[:, :3]), "multiple"),
        (lambda q, k, v: (q, k, v[:, :, :5]), "equal"),
        (lambda q, k, v: (q.to_sparse(), k, v), "dense tensor"),
    ],
)
def test_bad_tensors_are_named(change, message: str) -> None:
    q, k, v = change(*Case(S=32, T=32).qkv())
    with pytest.raises(ValueError, match=message):
        blade.sparse_sdpa(q, k, v)


def test_these_are_all_operators() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("blade::")}
    assert registered == {
        "blade::mask_predict",
        "blade::block_sparse_attention",
        "blade::block_sparse_attention_backward",
        "blade::sparse_sdpa",
        "blade::global_sparse_attention",
        "blade::global_sparse_attention_backward",
        "blade::carried_attention",
        "blade::token_order",
    }
    assert ops.library.ns == "blade"
