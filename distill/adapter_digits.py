"""The digits transformer for the general trainer, and an example of ``model.factory``: a model that diffusers lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blade_compile.distill.adapters import Adapter, Conditions
from blade_compile.distill.config_sections import LatentConfig
from blade_compile.distill.digits_data import NUM_CLASSES
from blade_compile.distill.digits_model import NULL_CLASS, DigitsConfig
from blade_compile.distill.digits_teacher import load_teacher
from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.grids import Grid, flow_grid
from blade_compile.distill.schedules import FlowSchedule, Prediction

TEACHER_FILE = Path(__file__).parent / "digits" / "teacher.safetensors"


class DigitsAdapter(Adapter):
    """Clips ``[B, 1, T, H, W]`` of pixels in [-1, 1]; times from 0 to 1."""

    family = "digits"
    block_lists = ("blocks",)
    lora_targets = ("qkv", "out")
    time_layers = ("time.2",)
    default_prompts = tuple(map(str, range(NUM_CLASSES)))

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__({"in_channels": 1, "patch_size": config.patch}, {})
        self.config = config
        self.frames_per_latent = self.pixels_per_latent = 1

    @property
    def prediction(self) -> Prediction:
        """A velocity."""
        return "flow"

    def latent_shape(self, latent: LatentConfig, batch: int) -> tuple[int, ...]:
        """``[B, 1, T, H, W]``: the size that the model was made for."""
        frames, size = self.config.frames, self.config.size
        if (latent.num_frames, latent.height, latent.width) != (frames, size, size):
            raise ConfigError(
                f"latent is {latent.num_frames} x {latent.height} x {latent.width}; "
                f"this digits model makes {frames} x {size} x {size}"
            )
        return batch, 1, frames, size, size

    def token_grid(self, latent: LatentConfig) -> tuple[int, int, int]:
        """Patches of the clip."""
        self.latent_shape(latent, 1)
        return self.config.grid

    def schedule(self, latent: LatentConfig) -> FlowSchedule:
        """Flow matching without a shift."""
        return FlowSchedule(horizon=1.0)

    def grid(self, latent: LatentConfig, steps: int) -> Grid:
        """1, 1 - 1/K .. 1/K."""
        return flow_grid(self.schedule(latent), steps)

    def conditions(self, embeddings: Mapping[str, Tensor], latent: LatentConfig) -> Conditions:
        """The class."""
        return {"label": embeddings["label"]}

    def example_embeddings(self, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Class 0."""
        return {"label": torch.zeros(batch, dtype=torch.int64)}

    def encode(self, pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Digits 0 to 9; the empty prompt is no class."""
        for prompt in prompts:
            if prompt.strip() not in {"", *map(str, range(NUM_CLASSES))}:
                raise DataError(f"prompt {prompt!r} is no digit; valid are 0 to {NUM_CLASSES - 1}")
        return {"label": torch.tensor([int(prompt) if prompt.strip() else NULL_CLASS for prompt in prompts])}

    def call(
        self, model: nn.Module, x: Tensor, time: Tensor, condition: Mapping[str, Any], guidance: float | None = None
    ) -> Tensor:
        """The velocity."""
        velocity: Tensor = model(x, time.to(torch.float32), condition["label"])
        return velocity


def build() -> tuple[nn.Module, DigitsAdapter]:
    """The teacher of the digits experiment and its adapter."""
    if not TEACHER_FILE.is_file():
        raise ConfigError(f"{TEACHER_FILE} is missing; train it: python -m blade_compile.distill.digits_teacher")
    model = load_teacher(TEACHER_FILE)
    return model, DigitsAdapter(model.config)
