"""``explain`` on models that are plain, compiled in every way, broken by Dynamo, or that nothing can read."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import blade_compile
from blade_compile import BladeConfig, Report
from tests.blade_compile.models import HALF, Attention, TinyDiT, inputs

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = HALF
ATTN1, ATTN2 = "blocks.{}.attn1", "blocks.{}.attn2"


def rows_of(report: Report) -> dict[str, tuple[str, float | None]]:
    return {site.name: (site.code, site.density) for site in report.sites}


def expected_rows(layers: int = 2) -> dict[str, tuple[str, float | None]]:
    """96 tokens are 6 blocks of 16, of which sparsity 0.5 keeps 3."""
    rows: dict[str, tuple[str, float | None]] = {}
    for i in range(layers):
        rows[ATTN1.format(i)] = ("rewritten", 0.5)
        rows[ATTN2.format(i)] = ("cross", None)
    return rows


def test_a_plain_model_says_what_blade_would_do() -> None:
    report = blade_compile.explain(TinyDiT(), *inputs(), blade_options=OPTIONS)
    assert rows_of(report) == expected_rows()
    assert report.headline == "2 of 4 attention sites run sparse; 2 stay dense: 2 cross"
    site = report.sites[0]
    assert (site.kind, site.shape, site.dtype, site.mask) == ("sdpa", (2, 2, 96, 96, 32), "float32", "none")
    assert site.rewritten
    assert (site.block_size, site.calls) == (16, 1)
    assert site.recall is not None
    assert 0.3 < site.recall < 1
    assert site.predicted_dense is not None
    assert site.predicted_sparse is not None
    assert site.measured_dense is site.measured_sparse is None
    assert report.sites[1].shape == (2, 2, 96, 8, 32)
    assert report.sites[1].predicted_sparse is None


def test_it_goes_into_json_and_back() -> None:
    report = blade_compile.explain(TinyDiT(1), *inputs(), blade_options={**OPTIONS, "exclude": ("*.attn1",)})
    values = json.loads(json.dumps(report.to_dict()))
    assert values["headline"] == report.headline
    assert [site["name"] for site in values["sites"]] == ["blocks.0.attn1", "blocks.0.attn2"]
    assert values["sites"][0]["code"] == "excluded"
    assert values["options"]["exclude"] == ["*.attn1"]


def _whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="blade", options=OPTIONS, fullgraph=True)


def _in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="blade", options=OPTIONS)
    return model


def _regional(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="blade", options=OPTIONS, fullgraph=True)
    return model


def _wrapped_blocks(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="blade", options=OPTIONS)
    return model


def _forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="blade", options=OPTIONS)
    return model


def _nested(model: nn.Module) -> nn.Module:
    return _whole(_regional(model))


@pytest.mark.parametrize("compiled", [_whole, _in_place, _regional, _wrapped_blocks, _forward, _nested])
def test_every_way_of_compiling_gives_the_same_rows_and_its_own_options(compiled) -> None:
    model = compiled(TinyDiT())
    report = blade_compile.explain(model, *inputs())
    assert rows_of(report) == expected_rows()
    assert report.options == OPTIONS
    assert report.notes == []


def test_given_options_come_before_those_of_the_compile() -> None:
    model = _whole(TinyDiT(1))
    report = blade_compile.explain(model, *inputs(), blade_options=BladeConfig(**{**OPTIONS, "sparsity": 0.8}))
    assert report.sites[0].density == 1 / 6
    assert rows_of(blade_compile.explain(model, *inputs(), blade_options={})) == {
        "blocks.0.attn1": ("too-short", None),
        "blocks.0.attn2": ("cross", None),
    }


def test_a_function_and_a_bound_forward() -> None:
    model = TinyDiT(1)
    for function in (functools.partial(model), model.forward, torch.compile(model.forward, backend="blade")):
        report = blade_compile.explain(function, *inputs(), blade_options=OPTIONS)
        assert [site.code for site in report.sites] == ["rewritten", "cross"]
    with pytest.raises(ValueError, match="int; valid are a module"):
        blade_compile.explain(3)


def test_a_model_compiled_by_another_backend_is_told_apart() -> None:
    report = blade_compile.explain(torch.compile(TinyDiT(1), backend="aot_eager"), *inputs(), blade_options=OPTIONS)
    assert report.sites[0].code == "rewritten"
    assert "`aot_eager`, not by blade" in report.notes[0]


def test_blade_disable_shows_in_every_row(monkeypatch) -> None:
    monkeypatch.setenv("BLADE_DISABLE", "1")
    report = blade_compile.explain(TinyDiT(1), *inputs(), blade_options=OPTIONS)
    assert [site.code for site in report.sites] == ["disabled", "cross"]
    assert "BLADE_DISABLE" in report.notes[0]


# --- it leaves no trace -----------------------------------------------------------------------------------------------


class Stateful(TinyDiT):
    """Everything that a forward pass may change: a buffer, a counter, a cache, random numbers, its input."""

    def __init__(self) -> None:
        super().__init__(1)
        self.register_buffer("seen", torch.zeros(3))
        self.calls, self.cache, self.lazy = 0, [], None

    def forward(self, x, text):
        self.calls += 1
        self.cache.append(self.calls)
        self.lazy = torch.ones(2) if self.lazy is None else self.lazy
        self.seen.add_(1)
        text += torch.rand_like(text) * 1e-3
        return F.dropout(super().forward(x, text), 0.1, self.training)


@pytest.mark.parametrize("grad", [True, False])
def test_the_model_and_the_process_are_left_as_they_were(grad) -> None:
    model, (x, text) = Stateful().train(), inputs()
    kept = text.clone()
    random = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        report = blade_compile.explain(model, x, text, blade_options=OPTIONS)
        assert torch.is_grad_enabled() == grad
    assert report.sites[0].density == 0.5
    assert torch.equal(torch.get_rng_state(), random)
    assert (model.calls, model.cache, model.lazy, model.training) == (0, [], None, True)
    assert torch.equal(model.seen, torch.zeros(3))
    assert torch.equal(text, kept)
    assert "forward" not in vars(model)
    assert all(p.grad is None for p in model.parameters())


def test_what_was_compiled_runs_on_without_compiling_again() -> None:
    compiles = []

    def backend(gm, example_inputs):
        compiles.append(gm)
        return gm.forward

    model, tensors = TinyDiT(), inputs()
    compiled = torch.compile(model, backend=backend)
    for block in model.blocks:
        block.attn1.compile(backend=backend)
    before = compiled(*tensors)
    for length in (96, 112, 128):
        report = blade_compile.explain(compiled, *inputs(length), blade_options=OPTIONS)
        assert [site.code for site in report.sites] == ["rewritten", "cross"] * 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(*tensors), before)
    assert len(compiles) == 1


def test_explaining_first_does_not_make_the_compile_dynamic() -> None:
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    model = TinyDiT(1)
    for length in (96, 112):
        blade_compile.explain(model, *inputs(length), blade_options=OPTIONS)
    torch.compile(model, backend=backend)(*inputs(128))
    assert len(graphs) == 1
    assert not any(node.meta["example_value"].dim() == 0 for node in graphs[0].graph.find_nodes(op="placeholder"))


# --- what graphs can't show -------------------------------------------------------------------------------------------


class DataDependent(nn.Module):
    """A data-dependent operation inside a loop: Dynamo abandons the frame, and with it the attention written there."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.hand = nn.Linear(64, 64)

    def forward(self, x):
        for block in self.blocks:
            if x.abs().max().item() > -1:
                x = block(x)
            weights = (self.hand(x) @ x.transpose(-1, -2) / math.sqrt(64)).softmax(-1)
            x = weights @ x
        return x


