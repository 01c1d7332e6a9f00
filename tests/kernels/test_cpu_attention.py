"""The C++ attention kernels against the fp64 reference, in every instruction set that this machine runs."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blade_compile.kernels import cpu, cpu_build, dispatch, lists
from tests.kernels.attention_cases import ODD_CASES, Case, exact, padding_mask, plain_sdpa
from tests.tools import assert_close

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRANSPOSED = Case(B=1, H=2, Hkv=2, S=190, T=333, D=64, block=32)
HEAD_DIMS = (1, 2, 3, 17, 33, 40, 63, 80, 96, 100, 128, 160, 255, 256)


@pytest.fixture(params=cpu_build.available_isas(), ids=str)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("BLADE_CPU_ISA", request.param)
    return request.param


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def forward_and_gradients(
    case: Case,
    qkv: tuple[Tensor, Tensor, Tensor],
    num: Tensor,
    idx: Tensor,
    bias: Tensor | None = None,
    *,
    grad_lse: Tensor | None = None,
    scale: float | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The kernels' results by name, and the gradient of out that was used."""
    scale = case.D**-0.5 if scale is None else scale
    q, k, v = qkv
    out, lse = cpu.attention_forward(q, k, v, num, idx, bias, scale, case.block)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    grads = cpu.attention_backward(grad_out, grad_lse, q, k, v, out, lse, num, idx, bias, scale, case.block)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}, grad_out


