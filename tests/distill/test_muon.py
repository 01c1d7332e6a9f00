"""Muon: what its iteration does to singular values, and its step against a loop over matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blade_compile.distill.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5)])
def test_singular_values_become_roughly_one(shape: tuple[int, int]) -> None:
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.05, 3, min(shape))
    stacked = torch.stack([u @ torch.diag(values) @ v, torch.randn(shape)])
    found = orthogonalise(stacked)
    assert found.shape == stacked.shape
    singular = torch.linalg.svdvals(found[0])
    assert 0.6 < float(singular.min()) and float(singular.max()) < 1.3
    kept = u.T @ found[0] @ v.T  # the directions stay
    torch.testing.assert_close(kept, torch.diag(kept.diagonal()), atol=1e-4, rtol=0)


def test_zero_gradient_is_no_direction() -> None:
    assert not bool(orthogonalise(torch.zeros(1, 3, 4)).any())


def test_a_step_equals_a_loop_over_matrices() -> None:
    parameters = [nn.Parameter(torch.randn(4, 6)) for _ in range(2)] + [nn.Parameter(torch.randn(6, 3))]
    copies = [p.detach().clone() for p in parameters]
    optimizer = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.5)
    buffers = [torch.zeros_like(p) for p in copies]
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in copies]
        for i, gradient in enumerate(gradients):
            parameters[i].grad = gradient.clone()
            buffers[i] = 0.9 * buffers[i] + 0.1 * gradient
            update = orthogonalise((0.1 * gradient + 0.9 * buffers[i])[None])[0]
            copies[i] = copies[i] * (1 - 0.1 * 0.5) - 0.1 * 0.2 * max(gradient.shape) ** 0.5 * update
        optimizer.step()
    for parameter, copy in zip(parameters, copies):
        torch.testing.assert_close(parameter.detach(), copy)


def test_a_quadratic_is_minimised() -> None:
    target = torch.randn(6, 4)
    parameter = nn.Parameter(torch.zeros(6, 4))
    optimizer = Muon([parameter], lr=0.1, weight_decay=0)
    for i in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - i / 150)
        parameter.grad = parameter.detach() - target
        optimizer.step()
    assert float((parameter.detach() - target).norm() / target.norm()) < 0.05


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="Muon takes matrices"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)