def test_attention_that_dynamo_left_to_python_has_a_row_that_says_so() -> None:
    model, x = DataDependent(), torch.randn(1, 96, 64)
    report = blade_compile.explain(model, x, blade_options=OPTIONS)
    by_code = {site.code: site for site in report.sites}
    assert [site.name for site in report.sites if site.code == "rewritten"] == ["blocks.0", "blocks.1"]
    outside = by_code["outside-graph"]
    assert (outside.kind, outside.calls, outside.rewritten) == ("matmul", 2, False)
    assert "fullgraph=True" in outside.reason
    assert "capture_scalar_outputs" in outside.reason


def test_a_frame_given_up_for_the_report_can_still_be_captured() -> None:
    seen = []

    def backend(gm, example_inputs):
        seen.append(gm)
        return gm.forward

    model, x = DataDependent(), torch.randn(1, 96, 64)
    blade_compile.explain(model, x, blade_options=OPTIONS)
    model.blocks = nn.ModuleList(model.blocks[:0])  # nothing data-dependent is left
    torch.compile(model, backend=backend, fullgraph=True)(x + 1)
    assert len(seen) == 1


def test_parts_that_are_not_compiled_are_named() -> None:
    model = TinyDiT()
    model.blocks[1].compile(backend="blade", options=OPTIONS)
    report = blade_compile.explain(model, *inputs())
    codes = {site.name: site.code for site in report.sites}
    assert codes == {
        "blocks.1.attn1": "rewritten",
        "blocks.1.attn2": "cross",
        "blocks.0.attn1": "outside-graph",
        "blocks.0.attn2": "outside-graph",
    }
    assert "no compiled part" in next(site.reason for site in report.sites if site.name == "blocks.0.attn1")


