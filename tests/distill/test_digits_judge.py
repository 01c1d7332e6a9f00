"""The judge: Frechet distance and motion by hand, and a classifier that reads."""

from __future__ import annotations

import pytest
import torch

from blade_compile.distill.digits_data import ClipSpec, draw, sample_clips
from blade_compile.distill.digits_judge import (
    Judge,
    acceleration,
    centroids,
    frechet_distance,
    read,
    real_clips,
    score,
    train_judge,
)

SPEC = ClipSpec(frames=4, size=12)


def test_frechet_distance_by_hand() -> None:
    x = torch.randn(5_000, 3, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # mean 0, covariance 1 exactly
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(5)
    assert frechet_distance(x, 3 * x) == pytest.approx(3 * (3 - 1) ** 2)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    a, b = x * torch.tensor([1.0, 2.0, 3.0]), x * torch.tensor([2.0, 5.0, 1.0])
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(1 + 9 + 4)


def test_motion_by_hand() -> None:
    image = torch.full((1, 8, 8), -1.0)
    image[0, 3, 4] = 1.0
    clip = draw(image, torch.tensor([[0, 1, 2, 1]]), torch.tensor([[2, 2, 2, 2]]), 12)
    torch.testing.assert_close(centroids(clip)[0], torch.tensor([[3.0, 6], [4, 6], [5, 6], [4, 6]]))
    assert acceleration(clip) == pytest.approx((0 + 2) / 4)  # one bounce: |-2| in rows, 0 in columns, two times
    assert acceleration(clip[:, :, :3]) == 0


def test_faint_noise_does_not_move_the_centroid() -> None:
    clips, _ = sample_clips("held_out", 4, SPEC, torch.Generator().manual_seed(0))
    faint = (clips + 0.1 * torch.rand(clips.shape)).clamp(-1, 1)
    assert float((centroids(faint) - centroids(clips)).abs().max()) < 0.3


def test_a_judge_trained_briefly_reads_real_clips_and_not_noise() -> None:
    judge = train_judge(SPEC, steps=250, batch=64)
    clips, labels = real_clips(SPEC, 200)
    others, _ = real_clips(SPEC, 200, seed=2)
    real = score(judge, clips, labels, others)
    assert real.accuracy > 0.8 and real.clips == 200
    assert real.accuracy >= real.frame_accuracy - 0.05
    noise = score(judge, torch.randn_like(clips), labels, others)
    assert noise.accuracy < 0.3
    assert noise.frechet > 10 * real.frechet
    assert not any(p.requires_grad for p in judge.parameters())
    shuffled = score(judge, clips[:, :, torch.randperm(4)], labels, others)
    assert shuffled.frechet == pytest.approx(real.frechet) and shuffled.acceleration != real.acceleration


def test_reading_is_per_frame_and_clamped() -> None:
    judge = Judge().eval().requires_grad_(False)
    clips = torch.randn(3, 1, 4, 12, 12)
    features, log_probabilities = read(judge, clips)
    assert features.shape == (3, 4, 32) and log_probabilities.shape == (3, 4, 10)
    torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(3, 4))
    alone, _ = read(judge, clips[1:2, :, 2:3])
    torch.testing.assert_close(alone[0, 0], features[1, 2])
    torch.testing.assert_close(read(judge, clips.clamp(-1, 1))[0], features)
