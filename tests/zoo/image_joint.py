"""Image transformers with joint attention that came after Flux: refiners, experts, packed sequences, editing."""

from __future__ import annotations

import torch

from tests.zoo.entry import Draw, Entry, diffusers_entry, grid_ids, key_lengths

FAMILY = "joint text and image, later"
DIM = {"num_attention_heads": 2, "attention_head_dim": 32}
FLUX_ROPE = [8, 12, 12]


def hidream() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 4, 20, 20),
            "timesteps": torch.tensor([600]),
            "encoder_hidden_states_t5": draw.normal(1, 8, 40),
            "encoder_hidden_states_llama3": draw.normal(3, 1, 8, 48),
            "pooled_embeds": draw.normal(1, 24),
        }

    config = {
        **DIM,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "caption_channels": [40, 48],
        "text_emb_dim": 24,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (16, 8, 8),
        "max_resolution": (32, 32),
        "llama_layers": [0, 1],
        "force_inference_output": True,
    }
    return diffusers_entry("HiDreamImageTransformer2DModel", FAMILY, config, inputs, fullgraph=False, notes="experts")


def hunyuan_image() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 8, 12),
            "timestep": torch.tensor([37.0, 600.0]),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "encoder_attention_mask": key_lengths(12, 12, 7),
        }

    config = {
        **DIM,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 40,
        "rope_axes_dim": (16, 16),
    }
    return diffusers_entry("HunyuanImageTransformer2DModel", FAMILY, config, inputs, notes="text after the image")


def ideogram4() -> Entry:
    def inputs(draw: Draw) -> dict:
        roles = torch.tensor([[3] * 12 + [2] * 96, [-1] * 5 + [3] * 7 + [2] * 96])
        return {
            "hidden_states": draw.normal(2, 108, 16),
            "timestep": torch.tensor([0.3, 0.6]),
            "encoder_hidden_states": draw.normal(2, 108, 40),
            "position_ids": torch.cat([torch.zeros(12, 3), grid_ids(1, 8, 12)]).long().expand(2, -1, -1),
            "segment_ids": (roles > 0).long(),
            "indicator": roles,
        }

    config = {
        **DIM,
        "in_channels": 16,
        "num_layers": 2,
        "intermediate_size": 128,
        "adaln_dim": 32,
        "llm_features_dim": 40,
        "mrope_section": (6, 5, 5),
    }
    return diffusers_entry("Ideogram4Transformer2DModel", FAMILY, config, inputs, notes="mask of equal segments, dense")


def joy_image() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 4, 2, 16, 16),
            "timestep": torch.tensor([600.0]),
            "encoder_hidden_states": draw.normal(1, 12, 40),
        }

    config = {
        "in_channels": 4,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "text_dim": 40,
        "num_layers": 2,
        "rope_dim_list": FLUX_ROPE,
    }
    return diffusers_entry("JoyImageEditTransformer3DModel", FAMILY, config, inputs)


def joy_image_plus() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 128, 4, 1, 2, 2),
            "timestep": torch.tensor([37.0, 600.0]),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "encoder_hidden_states_mask": key_lengths(12, 12, 7).float(),
            "shape_list": [[(1, 8, 8), (1, 8, 8)], [(1, 8, 8), (1, 6, 8)]],
        }

    config = {
        "in_channels": 4,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "text_dim": 40,
        "num_layers": 2,
        "rope_dim_list": FLUX_ROPE,
    }
    notes = "padded image tokens and padded text in one key mask"
    return diffusers_entry("JoyImageEditPlusTransformer3DModel", FAMILY, config, inputs, notes=notes)


def krea2() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 96, 16),
            "encoder_hidden_states": draw.normal(2, 12, 3, 64),
            "timestep": torch.tensor([0.3, 0.6]),
            "position_ids": torch.cat([torch.zeros(12, 3), grid_ids(1, 8, 12)]),
            "encoder_attention_mask": key_lengths(12, 12, 7).bool(),
        }

    config = {
        **DIM,
        "in_channels": 16,
        "num_layers": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
        "timestep_embed_dim": 32,
        "text_hidden_dim": 64,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 128,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (8, 12, 12),
    }
    return diffusers_entry("Krea2Transformer2DModel", FAMILY, config, inputs, gain=0.8, notes="grouped queries")


def _packed(draw: Draw) -> dict:
    return {
        "hidden_states": draw.normal(1, 96, 16),
        "encoder_hidden_states": draw.normal(1, 12, 40),
        "timestep": torch.tensor([0.6]),
        "img_ids": grid_ids(1, 8, 12),
        "txt_ids": torch.zeros(12, 3),
    }


def longcat_image() -> Entry:
    config = {
        **DIM,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 40,
        "pooled_projection_dim": 40,
        "axes_dims_rope": FLUX_ROPE,
    }
    return diffusers_entry("LongCatImageTransformer2DModel", FAMILY, config, _packed)


def ovis_image() -> Entry:
    config = {
        **DIM,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 40,
        "axes_dims_rope": FLUX_ROPE,
    }
    return diffusers_entry("OvisImageTransformer2DModel", FAMILY, config, _packed)


