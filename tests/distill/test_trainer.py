"""The training loop on a tiny model: what it writes, what it refuses, and that passes and ranks make no difference."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blade_compile.distill import cli, trainer
from blade_compile.distill.checkpoints import choose, read_record
from blade_compile.distill.config import load
from blade_compile.distill.digits_model import NULL_CLASS
from blade_compile.distill.divergence import Divergence
from blade_compile.distill.errors import ConfigError, DataError, DivergedError
from blade_compile.distill.evaluate import evaluate_student
from blade_compile.distill.export import read_record as read_export
from blade_compile.distill.generate import generate_from_export, load_student, load_teacher
from blade_compile.distill.matching import Draws, Matching
from blade_compile.distill.preview import Preview
from blade_compile.distill.trainer import export_run, train
from tests.distill import tiny_digits
from tests.distill.tiny_digits import EAGER, build, config, losses, metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was compiled, sparse, and went to its end."""
    folder = tmp_path_factory.mktemp("finished")
    with tiny_digits.kept_graphs():
        assert train(config(folder, loop__max_steps=6, loop__sample_every=3)) == 0
    torch._dynamo.reset()
    return folder


@pytest.fixture
def eager() -> Iterator[None]:
    with tiny_digits.eager():
        yield


def test_metrics_have_one_object_per_step(finished: Path) -> None:
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
        assert line["loss/critic"] > 0 and line["grad_norm/student"] > 0
        assert line["sparsity"] == pytest.approx(0.5) and line["steps"] == 2
        assert line["learning_rate/student"] == 1e-3 and line["samples_per_second"] > 0


def test_the_configuration_loads_back(finished: Path) -> None:
    file = finished / "run" / "config.yaml"
    assert load(file) == config(finished, loop__max_steps=6, loop__sample_every=3)
    first, second = file.read_text().splitlines()[:2]
    assert first.startswith("# ") and "torch" in second and "Python" in second


def test_samples_are_written_at_intervals(finished: Path) -> None:
    samples = finished / "run" / "samples"
    assert sorted(p.name for p in samples.iterdir()) == ["step_00000003", "step_00000006"]
    entries = json.loads((samples / "step_00000006" / "prompts.json").read_text())
    assert [entry["prompt"] for entry in entries] == ["0", "1"]
    assert all((samples / "step_00000006" / entry["file"]).stat().st_size > 100 for entry in entries)


def test_checkpoints_are_named_by_step(finished: Path) -> None:
    assert sorted(p.name for p in (finished / "run" / "checkpoints").iterdir()) == [
        "step_00000002",
        "step_00000004",
        "step_00000006",
    ]


def test_the_export_holds_the_average_and_samples(finished: Path, tmp_path: Path) -> None:
    folder = finished / "run" / "export"
    record = read_export(folder)
    assert record["steps"] == 2 and record["factory"] == tiny_digits.FACTORY
    assert record["options"]["sparsity"] == 0.5 and list(record["options"]["grid"]) == [2, 4, 8]
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    shards = sorted((finished / "run" / "checkpoints" / "step_00000006").glob("*.safetensors"))
    checkpoint = {k: v for file in shards for k, v in load_file(file).items()}
    trained = [name for name in stored if f"average.{name}" in checkpoint]
    assert len(trained) > 10
    for name in trained:
        assert torch.equal(stored[name], checkpoint[f"average.{name}"])
    assert any(not torch.equal(stored[name], checkpoint[f"student.{name}"]) for name in trained)
    made = generate_from_export(folder, ["3", "7"], tmp_path, sparse=False, device="cpu", trust_code=True)
    assert [path.name for path in made] == ["3-0.gif", "7-0.gif"] and all(path.stat().st_size > 100 for path in made)


def test_an_export_by_foreign_code_needs_trust(finished: Path) -> None:
    with pytest.raises(ConfigError, match="--trust-code runs it"):
        load_student(finished / "run" / "export", sparse=False)


