"""The digits transformer: shapes, preconditioning and rotations by hand, sampling, and blade's backend on it."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from blade_compile.distill.digits_model import (
    NULL_CLASS,
    DigitsConfig,
    DigitsTransformer,
    guided,
    precondition,
    rotary_angles,
    rotate,
    sample,
)
from tests.tools import assert_close

SMALL = DigitsConfig(frames=4, size=12, patch=(2, 2, 3), width=32, depth=2, heads=2)


def _trained(config: DigitsConfig = SMALL) -> DigitsTransformer:
    """A model whose zero-initialised layers have left zero."""
    model = DigitsTransformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _inputs(config: DigitsConfig = SMALL, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, 1, config.frames, config.size, config.size)
    return x, torch.linspace(0.05, 1, batch), torch.arange(batch)


def test_tokens_are_in_raster_order() -> None:
    model = DigitsTransformer(SMALL)
    x = torch.randn(2, 1, 4, 12, 12)
    tokens = model.patchify(x)
    assert SMALL.grid == (2, 6, 4) and tokens.shape == (2, 48, 12)
    for t, h, w in ((0, 0, 0), (1, 5, 3), (0, 2, 1)):
        patch = x[1, 0, 2 * t : 2 * t + 2, 2 * h : 2 * h + 2, 3 * w : 3 * w + 3]
        assert torch.equal(tokens[1, (t * 6 + h) * 4 + w], patch.flatten())
    assert torch.equal(model.unpatchify(tokens), x)


def test_a_new_model_is_the_best_linear_estimate() -> None:
    """The last layer starts at zero, so what is left of v is the linear part."""
    x, time, label = _inputs()
    assert torch.equal(DigitsTransformer(SMALL)(x, time, label), precondition(x, time.view(-1, 1, 1, 1, 1))[1])


@pytest.mark.parametrize("s", [0.001, 0.3, 0.7, 1.0])
def test_preconditioning_is_regression_on_noisy_values(s: float) -> None:
    n, mean, deviation = 400_000, -0.8, 0.47
    x0, eps = mean + deviation * torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    x, v = (1 - s) * x0 + s * eps, eps - x0
    scaled, linear, factor = precondition(x, torch.tensor(s, dtype=torch.float64))
    assert float(scaled.mean()) == pytest.approx(0, abs=0.01) and float(scaled.std()) == pytest.approx(1, rel=0.01)
    left = v - linear
    assert float(left.mean()) == pytest.approx(0, abs=0.01)
    assert float((left * scaled).mean()) == pytest.approx(0, abs=0.01)  # nothing linear is left
    assert float(left.std()) == pytest.approx(float(factor), rel=0.01)


def test_rotations_keep_lengths_and_depend_on_distances_only() -> None:
    grid, d = (2, 3, 4), 16
    angles = rotary_angles(grid, d)
    assert angles.shape == (24, 8)
    q, k = torch.randn(2, d).unbind(0)
    turned_q = rotate(q.expand(1, 1, 24, d), angles.cos(), angles.sin())[0, 0]
    turned_k = rotate(k.expand(1, 1, 24, d), angles.cos(), angles.sin())[0, 0]
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(24))
    place = {(t, h, w): (t * 3 + h) * 4 + w for t in range(2) for h in range(3) for w in range(4)}

    def score(a: tuple[int, int, int], b: tuple[int, int, int]) -> Tensor:
        return turned_q[place[a]] @ turned_k[place[b]]

    torch.testing.assert_close(score((0, 0, 0), (1, 1, 2)), score((0, 1, 1), (1, 2, 3)))
    for axis in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.isclose(score((0, 0, 0), axis), score((0, 0, 0), (0, 0, 0)))


def test_every_parameter_takes_part() -> None:
    model = _trained()
    model(*_inputs()).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not missing


def test_guidance_by_hand_and_its_two_limits() -> None:
    model, (x, time, label) = _trained(), _inputs()
    conditional = model(x, time, label)
    unconditional = model(x, time, torch.full_like(label, NULL_CLASS))
    torch.testing.assert_close(guided(model, x, time, label, 3.0), 3 * conditional - 2 * unconditional)
    torch.testing.assert_close(guided(model, x, time, label, 0.0), unconditional)
    assert torch.equal(guided(model, x, time, label, 1.0), conditional)


class _Line(nn.Module):
    """The exact velocity towards one clip; every path is a straight line."""

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return (x - 0.3) / time.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_sampling_follows_a_straight_line_exactly(steps: int, shift: float) -> None:
    clips = sample(_Line(), torch.randn(2, 1, 2, 9, 9), torch.zeros(2, dtype=torch.long), steps=steps, shift=shift)
    torch.testing.assert_close(clips, torch.full_like(clips, 0.3))


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_blades_backend_rewrites_every_block(sparsity: float) -> None:
    config = DigitsConfig(frames=4, size=12, patch=(1, 2, 2), width=32, depth=1, heads=2)
    model, inputs = _trained(config), _inputs(config, 2)
    options = {"sparsity": sparsity, "block_size": 16, "when": "always", "min_tokens": 1}
    compiled = torch.compile(model, backend="blade", options=options)
    plain, exact = model(*inputs), deepcopy(model).double()(inputs[0].double(), *inputs[1:])
    found = compiled(*inputs)
    if sparsity:
        assert not torch.allclose(found, plain, atol=1e-3)
    else:
        assert_close(found, exact, plain)
    found.square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="has to divide"):
        DigitsConfig(size=13)
    with pytest.raises(ValueError, match="multiple of 8"):
        DigitsConfig(width=36, heads=3)
    assert math.prod(DigitsConfig().grid) == 256
