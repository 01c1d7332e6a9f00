"""Noise schedules in real-valued time, and what a model predicts: x0, noise, or one of two velocities.

Everywhere x_t = alpha_t x0 + sigma_t eps. Times are those that the model is called with, in its own units, and need not
be integers: no table is searched, so no time can be missing from one.

- Flow matching: alpha = 1 - t/T, sigma = t/T. A shift changes which times are visited, not what a time means.
- Variance preserving (VP): alpha^2 + sigma^2 = 1. At integers alpha^2 is the scheduler's ``alphas_cumprod``; between
  them alpha is linear, so it falls strictly; at -1 the sample is clean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Prediction = Literal["flow", "v", "epsilon", "sample"]


def wide(x: Tensor) -> Tensor:
    """At least fp32: differences of nearly equal samples drown in bf16's rounding."""
    return x if x.dtype == torch.float64 else x.float()


def per_sample(level: Tensor, x: Tensor) -> Tensor:
    """A level of each sample ``[B]``, or one for all ``[]``, shaped and typed to multiply ``wide(x)`` ``[B, ...]``."""
    level = level.to(device=x.device, dtype=wide(x).dtype)
    return level.reshape(level.shape + (1,) * (x.dim() - 1)) if level.dim() else level


@dataclass(frozen=True)
class FlowSchedule:
    """Flow matching with linear paths: alpha = 1 - t/T and sigma = t/T (Lipman et al.; Liu et al.).

    ``progress`` and ``time`` translate between t and the even variable u in [0, 1] that the sampler divides into equal
    steps: t/T = shift u / (1 + (shift - 1) u) (Esser et al., eq. 23).
    """

    shift: float = 1.0
    "above 0; 3 for Wan at 480p and SD3, 1 for none"
    horizon: float = 1000.0
    "the model's time of pure noise, T"
    prediction: Prediction = "flow"

    def __post_init__(self) -> None:
        if self.shift <= 0 or self.horizon <= 0:
            raise ValueError(f"shift is {self.shift} and horizon {self.horizon}: both have to be above 0")

    @property
    def first(self) -> float:
        """The time of the noisiest sample."""
        return self.horizon

    @property
    def clean(self) -> float:
        """The time of the clean sample."""
        return 0.0

    def levels(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise levels, fp64, of times of any shape; times outside [0, T] count as the nearer end."""
        sigma = (time.double() / self.horizon).clamp(0, 1)
        return 1 - sigma, sigma

    def time(self, progress: Tensor) -> Tensor:
        """From u in [0, 1] to t, fp64."""
        u = progress.double()
        return self.horizon * self.shift * u / (1 + (self.shift - 1) * u)

    def progress(self, time: Tensor) -> Tensor:
        """Back from t to u in [0, 1], fp64: the inverse of ``time``."""
        s = time.double() / self.horizon
        return s / (self.shift - (self.shift - 1) * s)


@dataclass(frozen=True)
class VPSchedule:
    """A variance preserving schedule given by its ``alphas_cumprod``, which have to fall strictly."""

    alphas_cumprod: Tensor = field(repr=False)
    "alpha^2 at t = 0 .. T-1, fp64 ``[T]``; the last may be 0 (zero terminal SNR)"
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if self.prediction not in get_args(Prediction) or self.prediction == "flow":
            raise ValueError(f"prediction is {self.prediction!r}: a VP model predicts v, epsilon or sample")
        if table.dim() != 1 or not bool((table.diff() < 0).all()) or not bool(((table >= 0) & (table < 1)).all()):
            raise ValueError("alphas_cumprod has to be one-dimensional, below 1, at least 0 and strictly falling")
        if self.prediction == "epsilon" and float(table[-1]) == 0:
            raise ValueError(
                "prediction is 'epsilon' and the terminal SNR is 0: the noise says nothing about x0 there; "
                "use prediction 'v', or the schedule without rescale_betas_zero_snr"
            )
        alphas = torch.cat((torch.ones(1, dtype=torch.float64), table.detach().cpu().double().sqrt()))
        object.__setattr__(self, "_alphas", alphas)

    @property
    def horizon(self) -> float:
        """Number of training times, T."""
        return float(len(self.alphas_cumprod))

    @property
    def first(self) -> float:
        """The time of the noisiest sample."""
        return self.horizon - 1

    @property
    def clean(self) -> float:
        """The time of the clean sample."""
        return -1.0

    def levels(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise levels, fp64, of times of any shape; times outside [-1, T-1] count as the nearer end."""
        alphas: Tensor = self._alphas.to(time.device)  # type: ignore[attr-defined]
        place = (time.double() + 1).clamp(0, len(alphas) - 1)
        low = place.floor().long().clamp(max=len(alphas) - 2)
        alpha = torch.lerp(alphas[low], alphas[low + 1], place - low)
        return alpha, (1 - alpha.square()).sqrt()

    def time(self, progress: Tensor) -> Tensor:
        """From u in [0, 1] to t in [-1, T-1], fp64: evenly."""
        return progress.double() * self.horizon - 1

    def progress(self, time: Tensor) -> Tensor:
        """Back from t to u in [0, 1], fp64: the inverse of ``time``."""
        return (time.double() + 1) / self.horizon


Schedule = FlowSchedule | VPSchedule


def vp_schedule(
    *,
    beta_schedule: str = "scaled_linear",
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_train_timesteps: int = 1000,
    trained_betas: Sequence[float] | None = None,
    snr_shift_scale: float = 1.0,
    rescale_betas_zero_snr: bool = False,
    prediction: Prediction = "epsilon",
) -> VPSchedule:
    """The VP schedule of a diffusers configuration; the arguments have the names they have there.

    Args:
        beta_schedule: ``linear`` (DiT, PixArt), ``scaled_linear`` (linear in the root: Stable Diffusion, CogVideoX).
        beta_start, beta_end: first and last beta.
        num_train_timesteps: T.
        trained_betas: all betas, instead of the above.
        snr_shift_scale: abar -> abar / (scale + (1 - scale) abar), which divides the SNR by the scale (CogVideoX).
        rescale_betas_zero_snr: move the last SNR to zero (Lin et al., "Common Diffusion Noise Schedules", algorithm 1).
        prediction: what the model predicts.
    """
    if trained_betas is not None:
        betas = torch.tensor(list(trained_betas), dtype=torch.float64)
    elif beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64).square()
    else:
        raise ValueError(f"beta_schedule is {beta_schedule!r}: use linear or scaled_linear, or give trained_betas")
    cumulative = (1 - betas).cumprod(0)
    cumulative = cumulative / (snr_shift_scale + (1 - snr_shift_scale) * cumulative)
    if rescale_betas_zero_snr:
        root = cumulative.sqrt()
        cumulative = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    return VPSchedule(cumulative, prediction)


