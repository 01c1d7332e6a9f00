"""Sampling from exports through stock pipelines: exact steps, equal seeds, files that are kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blade_compile.distill import clips, generate
from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.export import export
from blade_compile.distill.generate import LoadedModel, Sample, load_student, load_teacher
from blade_compile.distill.grids import flow_grid, vp_grid
from blade_compile.distill.pipelines import PIPELINES, call_arguments, pipeline_family
from blade_compile.distill.prompts import Prompt
from blade_compile.distill.samplers import student_scheduler
from blade_compile.distill.schedules import FlowSchedule, VPSchedule, schedule_of
from blade_compile.kernels import observe
from tests.distill.tiny_families import SCHEDULERS, pipeline, transformer, with_adapter


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a DiT, whose prompts are classes, beside its base model."""
    folder = tmp_path_factory.mktemp("generate")
    pipeline("dit", transformer("dit")).save_pretrained(folder / "base")
    schedule = schedule_of(SCHEDULERS["dit"])
    assert isinstance(schedule, VPSchedule)
    config = {
        "model": {"path": str(folder / "base"), "dtype": "float32"},
        "method": {"cfg_scale": 3.0},
        "latent": {"num_frames": 1, "height": 128, "width": 128},
        "sparsity": {
            "sparsity": 0.5, "block_size": 16, "when": "always", "blade_options": {"min_tokens": 1, "probe_tokens": 8},
        },
    }  # fmt: skip
    return export(
        with_adapter(transformer("dit")),
        folder / "export",
        family="dit",
        grid=vp_grid(schedule, 4),
        other_grids={2: vp_grid(schedule, 2)},
        config=config,
        scheduler_config=SCHEDULERS["dit"],
    )


@pytest.fixture(scope="module")
def dense(student: Path) -> LoadedModel:
    return load_student(student, sparse=False, compiled=False)


def _times(model: LoadedModel) -> list[float]:
    seen: list[float] = []
    handle = model.pipe.transformer.register_forward_pre_hook(
        lambda _, args, given: seen.append(float(given["timestep"].flatten()[0])), with_kwargs=True
    )
    model("3", 0)
    handle.remove()
    return seen


def test_dense_student(dense: LoadedModel) -> None:
    assert _times(dense) == [999, 749, 499, 249]
    a, b, other = dense("3", 7), dense("3", 7), dense("3", 8)
    assert a.frames.shape == (1, 128, 128, 3) and a.frames.dtype == torch.uint8
    assert a.latents.shape == (4, 16, 16) and a.latents.dtype == torch.float32
    assert torch.equal(a.latents, b.latents) and torch.equal(a.frames, b.frames)
    assert not torch.equal(a.latents, other.latents) and a.seconds > 0
    assert not torch.equal(a.latents, dense("4", 7).latents)
    assert "step" not in vars(dense.pipe.scheduler)  # nothing is left behind


@pytest.mark.slow
def test_sparse_student(student: Path, dense: LoadedModel) -> None:
    sparse = load_student(student)
    with observe.record() as events:
        sample = sparse("3", 7)
    runs = [event for event in events if event.op == "block_sparse_attention"]
    assert len(runs) == 4  # one layer, four steps, no guidance
    want = dense("3", 7).latents
    assert not torch.equal(sample.latents, want)
    exact = load_student(student, options={"sparsity": 0.0})("3", 7).latents
    torch.testing.assert_close(exact, want, rtol=1e-3, atol=1e-3)


def test_another_k_that_the_student_knows(student: Path) -> None:
    assert _times(load_student(student, steps=2, sparse=False, compiled=False)) == [999, 499]
    with pytest.raises(ConfigError, match="trained for 2, 4; use one"):
        load_student(student, steps=3)


def test_teacher_has_its_own_steps_and_guidance(student: Path, dense: LoadedModel) -> None:
    teacher = load_teacher(student, steps=5, compiled=False)
    assert teacher.cfg_scale == 3.0 and len(_times(teacher)) == 5
    assert teacher("3", 7).latents.shape == dense("3", 7).latents.shape
    assert not torch.equal(
        teacher("3", 7).latents, load_teacher(student, steps=5, cfg_scale=1, compiled=False)("3", 7).latents
    )


