"""The main path: compiled models, training, caches, and everything that must stay Inductor's."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import fresh_cache

from blade_compile.backend import blade
from blade_compile.kernels import accelerator, observe
from tests.blade_compile.models import DENSE, HALF, TinyDiT, inputs

ROOT = Path(__file__).resolve().parents[2]


def executed(events: list[observe.Event]) -> list[tuple[str, str]]:
    return [(event.op, event.site) for event in events]


@pytest.mark.slow
def test_dense_settings_reproduce_the_model() -> None:
    model, args = TinyDiT(), inputs()
    with torch.no_grad(), observe.record() as events:
        out = torch.compile(model, backend="blade", options=DENSE, fullgraph=True)(*args)
    torch.testing.assert_close(out, model(*args), rtol=1e-4, atol=1e-5)
    assert executed(events) == [
        (op, f"blocks.{i}.attn1") for i in range(2) for op in ("mask_predict", "block_sparse_attention")
    ]


def test_sparse_settings_change_it_and_keep_their_density() -> None:
    model, args = TinyDiT(), inputs()
    with torch.no_grad(), observe.record() as events:
        out = torch.compile(model, backend="blade", options=HALF, fullgraph=True)(*args)
        assert (out - model(*args)).abs().max() > 1e-3
    assert [event.density for event in events] == [0.5] * 4


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_max_autotune_searches_tiles_too(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[bool] = []
    monkeypatch.setattr(accelerator, "search_tiles", lambda: searched.append(True))
    with torch.no_grad():
        torch.compile(torch.nn.Linear(4, 4), backend="blade", options={"mode": mode})(torch.ones(1, 4))
    assert searched == [True] * (mode == "max-autotune")


def gradients(
    model: torch.nn.Module, args: tuple[torch.Tensor, ...], options: dict[str, object] | None = None
) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    run = model if options is None else torch.compile(model, backend="blade", options=options, fullgraph=True)
    run(*args).square().sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "checkpointed"]
)
def test_training_is_as_exact_as_eager(checkpointed: bool) -> None:
    model, args = TinyDiT(checkpointed=checkpointed), inputs()
    exact = gradients(copy.deepcopy(model).double(), tuple(x.double() for x in args))
    plain, got = gradients(model, args), gradients(model, args, DENSE)
    for name, want in exact.items():
        error, allowed = (got[name] - want).norm(), 2 * (plain[name] - want).norm() + 1e-6 * want.norm()
        assert error <= allowed, f"{name}: {error:.1e} of {allowed:.1e}"


@pytest.mark.slow
def test_checkpointing_predicts_each_mask_once() -> None:
    model, args = TinyDiT(checkpointed=True), inputs()
    compiled = torch.compile(model, backend="blade", options=HALF, fullgraph=True)
    with observe.record() as events:
        compiled(*args).square().sum().backward()
    ops = [event.op for event in events]
    assert ops.count("mask_predict") == 2 and ops.count("block_sparse_attention_backward") == 2


@pytest.mark.slow
def test_ten_lengths_compile_at_most_twice() -> None:
    model = TinyDiT(layers=1)
    options = {**DENSE, "when": "auto", "min_tokens": 100}  # some lengths are below, some above
    count = 0

    def backend(gm, example_inputs):
        nonlocal count
        count += 1
        return blade(gm, example_inputs, options=options)

    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for S in (
            66,
            97,
            96,  # not 64: a length equal to a width would share its symbol
            111,
            128,
            63,
            200,
            33,
            257,
            90,
        ):
            args = inputs(S)
            torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-4, atol=1e-5)
    assert count <= 2


@pytest.mark.slow
def test_autocast() -> None:
    model, args = TinyDiT(), inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), observe.record() as events:
        out = torch.compile(model, backend="blade", options=DENSE)(*args)
        want = model(*args)
    assert out.dtype == want.dtype and {event.inputs[0].dtype for event in events} == {torch.bfloat16}
    torch.testing.assert_close(out, want, rtol=5e-2, atol=5e-2)


def test_reduce_overhead_is_accepted() -> None:
    model, args = TinyDiT(layers=1), inputs()
    with torch.no_grad():
        out = torch.compile(model, backend="blade", options={**DENSE, "mode": "reduce-overhead"})(*args)
        torch.testing.assert_close(out, model(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_models_with_different_options_in_one_process() -> None:
    model, args = TinyDiT(), inputs()
    twin = copy.deepcopy(model)
    a = torch.compile(model, backend="blade", options=HALF)
    b = torch.compile(twin, backend="blade", options={**HALF, "sparsity": 0.75, "exclude": ("blocks.0.*",)})
    with torch.no_grad():
        for compiled, want in ((a, [0.5, 0.5]), (b, [1 / 6]), (a, [0.5, 0.5])):
            with observe.record() as events:
                compiled(*args)
            assert [e.density for e in events if e.op == "mask_predict"] == pytest.approx(want)


@pytest.mark.slow
def test_regional_compilation_gives_the_masks_of_the_whole_model() -> None:
    model, args = TinyDiT(), inputs()
    regional = copy.deepcopy(model)
    for block in regional.blocks:
        block.compile(backend="blade", options=HALF, fullgraph=True)
    with torch.no_grad(), observe.record() as whole:
        torch.compile(model, backend="blade", options=HALF)(*args)
    with torch.no_grad(), observe.record() as parts:
        regional(*args)
    assert [e.site for e in parts if e.op == "mask_predict"] == ["attn1", "attn1"]
    for a, b in zip(whole, parts, strict=True):
        same = (a.kv_indices == b.kv_indices).double().mean()
        assert torch.equal(a.kv_num_blocks, b.kv_num_blocks) and same > 0.98  # near-ties may swap


@pytest.mark.parametrize("slot", ["pre_grad_custom_pass", "joint_custom_pre_pass", "post_grad_custom_post_pass"])
def test_passes_set_globally_still_run(slot: str) -> None:
    seen = []
    model, args = TinyDiT(layers=1), inputs()
    with torch._inductor.config.patch({slot: seen.append}), torch.no_grad(), observe.record() as events:
        torch.compile(model, backend="blade", options=HALF)(*args)
    assert seen
    assert events


@pytest.mark.parametrize("dynamic", [None, True])
def test_empty_inputs_compile_as_with_inductor(dynamic: bool | None) -> None:
    attention = torch.compile(
        torch.nn.functional.scaled_dot_product_attention, backend="blade", options=HALF, dynamic=dynamic
    )
    for shape in ((2, 2, 64, 16), (0, 2, 64, 16), (2, 2, 0, 16)):
        x = torch.randn(shape)
        assert attention(x, x, x).shape == shape


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLADE_DISABLE", "1")
    model, args = TinyDiT(layers=1), inputs()
    with torch.no_grad(), observe.record() as events:
        out = torch.compile(model, backend="blade", options=HALF)(*args)
        torch.testing.assert_close(out, model(*args), rtol=1e-4, atol=1e-5)
    assert not events


def test_short_models_stay_dense_by_themselves() -> None:
    model, args = TinyDiT(layers=1), inputs()
    with torch.no_grad(), observe.record() as events:
        out = torch.compile(model, backend="blade")(*args)
        torch.testing.assert_close(out, model(*args), rtol=1e-4, atol=1e-5)
    assert not events


def test_a_graph_that_cannot_be_read_is_plain_inductor_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from blade_compile.passes import pipeline

    def broken(graph: object) -> list[object]:
        raise RuntimeError("odd graph")

    monkeypatch.setattr(pipeline, "find_sites", broken)
    pipeline.warn_unreadable_once.cache_clear()
    model, args = TinyDiT(layers=1), inputs()
    with caplog.at_level(logging.WARNING, "blade_compile"), torch.no_grad():
        out = torch.compile(model, backend="blade", options=HALF)(*args)
        torch.compile(TinyDiT(layers=1), backend="blade", options=HALF)(*args)
    torch.testing.assert_close(out, model(*args), rtol=1e-4, atol=1e-5)
    warnings = [r.getMessage() for r in caplog.records if r.name == "blade_compile"]
    assert len(warnings) == 1 and "odd graph" in warnings[0] and "plain Inductor" in warnings[0]


def test_a_protected_range_beyond_the_sequence_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, args = TinyDiT(layers=1), inputs()
    options = {**HALF, "protect": ((0, 16), (8, 10_000))}
    with caplog.at_level(logging.WARNING, "blade_compile"), torch.no_grad(), fresh_cache():
        torch.compile(model, backend="blade", options=options)(*args)
    warnings = [r.getMessage() for r in caplog.records if r.name == "blade_compile"]
    assert len(warnings) == 1 and warnings[0].startswith("protect=(8, 10000) reaches beyond the ")


def test_a_users_own_pass_still_runs() -> None:
    seen: list[str] = []

    def own(graph: torch.fx.Graph) -> None:
        seen.append("own")

    model, args = TinyDiT(layers=1), inputs()
    with torch.no_grad(), observe.record() as events:
        torch.compile(model, backend="blade", options={**HALF, "post_grad_custom_post_pass": own})(*args)
    assert seen and events


def test_key_follows_options_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    from blade_compile.passes import pipeline
    from blade_compile.passes.decide import Settings

    base = pipeline.cache_key(Settings())
    assert base == pipeline.cache_key(Settings()) != pipeline.cache_key(Settings(sparsity=0.5))
    monkeypatch.setattr(pipeline, "source_hash", lambda: "edited")
    assert pipeline.cache_key(Settings()) != base


_SECOND_PROCESS = """
import json, sys, torch
from torch._dynamo.utils import counters
from blade_compile.kernels import accelerator, observe
from tests.blade_compile.models import HALF, Attention
torch.manual_seed(0)
model, x = Attention(), torch.randn(2, 96, 64)  # no kernel for the C++ compiler to build
with torch.no_grad(), observe.record() as events:
    torch.compile(model, backend="blade", options={**HALF, "sparsity": float(sys.argv[1])})(x)
density = [event.density for event in events if event.op == "mask_predict"]
print(json.dumps({"hits": counters["inductor"]["fxgraph_cache_hit"], "density": density}))
"""


@pytest.mark.slow
def test_a_second_process_hits_the_cache_and_other_options_miss(tmp_path: Path) -> None:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    env |= {
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        "BLADE_CACHE_DIR": os.environ.get("BLADE_CACHE_DIR", str(ROOT / ".cache" / "blade")),
    }

    def run(sparsity: str) -> dict[str, object]:
        command = [sys.executable, "-c", _SECOND_PROCESS, sparsity]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    first, second, other = run("0.5"), run("0.5"), run("0.75")
    assert (first["hits"], second["hits"], other["hits"]) == (0, 1, 0)
    assert first["density"] == second["density"] == [0.5] and other["density"] == pytest.approx([1 / 6])
