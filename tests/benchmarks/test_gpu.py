"""The GPU benchmark's logic without a GPU: its budget, its rows on a tiny shape, its report, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_report, timing
from benchmarks.gpu_problem import SHAPES, Problem, Shape

TINY = Shape("Wan2.1-1.3B", 300, 2, 32, block=64, sparsities=(0.0, 0.8))
POINT = Shape(gpu_report.POINT, 256, 1, 32, block=64, sparsities=(), kept=2)
SETUP = dict.fromkeys(
    ("gpu", "capability", "multiprocessors", "memory_gib", "torch", "cuda", "cudnn", "triton", "python", "commit",
     "source", "date"),
    "x",
)  # fmt: skip


def one_second(cases: gpu_cases.Cases) -> dict[str, timing.Timing]:
    """A timer for which the first case takes a second and each later one half of the one before."""
    return {name: timing.Timing((0.5**i,) * 3) for i, name in enumerate(cases)}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA without a choice of backends, and no FlexAttention to compile."""
    monkeypatch.setattr(gpu_cases, "BACKENDS", {"flash": "MATH", "cudnn": "NO_SUCH_BACKEND"})
    monkeypatch.setattr(gpu_cases, "flex_call", lambda p, s, *inputs: gpu_cases.dense_call("cudnn", p.q, p.k, p.v))


@pytest.mark.usefixtures("on_the_cpu")
def test_rows_and_report_of_a_tiny_shape() -> None:
    with torch.no_grad():
        rows = [*gpu_cases.forward_rows(TINY, one_second, "cpu", torch.float32)]
        rows += gpu_cases.backward_rows(TINY, one_second, "cpu", torch.float32)
        rows += gpu_cases.forward_rows(POINT, one_second, "cpu", torch.float32)
    forward, backward, point = rows[1], rows[3], rows[4]
    assert [row["sparsity"] for row in rows] == [0.0, 0.8, 0.0, 0.8, 0.5]
    assert rows[0]["density"] == 1
    assert rows[0]["dense_ms"] == {"flash": 1000}
    assert rows[0]["tflops"] == pytest.approx(2 * rows[0]["dense_tflops"], abs=0.1)  # half of a second
    assert rows[0]["dense_rate_share"] == 2
    assert forward["best_dense"] == "flash"
    assert forward["op_speedup"]["median"] == forward["op_speedup"]["low"] > 1
    assert forward["error"] < 1e-5 > backward["error"]
    assert "dense cudnn" in forward["not_run"] and "flex 0.8" in forward["not_run"]
    assert "op_ms" not in point
    text = gpu_report.markdown(
        json.loads(json.dumps({"setup": SETUP, "command": "it", "tested": True, "rows": rows, "missing": {"a": "b"}}))
    )
    assert "| whole op over dense |" in text
    assert "| FlashInfer's point, forward, TFLOP/s |" in text
    assert "| a | b |" in text


@pytest.mark.usefixtures("on_the_cpu")
def test_a_wrong_result_makes_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "attend", lambda self, s: (self.q, None))
    with torch.no_grad(), pytest.raises(AssertionError, match="errors of sampled rows"):
        gpu_cases.forward_rows(TINY, one_second, "cpu", torch.float32)


def test_kept_operations_count_tokens() -> None:
    p = Problem(TINY, "cpu", torch.float32)
    assert p.flops(0.0) == TINY.dense_flops


def test_the_budget_skips_and_lists_what_it_does_not_reach() -> None:
    now = 0.0

    def part(name: str, expected: float, takes: float) -> gpu.Part:
        def run() -> list[gpu.Row]:
            nonlocal now
            now += takes
            if takes == 13:
                raise ValueError("no luck")
            return [{}]

        return gpu.Part(name, expected, run)

    done: list[str] = []
    parts = [part("a", 10, 30), part("b", 60, 60), part("c", 40, 13), part("d", 50, 50)]
    missing = gpu.run_parts(parts, gpu.Budget(100, clock=lambda: now), lambda name, rows: done.append(name))
    assert done == ["a", "b"]
    assert missing == {"c": "40 s expected, 10 s left", "d": "50 s expected, 10 s left"}
    now = 0.0
    missing = gpu.run_parts(parts[2:3], gpu.Budget(100, clock=lambda: now), lambda name, rows: done.append(name))
    assert missing == {"c": "failed: ValueError: no luck"}


def test_the_plan_names_each_shape_twice_and_the_first_fit_the_time() -> None:
    parts = list(gpu.plan())
    assert len(parts) == 2 * len(SHAPES)
    assert parts[0].name == "forward, Wan2.1-1.3B"
    assert sum(part.seconds for part in parts[:8]) < 300


def test_red_tests_end_the_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    red = gpu.run_tests(log, 9, lambda *a, **k: SimpleNamespace(returncode=1, stdout="...\n1 failed", stderr=""))
    assert "1 failed" in red and "1 failed" in log.read_text()
    assert not gpu.run_tests(log, 9, lambda *a, **k: SimpleNamespace(returncode=0, stdout="9 passed", stderr=""))

    def slow(*args: object, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired("pytest", 9)

    assert "longer than 9 s" in gpu.run_tests(log, 9, slow)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu.main(["--out", str(tmp_path)])
