"""Each adapter against its family's own diffusers pipeline: what reaches the transformer, what comes out, which times.

The pipeline runs for two steps with a tiny transformer; its calls are recorded, and the adapter's have to be the same.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from blade_compile.distill import config as run_config
from blade_compile.distill import dry_run
from blade_compile.distill.adapters import Adapter, adapter_of, family_of, load_adapter, load_model
from blade_compile.distill.config_sections import LatentConfig, ModelConfig
from blade_compile.distill.digits_model import DigitsConfig, DigitsTransformer
from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.model_files import ModelFiles
from blade_compile.distill.schedules import FlowSchedule, VPSchedule

DIM = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = (4, 6, 6)


@dataclass
class Family:
    """A tiny transformer of a family, the pipeline that calls it, and one clip."""

    transformer: str
    config: dict[str, Any]
    scheduler: Any
    pipeline: Callable[[nn.Module, Any], Any]
    embeddings: dict[str, Tensor]
    latent: LatentConfig
    shape: tuple[int, ...]
    grid: tuple[int, int, int]
    prediction: str
    vae: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    "arguments of the pipeline beside prompt_embeds and sizes"
    index: dict[str, Any] = field(default_factory=dict)
    guidance: float | None = None


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def mask(batch: int, length: int, kept: int) -> Tensor:
    return (torch.arange(length) < kept).expand(batch, length).to(torch.float32)


def parts(kind: type, **given: Any) -> Any:
    """A pipeline with everything it isn't given left out."""
    names = set(inspect.signature(kind.__init__).parameters) - {"self"}
    return kind(**{n: given.get(n) for n in names if n in given or n not in _DEFAULTED})


_DEFAULTED = {"boundary_ratio", "expand_timesteps", "id2label", "force_zeros_for_empty_prompt"}
VIDEO = LatentConfig(num_frames=9, height=64, width=96)
IMAGE = LatentConfig(num_frames=1, height=64, width=96)


def wan(expand: bool = False) -> Family:
    config = {
        **DIM, "in_channels": 4, "out_channels": 4, "text_dim": 20, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1,
        "rope_max_seq_len": 32,
    }  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return Family(
        "WanTransformer3DModel", config, scheduler,
        lambda t, s: parts(diffusers.WanPipeline, transformer=t, scheduler=s, expand_timesteps=expand),
        {"prompt_embeds": draw(1, 12, 20)}, VIDEO, (1, 4, 3, 8, 12), (3, 4, 6), "flow",
        index={"expand_timesteps": expand},
    )  # fmt: skip


def wan_tokens() -> Family:
    return wan(expand=True)


def cogvideox(temporal: int | None = None) -> Family:
    config = {
        **DIM, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16, "text_embed_dim": 20, "num_layers": 1,
        "sample_width": 12, "sample_height": 10, "sample_frames": 9, "max_text_seq_length": 12,
        "use_rotary_positional_embeddings": True, "patch_size_t": temporal, "patch_bias": temporal is None,
    }  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing"
    )
    frames = 3 if temporal is None else 4
    return Family(
        "CogVideoXTransformer3DModel", config, scheduler,
        lambda t, s: parts(diffusers.CogVideoXPipeline, transformer=t, scheduler=s),
        {"prompt_embeds": draw(1, 12, 20)}, VIDEO, (1, frames, 4, 8, 12), (3 if temporal is None else 2, 4, 6), "v",
        call={"max_sequence_length": 12},
    )  # fmt: skip


def cogvideox15() -> Family:
    return cogvideox(temporal=2)


