"""The teacher's training on tiny sizes: the loss falls, a stopped run resumes equal, weights round-trip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blade_compile.distill import digits_teacher
from blade_compile.distill.digits_judge import Judge
from blade_compile.distill.digits_model import NULL_CLASS, DigitsConfig, DigitsTransformer
from blade_compile.distill.digits_teacher import (
    TeacherSettings,
    Trainer,
    average,
    batch_of,
    draw_times,
    load_teacher,
    muon_matrices,
    rate_factor,
    save_picture,
    save_teacher,
)

SMALL = DigitsConfig(frames=2, size=10, patch=(1, 2, 2), width=16, depth=1, heads=1)


def _settings(**changes: object) -> TeacherSettings:
    values: dict[str, object] = {"model": SMALL, "batch": 8, "attention": "eager", "warmup": 5, **changes}
    return TeacherSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("matrix_lr", [0.0, 4e-3])
def test_the_loss_falls(matrix_lr: float) -> None:
    trainer = Trainer(_settings(matrix_lr=matrix_lr))
    losses = [trainer.update(0.0) for _ in range(120)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


@pytest.mark.parametrize("matrix_lr", [0.0, 4e-3])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, matrix_lr: float) -> None:
    whole = Trainer(_settings(matrix_lr=matrix_lr))
    expected = [whole.update(0.0) for _ in range(6)]

    first = Trainer(_settings(matrix_lr=matrix_lr))
    found = [first.update(0.0) for _ in range(3)]
    first.save(tmp_path / "state.safetensors")
    torch.manual_seed(99)  # another process has another global state
    second = Trainer(_settings(matrix_lr=matrix_lr))
    second.load(tmp_path / "state.safetensors")
    found += [second.update(0.0) for _ in range(3)]
    assert found == expected
    at_end, resumed = whole.tensors(), second.tensors()
    assert at_end.keys() == resumed.keys()
    assert not [name for name, value in at_end.items() if not torch.equal(value, resumed[name])]
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(_settings())
    path = tmp_path / "state.safetensors"
    trainer.save(path)
    before = path.read_bytes()
    trainer.update(0.0)

    def fail(tensors: object, where: Path, metadata: object) -> None:
        where.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(digits_teacher, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        trainer.save(path)
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    Trainer(_settings()).save(tmp_path / "s")
    other = DigitsConfig(frames=2, size=10, patch=(1, 2, 2), width=24, depth=1, heads=1)
    with pytest.raises(ValueError, match="use the same sizes or another --out"):
        Trainer(_settings(model=other)).load(tmp_path / "s")


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    settings = _settings(batch=64, drop_label=0.5)
    one, again, other = batch_of(7, settings), batch_of(7, settings), batch_of(8, settings)
    assert all(torch.equal(a, b) for a, b in zip(one, again))
    assert not torch.equal(one[0], other[0])
    x, times, labels, velocity = one
    s = times.view(-1, 1, 1, 1, 1)
    clips = x - s * velocity  # x = (1 - s) x0 + s eps, v = eps - x0
    assert float(clips.min()) >= -1 - 1e-5 and float(clips.max()) <= 1 + 1e-5
    assert 10 < int((labels == NULL_CLASS).sum()) < 54


def test_times_cover_both_halves() -> None:
    times = draw_times(20_000, 0.0, torch.Generator().manual_seed(0))
    middle = float(((times > 0.25) & (times < 0.75)).double().mean())
    assert middle == pytest.approx(0.5 * 0.5 + 0.5 * 0.728, abs=0.02)  # a logit-normal has 72.8 % there


def test_rates_rise_stay_and_fall() -> None:
    settings = _settings(warmup=10, cooldown=0.25)
    assert rate_factor(0, 0.0, settings) == pytest.approx(0.1)
    assert rate_factor(9, 0.5, settings) == 1
    assert rate_factor(1000, 0.875, settings) == pytest.approx(0.5)
    assert rate_factor(1000, 1.5, settings) == 0


def test_the_average_is_a_power_of_the_step() -> None:
    """With decay (1 - 1/t)^(gamma + 1) the weight of step i is (i^(g+1) - (i-1)^(g+1)) / T^(g+1)."""
    ema, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    values, gamma = [3.0, -1.0, 4.0, 2.0], 2.0
    for step, value in enumerate(values, start=1):
        torch.nn.init.constant_(model.weight, value)
        average(ema, model, step, gamma)
    expected = sum(v * (i**3 - (i - 1) ** 3) for i, v in enumerate(values, start=1)) / 4**3
    assert float(ema.weight.detach()) == pytest.approx(expected)


def test_muon_takes_the_matrices_of_the_blocks_only() -> None:
    model = DigitsTransformer(SMALL)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)].removeprefix("blocks.0.") for p in muon_matrices(model)}
    assert found == {"attention.qkv.weight", "attention.out.weight", "mlp.0.weight", "mlp.2.weight"}


def test_weights_round_trip(tmp_path: Path) -> None:
    model = Trainer(_settings()).model
    save_teacher(model, tmp_path / "t.safetensors", {"note": "x"})
    loaded = load_teacher(tmp_path / "t.safetensors")
    assert loaded.config == SMALL and not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


@pytest.mark.slow
def test_the_script_trains_judges_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digits_teacher, "train_judge", lambda spec: Judge().eval().requires_grad_(False))
    sizes = {"frames": 4, "size": 12, "width": 16, "depth": 1, "heads": 1, "batch": 4, "attention": "eager"}
    common = ["--out", str(tmp_path / "run"), *(f"--{name}={value}" for name, value in sizes.items())]
    assert digits_teacher.main([*common, "--minutes", "0.01"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"accuracy", "frechet", "acceleration"} <= lines[-1].keys() and lines[-1]["clips"] == 200
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:  # logged, but not in the checkpoint
        file.write('{"step": 1000000, "loss": 1.0}\n')
    assert digits_teacher.main([*common, "--minutes", "0.02"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and steps[0] < steps[-1] < 1_000_000
    described = json.loads((tmp_path / "run" / "teacher.json").read_text())
    assert described["curve"] == lines and described["settings"]["model"]["frames"] == 4
    assert load_teacher(tmp_path / "run" / "teacher.safetensors").config.frames == 4
    assert list((tmp_path / "run").glob("samples_*.png"))
    assert digits_teacher.main([*common, "--minutes", "1", "--width", "24", "--heads", "3"]) == 2
    assert "use the same sizes" in capsys.readouterr().err
    assert digits_teacher.main([*common, "--minutes", "1", "--size", "13"]) == 2
    assert "has to divide" in capsys.readouterr().err


def test_pictures_have_a_row_per_two_clips(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    save_picture(torch.rand(5, 1, 3, 8, 8), tmp_path / "p.png")
    assert image.open(tmp_path / "p.png").size == (2 * 3 * 9 * 4, 2 * 9 * 4)
