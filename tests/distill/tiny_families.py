"""Tiny models of every family that the export and generation tests build from their configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from blade_compile.distill.export import read_record
from blade_compile.distill.pipelines import PIPELINES

WAN = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4,
    "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "num_layers": 1, "rope_max_seq_len": 64,
}  # fmt: skip
COGVIDEOX = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 16, "num_layers": 1, "sample_width": 8, "sample_height": 8, "sample_frames": 9, "patch_size": 2,
    "temporal_compression_ratio": 4, "max_text_seq_length": 8, "use_rotary_positional_embeddings": True,
}  # fmt: skip
SD3 = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 32, "caption_projection_dim": 64, "joint_attention_dim": 16, "pooled_projection_dim": 24,
    "pos_embed_max_size": 16,
}  # fmt: skip
FLUX = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2,
    "attention_head_dim": 32, "joint_attention_dim": 16, "pooled_projection_dim": 24, "axes_dims_rope": (8, 12, 12),
    "guidance_embeds": True,
}  # fmt: skip
PIXART = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "num_layers": 1,
    "cross_attention_dim": 64, "sample_size": 16, "patch_size": 2, "caption_channels": 16, "norm_num_groups": 4,
    "use_additional_conditions": False,
}  # fmt: skip
DIT = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "num_layers": 1,
    "sample_size": 16, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_num_groups": 4,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("WanTransformer3DModel", WAN),
    "cogvideox": ("CogVideoXTransformer3DModel", COGVIDEOX),
    "sd3": ("SD3Transformer2DModel", SD3),
    "flux": ("FluxTransformer2DModel", FLUX),
    "pixart": ("PixArtTransformer2DModel", PIXART),
    "dit": ("DiTTransformer2DModel", DIT),
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "wan": FLOW,
    "sd3": FLOW,
    "flux": FLOW,
    "cogvideox": {
        "_class_name": "CogVideoXDDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "beta_end": 0.012, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0,
    },
    "pixart": {
        "_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
    },
    "dit": {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
}  # fmt: skip


def transformer(family: str) -> nn.Module:
    """The family's transformer with random weights that don't vanish, also those that start at zero."""
    name, config = CONFIGS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(diffusers, name)(**config).eval()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return model


def with_adapter(model: nn.Module, seed: int = 1, name: str = "default", **settings: Any) -> nn.Module:
    """The model with a LoRA adapter that changes its output."""
    from peft import LoraConfig, inject_adapter_in_model

    given = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(init_lora_weights=False, **given), model, adapter_name=name)
    return model


def vae(family: str) -> nn.Module:
    """A tiny autoencoder of the family's kind, which takes latents of 4 channels to RGB."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if family == "wan":
            model: nn.Module = diffusers.AutoencoderKLWan(
                base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
                latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
            )  # fmt: skip
        elif family == "cogvideox":
            model = diffusers.AutoencoderKLCogVideoX(
                block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
                down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            )  # fmt: skip
        else:
            model = diffusers.AutoencoderKL(
                block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                shift_factor=0.0, scaling_factor=1.0,
            )  # fmt: skip
    return model.eval()


def inputs(family: str) -> dict[str, Any]:
    """One call of the transformer."""
    draw = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    time, text = torch.tensor([500.0]), normal(1, 8, 16)
    if family == "wan":
        return {"hidden_states": normal(1, 4, 3, 16, 16), "timestep": time.long(), "encoder_hidden_states": text}
    if family == "cogvideox":
        rotary = (normal(3 * 16, 32), normal(3 * 16, 32))
        return {
            "hidden_states": normal(1, 3, 4, 8, 8), "timestep": time.long(), "encoder_hidden_states": text,
            "image_rotary_emb": rotary,
        }  # fmt: skip
    if family == "sd3":
        return {
            "hidden_states": normal(1, 4, 16, 16), "timestep": time, "encoder_hidden_states": text,
            "pooled_projections": normal(1, 24),
        }  # fmt: skip
    if family == "flux":
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))
        return {
            "hidden_states": normal(1, 64, 16), "timestep": time / 1000, "encoder_hidden_states": text,
            "pooled_projections": normal(1, 24), "guidance": torch.tensor([3.5]), "img_ids": ids,
            "txt_ids": torch.zeros(8, 3),
        }  # fmt: skip
    if family == "pixart":
        return {
            "hidden_states": normal(1, 4, 16, 16), "timestep": time, "encoder_hidden_states": text,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }  # fmt: skip
    return {"hidden_states": normal(1, 4, 16, 16), "timestep": time.long(), "class_labels": torch.tensor([3])}


@torch.no_grad()
def run(model: Any, family: str) -> Tensor:
    """The transformer's output on ``inputs``."""
    out: Tensor = model(**inputs(family), return_dict=False)[0]
    return out


def pipeline(family: str, model: nn.Module) -> Any:
    """The stock pipeline around a transformer, without text encoders: prompts come as embeddings."""
    config = dict(SCHEDULERS[family])
    scheduler = getattr(diffusers, config.pop("_class_name"))(**config)
    parts: dict[str, Any] = {"transformer": model, "vae": vae(family), "scheduler": scheduler}
    if family in {"wan", "cogvideox", "pixart"}:
        parts |= {"tokenizer": None, "text_encoder": None}
    if family == "sd3":
        parts |= {f"{kind}{i}": None for kind in ("tokenizer", "text_encoder") for i in ("", "_2", "_3")}
    if family == "flux":
        parts |= {f"{kind}{i}": None for kind in ("tokenizer", "text_encoder") for i in ("", "_2")}
    name = {
        "wan": "WanPipeline", "cogvideox": "CogVideoXPipeline", "sd3": "StableDiffusion3Pipeline",
        "flux": "FluxPipeline", "pixart": "PixArtAlphaPipeline", "dit": "DiTPipeline",
    }[family]  # fmt: skip
    made = getattr(diffusers, name)(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def stock(family: str, folder: Path) -> Any:
    """The stock pipeline with an export loaded as its model card says."""
    record = read_record(folder)
    if record["weights"] == "lora":
        pipe = pipeline(family, transformer(family))
        pipe.load_lora_weights(folder)
    else:
        cls = getattr(diffusers, PIPELINES[family].transformer)
        pipe = pipeline(family, cls.from_pretrained(folder, subfolder="transformer").eval())
    scheduler = getattr(diffusers, record["scheduler"])
    pipe.scheduler = scheduler.from_pretrained(folder, subfolder="scheduler")
    return pipe