def hunyuan_video() -> Family:
    config = {
        **DIM, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
        "text_embed_dim": 20, "pooled_projection_dim": 10, "rope_axes_dim": ROPE,
    }  # fmt: skip
    embeddings = {
        "prompt_embeds": draw(1, 12, 20), "pooled_prompt_embeds": draw(1, 10), "prompt_attention_mask": mask(1, 12, 7)
    }  # fmt: skip
    return Family(
        "HunyuanVideoTransformer3DModel", config, diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        lambda t, s: parts(diffusers.HunyuanVideoPipeline, transformer=t, scheduler=s),
        embeddings, VIDEO, (1, 4, 3, 8, 12), (3, 4, 6), "flow", guidance=6.0,
    )  # fmt: skip


def ltx() -> Family:
    config = {
        **DIM, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "num_layers": 1, "caption_channels": 20
    }  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096
    )
    return Family(
        "LTXVideoTransformer3DModel", config, scheduler,
        lambda t, s: parts(diffusers.LTXPipeline, transformer=t, scheduler=s),
        {"prompt_embeds": draw(1, 12, 20), "prompt_attention_mask": mask(1, 12, 7)},
        LatentConfig(num_frames=17, height=64, width=96), (1, 18, 8), (3, 2, 3), "flow",
    )  # fmt: skip


def sd3() -> Family:
    config = {
        **DIM, "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 20,
        "caption_projection_dim": 32, "pooled_projection_dim": 10, "pos_embed_max_size": 16,
    }  # fmt: skip
    return Family(
        "SD3Transformer2DModel", config, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        lambda t, s: parts(diffusers.StableDiffusion3Pipeline, transformer=t, scheduler=s),
        {"prompt_embeds": draw(1, 12, 20), "pooled_prompt_embeds": draw(1, 10)},
        IMAGE, (1, 4, 8, 12), (1, 4, 6), "flow",
    )  # fmt: skip


def flux(guidance: bool = True) -> Family:
    config = {
        **DIM, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 20,
        "pooled_projection_dim": 10, "guidance_embeds": guidance, "axes_dims_rope": ROPE,
    }  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Family(
        "FluxTransformer2DModel", config, scheduler,
        lambda t, s: parts(diffusers.FluxPipeline, transformer=t, scheduler=s),
        {"prompt_embeds": draw(1, 12, 20), "pooled_prompt_embeds": draw(1, 10)}, IMAGE, (1, 24, 16), (1, 4, 6), "flow",
        guidance=2.5 if guidance else None,
    )  # fmt: skip


def flux_schnell() -> Family:
    return flux(guidance=False)


def pixart(size: int = 16) -> Family:
    config = {
        "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 1, "in_channels": 4, "out_channels": 8,
        "sample_size": size, "cross_attention_dim": 48, "caption_channels": 20,
    }  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    return Family(
        "PixArtTransformer2DModel", config, scheduler,
        lambda t, s: parts(diffusers.PixArtAlphaPipeline, transformer=t, scheduler=s),
        {"prompt_embeds": draw(1, 12, 20), "prompt_attention_mask": mask(1, 12, 7)},
        IMAGE, (1, 4, 8, 12), (1, 4, 6), "epsilon", call={"use_resolution_binning": False},
    )  # fmt: skip


def pixart_1024() -> Family:
    return pixart(size=128)


def dit() -> Family:
    config = {
        **DIM,
        "num_layers": 1,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 8,
        "num_embeds_ada_norm": 1000,
    }
    return Family(
        "DiTTransformer2DModel", config, diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02),
        lambda t, s: diffusers.DiTPipeline(t, _Vae(), s), {"class_labels": torch.tensor([7])},
        LatentConfig(num_frames=1, height=64, width=64), (1, 4, 8, 8), (1, 4, 4), "epsilon",
    )  # fmt: skip


FAMILIES = [
    wan, wan_tokens, cogvideox, cogvideox15, hunyuan_video, ltx, sd3, flux, flux_schnell, pixart, pixart_1024, dit,
]  # fmt: skip


class _Vae(nn.Module):
    """DiT's pipeline always decodes: what it decodes is what the sampler ended with."""

    config = type("Config", (), {"scaling_factor": 1.0})
    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, latents: Tensor) -> Any:
        return type("Decoded", (), {"sample": latents})


