"""Every loss of the trainer against a computation by hand, and the whole of it on Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from blade_compile.distill.grids import Grid, flow_grid, vp_grid
from blade_compile.distill.objective import (
    critic_loss,
    diffuse,
    draw_tau,
    guidance_note,
    guide,
    importance_weight,
    noise_weight,
    normaliser,
    penalty,
    step_to,
    student_loss,
    student_target,
)
from blade_compile.distill.schedules import FlowSchedule, Schedule, vp_schedule

SCHEDULES: list[Schedule] = [
    FlowSchedule(),
    FlowSchedule(shift=3.0),
    vp_schedule(prediction="v", rescale_betas_zero_snr=True),
]


def _grid(schedule: Schedule, steps: int) -> Grid:
    return flow_grid(schedule, steps) if isinstance(schedule, FlowSchedule) else vp_grid(schedule, steps)


def test_step_by_hand() -> None:
    x0, eps, z = (torch.full((1, 1), value) for value in (2.0, 3.0, 5.0))
    levels = torch.tensor(0.6), torch.tensor(0.4)
    assert float(step_to(x0, eps, *levels)) == pytest.approx(0.6 * 2 + 0.4 * 3)
    assert float(step_to(x0, eps, *levels, 0.8, z)) == pytest.approx(0.6 * 2 + 0.4 * (0.8 * 3 + 0.6 * 5))
    with pytest.raises(ValueError, match="needs fresh noise"):
        step_to(x0, eps, *levels, 0.9)
    with pytest.raises(ValueError, match=r"eta is 1\.5"):
        step_to(x0, eps, *levels, 1.5, z)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("steps", [1, 4])
def test_intervals_lie_where_they_should(schedule: Schedule, steps: int) -> None:
    grid = _grid(schedule, steps)
    u = torch.rand(500)
    for i in range(steps):
        step = torch.full((500,), i)
        separate = draw_tau(schedule, grid, step, u)
        overlapping = draw_tau(schedule, grid, step, u, overlapping=True)
        start, end = grid.times[i], (*grid.times, grid.end)[i + 1]
        assert bool((separate < start).all()) and bool((separate >= end).all())
        assert bool((overlapping < schedule.first).all()) and bool((overlapping >= end).all())
        assert float(separate.max() - separate.min()) > 0.8 * (start - end)
        assert float(overlapping.max()) > 0.95 * schedule.first
        _, sigma = schedule.levels(separate)
        assert bool((sigma > 0).all())


def test_times_are_even_in_the_samplers_variable() -> None:
    schedule = FlowSchedule(shift=3.0)
    grid = flow_grid(schedule, 2)
    tau = draw_tau(schedule, grid, torch.tensor([0, 1]), torch.tensor([0.5, 0.5]), low_margin=0.0, high_margin=0.0)
    torch.testing.assert_close(schedule.progress(tau), torch.tensor([0.75, 0.25], dtype=torch.float64))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("eta", [1.0, 0.9, 0.0])
def test_diffusing_a_noised_point_equals_noising_directly(schedule: Schedule, eta: float) -> None:
    """If eps is unit noise independent of x0, x_tau has the mean alpha x0 and the deviation sigma, whatever eta."""
    n, x0 = 200_000, 1.7
    eps, z, fresh = torch.randn(3, n, 1).unbind(0)
    middle, tau = schedule.levels(torch.tensor(300.0)), schedule.levels(torch.tensor(640.0))
    x_mid = step_to(torch.full((n, 1), x0), eps, *middle, eta, z)
    x_tau = diffuse(x_mid, *middle, *tau, fresh)
    assert float(x_tau.mean()) == pytest.approx(float(tau[0]) * x0, abs=0.01)
    assert float(x_tau.std()) == pytest.approx(float(tau[1]), rel=0.01)


def test_diffusing_by_hand_and_from_a_clean_point() -> None:
    x, z = torch.tensor([[2.0]]), torch.tensor([[0.5]])
    level = [torch.tensor(v) for v in (0.8, 0.2, 0.4, 0.6)]
    expected = 0.5 * 2 + math.sqrt(0.36 - (0.5 * 0.2) ** 2) * 0.5
    assert float(diffuse(x, *level, z)) == pytest.approx(expected)
    clean = [torch.tensor(v) for v in (1.0, 0.0, 0.4, 0.6)]
    assert float(diffuse(x, *clean, z)) == pytest.approx(0.4 * 2 + 0.6 * 0.5)
    backwards = [torch.tensor(v) for v in (0.4, 0.6, 0.4, 0.6)]
    assert float(diffuse(x, *backwards, z)) == pytest.approx(2.0)


def test_importance_weight_by_hand_and_one_for_fresh_noise() -> None:
    x0, z = torch.randn(2, 3, 7).unbind(0)
    alpha, sigma = torch.tensor([0.3, 0.5, 0.9]), torch.tensor([0.7, 0.5, 0.1])
    x_tau = alpha[:, None] * x0 + sigma[:, None] * z
    torch.testing.assert_close(importance_weight(x_tau, x0, alpha, sigma, z), torch.ones(3))
    implied = torch.full((1, 4), 2.0)
    found = importance_weight(0.5 * implied, torch.zeros(1, 4), torch.tensor(0.5), torch.tensor(0.5), torch.ones(1, 4))
    assert float(found) == pytest.approx(math.exp(-0.5 * 4) / math.exp(-0.5 * 1))


def test_importance_weight_is_one_in_expectation_for_unit_noise() -> None:
    schedule = FlowSchedule()
    x0, eps, z = torch.randn(3, 4_000, 64).unbind(0)
    middle, tau = schedule.levels(torch.tensor(250.0)), schedule.levels(torch.tensor(400.0))
    x_tau = diffuse(step_to(x0, eps, *middle), *middle, *tau, z)
    assert float(importance_weight(x_tau, x0, *tau, z).mean()) == pytest.approx(1, abs=0.02)


def test_noise_weights_by_hand() -> None:
    alpha, sigma = torch.tensor([0.9, 0.6]), torch.tensor([0.1, 0.4])
    assert noise_weight(alpha, sigma).tolist() == pytest.approx([5.0, 2.25])
    assert noise_weight(alpha, sigma, gamma=100).tolist() == pytest.approx([81.0, 2.25])
    assert noise_weight(alpha, sigma, "inverse_variance").tolist() == pytest.approx([100.0, 6.25])
    assert noise_weight(alpha, sigma, "one").tolist() == [1, 1]
    with pytest.raises(ValueError, match="use one of one, min_snr"):
        noise_weight(alpha, sigma, "snr")  # type: ignore[arg-type]


def test_inverse_variance_makes_an_x0_error_a_velocity_error() -> None:
    x, x0, guess = torch.randn(3, 2, 5, dtype=torch.float64).unbind(0)
    sigma = torch.tensor([0.2, 0.7], dtype=torch.float64)
    velocity = [(x[i] - x0[i]) / sigma[i] for i in range(2)]
    guessed = [(x[i] - guess[i]) / sigma[i] for i in range(2)]
    expected = sum(float((a - b).square().mean()) for a, b in zip(velocity, guessed)) / 2
    found = critic_loss(guess, x0, noise_weight(1 - sigma, sigma, "inverse_variance"))
    assert float(found) == pytest.approx(expected)


def test_guidance_by_hand() -> None:
    c, u = torch.tensor([3.0]), torch.tensor([1.0])
    assert [float(guide(c, u, s)) for s in (0.0, 1.0, 3.5)] == [1.0, 3.0, 8.0]
    assert float(c + (3.5 - 1) * (c - u)) == float(guide(c, u, 3.5))
    assert "cfg_scale 3.5" in guidance_note(3.5) and "2.5 in the form x_c + w" in guidance_note(3.5)


def test_critic_loss_by_hand() -> None:
    critic, student, teacher = torch.tensor(
        [[[1.0, 3.0], [0.0, 2.0]], [[1.0, 2.0], [0.0, 0.0]], [[0.0, 3.0], [0.0, 4.0]]]
    )
    weight, importance = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.5])
    errors = 2 * (0 + 1) / 2 * 1.0, 3 * (0 + 4) / 2 * 0.5
    assert float(critic_loss(critic, student, weight, importance=importance)) == pytest.approx(sum(errors) / 2)
    extra = 2 * (1 + 0) / 2, 3 * (0 + 4) / 2
    found = critic_loss(critic, student, weight, importance=importance, x0_teacher=teacher, teacher_weight=0.5)
    assert float(found) == pytest.approx((sum(errors) + 0.5 * sum(extra)) / 2)
    with pytest.raises(ValueError, match="needs the teacher"):
        critic_loss(critic, student, weight, teacher_weight=0.5)


def test_student_loss_by_hand() -> None:
    x0 = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    target = student_target(x0, torch.tensor([[2.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    assert target.tolist() == [[3.0, 3.0], [3.0, 0.0]] and not target.requires_grad
    n = normaliser(x0, torch.tensor([[3.0, 2.0], [8.0, 12.0]]), cap=5)
    assert n.tolist() == [1.0, 5.0]
    squared = student_loss(x0, target, kind="squared", normalise_by=n)
    assert squared.item() == pytest.approx(((4 + 1) / 2 / 1 + (9 + 0) / 2 / 5) / 2)
    huber = student_loss(x0, target, c=0.5)
    rho = [math.sqrt(d * d + 0.25) - 0.5 for d in (2, 1, 3, 0)]
    assert huber.item() == pytest.approx(sum(rho) / 4)
    (gradient,) = torch.autograd.grad(squared, x0)
    torch.testing.assert_close(gradient, torch.tensor([[2 * -2 / 4, 2 * -1 / 4], [2 * -3 / 20, 0.0]]))
    with pytest.raises(ValueError, match="pseudo_huber, squared"):
        penalty(x0, "huber")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["pseudo_huber", "squared"])
def test_no_gradient_when_the_critic_equals_the_teacher(kind: str) -> None:
    x0 = torch.randn(3, 4, 5, requires_grad=True)
    conditional, unconditional = torch.randn(2, 3, 4, 5).unbind(0)
    teacher = guide(conditional, unconditional, 1.0)
    loss = student_loss(x0, student_target(x0, teacher, teacher), kind=kind, normalise_by=normaliser(x0, teacher))  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, x0)
    assert not bool(gradient.any())
    other = guide(conditional, unconditional, 2.0)
    loss = student_loss(x0, student_target(x0, other, teacher), kind=kind)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, x0)
    assert bool(gradient.any())


def test_bf16_inputs_give_finite_fp32_losses_and_gradients() -> None:
    schedule = FlowSchedule(shift=3.0)
    grid = flow_grid(schedule, 4)
    alphas, sigmas = grid.levels()
    for i in range(4):
        x0, eps, z, other = torch.randn(4, 2, 3, 4, dtype=torch.bfloat16).unbind(0)
        x0.requires_grad_()
        step = torch.tensor([i, i])
        for u in (0.0, 0.999):
            tau = schedule.levels(draw_tau(schedule, grid, step, torch.full((2,), u), overlapping=True))
            x_tau = diffuse(
                step_to(x0, eps, alphas[i + 1], sigmas[i + 1], 0.9, z), alphas[i + 1], sigmas[i + 1], *tau, z
            )
            importance = importance_weight(x_tau, x0, *tau, z)
            n = normaliser(x0, other)
            losses = [student_loss(x0, student_target(x0, other, eps), normalise_by=n)]
            losses += [
                critic_loss(x0, other, noise_weight(*tau, kind), importance=importance)  # type: ignore[arg-type]
                for kind in ("one", "min_snr", "inverse_variance")
            ]
            for loss in losses:
                (gradient,) = torch.autograd.grad(loss, x0, retain_graph=True)
                assert loss.dtype == torch.float32 and bool(loss.isfinite()) and bool(gradient.isfinite().all())


class _Affine(nn.Module):
    """x0 = a x + b with a row of coefficients per step."""

    def __init__(self, steps: int, mean: float, deviation: float, grid: Grid) -> None:
        super().__init__()
        rows = [
            gaussian_x0(mean, deviation, torch.tensor(a), torch.tensor(s)) for a, s in zip(grid.alphas, grid.sigmas)
        ]
        self.coefficients = nn.Parameter(
            torch.tensor([[float(slope), float(offset)] for slope, offset in rows[:steps]])
        )

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        slope, offset = self.coefficients[step].unbind(1)
        return slope[:, None] * x + offset[:, None]


class _Critic(nn.Module):
    """x0 = a(tau) x + b(tau): the coefficients from a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        slope, offset = self.net(sigma[:, None].float()).unbind(1)
        return slope[:, None] * x + offset[:, None]


