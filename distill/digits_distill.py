"""Distil the digits teacher into a few-step student with block-sparse attention: the loop of the digits experiment.

A prototype of the trainer on one process: Trajectory Distribution Matching (``objective``) with the student compiled by
``torch.compile(backend="blade")``, so that every roll-out and every gradient goes through its sparse attention.
``python -m blade_compile.distill.digits_distill --out DIR --minutes M`` prints one line of numbers now and then.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blade_compile.distill import objective
from blade_compile.distill.digits_data import NUM_CLASSES
from blade_compile.distill.digits_judge import Judge, load_judge, real_clips, score
from blade_compile.distill.digits_model import NULL_CLASS, DigitsTransformer
from blade_compile.distill.digits_teacher import load_teacher, save_picture, save_teacher
from blade_compile.distill.grids import Grid, flow_grid
from blade_compile.distill.schedules import FlowSchedule, to_x0_eps

SCHEDULE = FlowSchedule(horizon=1.0)  # the digits model is called with s in [0, 1]


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How the student is trained."""

    steps: int = 4
    "K"
    shift: float = 1.0
    "of the student's grid"
    cfg_scale: float = 2.5
    "of the teacher inside the loss"
    sparsity: float = 0.75
    "share of key blocks dropped; 0: every block is kept, exactly dense"
    block_size: int = 16
    order: str = "none"
    batch: int = 16
    lr: float = 2e-4
    critic_lr: float = 4e-4
    critic_updates: int = 2
    "of the critic for one of the student"
    overlapping: bool = True
    "compare the scores up to pure noise instead of inside the step's own interval"
    eta: float = 1.0
    warmup: int = 60
    "iterations of regression on the guided teacher before the scores are matched"
    ema: float = 0.98
    beta1: float = 0.0
    seed: int = 0


class Roles:
    """Teacher, student, critic and the student's average, with their compiled forward passes."""

    def __init__(self, teacher: DigitsTransformer, settings: DistillSettings) -> None:
        self.teacher = teacher
        self.student = deepcopy(teacher).requires_grad_(True)
        self.critic = deepcopy(teacher).requires_grad_(True)
        self.average = deepcopy(teacher)
        options: dict[str, Any] = {
            "sparsity": settings.sparsity,
            "block_size": settings.block_size,
            "probe_tokens": min(16, settings.block_size),
            "order": settings.order,
            "grid": teacher.config.grid,
            "when": "always",
            "min_tokens": 1,
        }
        if settings.order == "none":
            del options["order"], options["grid"]
        self.run_student = torch.compile(self.student, backend="blade", options=options, dynamic=False)
        self.run_average = torch.compile(self.average, backend="blade", options=options, dynamic=False)
        self.run_teacher = torch.compile(self.teacher, dynamic=False)
        self.run_critic = torch.compile(self.critic, dynamic=False)

    def guided_x0(self, x: Tensor, tau: Tensor, label: Tensor, cfg_scale: float) -> Tensor:
        """The teacher's estimate with guidance."""
        both = self.run_teacher(
            x.repeat(2, 1, 1, 1, 1), tau.repeat(2), torch.cat((label, label.new_full(label.shape, NULL_CLASS)))
        )
        conditional, unconditional = both.chunk(2)
        return _x0(x, objective.guide(conditional, unconditional, cfg_scale), tau)


