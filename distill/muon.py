"""Muon: momentum whose updates are orthogonalised, for the matrices of hidden layers (Jordan et al., 2024).

``torch.optim.Muon`` computes in bf16, which is five times slower than fp32 on processors without bf16 matrix
instructions, and one matrix at a time; this one keeps the dtype and takes matrices of one shape together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix by ones, roughly (0.7 to 1.2), by five Newton-Schulz iterations.

    Args:
        matrices: ``[N, rows, columns]``.

    Returns:
        The same shape and dtype.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Updates have the root mean square that AdamW's have (Liu et al., "Muon is Scalable for LLM Training", eq. 4:
    0.2 sqrt(max(rows, columns))), so that rates may be compared with AdamW's.

    Args:
        parameters: matrices only; ``ValueError`` otherwise.
        lr: learning rate.
        momentum: of the gradient's running sum.
        weight_decay: decoupled, times ``lr``.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"a parameter has {parameter.ndim} dimensions: Muon takes matrices; use AdamW for it"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for alike in shapes.values():
                self._step(alike, group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(buffer, momentum))
        size = 0.2 * max(parameters[0].shape) ** 0.5
        directions = orthogonalise(torch.stack(updates))
        for parameter, direction in zip(parameters, directions):
            parameter.mul_(1 - lr * weight_decay).add_(direction, alpha=-lr * size)
