"""A student whose model diffusers doesn't have: built by the factory that its export names, sampled by its adapter."""

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
from blade_compile.distill.matching import Matching
from blade_compile.distill.pipelines import PipelineFamily
from blade_compile.distill.preview import to_device
from blade_compile.generations import generation


@dataclass(kw_only=True)
class FactoryStudent(LoadedModel):
    """A model, compiled or not, in the place of a pipeline; its latents are pixels."""

    adapter: Adapter
    latent: LatentConfig
    grid: Grid
    device: torch.device

    def student(self, x: Tensor, time: Tensor, condition: Mapping[str, Any], *, steps: int) -> Tensor:
        """As ``matching.Models`` asks for it."""
        return self.adapter.call(self.pipe, x, time, condition, self.embedded_guidance)

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
        condition = to_device(self.adapter.conditions(self.adapter.encode(None, [prompt]), self.latent), self.device)
        schedule = self.adapter.schedule(self.latent)
        matching = Matching(self, schedule, self.grid, MethodConfig(steps=self.grid.steps))  # type: ignore[arg-type]
        start = time.perf_counter()
        with generation(self.grid.steps) if self.sparse else nullcontext():
            latents = matching.roll_out(noise, condition).end
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
) -> FactoryStudent:
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
    name = str(record.get("factory"))
    if not trust_code and not name.startswith(OWN_FACTORIES):
        raise ConfigError(
            f"{folder} is made by {name}, code of yours or of whom you have it from; --trust-code runs it"
        )
    model, adapter = build_by_factory(ModelConfig(factory=name, trust_code=True))
    latent = LatentConfig(**record["latent"])
    shape = adapter.latent_shape(latent, 1)
    if len(shape) not in {4, 5} or shape[1] not in {1, 3}:
        raise ConfigError(f"{name} makes latents of {shape}, which are no pixels; sample it by code of your own")
    weights: dict[str, Tensor] = {}
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        weights |= load_file(file)
    try:
        model.load_state_dict({**weights, **biases})
    except RuntimeError as error:
        raise ConfigError(f"{folder}: its weights don't fit {name}: {' '.join(str(error).split())[:300]}") from None
    family = PipelineFamily(adapter.family, "", "", fps=8 if len(shape) == 5 else 0)
    ready = _compiled(model.to(device), sparse, compiled, options)
    return FactoryStudent(
        pipe=ready,
        family=family,
        steps=grid.steps,
        embedded_guidance=record.get("embedded_guidance"),
        sparse=sparse,
        identity=identity,
        adapter=adapter,
        latent=latent,
        grid=grid,
        device=torch.device(device),
    )


def _compiled(model: nn.Module, sparse: bool, compiled: bool, options: Mapping[str, Any]) -> Any:
    if sparse:
        return torch.compile(model, backend="blade", options=dict(options), dynamic=False)
    return torch.compile(model, dynamic=False) if compiled else model
