"""Late inlining on graphs: what takes an operator's place, and when the operator stays.

Launches themselves are traced in `tests/test_generated_cuda.py`: under the interpreter there is nothing to trace.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from blade_compile.kernels import accelerator, ops  # noqa: F401 (registers the operators)
from blade_compile.passes import inline

OPERATOR = torch.ops.blade.block_sparse_attention.default


def dense(
    q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, bias: Tensor | None, scale: float, block_size: int
) -> tuple[Tensor, Tensor]:
    """Stands for a launcher: it takes the same, allocates, and can be traced."""
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = scores if bias is None else scores + bias[:, :, None]
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype).transpose(1, 2)
    out.copy_(scores.softmax(-1) @ v)
    return out, scores.logsumexp(-1)


def graph_of(*, when: str = "always", mask: bool = False, outputs: int = 2, dynamic: bool = False) -> fx.GraphModule:
    """A post-grad graph with one attention operator."""

    def run(q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, *key_mask: Tensor) -> Any:
        found = OPERATOR(q, k, v, num, idx, key_mask[0] if key_mask else None, None, 64, when)
        return (found[0].transpose(1, 2).reshape(1, 128, 32) * 2, *found[1:outputs])

    tracing = "symbolic" if dynamic else "real"
    with FakeTensorMode() if not dynamic else torch.no_grad():
        return make_fx(run, tracing_mode=tracing)(*example(mask=mask, fake=not dynamic))


def example(*, mask: bool, fake: bool = False) -> list[Tensor]:
    make = torch.empty if fake else torch.randn
    tensors = [make(1, 128, 2, 16).transpose(1, 2) for _ in range(3)]
    tensors += [torch.full((1, 2, 2), 2, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32).repeat(1, 2, 2, 1)]
    return [*tensors, torch.ones(1, 128, dtype=torch.bool)] if mask else tensors


@pytest.fixture
def with_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "runs_triton", lambda q, block_size: True)
    monkeypatch.setattr(accelerator, "traceable_forward", dense)


def targets(gm: fx.GraphModule) -> set[Any]:
    return {node.target for node in gm.graph.nodes if node.op == "call_function"}


@pytest.mark.usefixtures("with_a_launcher")
@pytest.mark.parametrize("mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("outputs", [1, 2], ids=["out", "out-and-lse"])
def test_the_launch_takes_the_operators_place(*, mask: bool, outputs: int) -> None:
    gm = graph_of(mask=mask, outputs=outputs)
    assert inline.inline_kernels(gm.graph) == 1
    gm.graph.lint()
    gm.recompile()
    assert OPERATOR not in targets(gm)
    inputs = example(mask=mask)
    out, lse = dense(*inputs[:5], torch.zeros(1, 1, 128) if mask else None, 16**-0.5, 64)
    expected = (out.transpose(1, 2).reshape(1, 128, 32) * 2, lse)[:outputs]
    torch.testing.assert_close(tuple(gm(*inputs)), expected)
    assert all("val" in node.meta for node in gm.graph.nodes if node.op == "call_function" and node.users)


@pytest.mark.usefixtures("with_a_launcher")
def test_open_decisions_and_sizes_stay_with_the_operator() -> None:
    for gm in (graph_of(when="auto"), graph_of(dynamic=True)):
        assert inline.inline_kernels(gm.graph) == 0
        assert OPERATOR in targets(gm)


def test_without_a_kernel_the_operator_stays() -> None:
    gm = graph_of()
    assert inline.inline_kernels(gm.graph) == 0
    assert OPERATOR in targets(gm)


@pytest.mark.usefixtures("with_a_launcher")
def test_a_launch_that_cannot_be_traced_stays_an_operator(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(*args: Any) -> None:
        raise TypeError("no tracing here")

    monkeypatch.setattr(accelerator, "traceable_forward", unreadable)
    gm = graph_of()
    before = gm.code
    with caplog.at_level(logging.DEBUG, logger="blade_compile"):
        assert inline.inline_kernels(gm.graph) == 0
    assert "stays an operator (TypeError: no tracing here)" in caplog.text
    gm.recompile()
    assert gm.code == before