def _x0(x: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    return to_x0_eps(x, velocity, 1 - time, time, "flow")[0]


class Distiller:
    """One run."""

    def __init__(self, teacher: DigitsTransformer, settings: DistillSettings) -> None:
        self.settings, self.roles, self.iteration = settings, Roles(teacher, settings), 0
        self.grid: Grid = flow_grid(FlowSchedule(shift=settings.shift, horizon=1.0), settings.steps)
        self.schedule = FlowSchedule(shift=settings.shift, horizon=1.0)
        self.alphas, self.sigmas = self.grid.levels()
        self.generator = torch.Generator().manual_seed(settings.seed)
        betas = (settings.beta1, 0.95)
        self.student_optimizer = torch.optim.AdamW(
            self.roles.student.parameters(), settings.lr, betas=betas, weight_decay=1e-4, fused=True
        )
        self.critic_optimizer = torch.optim.AdamW(
            self.roles.critic.parameters(), settings.critic_lr, betas=betas, weight_decay=1e-4, fused=True
        )

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator)

    @torch.no_grad()
    def roll_out(self, noise: Tensor, label: Tensor, model: Any = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K steps of the student: points, x0 and eps of each step ``[K, B, ...]``, and the final clips."""
        model = self.roles.run_student if model is None else model
        x, kept = noise, []
        for i, now in enumerate(self.grid.times):
            velocity = model(x, torch.full((len(x),), now), label)
            x0, eps = to_x0_eps(x, velocity, self.alphas[i], self.sigmas[i], "flow")
            kept.append((x, x0, eps))
            fresh = self._noise(x) if self.settings.eta < 1 else None
            x = objective.step_to(x0, eps, self.alphas[i + 1], self.sigmas[i + 1], self.settings.eta, fresh)
        points, clean, noises = (torch.stack(part) for part in zip(*kept))
        return points, clean, noises, x

    def diffused(self, x0: Tensor, eps: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The step's end, diffused to a random time: x_tau and tau ``[B]``."""
        uniform = torch.rand(len(step), generator=self.generator)
        tau = objective.draw_tau(self.schedule, self.grid, step, uniform, overlapping=self.settings.overlapping)
        middle = self.alphas[step + 1], self.sigmas[step + 1]
        fresh = self._noise(x0) if self.settings.eta < 1 else None
        x_mid = objective.step_to(x0.detach(), eps.detach(), *middle, self.settings.eta, fresh)
        return objective.diffuse(x_mid, *middle, *self.schedule.levels(tau), self._noise(x0)), tau.float()

    def train_critic(self, clean: Tensor, noises: Tensor, label: Tensor) -> float:
        """One update of the critic on a stored roll-out; in terms of the velocity."""
        batch = len(label)
        step = torch.randint(0, self.settings.steps, (batch,), generator=self.generator)
        x0, eps = clean[step, torch.arange(batch)], noises[step, torch.arange(batch)]
        x_tau, tau = self.diffused(x0, eps, step)
        estimate = _x0(x_tau, self.roles.run_critic(x_tau, tau, label), tau)
        weight = objective.noise_weight(1 - tau, tau, "inverse_variance")
        loss = objective.critic_loss(estimate, x0, weight)
        return _update(self.critic_optimizer, self.roles.critic, loss)

    def train_student(self, points: Tensor, label: Tensor, *, match: bool) -> float:
        """One update of the student at a random step of each sample."""
        batch = len(label)
        step = torch.randint(0, self.settings.steps, (batch,), generator=self.generator)
        x = points[step, torch.arange(batch)]
        now = torch.tensor(self.grid.times)[step]
        velocity = self.roles.run_student(x, now, label)
        x0, eps = to_x0_eps(x, velocity, self.alphas[step], self.sigmas[step], "flow")
        with torch.no_grad():
            if match:
                x_tau, tau = self.diffused(x0, eps, step)
                teacher = self.roles.guided_x0(x_tau, tau, label, self.settings.cfg_scale)
                critic = _x0(x_tau, self.roles.run_critic(x_tau, tau, label), tau)
                target = objective.student_target(x0, teacher, critic)
            else:
                target = teacher = self.roles.guided_x0(x, now, label, self.settings.cfg_scale)
        loss = objective.student_loss(x0, target, normalise_by=objective.normaliser(x0, teacher))
        return _update(self.student_optimizer, self.roles.student, loss)

    def iterate(self) -> dict[str, float]:
        """One iteration: roll-out, critic, student, average."""
        config = self.roles.teacher.config
        label = torch.randint(0, NUM_CLASSES, (self.settings.batch,), generator=self.generator)
        noise = self._noise(torch.empty(len(label), 1, config.frames, config.size, config.size))
        points, clean, noises, _ = self.roll_out(noise, label)
        match = self.iteration >= self.settings.warmup
        critic = [self.train_critic(clean, noises, label) for _ in range(self.settings.critic_updates)]
        student = self.train_student(points, label, match=match)
        self.iteration += 1
        decay = min(self.settings.ema, self.iteration / (self.iteration + 5))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.roles.average.parameters()), list(self.roles.student.parameters()), 1 - decay
            )
        return {"critic": critic[-1], "student": student}

    def judge(self, judge: Judge, count: int) -> tuple[dict[str, float], Tensor]:
        """Numbers and clips of the averaged student, from fixed noise."""
        config = self.roles.teacher.config
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(count, 1, config.frames, config.size, config.size, generator=generator)
        label = torch.arange(count) % NUM_CLASSES
        parts = [self.roll_out(x, y, self.roles.run_average)[3] for x, y in zip(noise.split(50), label.split(50))]
        clips = torch.cat(parts)
        return score(judge, clips, label, real_clips(config.clips, 1000)[0]).as_dict(), clips


def _update(optimizer: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> float:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def main(arguments: list[str] | None = None) -> int:
    """The script; returns the exit code."""
    folder = Path(__file__).parent / "digits"
    parser = argparse.ArgumentParser(prog="python -m blade_compile.distill.digits_distill", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for numbers, pictures and the student")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--judge-every", type=float, default=150, help="seconds between looks")
    parser.add_argument("--teacher", type=Path, default=folder / "teacher.safetensors")
    parser.add_argument("--judge", type=Path, default=folder / "judge.safetensors")
    for one in fields(DistillSettings):
        name, value = f"--{one.name.replace('_', '-')}", one.default
        if isinstance(value, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(name, type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    settings = DistillSettings(**{f.name: given[f.name] for f in fields(DistillSettings)})
    out: Path = given["out"]
    out.mkdir(parents=True, exist_ok=True)
    run, judge = Distiller(load_teacher(given["teacher"]), settings), load_judge(given["judge"])
    start, looked, means = time.monotonic(), -1e9, {"critic": 0.0, "student": 0.0}
    while (seconds := time.monotonic() - start) < given["minutes"] * 60:
        last = seconds + 20 > given["minutes"] * 60
        if seconds - looked > given["judge_every"] or last:
            looked = seconds
            numbers, clips = run.judge(judge, 100)
            line = {"iteration": run.iteration, "seconds": round(seconds), **means, **numbers}
            sys.stdout.write(json.dumps({k: round(v, 4) for k, v in line.items()}) + "\n")
            sys.stdout.flush()
            save_picture(clips[:20], out / f"student_{run.iteration:05d}.png")
            save_teacher(run.roles.average, out / "student.safetensors", {"settings": json.dumps(asdict(settings))})
        if last:
            break
        losses = run.iterate()
        means = {k: 0.95 * means[k] + 0.05 * v if means[k] else v for k, v in losses.items()}
    return 0


if __name__ == "__main__":
    sys.exit(main())
