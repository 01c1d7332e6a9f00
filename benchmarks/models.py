"""The transformers that the measurements run: real classes of diffusers with random weights, in published sizes and in
sizes that a CPU can step through in seconds.

A scaled size keeps the head dimension, the text's share of the tokens, and attention's share of the FLOPs to within two
points, which is what a step can gain from sparse attention; layers, heads and tokens are fewer. Every report says which
one ran.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import wan

Inputs = dict[str, Any]
LAYERS = ("num_layers", "num_single_layers")


@dataclass(frozen=True)
class Size:
    """Constructor arguments that differ between the sizes, and the latent: (frames, height, width) and text tokens."""

    config: dict[str, Any]
    latent: tuple[int, int, int]
    text: int


@dataclass(frozen=True)
class Model:
    """A class of diffusers in two sizes."""

    name: str
    cls: str
    common: dict[str, Any]
    published: Size
    scaled: Size
    tokens: Callable[[Size], int]
    "keys of its self-attention, text included"
    make_inputs: Callable[[Model, Size, Callable[..., Tensor]], Inputs]
    visible: Callable[[Size], int] | None = None
    "keys that its attention's mask lets through, the first ones; None: it has no mask"

    def size(self, device: torch.device) -> Size:
        """The published size on a GPU, the scaled one elsewhere."""
        return self.published if device.type == "cuda" else self.scaled

    def shallow(self) -> Model:
        """The same with at most two layers of each kind: what an exact check can afford at the published shapes."""
        few = lambda size: {k: min(2, n) if k in LAYERS else n for k, n in size.config.items()}  # noqa: E731
        published, scaled = (dataclasses.replace(s, config=few(s)) for s in (self.published, self.scaled))
        return dataclasses.replace(self, published=published, scaled=scaled)

    def build(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
        """In evaluation mode; random weights, the same at every call with a seed."""
        wan._quiet_imports()
        import diffusers

        torch.manual_seed(seed)
        with torch.device(device):
            model: nn.Module = getattr(diffusers, self.cls)(**self.common, **size.config)
        exact = set(getattr(type(model), "_keep_in_fp32_modules", None) or ())
        for name, parameter in model.named_parameters():
            if exact.isdisjoint(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return model.eval().requires_grad_(False)

    def inputs(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Keyword arguments as a pipeline passes them."""
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
        return {**self.make_inputs(self, size, normal), "return_dict": False}

    def describe(self, size: Size) -> str:
        """One line on what runs."""
        which = "published size" if size is self.published else "scaled down"
        layers = ", ".join(f"{key} {value}" for key, value in size.config.items())
        return f"{self.cls}, {which}: {layers}; {self.tokens(size):,} tokens in self-attention"


def _wan_inputs(model: Model, size: Size, normal: Callable[..., Tensor]) -> Inputs:
    t, h, w = size.latent
    video = normal(1, 16, t, h, w)
    return {"hidden_states": video, "timestep": _step(video), "encoder_hidden_states": normal(1, size.text, 4096)}


