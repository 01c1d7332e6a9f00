"""DiT (class-conditional ImageNet): a class instead of text, predicted variances that are left out.

Prompts are ImageNet's class names as the pipeline knows them, or class numbers; the empty prompt is no class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blade_compile.distill.adapters import Adapter, Conditions
from blade_compile.distill.config_sections import LatentConfig
from blade_compile.distill.errors import DataError


class DiTAdapter(Adapter):
    """Latents ``[B, C, H, W]``."""

    family = "dit"
    block_lists = ("transformer_blocks",)
    held_by_root = ("transformer_blocks.0",)  # whose time embedding the output layer takes, after the blocks

    def latent_shape(self, latent: LatentConfig, batch: int) -> tuple[int, ...]:
        """``[B, C, H, W]``."""
        self._still(latent)
        return (batch, self.channels, *self.latent_sizes(latent)[1:])

    def token_grid(self, latent: LatentConfig) -> tuple[int, int, int]:
        """1 x H/2 x W/2."""
        self._still(latent)
        return self._patched(self.latent_sizes(latent))

    def conditions(self, embeddings: Mapping[str, Tensor], latent: LatentConfig) -> Conditions:
        """The class."""
        return {"class_labels": embeddings["class_labels"]}

    def example_embeddings(self, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Class 0."""
        return {"class_labels": torch.zeros(batch, dtype=torch.int64)}

    def encode(self, pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Class numbers, int64; the number past the last class is no class."""
        return {"class_labels": torch.tensor([self._class(pipeline, prompt.strip()) for prompt in prompts])}

    def _class(self, pipeline: Any, prompt: str) -> int:
        classes = int(self.transformer.get("num_embeds_ada_norm", 1000))
        names: Mapping[str, int] = getattr(pipeline, "labels", {})
        if not prompt:
            return classes
        if prompt in names:
            return int(names[prompt])
        if prompt.isdecimal() and int(prompt) < classes:
            return int(prompt)
        raise DataError(f"prompt {prompt!r} is no class of this model; valid are its class names or 0 to {classes - 1}")

    def call(
        self, model: nn.Module, x: Tensor, time: Tensor, condition: Mapping[str, Any], guidance: float | None = None
    ) -> Tensor:
        """The first half of the channels; the second are variances that no sampler here uses."""
        both = super().call(model, x, time, condition, guidance)
        return both.chunk(2, dim=1)[0] if both.shape[1] == 2 * x.shape[1] else both


ADAPTER = DiTAdapter
