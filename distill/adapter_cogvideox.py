"""CogVideoX (text to video): text before the video in one sequence, rotary embeddings given by the caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blade_compile.distill.adapters import Adapter, Conditions
from blade_compile.distill.config_sections import LatentConfig


class CogVideoXAdapter(Adapter):
    """Latents ``[B, T, C, H, W]``."""

    family = "cogvideox"
    block_lists = ("transformer_blocks",)
    time_layers = ("time_embedding.linear_2",)
    text_tokens = 226
    compression = (4, 8)

    @property
    def patch(self) -> tuple[int, int, int]:
        """CogVideoX 1.5 joins two latent frames in a token."""
        size = self.transformer.get("patch_size", 2)
        return self.transformer.get("patch_size_t") or 1, size, size

    def latent_sizes(self, latent: LatentConfig) -> tuple[int, int, int]:
        """With CogVideoX 1.5 the pipeline adds frames up to a whole token."""
        frames, height, width = super().latent_sizes(latent)
        return -(-frames // self.patch[0]) * self.patch[0], height, width

    def latent_shape(self, latent: LatentConfig, batch: int) -> tuple[int, ...]:
        """``[B, T, C, H, W]``."""
        frames, height, width = self.latent_sizes(latent)
        return batch, frames, self.channels, height, width

    def token_grid(self, latent: LatentConfig) -> tuple[int, int, int]:
        """Patches of 1 x 2 x 2, in CogVideoX 1.5 of 2 x 2 x 2."""
        return self._patched(self.latent_sizes(latent))

    def vae_compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        """Frames as the VAE's configuration says."""
        return int(vae.get("temporal_compression_ratio", 4)), super().vae_compression(vae)[1]

    def conditions(self, embeddings: Mapping[str, Tensor], latent: LatentConfig) -> Conditions:
        """The text, and the rotary embeddings of the grid where the model has them."""
        text = embeddings["prompt_embeds"]
        return {
            "encoder_hidden_states": text,
            "image_rotary_emb": self._rotary(self.token_grid(latent), text.device),
        }

    def _rotary(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor] | None:
        """As ``CogVideoXPipeline._prepare_rotary_positional_embeddings``."""
        config = self.transformer
        if not config.get("use_rotary_positional_embeddings"):
            return None
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        base = [config.get(name, size) // self.patch[1] for name, size in (("sample_height", 60), ("sample_width", 90))]
        if config.get("patch_size_t") is None:
            how: dict[str, Any] = {"crops_coords": get_resize_crop_region_for_grid(grid[1:], base[1], base[0])}
        else:
            how = {"crops_coords": None, "grid_type": "slice", "max_size": tuple(base)}
        cos, sin = get_3d_rotary_pos_embed(
            embed_dim=config.get("attention_head_dim", 64),
            grid_size=grid[1:],
            temporal_size=grid[0],
            device=device,
            **how,
        )
        return cos, sin

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """At the default length."""
        config = self.transformer
        return {"prompt_embeds": (config.get("max_text_seq_length", 226), config.get("text_embed_dim", 4096))}

    def encode(self, pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """226 tokens, padding included: the model attends to all of them."""
        length = max_length or self.transformer.get("max_text_seq_length", 226)
        embeds, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=length)
        return {"prompt_embeds": embeds}


ADAPTER = CogVideoXAdapter