def test_the_exported_student_is_the_sampler_of_the_preview(finished: Path) -> None:
    """Equal steps, equal weights: a sample of the export is the student's own roll-out from that noise."""
    student = load_student(finished / "run" / "export", sparse=False, compiled=False, device="cpu", trust_code=True)
    sample = student("3", 5)
    assert sample.frames.shape == (4, 16, 16, 1) and sample.latents.shape == (1, 4, 16, 16)
    x = torch.randn(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for now, then in ((1.0, 0.5), (0.5, 0.0)):
            x = x + (then - now) * student.pipe(x, torch.tensor([now]), torch.tensor([3]))
    torch.testing.assert_close(sample.latents, x[0], rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_left_alone(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "run" / "export").rglob("*")}
    lines = losses(finished)
    assert train(config(finished, loop__max_steps=6, loop__sample_every=3)) == 0
    assert {p: p.stat().st_mtime_ns for p in (finished / "run" / "export").rglob("*")} == before
    assert losses(finished) == lines and "was left as it is" in capsys.readouterr().out


def test_export_of_a_step(finished: Path, tmp_path: Path) -> None:
    run = finished / "run"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    last, early = export_run(run, out=tmp_path / "last"), export_run(run, out=tmp_path / "early", step=2)
    stored = load_file(run / "export" / weights)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in load_file(last / weights).items())
    assert any(not torch.equal(tensor, stored[name]) for name, tensor in load_file(early / weights).items())
    with pytest.raises(ConfigError, match="never overwritten"):
        export_run(run, out=tmp_path / "last")
    with pytest.raises(ConfigError, match="no checkpoint"):
        export_run(run, out=tmp_path / "none", step=3)


@pytest.mark.slow
def test_a_compiled_sparse_run_resumes_bit_by_bit(finished: Path, tmp_path: Path) -> None:
    with tiny_digits.kept_graphs():
        assert train(config(tmp_path, loop__max_steps=3, loop__sample_every=3)) == 0
        torch._dynamo.reset()
        assert train(config(tmp_path, loop__max_steps=6, loop__sample_every=3)) == 0
    assert losses(tmp_path) == losses(finished)


# Without compilation.


@pytest.mark.usefixtures("eager")
def test_regression_on_the_teacher_learns(tmp_path: Path) -> None:
    many = {
        "method__regression_updates": 40,
        "loop__max_steps": 40,
        "loop__batch_size": 8,
        "method__penalty": "squared",
    }
    train(config(tmp_path, **EAGER, **many, method__normaliser=False, loop__checkpoint_every=40))
    found = [line["loss/student"] for line in metrics(tmp_path)]
    assert sum(found[-8:]) < 0.5 * sum(found[:8])


@pytest.mark.usefixtures("eager")
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        **EAGER, "method__eta": 0.9, "method__regression_updates": 2, "method__critic_updates": 2,
        "method__intervals": "overlapping", "loop__checkpoint_every": 2,
    }  # fmt: skip
    train(config(tmp_path / "whole", **changes, loop__max_steps=7))
    for steps in (1, 4, 7):
        train(config(tmp_path / "parts", **changes, loop__max_steps=steps))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.usefixtures("eager")
def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    train(config(tmp_path / "one", **EAGER, loop__batch_size=4))
    train(config(tmp_path / "two", **EAGER, loop__batch_size=2, loop__grad_accumulation=2))
    for one, two in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_a_student_of_fresh_noise_draws_it_from_its_seed(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "run" / "export", tmp_path / "export")
    record = json.loads((folder / "blade.json").read_text())
    (folder / "blade.json").write_text(json.dumps({**record, "eta": 0.0}))
    given: dict[str, Any] = {"sparse": False, "compiled": False, "device": "cpu", "trust_code": True}
    fresh, plain = load_student(folder, **given), load_student(finished / "run" / "export", **given)
    a, b, other = fresh("3", 5).latents, fresh("3", 5).latents, fresh("3", 6).latents
    assert torch.equal(a, b) and not torch.equal(a, other) and not torch.equal(a, plain("3", 5).latents)


