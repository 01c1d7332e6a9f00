"""The exported scheduler, run as each family's pipeline runs it, against the training grid and our own roll-out."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import diffusers
import pytest
import torch

from blade_compile.distill.errors import ConfigError
from blade_compile.distill.grids import Grid, flow_grid, vp_grid
from blade_compile.distill.objective import step_to
from blade_compile.distill.samplers import pipeline_sigmas, student_scheduler, visits
from blade_compile.distill.schedules import FlowSchedule, VPSchedule, schedule_of, to_x0_eps

COGVIDEOX = {
    "_class_name": "CogVideoXDDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "beta_end": 0.012, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0,
}  # fmt: skip
PIXART = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def _run(
    scheduler: Any, family: str, steps: int, x: torch.Tensor, outputs: list[torch.Tensor], **given: Any
) -> torch.Tensor:
    """What the pipeline does with given model outputs."""
    scheduler = type(scheduler).from_config(dict(scheduler.config))
    sigmas = pipeline_sigmas(family, steps)
    scheduler.set_timesteps(steps) if sigmas is None else scheduler.set_timesteps(sigmas=sigmas)
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(output, t, x, return_dict=False, **given)[0]
    return x


def _roll(
    grid: Grid, prediction: Any, x: torch.Tensor, outputs: list[torch.Tensor], fresh: torch.Generator | None = None
) -> torch.Tensor:
    alphas, sigmas = grid.levels()
    for i, output in enumerate(outputs):
        x0, eps = to_x0_eps(x, output, alphas[i], sigmas[i], prediction)
        noise = None if fresh is None else torch.randn(x.shape, generator=fresh)
        x = step_to(x0, eps, alphas[i + 1], sigmas[i + 1], 1.0 if fresh is None else 0.0, noise)
    return x


@pytest.mark.parametrize("family", ["wan", "sd3", "flux", "ltx", "hunyuan_video"])
@pytest.mark.parametrize("shift", [0.7, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_flow_families_take_trailing_steps(family: str, shift: float, steps: int) -> None:
    torch.manual_seed(0)
    schedule = FlowSchedule(shift=shift)
    grid = flow_grid(schedule, steps)
    scheduler = student_scheduler(family, grid, schedule)
    assert type(scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    x, outputs = torch.randn(2, 3, 5), list(torch.randn(steps, 2, 3, 5))
    want = _roll(grid, "flow", x, outputs)
    torch.testing.assert_close(_run(scheduler, family, steps, x, outputs), want, rtol=1e-4, atol=1e-5)


def test_wans_own_times_come_back_as_unipc_of_order_one() -> None:
    schedule = FlowSchedule(shift=3.0)
    grid = flow_grid(schedule, 8, "unipc")
    scheduler = student_scheduler("wan", grid, schedule)
    assert type(scheduler) is diffusers.UniPCMultistepScheduler
    x, outputs = torch.randn(2, 3, 5), list(torch.randn(8, 2, 3, 5))
    want = _roll(grid, "flow", x, outputs)
    torch.testing.assert_close(_run(scheduler, "wan", 8, x, outputs), want, rtol=1e-3, atol=1e-4)


def test_double_shifted_steps_come_back_as_the_scheduler_left_alone() -> None:
    schedule = FlowSchedule(shift=3.0)
    scheduler = student_scheduler("sd3", flow_grid(schedule, 4, "euler"), schedule)
    assert scheduler.config.shift == 3.0 and scheduler.config.shift_terminal is None


@pytest.mark.parametrize(
    ("family", "base", "spacing", "steps"),
    [
        ("cogvideox", COGVIDEOX, "trailing", 8),
        ("cogvideox", COGVIDEOX, "trailing", 1),
        ("cogvideox", COGVIDEOX, "leading", 4),
        ("pixart", PIXART, "trailing", 4),
        ("pixart", PIXART, "linspace", 7),
        ("dit", PIXART, "leading", 5),
    ],
)
def test_vp_families(family: str, base: dict[str, Any], spacing: Any, steps: int) -> None:
    torch.manual_seed(0)
    schedule = schedule_of(base)
    assert isinstance(schedule, VPSchedule)
    grid = vp_grid(schedule, steps, spacing)
    scheduler = student_scheduler(family, grid, schedule, base)
    x, outputs = torch.randn(2, 3, 5), list(torch.randn(steps, 2, 3, 5))
    want = _roll(grid, schedule.prediction, x, outputs)
    torch.testing.assert_close(_run(scheduler, family, steps, x, outputs), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("family", "base"), [("wan", None), ("cogvideox", COGVIDEOX), ("pixart", PIXART)])
@pytest.mark.parametrize("steps", [1, 4])
def test_all_fresh_noise_exports_the_sampler_that_renoises(family: str, base: Any, steps: int) -> None:
    """Its steps are those of the training with eta 0, and so are those of another K, made of its configuration."""
    torch.manual_seed(0)
    schedule = FlowSchedule(shift=2.0) if base is None else schedule_of(base)
    grid = flow_grid(schedule, steps) if isinstance(schedule, FlowSchedule) else vp_grid(schedule, steps)
    other = flow_grid(schedule, 8) if isinstance(schedule, FlowSchedule) else vp_grid(schedule, 8)
    scheduler = student_scheduler(family, other, schedule, base, eta=0.0)
    if steps != 8:
        again = {**scheduler.config, "_class_name": type(scheduler).__name__}
        scheduler = student_scheduler(family, grid, schedule, again, eta=0.0)
    x, outputs = torch.randn(2, 3, 5), list(torch.randn(steps, 2, 3, 5))
    want = _roll(grid, schedule.prediction, x, outputs, torch.Generator().manual_seed(3))
    made = _run(scheduler, family, steps, x, outputs, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made, want, rtol=2e-3, atol=2e-3)
    assert steps == 1 or not torch.allclose(made, _roll(grid, schedule.prediction, x, outputs), atol=0.1)


def test_a_share_of_fresh_noise_exports_the_deterministic_sampler() -> None:
    schedule = FlowSchedule(shift=2.0)
    assert not student_scheduler("wan", flow_grid(schedule, 4), schedule, eta=0.9).config.stochastic_sampling


def test_other_steps_are_refused() -> None:
    schedule = FlowSchedule(shift=3.0)
    scheduler = student_scheduler("wan", flow_grid(schedule, 4), schedule)
    assert visits(scheduler, "wan", schedule, flow_grid(schedule, 4))
    assert not visits(scheduler, "wan", schedule, flow_grid(schedule, 8))
    assert not visits(scheduler, "wan", schedule, flow_grid(FlowSchedule(shift=3.1), 4))
    assert not visits(scheduler, "flux", schedule, flow_grid(schedule, 4))
    with pytest.raises(ConfigError, match=r"no stock scheduler .*\(1000, 700, 200\)"):
        student_scheduler("wan", Grid((1000, 700, 200), (0, 0.3, 0.8, 1), (1, 0.7, 0.2, 0), 0.0), schedule)
    other = schedule_of({**PIXART, "beta_end": 0.03})
    assert isinstance(other, VPSchedule)
    with pytest.raises(ConfigError, match="no stock scheduler"):  # the base's betas are not the student's
        student_scheduler("pixart", vp_grid(other, 4), other, PIXART)
    with pytest.raises(ConfigError, match="without the base's"):
        student_scheduler("pixart", vp_grid(other, 4), other)


@pytest.mark.parametrize("family", ["wan", "cogvideox", "hunyuan_video", "ltx", "sd3", "flux", "pixart", "dit"])
def test_adapters_and_samplers_agree_on_what_the_pipeline_passes(family: str) -> None:
    adapter = import_module(f"blade_compile.distill.adapter_{family}").ADAPTER
    assert adapter.sampler_sigmas(None, 4) == pipeline_sigmas(family, 4)
