"""Latents decoded as each family's own pipeline decodes them, without its transformer and text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blade_compile.distill import clips
from blade_compile.distill.adapters import load_adapter
from blade_compile.distill.config import resolve
from blade_compile.distill.decoder import Decoder, pixels
from tests.distill.tiny_families import pipeline, transformer

VIDEO = {"num_frames": 9, "height": 64, "width": 64}
IMAGE = {"num_frames": 1, "height": 128, "width": 128}
SIZES = {"wan": VIDEO, "cogvideox": VIDEO, "sd3": IMAGE, "flux": IMAGE, "pixart": IMAGE, "dit": IMAGE}


def _embeddings(family: str) -> dict[str, Tensor]:
    if family == "dit":
        return {"class_labels": torch.tensor([3, 4])}
    made = {"prompt_embeds": torch.randn(2, 8, 16)}
    if family in {"sd3", "flux"}:
        made["pooled_prompt_embeds"] = torch.randn(2, 24)
    return made | ({"prompt_attention_mask": torch.ones(2, 8)} if family == "pixart" else {})


def _sample(family: str, pipe: Any, kind: str, row: dict[str, Tensor]) -> Any:
    """One sample of the whole pipeline, as frames or as latents."""
    given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": kind}
    given["generator"] = torch.Generator().manual_seed(1)
    if family == "dit":
        return pipe(class_labels=row["class_labels"].tolist(), **given).images
    size = dict(SIZES[family])
    if size["num_frames"] == 1:
        del size["num_frames"]
    more = {"use_resolution_binning": False, "negative_prompt": None} if family == "pixart" else {}
    out = pipe(**given, **row, **size, **more)
    return out.frames if "num_frames" in size else out.images


@pytest.mark.parametrize("family", SIZES)
def test_frames_are_the_pipelines(family: str, tmp_path: Path) -> None:
    pipe = pipeline(family, transformer(family))
    pipe.save_pretrained(tmp_path)
    config = resolve(
        {"model": {"path": str(tmp_path), "dtype": "float32"}, "data": {"prompts": "unused"}, "latent": SIZES[family]}
    )
    decoder = Decoder(config, load_adapter(config.model), torch.device("cpu"))
    assert decoder.possible
    stored = _embeddings(family)
    rows = [{name: tensor[i : i + 1] for name, tensor in stored.items()} for i in range(2)]
    wanted, latents = [], []
    for row in rows:
        if family == "dit":  # it returns no latents: take what its VAE is given
            seen: list[Tensor] = []
            decode, scale = pipe.vae.decode, pipe.vae.config.scaling_factor
            pipe.vae.decode = lambda z: seen.append(z * scale) or decode(z)  # noqa: B023
            wanted.append(_sample(family, pipe, "np", row))
            latents.append(seen[0])
            pipe.vae.decode = decode
        else:
            wanted.append(_sample(family, pipe, "np", row))
            latents.append(torch.as_tensor(_sample(family, pipe, "latent", row)))
    for made, frames in zip(decoder(torch.cat(latents), stored), wanted, strict=True):
        expected = clips.to_bytes(torch.as_tensor(frames[0] if SIZES[family] is VIDEO else frames))
        assert made.shape == expected.shape and expected.float().std() > 1
        assert int((made.int() - expected.int()).abs().max()) <= 1  # a pixel may be rounded otherwise


def test_a_folder_without_a_vae_has_no_frames(tmp_path: Path) -> None:
    pipe = pipeline("sd3", transformer("sd3"))
    pipe.register_modules(vae=None)
    pipe.save_pretrained(tmp_path)
    config = resolve({"model": {"path": str(tmp_path)}, "data": {"prompts": "unused"}, "latent": IMAGE})
    assert not Decoder(config, load_adapter(config.model), torch.device("cpu")).possible


@pytest.mark.parametrize("shape", [(2, 1, 3, 4, 5), (2, 3, 4, 5)])
def test_pixels(shape: tuple[int, ...]) -> None:
    clip = torch.linspace(-1.2, 1.2, torch.Size(shape).numel()).view(shape)
    made = pixels(clip)
    frames = shape[2] if len(shape) == 5 else 1
    assert made.shape == (2, frames, 4, 5, shape[1]) and made.dtype == torch.uint8
    assert made[0, 0, 0, 0, 0] == 0 and made[-1, -1, -1, -1, -1] == 255