def exact_results(
    case: Case,
    qkv: tuple[Tensor, Tensor, Tensor],
    num: Tensor,
    idx: Tensor,
    grad_out: Tensor,
    *,
    grad_lse: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """The same by autograd through the fp64 reference."""
    inputs = [x.detach().double().requires_grad_() for x in qkv]
    out, lse = exact(*inputs, num, idx, key_mask=key_mask, block_size=case.block, scale=scale)
    loss = (out * grad_out.double()).sum()
    if grad_lse is not None:
        live = lse.isfinite()
        loss = loss + (lse[live] * grad_lse.double()[live]).sum()
    grads = torch.autograd.grad(loss, inputs)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def plain_results(
    case: Case, qkv: tuple[Tensor, Tensor, Tensor], num: Tensor, idx: Tensor, grad_out: Tensor
) -> dict[str, Tensor]:
    """The same by scaled_dot_product_attention in the dtype of the inputs, which sets the tolerance."""
    inputs = [x.detach().clone().requires_grad_() for x in qkv]
    keep = lists.kept_blocks(num, idx, case.nK)
    # Dense attention makes NaN gradients of empty rows: it gets all keys there, and no gradient.
    empty = ~keep.any(-1, keepdim=True)
    out = plain_sdpa(*inputs, keep | empty, case.block)
    empty_tokens = empty.repeat_interleave(case.block, -2)[..., : case.S, :]
    grads = torch.autograd.grad(out, inputs, grad_out.masked_fill(empty_tokens, 0))
    return {"out": out.masked_fill(empty_tokens, 0), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def assert_all_close(
    got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, *, lse_tolerance: float = 1e-5
) -> None:
    """Errors relative to the largest value of each result."""
    for name, x in got.items():
        bound = lse_tolerance if name == "lse" else tolerance
        finite = want[name].isfinite()
        assert torch.equal(x[~finite].double(), want[name][~finite]), name
        scale = want[name][finite].abs().max().item() if finite.any() else 1.0
        torch.testing.assert_close(
            x.double(), want[name], rtol=0, atol=bound * max(scale, 1e-3), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_results_and_gradients(case: Case, dtype: torch.dtype, isa: str) -> None:
    qkv = case.qkv(dtype)
    num, idx = case.random_lists()
    got, grad_out = forward_and_gradients(case, qkv, num, idx)
    want = exact_results(case, qkv, num, idx, grad_out)
    plain = plain_results(case, qkv, num, idx, grad_out)
    if case.T == 1:  # one key has weight 1, whatever q and k are: only rounding is left of their gradients
        assert all(got[x].abs().max() < 1e-4 and plain.pop(x) is not None for x in ("dq", "dk"))
    for name in plain:
        assert_close(got[name], want[name], plain[name], name)
        assert got[name].transpose(1, 2).is_contiguous(), f"{name} is in the layout that projections read"
    assert got["lse"].dtype == torch.float32
    lse_error = 1e-4 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got["lse"].double(), want["lse"], rtol=1e-5, atol=lse_error)
    assert (got["out"][0, 0, : case.block] == 0).all() and (got["lse"][0, 0, : case.block] == -math.inf).all()


@pytest.mark.parametrize("amplitude", [1.0, 6.0], ids=["flat", "peaked"])
def test_with_every_block_the_error_is_at_most_twice_that_of_sdpa(
    amplitude: float, dtype: torch.dtype, isa: str
) -> None:
    case = Case(B=1, H=2, Hkv=2, S=600, T=1000, D=64, block=128)
    q, k, v = case.qkv()
    qkv = ((amplitude * q).to(dtype), k.to(dtype), v.to(dtype))
    num, idx = case.full_lists()
    got, grad_out = forward_and_gradients(case, qkv, num, idx)
    want = exact_results(case, qkv, num, idx, grad_out)
    plain = plain_results(case, qkv, num, idx, grad_out)
    for name in plain:
        error, bound = ((x[name].double() - want[name]).norm() for x in (got, plain))
        assert error <= 2 * bound, f"{name}: {error:.2e}, plain PyTorch {bound:.2e}"


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims(D: int, dtype: torch.dtype) -> None:
    case = Case(B=1, H=2, Hkv=1, S=70, T=90, D=D, block=64)
    qkv = case.qkv(dtype)
    num, idx = case.random_lists(empty_row=False)
    got, grad_out = forward_and_gradients(case, qkv, num, idx)
    want = exact_results(case, qkv, num, idx, grad_out)
    assert_all_close(got, want, 3e-6 if dtype == torch.float32 else 1e-2, lse_tolerance=1e-4)


@pytest.mark.parametrize("T", [1, 15, 17, 63, 97, 127, 129, 1000])
@pytest.mark.parametrize("S", [1, 63, 97, 130])
@pytest.mark.parametrize("block", [16, 128])
def test_ragged_tails(S: int, T: int, block: int) -> None:
    case = Case(B=1, H=1, Hkv=1, S=S, T=T, D=24, block=block)
    for dtype, tolerance in ((torch.float32, 3e-6), (torch.bfloat16, 1e-2)):
        qkv = case.qkv(dtype)
        num, idx = case.full_lists()
        got, grad_out = forward_and_gradients(case, qkv, num, idx)
        want = exact_results(case, qkv, num, idx, grad_out)
        if T == 1:  # as above
            assert all(got.pop(x).abs().max() < 1e-4 for x in ("dq", "dk"))
        assert_all_close(got, want, tolerance, lse_tolerance=1e-4)


@pytest.mark.parametrize("kind", ["bool", "inf", "-1e4", "nothing"])
def test_key_masks(kind: str, dtype: torch.dtype, isa: str) -> None:
    case = Case(H=4, Hkv=2, S=100, T=150, D=40, block=32)
    qkv = case.qkv(dtype)
    num, idx = case.random_lists()
    mask = padding_mask(case.B, case.T, kind)
    grad_lse = torch.randn(case.B, case.H, case.S)
    got, grad_out = forward_and_gradients(case, qkv, num, idx, dispatch.key_bias(mask, dtype), grad_lse=grad_lse)
    want = exact_results(case, qkv, num, idx, grad_out, grad_lse=grad_lse, key_mask=mask)
    assert_all_close(got, want, 3e-6 if dtype == torch.float32 else 1e-2, lse_tolerance=1e-4)


@pytest.mark.parametrize("shape", [(2, 1), (1, 4), (1, 1), (2, 4)], ids=["batch", "head", "one", "both"])
def test_bias_of_any_broadcast_shape_and_stride(shape: tuple[int, int]) -> None:
    case = Case(S=70, T=130, block=64)
    qkv = case.qkv()
    num, idx = case.random_lists()
    bias = torch.randn(case.T, *shape).permute(1, 2, 0)
    got, grad_out = forward_and_gradients(case, qkv, num, idx, bias)
    full = bias.expand(case.B, case.H, case.T)
    assert_all_close(got, exact_results(case, qkv, num, idx, grad_out, key_mask=full), 3e-6)


def test_gradient_of_the_lse(dtype: torch.dtype, isa: str) -> None:
    case = Case(B=1, H=2, Hkv=1, S=97, T=130, block=32)
    qkv = case.qkv(dtype)
    num, idx = case.random_lists()
    grad_lse = torch.randn(case.B, case.S, case.H).transpose(1, 2)
    grad_lse[:, 0, :32] = math.nan  # an empty row: whatever gradient its -inf gets must not spread
    got, grad_out = forward_and_gradients(case, qkv, num, idx, grad_lse=grad_lse)
    want = exact_results(case, qkv, num, idx, grad_out, grad_lse=grad_lse)
    assert_all_close(got, want, 3e-6 if dtype == torch.float32 else 1e-2, lse_tolerance=1e-4)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of qkv": lambda x: torch.stack([x, x, x], 3)[:, :, :, 1],
    "odd row stride": lambda x: torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]],
    "odd offset": lambda x: (
        torch.cat([x[..., :1], x], -1)
        .flatten()[1:]
        .as_strided(x.shape, (*(s // x.shape[-1] * (x.shape[-1] + 1) for s in x.stride()[:3]), 1), 1)
    ),
    "dim first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "reversed twice": lambda x: x.flip(2).flip(2).expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_change_a_bit(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    case = Case(H=4, Hkv=2, S=97, T=130, D=40, block=32)
    qkv = case.qkv(dtype)
    num, idx = case.random_lists()
    strided = tuple(map(layout, qkv))
    assert all(torch.equal(a, b) for a, b in zip(qkv, strided, strict=True))
    want, _ = forward_and_gradients(case, qkv, num, idx)
    got, _ = forward_and_gradients(case, strided, num, idx)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_expanded_inputs_and_gradients_of_any_stride() -> None:
    case = Case(B=3, H=2, Hkv=2, S=50, T=60, D=32, block=32)
    q, k, v = (x[:1, :1].expand_as(x) for x in case.qkv())
    num, idx = case.full_lists()
    out, lse = cpu.attention_forward(q, k, v, num, idx, None, 0.2, 32)
    grad = torch.ones(()).expand_as(out)  # what .sum().backward() hands in
    got = cpu.attention_backward(grad, None, q, k, v, out, lse, num, idx, None, 0.2, 32)
    want = cpu.attention_backward(grad.contiguous(), None, q, k, v, out, lse, num, idx, None, 0.2, 32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (1, 1)], ids=["batch", "heads", "both"])
def test_broadcast_lists_equal_expanded_ones(shape: tuple[int, int]) -> None:
    case = Case(H=4, Hkv=2, S=100, T=150, block=32)
    qkv = case.qkv()
    num, idx = (x[: shape[0], : shape[1]] for x in case.random_lists())
    expanded = (x.expand(case.B, case.H, *x.shape[2:]).contiguous() for x in (num, idx))
    got, _ = forward_and_gradients(case, qkv, num, idx)
    want, _ = forward_and_gradients(case, qkv, *expanded)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_lists_of_any_stride_and_capacity() -> None:
    case = Case(S=100, T=150, block=32)
    qkv = case.qkv()
    num, idx = case.random_lists()
    want, _ = forward_and_gradients(case, qkv, num, idx)
    wide = torch.full((*idx.shape[:3], 2 * case.nK + 5), -7, dtype=torch.int32)
    wide[..., : case.nK] = idx
    columns = idx.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for other in (wide, wide[..., : case.nK], columns):
        got, _ = forward_and_gradients(case, qkv, num.permute(2, 0, 1).contiguous().permute(1, 2, 0), other)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.7])
