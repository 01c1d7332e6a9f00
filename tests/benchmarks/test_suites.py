"""The suites' arms on sizes too small to mean anything: they run, are checked, and refuse what is wrong."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import models, peers, sdpa, suite_models, suite_ops
from benchmarks.registry import Plan, WrongResultError
from benchmarks.split import PARTS, quietest
from tests.benchmarks.tiny_models import tiny

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


@pytest.mark.slow
@pytest.mark.usefixtures("no_inductor")
def test_a_models_arms_are_certified_by_the_one_that_keeps_every_block() -> None:
    small = tiny("wan2.1-1.3b")
    options = {"sparsity": 0.5, "when": "always"}
    arms = {arm.name: arm for arm in suite_models._arms(small, PLAN, {"blade": options})}
    errors = {name: arm.check(arm.call()) for name, arm in arms.items() if arm.check is not None}
    assert all(error is not None and error < 0.1 for error in errors.values())
    every, sparse = arms[suite_models.EVERY_BLOCK], arms["blade"]
    assert every.check is not None
    with pytest.raises(WrongResultError, match="against fp32"):
        every.check(every.call() * 1.001)
    assert sparse.certified_by == every.name
    assert errors["blade"] > 10 * errors[every.name]  # type: ignore[operator]
    assert sparse.after is not None
    found = sparse.after()
    assert found["density"] == 0.5
    assert found["attention_flops"] == 4 * 2 * 512 * 512 * 128 * 0.5
    assert set(found["split"]) == set(PARTS)
    assert all(seconds > 0 for seconds in found["split"].values())
    assert suite_models.site_table(small, PLAN)["sites"]


def test_contenders_share_their_weights() -> None:
    run = suite_models.contenders(tiny("wan2.1-1.3b"), PLAN)
    owned: list[nn.Module] = []
    run._step = lambda module, inputs: owned.append(module) or (lambda: None)  # type: ignore[method-assign, func-returns-value, assignment]
    run.dense({})
    (compiled,) = owned
    assert compiled._orig_mod is not run.model
    pairs = zip(compiled._orig_mod.parameters(), run.model.parameters(), strict=True)
    assert all(a is b for a, b in pairs)


def test_a_gate_without_a_right_baseline_lets_nobody_through() -> None:
    gate = suite_models.StepGate(torch.ones(4))
    with pytest.raises(WrongResultError):
        gate.as_near(torch.ones(4))
    assert gate.baseline(torch.ones(4)) == 0
    assert gate.as_near(torch.ones(4) * (1 + 1e-6)) < 1e-5
    for wrong in (torch.ones(4) * 1.001, torch.ones(5), torch.full((4,), torch.nan)):
        with pytest.raises(WrongResultError):
            gate.as_near(wrong)
    with pytest.raises(WrongResultError, match="not finite"):
        gate.distance(torch.full((4,), torch.nan))


@pytest.mark.parametrize("policy", suite_ops.POLICIES)
def test_every_policy_passes_its_gates(policy: str) -> None:
    q, k, v = suite_ops.inputs(PLAN, torch.float32, 1, 1024, 32)
    full = suite_ops._problem(q, k, v, 0.0, 128)
    arms = list(suite_ops._policy_arms(PLAN, full, policy, (4, 16, 16)))
    every, *sparse = arms
    assert not every.timed
    assert all(arm.certified_by == every.name for arm in sparse)
    for arm in (every, sparse[0]):
        assert arm.check is not None
        error = arm.check(arm.call())
        assert error is None or error < 1e-5
    assert every.check is not None
    with pytest.raises(WrongResultError):
        every.check(every.call() * 1.01)


def test_parts_are_those_of_the_quietest_call() -> None:
    found = iter([{"a": 1.0, "rest": 5.0}, {"a": 2.0, "rest": 1.0}, {"a": 9.0, "rest": 9.0}])
    assert quietest(lambda: next(found), 3) == {"a": 2.0, "rest": 1.0}


def test_the_best_backend_of_a_cpu_is_its_only_one() -> None:
    assert sdpa.best(PLAN.device, torch.float32, 1, 64, 16) == "default"
    with sdpa.preferring("default")():
        pass


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


def test_vsas_adapter_hands_over_its_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 640, 16)
    seen: dict[str, object] = {}

    def video_sparse_attn(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variable_block_sizes: torch.Tensor,
        q_variable_block_sizes: torch.Tensor, topk: int, block_size: int | tuple[int, ...] = 64,
    ) -> torch.Tensor:  # fmt: skip
        seen.update(sizes=variable_block_sizes, topk=topk, block_size=block_size)
        return v

    monkeypatch.setitem(sys.modules, "fastvideo_kernel", types.SimpleNamespace(video_sparse_attn=video_sparse_attn))
    vsa = next(peer for peer in peers.PEERS if peer.name == "VSA")
    call = vsa.find(q)
    assert not isinstance(call, str)
    assert call(q, q, q) is q
    assert torch.equal(seen["sizes"], torch.full((10,), 64, dtype=torch.int32))  # type: ignore[arg-type]
    assert (seen["topk"], seen["block_size"]) == (2, (4, 4, 4))
    assert not vsa.exact
