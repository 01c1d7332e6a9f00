"""Image transformers with joint text and image attention: SD3, Flux and what was built on them."""

from __future__ import annotations

import torch

from tests.zoo.entry import Draw, Entry, align_keys, diffusers_entry, grid_ids, key_lengths

FAMILY = "joint text and image"
DIM = {"num_attention_heads": 2, "attention_head_dim": 32}
FLUX_ROPE = [8, 12, 12]


def _flux_inputs(draw: Draw, axes: int = 3, text: int = 12) -> dict:
    """Packed latents of an 8 x 12 grid, text, timestep in [0, 1] and ids with `axes` columns."""
    return {
        "hidden_states": draw.normal(1, 96, 16),
        "encoder_hidden_states": draw.normal(1, text, 40),
        "timestep": torch.tensor([0.6]),
        "img_ids": grid_ids(1, 8, 12, axes=axes),
        "txt_ids": torch.zeros(text, axes),
    }


def _size_conditions() -> dict:
    return {
        "timestep": torch.tensor([37, 600]),
        "original_size": torch.tensor([[128.0, 192.0]] * 2),
        "target_size": torch.tensor([[128.0, 192.0]] * 2),
        "crop_coords": torch.tensor([[0.0, 0.0]] * 2),
    }


def sd3() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 16, 24),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "pooled_projections": draw.normal(2, 24),
            "timestep": torch.tensor([37, 600]),
        }

    config = {
        **DIM,
        "sample_size": 24,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "joint_attention_dim": 40,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 24,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return diffusers_entry("SD3Transformer2DModel", FAMILY, config, inputs, backward=True, notes="text after the image")


def auraflow() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 16, 24),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "timestep": torch.tensor([0.3, 0.6]),
        }

    config = {
        **DIM,
        "sample_size": 24,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "joint_attention_dim": 40,
        "caption_projection_dim": 64,
        "pos_embed_max_size": 196,
    }
    return diffusers_entry("AuraFlowTransformer2DModel", FAMILY, config, inputs, finish=align_keys, notes="8 registers")


def flux() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {**_flux_inputs(draw), "pooled_projections": draw.normal(1, 24), "guidance": torch.tensor([3.5])}

    config = {
        **DIM,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "joint_attention_dim": 40,
        "pooled_projection_dim": 24,
        "guidance_embeds": True,
        "axes_dims_rope": FLUX_ROPE,
    }
    return diffusers_entry(
        "FluxTransformer2DModel", FAMILY, config, inputs, backward=True, notes="text before the image"
    )


def flux2() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {**_flux_inputs(draw, axes=4), "guidance": torch.tensor([3.5])}

    config = {
        **DIM,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 40,
        "axes_dims_rope": (8, 8, 8, 8),
    }
    return diffusers_entry("Flux2Transformer2DModel", FAMILY, config, inputs)


def flux3() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            **_flux_inputs(draw, axes=4, text=20),
            "image_cond_hidden_states": draw.normal(1, 96, 16),
            "image_cond_ids": grid_ids(1, 8, 12, axes=4),
        }

    config = {
        **DIM,
        "in_channels": 16,
        "cond_in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 40,
        "axes_dims_rope": (8, 8, 8, 8),
    }
    return diffusers_entry(
        "Flux3Transformer2DModel", FAMILY, config, inputs, notes="one self-attention per stream first"
    )


def bria() -> Entry:
    config = {
        **DIM,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 40,
        "axes_dims_rope": FLUX_ROPE,
    }
    return diffusers_entry("BriaTransformer2DModel", FAMILY, config, _flux_inputs)


def bria_fibo() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {**_flux_inputs(draw), "text_encoder_layers": [draw.normal(1, 12, 24) for _ in range(2)]}

    config = {
        **DIM,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 40,
        "text_encoder_dim": 24,
        "axes_dims_rope": FLUX_ROPE,
    }
    return diffusers_entry("BriaFiboTransformer2DModel", FAMILY, config, inputs)


def bria_fibo2() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 4, 16, 24),
            "timestep": torch.tensor([0.6]),
            "encoder_hidden_states": draw.normal(1, 2, 24, 40),
        }

    config = {
        "in_channels": 4,
        "dim": 64,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 40,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 16,
        "max_num_gist_tokens": 32,
        "gist_step": 8,
        "gist_min_text_len": 16,
        "gist_max_text_len": 64,
        "axes_dims": (8, 12, 12),
        "axes_lens": (64, 64, 64),
    }
    notes = "a resampler over text of the same length (cross), then gist tokens before the image"
    return diffusers_entry("BriaFibo2Transformer2DModel", FAMILY, config, inputs, warm=True, not_self=1, notes=notes)


def chroma(masked: bool) -> Entry:
    def inputs(draw: Draw) -> dict:
        text = torch.cat([key_lengths(12, 9), torch.ones(1, 96, dtype=torch.int64)], dim=1)
        return {**_flux_inputs(draw), "attention_mask": text.float() if masked else None}

    config = {
        **DIM,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "joint_attention_dim": 40,
        "axes_dims_rope": FLUX_ROPE,
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 32,
        "approximator_layers": 1,
    }
    name = "ChromaTransformer2DModel" + ("" if masked else ":unmasked")
    notes = "the outer product of the text's padding as an additive mask, dense" if masked else "without padding"
    return diffusers_entry(name, FAMILY, config, inputs, notes=notes)


def cogview3() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 16, 24),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            **_size_conditions(),
        }

    config = {
        **DIM,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "text_embed_dim": 40,
        "time_embed_dim": 32,
        "condition_dim": 16,
        "pos_embed_max_size": 16,
        "sample_size": 24,
    }
    return diffusers_entry("CogView3PlusTransformer2DModel", FAMILY, config, inputs, finish=align_keys)


def cogview4() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 16, 24),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            **_size_conditions(),
        }

    config = {
        **DIM,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "text_embed_dim": 40,
        "time_embed_dim": 32,
        "condition_dim": 16,
        "sample_size": 24,
    }
    return diffusers_entry("CogView4Transformer2DModel", FAMILY, config, inputs, finish=align_keys)


def glm_image() -> Entry:
    def inputs(draw: Draw) -> dict:
        conditions = _size_conditions()
        del conditions["original_size"]
        return {
            "hidden_states": draw.normal(2, 4, 16, 24),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "prior_token_id": draw.integers(64, 2, 96),
            "prior_token_drop": torch.zeros(2, 96, dtype=torch.bool),
            **conditions,
        }

    config = {
        **DIM,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "text_embed_dim": 40,
        "time_embed_dim": 32,
        "condition_dim": 16,
        "prior_vq_quantizer_codebook_size": 64,
    }
    return diffusers_entry("GlmImageTransformer2DModel", FAMILY, config, inputs, finish=align_keys)


def ernie_image() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 16, 8, 12),
            "timestep": torch.tensor([37.0, 600.0]),
            "text_bth": draw.normal(2, 12, 40),
            "text_lens": torch.tensor([12, 7]),
        }

    config = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_layers": 2,
        "ffn_hidden_size": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_in_dim": 40,
        "rope_axes_dim": (8, 12, 12),
    }
    return diffusers_entry("ErnieImageTransformer2DModel", FAMILY, config, inputs, notes="text padding as a key mask")


ENTRIES = [
    sd3(),
    auraflow(),
    flux(),
    flux2(),
    flux3(),
    bria(),
    bria_fibo(),
    bria_fibo2(),
    chroma(masked=True),
    chroma(masked=False),
    cogview3(),
    cogview4(),
    glm_image(),
    ernie_image(),
]
