"""A model with nothing to rewrite: the code that Inductor generates under blade is its own, character for character."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

from blade_compile.kernels import cost

OPTIONS = {"sparsity": 0.8}


def code_hash(build: Callable[[], nn.Module], backend: str, *inputs: torch.Tensor, train: bool, **kwargs: Any) -> str:
    """Hash of the generated code of all graphs, forward and backward."""
    torch.manual_seed(0)
    model = build().train(train)

    def run() -> None:
        out = torch.compile(model, backend=backend, **kwargs)(*inputs)
        if train:
            out.sum().backward()

    _, codes = run_and_get_code(run)
    assert len(codes) == (2 if train else 1)
    return hashlib.sha256("\n".join(map(without_counters, codes)).encode()).hexdigest()


def without_counters(code: str) -> str:
    """Remove what counts up in a process: the number of the compiled graph."""
    return re.sub(r"# AOT ID: .*", "", code)


class Mixer(nn.Module):
    """Tokens mixed without attention: convolution, norms, a gate, a classifier's softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return (x + self.mlp(x)).softmax(-1)


class CrossAttention(nn.Module):
    """Attention that must stay dense: keys and values come from another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(16, 64)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (2, 16)).transpose(1, 2)
        k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.kv(text).chunk(2, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention, for the sizes at which it gains and those at which it doesn't."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Mixer, (torch.ones(2, 48, 32),)),
        (CrossAttention, (torch.ones(2, 64, 32), torch.ones(2, 24, 16))),
        (SelfAttention, (torch.ones(2, 64, 32),)),
    ],
    ids=["no-attention", "cross-attention", "too-short"],
)
def test_code_is_inductors_where_nothing_is_rewritten(
    model: type[nn.Module], inputs: tuple[torch.Tensor, ...], *, train: bool
) -> None:
    plain = code_hash(model, "inductor", *inputs, train=train)
    assert code_hash(model, "blade", *inputs, train=train, options=OPTIONS) == plain


def test_code_is_inductors_when_blade_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 256, 32)
    plain = code_hash(SelfAttention, "inductor", x, train=False)
    always = {**OPTIONS, "when": "always"}
    assert code_hash(SelfAttention, "blade", x, train=False, options=always) != plain
    monkeypatch.setenv("BLADE_DISABLE", "1")
    assert code_hash(SelfAttention, "blade", x, train=False, options=always) == plain


def test_code_is_inductors_where_the_cost_model_sees_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 256, 32)
    plain = code_hash(SelfAttention, "inductor", x, train=False)
    monkeypatch.setattr(cost, "choose", lambda *_: "sdpa")
    options = {**OPTIONS, "min_tokens": 0}
    assert code_hash(SelfAttention, "blade", x, train=False, options=options) == plain
