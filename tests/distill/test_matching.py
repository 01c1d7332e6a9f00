"""Roll-out and losses against computations by hand on tiny tensors, whatever the options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from blade_compile.distill.config_sections import MethodConfig
from blade_compile.distill.grids import flow_grid, vp_grid
from blade_compile.distill.matching import Draws, Matching
from blade_compile.distill.schedules import FlowSchedule, Schedule, VPSchedule, vp_schedule

DIM, BATCH = 3, 4
FLOW = FlowSchedule(shift=2.0, horizon=10.0)
EPSILON = vp_schedule(beta_schedule="linear", beta_start=1e-3, beta_end=0.2, num_train_timesteps=60)
VELOCITY = VPSchedule(EPSILON.alphas_cumprod, "v")
SCHEDULES = {"flow": FLOW, "epsilon": EPSILON, "v": VELOCITY}
CONDITION = {"shift": torch.tensor([[0.3], [-0.2], [0.1], [0.5]])}
NONE = {"shift": torch.tensor([[0.05]] * BATCH)}


class Lines:
    """Three models that are lines in x: a (1 + t) x + b + the condition's shift."""

    def __init__(self, student: float = 0.2, critic: float = 0.4, teacher: float = 0.3) -> None:
        self.slopes = {
            name: torch.tensor(value, requires_grad=name != "teacher")
            for name, value in (("student", student), ("critic", critic), ("teacher", teacher))
        }
        self.told: list[tuple[str, int]] = []

    def predict(self, role: str, x: Tensor, time: Tensor, condition: Mapping[str, Any]) -> Tensor:
        assert time.shape == (len(x),) and time.dtype == torch.float32
        return self.slopes[role] * (1 + time[:, None] / 20) * x + 0.1 + condition["shift"]

    def student(self, x: Tensor, time: Tensor, condition: Mapping[str, Any], *, steps: int) -> Tensor:
        self.told.append(("student", steps))
        return self.predict("student", x, time, condition)

    def critic(self, x: Tensor, time: Tensor, condition: Mapping[str, Any], *, steps: int) -> Tensor:
        self.told.append(("critic", steps))
        return self.predict("critic", x, time, condition)

    @torch.no_grad()
    def teacher(self, x: Tensor, time: Tensor, condition: Mapping[str, Any]) -> Tensor:
        return self.predict("teacher", x, time, condition)


def _matching(schedule: Schedule = FLOW, models: Any = None, steps: int = 3, **method: Any) -> Matching:
    grid = flow_grid(schedule, steps) if isinstance(schedule, FlowSchedule) else vp_grid(schedule, steps)
    given = {"cfg_scale": 1.0, "importance_weight": False, "normaliser": False, **method}
    return Matching(models or Lines(), schedule, grid, MethodConfig(steps=steps, **given))


def _draws(step: int = 5, samples: Any = range(BATCH)) -> Draws:
    return Draws(11, step, samples)


def _start(draws: Draws) -> Tensor:
    return draws.normal((DIM,), "start")


# By hand: one sample at a time, in plain numbers of fp64, from the formulas.


def _levels(schedule: Schedule, time: float) -> tuple[float, float]:
    if isinstance(schedule, FlowSchedule):
        return 1 - time / schedule.horizon, time / schedule.horizon
    table = [1.0, *schedule.alphas_cumprod.sqrt().tolist()]
    low = min(math.floor(time + 1), len(table) - 2)
    alpha = table[low] + (time + 1 - low) * (table[low + 1] - table[low])
    return alpha, math.sqrt(1 - alpha * alpha)


