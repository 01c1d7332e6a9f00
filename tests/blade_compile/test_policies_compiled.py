"""Every policy and order through the compiled graph and through direct calls."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import utils as inductor_utils

import blade_compile
from blade_compile.kernels import lists, observe, order, policies, reference, selection
from blade_compile.passes import pipeline
from tests.blade_compile.models import ALWAYS, Attention, TinyDiT, inputs

GRID = (4, 4, 6)
POLICIES = [name for name in policies.names() if name != "dense"]


def options(policy: str, **more: Any) -> dict[str, Any]:
    needs = {"grid": GRID} if policies.needs_grid(policy) else {}
    return {
        **ALWAYS,
        "policy": policy,
        "stride": 8,
        "global_window": 4,
        "similarity": -1.0,
        "sparsity": 0.5,
        **needs,
        **more,
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_compiles_to_what_direct_calls_compute(policy: str) -> None:
    model, args = TinyDiT(layers=1), inputs()
    seen: list[tuple[Tensor, ...]] = []

    def by_hand(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        if q.shape[2] != k.shape[2]:
            return sdpa(q, k, v, **kwargs)
        seen.append((q, k, v))
        return blade_compile.sparse_attention(q, k, v, config=options(policy))

    sdpa = F.scaled_dot_product_attention
    with torch.no_grad():
        out = torch.compile(model, backend="blade", options=options(policy), fullgraph=True)(*args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", by_hand)
            want = model(*args)
    assert len(seen) == 1
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    assert (out - model(*args)).abs().max() > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
def test_lists_follow_from_the_policys_map(policy: str) -> None:
    q, k = torch.randn(2, 4, 96, 32), torch.randn(2, 2, 96, 32)
    settings = options(policy, head_adaptive=False)
    num, idx = blade_compile.mask_predict(q, k, config=settings)
    config = blade_compile.BladeConfig(**settings)
    request = policies.Request(
        q=q, k=k, bias=None, scale=32**-0.5, block_size=16, probe_tokens=8, seed=0, grid=config.grid, order="none",
        protect=(), options=policies.options_of(config.policy_options),
    )  # fmt: skip
    want = reference.select_blocks(policies.get(policy).block_map(request), 0.5)
    assert torch.equal(num, want[0]) and torch.equal(idx, want[1])


@pytest.mark.parametrize("policy", ["asa_g", "adaspa", "vsa"])
def test_policies_train(policy: str) -> None:
    model, args = TinyDiT(layers=1), inputs()
    compiled = torch.compile(model, backend="blade", options=options(policy), fullgraph=True)
    with observe.record() as events:
        loss = compiled(*args).square().sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    event = next(e for e in events if e.op in observe.ATTENTIONS)
    assert event.density == 0.5
    # Central differences along the gradient: the lists stay as they are for so small a step.
    direction = [g / torch.stack([x.norm() for x in grads]).norm() for g in grads]
    values = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            for parameter, way in zip(model.parameters(), direction, strict=True):
                parameter.add_(way, alpha=step)
            values.append(compiled(*args).double().square().sum().item())
    slope = (values[0] - values[1]) / 2e-3
    want = sum((g * d).sum().item() for g, d in zip(grads, direction, strict=True))
    assert slope == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("name", ["gilbert", "tile"])
def test_an_order_changes_the_blocks_and_not_the_attention(name: str) -> None:
    q, k, v = (torch.randn(2, 2, 100, 32) for _ in range(3))
    config = {**ALWAYS, "order": name, "grid": GRID, "protect": ((0, 4),)}
    mask = torch.rand(2, 100) > 0.2
    everything = blade_compile.sparse_attention(q, k, v, key_mask=mask, config={**config, "sparsity": 0.0})
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    torch.testing.assert_close(everything, want, rtol=1e-4, atol=1e-5)
    places = torch.cat([torch.arange(4), 4 + order.token_order(name, GRID, 16)])
    moved = [x[:, :, places] for x in (q, k, v)]
    plain = {**ALWAYS, "sparsity": 0.5, "protect": ((0, 4),)}
    half = blade_compile.sparse_attention(q, k, v, key_mask=mask, config={**config, "sparsity": 0.5})
    by_hand = blade_compile.sparse_attention(*moved, key_mask=mask[:, places], config=plain)
    assert torch.equal(half[:, :, places], by_hand)


def test_a_compiled_model_at_another_resolution_stays_unordered(caplog: pytest.LogCaptureFixture) -> None:
    model = TinyDiT(layers=1)
    ordered = {**ALWAYS, "sparsity": 0.5, "order": "gilbert", "grid": (3, 5, 7)}
    with torch.no_grad(), caplog.at_level(logging.WARNING, "blade_compile"):
        args = inputs()
        out = torch.compile(model, backend="blade", options=ordered, fullgraph=True)(*args)
        plain = torch.compile(model, backend="blade", options={**ALWAYS, "sparsity": 0.5}, fullgraph=True)(*args)
    assert torch.equal(out, plain)
    assert sum("holds 105 tokens, but attention here runs over 96" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"order": "gilbert", "grid": (3, 5, 7)}, r"grid is 3 x 5 x 7 = 105 tokens, but 96 tokens"),
        (
            {"order": "gilbert", "grid": GRID, "protect": ((0, 4),)},
            r"4 x 4 x 6 = 96 tokens, but 92 tokens are to be ordered \(96 tokens, 4 of them protected\)",
        ),
        ({"order": "tile"}, "order='tile' needs the token grid"),
        ({"policy": "sta"}, "policy='sta' needs the token grid"),
    ],
    ids=str,
)
def test_direct_calls_refuse_a_grid_that_does_not_fit(config: dict[str, Any], message: str) -> None:
    q = torch.randn(1, 2, 96, 32)
    with pytest.raises(ValueError, match=message):
        blade_compile.sparse_attention(q, q, q, config={**ALWAYS, **config})


def test_budgets_per_head() -> None:
    q, k = torch.randn(1, 4, 160, 32), torch.randn(1, 4, 160, 32)
    ops = torch.ops.blade
    num, _ = ops.mask_predict(q, k, block_size=16, probe_tokens=8, head_sparsity=[0.0, 0.5, 0.5, 0.9])
    assert (num == torch.tensor([10, 5, 5, 1])[None, :, None]).all()


def test_a_head_whose_budget_is_everything_is_dense() -> None:
    q, k, v = (torch.randn(1, 2, 160, 32) for _ in range(3))
    ops, common = torch.ops.blade, {"block_size": 16, "probe_tokens": 8, "tau": 1.0}
    out = ops.sparse_sdpa(q, k, v, policy="asa_g", head_sparsity=[0.0, 0.8], options='{"global_window": 4}', **common)
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out[:, 0], want[:, 0], rtol=1e-4, atol=1e-5)
    assert (out[:, 1] - want[:, 1]).abs().max() > 1e-2, "tau=1 must not hide the budget of the other head"


def test_what_is_given_beside_a_preset_stands() -> None:
    """Also where it is a field's default, which only a mapping can tell from a field left out."""
    given = {"preset": "wan2.1-1.3b", "policy": "asa", "order": "none"}
    config = blade_compile.BladeConfig.of(given)
    assert (config.policy, config.order, config.probe_tokens) == ("asa", "none", 32)
    assert blade_compile.BladeConfig.of({"preset": "wan2.1-1.3b"}).policy == "asa_g"


