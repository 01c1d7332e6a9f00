"""The suites' arms on sizes too small to mean anything: they run, are checked, and refuse what is wrong."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks import models, peers, suite_models, suite_ops
from benchmarks.registry import Plan, WrongResultError

PLAN = Plan(torch.device("cpu"))


def test_ops_arms_pass_their_gates_and_a_planted_error_does_not() -> None:
    q, k, v = suite_ops.inputs(PLAN, torch.float32, 2, 512, 32)
    arms = {arm.name: arm for arm in suite_ops._sparse_arms(suite_ops._problem(q, k, v, 0.5, 64), 0.5)}
    whole = arms["blade asa, sparsity 0.5, block 64"]
    assert whole.check is not None
    out = whole.call()
    assert whole.check(out) < 1e-5
    with pytest.raises(WrongResultError, match="allowed"):
        whole.check(out * 1.01)
    assert {arm.of for arm in arms.values()} == {None, whole.name}


def test_backward_case_checks_gradients() -> None:
    case = suite_ops._backward(PLAN, torch.float32, 1, 256, 32)
    for arm in case.arms():
        assert arm.check is not None
        grads = arm.call()
        assert arm.check(grads) < 1e-4
        with pytest.raises(WrongResultError):
            arm.check((grads[0] * 1.01, *grads[1:]))


@pytest.mark.parametrize("name", tuple(models.MODELS))
def test_models_have_published_shapes_and_run_scaled(name: str) -> None:
    model = models.MODELS[name]
    expected = {
        "wan2.1-1.3b": 32_760, "wan2.1-14b": 75_600, "cogvideox-5b": 17_776, "hunyuanvideo": 119_056,
        "flux-dev": 4_608, "sd3.5-medium": 4_429, "pixart-alpha": 4_096,
    }  # fmt: skip
    assert model.tokens(model.published) == expected[name]
    tiny = dataclasses.replace(model.scaled, latent=(min(2, model.scaled.latent[0]), 8, 8))
    module = model.build(tiny, torch.float32, PLAN.device)
    with torch.no_grad():
        out = module(**model.inputs(tiny, torch.float32, PLAN.device))[0]
    assert out.isfinite().all()
    assert "scaled down" in model.describe(tiny)


def test_a_models_arms_are_certified_by_the_one_that_keeps_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.compile

    def compile_(module: object, backend: str, options: object) -> object:  # Inductor's own code is not the subject
        return plain(module, backend="eager" if backend == "inductor" else backend, options=options)

    monkeypatch.setattr(torch, "compile", compile_)
    wan = models.MODELS["wan2.1-1.3b"]
    config = {**wan.scaled.config, "num_layers": 1, "num_attention_heads": 1, "ffn_dim": 64}
    small = dataclasses.replace(wan, scaled=models.Size(config, (2, 16, 32), 8))
    arms = {arm.name: arm for arm in suite_models._arms(small, PLAN, {})}
    for arm in arms.values():
        assert arm.check is not None
        assert arm.check(arm.call()) < 0.1
    every = arms["blade, every block"]
    assert every.check is not None
    with pytest.raises(WrongResultError, match="against fp32"):
        every.check(every.call() + 1)
    split = suite_models.time_split(every.call, PLAN.device)
    assert split["attention"] > 0
    assert split["rest"] > 0
    assert suite_models.site_table(small, PLAN)["sites"]


def test_a_peers_adapter_on_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.shape == (1, 8, 2, 4)  # tokens before heads
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    found = peers.PEERS[0].find()
    assert not isinstance(found, str)
    torch.testing.assert_close(found(q, k, v), F.scaled_dot_product_attention(q, k, v))

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace())
    assert "another version" in str(peers.PEERS[0].find())
    assert all("GPU" in why for why in peers.absent(PLAN.device).values())
