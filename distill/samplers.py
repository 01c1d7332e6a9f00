"""The stock diffusers scheduler of a student: its configuration alone makes the family's pipeline visit the K steps.

A few-step student knows only the steps that it was trained on. So the scheduler that is exported is found from the
training grid, run as the pipeline will run it, and compared with that grid; one that visits other times is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from blade_compile.distill.errors import ConfigError
from blade_compile.distill.grids import Grid, scheduler_grid
from blade_compile.distill.schedules import FlowSchedule, Schedule, VPSchedule

PASSES_SIGMAS = frozenset({"flux", "ltx", "hunyuan_video"})
"""Families whose pipelines give the scheduler u = 1, 1 - 1/K .. 1/K; the others give it K alone."""

_VP_KEYS = (
    "beta_schedule", "beta_start", "beta_end", "trained_betas", "num_train_timesteps", "prediction_type",
    "rescale_betas_zero_snr", "snr_shift_scale",
)  # fmt: skip


def pipeline_sigmas(family: str | None, steps: int) -> list[float] | None:
    """What the family's pipeline passes to ``set_timesteps`` beside K; None: nothing."""
    return [1 - i / steps for i in range(steps)] if family in PASSES_SIGMAS else None


def trailing_by_terminal(shift: float, steps: int, horizon: float = 1000.0) -> dict[str, float]:
    """``shift`` and ``shift_terminal`` with which FlowMatchEuler, given K alone, takes K trailing steps.

    Left alone it divides [1, 1/T] instead of [1, 1/K], shifts twice, and spends the last step next to the clean end.
    Its ``shift_terminal`` stretches the result: 1 - s is multiplied by a constant. A shift is a Moebius map, so there
    is another shift, a, for which the stretched steps are the trailing ones of the wanted shift s exactly:
    with c = (1 - 1/K) / (1 - u_K), u_K its last even step, a - 1 = (s - 1) c / (1 + (s - 1)(1 - c)).

    Args:
        shift: s, of the grid.
        steps: K, 2 or more.
        horizon: T.
    """
    a = shift
    for _ in range(50):  # u_K depends on a, weakly: a contraction by about 1 / T
        last = a / horizon / (1 + (a - 1) / horizon)
        c = (1 - 1 / steps) / (1 - last)
        a = 1 + (shift - 1) * c / (1 + (shift - 1) * (1 - c))
    return {"shift": a, "shift_terminal": shift / steps / (1 + (shift - 1) / steps)}


def _flow_candidates(family: str | None, schedule: FlowSchedule, steps: int, eta: float) -> Iterator[Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    common: dict[str, Any] = {"num_train_timesteps": int(schedule.horizon), "stochastic_sampling": eta == 0}
    if family not in PASSES_SIGMAS and steps > 1:
        shifts: dict[str, Any] = {**trailing_by_terminal(schedule.shift, steps, schedule.horizon)}
        yield FlowMatchEulerDiscreteScheduler(**common, **shifts)
    yield FlowMatchEulerDiscreteScheduler(**common, shift=schedule.shift)
    if eta > 0:
        yield UniPCMultistepScheduler(
            num_train_timesteps=int(schedule.horizon), prediction_type="flow_prediction", use_flow_sigmas=True,
            flow_shift=schedule.shift, solver_order=1, disable_corrector=list(range(steps)),
        )  # fmt: skip


def _vp_candidates(
    family: str | None, schedule: VPSchedule, base: Mapping[str, Any], steps: int, eta: float
) -> Iterator[Any]:
    from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

    kept = {key: base[key] for key in _VP_KEYS if base.get(key) is not None}
    plain = {key: value for key, value in kept.items() if key != "snr_shift_scale"}
    ends: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": True}  # the last step ends at the clean sample
    if eta == 0:  # DDIM's own eta is another: at 1 it still keeps a share of the estimated noise
        if family == "cogvideox":  # LCM knows no snr_shift_scale, so the betas say it
            levels = schedule.alphas_cumprod
            betas = 1 - levels / torch.cat([levels.new_ones(1), levels[:-1]])
            shape = {"num_train_timesteps": len(betas), "trained_betas": betas.tolist()}
            plain = {"prediction_type": plain.get("prediction_type", "epsilon"), **shape}
        yield LCMScheduler(**plain, **ends, original_inference_steps=steps)  # x0 diffused anew to the next level
        return
    for spacing in ("trailing", "leading"):
        offset = int(base.get("steps_offset", 0)) if spacing == "leading" else 0
        given = {**ends, "timestep_spacing": spacing, "steps_offset": offset}
        if family == "cogvideox":
            yield CogVideoXDDIMScheduler(**kept, **given)
        else:
            yield DDIMScheduler(**plain, **given)
    if family != "cogvideox":
        yield DPMSolverMultistepScheduler(**plain, solver_order=1, timestep_spacing="linspace")


def _same(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Equal but for the rounding of a scheduler that computes in fp32."""
    return len(a) == len(b) and all(abs(x - y) <= 2e-5 * max(abs(x), abs(y)) + 2e-6 for x, y in zip(a, b))


def visits(scheduler: Any, family: str | None, schedule: Schedule, grid: Grid) -> bool:
    """True where the family's pipeline, with this scheduler and K, takes exactly the grid's steps."""
    fresh = type(scheduler).from_config(scheduler.config)
    try:
        found = scheduler_grid(fresh, schedule, grid.steps, pipeline_sigmas(family, grid.steps))
    except ValueError:
        return False
    if isinstance(schedule, VPSchedule):
        table = fresh.alphas_cumprod.double()
        if table.shape != schedule.alphas_cumprod.shape or not torch.allclose(
            table, schedule.alphas_cumprod, rtol=1e-3, atol=1e-6
        ):
            return False
    return _same(found.times, grid.times) and _same(found.sigmas, grid.sigmas)


def student_scheduler(
    family: str | None,
    grid: Grid,
    schedule: Schedule,
    base: Mapping[str, Any] | None = None,
    eta: float = 1.0,
) -> Any:
    """The scheduler to export.

    Args:
        family: whose pipeline will run it; None: one that gives K alone.
        grid: the steps that the student was trained on.
        schedule: of the model, with the shift of the grid.
        base: the base model's scheduler configuration; needed for VP models, whose betas it holds.
        eta: of the training. At 0 (all noise fresh) the sampler that also renoises; above 0 the deterministic one, as
            BLADE does with its eta of 0.9.

    Returns:
        A diffusers scheduler whose ``save_pretrained`` writes ``scheduler_config.json``.

    Raises:
        ConfigError: no stock scheduler takes these steps.
    """
    if isinstance(schedule, FlowSchedule):
        candidates = _flow_candidates(family, schedule, grid.steps, eta)
    elif base is None:
        raise ConfigError("a VP model's scheduler can't be exported without the base's scheduler_config.json")
    else:
        candidates = _vp_candidates(family, schedule, base, grid.steps, eta)
    for scheduler in candidates:
        if visits(scheduler, family, schedule, grid):
            return scheduler
    times = ", ".join(f"{t:g}" for t in grid.times)
    raise ConfigError(
        f"no stock scheduler of diffusers takes the {grid.steps} steps that the student was trained on ({times}) in the"
        f" {family or 'custom'} pipeline; train on flow_grid or vp_grid with trailing spacing and this model's shift"
    )
