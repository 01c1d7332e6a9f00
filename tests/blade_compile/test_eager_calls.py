"""Attention calls are counted in eager mode, however they are written; what only resembles them is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blade_compile.eager_calls import attention_calls
from blade_compile.regions import module_paths


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def operators(q, k, v):
    return (q * 0.1 @ k.mT).softmax(-1) @ v


def in_place(q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores *= 0.1
    scores.masked_fill_(torch.zeros(32, dtype=torch.bool), -1e9)
    return torch.matmul(F.dropout(F.softmax(scores.float(), dim=-1), 0.0).to(q.dtype), v)


def merged_heads(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(torch.zeros(1), q, k.mT, beta=0, alpha=0.1)
    return torch.bmm(scores.softmax(-1), v)


def einsum(q, k, v):
    weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def exp_and_sum(q, k, v):
    scores = q @ k.mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def transposed(q, k, v):
    return (v.mT @ (q @ k.mT).softmax(-1).mT).mT


def weights_used_twice(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights @ k


def router(q, k, v):
    return q * F.linear(q, torch.randn(16, 16)).softmax(-1)


def linear_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def classifier(q, k, v):
    return (q @ nn.Parameter(torch.randn(16, 10))).softmax(-1)


class Holder(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.Identity()

    def forward(self, *tensors):
        return self.function(*(self.inner(x) for x in tensors))


def calls_of(function) -> list:
    model = nn.Sequential()
    model.add_module("layer", Holder(function))
    tensors = [torch.randn(1, 2, 32, 16) for _ in range(3)]
    return attention_calls(lambda: model.layer(*tensors), module_paths(model))


@pytest.mark.parametrize(
    "function", [sdpa, operators, in_place, merged_heads, einsum, exp_and_sum, transposed, weights_used_twice]
)
def test_one_call_with_its_module(function) -> None:
    (call,) = calls_of(function)
    assert call.path == "layer"
    assert call.kind == ("sdpa" if function is sdpa else "matmul")
    if function is not merged_heads and function is not transposed:
        assert call.shape == (1, 2, 32, 32, 16)


@pytest.mark.parametrize("function", [router, linear_attention, classifier])
def test_look_alikes_are_not_counted(function) -> None:
    assert calls_of(function) == []


@pytest.mark.parametrize("train", [True, False])
def test_modules_of_torch_count_once(train) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).train(train)
    x = torch.randn(1, 8, 16)
    with torch.no_grad():
        (call,) = attention_calls(lambda: layer(x), module_paths(layer))
    assert call.kind in {"mha", "encoder_layer"}


def test_operators_of_other_libraries_count_by_their_names() -> None:
    with torch.library._scoped_library("flash_attn_standin", "DEF") as library:
        library.define("_flash_attn_forward(Tensor q, Tensor k, Tensor v) -> Tensor")
        library.define("_flash_attn_backward(Tensor q, Tensor k, Tensor v) -> Tensor")
        for name in ("_flash_attn_forward", "_flash_attn_backward"):
            library.impl(name, lambda q, k, v: q.clone(), "CompositeExplicitAutograd")
        ops = torch.ops.flash_attn_standin
        calls = calls_of(lambda q, k, v: ops._flash_attn_backward(ops._flash_attn_forward.default(q, k, v), k, v))
    assert [call.kind for call in calls] == ["foreign"]
