"""The K steps of a student: the times and levels that the exported sampler visits, so that it is trained on no others.

``flow_grid`` and ``vp_grid`` say them in closed form; ``scheduler_grid`` reads them from a diffusers scheduler itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from blade_compile.distill.schedules import FlowSchedule, Schedule, VPSchedule

FlowSpacing = Literal["trailing", "euler", "unipc"]
VPSpacing = Literal["trailing", "leading", "linspace"]


@dataclass(frozen=True)
class Grid:
    """K steps from noise to a clean sample.

    Raises ``ValueError`` where the noise doesn't fall from step to step.
    """

    times: tuple[float, ...]
    "what the model is called with at each step, K values"
    alphas: tuple[float, ...]
    "signal level at the start of each step and at the end, K + 1 values"
    sigmas: tuple[float, ...]
    "noise level likewise"
    end: float
    "the time of the last level: what is left is clean, or nearly"

    def __post_init__(self) -> None:
        if not len(self.times) == len(self.alphas) - 1 == len(self.sigmas) - 1 > 0:
            raise ValueError(
                f"found {len(self.times)} times, {len(self.alphas)} alphas and {len(self.sigmas)} sigmas: "
                "give K, K + 1 and K + 1"
            )
        ratios = [s / max(a, 1e-12) for a, s in zip(self.alphas, self.sigmas)]
        if any(after >= before for before, after in pairwise(ratios)):
            raise ValueError(f"the noise has to fall at every step, but sigma / alpha is {ratios}; use fewer steps")

    @property
    def steps(self) -> int:
        """K."""
        return len(self.times)

    def bounds(self, device: torch.device | str = "cpu") -> Tensor:
        """Times between which the intervals lie, K + 1 values from noise to clean, fp64."""
        return torch.tensor((*self.times, self.end), dtype=torch.float64, device=device)

    def levels(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Signal and noise levels, fp64 ``[K + 1]``."""
        alphas = torch.tensor(self.alphas, dtype=torch.float64, device=device)
        return alphas, torch.tensor(self.sigmas, dtype=torch.float64, device=device)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}: a student needs 1 or more")


def flow_grid(schedule: FlowSchedule, steps: int, spacing: FlowSpacing = "trailing") -> Grid:
    """The steps of a flow-matching sampler.

    Args:
        schedule: gives shift and T.
        steps: K.
        spacing: ``trailing``: u = 1, 1 - 1/K .. 1/K, shifted: FlowMatchEulerDiscreteScheduler given
            ``sigmas=linspace(1, 1/K, K)``, as the Flux, Qwen-Image and LTX pipelines do. ``euler``: the same scheduler
            left alone, whose last step starts near 0 and which shifts twice. ``unipc``: UniPC with flow sigmas (Wan),
            whose model times are cut to integers.
    """
    _check_steps(steps)
    last = 1 / schedule.horizon
    if spacing == "trailing":
        u = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    elif spacing == "euler":
        first, smallest = (float(schedule.time(torch.tensor(x))) / schedule.horizon for x in (1.0, last))
        u = torch.linspace(first, smallest, steps, dtype=torch.float64)
    elif spacing == "unipc":
        u = torch.linspace(1, last, steps + 1, dtype=torch.float64)[:-1]
    else:
        raise ValueError(f"spacing is {spacing!r}: use one of {', '.join(get_args(FlowSpacing))}")
    sigmas = (schedule.time(u) / schedule.horizon).tolist()
    times = [sigma * schedule.horizon for sigma in sigmas]
    if spacing == "unipc":
        sigmas[0] = min(sigmas[0], 1 - 1e-6)  # as UniPC does, whose log-SNR has to be finite
        times = [float(int(sigma * schedule.horizon)) for sigma in sigmas]
    sigmas.append(0.0)
    return Grid(tuple(times), tuple(1 - s for s in sigmas), tuple(sigmas), 0.0)


def vp_grid(schedule: VPSchedule, steps: int, spacing: VPSpacing = "trailing", steps_offset: int = 0) -> Grid:
    """The steps of a VP sampler.

    Args:
        schedule: gives the levels.
        steps: K; for ``trailing`` and ``leading`` a divisor of T, because DDIM and CogVideoX's samplers move by T // K
            and would leave the grid otherwise.
        spacing: ``trailing``: T-1, T-1-T/K, .. (CogVideoX; DDIM so configured); ``leading``: .., T/K, 0, plus the
            offset; ``linspace``: K of K + 1 even times, rounded (DPM-Solver, PixArt).
        steps_offset: of ``leading``.
    """
    _check_steps(steps)
    total = int(schedule.horizon)
    if spacing in {"trailing", "leading"} and total % steps:
        fits = [k for k in range(1, 51) if total % k == 0]
        raise ValueError(f"steps is {steps}: with {spacing} spacing it has to divide {total}; use one of {fits}")
    if spacing == "trailing":
        times = [total - 1 - i * (total // steps) for i in range(steps)]
    elif spacing == "leading":
        times = [(steps - 1 - i) * (total // steps) + steps_offset for i in range(steps)]
    elif spacing == "linspace":
        even = torch.linspace(0, total - 1, steps + 1, dtype=torch.float64)
        times = [int(t) for t in even.round().flip(0)[:-1].tolist()]
    else:
        raise ValueError(f"spacing is {spacing!r}: use one of {', '.join(get_args(VPSpacing))}")
    if times[0] >= total:
        raise ValueError(f"steps_offset is {steps_offset}: the first time would be {times[0]}, beyond {total - 1}")
    alphas, sigmas = schedule.levels(torch.tensor([*times, schedule.clean], dtype=torch.float64))
    return Grid(tuple(float(t) for t in times), tuple(alphas.tolist()), tuple(sigmas.tolist()), schedule.clean)


def scheduler_grid(scheduler: Any, schedule: Schedule, steps: int, sigmas: Sequence[float] | None = None) -> Grid:
    """The steps of a diffusers scheduler, read from it after ``set_timesteps``.

    Args:
        scheduler: of the pipeline that will load the student. Its state changes.
        schedule: of the same configuration (``schedules.schedule_of``).
        steps: K.
        sigmas: what the pipeline passes to ``set_timesteps``, if it does.
    """
    _check_steps(steps)
    if sigmas is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(sigmas=list(sigmas))
    times = [float(t) for t in scheduler.timesteps]
    if len(times) != steps:
        raise ValueError(
            f"{type(scheduler).__name__} calls the model {len(times)} times for {steps} steps: a solver of second order"
            " can't be the sampler of a few-step student; export another scheduler"
        )
    stored = getattr(scheduler, "sigmas", None)
    if isinstance(schedule, FlowSchedule):
        if stored is None:
            raise ValueError(f"{type(scheduler).__name__} has no sigmas: it is no flow-matching scheduler")
        noise = [float(s) for s in stored]
        return Grid(tuple(times), tuple(1 - s for s in noise), tuple(noise), 0.0)
    alphas, noise_levels = schedule.levels(torch.tensor([*times, schedule.clean]))
    return Grid(tuple(times), tuple(alphas.tolist()), tuple(noise_levels.tolist()), schedule.clean)
