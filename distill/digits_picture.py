"""Clips of the digits experiment to look at: a sheet of film strips, and one GIF for each arm."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from blade_compile.distill.clips import write as write_clip
from blade_compile.distill.digits_rows import write
from blade_compile.distill.errors import DataError

SHOWN = 10
"clips kept of each arm: classes 0 to 9, the first ones sampled, not chosen"
STRIPS = (2, 5, 8)
"which of them are on the sheet"
_SCALE, _MARGIN, _LABEL = 3, 6, 330  # pixels


def to_grey(clips: Tensor) -> Tensor:
    """Clips in [-1, 1] ``[B, 1, T, H, W]`` as bytes ``[B, T, H, W]``."""
    return ((clips[:, 0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def strips(grey: Tensor) -> Tensor:
    """Clips as film strips side by side: uint8 ``[B, T, H, W]`` to ``[H', W']``."""
    big = grey.repeat_interleave(_SCALE, 2).repeat_interleave(_SCALE, 3)
    frames = torch.nn.functional.pad(big, (0, 1, 0, 0), value=90)  # a line between frames
    rows = torch.nn.functional.pad(frames.transpose(1, 2).flatten(2), (0, 2 * _MARGIN), value=255)
    return rows.transpose(0, 1).flatten(1)


def sheet(clips: Mapping[str, Tensor], path: Path) -> None:
    """One row for each model: its title and a few clips as film strips, all from the same noise.

    Args:
        clips: title to bytes ``[B, T, H, W]`` of classes 0, 1, ..
        path: PNG.
    """
    from PIL import Image, ImageDraw, ImageFont

    drawn = {title: strips(grey[[i for i in STRIPS if i < len(grey)]]) for title, grey in clips.items()}
    if not drawn:
        raise DataError("there are no clips to draw; sample some first")
    height = max(len(one) for one in drawn.values()) + _MARGIN
    width = _LABEL + max(one.shape[1] for one in drawn.values())
    picture = Image.new("L", (width, height * len(drawn) + _MARGIN), 255)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for row, (title, one) in enumerate(drawn.items()):
        top = _MARGIN + row * height
        pen.text((_MARGIN, top + one.shape[0] // 2), title, fill=0, font=font, anchor="lm")
        picture.paste(Image.fromarray(one.numpy()), (_LABEL, top))
    held = io.BytesIO()
    picture.save(held, format="PNG", optimize=True)
    write(path, held.getvalue())


def animate(grey: Tensor, path: Path, fps: int = 6) -> None:
    """Clips side by side as one GIF.

    Args:
        grey: bytes ``[B, T, H, W]``.
        path: GIF.
        fps: frames per second.
    """
    big = torch.nn.functional.pad(grey.repeat_interleave(4, 2).repeat_interleave(4, 3), (0, 4), value=90)
    write_clip(big.permute(1, 2, 0, 3).flatten(2)[..., None], path, fps)


def keep(grey: Tensor, path: Path) -> None:
    """Keep an arm's first clips."""
    bundle({"clips": grey[:SHOWN]}, path)


def kept(paths: Mapping[str, Path]) -> dict[str, Tensor]:
    """Clips that ``keep`` wrote, of those of the given files that are there."""
    return {name: load_file(path)["clips"] for name, path in paths.items() if path.is_file()}


def bundle(clips: Mapping[str, Tensor], path: Path) -> None:
    """Clips of several models in one file."""
    write(path, save({name: grey.contiguous() for name, grey in clips.items()}))


def unbundle(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Clips of ``bundle`` in the order of the names; none where there is no file."""
    found = load_file(path) if path.is_file() else {}
    return {name: found[name] for name in names if name in found}