def test_a_model_that_fullgraph_refuses_is_explained_without() -> None:
    model = torch.compile(DataDependent(), backend="blade", options=OPTIONS, fullgraph=True)
    report = blade_compile.explain(model, torch.randn(1, 96, 64))
    assert any(note.startswith("fullgraph=True fails on this model") for note in report.notes)
    assert "rewritten" in {site.code for site in report.sites}


def test_a_pass_that_fails_gives_rows_and_no_exception(monkeypatch) -> None:
    from blade_compile.passes import pipeline

    def fail(graph):
        raise RuntimeError("a graph from the future")

    monkeypatch.setattr(pipeline, "find_sites", fail)
    report = blade_compile.explain(TinyDiT(1), *inputs(), blade_options=OPTIONS)
    assert {site.name: site.code for site in report.sites} == {
        "blocks.0.attn1": "unreadable",
        "blocks.0.attn2": "unreadable",
    }


def test_an_operator_that_fails_gives_a_row_and_no_exception(monkeypatch) -> None:
    from blade_compile.kernels import dispatch

    def fail(*args, **kwargs):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(dispatch, "attend", fail)
    report = blade_compile.explain(TinyDiT(1), *inputs(), blade_options=OPTIONS)
    assert report.sites[0].code == "unreadable"
    assert "no kernel" in report.sites[0].reason


def test_the_models_own_errors_and_wrong_options_pass_through() -> None:
    model, (x, text) = TinyDiT(1), inputs()
    with pytest.raises(RuntimeError, match="shape"):
        blade_compile.explain(model, x[..., :5], text)
    with pytest.raises(ValueError, match="sparsity"):
        blade_compile.explain(model, x, text, blade_options={"sparsity": 2})
    with pytest.raises(ValueError, match="did you mean 'sparsity'"):
        blade_compile.explain(model, x, text, blade_options={"sparsty": 0.5})


# --- more kinds of models ---------------------------------------------------------------------------------------------


def test_checkpointed_blocks_in_training() -> None:
    report = blade_compile.explain(TinyDiT(checkpointed=True).train(), *inputs(), blade_options=OPTIONS)
    assert rows_of(report) == expected_rows()


def test_dynamic_sizes_are_decided_by_the_operator() -> None:
    model = torch.compile(TinyDiT(1), backend="blade", dynamic=True, options={**OPTIONS, "when": "auto"})
    site = blade_compile.explain(model, *inputs()).sites[0]
    assert site.rewritten
    assert site.density is None or site.density == 1
    assert site.shape == (2, 2, 96, 96, 32)


