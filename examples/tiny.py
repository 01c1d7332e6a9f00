"""Pipelines of the real diffusers classes with a few thousand random weights: what ``--tiny`` runs, without a network.

They draw noise. They are for trying the code around them, never for looking at results or times.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

# Blocks of 16 tokens, since there are only some hundred of them, and sparse whatever the cost model says.
OPTIONS = {"sparsity": 0.5, "block_size": 16, "when": "always"}
TEXT = 16
FLOW = {"shift": 3.0}


def tokenizer() -> Any:
    """A tokenizer to which every word is unknown."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=TEXT, **names)


def t5() -> Any:
    """A text encoder of the T5 kind."""
    sizes = {"d_model": TEXT, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1, "vocab_size": 8}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()


def clip() -> Any:
    """A text encoder of the CLIP kind."""
    sizes = {"hidden_size": TEXT, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"vocab_size": 8, "max_position_embeddings": TEXT, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **more)).eval()


def wan_transformer() -> Any:
    """Wan's transformer with one block."""
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4,
        text_dim=TEXT, freq_dim=32, ffn_dim=64, num_layers=1, rope_max_seq_len=64,
    ).eval()  # fmt: skip


def wan() -> Any:
    """A `WanPipeline`."""
    transformer = wan_transformer()
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**FLOW)
    return _quiet(diffusers.WanPipeline(tokenizer(), t5(), vae.eval(), scheduler, transformer))


def cogvideox() -> Any:
    """A `CogVideoXPipeline`."""
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=TEXT, num_layers=1, sample_width=16, sample_height=16, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TEXT, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return _quiet(diffusers.CogVideoXPipeline(tokenizer(), t5(), vae.eval(), transformer.eval(), scheduler))


def flux() -> Any:
    """A `FluxPipeline`."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=32,
        joint_attention_dim=TEXT, pooled_projection_dim=TEXT, axes_dims_rope=(8, 12, 12), guidance_embeds=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, shift_factor=0.0,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**FLOW)
    words = tokenizer()
    return _quiet(diffusers.FluxPipeline(scheduler, vae.eval(), clip(), words, t5(), words, transformer.eval()))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