def test_any_scale(scale: float, isa: str) -> None:
    qkv = TRANSPOSED.qkv()
    num, idx = TRANSPOSED.random_lists()
    got, grad_out = forward_and_gradients(TRANSPOSED, qkv, num, idx, scale=scale)
    want = exact_results(TRANSPOSED, qkv, num, idx, grad_out, scale=scale)
    assert_all_close(got, want, 1e-5, lse_tolerance=1e-5)


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [
        (5, 0, r"kv_num_blocks holds 5 at batch 1, head 2, query block 3; valid are 0 to 4"),
        (-1, 0, r"kv_num_blocks holds -1"),
        (2, 4, r"kv_indices holds 4 at batch 1, head 2, query block 3; valid are 0 to 3"),
        (2, -1, r"kv_indices holds -1"),
        (1, 2**31 - 1, r"kv_indices holds 2147483647"),
    ],
    ids=["count", "negative count", "index", "negative index", "huge index"],
)
def test_bad_lists_raise_and_are_never_followed(count: int, index: int, message: str) -> None:
    case = Case(S=128, T=128, block=32)
    q, k, v = case.qkv()
    num, idx = case.full_lists()
    out, lse = cpu.attention_forward(q, k, v, num, idx, None, 0.1, 32)
    num[1, 2, 3], idx[1, 2, 3, 0] = count, index
    with pytest.raises(ValueError, match=message):
        cpu.attention_forward(q, k, v, num, idx, None, 0.1, 32)
    with pytest.raises(ValueError, match=message):
        cpu.attention_backward(out, None, q, k, v, out, lse, num, idx, None, 0.1, 32)


