"""The benchmarks' models in a size that a test can afford."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import models


def tiny(name: str, latent: tuple[int, int, int] = (4, 16, 32)) -> models.Model:
    """One layer, two heads, 512 tokens of video and 16 of text by default."""
    model = models.MODELS[name]
    changes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "ffn_dim": 64}
    config = {key: changes.get(key, value) for key, value in model.scaled.config.items()}
    return dataclasses.replace(model, scaled=models.Size(config, latent, 16))


class Layer(nn.Module):
    """Self-attention of two heads that is a small part of the output, as with random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, hidden_states: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        q, k, v = (x.unflatten(-1, (2, 32)).transpose(1, 2) for x in self.qkv(hidden_states).chunk(3, -1))
        attended = F.scaled_dot_product_attention(4 * q, 4 * k, v)
        return (hidden_states + 0.01 * attended.transpose(1, 2).flatten(2),)


class ToyModel(models.Model):
    """One such layer on 512 tokens: what a test can trace in no time."""

    def build(self, size: models.Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return Layer().to(device, dtype).requires_grad_(False)


def toy() -> ToyModel:
    """The model of one layer."""
    size = models.Size({"num_attention_heads": 2, "attention_head_dim": 32}, (1, 16, 32), 0)
    inputs = lambda model, size, normal: {"hidden_states": normal(1, 512, 64)}  # noqa: E731
    return ToyModel("toy", "Layer", {}, size, size, lambda size: 512, inputs)
