"""One roll-out, the critic's loss and the student's loss of Trajectory Distribution Matching, for any three models.

The equations stand in ``objective``; here they are put together in the order of BLADE's loop (Luo et al., TDM,
algorithm 1, with the student's own steps):

1. ``roll_out``: the student makes its K steps from noise, without gradients.
2. ``critic_loss``: at a random step of each sample, the student's x0 is what the critic has to find from x_tau.
3. ``student_loss``: at another random step the student estimates x0 again, now with gradients; teacher (guided) and
   critic look at x_tau, and their difference moves it. Or, in the first updates, ``regression_loss``: the guided
   teacher looks at the student's own point.

All random numbers come from ``Draws``, so a loss is a function of weights, conditions and (seed, step, samples).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from blade_compile.distill import objective, randomness
from blade_compile.distill.config_sections import MethodConfig
from blade_compile.distill.grids import Grid
from blade_compile.distill.schedules import Schedule, to_x0_eps

Condition = Mapping[str, Any]


class Models(Protocol):
    """What is asked of the three roles: predictions in fp32, from samples ``[B, ...]`` and times ``[B]``."""

    def student(self, x: Tensor, time: Tensor, condition: Condition, *, steps: int) -> Tensor:
        """The trained model, told K."""

    def critic(self, x: Tensor, time: Tensor, condition: Condition, *, steps: int) -> Tensor:
        """The model of the student's distribution, told K."""

    def teacher(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The frozen model, without gradients."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of some samples at a step of the training."""

    seed: int
    step: int
    samples: Sequence[int]
    "global sample indices, B of them"
    device: torch.device | str | None = None

    def normal(self, shape: Sequence[int], purpose: str) -> Tensor:
        """Standard normal, fp32 ``[B, *shape]``."""
        return randomness.normal(shape, self.seed, self.step, self.samples, purpose, self.device)

    def uniform(self, purpose: str) -> Tensor:
        """In [0, 1), fp64 ``[B]``."""
        return randomness.uniform(self.seed, self.step, self.samples, purpose, self.device)

    def integers(self, high: int, purpose: str) -> Tensor:
        """From 0 to ``high - 1``, int64 ``[B]``."""
        return randomness.integers(high, self.seed, self.step, self.samples, purpose, self.device)


class RollOut(NamedTuple):
    """The student's K steps."""

    points: Tensor
    "what it was called with, ``[K, B, ...]``"
    predictions: Tensor
    "what it returned, likewise"
    end: Tensor
    "the sample after the last step, ``[B, ...]``"


@dataclass(frozen=True)
class Matching:
    """The method with everything that stays the same from step to step."""

    models: Models
    schedule: Schedule
    grid: Grid
    "the student's steps"
    method: MethodConfig

    @torch.no_grad()
    def roll_out(self, start: Tensor, condition: Condition, draws: Draws | None = None) -> RollOut:
        """Make the K steps, equation (1), without gradients.

        Args:
            start: noise ``[B, ...]``.
            condition: of each sample.
            draws: the fresh noise of each step; None: the steps are deterministic whatever ``eta`` is.
        """
        x, points, predictions = start, [], []
        for i, now in enumerate(self.grid.times):
            step = torch.full((len(x),), i, device=x.device)
            time = torch.full((len(x),), now, device=x.device)
            points.append(x)
            predictions.append(self.models.student(x, time, condition, steps=self.grid.steps))
            x0, eps = self._estimates(x, predictions[-1], step)
            x = self._next(x0, eps, step, draws, f"roll-out {i}")
        return RollOut(torch.stack(points), torch.stack(predictions), x)

    def critic_loss(self, rolled: RollOut, condition: Condition, draws: Draws, update: int = 0) -> Tensor:
        """The critic's loss, equation (7), at a random step of each sample; a scalar with gradients for the critic.

        Args:
            rolled: from ``roll_out``.
            condition: of each sample.
            draws: of the same samples.
            update: of the critic within the step; each draws its own numbers.
        """
        purpose = f"critic {update}"
        with torch.no_grad():
            step = self._random_step(draws, purpose)
            samples = torch.arange(len(step), device=step.device)
            x0, eps = self._estimates(rolled.points[step, samples], rolled.predictions[step, samples], step)
            x_tau, tau, noise = self._diffused(x0, eps, step, draws, purpose)
            alpha, sigma = self.schedule.levels(tau)
            weight = objective.noise_weight(alpha, sigma, self.method.weighting, self.method.gamma)
            importance, teacher = None, None
            if self.method.importance_weight:
                importance = objective.importance_weight(x_tau, x0, alpha, sigma, noise)
            if self.method.regulariser:
                teacher = self._clean(x_tau, self.models.teacher(x_tau, tau.float(), condition), tau)
        prediction = self.models.critic(x_tau, tau.float(), condition, steps=self.grid.steps)
        return objective.critic_loss(
            self._clean(x_tau, prediction, tau),
            x0,
            weight,
            importance=importance,
            x0_teacher=teacher,
            teacher_weight=self.method.regulariser,
        )

    def student_loss(
        self, rolled: RollOut, condition: Condition, unconditional: Condition | None, draws: Draws
    ) -> Tensor:
        """The student's loss, equation (11), at a random step of each sample; a scalar with gradients for the student.

        Args:
            rolled: from ``roll_out``.
            condition: of each sample.
            unconditional: the teacher's input without the prompt; needed unless ``cfg_scale`` is 1.
            draws: of the same samples.
        """
        x, x0, eps, step = self._student_step(rolled, condition, draws)
        with torch.no_grad():
            x_tau, tau, _ = self._diffused(x0, eps, step, draws, "student")
            teacher = self._guided(x_tau, tau, condition, unconditional)
            prediction = self.models.critic(x_tau, tau.float(), condition, steps=self.grid.steps)
            target = objective.student_target(x0, teacher, self._clean(x_tau, prediction, tau))
        return self._student_loss(x0, target, teacher)

    def regression_loss(
        self, rolled: RollOut, condition: Condition, unconditional: Condition | None, draws: Draws
    ) -> Tensor:
        """The same penalty, towards what the guided teacher estimates at the student's own point."""
        x, x0, _, step = self._student_step(rolled, condition, draws)
        with torch.no_grad():
            teacher = self._guided(x, self.grid.bounds(x.device)[step], condition, unconditional)
        return self._student_loss(x0, teacher, teacher)

    def _student_step(
        self, rolled: RollOut, condition: Condition, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A point of each sample's trajectory, the student's x0 and eps there with gradients, and the step's number."""
        step = self._random_step(draws, "student")
        x = rolled.points[step, torch.arange(len(step), device=step.device)]
        time = self.grid.bounds(x.device)[step].float()
        x0, eps = self._estimates(x, self.models.student(x, time, condition, steps=self.grid.steps), step)
        return x, x0, eps, step

    def _student_loss(self, x0: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
        size = None
        if self.method.normaliser:
            cap = self.method.normaliser_cap
            size = objective.normaliser(x0, teacher, cap=float("inf") if cap is None else cap)
        return objective.student_loss(x0, target, kind=self.method.penalty, c=self.method.huber_c, normalise_by=size)

    def _random_step(self, draws: Draws, purpose: str) -> Tensor:
        return draws.integers(self.grid.steps, f"{purpose} step")

    def _estimates(self, x: Tensor, prediction: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and eps at the grid's own levels."""
        alphas, sigmas = self.grid.levels(x.device)
        return to_x0_eps(x, prediction, alphas[step], sigmas[step], self.schedule.prediction)

    def _next(self, x0: Tensor, eps: Tensor, step: Tensor, draws: Draws | None, purpose: str) -> Tensor:
        """The step's end, equation (1)."""
        alphas, sigmas = self.grid.levels(x0.device)
        eta = 1.0 if draws is None else self.method.eta
        noise = draws.normal(x0.shape[1:], f"{purpose} eta") if draws is not None and eta < 1 else None
        return objective.step_to(x0, eps, alphas[step + 1], sigmas[step + 1], eta, noise)

    def _diffused(
        self, x0: Tensor, eps: Tensor, step: Tensor, draws: Draws, purpose: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The step's end, diffused to a random time: x_tau, tau fp64 ``[B]``, and the noise; equations (2) and (3)."""
        tau = objective.draw_tau(
            self.schedule,
            self.grid,
            step,
            draws.uniform(f"{purpose} tau"),
            overlapping=self.method.intervals == "overlapping",
            low_margin=self.method.tau_min,
            high_margin=1 - self.method.tau_max,
        )
        alphas, sigmas = self.grid.levels(x0.device)
        x_mid = self._next(x0, eps, step, draws, purpose)
        noise = draws.normal(x0.shape[1:], f"{purpose} noise")
        return (
            objective.diffuse(x_mid, alphas[step + 1], sigmas[step + 1], *self.schedule.levels(tau), noise),
            tau,
            noise,
        )

    def _guided(self, x: Tensor, time: Tensor, condition: Condition, unconditional: Condition | None) -> Tensor:
        """The teacher's x0 with guidance, equation (6)."""
        prediction = self.models.teacher(x, time.float(), condition)
        if self.method.cfg_scale != 1:
            if unconditional is None:
                raise ValueError(f"cfg_scale is {self.method.cfg_scale:g}: the unconditional input is needed")
            without = self.models.teacher(x, time.float(), unconditional)
            prediction = objective.guide(prediction, without, self.method.cfg_scale)
        return self._clean(x, prediction, time)

    def _clean(self, x: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """x0 of a prediction at any time."""
        return to_x0_eps(x, prediction, *self.schedule.levels(time), self.schedule.prediction)[0]
