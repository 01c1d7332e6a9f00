"""Exports loaded back by stock diffusers pipelines: equal to the student in memory, dense and with backend="blade"."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from blade_compile.distill.errors import ConfigError
from blade_compile.distill.export import adapter_of, export, gather, merged, read_record, record_of
from blade_compile.distill.grids import Grid, flow_grid, vp_grid
from blade_compile.distill.model_card import loading_code, model_card
from blade_compile.distill.objective import step_to
from blade_compile.distill.pipelines import PIPELINES, pipeline_family
from blade_compile.distill.samplers import pipeline_sigmas
from blade_compile.distill.schedules import FlowSchedule, VPSchedule, schedule_of, to_x0_eps
from blade_compile.kernels import observe
from tests.distill.tiny_families import CONFIGS, FLOW, SCHEDULERS, pipeline, run, stock, transformer, with_adapter

LORA = ["wan", "cogvideox", "sd3", "flux"]
MERGED = ["pixart", "dit"]
SPARSITY = {"sparsity": 0.5, "block_size": 16, "when": "always", "blade_options": {"min_tokens": 1, "probe_tokens": 8}}
CONFIG: dict[str, Any] = {
    "model": {"path": "some/base", "dtype": "float32"},
    "method": {"steps": 4, "cfg_scale": 5.0, "eta": 0.9},
    "latent": {"num_frames": 9, "height": 128, "width": 128},
    "sparsity": SPARSITY,
}


def _grid(family: str, steps: int = 4) -> Grid:
    schedule = schedule_of(SCHEDULERS[family])
    return vp_grid(schedule, steps) if isinstance(schedule, VPSchedule) else flow_grid(schedule, steps)


def _export(student: nn.Module, folder: Path, family: str, **given: Any) -> Path:
    return export(
        student, folder, family=family, grid=_grid(family), config=CONFIG, scheduler_config=SCHEDULERS[family], **given
    )  # fmt: skip


@pytest.mark.parametrize("family", [*LORA, *MERGED])
def test_round_trip_through_the_stock_pipeline(family: str, tmp_path: Path) -> None:
    student = with_adapter(transformer(family))
    want = run(student, family)
    assert not torch.allclose(want, run(transformer(family), family), atol=1e-3)
    folder = _export(student, tmp_path / "export", family)
    assert read_record(folder)["weights"] == ("lora" if family in LORA else "merged")
    torch.testing.assert_close(run(stock(family, folder).transformer, family), want, rtol=1e-5, atol=1e-6)


SPARSE = [family if family == "wan" else pytest.param(family, marks=pytest.mark.slow) for family in CONFIGS]


@pytest.mark.parametrize("family", SPARSE)
def test_the_export_runs_sparse(family: str, tmp_path: Path) -> None:
    student = with_adapter(transformer(family))
    want = run(student, family)
    folder = _export(student, tmp_path / "export", family)
    loaded, options = stock(family, folder).transformer, read_record(folder)["options"]
    loaded.compile(backend="blade", options=options)
    with observe.record() as events:
        sparse = run(loaded, family)
    assert any(event.op == "block_sparse_attention" for event in events)
    student.compile(backend="blade", options=options)
    torch.testing.assert_close(sparse, run(student, family), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sparse, want, atol=1e-5)


def _arguments(family: str) -> dict[str, Any]:
    """One call of the pipeline with embeddings instead of a prompt; latents out."""
    draw = torch.Generator().manual_seed(5)
    text = torch.randn(1, 8, 16, generator=draw)
    pooled = torch.randn(1, 24, generator=draw)
    given: dict[str, Any] = {
        "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", "return_dict": False,
        "generator": torch.Generator().manual_seed(6), "prompt_embeds": text, "height": 128, "width": 128,
    }  # fmt: skip
    if family == "wan":
        return {**given, "num_frames": 9, "max_sequence_length": 8}
    if family == "cogvideox":
        return {**given, "num_frames": 9, "height": 64, "width": 64, "max_sequence_length": 8}
    return {**given, "pooled_prompt_embeds": pooled}


def _recorded(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Filled with sample, time and output of every call of a transformer."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> None:
        calls.append((given["hidden_states"].clone(), given["timestep"].clone(), out[0].clone()))

    model.register_forward_hook(note, with_kwargs=True)
    return calls


@pytest.mark.parametrize("family", LORA)
def test_the_pipeline_takes_the_steps_of_the_training(family: str, tmp_path: Path) -> None:
    folder = _export(with_adapter(transformer(family)), tmp_path / "export", family)
    pipe, grid = stock(family, folder), _grid(family)
    calls = _recorded(pipe.transformer)
    latents = pipe(**_arguments(family))[0]

    scale = 1000 if family == "flux" else 1  # Flux is called with sigma
    assert [float(t[0]) * scale for _, t, _ in calls] == pytest.approx(list(grid.times), rel=2e-5)
    alphas, sigmas = grid.levels()
    x = calls[0][0]
    for i, (seen, _, out) in enumerate(calls):
        torch.testing.assert_close(seen, x, rtol=1e-3, atol=1e-3)
        prediction = schedule_of(SCHEDULERS[family]).prediction
        x = step_to(*to_x0_eps(x, out, alphas[i], sigmas[i], prediction), alphas[i + 1], sigmas[i + 1])
    torch.testing.assert_close(latents, x, rtol=1e-3, atol=1e-3)


def test_the_cards_code_loads_the_student(tmp_path: Path) -> None:
    base = tmp_path / "base"
    pipeline("dit", transformer("dit")).save_pretrained(base)
    student = with_adapter(transformer("dit"))
    folder = _export(student, tmp_path / "export", "dit")
    card = (folder / "README.md").read_text()
    code = loading_code(read_record(folder), PIPELINES["dit"])
    assert code in card and 'backend="blade"' in card and "num_inference_steps=4" in card
    code = code.replace("PATH/TO/export", str(folder)).replace("some/base", str(base))
    found: dict[str, Any] = {}
    exec(code, found)
    torch.testing.assert_close(run(found["pipe"].transformer, "dit"), run(student, "dit"), rtol=1e-5, atol=1e-6)
    assert found["pipe"].scheduler.config.timestep_spacing == "trailing"

    pipe = diffusers.DiTPipeline.from_pretrained(folder, vae=found["pipe"].vae)  # by model_index.json
    torch.testing.assert_close(run(pipe.transformer, "dit"), run(student, "dit"), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="vae"):
        diffusers.DiTPipeline.from_pretrained(folder)


def test_what_blade_json_says(tmp_path: Path) -> None:
    grids = {2: _grid("wan", 2), 4: _grid("wan", 4)}
    folder = _export(
        with_adapter(transformer("wan")), tmp_path / "export", "wan", token_grid=(3, 8, 8), other_grids=grids
    )  # fmt: skip
    record = json.loads((folder / "blade.json").read_text())
    assert record["steps"] == 4 and record["cfg_scale"] == 1.0 and record["teacher_cfg_scale"] == 5.0
    assert record["shift"] == 3.0 and record["sigmas"] == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert record["step_choices"]["2"]["sigmas"] == pytest.approx([1, 0.75, 0])
    assert record["options"]["sparsity"] == 0.5 and record["options"]["grid"] == [3, 8, 8]
    assert record["base_model"] == "some/base" and record["versions"]["torch"]
    assert (folder / "scheduler" / "scheduler_config.json").is_file()
    assert not (folder / "model_index.json").exists()
    text = " ".join(path.read_text() for path in folder.rglob("*.json"))
    assert str(tmp_path) not in text


def test_what_the_sampling_needs_of_the_training_is_written() -> None:
    config = {
        **CONFIG,
        "model": {"path": "some/sigma", "revision": "v2", "weights": "teacher.safetensors", "dtype": "float32"},
        "data": {"negative_prompt": "ugly", "max_sequence_length": 200},
        "method": {**CONFIG["method"], "eta": 0.0},
    }
    family = pipeline_family("pixart", "PixArtSigmaPipeline")
    schedule = schedule_of(SCHEDULERS["pixart"])
    given: dict[str, Any] = {"weights": "merged", "scheduler": "LCMScheduler", "pipeline": family.pipeline}
    record = record_of("pixart", _grid("pixart"), schedule, config, **given)
    assert record["base_weights"] == "teacher.safetensors" and record["negative_prompt"] == "ugly"
    assert record["max_sequence_length"] == 200 and record["pipeline"] == "PixArtSigmaPipeline"
    card = model_card(record, family)
    assert "PixArtSigmaPipeline.from_pretrained(base, revision='v2', transformer" in card
    assert "max_sequence_length=200" in card and "fresh at every step (eta 0)" in card
    plain = record_of("pixart", _grid("pixart"), schedule, CONFIG, weights="merged", scheduler="DDIMScheduler")
    assert plain["negative_prompt"] == "" and plain["max_sequence_length"] is plain["base_weights"] is None
    assert "revision" not in model_card(plain, PIPELINES["pixart"]) and "mixed in" in model_card(plain, None)


def test_full_weights_and_an_average(tmp_path: Path) -> None:
    model = transformer("wan")
    average = {name: torch.full_like(p, 0.01) for name, p in model.named_parameters() if name.endswith("to_q.weight")}
    folder = _export(torch.compile(model), tmp_path / "export", "wan", replaced=average)  # type: ignore[arg-type]
    assert read_record(folder)["weights"] == "full"
    again = diffusers.AutoModel.from_pretrained(str(folder), subfolder="transformer")
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(state[name], average.get(name, tensor), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="no such tensor"):
        gather(model, {"nothing.weight": torch.zeros(1)})


def test_large_models_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blade_compile.distill.export._SHARD", "200KB")
    model = transformer("dit")
    folder = _export(model, tmp_path / "export", "dit")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    again = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    torch.testing.assert_close(run(again, "dit"), run(model, "dit"), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_w_plus_scaled_b_a(dtype: torch.dtype) -> None:
    model = with_adapter(transformer("pixart").to(dtype), rank_pattern={"to_v": 2}, use_rslora=True)
    tensors = gather(model)
    out = merged(model, tensors, "default")
    assert out.keys() == transformer("pixart").state_dict().keys()
    layer = "transformer_blocks.0.attn1.to_q"
    a, b = (tensors[f"{layer}.lora_{part}.default.weight"].double() for part in "AB")
    want = tensors[f"{layer}.base_layer.weight"].double() + 6 / 4**0.5 * b @ a
    torch.testing.assert_close(out[f"{layer}.weight"], want.to(dtype), rtol=1e-6, atol=1e-7)
    assert torch.equal(model.state_dict()[f"{layer}.base_layer.weight"], tensors[f"{layer}.base_layer.weight"])


def test_one_of_two_adapters(tmp_path: Path) -> None:
    model = with_adapter(with_adapter(transformer("wan"), seed=1, name="student"), seed=2, name="critic")
    with pytest.raises(ConfigError, match="adapters critic, student; say which"):
        _export(model, tmp_path / "export", "wan")
    with pytest.raises(ConfigError, match="'ema' is not in the model"):
        adapter_of(model, "ema")
    want = run(with_adapter(transformer("wan"), seed=1), "wan")
    for merge in (False, True):
        folder = _export(model, tmp_path / f"merge-{merge}", "wan", adapter="student", merge=merge)
        torch.testing.assert_close(run(stock("wan", folder).transformer, "wan"), want, rtol=1e-5, atol=1e-6)


def test_peft_model_and_checkpoint_wrappers(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model: Any = transformer("wan")
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    settings = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"])
    student = get_peft_model(model, settings)
    want = run(student, "wan")
    folder = _export(student, tmp_path / "export", "wan")
    torch.testing.assert_close(run(stock("wan", folder).transformer, "wan"), want, rtol=1e-5, atol=1e-6)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, grid = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), flow_grid(FlowSchedule(horizon=1.0), 2)
    config = {**CONFIG, "model": {"factory": "mine:build"}}
    folder = export(model, tmp_path / "export", family=None, grid=grid, config=config, schedule=FlowSchedule(horizon=1))
    again = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert again.keys() == model.state_dict().keys() and torch.equal(again["1.weight"], model[1].weight)
    record = read_record(folder)
    assert record["factory"] == "mine:build" and record["timesteps"] == [1.0, 0.5]


def test_nothing_is_overwritten_or_left_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="never overwritten"):
        _export(transformer("dit"), folder, "dit")
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()

    def full(*args: object, **given: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("blade_compile.distill.export.save_file", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            _export(transformer("dit"), folder, "dit")
    assert list(tmp_path.iterdir()) == [folder] and not any(folder.iterdir())
    _export(transformer("dit"), folder, "dit")  # an empty folder is taken
    assert (folder / "blade.json").is_file()
    with pytest.raises(ConfigError, match="is no folder"):
        _export(transformer("dit"), folder / "README.md", "dit")


def test_refusals_name_what_is_missing(tmp_path: Path) -> None:
    model = transformer("wan")
    with pytest.raises(ConfigError, match="family is 'wann'"):
        export(model, tmp_path / "a", family="wann", grid=_grid("wan"), config=CONFIG, scheduler_config=FLOW)
    with pytest.raises(ConfigError, match="neither a schedule nor"):
        export(model, tmp_path / "a", family="wan", grid=_grid("wan"), config=CONFIG)
    with pytest.raises(ConfigError, match="no plain LoRA"):
        _export(with_adapter(transformer("pixart"), use_dora=True), tmp_path / "a", "pixart")
    with pytest.raises(ConfigError, match="no export of blade-distill"):
        read_record(tmp_path)
    (tmp_path / "blade.json").write_text('{"format": 99}')
    with pytest.raises(ConfigError, match="format 99"):
        read_record(tmp_path)
    assert sorted(CONFIGS) == sorted([*LORA, *MERGED]) and pipeline_sigmas("wan", 4) is None
