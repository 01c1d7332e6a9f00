"""The Triton forward kernel against the fp64 reference; without a GPU in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from blade_compile.kernels import dispatch, lists, reference, triton_common, triton_configs, triton_forward
from tests.kernels.attention_cases import Case, exact, padding_mask, plain_sdpa
from tests.tools import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter can't multiply bf16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
CASES = (
    Case(B=2, H=2, Hkv=2, S=70, T=200),
    Case(B=1, H=2, Hkv=1, S=63, T=97),
    Case(B=1, H=1, Hkv=1, S=1, T=1),
    Case(B=1, H=3, Hkv=1, S=130, T=257, D=40, block=128),
    Case(B=1, H=2, Hkv=1, S=111, T=64, D=256),
    Case(B=1, H=2, Hkv=2, S=128, T=128, D=80, block=128),
    Case(B=2, H=1, Hkv=1, S=97, T=300, D=128, block=128),
)
TILES = ("64x64 w4 s2", "64x32 w4 s2", "32x64 w4 s2", "64x32 w4 s2 tma", "128x128 w8 s2 tma ws")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the tile of every launch."""

    def use(text: str) -> None:
        def fixed(key: triton_configs.Key) -> triton_configs.Config:
            chosen = triton_configs.parse(text)
            return chosen | {name: min(chosen[name], key[4]) for name in ("BLOCK_M", "BLOCK_N")}

        monkeypatch.setattr(triton_configs, "_from_table", fixed)

    return use


def forward(
    case: Case, qkv: tuple[Tensor, ...], num: Tensor, idx: Tensor, bias: Tensor | None = None, **more: object
) -> tuple[Tensor, Tensor]:
    scale = more.pop("scale", case.D**-0.5)
    on_device = {name: x.to(DEVICE) for name, x in more.items() if isinstance(x, Tensor)}
    inputs = [x.to(DEVICE) for x in (*qkv, num, idx)]
    bias = None if bias is None else bias.to(DEVICE)
    out, lse = triton_forward.attention_forward(*inputs, bias, scale, case.block, **on_device)  # type: ignore[arg-type]
    assert out.dtype == qkv[0].dtype and lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous(), "the layouts that are promised"
    return out.cpu(), lse.cpu()


