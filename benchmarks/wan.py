"""Wan video transformers with random weights: the real class of diffusers, in the sizes that the measurements use."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
# Heads, width and tokens a third of Wan2.1-1.3B's: attention is to the linear layers as it is there (4 S : 35 width).
WAN_THIRD = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 2992, "num_layers": 4}
WAN_TINY = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 1504, "num_layers": 4}
COMMON = {
    "patch_size": (1, 2, 2),
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}


def _quiet_imports() -> None:
    """Messages of libraries about their own optional parts would drown the output."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # diffusers sets its logger's level from it on import
    for name in ("torchao", "torch.utils._pytree", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Case:
    """A model and the video that it is run on."""

    model: dict[str, int]
    frames: int
    "of the video; the latent has a quarter, rounded up"
    height: int
    width: int
    "pixels; the latent has an eighth, a token is 2 x 2 of these"
    text: int = 512
    "text tokens"

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens in time, height and width."""
        return (self.frames - 1) // 4 + 1, self.height // 16, self.width // 16

    @property
    def tokens(self) -> int:
        """Video tokens: the length of self-attention."""
        t, h, w = self.grid
        return t * h * w

    def build(self, dtype: torch.dtype, device: str) -> nn.Module:
        """The transformer in evaluation mode; random weights, the same at every call.

        As ``from_pretrained(torch_dtype=...)`` does, the class's ``_keep_in_fp32_modules`` stay in fp32.
        """
        _quiet_imports()
        from diffusers import WanTransformer3DModel

        torch.manual_seed(0)
        model: nn.Module = WanTransformer3DModel(**COMMON, **self.model).eval().requires_grad_(False)
        exact = set(WanTransformer3DModel._keep_in_fp32_modules)
        for name, parameter in model.named_parameters():
            if exact.isdisjoint(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return model.to(device)

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        """Latent video, timestep and text embedding, as a pipeline passes them."""
        t, h, w = self.grid
        generator = torch.Generator().manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)  # noqa: E731
        video: Tensor = normal(1, COMMON["in_channels"], t, 2 * h, 2 * w)
        text = normal(1, self.text, COMMON["text_dim"])
        timestep = torch.tensor([500], device=device)
        return {"hidden_states": video, "timestep": timestep, "encoder_hidden_states": text, "return_dict": False}

    def describe(self) -> list[str]:
        """The sizes, for the first lines of an output."""
        heads, dim, layers = (self.model[k] for k in ("num_attention_heads", "attention_head_dim", "num_layers"))
        width, ffn = heads * dim, self.model["ffn_dim"]
        ratio = f"{ffn / width:.2f} x width, Wan2.1: {8960 / 1536:.2f}"
        return [
            f"diffusers WanTransformer3DModel, {layers} layers, {heads} heads of {dim}, feed-forward {ffn:,} ({ratio})",
            f"{self.frames} frames of {self.width} x {self.height}: {self.tokens:,} video, {self.text} text tokens",
        ]


REAL = Case(WAN_1_3B, frames=81, height=480, width=832)  # 32,760 tokens
THIRD = Case(WAN_THIRD, frames=25, height=480, width=832)  # 10,920 tokens
SMALL = Case(WAN_THIRD, frames=21, height=320, width=688)  # 5,160 tokens: for a glance
TINY = Case(WAN_TINY, frames=9, height=384, width=512, text=64)  # 2,304 tokens: for compile times