_VP_PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


def schedule_of(config: Mapping[str, Any]) -> Schedule:
    """The schedule that a diffusers scheduler configuration describes.

    Args:
        config: ``scheduler.config``, or the content of ``scheduler_config.json``.

    Raises:
        ValueError: for a configuration that is neither linear flow matching nor a VP schedule known here.
    """
    name = str(config.get("_class_name", ""))
    horizon = config.get("num_train_timesteps", 1000)
    # A live scheduler's configuration doesn't hold its class, but only FlowMatch*Scheduler has a shift and no betas.
    by_keys = "shift" in config and "beta_schedule" not in config
    if "FlowMatch" in name or by_keys or config.get("prediction_type") == "flow_prediction":
        if config.get("invert_sigmas"):
            raise ValueError("invert_sigmas is set: times that run from clean to noise are not supported")
        shift = config.get("flow_shift", config.get("shift", 1.0))
        return FlowSchedule(shift=float(shift), horizon=float(horizon))
    kind = config.get("prediction_type", "epsilon")
    if kind not in _VP_PREDICTIONS:
        raise ValueError(f"prediction_type is {kind!r}: use flow_prediction, {', '.join(_VP_PREDICTIONS)}")
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise ValueError(f"the scheduler {name or 'without _class_name'} has no beta_schedule: it is no VP scheduler")
    return vp_schedule(
        beta_schedule=config.get("beta_schedule", "linear"),
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        num_train_timesteps=horizon,
        trained_betas=config.get("trained_betas"),
        snr_shift_scale=config.get("snr_shift_scale") or 1.0,
        rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr")),
        prediction=_VP_PREDICTIONS[kind],
    )


def to_x0_eps(x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """A model's output as x0 and eps with alpha x0 + sigma eps = x.

    flow: v = eps - x0 (alpha + sigma = 1). v: v = alpha eps - sigma x0 (Salimans and Ho, appendix D).

    Args:
        x: noisy samples ``[B, ...]``.
        output: what the model returned, same shape.
        alpha, sigma: levels of the samples, ``[B]`` or ``[]``.
        prediction: what the output means.

    Returns:
        x0 and eps, fp32 (fp64 for fp64).
    """
    x, output = wide(x), wide(output)
    a, s = per_sample(alpha, x), per_sample(sigma, x)
    if prediction == "flow":
        return x - s * output, x + a * output
    if prediction == "v":
        return a * x - s * output, s * x + a * output
    if prediction == "epsilon":
        return (x - s * output) / a, output
    return output, (x - a * output) / s


def from_x0_eps(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction: Prediction) -> Tensor:
    """What a perfect model would return for x = alpha x0 + sigma eps; the inverse of ``to_x0_eps``."""
    x0, eps = wide(x0), wide(eps)
    a, s = per_sample(alpha, x0), per_sample(sigma, x0)
    if prediction == "flow":
        return eps - x0
    if prediction == "v":
        return a * eps - s * x0
    return eps if prediction == "epsilon" else x0


def eps_of(x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise between a noisy sample and its clean one, (x - alpha x0) / sigma; sigma above 0."""
    x, x0 = wide(x), wide(x0)
    return (x - per_sample(alpha, x) * x0) / per_sample(sigma, x)