def check(
    got: tuple[Tensor, Tensor],
    case: Case,
    qkv: tuple[Tensor, ...],
    num: Tensor,
    idx: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Against the reference in fp64, by the tolerance policy."""
    q, k, v = qkv
    out, lse = exact(q, k, v, num, idx, key_mask=mask, block_size=case.block, scale=scale)
    keep = lists.kept_blocks(num, idx, case.nK)
    if mask is None:
        plain = plain_sdpa(q, k, v, keep, case.block, scale=scale)
    else:
        plain = plain_with_mask(q, k, v, keep, case, mask)
    assert_close(got[0], out, plain)
    check_lse(got[1], lse)


def check_lse(lse: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5 if DEVICE == "cpu" else 1e-4)


def plain_with_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, case: Case, mask: Tensor) -> Tensor:
    """Plain PyTorch in the same precision, with a key mask."""
    bias = reference.additive_mask(mask, q.dtype)
    assert bias is not None
    kept = keep.repeat_interleave(case.block, -2)[..., : case.S, :].repeat_interleave(case.block, -1)[..., : case.T]
    bias = bias.masked_fill(~kept, -math.inf)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    return torch.where((bias > -math.inf).any(-1, keepdim=True), out, 0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results(case: Case, dtype: torch.dtype) -> None:
    qkv = case.qkv(dtype)
    num, idx = case.random_lists()
    out, lse = forward(case, qkv, num, idx)
    check((out, lse), case, qkv, num, idx)
    assert (out[0, 0, : case.block] == 0).all() and (lse[0, 0, : case.block] == -math.inf).all()


@pytest.mark.parametrize("text", TILES)
@pytest.mark.parametrize(
    "case", [Case(B=1, H=1, Hkv=1, S=100), Case(B=1, H=1, Hkv=1, S=140, T=260, D=40, block=128)], ids=str
)
def test_every_kind_of_tile(case: Case, text: str, dtype: torch.dtype, tile: Callable[[str], None]) -> None:
    tile(text)
    test_results(case, dtype)


def test_every_block(dtype: torch.dtype) -> None:
    case = Case(B=1, H=1, Hkv=1, S=64, T=300)
    q, k, v = case.qkv()
    qkv = ((6 * q).to(dtype), k.to(dtype), v.to(dtype))  # peaked rows
    num, idx = case.full_lists()
    check(forward(case, qkv, num, idx), case, qkv, num, idx)


@pytest.mark.parametrize("kind", ["bool", "inf", "-1e4", "nothing"])
def test_key_masks(kind: str, dtype: torch.dtype) -> None:
    case = Case(H=2, Hkv=1, S=70, T=150, D=40)
    qkv = case.qkv(dtype)
    num, idx = case.random_lists()
    mask = padding_mask(case.B, case.T, kind)
    check(forward(case, qkv, num, idx, dispatch.key_bias(mask, dtype)), case, qkv, num, idx, mask)


@pytest.mark.parametrize("shape", [(2, 1), (1, 3), (1, 1), (2, 3)], ids=["batch", "head", "one", "both"])
def test_bias_of_any_broadcast_shape_and_stride(shape: tuple[int, int]) -> None:
    case = Case(B=2, H=3, Hkv=1, S=40, T=130, D=16)
    qkv = case.qkv()
    num, idx = case.random_lists()
    bias = torch.randn(case.T, *shape).permute(1, 2, 0)
    check(forward(case, qkv, num, idx, bias), case, qkv, num, idx, bias.expand(case.B, case.H, case.T))


@pytest.mark.parametrize("scale", [0.0, -0.5, 0.7])
def test_any_scale(scale: float) -> None:
    case = Case(B=1, H=2, Hkv=1, S=70, T=130)
    qkv = case.qkv()
    num, idx = case.random_lists()
    check(forward(case, qkv, num, idx, scale=scale), case, qkv, num, idx, scale=scale)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of qkv": lambda x: torch.stack([x, x, x], 3)[:, :, :, 1],
    "odd row stride": lambda x: torch.cat([x, x[..., :1]], -1)[..., : x.shape[-1]],
    "odd offset": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    "columns first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded batch": lambda x: x[:1].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("text", ["64x64 w4 s2", "64x64 w4 s2 tma"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout(layout: str, text: str, tile: Callable[[str], None]) -> None:
    tile(text)
    case = Case(B=2, H=2, Hkv=1, S=70, T=130, D=40)
    qkv = tuple(LAYOUTS[layout](x) for x in case.qkv())
    num, idx = case.random_lists()
    check(forward(case, qkv, num, idx), case, qkv, num, idx)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2)], ids=str)
def test_lists_of_one_head_or_batch(shape: tuple[int, int]) -> None:
    case = Case(B=2, H=2, Hkv=1, S=70, T=130, D=16)
    qkv = case.qkv()
    num, idx = Case(B=shape[0], H=shape[1], S=70, T=130).random_lists()
    full = num.expand(2, 2, -1).contiguous(), idx.expand(2, 2, -1, -1).contiguous()
    want = forward(case, qkv, *full)
    for got in (forward(case, qkv, num, idx), forward(case, qkv, num.expand(2, 2, -1), idx.expand(2, 2, -1, -1))):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("text", ["32x32 w4 s2", "64x64 w4 s2 tma"])
def test_entries_that_name_no_block_are_ignored(text: str, tile: Callable[[str], None]) -> None:
    tile(text)
    case = Case(B=1, H=1, Hkv=1, S=128, T=200)
    q, k, v = case.qkv()
    v[:, :, :64] = math.nan  # what a wrong entry could fall back to
    idx = torch.tensor([[[[1, -1, 2, 4], [2**31 - 1, 3, -(2**31), 9]]]], dtype=torch.int32)
    got = forward(case, (q, k, v), torch.tensor([[[4, 9]]], dtype=torch.int32), idx)
    valid = torch.tensor([[[[1, 2, 0, 0], [3, 0, 0, 0]]]], dtype=torch.int32)
    want = exact(q, k, v.nan_to_num(), torch.tensor([[[2, 1]]], dtype=torch.int32), valid, block_size=64)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_lists_without_room() -> None:
    case = Case(B=1, H=1, Hkv=1, S=70, T=70)
    out, lse = forward(case, case.qkv(), torch.full((1, 1, 2), 3, dtype=torch.int32), torch.zeros(1, 1, 2, 0).int())
    assert (out == 0).all() and (lse == -math.inf).all()


def test_nothing_to_compute() -> None:
    case = Case(B=1, H=2, Hkv=2, S=0, T=70)
    out, lse = forward(case, case.qkv(), torch.zeros(1, 2, 0).int(), torch.zeros(1, 2, 0, 2).int())
    assert out.shape == (1, 2, 0, 64) and lse.shape == (1, 2, 0)
    case = Case(B=1, H=2, Hkv=2, S=70, T=0)
    out, lse = forward(case, case.qkv(), torch.ones(1, 2, 2).int(), torch.zeros(1, 2, 2, 1).int())
    assert (out == 0).all() and (lse == -math.inf).all()


def test_a_hidden_nan_stays_hidden() -> None:
    case = Case(B=1, H=2, Hkv=1, S=70, T=130)
    q, k, v = case.qkv()
    num, idx = case.full_lists()
    mask = torch.ones(1, case.T, dtype=torch.bool)
    mask[:, [3, 66, 129]] = False
    clean = forward(case, (q, k, v), num, idx, dispatch.key_bias(mask, q.dtype))
    k[:, :, 66], v[:, :, 3], v[:, :, 129] = math.nan, math.nan, math.inf
    got = forward(case, (q, k, v), num, idx, dispatch.key_bias(mask, q.dtype))
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


def test_nan_goes_where_it_would_go_in_dense_attention() -> None:
    case = Case(B=1, H=1, Hkv=1, S=130, T=130)
    q, k, v = case.qkv()
    q[0, 0, 5], k[0, 0, 70], v[0, 0, 129, 2] = math.nan, math.nan, math.nan
    num = torch.tensor([[[1, 1, 2]]], dtype=torch.int32)
    idx = torch.tensor([[[[0, 0], [2, 0], [1, 0]]]], dtype=torch.int32)
    out, lse = forward(case, (q, k, v), num, idx)
    nan_rows = torch.zeros(130, dtype=torch.bool)
    nan_rows[5], nan_rows[128:] = True, True  # its own NaN; a NaN in a kept key
    assert torch.equal(lse[0, 0].isnan(), nan_rows)
    assert torch.equal(out[0, 0, :, 0].isnan(), nan_rows)
    nan_rows[64:] = True  # a NaN in one column of a kept value
    assert torch.equal(out[0, 0, :, 2].isnan(), nan_rows)


def test_bias_as_low_as_it_gets_is_not_minus_infinity() -> None:
    case = Case(B=1, H=1, Hkv=1, S=3, T=70)
    q, k, v = case.qkv()
    bias = torch.full((1, 1, case.T), torch.finfo(torch.float32).min)
    out, lse = forward(case, (q, k, v), *case.full_lists(), bias)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
    assert lse.isfinite().all()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("G", [1, 70])
def test_global_tokens_share_the_softmax(G: int, biased: bool, dtype: torch.dtype) -> None:
    case = Case(B=2, H=2, Hkv=1, S=100, T=150, D=40)
    q, k, v = case.qkv(dtype)
    gk, gv = torch.randn(2, 2, 1, G, 40).to(dtype)
    gb = torch.randint(1, 65, (G,)).float().log() if biased else None
    num, idx = case.random_lists()
    out, lse = forward(case, (q, k, v), num, idx, global_k=gk, global_v=gv, global_bias=gb)
    want, want_lse, plain = joined(case, (q, k, v), (gk, gv, gb), num, idx)
    assert_close(out, want, plain)
    check_lse(lse, want_lse)


def joined(
    case: Case, qkv: tuple[Tensor, ...], pooled: tuple[Tensor, Tensor, Tensor | None], num: Tensor, idx: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax over [K; Kg]: out and LSE in fp64, and out from fp32 arithmetic."""
    q, k, v = qkv
    gk, gv, gb = pooled
    kept = lists.kept_blocks(num, idx, case.nK).repeat_interleave(case.block, -2)[:, :, : case.S]
    kept = kept.repeat_interleave(case.block, -1)[..., : case.T]
    bias = torch.cat([torch.zeros(case.T), torch.zeros(gk.shape[2]) if gb is None else gb])
    bias = bias.expand(*kept.shape[:3], -1).masked_fill(~F.pad(kept, (0, gk.shape[2]), value=True), -math.inf)
    found = []
    for compute in (torch.float64, torch.float32):
        keys, values = (torch.cat(x, 2).to(compute).expand(-1, case.H, -1, -1) for x in ((k, gk), (v, gv)))
        scores = q.to(compute) @ keys.transpose(-1, -2) * case.D**-0.5 + bias
        found += [scores.softmax(-1) @ values, scores.logsumexp(-1)]
    return found[0], found[1], found[2].to(q.dtype)


def test_nothing_but_global_tokens() -> None:
    case = Case(B=1, H=2, Hkv=2, S=70, T=130)
    q, k, v = case.qkv()
    gk, gv = torch.randn(2, 1, 2, 20, 64)
    num, idx = case.full_lists()
    out, _ = forward(case, (q, k, v), torch.zeros_like(num), idx, global_k=gk, global_v=gv)
    want = F.scaled_dot_product_attention(*(x.double() for x in (q, gk, gv)))
    assert_close(out, want, F.scaled_dot_product_attention(q, gk, gv))


def test_hidden_global_tokens() -> None:
    case = Case(B=1, H=2, Hkv=2, S=70, T=130)
    qkv = case.qkv()
    gk, gv = torch.randn(2, 1, 2, 20, 64)
    num, idx = case.random_lists()
    gv[:, :, 3:] = math.nan
    gb = torch.zeros(20)
    gb[3:] = -math.inf
    got = forward(case, qkv, num, idx, global_k=gk, global_v=gv, global_bias=gb)
    want = forward(case, qkv, num, idx, global_k=gk[:, :, :3], global_v=gv[:, :, :3])
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def test_longest_rows_first_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(B=2, H=2, Hkv=1, S=130, T=130, D=16)
    qkv, (num, idx) = case.qkv(), case.random_lists()
    want = forward(case, qkv, num, idx)
    monkeypatch.setattr(triton_common, "SORT_FROM", 1)
    assert triton_common.longest_first(torch.tensor([[[1, 3, 2, 3]]]), 1, 1).tolist() == [[[1, 3, 2, 0]]]  # type: ignore[union-attr]
    for got in (forward(case, qkv, num, idx), forward(case, qkv, num.expand(2, 2, -1), idx)):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_debug_mode_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(B=1, H=2, Hkv=2, S=70, T=130, D=16)
    qkv, (num, idx) = case.qkv(), case.full_lists()
    monkeypatch.setenv("BLADE_DEBUG", "1")
    forward(case, qkv, num, idx)
    idx[0, 1, 0, 2] = 7
    with pytest.raises(ValueError, match=r"kv_indices holds 7 at batch 0, head 1, query block 0; valid are 0 to 2"):
        forward(case, qkv, num, idx)
    with pytest.raises(ValueError, match=r"kv_indices holds 7 at batch 0, head 1"):
        forward(case, qkv, num[:, :1], idx)
    idx[0, 1, 0, 2] = 0
    with pytest.raises(ValueError, match=r"lists block 0 twice at batch 0, head 1, query block 0"):
        forward(case, qkv, num, idx)
    num[0, 1, 0] = 2  # entries past the count are never read, whatever they repeat
    forward(case, qkv, num, idx)
    num[0, 0, 1] = 4
    with pytest.raises(ValueError, match=r"kv_num_blocks holds 4 at batch 0, head 0, query block 1; valid are 0 to 3"):
        forward(case, qkv, num, idx)
    monkeypatch.setenv("BLADE_DEBUG", "0")
    forward(case, qkv, num, idx)


def test_overlapping_inputs_are_only_read() -> None:
    case = Case(B=2, H=2, Hkv=2, S=70, T=70, D=16)
    num, idx = case.random_lists()
    flat = torch.randn(2 * 2 * 70 * 16 + 64)
    shape, stride = (2, 2, 70, 16), (2 * 70 * 16, 70 * 16, 16, 1)
    overlapping = [flat.as_strided(shape, stride, offset) for offset in (0, 16, 48)]
    want = forward(case, tuple(x.clone() for x in overlapping), num, idx)  # type: ignore[arg-type]
    before = flat.clone()
    for got, expected in zip(forward(case, tuple(overlapping), num, idx), want, strict=True):  # type: ignore[arg-type]
        assert torch.equal(got, expected)
    assert torch.equal(flat, before)


def test_memory_that_no_kernel_can_read() -> None:
    class Shifted:
        device, element_size, data_ptr = torch.device("cpu"), staticmethod(lambda: 4), staticmethod(lambda: 1026)

    with pytest.raises(ValueError, match="different devices"):
        triton_common.check_memory(q=torch.empty(1), k=torch.empty(1, device="meta"), bias=None)
    with pytest.raises(ValueError, match="v begins at address 0x402, no multiple of its element size 4"):
        triton_common.check_memory(q=torch.empty(1), v=Shifted())  # type: ignore[arg-type]
