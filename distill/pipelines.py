"""The stock diffusers pipeline of each model family: its classes, and the arguments that make it draw one sample."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blade_compile.distill.errors import ConfigError


@dataclass(frozen=True)
class PipelineFamily:
    """What export and generation need to know of a family beside its adapter."""

    name: str
    pipeline: str
    "class in diffusers"
    transformer: str
    "class in diffusers"
    loads_lora: bool = True
    "False: the pipeline has no ``load_lora_weights``, so adapters are merged into the weights on export"
    fps: int = 0
    "frames per second of a clip; 0: images"
    embedded_guidance: float | None = None
    "the guidance that guidance-distilled models take as an input, where the run names none"
    other_pipelines: tuple[str, ...] = ()
    "classes that are called alike; which one a model has, its ``model_index.json`` says"

    @property
    def video(self) -> bool:
        """True where the pipeline makes clips."""
        return self.fps > 0


PIPELINES: dict[str, PipelineFamily] = {
    family.name: family
    for family in (
        PipelineFamily("wan", "WanPipeline", "WanTransformer3DModel", fps=16),
        PipelineFamily("cogvideox", "CogVideoXPipeline", "CogVideoXTransformer3DModel", fps=8),
        PipelineFamily(
            "hunyuan_video", "HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", fps=24, embedded_guidance=6.0
        ),
        PipelineFamily("ltx", "LTXPipeline", "LTXVideoTransformer3DModel", fps=24),
        PipelineFamily("sd3", "StableDiffusion3Pipeline", "SD3Transformer2DModel"),
        PipelineFamily("flux", "FluxPipeline", "FluxTransformer2DModel", embedded_guidance=3.5),
        PipelineFamily(
            "pixart",
            "PixArtAlphaPipeline",
            "PixArtTransformer2DModel",
            loads_lora=False,
            other_pipelines=("PixArtSigmaPipeline",),
        ),
        PipelineFamily("dit", "DiTPipeline", "DiTTransformer2DModel", loads_lora=False),
    )
}


def pipeline_family(name: str, pipeline: str | None = None) -> PipelineFamily:
    """The entry of a family.

    Args:
        name: of the family.
        pipeline: the class that the model's ``model_index.json`` names; taken where the family has several.

    Raises:
        ConfigError: for a name that is none.
    """
    if name not in PIPELINES:
        raise ConfigError(f"family is {name!r}: use one of {', '.join(PIPELINES)}")
    family = PIPELINES[name]
    return replace(family, pipeline=pipeline) if pipeline in family.other_pipelines else family


def classes(family: PipelineFamily) -> tuple[Any, Any]:
    """The pipeline's and the transformer's class."""
    import diffusers

    return getattr(diffusers, family.pipeline), getattr(diffusers, family.transformer)


def _class_label(pipe: Any, prompt: str) -> int:
    """A class by number or by name, for models that know no text."""
    if prompt.strip().lstrip("-").isdigit():
        return int(prompt)
    labels: Mapping[str, int] = getattr(pipe, "labels", None) or {}
    if prompt in labels:
        return int(labels[prompt])
    known = f"one of {len(labels)} names, such as {next(iter(labels))!r}, or " if labels else ""
    raise ConfigError(f"class is {prompt!r}: this model takes {known}a number")


def call_arguments(
    family: PipelineFamily,
    pipe: Any,
    prompt: str,
    *,
    steps: int,
    cfg_scale: float,
    seed: int,
    size: Mapping[str, int],
    embedded_guidance: float | None = None,
    negative_prompt: str = "",
    max_sequence_length: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments of one call of the pipeline for one sample.

    Args:
        family: from ``pipeline_family``.
        pipe: the pipeline.
        prompt: text; for DiT the class, as a number or a name.
        steps: of the scheduler.
        cfg_scale: guidance x_u + s (x_c - x_u); 1 calls the model once per step.
        seed: of the noise, drawn on the CPU so that it is the same on every device.
        size: ``height``, ``width`` and, for clips, ``num_frames``.
        embedded_guidance: input of guidance-distilled models.
        negative_prompt: used where ``cfg_scale`` is above 1.
        max_sequence_length: tokens of text; None: the pipeline's own.
    """
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": cfg_scale,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": "np",
    }
    if family.name == "dit":
        return arguments | {"class_labels": [_class_label(pipe, prompt)]}
    arguments |= {"prompt": prompt, "height": size["height"], "width": size["width"]}
    if family.video:
        arguments["num_frames"] = size["num_frames"]
    if family.embedded_guidance is not None:  # guidance_scale is their name for the embedded one
        wanted = family.embedded_guidance if embedded_guidance is None else embedded_guidance
        arguments |= {"guidance_scale": wanted, "true_cfg_scale": cfg_scale}
    if max_sequence_length is not None:
        arguments["max_sequence_length"] = max_sequence_length
    if cfg_scale > 1:  # an empty one too: without any, Flux and HunyuanVideo leave the guidance out
        arguments["negative_prompt"] = negative_prompt
    if family.name == "pixart":
        arguments["use_resolution_binning"] = False  # it would change the token grid behind the student's back
    return arguments


def load_scheduler(folder: str | Path) -> Any:
    """The scheduler that a ``scheduler_config.json`` describes, of the class that it names."""
    import diffusers

    path = Path(folder) / "scheduler_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {path}: {error}; export the student again") from error
    name = str(config.get("_class_name"))
    if not hasattr(diffusers, name):
        raise ConfigError(f"{path} names {name!r}, which this diffusers doesn't have; install a newer one")
    return getattr(diffusers, name).from_config(config)
