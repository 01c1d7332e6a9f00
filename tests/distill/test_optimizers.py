"""AdamW of a role: rates by step, clipping by the norm of all gradients, a state that goes through named tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from blade_compile.distill.config_sections import OptimizerConfig, RoleOptimizer
from blade_compile.distill.optimizers import Optimizer, learning_rate

SETTINGS = RoleOptimizer(learning_rate=0.01, warmup_steps=2, schedule="cosine")
COMMON = OptimizerConfig(betas=(0.5, 0.9), weight_decay=0.1, clip=1.0)


def parameters() -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(n, 3, generator=draw)) for name, n in (("a", 4), ("b.weight", 2), ("c", 1))}


def set_gradients(named: dict[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    """Of ``a`` and ``b`` alone: ``c`` is not used."""
    draw = torch.Generator().manual_seed(100 + step)
    for name in ("a", "b.weight"):
        named[name].grad = scale * torch.randn(named[name].shape, generator=draw)


def test_rates_by_hand() -> None:
    constant = RoleOptimizer(learning_rate=0.4, warmup_steps=4)
    assert [learning_rate(constant, i, 10) for i in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    cosine = RoleOptimizer(learning_rate=0.4, warmup_steps=2, schedule="cosine")
    wanted = [0.2, 0.4, 0.4, 0.2 * (1 + math.cos(math.pi / 4)), 0.2, 0.2 * (1 - math.cos(math.pi / 4)), 0.0, 0.0]
    assert [learning_rate(cosine, i, 6) for i in range(8)] == pytest.approx(wanted)
    assert learning_rate(RoleOptimizer(learning_rate=0.4, schedule="cosine"), 0, 6) == 0.4


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_an_update_is_torchs_with_clipping(scale: float) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(ours, SETTINGS, COMMON, 10)
    reference = torch.optim.AdamW(theirs.values(), betas=COMMON.betas, weight_decay=COMMON.weight_decay)
    for step in range(4):
        set_gradients(ours, step, scale)
        set_gradients(theirs, step, scale)
        norm = optimizer.update(step)
        total = nn.utils.clip_grad_norm_(theirs.values(), COMMON.clip)
        assert norm == pytest.approx(float(total)) and (norm > 1) == (scale > 1)
        reference.param_groups[0]["lr"] = learning_rate(SETTINGS, step, 10)
        reference.step()
        reference.zero_grad()
        assert all(p.grad is None for p in ours.values())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(ours["c"], parameters()["c"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_updates_nothing(bad: float) -> None:
    named = parameters()
    optimizer = Optimizer(named, SETTINGS, COMMON, 10)
    set_gradients(named, 0)
    optimizer.update(0)
    before = [t.clone() for t in (*named.values(), *optimizer.state().values())]
    set_gradients(named, 1)
    grad = named["b.weight"].grad
    assert grad is not None
    grad[0, 0] = bad
    assert not math.isfinite(optimizer.update(1))
    assert all(torch.equal(a, b) for a, b in zip(before, (*named.values(), *optimizer.state().values())))
    assert all(p.grad is None for p in named.values())


def test_without_any_gradient_the_norm_is_zero() -> None:
    assert Optimizer(parameters(), SETTINGS, COMMON, 10).update(0) == 0.0


def test_the_state_read_back_continues_bit_by_bit() -> None:
    def steps(optimizer: Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            set_gradients(optimizer.parameters, step)
            optimizer.update(step)

    whole = Optimizer(parameters(), SETTINGS, COMMON, 10)
    steps(whole, 0, 8)
    begun = Optimizer(parameters(), SETTINGS, COMMON, 10)
    steps(begun, 0, 3)
    names = {f"{what}.{name}" for what in ("step", "exp_avg", "exp_avg_sq") for name in begun.parameters}
    written: dict[str, Tensor] = {name: t.clone() for name, t in begun.state().items()}
    weights = {name: p.detach().clone() for name, p in begun.parameters.items()}
    assert written.keys() == names
    assert [float(written[f"step.{n}"]) for n in begun.parameters] == [3, 3, 0]

    continued = Optimizer(parameters(), SETTINGS, COMMON, 10)
    with torch.no_grad():
        for name, tensor in continued.state().items():  # in place, as checkpoints.load does
            tensor.copy_(written[name])
        for name, p in continued.parameters.items():
            p.copy_(weights[name])
    steps(continued, 3, 8)
    for name, p in whole.parameters.items():
        assert torch.equal(p, continued.parameters[name])
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, continued.state()[name])
