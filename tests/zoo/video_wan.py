"""Wan and its relatives: self-attention over the video, text (and image) by cross-attention."""

from __future__ import annotations

import torch

from tests.zoo.entry import Draw, Entry, diffusers_entry

FAMILY = "Wan and relatives"
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 40,
    "freq_dim": 32,
    "ffn_dim": 128,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}


def _video(draw: Draw, frames: int = 3) -> dict:
    """Latents of `frames` x 12 x 12 (36 tokens a frame), a timestep and text."""
    return {
        "hidden_states": draw.normal(1, 4, frames, 12, 12),
        "timestep": torch.tensor([600]),
        "encoder_hidden_states": draw.normal(1, 12, 40),
    }


def wan() -> Entry:
    return diffusers_entry("WanTransformer3DModel", FAMILY, WAN, _video, backward=True)


def wan_image() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {**_video(draw), "encoder_hidden_states_image": draw.normal(1, 257, 24)}

    config = {**WAN, "image_dim": 24, "added_kv_proj_dim": 64}
    notes = "image to video: a second cross-attention, its keys taken out of one sequence"
    return diffusers_entry("WanTransformer3DModel:image", FAMILY, config, inputs, notes=notes)


def chrono_edit() -> Entry:
    return diffusers_entry("ChronoEditTransformer3DModel", FAMILY, WAN, _video)


def skyreels() -> Entry:
    config = {**WAN, "num_frame_per_block": 1}
    return diffusers_entry("SkyReelsV2Transformer3DModel", FAMILY, config, _video)


def skyreels_blocks() -> Entry:
    def inputs(draw: Draw) -> dict:
        video = _video(draw, frames=4)
        return {**video, "timestep": torch.tensor([[600, 600, 700, 700]]), "enable_diffusion_forcing": True}

    config = {**WAN, "num_frame_per_block": 2}
    notes = "diffusion forcing: block-causal mask over frames, dense"
    return diffusers_entry("SkyReelsV2Transformer3DModel:forcing", FAMILY, config, inputs, notes=notes)


def wan_vace() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            **_video(draw),
            "control_hidden_states": draw.normal(1, 6, 3, 12, 12),
            "control_hidden_states_scale": torch.tensor([0.8]),
        }

    config = {**WAN, "vace_layers": [0], "vace_in_channels": 6}
    return diffusers_entry(
        "WanVACETransformer3DModel", FAMILY, config, inputs, notes="control blocks beside the main ones"
    )


def wan_animate() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 12, 3, 12, 12),
            "timestep": torch.tensor([600]),
            "encoder_hidden_states": draw.normal(1, 12, 40),
            "encoder_hidden_states_image": draw.normal(1, 257, 24),
            "pose_hidden_states": draw.normal(1, 4, 2, 12, 12),
            "face_pixel_values": draw.normal(1, 3, 5, 16, 16),
        }

    config = {
        **WAN,
        "in_channels": 12,
        "latent_channels": 4,
        "image_dim": 24,
        "added_kv_proj_dim": 64,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
        "motion_encoder_size": 16,
        "motion_style_dim": 16,
        "motion_dim": 8,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }
    notes = "a face adapter with cross-attention frame by frame"
    return diffusers_entry("WanAnimateTransformer3DModel", FAMILY, config, inputs, notes=notes)


def wan_animate2() -> Entry:
    def inputs(draw: Draw) -> dict:
        from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

        return {
            "hidden_states": [draw.normal(4, 3, 12, 12)],
            "timestep": torch.tensor([600.0]),
            "encoder_hidden_states": [draw.normal(9, 40)],
            "condition_latents": [draw.normal(4, 3, 12, 12)],
            "kv_cache": WanAnimate2KVCache(2),
            "kv_cache_mode": "extract",
            "seq_len": 108,
            "offset_grid_sizes": torch.tensor([[3, 6, 6]]),
        }

    config = {
        "text_len": 12,
        "in_dim": 8,
        "dim": 64,
        "ffn_dim": 128,
        "freq_dim": 32,
        "text_dim": 40,
        "out_dim": 4,
        "num_heads": 2,
        "num_layers": 2,
        "use_img_emb": False,
    }
    notes = "the reference pass; the generation pass is FlexAttention only"
    return diffusers_entry("WanAnimate2Transformer3DModel", FAMILY, config, inputs, fullgraph=False, notes=notes)


def _anyflow_config() -> dict:
    return {**WAN, "rope_max_seq_len": 64}


def anyflow() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 3, 4, 12, 12),
            "timestep": torch.full((1, 3), 600.0),
            "r_timestep": torch.full((1, 3), 400.0),
            "encoder_hidden_states": draw.normal(1, 12, 40),
        }

    return diffusers_entry("AnyFlowTransformer3DModel", FAMILY, _anyflow_config(), inputs)


def anyflow_far() -> Entry:
    def inputs(draw: Draw) -> dict:
        cache = [{name: draw.normal(2, 1, 2, 36, 32) for name in ("compressed_cache", "full_cache")} for _ in range(2)]
        return {
            "hidden_states": draw.normal(1, 3, 4, 12, 12),
            "timestep": torch.full((1, 3), 600.0),
            "r_timestep": torch.full((1, 3), 400.0),
            "encoder_hidden_states": draw.normal(1, 12, 40),
            "chunk_partition": [1, 3],
            "kv_cache": cache,
            "kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": False},
        }

    notes = "a step with cached chunks; self-attention is FlexAttention only"
    return diffusers_entry("AnyFlowFARTransformer3DModel", FAMILY, _anyflow_config(), inputs, notes=notes)


def helios() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            **_video(draw),
            "indices_hidden_states": torch.arange(3, 6)[None],
            "indices_latents_history_short": torch.arange(2, 3)[None],
            "latents_history_short": draw.normal(1, 4, 1, 12, 12),
        }

    config = {**WAN, "rope_dim": (12, 10, 10)}
    del config["rope_max_seq_len"]
    return diffusers_entry("HeliosTransformer3DModel", FAMILY, config, inputs, notes="history frames before the video")


ENTRIES = [
    wan(),
    wan_image(),
    chrono_edit(),
    skyreels(),
    skyreels_blocks(),
    wan_vace(),
    wan_animate(),
    wan_animate2(),
    anyflow(),
    anyflow_far(),
    helios(),
]
