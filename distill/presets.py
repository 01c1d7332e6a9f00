"""Published configurations of distillation runs, each value with its source; ours where nothing is published.

BLADE's are those of its released training scripts, TDM's of its paper (appendix D) and of its released demo for
PixArt-alpha. A value without a preset's entry is the field's default.
"""

from __future__ import annotations

from typing import Any

BLADE = "BLADE's script"
PAPER = "TDM, appendix D"
DEMO = "TDM's demo"
RELEASE = "TDM's released LoRA"
MODEL = "the model's own"
OURS = "ours: not published"

_ROUNDING = OURS + "; at the first step, t = 999, x0 is 157 times eps, and bf16 rounds eps to 8 bits; fp16 in the demo"

Preset = dict[str, tuple[Any, str]]
"""Dotted path of a field to its value and the value's source"""

_BLADE_COMMON: Preset = {
    "seed": (42, BLADE),
    "data.negative_prompt": ("", OURS + "; the script guides away from a negative prompt: give its text"),
    "method.steps": (8, BLADE),
    "method.eta": (0.9, BLADE),
    "method.intervals": ("overlapping", BLADE),
    "method.importance_weight": (False, BLADE),
    "method.weighting": ("inverse_variance", BLADE),
    "method.penalty": ("pseudo_huber", BLADE),
    "method.tau_min": (0.02, OURS + "; the script's 0 puts tau at the clean end"),
    "method.tau_max": (0.98, BLADE),
    "method.critic_updates": (1, BLADE),
    "sparsity.policy": ("asa_g", BLADE),
    "sparsity.block_size": (128, BLADE),
    "sparsity.order": ("gilbert", BLADE),
    "sparsity.tau": (0.95, BLADE + "; max_keep is what decides"),
    "sparsity.critic_sparse": (True, BLADE + "; dense in the paper"),
    "lora.rank": (64, BLADE),
    "lora.alpha": (64.0, BLADE),
    "lora.targets": (["to_q", "to_k", "to_v", "to_out.0"], BLADE),
    "optimizer.student.learning_rate": (1e-4, BLADE),
    "optimizer.student.warmup_steps": (5, BLADE),
    "optimizer.student.schedule": ("cosine", BLADE),
    "optimizer.critic.learning_rate": (5e-4, BLADE),
    "optimizer.betas": ([0.0, 0.95], BLADE),
    "optimizer.weight_decay": (1e-4, BLADE),
    "optimizer.clip": (1.0, BLADE),
    "ema.decay": (None, BLADE),
    "loop.max_steps": (300, BLADE + "; 100 to 200 in the paper"),
    "loop.batch_size": (5, BLADE),
    "loop.grad_accumulation": (4, BLADE + "; 80 samples an update on 4 GPUs"),
    "loop.checkpoint_every": (15, BLADE),
    "model.dtype": ("bfloat16", BLADE),
}

_BLADE_MASK = {"min_keep": 0.05, "probe": "sample", "probe_tokens": 32}
"""What blade's own presets of both models share, spelled out: what stands in the section is what runs"""

_TDM_COMMON: Preset = {
    "method.steps": (4, DEMO),
    "method.eta": (1.0, DEMO),
    "method.intervals": ("separate", DEMO),
    "method.importance_weight": (True, DEMO),
    "method.weighting": ("min_snr", DEMO),
    "method.gamma": (5.0, DEMO),
    "method.penalty": ("pseudo_huber", DEMO),
    "method.huber_c": (1e-3, DEMO),
    "method.normaliser": (True, DEMO),
    "method.critic_updates": (1, DEMO),
    "optimizer.betas": ([0.0, 0.95], DEMO + "; 0, 0.999 in the paper"),
    "optimizer.clip": (1.0, DEMO),
}

_IMAGE_SPARSITY: Preset = {
    "sparsity.policy": ("asa", OURS),
    "sparsity.sparsity": (0.75, OURS),
    "sparsity.block_size": (64, OURS),
    "sparsity.order": ("gilbert", OURS),
}

_IMAGE_LORA: Preset = {
    "lora.rank": (64, OURS),
    "lora.alpha": (64.0, OURS),
    "optimizer.student.learning_rate": (1e-4, OURS),
    "optimizer.critic.learning_rate": (5e-4, OURS),
    "loop.max_steps": (1000, OURS),
    "loop.batch_size": (4, OURS),
    "loop.grad_accumulation": (4, OURS),
}

