"""Flux.1: packed latents, text before the image in one sequence, times from 0 to 1, guidance as an input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blade_compile.distill.adapters import Adapter, Conditions, even_sigmas
from blade_compile.distill.config_sections import LatentConfig


class FluxAdapter(Adapter):
    """Latents ``[B, S, 4 C]``: 2 x 2 latents of the VAE in a token."""

    family = "flux"
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    text_tokens = 512

    @property
    def patch(self) -> tuple[int, int, int]:
        """The pipeline packs; the transformer's own patch is 1."""
        return 1, 2, 2

    def latent_shape(self, latent: LatentConfig, batch: int) -> tuple[int, ...]:
        """``[B, S, 4 C]``."""
        return batch, math.prod(self.token_grid(latent)), self.channels

    def token_grid(self, latent: LatentConfig) -> tuple[int, int, int]:
        """1 x H/2 x W/2; the text comes first."""
        self._still(latent)
        return self._patched(self.latent_sizes(latent))

    def conditions(self, embeddings: Mapping[str, Tensor], latent: LatentConfig) -> Conditions:
        """T5's text, CLIP's pooled text, and the positions of both: zero for text, (0, row, column) for the image."""
        text = embeddings["prompt_embeds"]
        _, height, width = self.token_grid(latent)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        image = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).flatten(0, 1)
        return {
            "encoder_hidden_states": text,
            "pooled_projections": embeddings["pooled_prompt_embeds"],
            "txt_ids": torch.zeros(text.shape[1], 3, dtype=text.dtype, device=text.device),
            "img_ids": image.to(text),
        }

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """At the default length."""
        config = self.transformer
        return {
            "prompt_embeds": (self.text_tokens, config.get("joint_attention_dim", 4096)),
            "pooled_prompt_embeds": (config.get("pooled_projection_dim", 768),),
        }

    def encode(self, pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """512 tokens of T5 and CLIP's pooled text."""
        embeds, pooled, _ = pipeline.encode_prompt(list(prompts), max_sequence_length=max_length or 512)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def model_time(self, x: Tensor, time: Tensor) -> Tensor:
        """A thousandth: the transformer multiplies it again."""
        return time.to(torch.float32) / 1000

    def guidance_inputs(self, x: Tensor, guidance: float | None) -> Conditions:
        """The scale itself; the pipeline's own 3.5 where none is given."""
        if not self.embedded_guidance:
            return {}
        scale = 3.5 if guidance is None else guidance
        return {"guidance": torch.full((len(x),), scale, dtype=torch.float32, device=x.device)}

    def sampler_sigmas(self, steps: int) -> list[float]:
        """1 .. 1/K."""
        return even_sigmas(steps)


ADAPTER = FluxAdapter