def test_previews_draw_fresh_noise_where_the_exported_sampler_does() -> None:
    preview, asked = object.__new__(Preview), []
    preview._draws, preview._start, preview._condition = Draws(0, 0, (0,)), torch.zeros(1, 2), {}
    for eta in (0.0, 0.9, 1.0):
        stand_in = SimpleNamespace(
            method=SimpleNamespace(eta=eta), roll_out=lambda *given: asked.append(given[2]) or SimpleNamespace(end=None)
        )
        preview.make(stand_in)  # type: ignore[arg-type]
    assert asked == [preview._draws, None, None]


@pytest.mark.usefixtures("eager")
def test_a_factorys_student_against_its_teacher(finished: Path, tmp_path: Path) -> None:
    """The teacher is the factory's own model with the guidance of the training."""
    export = finished / "run" / "export"
    with pytest.raises(ConfigError, match="--trust-code"):
        evaluate_student(export, ["3"], [0], tmp_path / "untrusted")
    given: dict[str, Any] = {"compiled": False, "device": "cpu", "trust_code": True}
    result = evaluate_student(export, ["3"], [0], tmp_path / "eval", teacher_steps=3, **given)
    assert [model.name for model in result.models][2] == "teacher, 3 steps"
    teacher = load_teacher(export, steps=3, **given)
    assert teacher.cfg_scale == 2.0
    x, model = torch.randn(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(5)), build()[0]
    with torch.no_grad():
        for now, then in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
            velocity, without = (model(x, torch.tensor([now]), torch.tensor([label])) for label in (3, NULL_CLASS))
            x = x + (then - now) * (without + 2 * (velocity - without))
    torch.testing.assert_close(teacher("3", 5).latents, x[0], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("eager")
def test_a_student_that_is_told_k(tmp_path: Path) -> None:
    changes = {**EAGER, "method__step_choices": [1, 2, 4], "loop__max_steps": 8}
    train(config(tmp_path, **changes))
    assert {line["steps"] for line in metrics(tmp_path)} == {1, 2, 4}
    export = tmp_path / "run" / "export"
    biases = load_file(export / "step_biases.safetensors")
    assert {name.partition(".")[0] for name in biases} == {"1", "2", "4"}
    loaded = {
        k: load_student(export, steps=k, sparse=False, compiled=False, device="cpu", trust_code=True) for k in (1, 2, 4)
    }
    for k, student in loaded.items():
        assert student.steps == k and student("3", 0).latents.isfinite().all()
        state = student.pipe.state_dict()
        assert all(torch.equal(state[n.partition(".")[2]], b) for n, b in biases.items() if n.startswith(f"{k}."))
    assert any(not torch.equal(b, biases[f"2.{n[2:]}"]) for n, b in biases.items() if n.startswith("4."))
    with pytest.raises(ConfigError, match="trained for 1, 2, 4"):
        load_student(export, steps=3, sparse=False, trust_code=True)


@pytest.mark.usefixtures("eager")
def test_a_planted_nan_ends_the_run_before_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Matching.student_loss

    def planted(self: Matching, rolled: Any, condition: Any, unconditional: Any, draws: Any) -> torch.Tensor:
        return whole(self, rolled, condition, unconditional, draws) * (math.nan if draws.step == 2 else 1)

    arguments = tiny_digits.command(tmp_path, **EAGER)[3:]
    monkeypatch.setattr(Matching, "student_loss", planted)
    monkeypatch.setattr("sys.argv", ["blade-distill", *arguments])
    assert cli.main() == 1
    said = capsys.readouterr().err
    good = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert "step 3: loss/student is nan" in said and str(good) in said and "learning_rate" in said
    assert said.count("\n") == 1
    assert sorted(p.name for p in good.parent.iterdir()) == [good.name] and choose(good.parent, "auto") == good
    monkeypatch.setattr(Matching, "student_loss", whole)
    assert cli.main() == 0 and len(metrics(tmp_path)) == 4


@pytest.mark.usefixtures("eager")
def test_a_spoilt_weight_is_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of the step were fine, but its update was not."""
    follow = trainer.TrainState.all_finite

    def spoilt(self: Any) -> bool:
        next(iter(self.roles.parameters("critic").values())).data.view(-1)[3] = math.inf
        return follow(self)

    monkeypatch.setattr(trainer.TrainState, "all_finite", spoilt)
    with pytest.raises(DivergedError, match=r"a weight is no finite number.*none: it was before the first"):
        train(config(tmp_path, **EAGER))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_explosion_is_told_from_noise() -> None:
    watch = Divergence()
    for step in range(40):
        assert watch.find({"loss": 1.0 + step % 7, "tiny": 1e-9 * 10 ** (step % 5)}) is None
    state = json.loads(json.dumps(watch.state()))
    assert Divergence(state).state() == watch.state()
    assert Divergence(state).find({"loss": 90.0, "tiny": 1.0}) is None
    assert "1000 times its average" in (Divergence(state).find({"loss": 9000.0}) or "")
    assert Divergence(state).find({"loss": math.nan}) == "loss is nan"
    assert Divergence().find({"loss": math.inf}) == "loss is inf"


@pytest.mark.usefixtures("eager")
def test_time_can_be_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config(tmp_path, **EAGER, loop__stop_after_minutes=1e-6)) == 0
    assert "by loop.stop_after_minutes after step 1 of 4, which is not the end" in capsys.readouterr().out
    assert not (tmp_path / "run" / "export").exists() and len(metrics(tmp_path)) == 1
    assert train(config(tmp_path, **EAGER)) == 0
    assert (tmp_path / "run" / "export").is_dir() and len(metrics(tmp_path)) == 4


@pytest.mark.usefixtures("eager")
def test_what_a_resumed_run_may_change(tmp_path: Path) -> None:
    train(config(tmp_path, **EAGER, loop__max_steps=2))
    other = {"loop__checkpoint_every": 3, "loop__keep_last": 1, "loop__log_every": 2, "loop__sample_every": 2}
    assert train(config(tmp_path, **EAGER, **other, loop__max_steps=5)) == 0
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 4, 5]
    split = {"loop__batch_size": 1, "loop__grad_accumulation": 2}
    assert train(config(tmp_path, **EAGER, **split, loop__max_steps=6)) == 0


@pytest.mark.usefixtures("eager")
def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    train(config(tmp_path, **EAGER, loop__max_steps=2))
    lines = losses(tmp_path)
    with pytest.raises(ConfigError) as refused:
        train(config(tmp_path, **EAGER, method__cfg_scale=3.0, optimizer__clip=0.5, seed=1))
    said = str(refused.value)
    assert "method.cfg_scale was 2.0 and is 3.0" in said and "optimizer.clip was 1.0 and is 0.5" in said
    assert "seed was 0 and is 1" in said and "max_steps" not in said and "\n" not in said
    with pytest.raises(ConfigError, match=r"2 samples per update .* this run has 6"):
        train(config(tmp_path, **EAGER, loop__batch_size=3, loop__grad_accumulation=2))
    with pytest.raises(ConfigError, match=r"past loop.max_steps, which is 1; set it to 2 or more"):
        train(config(tmp_path, **EAGER, loop__max_steps=1))
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step_00000002")
    with pytest.raises(ConfigError, match="of another configuration: seed"):
        train(config(tmp_path / "new", **EAGER, seed=5), resume=checkpoint)
    assert losses(tmp_path) == lines
    assert train(config(tmp_path / "new", **EAGER), resume=checkpoint) == 0
    assert [line["step"] for line in metrics(tmp_path / "new")] == [3, 4]
    assert train(config(tmp_path, **EAGER, seed=1), resume="never") == 0 and len(metrics(tmp_path)) == 4


@pytest.mark.usefixtures("eager")
def test_other_prompts_are_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1\n2\n")
    train(config(tmp_path, **EAGER, loop__max_steps=2, data__prompts=str(prompts)))
    prompts.write_text("1\n3\n")
    with pytest.raises(ConfigError, match="made with other prompts"):
        train(config(tmp_path, **EAGER, data__prompts=str(prompts)))


@pytest.mark.usefixtures("eager")
def test_a_checkpoint_records_what_it_needs(tmp_path: Path) -> None:
    given = config(tmp_path, **EAGER, loop__max_steps=2)
    train(given)
    record = read_record(tmp_path / "run" / "checkpoints" / "step_00000002")
    assert record["config"] == given.model_dump(mode="json") and record["samples"] == 2 and record["step"] == 2


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "prompts missing": ({"data__prompts": "nowhere.txt"}, 3, "nowhere.txt does not exist"),
    "prompt malformed": ({"data__prompts": "letters"}, 3, "'seven' is no digit"),
    "embeddings missing": ({"data__embeddings": "nowhere"}, 3, "holds no embeddings; run `blade-distill prepare`"),
    "clip that doesn't fit": ({"latent__height": 24}, 2, "this digits model makes 4 x 16 x 16"),
    "guidance it doesn't take": ({"method__embedded_guidance": 3.5}, 2, "takes none as an input"),
    "weights missing": (
        {"model__weights": "nowhere.safetensors"},
        2,
        "model.weights: nowhere.safetensors can't be read",
    ),
    "weights of another": ({"model__weights": "other"}, 2, "doesn't fit the model"),
    "tracker missing": ({"tracker": "trackio"}, 2, "pip install 'blade-compile[trackio]'"),
    "float16": ({"parallel__mixed_precision": "float16"}, 2, "mixed_precision is float16"),
    "lora targets": ({"lora": {"rank": 2, "targets": ["nothing"]}}, 2, "no linear layer of the model has such a name"),
    "factory missing": ({"model__factory": "tests.distill.tiny_digits:nothing"}, 2, "nothing"),
    "folder": ({"output_dir": "file"}, 2, "output_dir"),
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_before_any_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, code, said = BAD[name]
    (tmp_path / "letters.txt").write_text("3\nseven\n")
    (tmp_path / "file").write_text("")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    own = {"letters": tmp_path / "letters.txt", "other": tmp_path / "other.safetensors", "file": tmp_path / "file"}
    own["nowhere"] = tmp_path / "embedded"
    changes = {k: str(own.get(v, v)) if isinstance(v, str) else v for k, v in changes.items()}
    arguments = tiny_digits.command(tmp_path, **{**EAGER, "loop__max_steps": 1, **changes})[3:]
    monkeypatch.setattr("sys.argv", ["blade-distill", *arguments])
    assert cli.main() == code
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1 and shown.startswith("blade-distill: ")
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_no_attention_to_make_sparse_is_an_error(tmp_path: Path) -> None:
    with (
        tiny_digits.kept_graphs(),
        pytest.raises(ConfigError, match="no attention call of the student runs block-sparse"),
    ):
        train(config(tmp_path, sparsity__blade_options={"min_tokens": 1, "exclude": ["*"]}))


@pytest.mark.parametrize("resume", ["nowhere", "run"])
def test_a_resume_path_has_to_be_a_checkpoint(resume: str, finished: Path) -> None:
    with pytest.raises((ConfigError, DataError), match="no checkpoint"):
        train(config(finished, loop__max_steps=6, loop__sample_every=3), resume=str(finished / resume))