class Joint(nn.Module):
    """Text before image in one attention, with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.text_in = Attention(), nn.Linear(64, 64)

    def forward(self, hidden_states, encoder_hidden_states, mask):
        both = torch.cat([self.text_in(encoder_hidden_states), hidden_states], 1)
        return self.attn(both, mask=mask)


def test_mask_and_protected_tokens_are_shown() -> None:
    mask = torch.ones(1, 1, 1, 112, dtype=torch.bool)
    mask[..., 100:] = False
    report = blade_compile.explain(
        Joint(), torch.randn(1, 96, 64), torch.randn(1, 16, 64), mask=mask, blade_options=OPTIONS
    )
    (site,) = report.sites
    assert (site.code, site.mask) == ("rewritten", "key")
    assert site.protected_q == site.protected_k == ((0, 16),)
    assert site.density > 0.5


def test_times_are_measured_on_request() -> None:
    report = blade_compile.explain(TinyDiT(1), *inputs(), blade_options=OPTIONS, blade_measure=True)
    assert report.sites[0].measured_dense > 0
    assert report.sites[0].measured_sparse > 0
    assert report.sites[1].measured_dense is None


def test_a_module_of_torch_itself() -> None:
    layer = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True, dropout=0.0)
    report = blade_compile.explain(layer.train(), torch.randn(1, 96, 64), blade_options=OPTIONS)
    assert [site.code for site in report.sites] == ["rewritten"]


def test_graphs_before_and_after_go_to_their_logger_on_request(caplog) -> None:
    with caplog.at_level("DEBUG", logger="blade_compile.graphs"):
        blade_compile.explain(TinyDiT(1), *inputs(), blade_options=OPTIONS)
    before, after = (record.getMessage() for record in caplog.records if record.name == "blade_compile.graphs")
    assert before.startswith("graph before")
    assert "blade.sparse_sdpa" not in before
    assert after.count("torch.ops.blade.sparse_sdpa") == 1


_PROCESS = """
import json, torch, blade_compile
from tests.blade_compile.models import HALF, TinyDiT, inputs
torch.manual_seed(0)
model, tensors = torch.compile(TinyDiT(layers=1), backend="blade", options=HALF), inputs()
with torch.no_grad():
    model(*tensors)
    hits = torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"]
    report = blade_compile.explain(model, *tensors)
print(json.dumps([hits, [site.to_dict() for site in report]]))
"""


@pytest.mark.slow
def test_a_second_process_that_compiles_from_the_cache_gives_the_same_report() -> None:
    runs = []
    for _ in range(2):
        env = {**os.environ, "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
        command = [sys.executable, "-c", _PROCESS]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    (_, first), (hits, second) = runs
    assert hits == 1
    assert first == second
    assert first[0]["density"] == 0.5


# --- diffusers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def wan():
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=64, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    return model.eval()


def wan_inputs() -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(1, 4, 4, 16, 16),
        "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
    }


@torch.no_grad()
def test_diffusers_whole_and_by_repeated_blocks(wan) -> None:
    tensors = wan_inputs()
    whole = blade_compile.explain(wan, **tensors, blade_options=OPTIONS)
    assert rows_of(whole) == expected_rows()
    wan.compile_repeated_blocks(backend="blade", options=OPTIONS, fullgraph=True)
    regional = blade_compile.explain(wan, **tensors)
    assert rows_of(regional) == expected_rows()
    assert regional.notes == []


@torch.no_grad()
def test_another_attention_backend_is_named_with_the_remedy(wan, monkeypatch) -> None:
    """A stand-in for a kernel from the hub: no torch operator, so Dynamo can't see into it and neither can a mode."""
    from diffusers.models import attention_dispatch as dispatch

    @torch._dynamo.disable
    def kernel(query, key, value, **kwargs):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    hub = dispatch.AttentionBackendName.FLASH_HUB
    monkeypatch.setitem(dispatch._AttentionBackendRegistry._backends, hub, kernel)
    for module in wan.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = hub
    report = blade_compile.explain(wan, **wan_inputs(), blade_options=OPTIONS)
    assert report.notes[0] == "0 replaced, 4 calls go through `flash_hub`: call `set_attention_backend('native')`"
    assert {site.code for site in report.sites} == {"other-backend"}
    assert "set_attention_backend('native')" in report.sites[0].reason
    assert dispatch._AttentionBackendRegistry._backends[hub] is kernel


def test_the_order_is_a_line_of_the_report() -> None:
    model, args = TinyDiT(), inputs()
    unknown = blade_compile.explain(model, *args, blade_options={**HALF, "order": "gilbert"})
    assert "no convolution, patches or position table" in str(unknown) and unknown.sites[0].rewritten
    given = blade_compile.explain(model, *args, blade_options={**HALF, "order": "gilbert", "grid": (4, 4, 6)})
    assert "the grid (4, 4, 6) is given" in str(given)
