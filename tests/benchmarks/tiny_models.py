"""The benchmarks' models in a size that a test can afford."""

from __future__ import annotations

import dataclasses

from benchmarks import models


def tiny(name: str, latent: tuple[int, int, int] = (4, 16, 32)) -> models.Model:
    """One layer, two heads, 512 tokens of video and 16 of text by default."""
    model = models.MODELS[name]
    changes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "ffn_dim": 64}
    config = {key: changes.get(key, value) for key, value in model.scaled.config.items()}
    return dataclasses.replace(model, scaled=models.Size(config, latent, 16))
