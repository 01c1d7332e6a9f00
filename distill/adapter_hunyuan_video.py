"""HunyuanVideo (text to video): text after the video in one sequence with a key mask, guidance as an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blade_compile.distill.adapters import Adapter, Conditions, even_sigmas
from blade_compile.distill.config_sections import LatentConfig


class HunyuanVideoAdapter(Adapter):
    """Latents ``[B, C, T, H, W]``."""

    family = "hunyuan_video"
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    text_tokens = 256
    compression = (4, 8)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Patches of 1 x 2 x 2."""
        size = self.transformer.get("patch_size", 2)
        return self.transformer.get("patch_size_t", 1), size, size

    @property
    def embedded_guidance(self) -> bool:
        """True unless the configuration says otherwise."""
        return bool(self.transformer.get("guidance_embeds", True))

    def latent_shape(self, latent: LatentConfig, batch: int) -> tuple[int, ...]:
        """``[B, C, T, H, W]``."""
        return (batch, self.channels, *self.latent_sizes(latent))

    def token_grid(self, latent: LatentConfig) -> tuple[int, int, int]:
        """Tokens of the video; the text follows them."""
        return self._patched(self.latent_sizes(latent))

    def vae_compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        """As the VAE's configuration says."""
        return vae.get("temporal_compression_ratio", 4), vae.get("spatial_compression_ratio", 8)

    def conditions(self, embeddings: Mapping[str, Tensor], latent: LatentConfig) -> Conditions:
        """The text with its mask, and CLIP's pooled text."""
        text = embeddings["prompt_embeds"]
        return {
            "encoder_hidden_states": text,
            "encoder_attention_mask": embeddings["prompt_attention_mask"].to(text.dtype),
            "pooled_projections": embeddings["pooled_prompt_embeds"].to(text.dtype),
        }

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """At the default length."""
        config = self.transformer
        return {
            "prompt_embeds": (self.text_tokens, config.get("text_embed_dim", 4096)),
            "pooled_prompt_embeds": (config.get("pooled_projection_dim", 768),),
            "prompt_attention_mask": (self.text_tokens,),
        }

    def encode(self, pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """256 tokens of Llama after the template's own, and CLIP's pooled text."""
        embeds, pooled, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=max_length or 256)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}

    def guidance_inputs(self, x: Tensor, guidance: float | None) -> Conditions:
        """1000 times the scale, in the latents' dtype; the pipeline's own 6 where none is given."""
        if not self.embedded_guidance:
            return {}
        scale = 6.0 if guidance is None else guidance
        return {"guidance": torch.full((len(x),), scale, dtype=x.dtype, device=x.device) * 1000.0}

    def sampler_sigmas(self, steps: int) -> list[float]:
        """1 .. 1/K."""
        return even_sigmas(steps)


ADAPTER = HunyuanVideoAdapter
