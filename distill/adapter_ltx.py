"""LTX-Video (text to video): packed latents, text by cross-attention, sizes as arguments of the call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from blade_compile.distill.adapters import Adapter, Conditions, even_sigmas
from blade_compile.distill.config_sections import LatentConfig

FRAME_RATE = 25
"""Frames per second: the pipeline's default, which the positions depend on"""


class LTXAdapter(Adapter):
    """Latents ``[B, S, C]``, the tokens in raster order."""

    family = "ltx"
    block_lists = ("transformer_blocks",)
    compression = (8, 32)

    @property
    def patch(self) -> tuple[int, int, int]:
        """1 x 1 x 1: the VAE has done it."""
        size = self.transformer.get("patch_size", 1)
        return self.transformer.get("patch_size_t", 1), size, size

    def latent_shape(self, latent: LatentConfig, batch: int) -> tuple[int, ...]:
        """``[B, S, C]``."""
        return batch, math.prod(self.token_grid(latent)), self.channels * math.prod(self.patch)

    def token_grid(self, latent: LatentConfig) -> tuple[int, int, int]:
        """One token per latent."""
        return self._patched(self.latent_sizes(latent))

    def vae_compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        """As the VAE's configuration says, or from its patches and its halvings."""
        halvings = 2 ** sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
        return (
            vae.get("temporal_compression_ratio") or vae.get("patch_size_t", 1) * halvings,
            vae.get("spatial_compression_ratio") or vae.get("patch_size", 4) * halvings,
        )

    def conditions(self, embeddings: Mapping[str, Tensor], latent: LatentConfig) -> Conditions:
        """The text with its mask, the sizes, and how positions are scaled to seconds and pixels."""
        frames, height, width = self.latent_sizes(latent)
        return {
            "encoder_hidden_states": embeddings["prompt_embeds"],
            "encoder_attention_mask": embeddings["prompt_attention_mask"],
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (
                self.frames_per_latent / FRAME_RATE,
                self.pixels_per_latent,
                self.pixels_per_latent,
            ),
        }

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """At the default length."""
        width = self.transformer.get("caption_channels", 4096)
        return {"prompt_embeds": (128, width), "prompt_attention_mask": (128,)}

    def encode(self, pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """128 tokens and their mask."""
        embeds, mask, _, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_length or 128
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def sampler_sigmas(self, steps: int) -> list[float]:
        """1 .. 1/K."""
        return even_sigmas(steps)


ADAPTER = LTXAdapter
