"""The losses of Trajectory Distribution Matching, as pure functions (Luo et al., TDM; BLADE trains its student so).

A K-step student starts from noise and at step i, level (alpha_i, sigma_i), estimates x0 and eps. With z ~ N(0, I):

====  ====================================================================================  =======================
 (1)  x_{i+1} = alpha_{i+1} x0 + sigma_{i+1} (eta eps + sqrt(1 - eta^2) z)                  ``step_to``
 (2)  tau ~ U in the step's own interval, or from its end up to nearly pure noise           ``draw_tau``
 (3)  x_tau = r x_m + sqrt(sigma_tau^2 - (r sigma_m)^2) z,  r = alpha_tau / alpha_m         ``diffuse``
 (4)  w = exp((mean z^2 - mean e^2) / 2),  e = (x_tau - alpha_tau x0) / sigma_tau           ``importance_weight``
 (5)  min(alpha^2 / sigma^2, gamma), or 1 / sigma^2                                         ``noise_weight``
 (6)  x0_u + cfg_scale (x0_c - x0_u)                                                        ``guide``
 (7)  mean_B [w_noise w mean_d (x0_critic - x0)^2] + lambda mean_B [w_noise mean_d (x0_critic - x0_teacher)^2]
                                                                                            ``critic_loss``
 (8)  target = sg[x0 + x0_teacher - x0_critic]                                              ``student_target``
 (9)  n = mean_d |x0 - x0_teacher|, between floor and cap                                   ``normaliser``
(10)  rho(d) = sqrt(d^2 + c^2) - c, or d^2                                                  ``penalty``
(11)  mean_B [mean_d rho(x0 - target) / n]                                                  ``student_loss``
====  ====================================================================================  =======================

The point x_m in (3) is the student's next point (1), so what is matched are points of its trajectory. Gradients flow
through (11) into the student's x0 of one step only; the loss has the gradient that pulls x_m along the difference of
the two scores (TDM's regression form). Samples are ``[B, ...]``; levels ``[B]`` or ``[]``; all is computed in fp32 at
least, whatever comes in.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from blade_compile.distill.grids import Grid
from blade_compile.distill.schedules import Schedule, per_sample, wide

NoiseWeight = Literal["one", "min_snr", "inverse_variance"]
Penalty = Literal["pseudo_huber", "squared"]


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the first dimension: ``[B, ...]`` to ``[B]``."""
    return x.flatten(1).mean(1)


def step_to(
    x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, eta: float = 1.0, noise: Tensor | None = None
) -> Tensor:
    """The student's next point, equation (1).

    Args:
        x0, eps: the student's estimates ``[B, ...]``.
        alpha, sigma: levels of the next point.
        eta: share of the estimated noise that is kept; 1 is the deterministic step of DDIM and of Euler's method.
        noise: z, like ``x0``; needed where ``eta`` is below 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: it has to lie in [0, 1]")
    mixed = wide(eps)
    if eta < 1:
        if noise is None:
            raise ValueError(f"eta is {eta}: below 1 the step needs fresh noise")
        mixed = eta * mixed + (1 - eta**2) ** 0.5 * wide(noise)
    return per_sample(alpha, mixed) * wide(x0) + per_sample(sigma, mixed) * mixed


def draw_tau(
    schedule: Schedule,
    grid: Grid,
    step: Tensor,
    uniform: Tensor,
    *,
    overlapping: bool = False,
    low_margin: float = 0.02,
    high_margin: float = 0.01,
) -> Tensor:
    """The time at which the two scores are compared, equation (2).

    Separate intervals are TDM's and need no step condition on the critic; overlapping ones are BLADE's released
    setting. Times are even in the sampler's own variable, in which its steps are equally long.

    Args:
        schedule: of the model.
        grid: the student's steps.
        step: i of each sample, int64 ``[B]`` in [0, K).
        uniform: in [0, 1), ``[B]``.
        overlapping: from the step's end up to pure noise instead of to its start.
        low_margin: the lowest time, as progress in [0, 1]: below it nothing is left to compare.
        high_margin: progress kept away from the interval's upper end.

    Returns:
        Times fp64 ``[B]``.
    """
    bounds = schedule.progress(grid.bounds(step.device))
    low = bounds[step + 1].clamp_min(low_margin)
    top = schedule.progress(torch.tensor(schedule.first, dtype=torch.float64, device=step.device))
    high = (top.expand_as(low) if overlapping else bounds[step]) - high_margin
    return schedule.time(low + uniform.double() * (high - low).clamp_min(0))


def diffuse(
    x_mid: Tensor,
    alpha_mid: Tensor,
    sigma_mid: Tensor,
    alpha_tau: Tensor,
    sigma_tau: Tensor,
    noise: Tensor,
) -> Tensor:
    """Add noise to a point of level m until it has level tau, equation (3).

    Where tau is (by rounding) below m the variance to add would be negative; none is added then.
    """
    ratio = alpha_tau.double() / alpha_mid.double()
    added = (sigma_tau.double().square() - (ratio * sigma_mid.double()).square()).clamp_min(0).sqrt()
    x = wide(x_mid)
    return per_sample(ratio, x) * x + per_sample(added, x) * wide(noise)


def importance_weight(x_tau: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """How much likelier x_tau is from x0 with fresh noise than as it was drawn, equation (4); ``[B]``.

    The exponents are means, not sums, over the dimensions: the published form, the true ratio to the power 1 / d.

    Args:
        x_tau: from ``diffuse``.
        x0: the student's estimate.
        alpha, sigma: levels at tau.
        noise: the z given to ``diffuse``.
    """
    x = wide(x_tau)
    implied = (x - per_sample(alpha, x) * wide(x0)) / per_sample(sigma, x)
    return ((_mean(wide(noise).square()) - _mean(implied.square())) / 2).exp()


def noise_weight(alpha: Tensor, sigma: Tensor, kind: NoiseWeight = "min_snr", gamma: float = 5.0) -> Tensor:
    """Weight of an error in x0 at a noise level, equation (5); fp64, the shape of ``alpha``.

    ``min_snr`` is TDM's (Hang et al., gamma = 5). ``inverse_variance`` is BLADE's for CogVideoX; for flow matching it
    makes the error in x0 the error in the velocity.
    """
    variance = sigma.double().square()
    if kind == "min_snr":
        return (alpha.double().square() / variance).clamp_max(gamma)
    if kind == "inverse_variance":
        return 1 / variance
    if kind == "one":
        return torch.ones_like(variance)
    raise ValueError(f"weight is {kind!r}: use one of {', '.join(get_args(NoiseWeight))}")


def guide(conditional: Tensor, unconditional: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance in its standard form, equation (6); 1 is no guidance, 0 no condition."""
    unconditional = wide(unconditional)
    return unconditional + cfg_scale * (wide(conditional) - unconditional)


