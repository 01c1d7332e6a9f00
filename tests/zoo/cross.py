"""Older and class-conditional transformers: self-attention over the image, text (if any) by cross-attention."""

from __future__ import annotations

import torch

from tests.zoo.entry import Draw, Entry, diffusers_entry, key_lengths, rotary

FAMILY = "cross-attention and class-conditional"
DIM = {"num_attention_heads": 2, "attention_head_dim": 32}


def _image(draw: Draw) -> torch.Tensor:
    return draw.normal(2, 4, 16, 24)


def dit() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 24, 24),
            "timestep": torch.tensor([37, 600]),
            "class_labels": torch.tensor([3, 7]),
        }

    config = {**DIM, "num_layers": 2, "sample_size": 24, "num_embeds_ada_norm": 10}
    return diffusers_entry("DiTTransformer2DModel", FAMILY, config, inputs, backward=True)


def pixart() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 24, 24),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "encoder_attention_mask": key_lengths(12, 12, 7).float(),
            "timestep": torch.tensor([37, 600]),
        }

    config = {**DIM, "num_layers": 2, "sample_size": 24, "cross_attention_dim": 64, "caption_channels": 40}
    return diffusers_entry("PixArtTransformer2DModel", FAMILY, config, inputs, backward=True)


def hunyuan_dit() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 4, 16, 24),
            "timestep": torch.tensor([37.0, 600.0]),
            "encoder_hidden_states": draw.normal(2, 8, 40),
            "text_embedding_mask": key_lengths(8, 8, 5),
            "encoder_hidden_states_t5": draw.normal(2, 12, 48),
            "text_embedding_mask_t5": key_lengths(12, 9, 12),
            "image_meta_size": torch.tensor([[128, 192, 128, 192, 0, 0]] * 2),
            "style": torch.tensor([0, 0]),
            "image_rotary_emb": rotary(draw, 96, 32),
        }

    config = {
        **DIM,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 16,
        "hidden_size": 64,
        "num_layers": 4,
        "cross_attention_dim": 40,
        "cross_attention_dim_t5": 48,
        "pooled_projection_dim": 32,
        "text_len": 8,
        "text_len_t5": 12,
    }
    return diffusers_entry("HunyuanDiT2DModel", FAMILY, config, inputs, notes="pooling by multi_head_attention_forward")


def latte() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 4, 24, 16, 16),
            "timestep": torch.tensor([600]),
            "encoder_hidden_states": draw.normal(1, 12, 40),
        }

    config = {
        **DIM,
        "in_channels": 4,
        "num_layers": 1,
        "cross_attention_dim": 64,
        "sample_size": 16,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "caption_channels": 40,
        "video_length": 24,
        "attention_bias": True,
    }
    return diffusers_entry("LatteTransformer3DModel", FAMILY, config, inputs, notes="spatial, then over 24 frames")


def lumina_next() -> Entry:
    def inputs(draw: Draw) -> dict:
        angle = 6.28 * draw.uniform(8, 12, 16)
        return {
            "hidden_states": _image(draw),
            "timestep": torch.tensor([0.3, 0.6]),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "encoder_mask": key_lengths(12, 12, 7).int(),
            "image_rotary_emb": torch.polar(torch.ones_like(angle), angle),
            "cross_attention_kwargs": {},
        }

    config = {
        "sample_size": 16,
        "in_channels": 4,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "cross_attention_dim": 40,
        "learn_sigma": False,
    }
    return diffusers_entry("LuminaNextDiT2DModel", FAMILY, config, inputs, notes="grouped queries, complex RoPE")


def transformer_2d() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {"hidden_states": draw.normal(2, 32, 8, 16), "encoder_hidden_states": draw.normal(2, 12, 40)}

    config = {**DIM, "in_channels": 32, "num_layers": 2, "cross_attention_dim": 40}
    return diffusers_entry("Transformer2DModel", FAMILY, config, inputs, notes="the block of Stable Diffusion's U-Net")


def dreamlite() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {"hidden_states": draw.normal(2, 32, 8, 16), "encoder_hidden_states": draw.normal(2, 12, 40)}

    config = {
        **DIM,
        "in_channels": 32,
        "num_layers": 2,
        "cross_attention_dim": 40,
        "qk_norm": "rms_norm",
    }
    return diffusers_entry("DreamLiteTransformer2DModel", FAMILY, config, inputs)


def temporal() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {"hidden_states": draw.normal(64, 32, 2, 3), "num_frames": 64}

    config = {**DIM, "in_channels": 32, "num_layers": 1}
    return diffusers_entry(
        "TransformerTemporalModel", FAMILY, config, inputs, notes="self-attention over 64 frames, twice in a block"
    )


def prior() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 48),
            "timestep": torch.tensor([37, 600]),
            "proj_embedding": draw.normal(2, 48),
            "encoder_hidden_states": draw.normal(2, 60, 48),
            "attention_mask": key_lengths(60, 60, 41),
        }

    config = {**DIM, "num_layers": 2, "embedding_dim": 48, "num_embeddings": 60}
    return diffusers_entry("PriorTransformer", FAMILY, config, inputs, notes="causal mask as an additive tensor")


def t5_film() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "encodings_and_masks": [
                (draw.normal(2, 20, 64), key_lengths(20, 20, 13).float()),
                (draw.normal(2, 40, 64), key_lengths(40, 31, 40).float()),
            ],
            "decoder_input_tokens": draw.normal(2, 96, 24),
            "decoder_noise_time": torch.tensor([0.2, 0.7]),
        }

    config = {
        "input_dims": 24,
        "targets_length": 96,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 2,
        "d_kv": 32,
        "d_ff": 128,
        "dropout_rate": 0.0,
    }
    return diffusers_entry(
        "T5FilmDecoder", FAMILY, config, inputs, gain=1.0, return_dict=False, notes="no scale, matmul"
    )


ENTRIES = [
    dit(),
    pixart(),
    hunyuan_dit(),
    latte(),
    lumina_next(),
    transformer_2d(),
    dreamlite(),
    temporal(),
    prior(),
    t5_film(),
]