PRESETS: dict[str, Preset] = {
    "digits": {
        "model.factory": ("blade_compile.distill.adapter_digits:build", OURS),
        "model.dtype": ("float32", OURS),
        "parallel.mixed_precision": ("float32", OURS),
        "parallel.activation_checkpointing": (False, OURS),
        "latent.num_frames": (8, OURS),
        "latent.height": (16, OURS),
        "latent.width": (16, OURS),
        **_TDM_COMMON,
        "method.cfg_scale": (2.5, OURS),
        "method.intervals": ("overlapping", BLADE),
        "method.importance_weight": (False, OURS),
        "method.weighting": ("inverse_variance", OURS),
        "method.critic_updates": (2, OURS),
        "method.regression_updates": (60, OURS),
        "sparsity.policy": ("asa", OURS),
        "sparsity.sparsity": (0.75, OURS),
        "sparsity.block_size": (16, OURS),
        "sparsity.blade_options": ({"min_tokens": 1}, OURS),
        "lora": (None, OURS),
        "optimizer.student.learning_rate": (2e-4, OURS),
        "optimizer.critic.learning_rate": (4e-4, OURS),
        "ema.decay": (0.98, OURS),
        "loop.max_steps": (600, OURS),
        "loop.batch_size": (16, OURS),
    },
    "wan2.1-1.3b": {
        **_BLADE_COMMON,
        "model.path": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", BLADE),
        "model.family": ("wan", BLADE),
        "latent.num_frames": (81, BLADE),
        "latent.height": (480, BLADE),
        "latent.width": (832, BLADE),
        "method.cfg_scale": (5.0, BLADE),
        "method.huber_c": (0.0113, BLADE),
        "method.normaliser": (False, BLADE + ": computed and never used"),
        "method.regulariser": (0.0, BLADE),
        "sparsity.blade_options": (
            {**_BLADE_MASK, "max_keep": 0.17, "global_window": 30},
            BLADE + ": density at most 0.17, about 0.80 dropped",
        ),
    },
    "cogvideox-5b": {
        **_BLADE_COMMON,
        "model.path": ("THUDM/CogVideoX-5b", BLADE),
        "model.family": ("cogvideox", BLADE),
        "latent.num_frames": (49, BLADE),
        "latent.height": (480, BLADE),
        "latent.width": (720, BLADE),
        "method.cfg_scale": (3.5, BLADE + "; 6 in the paper"),
        "method.huber_c": (7.4e-9, BLADE),
        "method.normaliser": (True, BLADE),
        "method.normaliser_cap": (5.0, BLADE),
        "method.regulariser": (0.5, BLADE),
        "sparsity.blade_options": (
            {**_BLADE_MASK, "max_keep": 0.10, "global_window": 15},
            BLADE + ": density at most 0.10, about 0.81 dropped",
        ),
    },
    "flux-dev": {
        "model.path": ("black-forest-labs/FLUX.1-dev", OURS),
        "model.family": ("flux", OURS),
        "latent.height": (1024, OURS),
        "latent.width": (1024, OURS),
        **_TDM_COMMON,
        "method.cfg_scale": (1.0, MODEL + ": guidance is an input"),
        "method.embedded_guidance": (3.5, MODEL),
        **_IMAGE_SPARSITY,
        **_IMAGE_LORA,
    },
    "sd3.5-medium": {
        "model.path": ("stabilityai/stable-diffusion-3.5-medium", OURS),
        "model.family": ("sd3", OURS),
        "latent.height": (1024, OURS),
        "latent.width": (1024, OURS),
        **_TDM_COMMON,
        "method.steps": (4, RELEASE),
        "method.cfg_scale": (4.5, MODEL),
        **_IMAGE_SPARSITY,
        **_IMAGE_LORA,
    },
    "pixart-alpha": {
        "model.path": ("PixArt-alpha/PixArt-XL-2-512x512", DEMO),
        "model.family": ("pixart", DEMO),
        "model.dtype": ("float32", _ROUNDING),
        "parallel.mixed_precision": ("float32", _ROUNDING),
        "latent.height": (512, DEMO),
        "latent.width": (512, DEMO),
        **_TDM_COMMON,
        "method.cfg_scale": (3.5, PAPER + "; 4.5 in the demo"),
        "sparsity.policy": ("asa", OURS),
        "sparsity.sparsity": (0.75, OURS),
        "sparsity.block_size": (32, OURS),
        "sparsity.blade_options": ({"min_tokens": 1}, OURS + ": 1,024 tokens"),
        "lora": (None, DEMO),
        "optimizer.student.learning_rate": (2e-6, PAPER),
        "optimizer.student.warmup_steps": (50, DEMO),
        "optimizer.student.schedule": ("cosine", DEMO),
        "optimizer.critic.learning_rate": (2e-5, PAPER),
        "optimizer.weight_decay": (1e-2, DEMO),
        "loop.max_steps": (500, PAPER),
        "loop.batch_size": (16, PAPER + ": 32 samples an update"),
        "loop.grad_accumulation": (2, PAPER + ": 32 samples an update"),
    },
}


def values(name: str) -> dict[str, Any]:
    """A preset as nested sections."""
    nested: dict[str, Any] = {}
    for path, (value, _) in PRESETS[name].items():
        *parents, last = path.split(".")
        here = nested
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    return nested


def source(name: str, path: str, value: Any) -> str | None:
    """Where a field's value comes from; None where it isn't the preset's, or the preset leaves it at its default."""
    entry = PRESETS[name].get(path)
    return entry[1] if entry is not None and entry[0] == value else None