def test_a_budget_of_ones_own_takes_the_place_of_the_presets() -> None:
    config = blade_compile.BladeConfig(preset="wan2.1-1.3b", sparsity=0.5)
    assert (config.policy, config.budget, config.max_keep) == ("asa_g", 0.5, 1.0)


def test_a_policy_of_ones_own() -> None:
    def last_blocks(request: policies.Request) -> Tensor:
        """Prefers late keys, whatever the queries."""
        (B, H, S, _), T = request.q.shape, request.k.shape[2]
        late = torch.arange(-(-T // request.block_size), dtype=torch.float32)
        return late.expand(B, H, -(-S // request.block_size), -1)

    blade_compile.register_policy(policies.MapPolicy("late", last_blocks, defaults={"sparsity": 0.8}))
    try:
        q = torch.randn(1, 2, 160, 32)
        num, idx = blade_compile.mask_predict(q, q, config={"policy": "late", "block_size": 16})
        assert lists.kept_blocks(num, idx, 10)[..., -2:].all() and (num == 2).all()
        want = selection.select(last_blocks(_request(q)), 0.8)
        assert torch.equal(num, want[0]) and torch.equal(idx, want[1])
        model, args = TinyDiT(layers=1), inputs()
        with torch.no_grad(), observe.record() as events:
            torch.compile(model, backend="blade", options={**ALWAYS, "policy": "late"}, fullgraph=True)(*args)
        assert events[0].kv_indices[0, 0, 0, 0] == 5
    finally:
        del policies.POLICIES["late"]


def _request(q: Tensor) -> policies.Request:
    return policies.Request(
        q=q, k=q, bias=None, scale=1.0, block_size=16, probe_tokens=8, seed=0, grid=None, order="none", protect=(),
        options={},
    )  # fmt: skip


def test_an_attention_in_a_branch_says_that_it_carries_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() < 1e9, self.inner, lambda x: x.clone(), (x,))

    model, x = Branches(), torch.randn(1, 96, 64)
    options = {"policy": "adaspa", "when": "always", "block_size": 16, "min_tokens": 1}
    pipeline._warn_apart.cache_clear()
    # Passes don't run where Inductor finds the graph in its cache.
    with inductor_utils.fresh_cache(), torch.no_grad(), blade_compile.generation(1):
        found = torch.compile(model, backend="blade", options=options)(x)
    assert "inner lies in a part of the model that is compiled apart" in caplog.text
    assert found.isfinite().all()
