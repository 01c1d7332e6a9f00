"""Clips to look at while the training goes on: the same prompts and the same noise each time."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blade_compile.distill import clips
from blade_compile.distill.adapters import Adapter
from blade_compile.distill.config import RunConfig
from blade_compile.distill.decoder import Decoder
from blade_compile.distill.embeddings import Embeddings, ParquetEmbeddings
from blade_compile.distill.matching import Draws, Matching
from blade_compile.distill.pipelines import PIPELINES

_CLIPS = 4
_log = logging.getLogger(__name__)


class Preview:
    """Samples of the student, on its own steps."""

    def __init__(
        self,
        config: RunConfig,
        adapter: Adapter,
        embeddings: Embeddings | ParquetEmbeddings,
        device: torch.device,
    ) -> None:
        self.config, self.device = config, device
        self._decoder = Decoder(config, adapter, device)
        self.possible = self._decoder.possible
        # a whole batch, as in the training: another size would be compiled anew
        numbers = [i % len(embeddings) for i in range(config.loop.batch_size)]
        self._shown = min(_CLIPS, len(embeddings), len(numbers))
        self._prompts = [embeddings.text(i) for i in numbers]
        self._stored = embeddings.batch(numbers)
        self._condition: Mapping[str, Any] = to_device(adapter.conditions(self._stored, config.latent), device)
        shape = adapter.latent_shape(config.latent, len(numbers))
        self._draws = Draws(config.seed, 0, range(len(numbers)), device)
        self._start = self._draws.normal(shape[1:], "preview")
        self._video = len(shape) == 5 or (adapter.family in PIPELINES and PIPELINES[adapter.family].video)
        self._fps = PIPELINES[adapter.family].fps if adapter.family in PIPELINES else 0

    def make(self, matching: Matching) -> Tensor:
        """Latents of the last step ``[B, ...]``; with sharded models all ranks have to call this."""
        fresh = self._draws if matching.method.eta == 0 else None  # as the exported scheduler does
        return matching.roll_out(self._start, self._condition, fresh).end

    def write(self, latents: Tensor, folder: Path) -> list[Path]:
        """Write the first few as clips, and ``prompts.json``. Failing is no reason to end a training: it is logged."""
        try:
            embeddings = {name: tensor[: self._shown] for name, tensor in self._stored.items()}
            frames = self._decoder(latents[: self._shown], embeddings)
            suffix = clips.suffix_for(self._video)
            paths = [folder / f"{clips.slug(text)}-{i}{suffix}" for i, text in enumerate(self._prompts[: self._shown])]
            for made, path in zip(frames, paths):
                clips.write(made, path, self._fps or 8)
            entries = [{"file": path.name, "prompt": text} for path, text in zip(paths, self._prompts)]
            (folder / "prompts.json").write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", "utf-8")
        except Exception as error:  # noqa: BLE001 - a VAE without memory, a full disk: the checkpoints say so when they have to
            _log.warning("no samples in %s: %s", folder, " ".join(str(error).split()) or type(error).__name__)
            return []
        return paths


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in any nesting, moved."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: to_device(item, device) for name, item in value.items()}
    return type(value)(to_device(item, device) for item in value) if isinstance(value, (tuple, list)) else value