def test_nan_stays_in_its_row_and_its_blocks(dtype: torch.dtype, isa: str) -> None:
    case = Case(B=1, H=1, Hkv=1, S=64, T=64, D=16, block=16)
    q, k, v = case.qkv(dtype)
    num = torch.tensor([[[1, 1, 4, 0]]], dtype=torch.int32)
    idx = torch.tensor([0, 1, 2, 3], dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    idx[0, 0, 1, 0] = 3
    q[0, 0, 5], v[0, 0, 50] = math.nan, math.nan  # query row 5; a value in block 3, which rows 16 to 47 keep
    out, lse = cpu.attention_forward(q, k, v, num, idx, None, 0.25, 16)
    assert out[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [5, *range(16, 48)]
    assert lse[0, 0].isnan().nonzero().flatten().tolist() == [5]
    k[0, 0, 50], v[0, 0, 50] = math.nan, 0
    out, _ = cpu.attention_forward(q, k, v, num, idx, None, 0.25, 16)
    assert out[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [5, *range(16, 48)]


def test_infinite_scores_do_what_dense_attention_does(isa: str) -> None:
    case = Case(B=1, H=1, Hkv=1, S=16, T=32, D=8, block=16)
    q, k, v = (x.abs() for x in case.qkv())
    k[0, 0, 3] = -math.inf  # scores of -inf: weight 0
    q[0, 0, 1] = math.inf  # scores of inf: NaN, in that row only
    num, idx = case.full_lists()
    out, _ = cpu.attention_forward(q, k, v, num, idx, None, 1.0, 16)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(out, dense, equal_nan=True)


def test_a_very_negative_finite_bias_is_not_a_mask(isa: str) -> None:
    case = Case(B=1, H=1, Hkv=1, S=16, T=16, D=8, block=16)
    q, k, v = case.qkv()
    bias = torch.full((1, 1, 16), torch.finfo(torch.float32).min)
    out, lse = cpu.attention_forward(q, k, v, *case.full_lists(), bias, 1.0, 16)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    assert lse.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_16_bit_number_passes_through(dtype: torch.dtype, isa: str) -> None:
    """One key: the output is its value. All 65,536 patterns, so that each conversion is checked completely."""
    v = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 1, 1, 256)
    v = v.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    if dtype == torch.bfloat16:  # the pair dot product flushes subnormals
        v = v.where(v.abs() >= torch.finfo(dtype).tiny, 0)
    num, idx = lists.full_lists(256, 1, 1, 1, torch.device("cpu"))
    zero = torch.zeros_like(v)
    out, lse = cpu.attention_forward(zero, zero, v, num, idx, None, 1.0, 16)
    assert torch.equal(out, v)
    assert (lse == 0).all()


@pytest.mark.parametrize(("S", "T"), [(0, 64), (64, 0), (0, 0)], ids=["no query", "no key", "nothing"])
def test_empty_tensors(S: int, T: int) -> None:
    case = Case(S=S, T=T, block=64)
    got, _ = forward_and_gradients(case, case.qkv(), *case.full_lists())
    assert all((got[name] == 0).all() for name in ("out", "dq", "dk", "dv")) and (got["lse"] == -math.inf).all()


def test_repeats_and_thread_counts_are_bit_equal(dtype: torch.dtype) -> None:
    case = Case(B=1, H=4, Hkv=2, S=700, T=900, D=64, block=64)
    qkv = case.qkv(dtype)
    num, idx = case.random_lists()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(forward_and_gradients(case, qkv, num, idx)[0])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_memory_does_not_grow_with_queries_times_keys() -> None:
    case = Case(B=1, H=1, Hkv=1, S=16384, T=16384, D=64, block=128)  # the scores would be 1 GiB
    qkv = case.qkv(torch.bfloat16)
    num, idx = torch.ones(1, 1, case.nQ, dtype=torch.int32), torch.arange(case.nQ, dtype=torch.int32).view(1, 1, -1, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward_and_gradients(case, qkv, num, idx)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024  # KiB; q alone is 2 MiB
