"""Noise schedules against diffusers' tables, and conversions against each other."""

from __future__ import annotations

import diffusers
import pytest
import torch

from blade_compile.distill.schedules import (
    FlowSchedule,
    Prediction,
    VPSchedule,
    eps_of,
    from_x0_eps,
    schedule_of,
    to_x0_eps,
    vp_schedule,
)

SCHEDULERS = [
    diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),  # DiT
    diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02),  # PixArt
    diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    diffusers.CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", snr_shift_scale=3.0, timestep_spacing="trailing"
    ),
    diffusers.CogVideoXDPMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", snr_shift_scale=1.0, timestep_spacing="trailing"
    ),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_vp_equals_the_schedulers_table_at_integers_and_falls_between(scheduler: diffusers.SchedulerMixin) -> None:
    schedule = schedule_of(scheduler.config)
    assert isinstance(schedule, VPSchedule)
    alpha, sigma = schedule.levels(torch.arange(1000))
    torch.testing.assert_close(alpha.square(), scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1000, dtype=torch.float64))

    fine = torch.linspace(-1, 999, 20_011, dtype=torch.float64)
    alpha, sigma = schedule.levels(fine)
    assert bool((alpha.diff() < 0).all()) and bool((sigma.diff() > 0).all())
    assert float(sigma[0]) == 0 and float(alpha[0]) == 1


def test_zero_terminal_snr_is_exactly_zero() -> None:
    schedule = vp_schedule(rescale_betas_zero_snr=True, prediction="v")
    alpha, sigma = schedule.levels(torch.tensor([999.0, 998.999]))
    assert float(alpha[0]) == 0 and float(sigma[0]) == 1 and float(alpha[1]) > 0


def test_between_two_integers_alpha_is_linear() -> None:
    schedule = VPSchedule(torch.tensor([0.81, 0.36, 0.04], dtype=torch.float64))
    alpha, _ = schedule.levels(torch.tensor([-1, -0.5, 0, 0.25, 1.5, 2, 9]))
    torch.testing.assert_close(alpha, torch.tensor([1, 0.95, 0.9, 0.825, 0.4, 0.2, 0.2], dtype=torch.float64))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_matches_the_euler_scheduler_and_inverts_its_shift(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = schedule_of(scheduler.config)
    assert isinstance(schedule, FlowSchedule) and schedule.shift == shift
    alpha, sigma = schedule.levels(scheduler.timesteps)
    torch.testing.assert_close(sigma.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(alpha))
    even = torch.linspace(1, 0.001, 1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(even), scheduler.timesteps.double(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(schedule.progress(schedule.time(even)), even)


def test_no_integer_time_of_a_shifted_schedule_is_missing() -> None:
    """A published script searched sigma in a table of shifted integers: 268 of 980 times were not in it."""
    schedule = FlowSchedule(shift=3.0)
    _, sigma = schedule.levels(torch.arange(1001))
    torch.testing.assert_close(sigma, torch.arange(1001, dtype=torch.float64) / 1000)
    steps = torch.tensor([374.0, 124.0])
    torch.testing.assert_close(schedule.levels(steps)[1], steps.double() / 1000)


def test_vp_progress_inverts_time() -> None:
    schedule = vp_schedule()
    progress = torch.linspace(0, 1, 97, dtype=torch.float64)
    torch.testing.assert_close(schedule.progress(schedule.time(progress)), progress)
    assert float(schedule.time(torch.tensor(1.0))) == schedule.first
    assert float(schedule.time(torch.tensor(0.0))) == schedule.clean


@pytest.mark.parametrize("prediction", ["flow", "v", "epsilon", "sample"])
def test_conversions_recover_what_was_mixed(prediction: Prediction) -> None:
    x0, eps = torch.randn(2, 3, 4, 5, dtype=torch.float64).unbind(0)
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    alpha = 1 - sigma if prediction == "flow" else (1 - sigma**2).sqrt()
    x = torch.stack([a * c + s * e for a, s, c, e in zip(alpha, sigma, x0, eps)])
    output = from_x0_eps(x0, eps, alpha, sigma, prediction)
    found_x0, found_eps = to_x0_eps(x, output, alpha, sigma, prediction)
    torch.testing.assert_close(found_x0, x0)
    torch.testing.assert_close(found_eps, eps)
    torch.testing.assert_close(eps_of(x, x0, alpha, sigma), eps)


def test_velocities_by_hand() -> None:
    one = torch.tensor([[2.0]]), torch.tensor([[3.0]])  # x0, eps
    levels = torch.tensor([0.6]), torch.tensor([0.8])
    assert float(from_x0_eps(*one, *levels, "flow")) == 1.0
    assert float(from_x0_eps(*one, *levels, "v")) == pytest.approx(0.6 * 3 - 0.8 * 2)


@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_conversions_equal_ddims_step(prediction: Prediction) -> None:
    kind = {"v": "v_prediction", "epsilon": "epsilon"}[prediction]
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=kind)
    schedule = schedule_of(scheduler.config)
    x, output = torch.randn(2, 1, 3, 4).unbind(0)
    scheduler.set_timesteps(4)
    x0, _ = to_x0_eps(x, output, *schedule.levels(torch.tensor([500.0])), schedule.prediction)
    torch.testing.assert_close(x0, scheduler.step(output, 500, x).pred_original_sample, rtol=1e-4, atol=1e-5)


def test_bf16_is_widened() -> None:
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    levels = torch.tensor([0.999, 0.001])
    x0, eps = to_x0_eps(x, x, 1 - levels, levels, "flow")
    assert x0.dtype == eps.dtype == torch.float32 and bool(x0.isfinite().all())


def test_what_cannot_be_a_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="terminal SNR is 0"):
        vp_schedule(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="strictly falling"):
        VPSchedule(torch.tensor([0.9, 0.9], dtype=torch.float64))
    with pytest.raises(ValueError, match="beta_schedule is 'cosine'"):
        vp_schedule(beta_schedule="cosine")
    with pytest.raises(ValueError, match="shift is 0"):
        FlowSchedule(shift=0)
    with pytest.raises(ValueError, match="prediction_type is 'score'"):
        schedule_of({"prediction_type": "score", "beta_schedule": "linear"})
    with pytest.raises(ValueError, match="no beta_schedule"):
        schedule_of({"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="invert_sigmas"):
        schedule_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True})
    with pytest.raises(ValueError, match="a VP model predicts"):
        VPSchedule(torch.tensor([0.9, 0.5], dtype=torch.float64), "flow")
