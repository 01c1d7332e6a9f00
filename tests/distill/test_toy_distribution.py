"""A Gaussian teacher: the K-step student's samples get its mean and its variance, through the trainer's own losses.

The teacher's velocity (or noise) is known in closed form. The student is a line in x for each step, the critic the
teacher plus a line whose coefficients are cubic in the time, for each interval: all linear-Gaussian, so the losses can
be minimised exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blade_compile.distill.config_sections import MethodConfig
from blade_compile.distill.grids import Grid, flow_grid, vp_grid
from blade_compile.distill.matching import Draws, Matching
from blade_compile.distill.randomness import generator
from blade_compile.distill.schedules import FlowSchedule, Schedule, from_x0_eps, per_sample, vp_schedule

MEAN = torch.tensor([1.5, -0.5])
SPREAD = torch.tensor([0.5, 1.4])
BATCH = 512


class Gaussians(nn.Module):
    """Teacher, student and critic of samples ``[B, 2]``."""

    def __init__(self, schedule: Schedule, grid: Grid) -> None:
        super().__init__()
        self.schedule, self.grid = schedule, grid
        self.slope = nn.Parameter(torch.zeros(grid.steps, 2))
        self.shift = nn.Parameter(torch.zeros(grid.steps, 2))
        self.line = nn.Parameter(torch.zeros(grid.steps, 4, 2, 2))

    def teacher(self, x: Tensor, time: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """E[x0 | x] of a Gaussian, as the prediction that the schedule wants."""
        alpha, sigma = (per_sample(level, x) for level in self.schedule.levels(time))
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        x0 = MEAN + gain * (x - alpha * MEAN)
        return from_x0_eps(x0, (x - alpha * x0) / sigma, *self.schedule.levels(time), self.schedule.prediction)

    def student(self, x: Tensor, time: Tensor, condition: Mapping[str, Any], *, steps: int) -> Tensor:
        times = torch.tensor(self.grid.times)
        step = (time[:, None] - times).abs().argmin(1)
        assert torch.allclose(times[step], time)  # it is never asked elsewhere
        return self.teacher(x, time, condition) + self.slope[step] * x + self.shift[step]

    def critic(self, x: Tensor, time: Tensor, condition: Mapping[str, Any], *, steps: int) -> Tensor:
        bounds = self.schedule.progress(self.grid.bounds()).flip(0)
        u = self.schedule.progress(time.double())
        place = torch.bucketize(u, bounds).clamp(1, steps) - 1
        within = ((u - bounds[place]) / (bounds[place + 1] - bounds[place])).float()
        powers = torch.stack([within**n for n in range(4)], 1)
        gain, shift = torch.einsum("bn,bnkd->kbd", powers, self.line[place])
        return self.teacher(x, time, condition) + gain * x + shift


class Quick(Draws):
    """All samples from one generator: nothing here depends on how they are shared out."""

    def _generator(self, purpose: str) -> torch.Generator:
        return generator(self.seed, self.step, purpose)

    def normal(self, shape: Sequence[int], purpose: str) -> Tensor:
        return torch.randn(len(self.samples), *shape, generator=self._generator(purpose))

    def uniform(self, purpose: str) -> Tensor:
        return torch.rand(len(self.samples), generator=self._generator(purpose), dtype=torch.float64)

    def integers(self, high: int, purpose: str) -> Tensor:
        return torch.randint(high, (len(self.samples),), generator=self._generator(purpose))


def _train(schedule: Schedule, grid: Grid, method: MethodConfig, iterations: int) -> tuple[Tensor, Tensor]:
    """The student's samples before and after."""
    models = Gaussians(schedule, grid)
    matching = Matching(models, schedule, grid, method)
    student = torch.optim.Adam([models.slope, models.shift], lr=2e-2, betas=(0.0, 0.95))
    critic = torch.optim.Adam([models.line], lr=3e-2, betas=(0.0, 0.95))
    rates = [torch.optim.lr_scheduler.CosineAnnealingLR(o, iterations, 1e-4) for o in (student, critic)]
    test = Quick(7, 0, range(20_000))
    noise = test.normal((2,), "test")
    before = matching.roll_out(noise, {}, test).end
    for step in range(iterations):
        draws = Quick(3, step, range(BATCH))
        rolled = matching.roll_out(draws.normal((2,), "start"), {}, draws)
        for update in range(4):
            critic.zero_grad()
            matching.critic_loss(rolled, {}, draws, update).backward()
            critic.step()
        student.zero_grad()
        matching.student_loss(rolled, {}, None, draws).backward()
        student.step()
        for rate in rates:
            rate.step()
    return before, matching.roll_out(noise, {}, test).end


FLOW = FlowSchedule(shift=1.0, horizon=1.0)
VP = vp_schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.05, num_train_timesteps=400, prediction="v")


@pytest.mark.parametrize(("name", "eta"), [("flow", 1.0), ("flow", 0.5), ("vp", 1.0)])
def test_the_students_samples_have_the_teachers_mean_and_variance(name: str, eta: float) -> None:
    schedule: Schedule = FLOW if name == "flow" else VP
    grid = flow_grid(FLOW, 2) if name == "flow" else vp_grid(VP, 2)
    method = MethodConfig(
        steps=2, cfg_scale=1.0, eta=eta, importance_weight=False, penalty="squared", normaliser=False,
        weighting="min_snr" if name == "vp" else "inverse_variance",
    )  # fmt: skip
    before, after = _train(schedule, grid, method, 400)
    wrong = (before.std(0) / SPREAD - 1).abs().max()
    assert wrong > 0.1  # two steps of the teacher's own sampler don't do it
    torch.testing.assert_close(after.mean(0), MEAN, rtol=0, atol=0.06)
    torch.testing.assert_close(after.std(0), SPREAD, rtol=0.05, atol=0)
