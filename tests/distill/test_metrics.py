"""PSNR, SSIM and MMD against loops over pixels and pairs, and against what they must be by hand."""

from __future__ import annotations

import math

import pytest
import torch

from blade_compile.distill.metrics import median_distance, mmd, psnr, ssim


def test_psnr_by_hand() -> None:
    a = torch.zeros(3, 2, 4, 5)
    b = a.clone()
    b[1] += 0.1
    b[2, 0, 0, 0] = 1.0
    got = psnr(a, b)
    assert got[0] == math.inf
    assert got[1] == pytest.approx(20.0, abs=1e-5)
    assert got[2] == pytest.approx(10 * math.log10(2 * 4 * 5))
    bytes_a, bytes_b = torch.zeros(1, 4, dtype=torch.uint8), torch.full((1, 4), 255, dtype=torch.uint8)
    assert psnr(bytes_a, bytes_b, 255.0).tolist() == [0.0]


def _loop_ssim(a: torch.Tensor, b: torch.Tensor, data_range: float) -> float:
    """One frame [H, W] by the definition: a weighted mean, variance and covariance at each place."""
    window = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    total = sum(map(sum, window))
    weight = torch.tensor(window, dtype=torch.float64) / total
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11].double(), b[i : i + 11, j : j + 11].double()
            mx, my = (weight * x).sum(), (weight * y).sum()
            vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
            cov = (weight * (x - mx) * (y - my)).sum()
            values.append(float((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))))
    return sum(values) / len(values)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_ssim_is_the_published_formula(data_range: float) -> None:
    torch.manual_seed(0)
    a = torch.rand(2, 3, 2, 13, 17) * data_range
    b = (a + 0.2 * data_range * torch.randn_like(a)).clamp(0, data_range)
    want = [
        sum(_loop_ssim(a[n, t, c], b[n, t, c], data_range) for t in range(3) for c in range(2)) / 6 for n in range(2)
    ]
    assert ssim(a, b, data_range).tolist() == pytest.approx(want, rel=1e-9)


def test_ssim_limits() -> None:
    torch.manual_seed(1)
    a = torch.rand(2, 1, 16, 11)
    assert ssim(a, a).tolist() == pytest.approx([1.0, 1.0])
    assert (ssim(a, 1 - a) < 0).all()  # inverted structure
    flat = ssim(torch.full((1, 1, 12, 12), 0.2), torch.full((1, 1, 12, 12), 0.6))
    assert float(flat) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.04 + 0.36 + 1e-4), rel=1e-5)


def test_mmd_is_the_double_sum() -> None:
    torch.manual_seed(2)
    x, y = torch.randn(5, 2, 3), torch.randn(4, 2, 3) + 1

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(-float((a.double() - b.double()).square().sum()) / (2 * 1.7**2))

    same_x = sum(kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / (5 * 4)
    same_y = sum(kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / (4 * 3)
    between = sum(kernel(a, b) for a in x for b in y) / 20
    assert mmd(x, y, 1.7) == pytest.approx(same_x + same_y - 2 * between, rel=1e-9)


def test_mmd_of_two_gaussians_is_known() -> None:
    # For N(0, 1) and N(d, 1): 2 (E k(x, x') - E k(x, y)), each a Gaussian integral of variance 2 under the kernel.
    torch.manual_seed(3)
    width, d = 1.3, 1.5
    scale = width / math.sqrt(width**2 + 2)
    want = 2 * scale * (1 - math.exp(-(d**2) / (2 * (width**2 + 2))))
    x, y = torch.randn(2000, 1), torch.randn(2000, 1) + d
    assert mmd(x, y, width) == pytest.approx(want, abs=0.03)
    assert abs(mmd(x, torch.randn(2000, 1), width)) < 0.005
    assert mmd(x, y) > 20 * abs(mmd(x, torch.randn(2000, 1)))


def test_median_distance_and_equal_samples() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]])
    assert median_distance(x, y) == 2.0  # of 1, 2, 3
    same = torch.ones(3, 4)
    assert mmd(same, same) == 0.0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="both have to be the same"):
        psnr(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(torch.zeros(1, 1, 10, 20), torch.zeros(1, 1, 10, 20))
    with pytest.raises(ValueError, match="two or more"):
        mmd(torch.zeros(1, 2), torch.zeros(3, 2))