class Recorder(nn.Module):
    """A transformer that keeps what it was called with and what it gave."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.calls: list[dict[str, Any]] = []
        self.cache_context = model.cache_context if hasattr(model, "cache_context") else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self.model.forward).bind(*args, **kwargs).arguments
        out = self.model(*args, **kwargs)
        prediction = out[0] if isinstance(out, tuple) else out.sample
        self.calls.append({**given, "prediction": prediction})
        return out


def kind_of(family: str) -> Any:
    return import_module(f"blade_compile.distill.adapter_{family}").ADAPTER


def build(make: Callable[[], Family]) -> tuple[Family, Any, Adapter]:
    family = make()
    torch.manual_seed(0)
    model = getattr(diffusers, family.transformer)(**family.config).eval().requires_grad_(False)
    for parameter in model.parameters():  # layers that start at zero would hide what they are given
        torch.nn.init.normal_(parameter, std=0.2)
    scheduler = dict(family.scheduler.config) | {"_class_name": type(family.scheduler).__name__}
    name = family_of({"_class_name": family.transformer})
    return family, model, kind_of(name)(dict(model.config), scheduler, family.vae, family.index)


def run_pipeline(family: Family, model: Any, latents: Tensor, steps: int) -> list[dict[str, Any]]:
    """Sample by the family's pipeline; return its calls of the transformer."""
    recorder = Recorder(model)
    pipeline = family.pipeline(model, family.scheduler)
    pipeline.transformer = recorder
    pipeline.set_progress_bar_config(disable=True)
    names = inspect.signature(type(pipeline).__call__).parameters
    if "class_labels" in names:
        original = diffusers.pipelines.dit.pipeline_dit.randn_tensor
        diffusers.pipelines.dit.pipeline_dit.randn_tensor = lambda **_: latents
        try:
            pipeline([7], guidance_scale=1.0, num_inference_steps=steps, output_type="numpy")
        finally:
            diffusers.pipelines.dit.pipeline_dit.randn_tensor = original
        return recorder.calls
    sizes = {n: getattr(family.latent, n) for n in ("num_frames", "height", "width") if n in names}
    scale = 1.0 if family.guidance is None else family.guidance
    pipeline(
        **family.embeddings,
        **sizes,
        **family.call,
        latents=latents,
        guidance_scale=scale,
        num_inference_steps=steps,
        output_type="latent",
    )
    return recorder.calls


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_calls_the_transformer_as_the_pipeline_does(make: Callable[[], Family]) -> None:
    family, model, adapter = build(make)
    assert adapter.latent_shape(family.latent, 1) == family.shape
    assert adapter.token_grid(family.latent) == family.grid
    assert adapter.prediction == family.prediction
    steps = 4
    calls = run_pipeline(family, model, draw(*family.shape), steps)
    grid = adapter.pipeline_grid(family.latent, steps)
    assert len(calls) == grid.steps == steps
    condition = adapter.conditions(family.embeddings, family.latent)
    for i, call in enumerate(calls):
        exact = float(family.scheduler.timesteps[i])  # a shift rounds differently as a number than by exp(mu)
        assert grid.times[i] == pytest.approx(exact, rel=1e-6)
        time = torch.tensor([exact], dtype=torch.float64)
        ours = Recorder(model)
        prediction = adapter.call(ours, call["hidden_states"], time, condition, family.guidance)
        assert prediction.shape == family.shape
        theirs = call["prediction"][tuple(slice(n) for n in family.shape)]
        torch.testing.assert_close(prediction, theirs, rtol=1e-5, atol=1e-5)
        assert_same_arguments(ours.calls[0], call)


