"""The distillation loop on a tiny teacher: what it samples, when it stands still, and that it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from blade_compile.distill import digits_distill
from blade_compile.distill.digits_distill import Distiller, DistillSettings
from blade_compile.distill.digits_judge import Judge
from blade_compile.distill.digits_model import DigitsConfig, DigitsTransformer, sample
from blade_compile.distill.digits_teacher import load_teacher, save_teacher

SMALL = DigitsConfig(frames=4, size=12, patch=(2, 2, 2), width=16, depth=1, heads=1)


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(model: nn.Module, **options: Any) -> Callable[..., Any]:
        return model

    monkeypatch.setattr(torch, "compile", keep)


def _teacher() -> DigitsTransformer:
    model = DigitsTransformer(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_roll_out_is_the_sampler(shift: float) -> None:
    teacher = _teacher()
    run = Distiller(teacher, DistillSettings(steps=3, shift=shift))
    noise, label = torch.randn(2, 1, 4, 12, 12), torch.tensor([1, 7])
    points, clean, noises, clips = run.roll_out(noise, label)
    torch.testing.assert_close(clips, sample(teacher, noise, label, steps=3, shift=shift), rtol=1e-4, atol=1e-5)
    assert torch.equal(points[0], noise) and len(points) == 3
    mixed = (
        run.alphas.float().view(-1, 1, 1, 1, 1, 1)[:3] * clean + run.sigmas.float().view(-1, 1, 1, 1, 1, 1)[:3] * noises
    )
    torch.testing.assert_close(mixed, points, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("match", [True, False])
def test_the_student_stands_still_where_critic_and_teacher_agree(match: bool) -> None:
    """The critic starts as the teacher, so at cfg_scale 1 there is nothing to learn; at 2 there is."""
    for cfg_scale, still in ((1.0, True), (2.0, False)):
        run = Distiller(_teacher(), DistillSettings(steps=2, cfg_scale=cfg_scale, batch=4))
        noise, label = torch.randn(4, 1, 4, 12, 12), torch.arange(4)
        points, *_ = run.roll_out(noise, label)
        loss = run.train_student(points, label, match=match)
        assert loss < 1e-5 if still else loss > 1e-2


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize(("eta", "overlapping"), [(1.0, False), (0.9, True)])
def test_iterations_move_student_critic_and_average_but_not_the_teacher(eta: float, overlapping: bool) -> None:
    run = Distiller(_teacher(), DistillSettings(steps=2, batch=4, warmup=1, eta=eta, overlapping=overlapping))
    roles = (run.roles.teacher, run.roles.student, run.roles.critic, run.roles.average)
    before = [_weights(role) for role in roles]
    losses = [run.iterate() for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(list(loss.values()))).all() for loss in losses)
    moved = [any(not torch.equal(a, b) for a, b in zip(old, _weights(role))) for old, role in zip(before, roles)]
    assert moved == [False, True, True, True]


@pytest.mark.usefixtures("_eager")
def test_equal_seeds_give_equal_losses() -> None:
    teacher = _teacher()
    runs = [Distiller(teacher, DistillSettings(steps=2, batch=2, warmup=1, eta=0.9, seed=s)) for s in (3, 3, 4)]
    losses = [[run.iterate() for _ in range(2)] for run in runs]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.usefixtures("_eager")
def test_the_script_writes_numbers_and_a_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_teacher(_teacher(), tmp_path / "teacher.safetensors", {})
    save_file(Judge().state_dict(), tmp_path / "judge.safetensors")
    paths = {
        "out": tmp_path / "run",
        "teacher": tmp_path / "teacher.safetensors",
        "judge": tmp_path / "judge.safetensors",
    }
    rest = {"minutes": 0.34, "steps": 2, "batch": 2, "judge-every": 0.1}
    assert digits_distill.main([f"--{name}={value}" for name, value in {**paths, **rest}.items()]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["iteration"] == 0 and {"accuracy", "frechet", "acceleration"} <= lines[-1].keys()
    assert load_teacher(tmp_path / "run" / "student.safetensors").config == SMALL