def lumina2() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 16, 24),
            "timestep": torch.tensor([0.3, 0.6]),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "encoder_attention_mask": key_lengths(12, 12, 7).bool(),
        }

    config = {
        "sample_size": 16,
        "in_channels": 4,
        "hidden_size": 64,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (8, 12, 12),
        "axes_lens": (64, 64, 64),
        "cap_feat_dim": 40,
    }
    return diffusers_entry(
        "Lumina2Transformer2DModel", FAMILY, config, inputs, fullgraph=False, notes="lengths by tolist()"
    )


def nucleus_moe() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 96, 16),
            "img_shapes": [(1, 8, 12)],
            "encoder_hidden_states": draw.normal(1, 12, 40),
            "timestep": torch.tensor([0.6]),
        }

    config = {
        **DIM,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "num_key_value_heads": 1,
        "joint_attention_dim": 40,
        "axes_dims_rope": (8, 12, 12),
        "dense_moe_strategy": "leave_first_block_dense",
        "num_experts": 4,
        "moe_intermediate_dim": 32,
        "capacity_factors": 2.0,
    }
    notes = "experts; image queries, image and text keys; grouped queries"
    return diffusers_entry("NucleusMoEImageTransformer2DModel", FAMILY, config, inputs, long_keys=2, notes=notes)


def omnigen() -> Entry:
    def inputs(draw: Draw) -> dict:
        tokens = 12 + 1 + 96
        mask = torch.ones(tokens, tokens).tril()
        mask[13:, 13:] = 1
        return {
            "hidden_states": draw.normal(2, 4, 16, 24),
            "timestep": torch.tensor([0.3, 0.6]),
            "input_ids": draw.integers(60, 2, 12),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": mask.expand(2, -1, -1),
            "position_ids": torch.arange(tokens).expand(2, -1),
        }

    config = {
        "in_channels": 4,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "num_layers": 2,
        "pad_token_id": 0,
        "vocab_size": 64,
        "max_position_embeddings": 1000,
        "original_max_position_embeddings": 200,
        "rope_scaling": {"short_factor": [1.0] * 16, "long_factor": [1.5] * 16},
        "pos_embed_max_size": 24,
        "time_step_dim": 32,
    }
    notes = "text causal, image over all: a pair mask, dense"
    return diffusers_entry("OmniGenTransformer2DModel", FAMILY, config, inputs, fullgraph=False, notes=notes)


def prx() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 16, 24),
            "timestep": torch.tensor([0.3, 0.6]),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "attention_mask": key_lengths(12, 12, 7).bool(),
        }

    config = {
        "in_channels": 4,
        "context_in_dim": 40,
        "hidden_size": 64,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [16, 16],
    }
    notes = "image queries, text and image keys; the key mask is expanded over queries"
    return diffusers_entry("PRXTransformer2DModel", FAMILY, config, inputs, long_keys=2, notes=notes)


def qwen_image() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 96, 16),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "encoder_hidden_states_mask": key_lengths(12, 12, 7),
            "timestep": torch.tensor([0.3, 0.6]),
            "img_shapes": [[(1, 8, 12)]] * 2,
        }

    config = {
        **DIM,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "joint_attention_dim": 40,
        "axes_dims_rope": (8, 12, 12),
    }
    return diffusers_entry("QwenImageTransformer2DModel", FAMILY, config, inputs, notes="text before the image, padded")


def qwen_image21() -> Entry:
    def inputs(draw: Draw) -> dict:
        condition, target = 8 * 8, 8 * 12
        slots = [False] * 6 + [True] * (condition // 4) + [False] * 6 + [True] * (target // 4)
        return {
            "hidden_states": draw.normal(1, condition + target, 16),
            "encoder_hidden_states": draw.normal(1, 12 + condition // 4, 40),
            "timestep": torch.tensor([0.6]),
            "img_shapes": [[(1, 8, 8), (1, 8, 12)]],
            "img_mask": torch.tensor([slots]),
        }

    config = {
        **DIM,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "context_in_dim": 40,
        "axes_dims_rope": (8, 12, 12),
    }
    notes = "block-causal, as one call for each segment, queries a suffix of the keys"
    return diffusers_entry(
        "QwenImage21Transformer2DModel", FAMILY, config, inputs, fullgraph=False, long_keys=4, notes=notes
    )


def z_image() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "x": [draw.normal(4, 1, 16, 24), draw.normal(4, 1, 16, 16)],
            "t": torch.tensor([0.3, 0.6]),
            "cap_feats": [draw.normal(12, 40), draw.normal(7, 40)],
        }

    config = {
        "in_channels": 4,
        "dim": 64,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 40,
        "axes_dims": [8, 12, 12],
        "axes_lens": [256, 64, 64],
    }
    notes = "two images of different size in one batch, padded"
    return diffusers_entry("ZImageTransformer2DModel", FAMILY, config, inputs, warm=True, notes=notes)


ENTRIES = [
    hidream(),
    hunyuan_image(),
    ideogram4(),
    joy_image(),
    joy_image_plus(),
    krea2(),
    longcat_image(),
    ovis_image(),
    lumina2(),
    nucleus_moe(),
    omnigen(),
    prx(),
    qwen_image(),
    qwen_image21(),
    z_image(),
]
