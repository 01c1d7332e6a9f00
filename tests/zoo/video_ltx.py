"""LTX, Sana and MiniMax: video transformers in compressed latents, some with sound."""

from __future__ import annotations

import torch

from tests.zoo.entry import Draw, Entry, diffusers_entry, grid_ids, key_lengths

FAMILY = "LTX, Sana and MiniMax"
DIM = {"num_attention_heads": 2, "attention_head_dim": 32}


def ltx() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 108, 16),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "timestep": torch.tensor([37, 600]),
            "encoder_attention_mask": key_lengths(12, 12, 7),
            "num_frames": 3,
            "height": 6,
            "width": 6,
        }

    config = {
        **DIM,
        "in_channels": 16,
        "out_channels": 16,
        "cross_attention_dim": 64,
        "num_layers": 2,
        "caption_channels": 40,
    }
    return diffusers_entry("LTXVideoTransformer3DModel", FAMILY, config, inputs, backward=True)


def _ltx2_config() -> dict:
    return {
        **DIM,
        "in_channels": 16,
        "out_channels": 16,
        "cross_attention_dim": 64,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 16,
        "audio_cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": 40,
        "rope_double_precision": False,
    }


def ltx2() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 108, 16),
            "audio_hidden_states": draw.normal(1, 48, 8),
            "encoder_hidden_states": draw.normal(1, 12, 40),
            "audio_encoder_hidden_states": draw.normal(1, 12, 40),
            "timestep": torch.tensor([600.0]),
            "encoder_attention_mask": key_lengths(12, 9),
            "audio_encoder_attention_mask": key_lengths(12, 9),
            "num_frames": 3,
            "height": 6,
            "width": 6,
            "audio_num_frames": 48,
        }

    notes = "video and audio streams that attend to each other"
    return diffusers_entry("LTX2VideoTransformer3DModel", FAMILY, _ltx2_config(), inputs, notes=notes)


def sana_wm_refiner() -> Entry:
    def inputs(draw: Draw) -> dict:
        angle = (6.28 * draw.uniform(1, 108, 32)).repeat_interleave(2, dim=-1)
        return {
            "hidden_states": draw.normal(1, 108, 16),
            "encoder_hidden_states": draw.normal(1, 12, 40),
            "timestep": torch.tensor([600.0]),
            "video_rotary_emb": (angle.cos(), angle.sin()),
            "encoder_attention_mask": key_lengths(12, 9),
        }

    return diffusers_entry("SanaWMLTX2RefinerTransformer3DModel", FAMILY, _ltx2_config(), inputs)


def sana() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 8, 12),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "timestep": torch.tensor([37, 600]),
            "encoder_attention_mask": key_lengths(12, 12, 7),
        }

    config = {
        **DIM,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 64,
        "caption_channels": 40,
        "sample_size": 12,
    }
    notes = "self-attention is linear, without softmax; softmax only across to the text"
    return diffusers_entry("SanaTransformer2DModel", FAMILY, config, inputs, notes=notes)


def sana_video() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 3, 12, 12),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "timestep": torch.tensor([37, 600]),
            "encoder_attention_mask": key_lengths(12, 12, 7),
        }

    config = {
        **DIM,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 64,
        "caption_channels": 40,
        "sample_size": 12,
    }
    notes = "self-attention is linear, without softmax; softmax only across to the text"
    return diffusers_entry("SanaVideoTransformer3DModel", FAMILY, config, inputs, notes=notes)


def sana_wm() -> Entry:
    def inputs(draw: Draw) -> dict:
        pose = torch.eye(4).flatten().expand(1, 3, 16)
        lens = torch.tensor([8.0, 8.0, 3.0, 3.0]).expand(1, 3, 4)
        return {
            "hidden_states": draw.normal(1, 4, 3, 6, 6),
            "timestep": torch.full((1, 1, 3), 600),
            "encoder_hidden_states": draw.normal(1, 1, 12, 40),
            "mask": key_lengths(12, 9),
            "camera_conditions": torch.cat([pose, lens], dim=-1),
            "chunk_plucker": draw.normal(1, 6, 3, 6, 6),
        }

    config = {
        "in_channels": 4,
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "softmax_every_n": 2,
        "linear_head_dim": 32,
        "chunk_plucker_channels": 6,
        "chunk_plucker_post_attn_blocks": 2,
        "caption_channels": 40,
    }
    notes = "recurrent layers, then a softmax layer with a camera branch"
    return diffusers_entry("SanaWMTransformer3DModel", FAMILY, config, inputs, notes=notes)


def minimax_h3() -> Entry:
    def inputs(draw: Draw) -> dict:
        text, video, audio = 12, 108, 16
        total = text + video + audio
        return {
            "hidden_states": draw.normal(1, video, 16),
            "audio_hidden_states": draw.normal(1, audio, 8),
            "encoder_hidden_states": draw.normal(1, text, 40),
            "timestep": torch.tensor([600.0, 0.0]),
            "timestep_indices": torch.cat([torch.ones(text), torch.zeros(video + audio)]).long(),
            "token_tags": torch.tensor([1] * text + [0] * video + [2] * audio),
            "position_ids": torch.cat([torch.zeros(text, 3), grid_ids(3, 6, 6), grid_ids(audio, 1, 1)]),
            "video_indices": torch.arange(text, text + video),
            "audio_indices": torch.arange(text + video, total),
            "text_indices": torch.arange(text),
        }

    config = {
        **DIM,
        "hidden_size": 64,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 128,
        "in_channels": 4,
        "audio_in_channels": 8,
        "text_dim": 40,
        "freq_dim": 32,
        "time_embed_hidden_dim": 64,
        "time_embed_dim": 32,
        "rope_freq_dim": 4,
    }
    notes = "text, video and sound packed into one sequence"
    return diffusers_entry("MiniMaxH3Transformer3DModel", FAMILY, config, inputs, notes=notes)


ENTRIES = [ltx(), ltx2(), sana_wm_refiner(), sana(), sana_video(), sana_wm(), minimax_h3()]