def _cogvideox_inputs(model: Model, size: Size, normal: Callable[..., Tensor]) -> Inputs:
    t, h, w = size.latent
    video = normal(1, t, 16, h, w)
    angles = torch.outer(torch.arange(t * h * w // 4).float(), torch.logspace(0, -4, 32))
    rotary = tuple(f(angles).repeat_interleave(2, 1).to(video.device) for f in (torch.cos, torch.sin))
    text = normal(1, size.text, 4096)
    return {
        "hidden_states": video,
        "timestep": _step(video),
        "encoder_hidden_states": text,
        "image_rotary_emb": rotary,
    }


def _hunyuan_video_inputs(model: Model, size: Size, normal: Callable[..., Tensor]) -> Inputs:
    t, h, w = size.latent
    video = normal(1, 16, t, h, w)
    mask = torch.ones(1, size.text, device=video.device, dtype=torch.bool)
    mask[:, _half_the_text(size) :] = False  # prompts rarely fill the window
    return {
        "hidden_states": video,
        "timestep": _step(video),
        "encoder_hidden_states": normal(1, size.text, 4096),
        "encoder_attention_mask": mask,
        "pooled_projections": normal(1, 768),
        "guidance": torch.full((1,), 6000.0, device=video.device, dtype=video.dtype),
    }


def _flux_inputs(model: Model, size: Size, normal: Callable[..., Tensor]) -> Inputs:
    _, h, w = size.latent
    image = normal(1, h * w, 64)
    ids = torch.zeros(h, w, 3, device=image.device)
    ids[..., 1] += torch.arange(h, device=image.device)[:, None]
    ids[..., 2] += torch.arange(w, device=image.device)
    return {
        "hidden_states": image,
        "timestep": torch.full((1,), 0.5, device=image.device, dtype=image.dtype),
        "guidance": torch.full((1,), 3.5, device=image.device),
        "pooled_projections": normal(1, 768),
        "encoder_hidden_states": normal(1, size.text, 4096),
        "txt_ids": torch.zeros(size.text, 3, device=image.device),
        "img_ids": ids.flatten(0, 1),
    }


def _sd3_inputs(model: Model, size: Size, normal: Callable[..., Tensor]) -> Inputs:
    _, h, w = size.latent
    image = normal(1, 16, h, w)
    return {
        "hidden_states": image,
        "timestep": _step(image),
        "encoder_hidden_states": normal(1, size.text, 4096),
        "pooled_projections": normal(1, 2048),
    }


def _pixart_inputs(model: Model, size: Size, normal: Callable[..., Tensor]) -> Inputs:
    _, h, w = size.latent
    image = normal(1, 4, h, w)
    return {
        "hidden_states": image,
        "timestep": _step(image),
        "encoder_hidden_states": normal(1, size.text, 4096),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _step(like: Tensor) -> Tensor:
    return torch.full((1,), 500, device=like.device)


def _patched(size: Size) -> int:
    """Tokens of a latent cut into patches of 1 x 2 x 2."""
    t, h, w = size.latent
    return t * (h // 2) * (w // 2)


def _patched_and_text(size: Size) -> int:
    return _patched(size) + size.text


def _half_the_text(size: Size) -> int:
    return size.text // 2


def _packed_and_text(size: Size) -> int:
    return size.latent[1] * size.latent[2] + size.text


_heads = lambda layers, heads, **more: {"num_layers": layers, "num_attention_heads": heads, **more}  # noqa: E731

MODELS = {
    model.name: model
    for model in (
        Model(
            "wan2.1-1.3b",
            "WanTransformer3DModel",
            {**wan.COMMON, "attention_head_dim": 128},
            Size(_heads(30, 12, ffn_dim=8960), (21, 60, 104), 512),
            Size(_heads(2, 3, ffn_dim=2240), (21, 30, 52), 128),
            _patched,
            _wan_inputs,
        ),
        Model(
            "wan2.1-14b",
            "WanTransformer3DModel",
            {**wan.COMMON, "attention_head_dim": 128},
            Size(_heads(40, 40, ffn_dim=13824), (21, 90, 160), 512),
            Size(_heads(1, 6, ffn_dim=2080), (21, 36, 60), 76),
            _patched,
            _wan_inputs,
        ),
        Model(
            "cogvideox-5b",
            "CogVideoXTransformer3DModel",
            {"attention_head_dim": 64, "text_embed_dim": 4096, "use_rotary_positional_embeddings": True},
            Size(_heads(42, 48), (13, 60, 90), 226),
            Size(_heads(2, 12), (13, 36, 36), 56),
            _patched_and_text,
            _cogvideox_inputs,
        ),
        Model(
            "hunyuanvideo",
            "HunyuanVideoTransformer3DModel",
            {"attention_head_dim": 128, "guidance_embeds": True},
            Size({"num_layers": 20, "num_single_layers": 40, "num_attention_heads": 24}, (33, 90, 160), 256),
            Size({"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 3}, (33, 30, 60), 32),
            _patched_and_text,
            _hunyuan_video_inputs,
            visible=lambda size: _patched(size) + _half_the_text(size),
        ),
        Model(
            "flux-dev",
            "FluxTransformer2DModel",
            {"attention_head_dim": 128, "guidance_embeds": True},
            Size({"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}, (1, 64, 64), 512),
            Size({"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 12}, (1, 32, 64), 256),
            _packed_and_text,
            _flux_inputs,
        ),
        Model(
            "sd3.5-medium",
            "SD3Transformer2DModel",
            {
                "attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
                "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 384, "sample_size": 128,
                "qk_norm": "rms_norm",
            },
            Size(_heads(24, 24, caption_projection_dim=1536, dual_attention_layers=(*range(13),)), (1, 128, 128), 333),
            Size(_heads(2, 16, caption_projection_dim=1024, dual_attention_layers=(0,)), (1, 104, 104), 222),
            _patched_and_text,
            _sd3_inputs,
        ),
        Model(
            "pixart-alpha",
            "PixArtTransformer2DModel",
            {
                "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "sample_size": 128,
                "caption_channels": 4096, "use_additional_conditions": False,
            },
            Size(_heads(28, 16, cross_attention_dim=1152), (1, 128, 128), 120),
            Size(_heads(2, 16, cross_attention_dim=1152), (1, 128, 128), 120),
            _patched,
            _pixart_inputs,
        ),
    )
}  # fmt: skip
