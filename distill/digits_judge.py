"""The judge of digit clips: an independent classifier, Frechet distance on its features, and smoothness of motion."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from blade_compile.distill.digits_data import NUM_CLASSES, ClipSpec, sample_clips

FEATURES = 32
_FAINT = 0.15  # of the grey scale [0, 2]: below it is noise of the background, which must not move the centroid


class Judge(nn.Module):
    """A convolutional network that reads the digit in a frame, trained on digits that no teacher ever sees."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        channels = (1, width, 2 * width, 2 * width, 3 * width)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(channels)):
            layers += [nn.Conv2d(a, b, 3, padding=1, stride=2 if i in {1, 3} else 1), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten())
        self.features = nn.Linear(4 * channels[-1], FEATURES)
        self.logits = nn.Linear(FEATURES, NUM_CLASSES)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames ``[N, 1, H, W]`` to features ``[N, FEATURES]`` and logits ``[N, classes]``."""
        features = self.features(self.convolutions(frames))
        return features, self.logits(F.relu(features))


def _distort(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Small random rotations, scales and shears, and noise: what a reader has to see through."""
    n = len(frames)
    matrix = torch.eye(2).expand(n, 2, 2) + 0.1 * torch.randn(n, 2, 2, generator=generator)
    shift = 0.05 * torch.randn(n, 2, 1, generator=generator)
    grid = F.affine_grid(torch.cat((matrix, shift), dim=2), list(frames.shape), align_corners=False)
    moved = F.grid_sample(frames + 1, grid, align_corners=False) - 1  # empty canvas flows in from outside
    level = 0.2 * torch.rand(n, 1, 1, 1, generator=generator)
    return moved + level * torch.randn(moved.shape, generator=generator)


def train_judge(spec: ClipSpec, *, steps: int = 1500, batch: int = 96, seed: int = 0) -> Judge:
    """Train the classifier on frames of the ``judge`` split.

    Args:
        spec: canvas and motion.
        steps: gradient steps; 1,500 take about half a minute on one core.
        batch: frames of a step, each of another clip.
        seed: of weights, clips and distortions.

    Returns:
        The classifier in evaluation mode, without gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    single = ClipSpec(frames=1, size=spec.size, speeds=spec.speeds)
    for _ in range(steps):
        clips, labels = sample_clips("judge", batch, single, generator)
        _, logits = judge(_distort(clips[:, :, 0], generator))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels, label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def load_judge(path: Path) -> Judge:
    """Read weights written with safetensors from ``Judge().state_dict()``: in evaluation mode, without gradients."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def read(judge: Judge, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Let the judge read clips.

    Args:
        judge: from ``train_judge``.
        clips: ``[B, 1, T, H, W]``.

    Returns:
        Features of all frames ``[B, T, FEATURES]`` and log-probabilities ``[B, T, classes]``.
    """
    batch, _, frames = clips.shape[:3]
    features, logits = judge(clips.float().clamp(-1, 1).transpose(1, 2).flatten(0, 1))
    return features.unflatten(0, (batch, frames)), logits.log_softmax(-1).unflatten(0, (batch, frames))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians fitted to features ``[N, F]`` and ``[M, F]`` (Dowson and Landau).

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, in fp64; the trace of the root is the sum of the roots of
    the eigenvalues of the product, which are real and not negative.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def centroids(clips: Tensor) -> Tensor:
    """Centre of brightness of each frame in pixels, (row, column): ``[B, 1, T, H, W]`` to ``[B, T, 2]``."""
    weight = (clips[:, 0].float() + 1 - _FAINT).clamp_min(0)
    total = weight.sum((2, 3)).clamp_min(1e-3)
    rows, columns = (torch.arange(n, dtype=weight.dtype) for n in weight.shape[2:])
    row = (weight.sum(3) * rows).sum(2) / total
    column = (weight.sum(2) * columns).sum(2) / total
    return torch.stack((row, column), dim=-1)


def acceleration(clips: Tensor) -> float:
    """Mean absolute second difference of the centroid over time, in pixels: 0 is even motion, bounces and jumps add.

    Args:
        clips: ``[B, 1, T, H, W]`` with T >= 3.
    """
    return float(centroids(clips).diff(n=2, dim=1).abs().mean())


@dataclass(frozen=True)
class Score:
    """What the judge says about a set of clips."""

    clips: int
    accuracy: float
    "share of clips whose digit is read as the class that was asked for, over all frames together"
    frame_accuracy: float
    "the same of single frames"
    frechet: float
    "Frechet distance of frame features to real held-out clips"
    acceleration: float
    "mean second difference of the centroid, in pixels"

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, for metrics files."""
        return asdict(self)


def score(judge: Judge, clips: Tensor, labels: Tensor, real: Tensor) -> Score:
    """Judge clips.

    Args:
        judge: from ``train_judge``.
        clips: ``[B, 1, T, H, W]``.
        labels: the classes asked for, int64 ``[B]``.
        real: clips of held-out digits to measure the distance to, ``[N, 1, T, H, W]``.
    """
    features, log_probabilities = read(judge, clips)
    real_features, _ = read(judge, real)
    return Score(
        clips=len(clips),
        accuracy=float((log_probabilities.mean(1).argmax(-1) == labels).double().mean()),
        frame_accuracy=float((log_probabilities.argmax(-1) == labels[:, None]).double().mean()),
        frechet=frechet_distance(features.flatten(0, 1), real_features.flatten(0, 1)),
        acceleration=acceleration(clips),
    )


def real_clips(spec: ClipSpec, count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Clips of held-out digits to measure against, as many of each class: ``[N, 1, T, H, W]`` and labels ``[N]``."""
    return sample_clips("held_out", count, spec, torch.Generator().manual_seed(seed), balanced=True)
