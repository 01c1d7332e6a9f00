"""Stable Diffusion 3 and 3.5: text after the image in one sequence, pooled text beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from blade_compile.distill.adapters import Adapter, Conditions
from blade_compile.distill.config_sections import LatentConfig


class SD3Adapter(Adapter):
    """Latents ``[B, C, H, W]``."""

    family = "sd3"
    block_lists = ("transformer_blocks",)
    text_tokens = 333  # 77 of CLIP and 256 of T5

    def latent_shape(self, latent: LatentConfig, batch: int) -> tuple[int, ...]:
        """``[B, C, H, W]``."""
        self._still(latent)
        return (batch, self.channels, *self.latent_sizes(latent)[1:])

    def token_grid(self, latent: LatentConfig) -> tuple[int, int, int]:
        """1 x H/2 x W/2; the text follows."""
        self._still(latent)
        return self._patched(self.latent_sizes(latent))

    def conditions(self, embeddings: Mapping[str, Tensor], latent: LatentConfig) -> Conditions:
        """CLIP's and T5's text one after the other, and CLIP's pooled text."""
        return {
            "encoder_hidden_states": embeddings["prompt_embeds"],
            "pooled_projections": embeddings["pooled_prompt_embeds"],
        }

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """At the default length."""
        config = self.transformer
        return {
            "prompt_embeds": (self.text_tokens, config.get("joint_attention_dim", 4096)),
            "pooled_prompt_embeds": (config.get("pooled_projection_dim", 2048),),
        }

    def encode(self, pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """77 tokens of CLIP and 256 of T5."""
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False, max_sequence_length=max_length or 256
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


ADAPTER = SD3Adapter
