"""PixArt-alpha and PixArt-sigma: text by cross-attention, predicted variances that are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from blade_compile.distill.adapters import Adapter, Conditions
from blade_compile.distill.config_sections import LatentConfig


class PixArtAdapter(Adapter):
    """Latents ``[B, C, H, W]``."""

    family = "pixart"
    block_lists = ("transformer_blocks",)

    def latent_shape(self, latent: LatentConfig, batch: int) -> tuple[int, ...]:
        """``[B, C, H, W]``."""
        self._still(latent)
        return (batch, self.channels, *self.latent_sizes(latent)[1:])

    def token_grid(self, latent: LatentConfig) -> tuple[int, int, int]:
        """1 x H/2 x W/2."""
        self._still(latent)
        return self._patched(self.latent_sizes(latent))

    def conditions(self, embeddings: Mapping[str, Tensor], latent: LatentConfig) -> Conditions:
        """The text with its mask; for PixArt-alpha at 1024 also the image's size and aspect ratio."""
        text = embeddings["prompt_embeds"]
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self._takes_size:
            size["resolution"] = text.new_tensor([[latent.height, latent.width]]).expand(len(text), 2)
            size["aspect_ratio"] = text.new_tensor([[latent.height / latent.width]]).expand(len(text), 1)
        return {
            "encoder_hidden_states": text,
            "encoder_attention_mask": embeddings["prompt_attention_mask"],
            "added_cond_kwargs": size,
        }

    @property
    def _takes_size(self) -> bool:
        """As ``PixArtTransformer2DModel`` decides: by its option, else by the size that it was trained at."""
        option = self.transformer.get("use_additional_conditions")
        return self.transformer.get("sample_size", 128) == 128 if option is None else bool(option)

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """At the default length."""
        width = self.transformer.get("caption_channels") or 4096
        return {"prompt_embeds": (120, width), "prompt_attention_mask": (120,)}

    def encode(self, pipeline: Any, prompts: Sequence[str], max_length: int | None = None) -> dict[str, Tensor]:
        """120 tokens (PixArt-sigma: 300) and their mask, of captions cleaned as the pipeline's call cleans them."""
        length = {} if max_length is None else {"max_sequence_length": max_length}
        embeds, mask, _, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, clean_caption=True, **length
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def call(
        self, model: nn.Module, x: Tensor, time: Tensor, condition: Mapping[str, Any], guidance: float | None = None
    ) -> Tensor:
        """The first half of the channels; the second are variances that no sampler here uses."""
        both = super().call(model, x, time, condition, guidance)
        return both.chunk(2, dim=1)[0] if both.shape[1] == 2 * x.shape[1] else both


ADAPTER = PixArtAdapter
