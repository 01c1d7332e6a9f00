"""Clips of moving, bouncing handwritten digits: real pixels, synthetic motion, three splits that share no digit.

The digits are the 1,797 of scikit-learn's ``load_digits`` (E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, doi 10.24432/C50P49, CC BY 4.0), stored beside this file as
8 x 8 images of 17 grey levels, so that nothing has to be installed or fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

Split = Literal["teacher", "judge", "held_out"]

NUM_CLASSES = 10
DIGIT_SIZE = 8
DIGITS_FILE = Path(__file__).parent / "digits" / "handwritten.safetensors"
_SPLIT_SIZES = {"teacher": 850, "judge": 650, "held_out": 297}
_SPLIT_SEED = 20_260_101


@dataclass(frozen=True, kw_only=True)
class ClipSpec:
    """The canvas and the motion of the clips.

    Raises ``ValueError`` where a digit doesn't fit on the canvas or a speed would jump over it.
    """

    frames: int = 8
    "frames of a clip, T"
    size: int = 16
    "height and width of a frame, H = W"
    speeds: tuple[int, ...] = (1,)
    "pixels per frame along each axis, drawn uniformly; the sign is random"

    def __post_init__(self) -> None:
        room = self.size - DIGIT_SIZE
        if room < 1:
            raise ValueError(f"size is {self.size}: a digit needs {DIGIT_SIZE} pixels and room to move; use 9 or more")
        if not self.speeds or not all(0 <= speed <= room for speed in self.speeds):
            raise ValueError(f"speeds are {self.speeds}: give one or more of 0 to {room} (size minus {DIGIT_SIZE})")


@cache
def _digits() -> tuple[Tensor, Tensor]:
    stored = load_file(DIGITS_FILE)
    return stored["images"].float() / 8 - 1, stored["labels"].long()


def digits(split: Split) -> tuple[Tensor, Tensor]:
    """The handwritten digits of one split.

    Args:
        split: ``teacher`` (what the teacher is trained on), ``judge`` (what the classifier is trained on) or
            ``held_out`` (real clips to measure against). No digit is in two of them.

    Returns:
        Images fp32 ``[N, 8, 8]`` in [-1, 1] and labels int64 ``[N]``.
    """
    if split not in _SPLIT_SIZES:
        raise ValueError(f"split is {split!r}: use one of {', '.join(get_args(Split))}")
    images, labels = _digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    chosen = dict(zip(_SPLIT_SIZES, order.split(list(_SPLIT_SIZES.values()))))[split]
    return images[chosen], labels[chosen]


def bounce(start: Tensor, velocity: Tensor, frames: int, room: int) -> Tensor:
    """Positions of points that move evenly in [0, room] and are reflected at its ends (elastic bounces).

    Args:
        start: first positions ``[B]``, in [0, room].
        velocity: pixels per frame ``[B]``, of either sign.
        frames: number of positions, T.
        room: the last position, at least 1.

    Returns:
        Positions ``[B, T]``, dtype of ``start``.
    """
    unfolded = (start[:, None] + velocity[:, None] * torch.arange(frames)) % (2 * room)
    return torch.where(unfolded > room, 2 * room - unfolded, unfolded)


def _axis(batch: int, spec: ClipSpec, generator: torch.Generator) -> Tensor:
    """Positions of a digit's first row or column over time, int64 ``[B, T]``."""
    room = spec.size - DIGIT_SIZE
    start = torch.randint(0, room + 1, (batch,), generator=generator)
    speed = torch.tensor(spec.speeds)[torch.randint(0, len(spec.speeds), (batch,), generator=generator)]
    sign = 2 * torch.randint(0, 2, (batch,), generator=generator) - 1
    return bounce(start, speed * sign, spec.frames, room)


def draw(images: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """Draw digits at given places of an empty canvas (value -1).

    Args:
        images: ``[B, 8, 8]``.
        rows, columns: first row and column of the digit in each frame, int64 ``[B, T]``.
        size: height and width of the canvas.

    Returns:
        Clips ``[B, 1, T, size, size]``, dtype of ``images``.
    """
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)  # index 0 and 9 are the background
    places = torch.arange(size)
    y = (places - rows[..., None] + 1).clamp(0, DIGIT_SIZE + 1)
    x = (places - columns[..., None] + 1).clamp(0, DIGIT_SIZE + 1)
    batch = torch.arange(len(images))[:, None, None, None]
    return padded[batch, y[..., :, None], x[..., None, :]][:, None]


def sample_clips(
    split: Split, batch: int, spec: ClipSpec, generator: torch.Generator, *, balanced: bool = False
) -> tuple[Tensor, Tensor]:
    """Draw clips of random digits of a split in random motion. Equal generators give equal clips.

    Args:
        split: see ``digits``.
        batch: number of clips, B.
        spec: canvas and motion.
        generator: where all random numbers come from.
        balanced: classes 0, 1, .. 9, 0, .. instead of random ones, so that statistics of few clips vary less.

    Returns:
        Clips fp32 ``[B, 1, T, H, W]`` in [-1, 1] and labels int64 ``[B]``.
    """
    images, labels = digits(split)
    index = torch.randint(0, len(labels), (batch,), generator=generator)
    if balanced:
        by_class = [(labels == c).nonzero().flatten() for c in range(NUM_CLASSES)]
        index = torch.stack(
            [by_class[i % NUM_CLASSES][int(n) % len(by_class[i % NUM_CLASSES])] for i, n in enumerate(index)]
        )
    rows, columns = _axis(batch, spec, generator), _axis(batch, spec, generator)
    return draw(images[index], rows, columns, spec.size), labels[index]
