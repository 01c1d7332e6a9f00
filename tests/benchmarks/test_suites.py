"""The suites' arms on sizes too small to mean anything: they run, are checked, and refuse what is wrong."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import blade_compile
from benchmarks import gpu_cases, models, peers, sdpa, suite_models, suite_ops
from benchmarks.registry import Case, Plan, WrongResultError
from benchmarks.runner import run_case
from benchmarks.split import PARTS, kept, quietest
from blade_compile.kernels import dispatch
from tests.benchmarks.tiny_models import Layer, tiny, toy

PLAN = Plan(torch.device("cpu"))


def test_ops_arms_pass_their_gates_and_a_planted_error_does_not() -> None:
    q, k, v = suite_ops.inputs(PLAN, torch.float32, 2, 512, 32)
    full = suite_ops._problem(q, k, v, 0.0, 128)
    arms = {arm.name: arm for arm in suite_ops._sparse_arms(suite_ops._problem(q, k, v, 0.5, 64), 0.5, full)}
    whole = arms["blade asa, sparsity 0.5, block 64"]
    assert whole.check is not None
    out = whole.call()
    assert whole.check(out) < 1e-5
    with pytest.raises(WrongResultError, match="allowed"):
        whole.check(out * 1.01)
    assert {arm.of for arm in arms.values()} == {None, whole.name}
    assert whole.after is not None
    assert whole.after()["distance"] > 0.1  # from dense attention: another figure than the error
    dense = suite_ops._dense(full)
    assert dense.check is not None
    assert dense.check(dense.call()) < 1e-5  # type: ignore[operator]
    assert dense.about["sdpa"] == "default"


def test_a_peers_distance_is_not_its_error() -> None:
    q, k, v = suite_ops.inputs(PLAN, torch.float32, 2, 512, 32)
    full = suite_ops._problem(q, k, v, 0.0, 128)
    by_name = {peer.name: peer for peer in peers.PEERS}
    quantised, sparse, chosen = by_name["SageAttention"], by_name["SpargeAttn, keep 0.2"], by_name["VSA, keep 0.2"]
    case = Case("c", lambda: [suite_ops._dense(full), *(suite_ops._peer(p, lambda: v, full) for p in by_name.values())])
    rows = {row["arm"]: row for row in run_case("ops", case, PLAN, rounds=3, budget=0.0)}
    for peer in (quantised, sparse, chosen):
        assert rows[peer.name]["distance"] > 1
        assert "error" not in rows[peer.name]
    assert rows["flash-attn"]["status"] == "wrong"
    assert (rows["SageAttention"]["density"], rows[chosen.name]["density"]) == (1.0, 0.25)
    assert "density" not in rows[sparse.name]


def test_flex_attentions_tiles_divide_the_block() -> None:
    assert gpu_cases.flex_options(128) is None
    assert set((gpu_cases.flex_options(64) or {}).values()) == {64}


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


@pytest.mark.parametrize("name", tuple(models.MODELS))
def test_a_scaled_model_keeps_the_share_of_attention(name: str) -> None:
    model = models.MODELS[name]
    published, scaled = attention_share(model, model.published), attention_share(model, model.scaled)
    assert scaled == pytest.approx(published, abs=0.02)


def attention_share(model: models.Model, size: models.Size) -> float:
    """Of the FLOPs of a step: the only products of two activations are attention's."""
    meta = torch.device("meta")
    module, inputs = model.build(size, torch.bfloat16, meta), model.inputs(size, torch.bfloat16, meta)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    flops = counter.get_flop_counts()["Global"]
    return flops[torch.ops.aten.bmm] / sum(flops.values())


@pytest.mark.slow
@pytest.mark.usefixtures("no_inductor")
def test_a_models_arms_are_certified_by_the_one_that_keeps_every_block() -> None:
    small = tiny("wan2.1-1.3b")
    options = {"sparsity": 0.5, "when": "always"}
    arms = {arm.name: arm for arm in suite_models._arms(small, PLAN, {"blade": options})}
    errors = {name: arm.check(arm.call()) for name, arm in arms.items() if arm.check is not None}
    assert all(error is not None and error < 0.1 for error in errors.values())
    every, sparse = arms[suite_models.witness_of("blade")], arms["blade"]
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


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("plant", [None, lambda q, k, v: (q, k, v * 0), lambda q, k, v: (q, k, v.roll(1, 1))])
def test_attention_that_is_wrong_in_bf16_is_refused(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[..., tuple[torch.Tensor, ...]] | None
) -> None:
    monkeypatch.setattr(suite_models, "default_dtype", lambda device: torch.bfloat16)
    if plant is not None:
        real = dispatch.attend
        monkeypatch.setattr(dispatch, "attend", lambda q, k, v, *rest, **more: real(*plant(q, k, v), *rest, **more))
    options = {"sparsity": 0.5, "when": "always"}
    case = Case("toy", lambda: suite_models._arms(toy(), PLAN, {"blade": options, "other": {**options, "seed": 1}}))
    rows = {row["arm"]: row for row in run_case("models", case, PLAN, rounds=3, budget=0.0)}
    for name in ("blade", "other", suite_models.EVERY_BLOCK):
        assert rows[name]["status"] == ("ok" if plant is None else "wrong"), rows[name]
        assert ("speedup" in rows[name]) == (plant is None)
    assert rows[suite_models.BASELINE]["status"] == rows[suite_models.DENSE_WITNESS]["status"] == "ok"
    if plant is None:
        assert rows["blade"]["density"] == 0.5
    else:
        assert f"rests on {suite_models.witness_of('other')!r}, which is wrong: error" in rows["other"]["reason"]
        assert "rests on" in rows[suite_models.EVERY_BLOCK]["reason"]  # bf16 itself hides what is wrong