def _x0_eps(kind: str, x: Tensor, out: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    if kind == "flow":
        return x - sigma * out, x + (1 - sigma) * out
    if kind == "v":
        return alpha * x - sigma * out, sigma * x + alpha * out
    return (x - sigma * out) / alpha, out


class Hand:
    """What the losses should be."""

    def __init__(self, matching: Matching, draws: Draws) -> None:
        self.m, self.draws = matching, draws
        self.slopes = {name: float(slope.detach()) for name, slope in matching.models.slopes.items()}  # type: ignore[attr-defined]
        self.kind = matching.schedule.prediction

    def model(self, role: str, x: Tensor, time: float, shift: float) -> tuple[Tensor, Tensor]:
        out = self.slopes[role] * (1 + time / 20) * x + 0.1 + shift
        return _x0_eps(self.kind, x, out, *_levels(self.m.schedule, time))

    def mixed(self, x0: Tensor, eps: Tensor, i: int, b: int, purpose: str) -> Tensor:
        eta = self.m.method.eta
        noise = self.draws.normal((DIM,), f"{purpose} eta")[b].double()
        alpha, sigma = self.m.grid.alphas[i + 1], self.m.grid.sigmas[i + 1]
        return alpha * x0 + sigma * (eta * eps + math.sqrt(1 - eta * eta) * noise)

    def points(self, b: int) -> list[Tensor]:
        x, points = _start(self.draws)[b].double(), []
        for i, time in enumerate(self.m.grid.times):
            points.append(x)
            x0, eps = self.model("student", x, time, float(CONDITION["shift"][b]))
            x = self.mixed(x0, eps, i, b, f"roll-out {i}")
        return [*points, x]

    def at(self, b: int, purpose: str) -> tuple[int, Tensor, Tensor]:
        """The drawn step, the student's point there and its x0."""
        i = int(self.draws.integers(self.m.grid.steps, f"{purpose} step")[b])
        x = self.points(b)[i]
        return i, x, self.model("student", x, self.m.grid.times[i], float(CONDITION["shift"][b]))[0]

    def diffused(self, b: int, purpose: str) -> tuple[Tensor, float, Tensor]:
        i, x, x0 = self.at(b, purpose)
        eps = self.model("student", x, self.m.grid.times[i], float(CONDITION["shift"][b]))[1]
        middle = self.mixed(x0, eps, i, b, purpose)
        u = float(self.draws.uniform(f"{purpose} tau")[b])
        bounds = [float(self.m.schedule.progress(torch.tensor(t))) for t in (*self.m.grid.times, self.m.grid.end)]
        high = (1.0 if self.m.method.intervals == "overlapping" else bounds[i]) - (1 - self.m.method.tau_max)
        low = max(bounds[i + 1], self.m.method.tau_min)
        tau = float(self.m.schedule.time(torch.tensor(low + u * max(high - low, 0), dtype=torch.float64)))
        noise = self.draws.normal((DIM,), f"{purpose} noise")[b].double()
        alpha, sigma = _levels(self.m.schedule, tau)
        ratio = alpha / self.m.grid.alphas[i + 1]
        added = math.sqrt(max(sigma**2 - (ratio * self.m.grid.sigmas[i + 1]) ** 2, 0))
        return ratio * middle + added * noise, tau, noise

    def guided(self, x: Tensor, time: float, b: int) -> Tensor:
        with_, without = (self.model("teacher", x, time, float(c["shift"][b]))[0] for c in (CONDITION, NONE))
        return without + self.m.method.cfg_scale * (with_ - without)

    def critic_loss(self, update: int = 0) -> float:
        method, total = self.m.method, 0.0
        for b in range(BATCH):
            x_tau, tau, noise = self.diffused(b, f"critic {update}")
            x0, shift = self.at(b, f"critic {update}")[2], float(CONDITION["shift"][b])
            found = self.model("critic", x_tau, tau, shift)[0]
            alpha, sigma = _levels(self.m.schedule, tau)
            weight = {"one": 1.0, "min_snr": min(alpha**2 / sigma**2, method.gamma), "inverse_variance": sigma**-2}
            error = float((found - x0).square().mean())
            if method.importance_weight:
                implied = (x_tau - alpha * x0) / sigma
                error *= math.exp(float(noise.square().mean() - implied.square().mean()) / 2)
            teacher = self.model("teacher", x_tau, tau, shift)[0]
            error += method.regulariser * float((found - teacher).square().mean())
            total += weight[method.weighting] * error
        return total / BATCH

    def student_loss(self, regress: bool = False) -> float:
        method, total = self.m.method, 0.0
        for b in range(BATCH):
            i, x, x0 = self.at(b, "student")
            if regress:
                teacher = self.guided(x, self.m.grid.times[i], b)
                difference = x0 - teacher
            else:
                x_tau, tau, _ = self.diffused(b, "student")
                teacher = self.guided(x_tau, tau, b)
                critic = self.model("critic", x_tau, tau, float(CONDITION["shift"][b]))[0]
                difference = critic - teacher
            c = method.huber_c
            squared = method.penalty == "squared"
            each = difference.square() if squared else (difference.square() + c * c).sqrt() - c
            size = min(max(float((x0 - teacher).abs().mean()), 1e-3), method.normaliser_cap or math.inf)
            total += float(each.mean()) / (size if method.normaliser else 1.0)
        return total / BATCH


OPTIONS: list[dict[str, Any]] = [
    {},
    {"eta": 0.6},
    {"intervals": "overlapping"},
    {"tau_min": 0.3, "tau_max": 0.8},
    {"importance_weight": True, "eta": 0.9},
    {"weighting": "inverse_variance"},
    {"weighting": "one", "regulariser": 0.5},
    {"gamma": 0.7},
    {"penalty": "squared", "cfg_scale": 4.0},
    {"huber_c": 0.3, "cfg_scale": 2.5, "normaliser": True},
    {"cfg_scale": 3.0, "normaliser": True, "normaliser_cap": 0.2},
    {"cfg_scale": 0.0},
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_losses_by_hand(schedule: str, options: dict[str, Any]) -> None:
    matching, draws = _matching(SCHEDULES[schedule], **options), _draws()
    hand = Hand(matching, draws)
    rolled = matching.roll_out(_start(draws), CONDITION, draws)
    points = torch.stack([torch.stack(hand.points(b)) for b in range(BATCH)], 1).float()
    close = {"rtol": 2e-4, "atol": 1e-5}
    torch.testing.assert_close(rolled.points, points[:-1], **close)
    torch.testing.assert_close(rolled.end, points[-1], **close)
    for update in (0, 1):
        loss = matching.critic_loss(rolled, CONDITION, draws, update)
        assert float(loss.detach()) == pytest.approx(hand.critic_loss(update), rel=1e-3)
    assert hand.critic_loss(0) != pytest.approx(hand.critic_loss(1), rel=1e-3)
    for loss_of, regress in ((matching.student_loss, False), (matching.regression_loss, True)):
        assert float(loss_of(rolled, CONDITION, NONE, draws).detach()) == pytest.approx(
            hand.student_loss(regress), rel=1e-3
        )


@pytest.mark.parametrize("name", ["tau_min", "tau_max", "eta", "gamma", "huber_c", "cfg_scale", "normaliser_cap"])
def test_every_option_of_the_hand_computation_counts(name: str) -> None:
    """So that none of the cases above agrees because the option does nothing on either side."""
    base: dict[str, Any] = {"eta": 0.8, "cfg_scale": 3.0, "normaliser": True, "tau_min": 0.1, "tau_max": 0.9}
    other = {"tau_min": 0.3, "tau_max": 0.6, "eta": 0.5, "gamma": 0.1, "huber_c": 0.5, "cfg_scale": 2.0}

    def losses(**options: Any) -> tuple[float, float]:
        matching, draws = _matching(**options), _draws()
        rolled = matching.roll_out(_start(draws), CONDITION, draws)
        critic = matching.critic_loss(rolled, CONDITION, draws)
        return float(critic.detach()), float(matching.student_loss(rolled, CONDITION, NONE, draws).detach())

    assert losses(**base) != losses(**base | {name: other.get(name, 0.01)})


def _gradients(matching: Matching, which: str) -> dict[str, Tensor | None]:
    draws = _draws()
    rolled = matching.roll_out(_start(draws), CONDITION, draws)
    parts = (rolled, CONDITION, NONE, draws) if which != "critic_loss" else (rolled, CONDITION, draws)
    getattr(matching, which)(*parts).backward()
    return {name: slope.grad for name, slope in matching.models.slopes.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("which", ["critic_loss", "student_loss", "regression_loss"])
def test_gradients_reach_their_own_model_alone(which: str) -> None:
    found = _gradients(_matching(cfg_scale=2.0, regulariser=0.5, importance_weight=True, normaliser=True), which)
    moved = "critic" if which == "critic_loss" else "student"
    assert found.pop(moved) not in {None, 0.0}
    assert list(found.values()) == [None, None]


@pytest.mark.parametrize("options", [{}, {"normaliser": True, "eta": 0.5}, {"penalty": "squared"}], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_gradient_where_the_critic_is_the_teacher(schedule: str, options: dict[str, Any]) -> None:
    models = Lines(critic=0.3, teacher=0.3)
    assert _gradients(_matching(SCHEDULES[schedule], models, **options), "student_loss")["student"] == 0
    models = Lines(critic=0.3, teacher=0.3)
    assert _gradients(_matching(SCHEDULES[schedule], models, cfg_scale=2.0), "student_loss")["student"] != 0


def test_k_is_told_and_the_teacher_is_called_once_without_guidance() -> None:
    models = Lines()
    calls: list[Any] = []
    teacher = models.teacher
    models.teacher = lambda x, time, condition: calls.append(condition) or teacher(x, time, condition)  # type: ignore[method-assign, assignment, func-returns-value]
    matching, draws = _matching(models=models, steps=2), _draws()
    rolled = matching.roll_out(_start(draws), CONDITION, draws)
    matching.critic_loss(rolled, CONDITION, draws)
    matching.student_loss(rolled, CONDITION, None, draws)
    assert models.told == [("student", 2)] * 2 + [("critic", 2), ("student", 2), ("critic", 2)]
    assert len(calls) == 1
    guided = _matching(models=models, cfg_scale=2.0)
    with pytest.raises(ValueError, match="unconditional input is needed"):
        guided.student_loss(guided.roll_out(_start(draws), CONDITION, draws), CONDITION, None, draws)


def test_samples_of_two_ranks_are_those_of_one() -> None:
    matching = _matching(cfg_scale=2.0, eta=0.7, normaliser=True, importance_weight=True)

    def losses(samples: range) -> Tensor:
        draws = _draws(samples=samples)
        part, none = ({"shift": c["shift"][samples.start : samples.stop]} for c in (CONDITION, NONE))
        rolled = matching.roll_out(_start(draws), part, draws)
        critic = matching.critic_loss(rolled, part, draws)
        return torch.stack((critic, matching.student_loss(rolled, part, none, draws))).detach()

    halves = (losses(range(2)) + losses(range(2, 4))) / 2
    torch.testing.assert_close(halves, losses(range(4)), rtol=1e-5, atol=1e-6)


def test_without_draws_the_roll_out_is_the_deterministic_sampler() -> None:
    start = _start(_draws())
    random, fixed = _matching(eta=0.5), _matching(eta=1.0)
    assert torch.equal(random.roll_out(start, CONDITION).end, fixed.roll_out(start, CONDITION, _draws()).end)
    assert not torch.equal(random.roll_out(start, CONDITION, _draws()).end, fixed.roll_out(start, CONDITION).end)
