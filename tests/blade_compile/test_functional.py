"""Direct calls: what they return, how they differentiate, what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import blade_compile
from blade_compile.kernels import lists, reference

ALWAYS = {"when": "always", "block_size": 32}


def qkv(S: int = 256, T: int = 256, H: int = 4, Hkv: int = 4) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, H, S, 32), torch.randn(2, Hkv, T, 32), torch.randn(2, Hkv, T, 32)


def test_sparsity_drops_that_share_of_the_blocks() -> None:
    q, k, _ = qkv(640, 640)
    num, idx = blade_compile.mask_predict(q, k, config={"sparsity": 0.8, "block_size": 32})
    assert (num == 4).all() and num.dtype == idx.dtype == torch.int32 and idx.shape == (2, 4, 20, 20)
    assert (idx[..., :4].diff() > 0).all() and (idx[..., 4:] == 0).all()


@pytest.mark.parametrize("config", [{"sparsity": 0.0}, {"tau": 1.0}], ids=str)
def test_nothing_dropped_is_dense_attention(config: dict[str, float]) -> None:
    q, k, v = qkv(S=100, T=333, Hkv=2)
    out = blade_compile.sparse_attention(q, k, v, config={**ALWAYS, **config})
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_sparse_attention_is_prediction_then_attention() -> None:
    q, k, v = qkv()
    config = blade_compile.BladeConfig(sparsity=0.5, **ALWAYS)  # type: ignore[arg-type]
    lists_of = blade_compile.mask_predict(q, k, config=config)
    two_steps = blade_compile.block_sparse_attention(q, k, v, *lists_of, block_size=32)
    assert torch.equal(two_steps, blade_compile.sparse_attention(q, k, v, config=config))


@pytest.mark.parametrize("when", ["never", "auto"])
def test_dense_when_it_should_be(when: str) -> None:
    q, k, v = qkv()
    mask = torch.rand(2, 256) > 0.3
    out = blade_compile.sparse_attention(q, k, v, key_mask=mask, config={"when": when, "sparsity": 0.9})
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]))


def test_lse_is_the_natural_log_and_differentiable() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(64, 64))
    num, idx = lists.full_lists(1, 1, 2, 2, q.device)  # one list for all samples and heads
    out, lse = blade_compile.block_sparse_attention(q, k, v, num, idx, block_size=32, return_lse=True)
    scores = q @ k.mT * 32**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    (got,) = torch.autograd.grad(lse.sum(), q, retain_graph=True)
    (want,) = torch.autograd.grad(scores.logsumexp(-1).sum(), q)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_protected_tokens_are_kept_as_queries_and_keys() -> None:
    q, k, _ = qkv(320, 320)
    config = {"sparsity": 0.9, "block_size": 32, "protect": ((0, 40), (-1, 1))}
    num, idx = blade_compile.mask_predict(q, k, config=config)
    kept = lists.kept_blocks(num, idx, 10)
    assert kept[:, :, [0, 1, 9]].all() and kept[..., [0, 1, 9]].all()
    assert (kept[:, :, 2:9].sum(-1) == 4).all()


def test_additive_and_bool_masks_agree() -> None:
    q, k, v = qkv()
    mask = torch.rand(2, 256) > 0.5
    bias = torch.zeros(2, 256).masked_fill(~mask, -torch.inf)
    a, b = (
        blade_compile.sparse_attention(q, k, v, key_mask=m, config={**ALWAYS, "sparsity": 0.5}) for m in (mask, bias)
    )
    assert torch.equal(a, b)


def test_inside_a_compiled_function() -> None:
    q, k, v = qkv()
    f = torch.compile(
        lambda a, b, c: blade_compile.sparse_attention(a, b, c, config={**ALWAYS, "sparsity": 0.5}) * 2, fullgraph=True
    )
    assert torch.equal(f(q, k, v), blade_compile.sparse_attention(q, k, v, config={**ALWAYS, "sparsity": 0.5}) * 2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"config": {"sparsity": 2}}, "sparsity"),
        ({"config": {"blok_size": 64}}, "block_size"),
        ({"config": {"protect": ((250, 10),)}}, "256 tokens"),
        ({"config": 3}, "BladeConfig"),
        ({"key_mask": torch.ones(2, 255, dtype=torch.bool)}, "key_mask"),
        ({"key_mask": torch.ones(2, 256, dtype=torch.int64)}, "bool"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blade_compile.sparse_attention(*qkv(), **kwargs)  # type: ignore[arg-type]


def test_lists_of_another_length_are_refused() -> None:
    q, k, v = qkv()
    num, idx = lists.full_lists(1, 1, 3, 8, q.device)
    with pytest.raises(ValueError, match="blocks of 32"):
        blade_compile.block_sparse_attention(q, k, v, num, idx, block_size=32)


def test_selection_equals_the_reference_on_its_own_map() -> None:
    q, k, _ = qkv(S=300, T=300)
    q = q * 3
    block_map = reference.probe_map(q, k, None, 32**-0.5, 32, 32, 5)
    want = reference.select_blocks(block_map, sparsity=0.7)
    got = blade_compile.mask_predict(q, k, config={"sparsity": 0.7, "block_size": 32, "probe_tokens": 32, "seed": 5})
    same = (lists.kept_blocks(*want, 10) == lists.kept_blocks(*got, 10)).double().mean()
    assert torch.equal(want[0], got[0]) and same > 0.999  # near-ties of differently rounded scores may swap


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": 1}, "q is a int"),
        ({"key_mask": [True]}, "key_mask is a list"),
        ({"scale": "a"}, "scale is 'a'"),
        ({"key_mask": torch.zeros(2, 256, requires_grad=True)}, "detach"),
    ],
    ids=str,
)
def test_arguments_of_another_type_are_named(change: dict[str, object], message: str) -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=message):
        blade_compile.sparse_attention(**{"q": q, "k": k, "v": v, **change})  # type: ignore[arg-type]


def test_mixed_dtypes_meet_under_autocast() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = blade_compile.sparse_attention(q.bfloat16(), k, v, config=ALWAYS)
        num, idx = blade_compile.mask_predict(q.bfloat16(), k, config=ALWAYS)
        same = blade_compile.block_sparse_attention(q, k.bfloat16(), v, num, idx, block_size=32)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, same)
