"""Comparisons at equal seeds: numbers from known samples, resumption, and a real student against its teacher."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blade_compile.distill import evaluate as evaluation
from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.evaluate import (
    Evaluation,
    Sampler,
    compare,
    evaluate,
    evaluate_export,
    evaluate_student,
    sample_all,
)
from blade_compile.distill.export import export
from blade_compile.distill.generate import Sample
from blade_compile.distill.grids import vp_grid
from blade_compile.distill.metrics import mmd, ssim
from blade_compile.distill.schedules import VPSchedule, schedule_of
from tests.distill.tiny_families import SCHEDULERS, pipeline, transformer


def _model(offset: int, latent: float, calls: list[tuple[str, int]] | None = None) -> Callable[[], Sampler]:
    """Loads a sampler whose frames and latents are known."""

    def sample(prompt: str, seed: int) -> Sample:
        if calls is not None:
            calls.append((prompt, seed))
        draw = torch.Generator().manual_seed(1000 * len(prompt) + seed)
        frames = torch.randint(0, 200, (2, 12, 13, 3), generator=draw) + offset
        return Sample(frames.to(torch.uint8), torch.randn(4, 3, generator=draw) + latent, 0.5 + seed)

    return lambda: sample


def test_numbers_by_hand(tmp_path: Path) -> None:
    models = {"sparse": _model(10, 0.3), "dense": _model(0, 0.0)}
    result = evaluate(models, ["a", "bb"], [0, 1, 2], tmp_path)
    (pair,) = result.pairs
    assert (pair.name, pair.reference) == ("sparse", "dense")
    assert pair.psnr.mean == pytest.approx(10 * math.log10(255**2 / 100)) and pair.psnr.deviation == pytest.approx(0)
    samples = [(_model(10, 0.3)()(p, s), _model(0, 0.0)()(p, s)) for p in ("a", "bb") for s in range(3)]
    pixels = [(a.frames.permute(0, 3, 1, 2)[None], b.frames.permute(0, 3, 1, 2)[None]) for a, b in samples]
    values = [float(ssim(x, y, 255.0)) for x, y in pixels]
    assert pair.ssim is not None and pair.ssim.mean == pytest.approx(sum(values) / 6)
    assert pair.ssim.deviation == pytest.approx(float(torch.tensor(values, dtype=torch.float64).std()))
    ours, theirs = (torch.stack([pair[i].latents for pair in samples]) for i in (0, 1))
    assert pair.mmd == pytest.approx(mmd(ours, theirs))
    assert [m.seconds for m in result.models] == [1.5, 1.5]  # the median of 0.5, 1.5, 2.5, twice
    assert all(m.samples == 6 for m in result.models)

    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(result.to_dict())) and written["pairs"][0]["mmd"] == pair.mmd
    text = (tmp_path / "evaluation.md").read_text()
    assert "| sparse | dense | 28.13 ± " in text and "2 prompts, seeds 0, 1, 2" in text


def test_three_models_give_three_pairs_and_equal_ones_are_far_from_infinite(tmp_path: Path) -> None:
    models = {name: _model(0, 0.0) for name in ("a", "b", "c")}
    result = evaluate(models, ["p"], [0], tmp_path)
    assert [(p.name, p.reference) for p in result.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert result.pairs[0].psnr.mean == 100.0
    assert result.pairs[0].ssim is not None and result.pairs[0].ssim.mean == pytest.approx(1)
    assert result.pairs[0].mmd is None  # one sample is no distribution
    assert "| - |" in result.markdown()


def test_a_stopped_evaluation_goes_on(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    sampler = _model(0, 0.0, calls)()

    def stops(prompt: str, seed: int) -> Sample:
        if seed == 2:
            raise KeyboardInterrupt
        return sampler(prompt, seed)

    with pytest.raises(KeyboardInterrupt):
        sample_all("m", lambda: stops, ["p"], [0, 1, 2], tmp_path)
    calls.clear()
    result = sample_all("m", lambda: sampler, ["p"], [0, 1, 2], tmp_path)
    assert calls == [("p", 2), ("p", 2)]  # once to warm up
    assert result.samples == 3 and result.seconds == 1.5 and result.first_seconds == 0.5

    def not_needed() -> Sampler:
        raise AssertionError("loaded again")

    assert sample_all("m", not_needed, ["p"], [0, 1, 2], tmp_path) == result
    with pytest.raises(AssertionError, match="loaded again"):
        sample_all("m", not_needed, ["another prompt"], [0], tmp_path)
    with pytest.raises(DataError, match="not of 'retrained'"):
        sample_all("m", not_needed, ["p"], [0, 1, 2], tmp_path, "retrained")
    file = next(tmp_path.glob("*-0.safetensors"))
    file.write_bytes(b"broken")
    with pytest.raises(DataError, match="remove it to draw it again"):
        sample_all("m", not_needed, ["p"], [0, 1, 2], tmp_path)


def test_peak_memory_of_the_process() -> None:
    peak = evaluation._Peak()
    for _ in range(5):  # the system may take other pages of this process away meanwhile
        peak.start()
        before = peak.stop()
        held = torch.ones(2**25)  # 128 MiB
        after = peak.stop()
        if before is None or after is None:
            pytest.skip("the high-water mark can't be reset here")
        if after - before > 100 * 2**20:
            break
    assert after - before > 100 * 2**20 and len(held)
    del held
    peak.start()
    again = peak.stop()
    assert again is not None and again < after - 100 * 2**20  # the mark was reset


def test_what_does_not_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 prompts and 1 seeds"):
        evaluate({"a": _model(0, 0.0)}, [], [0], tmp_path)

    def small(prompt: str, seed: int) -> Sample:
        return Sample(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(2), 1.0)

    with pytest.raises(DataError, match="the same height, width"):
        evaluate({"a": _model(0, 0.0), "b": lambda: small}, ["p"], [0], tmp_path / "x")
    evaluate({"a": lambda: small, "b": lambda: small}, ["p"], [0], tmp_path / "y")  # too small for SSIM
    files = list((tmp_path / "y" / "a").glob("*.safetensors"))
    assert compare("a", "a", files, files).ssim is None


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a DiT beside its base model."""
    folder = tmp_path_factory.mktemp("evaluate")
    pipeline("dit", transformer("dit")).save_pretrained(folder / "base")
    schedule = schedule_of(SCHEDULERS["dit"])
    assert isinstance(schedule, VPSchedule)
    sparsity: dict[str, Any] = {"sparsity": 0.5, "block_size": 16, "blade_options": {"min_tokens": 1}}
    return export(
        transformer("dit"),
        folder / "export",
        family="dit",
        grid=vp_grid(schedule, 2),
        config={
            "model": {"path": str(folder / "base"), "dtype": "float32"},
            "method": {"cfg_scale": 2.0},
            "latent": {"num_frames": 1, "height": 128, "width": 128},
            "sparsity": sparsity,
        },
        scheduler_config=SCHEDULERS["dit"],
    )