def assert_same_arguments(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Every tensor that the pipeline gives is given, with the same values; nothing else is."""
    for name in (ours.keys() | theirs.keys()) - {"prediction", "hidden_states", "return_dict"}:
        a, b = ours.get(name), theirs.get(name)
        if name == "timestep" and a is not None and b is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)
        else:
            _same(name, a, b)


def _same(name: str, a: Any, b: Any) -> None:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6, msg=name)
    elif isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        assert len(a) == len(b), name
        for x, y in zip(a, b):
            _same(name, x, y)
    elif isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            _same(f"{name}.{key}", a.get(key), b.get(key))
    else:
        assert (a or None) == (b or None), name  # {} and None both say nothing


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_takes_any_real_time_and_a_batch(make: Callable[[], Family]) -> None:
    family, model, adapter = build(make)
    shape = adapter.latent_shape(family.latent, 3)
    assert shape == (3, *family.shape[1:])
    embeddings = {name: torch.cat([t] * 3) for name, t in family.embeddings.items()}
    condition = adapter.conditions(embeddings, family.latent)
    x, time = draw(*shape), torch.tensor([11.25, 500.0, 733.7], dtype=torch.float64)
    batched = adapter.call(model, x, time, condition, family.guidance)
    alone = adapter.conditions(family.embeddings, family.latent)
    for i in range(3):
        single = adapter.call(model, x[i : i + 1], time[i : i + 1], alone, family.guidance)
        torch.testing.assert_close(batched[i : i + 1], single, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batched, adapter.call(model, x, time + 5, condition, family.guidance))


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_example_embeddings_fit_and_the_dry_run_counts_the_attention(make: Callable[[], Family]) -> None:
    """Two blocks or fewer, so one or two self-attention calls over the whole grid; cross-attention beside it."""
    family, model, adapter = build(make)
    config = run_config.load(None, ["model.path=x", "data.prompts=p.txt", "parallel.mixed_precision=float32"])
    changed = config.model_copy(update={"latent": family.latent})
    cost, said = dry_run._cost(changed, model.to("meta"), adapter)
    assert cost is not None, said
    sites, _, tokens = dry_run._sites(model, family.grid, cost)
    assert sites in {1, 2} and tokens >= math.prod(family.grid) and cost.saved_bytes > 0
    example = adapter.example_embeddings(2, torch.float32)
    assert example.keys() == family.embeddings.keys()
    assert all(len(tensor) == 2 and tensor.dim() == family.embeddings[name].dim() for name, tensor in example.items())


@pytest.mark.parametrize("make", [hunyuan_video, flux])
def test_guidance_is_an_input_of_guidance_distilled_models(make: Callable[[], Family]) -> None:
    family, model, adapter = build(make)
    assert adapter.embedded_guidance
    condition, x = adapter.conditions(family.embeddings, family.latent), draw(*family.shape)
    time = torch.tensor([500.0])
    low, high, default = (adapter.call(model, x, time, condition, g) for g in (1.0, 9.0, None))
    own = adapter.call(model, x, time, condition, 6.0 if make is hunyuan_video else 3.5)
    assert not torch.allclose(low, high)
    assert torch.equal(default, own)


def test_models_without_that_input_ignore_it() -> None:
    family, model, adapter = build(flux_schnell)
    assert not adapter.embedded_guidance
    condition, x = adapter.conditions(family.embeddings, family.latent), draw(*family.shape)
    first, second = (adapter.call(model, x, torch.tensor([500.0]), condition, g) for g in (None, 9.0))
    assert torch.equal(first, second)


@pytest.mark.parametrize("tokens", [(64, 96), (1024, 1024)])
def test_a_shift_by_tokens_becomes_a_number(tokens: tuple[int, int]) -> None:
    _, _, adapter = build(flux)
    latent = LatentConfig(num_frames=1, height=tokens[0], width=tokens[1])
    count = (tokens[0] // 16) * (tokens[1] // 16)
    mu = 0.5 + (1.15 - 0.5) * (count - 256) / (4096 - 256)  # Flux's base_shift, max_shift over 256 .. 4096 tokens
    schedule = adapter.schedule(latent)
    assert isinstance(schedule, FlowSchedule)
    assert schedule.shift == pytest.approx(math.exp(mu))
    config = adapter.scheduler_config(latent)
    assert not config["use_dynamic_shifting"] and config["shift"] == schedule.shift


def test_schedules_of_the_families() -> None:
    _, _, wan_adapter = build(wan)
    schedule = wan_adapter.schedule(VIDEO)
    assert isinstance(schedule, FlowSchedule) and schedule.shift == 3.0
    _, _, cog = build(cogvideox)
    vp = cog.schedule(VIDEO)
    assert isinstance(vp, VPSchedule) and vp.prediction == "v"
    assert float(vp.levels(torch.tensor(999.0))[0]) == pytest.approx(0, abs=1e-12)  # zero terminal SNR


def test_students_take_trailing_steps() -> None:
    _, _, wan_adapter = build(wan)
    even = [1, 0.75, 0.5, 0.25]
    wanted = [1000 * 3 * u / (1 + 2 * u) for u in even]
    assert wan_adapter.grid(VIDEO, 4).times == pytest.approx(wanted)
    _, _, cog = build(cogvideox)
    assert cog.grid(VIDEO, 8).times == (999, 874, 749, 624, 499, 374, 249, 124)


def test_steps_that_do_not_fit_are_refused() -> None:
    _, _, adapter = build(cogvideox)
    with pytest.raises(ConfigError, match=r"method: steps is 7.*use one of .*8, 10"):
        adapter.grid(VIDEO, 7)


@pytest.mark.parametrize(
    ("make", "latent", "said"),
    [
        (wan, LatentConfig(num_frames=10, height=64, width=96), "latent.num_frames is 10.*9 or 13"),
        (wan, LatentConfig(num_frames=9, height=70, width=96), "latent.height is 70.*multiple of 16: 64 or 80"),
        (ltx, LatentConfig(num_frames=9, height=64, width=90), "latent.width is 90.*64 or 96"),
        (sd3, LatentConfig(num_frames=2, height=64, width=96), "makes images"),
        (flux, LatentConfig(num_frames=1, height=8, width=96), "latent.height is 8.*multiple of 16: 16"),
    ],
)
def test_clips_that_a_model_cannot_make(make: Callable[[], Family], latent: LatentConfig, said: str) -> None:
    _, _, adapter = build(make)
    with pytest.raises(ConfigError, match=said):
        adapter.latent_shape(latent, 1)


VAES: list[tuple[str, Any, tuple[int, int]]] = [
    ("wan", {}, (4, 8)),
    ("wan", {"scale_factor_temporal": 4, "scale_factor_spatial": 16}, (4, 16)),
    ("cogvideox", {"block_out_channels": [1, 1, 1, 1], "temporal_compression_ratio": 4}, (4, 8)),
    ("hunyuan_video", {"temporal_compression_ratio": 4, "spatial_compression_ratio": 8}, (4, 8)),
    ("ltx", {"spatio_temporal_scaling": [True, True, True, False], "patch_size": 4, "patch_size_t": 1}, (8, 32)),
    ("sd3", {"block_out_channels": [1, 1, 1, 1]}, (1, 8)),
    ("sd3", {"block_out_channels": [1, 1]}, (1, 2)),
]


@pytest.mark.parametrize(("family", "vae", "wanted"), VAES, ids=lambda v: v if isinstance(v, str) else "")
def test_vae_compression(family: str, vae: dict[str, Any], wanted: tuple[int, int]) -> None:
    kind = kind_of(family)
    adapter = kind({"in_channels": 4}, {}, {"_class_name": "x", **vae})
    assert (adapter.frames_per_latent, adapter.pixels_per_latent) == wanted


def test_ltx_agrees_with_its_vae_class() -> None:
    tiny = {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLLTXVideo(**tiny)
    kind = kind_of("ltx")
    adapter = kind({"in_channels": 4}, {}, dict(vae.config))
    assert (adapter.frames_per_latent, adapter.pixels_per_latent) == (
        vae.temporal_compression_ratio,
        vae.spatial_compression_ratio,
    )


class TinyPipeline:
    """Records how encode_prompt is called, by the real signature of a pipeline."""

    def __init__(self, kind: Any, out: tuple[Any, ...]) -> None:
        self.signature, self.out = inspect.signature(kind.encode_prompt), out
        self.given: dict[str, Any] = {}

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        self.given = dict(self.signature.bind(self, *args, **kwargs).arguments)
        return self.out


A, B, C = draw(2, 3, 4), draw(2, 4), mask(2, 3, 2)
ENCODERS: list[tuple[str, Any, tuple[Any, ...], dict[str, Tensor], int | None]] = [
    ("wan", diffusers.WanPipeline, (A, None), {"prompt_embeds": A}, 512),
    ("cogvideox", diffusers.CogVideoXPipeline, (A, None), {"prompt_embeds": A}, 226),
    (
        "hunyuan_video", diffusers.HunyuanVideoPipeline, (A, B, C),
        {"prompt_embeds": A, "pooled_prompt_embeds": B, "prompt_attention_mask": C}, 256,
    ),
    ("ltx", diffusers.LTXPipeline, (A, C, None, None), {"prompt_embeds": A, "prompt_attention_mask": C}, 128),
    (
        "sd3", diffusers.StableDiffusion3Pipeline, (A, None, B, None),
        {"prompt_embeds": A, "pooled_prompt_embeds": B}, 256,
    ),
    ("flux", diffusers.FluxPipeline, (A, B, torch.zeros(3, 3)), {"prompt_embeds": A, "pooled_prompt_embeds": B}, 512),
    (
        "pixart", diffusers.PixArtAlphaPipeline, (A, C, None, None),
        {"prompt_embeds": A, "prompt_attention_mask": C}, None,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "out", "wanted", "length"), ENCODERS, ids=[e[0] for e in ENCODERS])
def test_encodes_by_the_pipelines_own_method(
    family: str, kind: Any, out: tuple[Any, ...], wanted: dict[str, Tensor], length: int | None
) -> None:
    adapter = kind_of(family)({"in_channels": 4}, {})
    for asked in (None, 17):
        pipeline = TinyPipeline(kind, out)
        got = adapter.encode(pipeline, ["one", "two"], asked)
        assert got.keys() == wanted.keys() and all(got[name] is wanted[name] for name in wanted)
        assert pipeline.given["prompt"] == ["one", "two"]
        assert pipeline.given.get("max_sequence_length") == (asked or length)
        assert not pipeline.given.get("do_classifier_free_guidance")
        assert pipeline.given.get("clean_caption") == (True if family == "pixart" else None)  # as its call does


def test_dit_reads_names_numbers_and_no_class() -> None:
    adapter = kind_of("dit")({"num_embeds_ada_norm": 1000}, {})
    pipeline = type("Pipeline", (), {"labels": {"tench": 0, "goldfish": 1}})
    assert adapter.encode(pipeline, ["goldfish", "7", ""])["class_labels"].tolist() == [1, 7, 1000]
    with pytest.raises(DataError, match="'1000' is no class"):
        adapter.encode(pipeline, ["1000"])


# Model folders.


def save(folder: Path, make: Callable[[], Family] = sd3) -> Family:
    family, model, _ = build(make)
    model.save_pretrained(folder / "transformer")
    family.scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline"}))
    return family


def test_loads_a_folder(tmp_path: Path) -> None:
    family = save(tmp_path)
    config = ModelConfig(path=str(tmp_path), dtype="float32")
    model, adapter = load_model(config)
    assert adapter.family == "sd3" and type(model).__name__ == family.transformer
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert adapter.latent_shape(family.latent, 2) == (2, *family.shape[1:])
    meta, _ = load_model(config, meta=True)
    assert all(p.is_meta for p in meta.parameters())
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
        (lambda f: (f / "scheduler/scheduler_config.json").write_text("{"), "damaged"),
        (lambda f: (f / "scheduler/scheduler_config.json").write_text("[]"), "holds a list"),
        (
            lambda f: (f / "transformer/config.json").write_text('{"_class_name": "Unknown"}'),
            "no adapter; valid are Wan",
        ),
        (lambda f: (f / "model_index.json").write_text('{"boundary_ratio": 0.9}'), "two transformers"),
    ],
    ids=["no-index", "no-json", "no-object", "unknown-class", "two-models"],
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=said):
        load_adapter(ModelConfig(path=str(tmp_path)))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    save(tmp_path)
    for file in (tmp_path / "transformer").glob("*.safetensors"):
        file.unlink()
    load_adapter(ModelConfig(path=str(tmp_path)))  # configurations are enough for a dry run
    with pytest.raises(ConfigError, match="transformer can't be made"):
        load_model(ModelConfig(path=str(tmp_path)))


def test_an_unknown_scheduler_is_refused(tmp_path: Path) -> None:
    family = save(tmp_path)
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"_class_name": "KarrasVeScheduler"}')
    adapter = adapter_of(ModelFiles(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"scheduler_config\.json"):
        adapter.schedule(family.latent)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nothing", "plain-name"])
def test_a_missing_folder(source: str) -> None:
    with pytest.raises(ConfigError, match=r"no folder"):
        load_adapter(ModelConfig(path=source))


def test_a_hub_id_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(ConfigError, match="hub can't be reached"):
        load_adapter(ModelConfig(path="someone/some-model"))


# Factories.


class Bare(nn.Module):
    """No adapter comes with it."""


def make_bare() -> nn.Module:
    return Bare()


def make_incomplete() -> tuple[nn.Module, object]:
    return Bare(), object()


def make_digits() -> tuple[nn.Module, Adapter]:
    from blade_compile.distill.adapter_digits import DigitsAdapter

    config = DigitsConfig(width=24, depth=1, heads=1)
    return DigitsTransformer(config), DigitsAdapter(config)


def test_a_factory_is_called() -> None:
    latent = LatentConfig(num_frames=8, height=16, width=16)
    model, adapter = load_model(ModelConfig(factory=f"{__name__}:make_digits", trust_code=True))
    assert adapter.family == "digits" and not model.training
    condition = adapter.conditions(adapter.encode(None, ["3", ""]), latent)
    x = draw(*adapter.latent_shape(latent, 2))
    out = adapter.call(model, x, torch.tensor([0.3, 1.0], dtype=torch.float64), condition)
    torch.testing.assert_close(out, model(x, torch.tensor([0.3, 1.0]), torch.tensor([3, 10])))
    assert adapter.grid(latent, 4).times == (1.0, 0.75, 0.5, 0.25)
    meta, _ = load_model(ModelConfig(factory=f"{__name__}:make_digits", trust_code=True), meta=True)
    assert all(p.is_meta for p in meta.parameters())
    with pytest.raises(DataError, match="'eleven' is no digit"):
        adapter.encode(None, ["eleven"])
    with pytest.raises(ConfigError, match="8 x 16 x 16"):
        adapter.latent_shape(LatentConfig(num_frames=8, height=32, width=16), 1)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (f"{__name__}:make_bare", "returned a Bare"),
        (f"{__name__}:make_incomplete", "an adapter without family"),
        (f"{__name__}:nothing", "nothing"),
        ("no_such_module:build", "No module named"),
    ],
)
def test_factories_that_do_not_work(factory: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_model(ModelConfig(factory=factory, trust_code=True))
