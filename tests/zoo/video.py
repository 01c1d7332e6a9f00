"""Video transformers with joint attention, or with attention of their own."""

from __future__ import annotations

import torch

from tests.zoo.entry import Draw, Entry, diffusers_entry, grid_ids, key_lengths

FAMILY = "video"
DIM = {"num_attention_heads": 2, "attention_head_dim": 32}


def _cogvideox_config() -> dict:
    return {
        **DIM,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 32,
        "text_embed_dim": 40,
        "num_layers": 2,
        "sample_width": 12,
        "sample_height": 12,
        "sample_frames": 9,
        "max_text_seq_length": 12,
    }


def cogvideox() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 3, 4, 12, 12),
            "encoder_hidden_states": draw.normal(1, 12, 40),
            "timestep": torch.tensor([600]),
        }

    return diffusers_entry(
        "CogVideoXTransformer3DModel", FAMILY, _cogvideox_config(), inputs, backward=True, notes="text before the video"
    )


def consisid() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 3, 4, 12, 12),
            "encoder_hidden_states": draw.normal(1, 12, 40),
            "timestep": torch.tensor([600]),
            "id_cond": draw.normal(1, 24),
            "id_vit_hidden": [draw.normal(1, 20, 32)],
        }

    config = {
        **_cogvideox_config(),
        "is_train_face": True,
        "cross_attn_interval": 1,
        "cross_attn_dim_head": 32,
        "cross_attn_num_heads": 2,
        "LFE_id_dim": 24,
        "LFE_vit_dim": 32,
        "LFE_depth": 1,
        "LFE_dim_head": 16,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 3,
        "LFE_num_querie": 8,
        "LFE_output_dim": 42,
        "LFE_ff_mult": 2,
        "LFE_num_scale": 1,
    }
    notes = "hand-written perceiver attention to a face, its queries a suffix of the keys"
    return diffusers_entry("ConsisIDTransformer3DModel", FAMILY, config, inputs, long_keys=1, notes=notes)


def allegro() -> Entry:
    def inputs(draw: Draw) -> dict:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

        frequencies = get_3d_rotary_pos_embed_allegro(
            embed_dim=48, crops_coords=((0, 0), (6, 6)), grid_size=(6, 6), temporal_size=3
        )
        grid = torch.cartesian_prod(*(axis.long() for axis in frequencies[3:])).T.reshape(3, 1, -1)
        frames = torch.ones(2, 3, 12, 12)
        frames[1, :, :, 8:] = 0
        return {
            "hidden_states": draw.normal(2, 4, 3, 12, 12),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "timestep": torch.tensor([37, 600]),
            "attention_mask": frames,
            "encoder_attention_mask": key_lengths(12, 12, 7),
            "image_rotary_emb": (frequencies[:3], tuple(grid)),
        }

    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 48,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 96,
        "sample_height": 12,
        "sample_width": 12,
        "sample_frames": 3,
        "caption_channels": 40,
    }
    return diffusers_entry("AllegroTransformer3DModel", FAMILY, config, inputs, notes="-10000 as an additive key mask")


def easy_animate() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 4, 3, 12, 12),
            "timestep": torch.tensor([600]),
            "encoder_hidden_states": draw.normal(1, 12, 40),
        }

    config = {
        **DIM,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "sample_width": 12,
        "sample_height": 12,
        "num_layers": 2,
        "mmdit_layers": 1,
        "time_embed_dim": 32,
        "text_embed_dim": 40,
    }
    return diffusers_entry("EasyAnimateTransformer3DModel", FAMILY, config, inputs)


def cosmos() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 4, 3, 12, 12),
            "timestep": torch.tensor([0.6]),
            "encoder_hidden_states": draw.normal(1, 12, 40),
        }

    config = {
        **DIM,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "text_embed_dim": 40,
        "adaln_lora_dim": 16,
        "max_size": (4, 12, 12),
        "concat_padding_mask": False,
    }
    return diffusers_entry("CosmosTransformer3DModel", FAMILY, config, inputs)