def guidance_note(cfg_scale: float) -> str:
    """The scale in both conventions, for logs: x_u + s (x_c - x_u), and DMD2's and FastVideo's x_c + w (x_c - x_u)."""
    return f"cfg_scale {cfg_scale:g} (x_u + s (x_c - x_u)); {cfg_scale - 1:g} in the form x_c + w (x_c - x_u)"


def critic_loss(
    x0_critic: Tensor,
    x0_student: Tensor,
    weight: Tensor,
    *,
    importance: Tensor | None = None,
    x0_teacher: Tensor | None = None,
    teacher_weight: float = 0.0,
) -> Tensor:
    """Denoising loss of the critic, which learns the student's distribution, equation (7).

    Args:
        x0_critic: the critic's estimate at x_tau, ``[B, ...]``; gradients flow here.
        x0_student: what the student made at the step, same shape.
        weight: from ``noise_weight``, ``[B]``.
        importance: from ``importance_weight``, ``[B]``; None: 1.
        x0_teacher: the teacher's estimate without guidance, which keeps the critic near it.
        teacher_weight: lambda of that part; BLADE uses 0.5 for CogVideoX, 0 for Wan.

    Returns:
        A scalar.
    """
    critic = wide(x0_critic)
    weight = weight.to(critic)
    error = weight * _mean((critic - wide(x0_student).detach()).square())
    if importance is not None:
        error = error * importance.to(critic).detach()
    if teacher_weight:
        if x0_teacher is None:
            raise ValueError(f"teacher_weight is {teacher_weight}: it needs the teacher's estimate")
        error = error + teacher_weight * weight * _mean((critic - wide(x0_teacher).detach()).square())
    return error.mean()


def student_target(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor) -> Tensor:
    """Where the student's estimate should move, equation (8); no gradient.

    Args:
        x0: the student's estimate at the step.
        x0_teacher: the (guided) teacher's estimate at x_tau.
        x0_critic: the critic's, without guidance.
    """
    return (wide(x0) + (wide(x0_teacher) - wide(x0_critic))).detach()  # exactly x0 where the two agree


def normaliser(x0: Tensor, x0_teacher: Tensor, floor: float = 1e-3, cap: float = float("inf")) -> Tensor:
    """The size of what the teacher would change, per sample, equation (9); ``[B]``, no gradient.

    BLADE caps it at 5; TDM does not.
    """
    return _mean((wide(x0) - wide(x0_teacher)).abs()).clamp(floor, cap).detach()


def penalty(difference: Tensor, kind: Penalty = "pseudo_huber", c: float = 1e-3) -> Tensor:
    """Element-wise, equation (10). Pseudo-Huber with a small c is nearly the absolute value: TDM's demo and BLADE."""
    if kind == "squared":
        return difference.square()
    if kind == "pseudo_huber":
        return (difference.square() + c * c).sqrt() - c
    raise ValueError(f"penalty is {kind!r}: use one of {', '.join(get_args(Penalty))}")


def student_loss(
    x0: Tensor,
    target: Tensor,
    *,
    kind: Penalty = "pseudo_huber",
    c: float = 1e-3,
    normalise_by: Tensor | None = None,
) -> Tensor:
    """The student's loss, equation (11).

    Args:
        x0: the student's estimate, ``[B, ...]``; gradients flow here.
        target: from ``student_target``.
        kind: ``pseudo_huber`` or ``squared``.
        c: of the pseudo-Huber penalty.
        normalise_by: from ``normaliser``, ``[B]``; None: 1.

    Returns:
        A scalar.
    """
    each = _mean(penalty(wide(x0) - wide(target).detach(), kind, c))
    return (each if normalise_by is None else each / normalise_by.to(each)).mean()
