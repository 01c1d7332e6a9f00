"""Audio transformers, and the one protein transformer."""

from __future__ import annotations

import torch

from tests.zoo.entry import Draw, Entry, diffusers_entry, key_lengths, rotary

FAMILY = "audio and others"


def ace_step() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(1, 192, 8),
            "timestep": torch.tensor([0.6]),
            "timestep_r": torch.tensor([0.4]),
            "encoder_hidden_states": draw.normal(1, 12, 40),
            "context_latents": draw.normal(1, 192, 16),
        }

    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "in_channels": 24,
        "audio_acoustic_hidden_dim": 8,
        "sliding_window": 24,
        "encoder_hidden_size": 40,
    }
    notes = "first layer: sliding window as a mask, dense; second: full, grouped queries"
    return diffusers_entry("AceStepTransformer1DModel", FAMILY, config, inputs, notes=notes)


def stable_audio() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 16, 96),
            "timestep": torch.tensor([0.3, 0.6]),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "global_hidden_states": draw.normal(2, 1, 24),
            "rotary_embedding": rotary(draw, 97, 16),
        }

    config = {
        "sample_size": 96,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "num_key_value_attention_heads": 1,
        "cross_attention_dim": 32,
        "cross_attention_input_dim": 40,
        "time_proj_dim": 32,
        "global_states_input_dim": 24,
    }
    return diffusers_entry("StableAudioDiTModel", FAMILY, config, inputs, notes="a global token before 96 audio tokens")


def stable_audio3() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 16, 96),
            "timestep": torch.tensor([0.3, 0.6]),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "global_hidden_states": draw.normal(2, 24),
            "encoder_attention_mask": key_lengths(12, 12, 7),
            "local_add_cond": draw.normal(2, 17, 96),
        }

    config = {
        "io_channels": 16,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 2,
        "cond_token_dim": 40,
        "global_cond_dim": 24,
        "local_add_cond_dim": 17,
        "timestep_features_dim": 32,
        "num_memory_tokens": 8,
    }
    notes = "differential attention: two attentions with one V"
    return diffusers_entry("StableAudio3DiTModel", FAMILY, config, inputs, notes=notes)


def longcat_audio() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 96, 16),
            "encoder_hidden_states": draw.normal(2, 12, 40),
            "encoder_attention_mask": key_lengths(12, 12, 7).bool(),
            "timestep": torch.tensor([0.3, 0.6]),
            "attention_mask": key_lengths(96, 96, 71).bool(),
            "latent_cond": draw.normal(2, 96, 16),
        }

    config = {"dit_dim": 64, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 40, "latent_dim": 16}
    return diffusers_entry("LongCatAudioDiTTransformer", FAMILY, config, inputs, notes="audio padding as a key mask")


def minimax_music() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "hidden_states": draw.normal(2, 16, 96),
            "timestep": torch.tensor([0.3, 0.6]),
            "encoder_hidden_states": draw.normal(2, 96, 24),
        }

    config = {
        "in_channels": 16,
        "condition_dim": 24,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "ff_inner_dim": 128,
        "rotary_dim": 16,
        "fourier_embedding_dim": 32,
    }
    return diffusers_entry("MiniMaxMusic3Transformer1DModel", FAMILY, config, inputs, notes="timestep as a first token")


def minimax_rvq() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {"inputs_embeds": draw.normal(2, 64, 64)}

    config = {
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "audio_vocab_size": 32,
        "max_position_embeddings": 64,
    }
    notes = "autoregressive, is_causal=True: dense"
    return diffusers_entry("MiniMaxMusic3RVQDepthDecoder", FAMILY, config, inputs, return_dict=False, notes=notes)


def rfd4_proteina() -> Entry:
    def inputs(draw: Draw) -> dict:
        return {
            "bb_ca": draw.normal(1, 64, 3),
            "local_latents": draw.normal(1, 64, 8),
            "bb_ca_time": torch.tensor([0.3]),
            "local_latents_time": torch.tensor([0.6]),
            "padding_mask": key_lengths(64, 55).bool(),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 64, dtype=torch.bool),
                "supports_local_latent": torch.ones(1, 64, dtype=torch.bool),
            },
        }

    times = ("time_emb_bb_ca", "time_emb_local_latents")
    config = {
        "nlayers": 2,
        "token_dim": 64,
        "nheads": 2,
        "dim_cond": 32,
        "pair_repr_dim": 16,
        "latent_dim": 8,
        "t_emb_dim": 32,
        "feats_seq": ("xt_bb_ca", "xt_local_latents"),
        "feats_cond_seq": times,
        "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        "feats_pair_cond": times,
        "tri_mult_c": 16,
        "num_sequence_classes": 20,
    }
    notes = "a learned bias for each pair of tokens: dense"
    return diffusers_entry("RFD4ProteinaTransformer", FAMILY, config, inputs, notes=notes)


ENTRIES = [
    ace_step(),
    stable_audio(),
    stable_audio3(),
    longcat_audio(),
    minimax_music(),
    minimax_rvq(),
    rfd4_proteina(),
]
