"""Models that diffusers doesn't have: built by the factory that an export names, sampled by its adapter."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blade_compile.distill.adapters import Adapter, build_by_factory
from blade_compile.distill.config_sections import OWN_FACTORIES, LatentConfig, MethodConfig, ModelConfig
from blade_compile.distill.decoder import pixels
from blade_compile.distill.errors import ConfigError
from blade_compile.distill.generate import LoadedModel, Sample
from blade_compile.distill.grids import Grid
from blade_compile.distill.matching import Draws, Matching
from blade_compile.distill.objective import guide
from blade_compile.distill.pipelines import PipelineFamily
from blade_compile.distill.preflight import load_weights
from blade_compile.distill.preview import to_device
from blade_compile.generations import generation


@dataclass(kw_only=True)
class FactoryModel(LoadedModel):
    """A student or a teacher, compiled or not, in the place of a pipeline; its latents are pixels."""

    adapter: Adapter
    latent: LatentConfig
    grid: Grid
    device: torch.device
    eta: float = 1.0

    def student(self, x: Tensor, time: Tensor, condition: Mapping[str, Any], *, steps: int) -> Tensor:
        """As ``matching.Models`` asks for it."""
        prediction = self.adapter.call(self.pipe, x, time, condition, self.embedded_guidance)
        if self.cfg_scale == 1:
            return prediction
        without = self.adapter.call(self.pipe, x, time, self._condition(self.negative_prompt), self.embedded_guidance)
        return guide(prediction, without, self.cfg_scale)

    def _condition(self, prompt: str) -> Any:
        return to_device(self.adapter.conditions(self.adapter.encode(None, [prompt]), self.latent), self.device)

    @torch.no_grad()
    def __call__(self, prompt: str, seed: int, size: Mapping[str, int] | None = None) -> Sample:
        """Draw one sample.

        Args:
            prompt: as the adapter encodes it.
            seed: of the noise.
            size: ignored: such a model has one.
        """
        shape = self.adapter.latent_shape(self.latent, 1)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        condition, schedule = self._condition(prompt), self.adapter.schedule(self.latent)
        method = MethodConfig(steps=self.grid.steps, eta=self.eta)
        matching = Matching(self, schedule, self.grid, method)  # type: ignore[arg-type]
        fresh = Draws(seed, 0, (0,), self.device) if self.eta == 0 else None  # as exported schedulers do
        start = time.perf_counter()
        with generation(self.grid.steps) if self.sparse else nullcontext():
            latents = matching.roll_out(noise, condition, fresh).end
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return Sample(pixels(latents.cpu())[0], latents[0].float().cpu(), seconds)


def load(
    folder: Path,
    record: Mapping[str, Any],
    *,
    grid: Grid,
    sparse: bool,
    compiled: bool,
    device: str,
    options: Mapping[str, Any],
    identity: str,
    trust_code: bool,
    biases: Mapping[str, Tensor],
) -> FactoryModel:
    """Build the model and put the student's weights into it.

    Args:
        folder: of the export.
        record: its ``blade.json``.
        grid: the steps to take.
        sparse: compile with backend="blade" and ``options``.
        compiled: where dense: compile with Inductor.
        device: where it runs.
        options: of backend="blade".
        identity: of the weights and of how they run.
        trust_code: run the factory, which is code; blade's own run anyway.
        biases: of another K than the exported one, to put into the weights.

    Raises:
        ConfigError: the factory is not trusted, or the weights are not its model's, or its latents are no pixels.
    """
    model, adapter = _build(folder, record, trust_code)
    weights: dict[str, Tensor] = {}
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        weights |= load_file(file)
    try:
        model.load_state_dict({**weights, **biases})
    except RuntimeError as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"{folder}: its weights don't fit {record.get('factory')}: {said}") from None
    return FactoryModel(
        pipe=_compiled(model.to(device), sparse, compiled, options),
        steps=grid.steps,
        sparse=sparse,
        identity=identity,
        grid=grid,
        eta=float(record.get("eta", 1.0)),
        **_common(record, adapter, device),
    )


def load_teacher(
    folder: Path,
    record: Mapping[str, Any],
    *,
    steps: int,
    cfg_scale: float,
    negative_prompt: str,
    compiled: bool,
    device: str,
    trust_code: bool,
) -> FactoryModel:
    """The factory's own model, with guidance, on as many steps as asked for.

    Args:
        folder, record, compiled, device, trust_code: as in ``load``.
        steps: trailing, deterministic.
        cfg_scale: guidance x_u + s (x_c - x_u).
        negative_prompt: of x_u.

    Raises:
        ConfigError: as in ``load``, or the model can't take so many steps.
    """
    model, adapter = _build(folder, record, trust_code)
    load_weights(model, record.get("base_weights"))
    return FactoryModel(
        pipe=_compiled(model.to(device), False, compiled, {}),
        steps=steps,
        cfg_scale=cfg_scale,
        negative_prompt=negative_prompt,
        identity=f"teacher {record.get('factory')}, {steps} steps, guidance {cfg_scale}",
        grid=adapter.grid(LatentConfig(**record["latent"]), steps),
        **_common(record, adapter, device),
    )


def _build(folder: Path, record: Mapping[str, Any], trust_code: bool) -> tuple[nn.Module, Adapter]:
    name = str(record.get("factory"))
    if not trust_code and not name.startswith(OWN_FACTORIES):
        raise ConfigError(
            f"{folder} is made by {name}, code of yours or of whom you have it from; --trust-code runs it"
        )
    model, adapter = build_by_factory(ModelConfig(factory=name, trust_code=True))
    shape = adapter.latent_shape(LatentConfig(**record["latent"]), 1)
    if len(shape) not in {4, 5} or shape[1] not in {1, 3}:
        raise ConfigError(f"{name} makes latents of {shape}, which are no pixels; sample it by code of your own")
    return model, adapter


def _common(record: Mapping[str, Any], adapter: Adapter, device: str) -> dict[str, Any]:
    """What student and teacher share."""
    latent = LatentConfig(**record["latent"])
    clips = len(adapter.latent_shape(latent, 1)) == 5
    return {
        "family": PipelineFamily(adapter.family, "", "", fps=8 if clips else 0),
        "embedded_guidance": record.get("embedded_guidance"),
        "size": {"height": latent.height, "width": latent.width, "num_frames": latent.num_frames},
        "adapter": adapter,
        "latent": latent,
        "device": torch.device(device),
    }


def _compiled(model: nn.Module, sparse: bool, compiled: bool, options: Mapping[str, Any]) -> Any:
    if sparse:
        return torch.compile(model, backend="blade", options=dict(options), dynamic=False)
    return torch.compile(model, dynamic=False) if compiled else model