def cosmos3() -> Entry:
    def inputs(draw: Draw) -> dict:
        text, video = 12, 3 * 6 * 6
        return {
            "input_ids": draw.integers(64, text),
            "text_indexes": torch.arange(text),
            "position_ids": torch.cat([torch.zeros(text, 3), grid_ids(3, 6, 6)]).T.contiguous(),
            "und_len": text,
            "sequence_length": text + video,
            "vision_tokens": [draw.normal(1, 4, 3, 12, 12)],
            "vision_token_shapes": [(3, 6, 6)],
            "vision_sequence_indexes": torch.arange(text, text + video),
            "vision_mse_loss_indexes": torch.arange(text, text + video),
            "vision_timesteps": torch.full((video,), 600.0),
            "vision_noisy_frame_indexes": [torch.arange(3)],
        }

    config = {
        "head_dim": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "latent_channel": 4,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "patch_latent_dim": 16,
        "vocab_size": 64,
        "rope_axes_dim": (6, 5, 5),
    }
    notes = "text causal; video queries, text and video keys; grouped queries"
    return diffusers_entry("Cosmos3OmniTransformer", FAMILY, config, inputs, long_keys=2, notes=notes)


def kandinsky5() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 3, 12, 12, 4),
            "encoder_hidden_states": draw.normal(1, 12, 40),
            "timestep": torch.tensor([600.0]),
            "pooled_projections": draw.normal(1, 24),
            "visual_rope_pos": [torch.arange(3), torch.arange(6), torch.arange(6)],
            "text_rope_pos": torch.arange(12),
            "return_dict": False,
        }

    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 40,
        "in_text_dim2": 24,
        "time_dim": 32,
        "model_dim": 64,
        "ff_dim": 128,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (8, 12, 12),
    }
    return diffusers_entry("Kandinsky5Transformer3DModel", FAMILY, config, inputs, return_dict=False)


def kandinsky6() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 3, 12, 12, 9),
            "encoder_hidden_states": draw.normal(1, 12, 40),
            "pooled_projections": draw.normal(1, 24),
            "timestep": torch.tensor([600.0]),
            "audio_hidden_states": draw.normal(1, 48, 20),
        }

    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 40,
        "in_text_dim2": 24,
        "time_dim": 32,
        "model_dim": 64,
        "ff_dim": 128,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (8, 12, 12),
    }
    notes = "video and audio streams that attend to each other"
    return diffusers_entry("Kandinsky6Transformer3DModel", FAMILY, config, inputs, notes=notes)


def kandinsky6_sr() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {"hidden_states": draw.normal(1, 2, 16, 16, 9), "timestep": torch.tensor([600.0])}

    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "time_dim": 32,
        "model_dim": 64,
        "ff_dim": 128,
        "num_visual_blocks": 1,
        "axes_dims": (8, 12, 12),
        "nabla_window": (3, 3, 3),
    }
    notes = "its own block-sparse attention, FlexAttention only"
    return diffusers_entry("Kandinsky6SRTransformer3DModel", FAMILY, config, inputs, not_self=1, notes=notes)


def motif_video() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 5, 3, 12, 12),
            "timestep": torch.tensor([37, 600]),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "encoder_attention_mask": key_lengths(12, 12, 7),
            "image_embeds": draw.normal(2, 5, 24),
        }

    config = {
        **DIM,
        "in_channels": 5,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_decoder_layers": 1,
        "text_embed_dim": 40,
        "image_embed_dim": 24,
        "rope_axes_dim": (8, 12, 12),
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    }
    notes = "joint, then cross-attention to the same text; a decoder over encoder tokens"
    return diffusers_entry("MotifVideoTransformer3DModel", FAMILY, config, inputs, notes=notes)


def mochi() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 3, 12, 12),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "timestep": torch.tensor([37, 600]),
            "encoder_attention_mask": key_lengths(12, 12, 7).bool(),
        }

    config = {
        **DIM,
        "num_layers": 2,
        "pooled_projection_dim": 24,
        "in_channels": 4,
        "text_embed_dim": 40,
        "time_embed_dim": 32,
        "max_sequence_length": 12,
    }
    notes = "one call for each sample, over its valid text"
    return diffusers_entry("MochiTransformer3DModel", FAMILY, config, inputs, notes=notes)


ENTRIES = [
    cogvideox(),
    consisid(),
    allegro(),
    easy_animate(),
    cosmos(),
    cosmos3(),
    kandinsky5(),
    kandinsky6(),
    kandinsky6_sr(),
    motif_video(),
    mochi(),
]