def test_the_teacher_is_the_one_of_the_training(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own weights, the negative prompt, the revision and the length of text come from blade.json."""
    from safetensors.torch import save_file

    folder, asked = shutil.copytree(student, tmp_path / "export"), []
    other = {name: 0.5 * tensor for name, tensor in transformer("dit").state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    record = json.loads((folder / "blade.json").read_text())
    changed = {"base_revision": "v2", "base_weights": str(tmp_path / "other.safetensors"), "negative_prompt": "ugly"}
    (folder / "blade.json").write_text(json.dumps({**record, **changed, "max_sequence_length": 77}))
    load = generate._load_pipeline
    monkeypatch.setattr(generate, "_load_pipeline", lambda *args, **given: asked.append(given) or load(*args, **given))
    teacher, base = load_teacher(folder, compiled=False), record["base_model"]
    assert teacher.negative_prompt == "ugly" and teacher.max_sequence_length == 77
    assert all(torch.equal(tensor, other[name]) for name, tensor in teacher.pipe.transformer.state_dict().items())
    plain = load_teacher(folder, base=base, negative_prompt="", compiled=False)  # a whole teacher by itself
    assert plain.negative_prompt == "" and not torch.equal(
        plain.pipe.transformer.pos_embed.proj.weight, other["pos_embed.proj.weight"]
    )
    assert load_student(folder, sparse=False, compiled=False).max_sequence_length == 77
    assert [given["revision"] for given in asked] == ["v2", None, "v2"]
    for key in (*changed, "max_sequence_length", "pipeline"):  # exports of earlier versions have none of them
        record.pop(key)
    (folder / "blade.json").write_text(json.dumps(record))
    assert load_teacher(folder, compiled=False).negative_prompt == ""
    (folder / "blade.json").write_text(json.dumps({**record, "base_weights": "gone.safetensors"}))
    with pytest.raises(ConfigError, match=r"gone\.safetensors can't be read.*--base"):
        load_teacher(folder, compiled=False)


def test_fresh_noise_at_each_step_is_drawn_from_the_samples_seed() -> None:
    """Most pipelines hand their generator to no step."""
    schedule = FlowSchedule(shift=3.0)
    scheduler = student_scheduler("wan", flow_grid(schedule, 4), schedule, eta=0.0)
    assert scheduler.config.stochastic_sampling

    def drawn(seed: int) -> torch.Tensor:
        scheduler.set_timesteps(4)
        x = torch.ones(1, 3, 5)
        with generate._LastStep(scheduler, torch.Generator().manual_seed(seed)):
            for t in scheduler.timesteps[:2]:
                x = scheduler.step(torch.ones_like(x), t, x, return_dict=False)[0]
        return x

    first = drawn(7)
    torch.manual_seed(1)
    assert torch.equal(first, drawn(7)) and not torch.equal(first, drawn(8))


def test_another_k_keeps_the_horizon(tmp_path: Path) -> None:
    schedule = FlowSchedule(shift=3.0, horizon=100.0)
    grids = {k: flow_grid(schedule, k) for k in (2, 4)}
    student_scheduler("wan", grids[4], schedule).save_pretrained(tmp_path / "scheduler")
    two = {"timesteps": grids[2].times, "alphas": grids[2].alphas, "sigmas": grids[2].sigmas}
    record = {"family": "wan", "steps": 4, "shift": 3.0, "eta": 1.0, "step_choices": {"2": two}}
    scheduler = generate._scheduler_for(tmp_path, record, 2)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == pytest.approx([100, 75])


class _Known(LoadedModel):
    """Draws nothing and notes what it is asked for."""

    def __call__(self, prompt: str, seed: int, size: Any = None) -> Sample:
        self.pipe.append((prompt, seed, size))
        return Sample(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1), 0.1)


def test_seeds_and_sizes_of_a_prompt_file(tmp_path: Path) -> None:
    asked: list[Any] = []
    size = {"height": 64, "width": 96, "num_frames": 9}
    model = _Known(asked, PIPELINES["wan"], 4, size=size, identity="known")
    prompts = [
        Prompt("a cat"), Prompt("a cat", seed=7), Prompt("a cat", seed=7, width=128), Prompt("a dog", height=64),
    ]  # fmt: skip
    made = generate.generate(model, prompts, tmp_path, seeds=(2, 3), suffix=".gif")
    names = ["a-cat-2", "a-cat-3", "a-cat-7", "a-cat-8", "a-cat-64x128x9-7", "a-cat-64x128x9-8", "a-dog-2", "a-dog-3"]
    assert [one.file for one in made] == [f"{name}.gif" for name in names]
    assert [seed for _, seed, _ in asked] == [2, 3, 7, 8, 7, 8, 2, 3]
    assert [given for _, _, given in asked] == 4 * [None] + 2 * [{"width": 128}] + 2 * [{"height": 64}]
    generate.generate(model, prompts, tmp_path, seeds=(2, 3), suffix=".gif")
    assert len(asked) == 8  # all is there
    for family, wrong in (("dit", Prompt("3", height=32)), ("sd3", Prompt("a", num_frames=9))):
        still = _Known(asked, PIPELINES[family], 4, size={**size, "num_frames": 1})
        assert still.unfit(Prompt("3", height=64, num_frames=1)) is None
        with pytest.raises(DataError, match=r"this model makes \d+; remove it from the file"):
            generate.generate(still, ["3", wrong], tmp_path / family)
    assert len(asked) == 8


def test_files_and_manifest(dense: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = generate.generate(dense, ["3", "4"], tmp_path, seeds=(0, 5))
    assert [w.file for w in made] == ["3-0.png", "3-5.png", "4-0.png", "4-5.png"]
    image = np.asarray(Image.open(tmp_path / "4-5.png"))
    assert np.array_equal(image, dense("4", 5).frames[0].numpy())
    manifest = json.loads((tmp_path / "prompts.json").read_text())
    assert [(e["prompt"], e["seed"]) for e in manifest] == [("3", 0), ("3", 5), ("4", 0), ("4", 5)]

    def no_sampling(*args: Any, **given: Any) -> None:
        raise AssertionError("drawn again")

    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "__call__", no_sampling)
        assert generate.generate(dense, ["4"], tmp_path, seeds=(5,))[0] == made[3]
        (tmp_path / "4-5.png").unlink()
        with pytest.raises(AssertionError, match="drawn again"):
            generate.generate(dense, ["4"], tmp_path, seeds=(5,))
    assert len(json.loads((tmp_path / "prompts.json").read_text())) == 4
    with pytest.raises(DataError, match="give another folder"):
        generate.generate(dataclasses.replace(dense, identity="another"), ["4"], tmp_path, seeds=(0,))


def test_prompts_with_the_same_slug_get_different_files() -> None:
    assert generate._unique_slugs(["A cat!", "a cat", "A cat!", "dog"]) == ["a-cat", "a-cat-v2", "a-cat", "dog"]
    assert clips.slug("Ein Fuß, ÜBER 100 %") == "ein-fuß-über-100" and clips.slug("...") == "empty"
    assert len(clips.slug("word " * 50)) <= 60


def test_gif_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "has_mp4", lambda: False)
    assert clips.suffix_for(video=True) == ".gif" and clips.suffix_for(video=False) == ".png"
    with pytest.raises(ConfigError, match="pip install imageio"):
        clips.suffix_for(video=True, wanted=".mp4")
    with pytest.raises(ConfigError, match=r"use \.png"):
        clips.suffix_for(video=False, wanted=".gif")
    frames = torch.zeros(5, 8, 12, 1)
    frames[2:] = 1.0
    clips.write(frames, tmp_path / "new" / "clip.gif", fps=10)
    with Image.open(tmp_path / "new" / "clip.gif") as clip:
        assert clip.size == (12, 8) and clip.info["duration"] in {100, 200, 300}  # equal frames are joined
        shown = [np.asarray(clip.convert("L")).mean()]
        clip.seek(clip.n_frames - 1)  # type: ignore[attr-defined]
        shown.append(np.asarray(clip.convert("L")).mean())
    assert shown == [0, 255]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clip.gif"]


@pytest.mark.skipif(not clips.has_mp4(), reason="imageio and imageio-ffmpeg are not installed")
def test_mp4(tmp_path: Path) -> None:
    clips.write(torch.rand(4, 33, 31, 3), tmp_path / "clip.mp4", fps=8)
    assert (tmp_path / "clip.mp4").stat().st_size > 0


def test_bytes_are_rounded_and_nan_is_black() -> None:
    x = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0, float("nan")])
    assert clips.to_bytes(x).tolist() == [0, 128, 255, 255, 0, 0]


def test_arguments_of_each_family() -> None:
    size = {"height": 64, "width": 96, "num_frames": 9}
    for name, family in PIPELINES.items():
        given = call_arguments(family, None, "3", steps=4, cfg_scale=1.0, seed=1, size=size)
        assert given["num_inference_steps"] == 4
        assert given["guidance_scale"] == {"flux": 3.5, "hunyuan_video": 6.0}.get(name, 1.0)
        assert ("num_frames" in given) == family.video
        assert given.get("class_labels") == ([3] if name == "dit" else None)
        guided = call_arguments(
            family, None, "3", steps=4, cfg_scale=5.0, seed=1, size=size, embedded_guidance=2.0, negative_prompt="bad"
        )  # fmt: skip
        assert guided["guidance_scale"] == (2.0 if family.embedded_guidance else 5.0)
        assert guided.get("negative_prompt") == (None if name == "dit" else "bad")
        long = call_arguments(family, None, "3", steps=4, cfg_scale=5.0, seed=1, size=size, max_sequence_length=64)
        assert long.get("max_sequence_length") == (None if name == "dit" else 64)
        assert long.get("negative_prompt") == (None if name == "dit" else "")  # Flux guides only where it has one
        assert "max_sequence_length" not in guided
    with pytest.raises(ConfigError, match="class is 'cat'"):
        call_arguments(PIPELINES["dit"], None, "cat", steps=4, cfg_scale=1.0, seed=1, size=size)


def test_the_arguments_are_the_pipelines_own() -> None:
    import inspect

    import diffusers

    size = {"height": 64, "width": 96, "num_frames": 9}
    sigma = pipeline_family("pixart", "PixArtSigmaPipeline")
    assert sigma.pipeline == "PixArtSigmaPipeline" and pipeline_family("pixart", "Another").pipeline != "Another"
    for family in (*PIPELINES.values(), sigma):
        known = inspect.signature(getattr(diffusers, family.pipeline).__call__).parameters
        given = call_arguments(
            family, None, "3", steps=4, cfg_scale=5.0, seed=1, size=size, negative_prompt="bad", max_sequence_length=64
        )  # fmt: skip
        assert set(given) <= set(known), family.name
        assert hasattr(diffusers, family.transformer)
        assert family.loads_lora == hasattr(getattr(diffusers, family.pipeline), "load_lora_weights"), family.name


def test_refusals(student: Path, tmp_path: Path, dense: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="no export of blade-distill"):
        load_student(tmp_path)
    with pytest.raises(ConfigError, match=r"can't load .* as a DiTPipeline"):
        load_student(student, base=str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="no prompts"):
        generate.generate(dense, [], tmp_path)

    class Refuses:
        scheduler = dense.pipe.scheduler

        def __call__(self, **given: Any) -> None:
            raise ValueError(f"`height` has to be divisible by 16 but is {given['height']}")

    with pytest.raises(DataError, match=r"prompt 'a' at \{'height': 70\}.*divisible by 16 but is 70; change or remove"):
        LoadedModel(Refuses(), PIPELINES["sd3"], 4, size=dense.size)("a", 0, {"height": 70})
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't write"):
        generate.generate(dense, ["3"], tmp_path / "file" / "below")
    (tmp_path / "prompts.json").write_text("{")
    with pytest.raises(DataError, match="remove it to start again"):
        generate.generate(dense, ["3"], tmp_path)
