"""Wan 2.1 and Wan 2.2 TI2V-5B (text to video): video tokens alone in the self-attention, text by cross-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blade_compile.distill.adapters import Adapter, Conditions
from blade_compile.distill.config_sections import LatentConfig


class WanAdapter(Adapter):
    """Latents ``[B, C, T, H, W]``."""

    family = "wan"
    block_lists = ("blocks",)
    time_layers = ("time_embedder.linear_2",)
    compression = (4, 8)

    def latent_shape(self, latent: LatentConfig, batch: int) -> tuple[int, ...]:
        """``[B, C, T, H, W]``."""
        return (batch, self.channels, *self.latent_sizes(latent))

    def token_grid(self, latent: LatentConfig) -> tuple[int, int, int]:
        """Patches of 1 x 2 x 2."""
        return self._patched(self.latent_sizes(latent))

    def vae_compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        """Older folders leave them out, as ``AutoencoderKLWan`` does by default."""
        return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)

    def conditions(self, embeddings: Mapping[str, Tensor], latent: LatentConfig) -> Conditions:
        """The text."""
        return {"encoder_hidden_states": embeddings["prompt_embeds"]}

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """At the default length."""
        return {"prompt_embeds": (512, self.transformer.get("text_dim", 4096))}

    def encode(self, pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """512 tokens as the pipeline calls it, zero past the text's end."""
        embeds, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_length or 512
        )
        return {"prompt_embeds": embeds}

    def model_time(self, x: Tensor, time: Tensor) -> Tensor:
        """One time per sample; Wan 2.2 TI2V-5B takes one per token."""
        time = time.to(torch.float32)
        if not self.pipeline.get("expand_timesteps"):
            return time
        tokens = math.prod(self._patched(x.shape[2:]))
        return time[:, None].expand(-1, tokens)


ADAPTER = WanAdapter
