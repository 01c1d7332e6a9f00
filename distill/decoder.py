"""Latents as frames, without a text encoder or a transformer in memory.

Every family decodes in its own way (scales, packing, frames first or last), at the end of its pipeline's ``__call__``.
So that is what runs: the stock pipeline around the folder's VAE, for one step of a scheduler that hands over the
latents, with a transformer that computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blade_compile.distill import clips
from blade_compile.distill.adapters import Adapter, load_model
from blade_compile.distill.config import RunConfig
from blade_compile.distill.model_files import ModelFiles
from blade_compile.distill.pipelines import PIPELINES, classes


class _Step(NamedTuple):
    """What any scheduler's step may return."""

    prev_sample: Any
    pred_original_sample: Any


class _Output(NamedTuple):
    sample: Tensor


class _NoTransformer(nn.Module):
    """Has a transformer's configuration and returns its input, in as many channels as asked for."""

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, device
        self.unused = nn.Parameter(torch.zeros(1, dtype=dtype, device=device), requires_grad=False)

    def cache_context(self, name: str, **given: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def forward(self, hidden_states: Tensor, *_: Any, **given: Any) -> _Output:
        ratio = (self.config.get("out_channels") or 0) // self.config["in_channels"]
        return _Output(torch.cat([hidden_states] * max(ratio, 1), dim=1))


class Decoder:
    """Makes frames of latents. The VAE is loaded with the first of them."""

    def __init__(self, config: RunConfig, adapter: Adapter, device: torch.device) -> None:
        self.config, self.adapter, self.device = config, adapter, device
        self._pipe: Any = None

    @property
    def possible(self) -> bool:
        """Whether latents can become frames: pixels of a factory's model, or a folder with a VAE."""
        if self.config.model.path is None:
            shape = self.adapter.latent_shape(self.config.latent, 1)
            return len(shape) in {4, 5} and shape[1] in {1, 3}
        _, vae = self.adapter.pipeline.get("vae") or (None, None)  # [null, null] where a folder was saved without
        return self.adapter.family in PIPELINES and vae is not None

    @torch.no_grad()
    def __call__(self, latents: Tensor, embeddings: Mapping[str, Tensor]) -> list[Tensor]:
        """Decode one by one.

        Args:
            latents: of the last step, ``[B, ...]`` in the adapter's layout.
            embeddings: of the prompts, as stored ``[B, ...]``: the pipelines want some.

        Returns:
            B times uint8 ``[T, H, W, C]``.
        """
        if self.config.model.path is None:
            return list(pixels(latents))
        rows = ({name: tensor[i : i + 1] for name, tensor in embeddings.items()} for i in range(len(latents)))
        self._load()
        self._pipe.vae.to(self.device)
        made = [self._one(latents[i : i + 1], row) for i, row in enumerate(rows)]
        self._pipe.vae.to("cpu")  # the training needs the room
        return made

    def _load(self) -> None:
        if self._pipe is not None:
            return
        import diffusers

        model = self.config.model
        files = ModelFiles(str(model.path), model.revision)
        index = {name: value for name, value in self.adapter.pipeline.items() if not name.startswith("_")}
        parts: dict[str, Any] = {name: None if isinstance(value, list) else value for name, value in index.items()}
        dtype = getattr(torch, model.dtype)
        parts["vae"] = getattr(diffusers, index["vae"][1]).from_pretrained(
            files.location, subfolder="vae", revision=model.revision, torch_dtype=dtype
        )
        kind: Any = getattr(diffusers, str(self.adapter.scheduler["_class_name"]))
        parts["scheduler"] = kind.from_config(dict(self.adapter.scheduler))
        shell: Any = load_model(model, meta=True)[0]
        parts["transformer"] = _NoTransformer(shell.config, dtype, self.device)
        self._pipe = classes(PIPELINES[self.adapter.family])[0](**parts)
        self._pipe.set_progress_bar_config(disable=True)

    def _one(self, latents: Tensor, embeddings: Mapping[str, Tensor]) -> Tensor:
        latent, family = self.config.latent, PIPELINES[self.adapter.family]
        given: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "np"}
        if family.name == "dit":
            given["class_labels"] = embeddings["class_labels"].tolist()
        else:
            given |= {name: tensor.to(self.device) for name, tensor in embeddings.items()}
            given |= {"height": latent.height, "width": latent.width, "latents": latents.to(self.device)}
        if family.video:
            given["num_frames"] = latent.num_frames
        if family.name == "pixart":
            given |= {"use_resolution_binning": False, "negative_prompt": None}
        pipe = self._pipe
        ready = latents.to(self.device, pipe.vae.dtype)
        pipe.scheduler.step = lambda *_, **__: _Step(ready, ready)
        try:
            out = pipe(**given)
        finally:
            del pipe.scheduler.step  # the class's own again
        return clips.to_bytes(torch.as_tensor(out.frames[0] if family.video else out.images))


def pixels(clip: Tensor) -> Tensor:
    """Clips ``[B, C, T, H, W]`` or images ``[B, C, H, W]`` in [-1, 1] as uint8 ``[B, T, H, W, C]``."""
    if clip.dim() == 4:
        clip = clip.unsqueeze(2)
    return clips.to_bytes((clip.permute(0, 2, 3, 4, 1) + 1) / 2)