@pytest.mark.usefixtures("no_inductor")
def test_an_arm_that_runs_dense_is_not_timed_as_sparse() -> None:
    run = suite_models.contenders(toy(), PLAN)
    inputs = toy().inputs(toy().scaled, torch.float32, PLAN.device)
    said = {}
    for options in ({"sparsity": 0.5, "min_tokens": 4096}, {"sparsity": 0.5, "when": "always"}):
        call = run.compiled("blade", options, inputs)
        arm = suite_models.sparse_arm("blade", call, lambda out: 0.0, options, "")
        case = Case("toy", lambda arm=arm: [dataclasses.replace(arm, certified_by=None)])
        (said[len(said)],) = run_case("models", case, PLAN, rounds=3, budget=0.0)
    assert (said[0]["status"], said[1]["status"]) == ("failed", "ok")
    assert "dense" in said[0]["reason"] or "every block" in said[0]["reason"]
    assert "seconds" not in said[0]
    with pytest.raises(RuntimeError, match="every block was kept"):
        suite_models.sparse_for_sure({"density": 1.0}, {"sparsity": 0.5})
    with pytest.raises(RuntimeError, match="every block was kept"):
        suite_models.sparse_for_sure({"density": 1.0}, {"preset": "wan2.1-1.3b"})
    assert suite_models.sparse_for_sure({"density": 1.0}, {"tau": 0.95})  # all that a threshold may leave
    with pytest.raises(RuntimeError, match="blade's operators"):
        suite_models.sparse_for_sure({}, {})


def test_every_copy_of_a_module_is_compiled_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compiled: list[int] = []

    def backend(number: int) -> Any:
        return lambda gm, inputs, **_: compiled.append(number) or gm.forward  # type: ignore[func-returns-value]

    run = suite_models.Contenders(Layer(), PLAN.device, "default")
    inputs = {"hidden_states": torch.randn(1, 8, 64)}
    for number in range(10):  # Dynamo's own limit is 8
        run.compiled(backend(number), None, inputs)()
    assert compiled == [*range(10)]
    monkeypatch.setattr(suite_models, "RECOMPILES", 10)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        run.compiled(backend(10), None, inputs)()


def test_kept_counts_global_tokens_and_the_backward_pass() -> None:
    q, k, v = suite_ops.inputs(PLAN, torch.float32, 2, 1024, 32)
    config = {"policy": "asa_g", "sparsity": 0.5, "when": "always"}
    call = lambda: blade_compile.sparse_attention(q, k, v, config=config)  # noqa: E731
    found, window = kept(call), blade_compile.BladeConfig.of(config).global_window
    assert found["density"] == pytest.approx(0.5 + 1 / (window or 15), abs=0.01)
    every = kept(lambda: blade_compile.sparse_attention(q, k, v, config={**config, "sparsity": 0.0}))
    assert every.get("density", 1.0) == 1.0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plain = {"sparsity": 0.5, "when": "always"}
    trained = kept(lambda: blade_compile.sparse_attention(*leaves, config=plain).sum().backward())
    assert trained == {"density": 0.5, "attention_flops": 3.5 * 0.5 * 4 * 2 * 1024 * 1024 * 32}


def test_models_are_drawn_from_the_seed_and_measured_with_their_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiny("hunyuanvideo", (1, 4, 4))
    first, again, other = (small.build(small.scaled, torch.float32, PLAN.device, seed) for seed in (0, 0, 1))
    assert torch.equal(first.proj_out.weight, again.proj_out.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)  # type: ignore[union-attr, arg-type]
    drawn = [small.inputs(small.scaled, torch.float32, PLAN.device, seed) for seed in (0, 1)]
    assert not torch.equal(drawn[0]["hidden_states"], drawn[1]["hidden_states"])
    asked: list[Any] = []
    monkeypatch.setattr(sdpa, "best", lambda *sizes: asked.append(sizes) or "default")  # type: ignore[func-returns-value]
    suite_models.best_sdpa(small, PLAN)
    suite_models.best_sdpa(tiny("wan2.1-1.3b"), PLAN)
    shown = int(drawn[0]["encoder_attention_mask"].sum())
    assert [sizes[-1] for sizes in asked] == [small.tokens(small.scaled) - small.scaled.text + shown, None]


def test_a_shallow_model_has_two_layers_of_each_kind() -> None:
    size = models.MODELS["hunyuanvideo"].shallow().published
    assert size.config == {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 24}
    assert size.latent == models.MODELS["hunyuanvideo"].published.latent


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
    assert all(("search at every call" in arm.name) == (policy == "adaspa") for arm in sparse)
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
    vsa = next(peer for peer in peers.PEERS if peer.name == "VSA, keep 0.2")
    call = vsa.find(q)
    assert not isinstance(call, str)
    assert call(q, q, q) is q
    assert torch.equal(seen["sizes"], torch.full((10,), 64, dtype=torch.int32))  # type: ignore[arg-type]
    assert (seen["topk"], seen["block_size"]) == (2, (4, 4, 4))
    assert not vsa.exact
