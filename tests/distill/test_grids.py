"""Training grids against the steps that diffusers' schedulers really take."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from blade_compile.distill.grids import FlowSpacing, Grid, VPSpacing, flow_grid, scheduler_grid, vp_grid
from blade_compile.distill.objective import step_to
from blade_compile.distill.schedules import FlowSchedule, VPSchedule, schedule_of, to_x0_eps, vp_schedule


def _roll(
    grid: Grid, schedule: FlowSchedule | VPSchedule, x: torch.Tensor, outputs: list[torch.Tensor]
) -> torch.Tensor:
    """Our deterministic trajectory with given model outputs."""
    alphas, sigmas = grid.levels()
    for i, output in enumerate(outputs):
        x0, eps = to_x0_eps(x, output, alphas[i], sigmas[i], schedule.prediction)
        x = step_to(x0, eps, alphas[i + 1], sigmas[i + 1])
    return x


def _sample(scheduler: Any, x: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
    """The scheduler's own trajectory with the same outputs."""
    for t, output in zip(scheduler.timesteps, outputs):
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 3, 4, 8])
@pytest.mark.parametrize("spacing", ["trailing", "euler"])
def test_flow_grid_is_the_euler_schedulers(spacing: FlowSpacing, steps: int, shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = schedule_of(scheduler.config)
    assert isinstance(schedule, FlowSchedule)
    sigmas = [1 - i / steps for i in range(steps)] if spacing == "trailing" else None
    read = scheduler_grid(scheduler, schedule, steps, sigmas)
    grid = flow_grid(schedule, steps, spacing)
    assert grid.times == pytest.approx(read.times, rel=1e-6)
    assert grid.sigmas == pytest.approx(read.sigmas, rel=1e-5, abs=1e-7)

    x = torch.randn(2, 3, 5)
    outputs = list(torch.randn(steps, 2, 3, 5))
    torch.testing.assert_close(_roll(grid, schedule, x, outputs), _sample(scheduler, x, outputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_flow_grid_is_unipcs(steps: int, shift: float) -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    schedule = schedule_of(scheduler.config)
    assert isinstance(schedule, FlowSchedule) and schedule.shift == shift
    read = scheduler_grid(scheduler, schedule, steps)
    grid = flow_grid(schedule, steps, "unipc")
    assert grid.times == read.times
    assert grid.sigmas == pytest.approx(read.sigmas, rel=1e-5, abs=1e-7)


def test_the_grid_that_wan_really_visits() -> None:
    grid = flow_grid(FlowSchedule(shift=3.0), 8, "unipc")
    assert grid.times == (999, 954, 900, 833, 750, 643, 500, 301)


@pytest.mark.parametrize(
    ("cls", "spacing"),
    [
        (diffusers.CogVideoXDDIMScheduler, "trailing"),
        (diffusers.CogVideoXDPMScheduler, "trailing"),
        (diffusers.DDIMScheduler, "trailing"),
        (diffusers.DDIMScheduler, "leading"),
        (diffusers.DPMSolverMultistepScheduler, "linspace"),
    ],
)
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_vp_grid_is_the_schedulers(cls: Any, spacing: VPSpacing, steps: int) -> None:
    options = {"timestep_spacing": spacing, "prediction_type": "v_prediction", "steps_offset": 1}
    scheduler = cls(**options)
    schedule = schedule_of(scheduler.config)
    assert isinstance(schedule, VPSchedule)
    read = scheduler_grid(scheduler, schedule, steps)
    grid = vp_grid(schedule, steps, spacing, steps_offset=1)
    assert grid.times == read.times
    assert grid.sigmas == pytest.approx(read.sigmas)


@pytest.mark.parametrize("cls", [diffusers.CogVideoXDDIMScheduler, diffusers.DDIMScheduler])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("zero", [True, False])
def test_roll_out_equals_ddim_sampling(cls: Any, spacing: VPSpacing, zero: bool) -> None:
    options = {"timestep_spacing": spacing, "prediction_type": "v_prediction", "rescale_betas_zero_snr": zero}
    scheduler = cls(**options, clip_sample=False, set_alpha_to_one=True)
    schedule = schedule_of(scheduler.config)
    assert isinstance(schedule, VPSchedule)
    scheduler.set_timesteps(4)
    x = torch.randn(2, 3, 5)
    outputs = list(torch.randn(4, 2, 3, 5))
    ours = _roll(vp_grid(schedule, 4, spacing), schedule, x, outputs)
    torch.testing.assert_close(ours, _sample(scheduler, x, outputs), rtol=2e-3, atol=2e-4)


def test_cogvideox_grid_by_hand() -> None:
    grid = vp_grid(vp_schedule(prediction="v", rescale_betas_zero_snr=True), 8)
    assert grid.times == (999, 874, 749, 624, 499, 374, 249, 124)
    assert grid.alphas[0] == 0 and grid.sigmas[-1] == 0 and grid.steps == 8
    assert grid.bounds().tolist() == [999, 874, 749, 624, 499, 374, 249, 124, -1]


def test_second_order_solvers_and_bad_steps_are_refused() -> None:
    flow, vp = FlowSchedule(), vp_schedule()
    with pytest.raises(ValueError, match="second order"):
        scheduler_grid(diffusers.FlowMatchHeunDiscreteScheduler(), flow, 4)
    with pytest.raises(ValueError, match="no sigmas"):
        scheduler_grid(diffusers.DDIMScheduler(), flow, 4)
    with pytest.raises(ValueError, match="has to divide 1000"):
        vp_grid(vp, 6)
    with pytest.raises(ValueError, match="steps is 0"):
        flow_grid(flow, 0)
    with pytest.raises(ValueError, match="spacing is 'karras'"):
        flow_grid(flow, 4, "karras")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spacing is 'karras'"):
        vp_grid(vp, 4, "karras")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beyond 999"):
        vp_grid(vp, 1, "leading", steps_offset=1000)
    with pytest.raises(ValueError, match="has to fall"):
        Grid((1.0, 2.0), (0.5, 0.4, 1.0), (0.5, 0.6, 0.0), 0.0)
    with pytest.raises(ValueError, match="K \\+ 1"):
        Grid((1.0,), (0.5,), (0.5,), 0.0)
