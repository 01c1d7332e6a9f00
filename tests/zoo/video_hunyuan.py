"""HunyuanVideo and its relatives: joint attention with the padded text after the video."""

from __future__ import annotations

import torch

from tests.zoo.entry import Draw, Entry, diffusers_entry, key_lengths

FAMILY = "HunyuanVideo and relatives"
DIM = {"num_attention_heads": 2, "attention_head_dim": 32}


def _hunyuan_config() -> dict:
    return {
        **DIM,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 40,
        "pooled_projection_dim": 24,
        "rope_axes_dim": (8, 12, 12),
    }


def hunyuan_video() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 3, 12, 12),
            "timestep": torch.tensor([37, 600]),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "encoder_attention_mask": key_lengths(12, 12, 7),
            "pooled_projections": draw.normal(2, 24),
            "guidance": torch.tensor([3.5, 3.5]),
        }

    notes = "text after the video, padded"
    return diffusers_entry(
        "HunyuanVideoTransformer3DModel", FAMILY, _hunyuan_config(), inputs, backward=True, notes=notes
    )


def hunyuan_video15() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 3, 6, 6),
            "timestep": torch.tensor([37.0, 600.0]),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "encoder_attention_mask": key_lengths(12, 12, 7),
            "encoder_hidden_states_2": draw.normal(2, 6, 28),
            "encoder_attention_mask_2": key_lengths(6, 6, 2),
            "image_embeds": draw.normal(2, 5, 24),
        }

    config = {
        **DIM,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 40,
        "text_embed_2_dim": 28,
        "image_embed_dim": 24,
        "rope_axes_dim": (8, 12, 12),
    }
    notes = "three conditions, sorted by their masks"
    return diffusers_entry("HunyuanVideo15Transformer3DModel", FAMILY, config, inputs, fullgraph=False, notes=notes)


def hunyuan_framepack() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 4, 3, 12, 12),
            "timestep": torch.tensor([600]),
            "encoder_hidden_states": draw.normal(1, 12, 40),
            "encoder_attention_mask": key_lengths(12, 9),
            "pooled_projections": draw.normal(1, 24),
            "image_embeds": draw.normal(1, 5, 24),
            "indices_latents": torch.arange(4, 7),
            "guidance": torch.tensor([3.5]),
            "latents_clean": draw.normal(1, 4, 1, 12, 12),
            "indices_latents_clean": torch.tensor([3]),
            "latents_history_2x": draw.normal(1, 4, 2, 12, 12),
            "indices_latents_history_2x": torch.tensor([1, 2]),
            "latents_history_4x": draw.normal(1, 4, 4, 12, 12),
            "indices_latents_history_4x": torch.tensor([0, 0, 0, 0]),
        }

    config = {**_hunyuan_config(), "has_image_proj": True, "image_proj_dim": 24, "has_clean_x_embedder": True}
    # Whole, the text is cut by a data-dependent length, and the graph doesn't say that q and k share it: one of the two
    # sites stays dense. With the default compilation the length is a number by then.
    notes = "compressed history before the video; with fullgraph=True one of the two stays dense (data-dependent text)"
    return diffusers_entry("HunyuanVideoFramepackTransformer3DModel", FAMILY, config, inputs, breaks=True, notes=notes)


ENTRIES = [hunyuan_video(), hunyuan_video15(), hunyuan_framepack()]