@pytest.mark.slow
def test_a_student_sparse_dense_and_its_teacher(student: Path, tmp_path: Path) -> None:
    result = evaluate_student(student, ["1", "2"], [0], tmp_path, teacher_steps=4, compiled=False)
    names = [model.name for model in result.models]
    assert names == ["student sparse, 2 steps", "student dense, 2 steps", "teacher, 4 steps"]
    sparse_dense, sparse_teacher, dense_teacher = result.pairs
    assert sparse_dense.psnr.mean > sparse_teacher.psnr.mean  # the same weights and noise, but for dropped blocks
    assert dense_teacher.ssim is not None and 0 < dense_teacher.ssim.mean < 1 and dense_teacher.mmd is not None
    assert all(model.seconds > 0 and model.samples == 2 for model in result.models)


def test_the_commands_way_through_vbench(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clips of teacher and student at the same seeds, scores from another interpreter, one table."""
    info = tmp_path / "island" / "vbench" / "VBench_full_info.json"
    info.parent.mkdir(parents=True)
    info.write_text(json.dumps([{"prompt_en": "7", "dimension": ["color", "scene"]}]))
    (info.parent / "__init__.py").write_text(STAND_IN)
    (info.parent.parent / "torch.py").write_text("device = str\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{info.parent.parent}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    asked: list[tuple[str, str, int]] = []

    def load(name: str) -> Callable[..., Sampler]:
        def draw(prompt: str, seed: int) -> Sample:
            asked.append((name, prompt, seed))
            shade = {"teacher": 50, "student": 75}[name]
            return Sample(torch.full((2, 8, 8, 3), shade, dtype=torch.uint8), torch.zeros(2), 0.1)

        return lambda *args, **given: draw

    monkeypatch.setattr(evaluation, "load_teacher", load("teacher"))
    monkeypatch.setattr(evaluation, "load_student", load("student"))
    monkeypatch.setattr(evaluation, "evaluate_student", lambda *args, **given: Evaluation(1, (0,), "CPU", (), ()))
    monkeypatch.setattr(evaluation, "suffix_for", lambda video: ".gif")
    given: dict[str, Any] = {"vbench": "1", "vbench_python": python, "dimensions": ("color", "scene")}
    evaluate_export(student, ["7"], tmp_path / "out", **given)
    seeds = [[seed for name, _, seed in asked if name == wanted] for wanted in ("teacher", "student")]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 5  # five clips of the one prompt, the same noise for both
    text = capsys.readouterr().out
    assert "| color | 0.5000 | 0.7500 | +0.2500 |" in text and "| scene | 0.5000 | 0.7500 | +0.2500 |" in text
    scored = json.loads((tmp_path / "out" / "vbench1" / "vbench.json").read_text())
    assert scored["student"]["normalised"]["scene"] == pytest.approx(0.75 / 0.8222)
    evaluate_export(student, ["7"], tmp_path / "out", **given)
    assert len(asked) == 10  # nothing is drawn again

    info.with_name("__init__.py").write_text("raise SystemError('no CUDA')")
    with pytest.raises(ConfigError, match="no CUDA"):
        evaluate_export(student, ["7"], tmp_path / "out", **given)


# VBench's interface and result format; the score is the brightness of the clips in per cent, which tells them apart.
STAND_IN = """
import json, os
from PIL import Image

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.output_path = output_path

    def evaluate(self, videos_path, name, dimension_list):
        paths = sorted(os.path.join(videos_path, file) for file in os.listdir(videos_path))
        values = [round(Image.open(path).convert("L").getpixel((0, 0))) / 100 for path in paths]
        details = [{"video_path": p, "video_results": v} for p, v in zip(paths, values)]
        with open(os.path.join(self.output_path, name + "_eval_results.json"), "w") as file:
            json.dump({dimension_list[0]: [sum(values) / len(values), details]}, file)
"""
