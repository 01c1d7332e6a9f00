"""The benchmark's rows and reports on sizes too small to mean anything: they run, pass their gates, and render."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import attention_report, auto_choice, cpu_attention, setup_info, wan
from benchmarks.demo import Screen, show
from blade_compile.report import Report

SPAN = {"median": 2.0, "low": 1.5, "high": 2.5, "samples": 3}
FORWARD = {
    "dtype": "float32", "D": 64, "S": 8192, "sparsity": 0.8, "density": 0.2, "dense_ms": 9.0, "blade_ms": 1.0,
    "speedup": SPAN, "gflops": 200.0, "peak_gflops": 240.0, "peak_share": 0.83, "error": 1e-7, "dense_error": 1e-7,
    "predict_share": 0.01, "flex_ms": 3.0, "over_flex": SPAN,
}  # fmt: skip


def test_rows_of_backward_and_scaling_pass_their_gates() -> None:
    row = cpu_attention.backward_row(512, 32, torch.float32, rounds=3)
    assert row["error"] < 1e-5
    assert cpu_attention.scaling_row(256, 32, torch.bfloat16, 1, rounds=3)["blade"]["samples"] == 3


def test_attention_report_quotes_the_worst_case() -> None:
    worse = {**FORWARD, "dtype": "bfloat16", "peak_share": 0.5, "predict_share": 0.03}
    content = {"setup": setup_info.collect(), "command": "it", "parts": {"forward a": [FORWARD], "forward b": [worse]}}
    text = attention_report.markdown(json.loads(json.dumps(content)))
    assert "| of the instruction peak on kept blocks | 50% | 80 % |" in text
    assert "| prediction, of dense time | 3.0% | at most 2 % |" in text
    assert "bfloat16 | 64 | 8,192 | 0.8" in text


_ticks = iter(range(10_000))


def test_auto_choice_measures_and_reports() -> None:
    row = auto_choice.measure((128, 256, 32, 0.5), torch.float32, 3, lambda: float(next(_ticks)))
    assert row["choice"] == "too short"
    assert "too short" in auto_choice.markdown({"setup": setup_info.collect(), "command": "it", "rows": [row]})


def test_the_demos_model_has_wans_shape() -> None:
    third, real = wan.THIRD, wan.REAL
    assert (real.tokens, third.tokens) == (32_760, 10_920)
    for case in (third, real):
        width = case.model["num_attention_heads"] * case.model["attention_head_dim"]
        assert abs(case.model["ffn_dim"] / width - 8960 / 1536) < 0.02
    assert "10,920 video" in " ".join(third.describe())


def test_the_tiny_model_runs_and_keeps_what_diffusers_keeps_exact() -> None:
    case = wan.Case({**wan.WAN_TINY, "num_layers": 1}, frames=5, height=32, width=32, text=8)
    model, inputs = case.build(torch.bfloat16, "cpu"), case.inputs(torch.bfloat16, "cpu")
    dtypes = {
        name.split(".")[0]: p.dtype
        for name, p in model.named_parameters()
        if "time_embedder" in name or "proj_out" in name
    }
    assert dtypes == {"condition_embedder": torch.float32, "proj_out": torch.bfloat16}
    out = model(**inputs)[0]
    assert out.shape == inputs["hidden_states"].shape


def test_the_demo_prints_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "report": Report([]),
        "compile": {"inductor": 10.0, "blade": 11.0},
        "step": {"inductor": SPAN, "blade": SPAN},
        "speedup": SPAN,
        "density": None,
        "error": 0.1,
    }
    show(result, Screen())
    text = capsys.readouterr().out
    assert "Weights are random" in text
    assert "none runs sparse" in text
    assert text.isascii()