def gaussian_x0(mean: float, deviation: float, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x] = slope x + offset for x0 ~ N(mean, deviation^2)."""
    slope = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
    return slope, mean - slope * alpha * mean


@torch.no_grad()
def _generate(student: _Affine, grid: Grid, noise: Tensor) -> list[Tensor]:
    alphas, sigmas = grid.levels()
    points = [noise]
    for i in range(grid.steps):
        x0 = student(points[-1], torch.full((len(noise),), i))
        eps = (points[-1] - float(alphas[i]) * x0) / float(sigmas[i])
        points.append(step_to(x0, eps, alphas[i + 1], sigmas[i + 1]))
    return points


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_gaussian_teachers_moments_are_recovered(overlapping: bool) -> None:
    """The whole objective on x0 ~ N(1.5, 0.5^2), K = 2: sampling the teacher in 2 steps is far too narrow."""
    mean, deviation = 1.5, 0.5
    schedule, batch = FlowSchedule(), 256
    grid = flow_grid(schedule, 2)
    alphas, sigmas = grid.levels()
    student, critic = _Affine(2, mean, deviation, grid), _Critic()
    before = _generate(student, grid, torch.randn(20_000, 1))[-1]
    assert float(before.std()) < 0.7 * deviation

    # Little momentum: the critic chases a moving student, and both would overshoot.
    optimizer_of = {
        "student": torch.optim.Adam(student.parameters(), 4e-3, betas=(0.5, 0.95)),
        "critic": torch.optim.Adam(critic.parameters(), 1e-2),
    }
    updates = 700
    for update in range(updates):
        optimizer_of["student"].param_groups[0]["lr"] = 4e-3 * (1 - update / updates)
        points = torch.stack(_generate(student, grid, torch.randn(batch, 1)))
        for role in ("critic", "critic", "critic", "student"):
            step = torch.randint(0, 2, (batch,))
            x = points[step, torch.arange(batch)]
            x0 = student(x, step)
            eps = (x - alphas[step].float()[:, None] * x0) / sigmas[step].float()[:, None]
            middle = alphas[step + 1], sigmas[step + 1]
            tau = schedule.levels(draw_tau(schedule, grid, step, torch.rand(batch), overlapping=overlapping))
            with torch.no_grad():
                x_tau = diffuse(step_to(x0, eps, *middle), *middle, *tau, torch.randn(batch, 1))
            if role == "critic":
                loss = critic_loss(critic(x_tau, tau[1]), x0, noise_weight(*tau))
            else:
                slope, offset = gaussian_x0(mean, deviation, *tau)
                teacher = slope[:, None].float() * x_tau + offset[:, None].float()
                loss = student_loss(x0, student_target(x0, teacher, critic(x_tau, tau[1])), kind="squared")
            optimizer_of[role].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer_of[role].step()

    after = _generate(student, grid, torch.randn(20_000, 1))[-1]
    assert float(after.mean()) == pytest.approx(mean, abs=0.08)
    assert float(after.std()) == pytest.approx(deviation, rel=0.12)
