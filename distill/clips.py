"""Write clips and images: mp4 where imageio with ffmpeg is installed, else GIF; PNG for single images."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blade_compile.distill.errors import ConfigError, DataError

INSTALL_VIDEO = "pip install imageio imageio-ffmpeg"


def has_mp4() -> bool:
    """True where mp4 can be written."""
    return all(find_spec(name) is not None for name in ("imageio", "imageio_ffmpeg"))


def to_bytes(frames: Tensor) -> Tensor:
    """Frames in [0, 1] of any float dtype as uint8, rounded; NaN becomes black."""
    if frames.dtype == torch.uint8:
        return frames
    return (frames.float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)


def slug(prompt: str, length: int = 60) -> str:
    """A prompt as part of a file name: lower-case letters, digits and hyphens."""
    words = re.sub(r"[^\w]+", "-", prompt.lower(), flags=re.UNICODE).strip("-_")
    return words[:length].rstrip("-") or "empty"


def suffix_for(video: bool, wanted: str | None = None) -> str:
    """The file suffix that can be written here: ``.mp4`` or ``.gif`` for clips, ``.png`` for images.

    Raises:
        ConfigError: mp4 is asked for and can't be written, or the suffix is none of these.
    """
    if wanted is None:
        return (".mp4" if has_mp4() else ".gif") if video else ".png"
    valid = (".mp4", ".gif") if video else (".png",)
    if wanted not in valid:
        raise ConfigError(f"suffix is {wanted!r}: use {' or '.join(valid)}")
    if wanted == ".mp4" and not has_mp4():
        raise ConfigError(f"mp4 can't be written here; {INSTALL_VIDEO}, or use .gif")
    return wanted


def write(frames: Tensor, path: Path, fps: int = 8) -> None:
    """Write one clip or image; the file is written beside and renamed.

    Args:
        frames: ``[T, H, W, C]`` with C = 1 or 3, uint8 or in [0, 1].
        path: its suffix decides the format; for ``.png`` T is 1.
        fps: frames per second of a clip.

    Raises:
        DataError: the folder can't be written.
    """
    data = to_bytes(frames).cpu().numpy()
    if data.shape[-1] == 1:
        data = np.repeat(data, 3, axis=-1)
    beside = path.with_name(f".writing{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _encode(data, beside, fps)
        beside.replace(path)
    except OSError as error:
        raise DataError(f"can't write {path}: {error.strerror or error}; free space or give another folder") from error
    finally:
        beside.unlink(missing_ok=True)


def _encode(data: np.ndarray, path: Path, fps: int) -> None:
    if path.suffix == ".mp4":
        import imageio.v2

        even = data[:, : data.shape[1] // 2 * 2, : data.shape[2] // 2 * 2]  # yuv420p has no odd sizes
        imageio.v2.mimwrite(path, list(even), fps=fps, codec="libx264", quality=8, macro_block_size=1)
        return
    from PIL import Image

    images = [Image.fromarray(frame) for frame in data]
    if path.suffix == ".gif":
        images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    else:
        images[0].save(path)
