"""Numbers that compare samples: PSNR, SSIM, and the maximum mean discrepancy (MMD) of two sets.

All take tensors of any float or integer dtype, compute in fp64 and download nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW, _WINDOW_SIGMA = 11, 1.5  # Wang et al., section III-B
_K1, _K2 = 0.01, 0.03


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"found samples of shapes {tuple(a.shape)} and {tuple(b.shape)}: both have to be the same")


def psnr(a: Tensor, b: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each sample, ``10 log10(range^2 / mean squared error)``.

    Args:
        a, b: samples ``[B, ...]``, same shape.
        data_range: largest minus smallest possible value: 1, or 255 for bytes.

    Returns:
        Decibels fp64 ``[B]``; infinity for equal samples.
    """
    _check_pair(a, b)
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * (data_range**2 / error).log10()


def _window(device: torch.device) -> Tensor:
    """Weights of the Gaussian window, fp64 ``[11]``, summing to 1."""
    x = torch.arange(_WINDOW, dtype=torch.float64, device=device) - _WINDOW // 2
    weight = (-x.square() / (2 * _WINDOW_SIGMA**2)).exp()
    return weight / weight.sum()


def _local_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Mean under the window at every place where it fits: ``[N, 1, H, W]`` to ``[N, 1, H - 10, W - 10]``."""
    return F.conv2d(F.conv2d(x, weight[None, None, :, None]), weight[None, None, None, :])


def ssim(a: Tensor, b: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each sample (Wang et al., "Image Quality Assessment", eq. 13).

    The published form: a Gaussian window of 11 x 11 with deviation 1.5, moved where it fits wholly; each frame and
    channel by itself, and then the mean.

    Args:
        a, b: samples ``[B, ..., H, W]`` with H, W >= 11; frames and channels stand between.
        data_range: largest minus smallest possible value.

    Returns:
        fp64 ``[B]``, 1 for equal samples.
    """
    _check_pair(a, b)
    if a.dim() < 3 or min(a.shape[-2:]) < _WINDOW:
        raise ValueError(f"found shape {tuple(a.shape)}: SSIM needs [B, ..., H, W] with frames of 11 x 11 or more")
    x, y = (t.double().reshape(-1, 1, *t.shape[-2:]) for t in (a, b))
    weight = _window(x.device)
    mean_x, mean_y = _local_mean(x, weight), _local_mean(y, weight)
    var_x = _local_mean(x * x, weight) - mean_x.square()
    var_y = _local_mean(y * y, weight) - mean_y.square()
    covariance = _local_mean(x * y, weight) - mean_x * mean_y
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness = likeness / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return likeness.reshape(len(a), -1).mean(1)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``[N, F]`` and ``[M, F]`` to ``[N, M]``, by differences: no cancellation for samples that nearly agree."""
    return torch.stack([(row - y).square().sum(1) for row in x])


def median_distance(x: Tensor, y: Tensor) -> float:
    """The median of the distances between different members of both sets together: the usual bandwidth of ``mmd``."""
    pool = torch.cat((x, y)).double()
    distances = _squared_distances(pool, pool).sqrt()
    upper = torch.ones_like(distances, dtype=torch.bool).triu(1)
    return float(distances[upper].median())


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None) -> float:
    """Squared maximum mean discrepancy of two sets, unbiased (Gretton et al., "A Kernel Two-Sample Test", eq. 3).

    The kernel is ``exp(-|a - b|^2 / (2 bandwidth^2))``. Around 0, also below it, where both come from one distribution.

    Args:
        x: samples ``[N, ...]``, N >= 2; everything after the first dimension is one vector.
        y: samples ``[M, ...]``, M >= 2, of the same size.
        bandwidth: of the kernel; None: ``median_distance``. Give one number where several values are compared.
    """
    x, y = x.double().flatten(1), y.double().flatten(1)
    n, m = len(x), len(y)
    if x.shape[1] != y.shape[1] or min(n, m) < 2:
        raise ValueError(
            f"found {n} samples of {x.shape[1]} values and {m} of {y.shape[1]}: give two or more each, alike"
        )
    width = median_distance(x, y) if bandwidth is None else bandwidth
    if width <= 0:
        return 0.0  # all samples are the same
    within_x, within_y, between = (
        (-_squared_distances(a, b) / (2 * width**2)).exp() for a, b in ((x, x), (y, y), (x, y))
    )
    same_x = (within_x.sum() - n) / (n * (n - 1))  # without the diagonal, whose kernel is 1
    same_y = (within_y.sum() - m) / (m * (m - 1))
    return float(same_x + same_y - 2 * between.mean())
