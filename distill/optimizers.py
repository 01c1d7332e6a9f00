"""AdamW for one role: its learning rate by step, its gradient norm over all shards, its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from blade_compile.distill.config_sections import OptimizerConfig, RoleOptimizer
from blade_compile.distill.sharding import average_gradients, whole

_STATE = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(settings: RoleOptimizer, step: int, max_steps: int) -> float:
    """The rate of a training step, counted from 0.

    Linear from ``1 / warmup_steps`` of the rate over the warm-up, then constant, or half a cosine that would reach 0
    at ``max_steps``.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, max_steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Optimizer:
    """AdamW with clipped gradients for one role."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: RoleOptimizer,
        common: OptimizerConfig,
        max_steps: int,
        *,
        replicated: bool = False,
    ) -> None:
        """Make the state of every parameter right away, so that a checkpoint can be read into it.

        Args:
            parameters: by name, from ``Roles.parameters``; all fp32, on one device, all sharded or none.
            settings: the role's.
            common: of both roles.
            max_steps: where the cosine ends.
            replicated: each rank has a copy (``Roles.replicated``): gradients are averaged before each update.
        """
        self.parameters = dict(parameters)
        self.settings, self.common, self.max_steps, self.replicated = settings, common, max_steps, replicated
        self._adamw = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=common.betas,
            weight_decay=common.weight_decay,
            fused=True,
        )
        for parameter in self.parameters.values():
            self._adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }

    def update(self, step: int) -> float:
        """One update from the gradients that backward passes have left, which are cleared.

        Args:
            step: of the training, counted from 0; gives the learning rate.

        Returns:
            The gradients' norm before clipping, over all ranks. Where it is infinite or NaN nothing is updated.
        """
        if self.replicated:
            average_gradients(self.parameters.values())
        norm = self.gradient_norm()
        found = float(norm)
        if math.isfinite(found):
            self._clip(found)
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate(self.settings, step, self.max_steps)
            self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return found

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Of all gradients together, fp32 ``[]``; with sharded ones all ranks have to call this."""
        gradients = self._gradients()
        return whole(torch.nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())

    def _clip(self, norm: float) -> None:
        if norm > self.common.clip:
            torch._foreach_mul_(self._gradients(), self.common.clip / (norm + 1e-6))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def state(self) -> dict[str, Tensor]:
        """AdamW's own tensors as ``<what>.<parameter>``, to be written, or to be filled in place."""
        adamw = self._adamw.state
        return {f"{what}.{name}": adamw[p][what] for what in _STATE for name, p in self.parameters.items()}
