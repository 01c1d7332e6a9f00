"""The digits command: what is finished is not redone, the verdict follows the rows, table and JSON agree."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blade_compile.distill import (
    adapter_digits,
    digits_ablation,
    digits_adapt,
    digits_experiment,
    digits_picture,
    digits_run,
    digits_sampling,
    digits_table,
)
from blade_compile.distill.adapter_digits import DigitsAdapter
from blade_compile.distill.config import RunConfig
from blade_compile.distill.digits_adapt import Walk, adapt
from blade_compile.distill.digits_arms import ARMS, FULL, QUICK, SEEDS, Arm, Budget, Way, arm, configuration, settings
from blade_compile.distill.digits_data import NUM_CLASSES
from blade_compile.distill.digits_experiment import Experiment, StoppedError
from blade_compile.distill.digits_judge import load_judge
from blade_compile.distill.digits_model import DigitsConfig, DigitsTransformer, guided, sample
from blade_compile.distill.digits_rows import Book, Row, read, save, write
from blade_compile.distill.digits_sampling import Sampler, judged, read_export, real, starts
from blade_compile.distill.digits_teacher import load_teacher, save_teacher
from blade_compile.distill.errors import ConfigError, DataError, DivergedError
from blade_compile.distill.export import export
from blade_compile.distill.presets import PRESETS

SMALL = DigitsConfig(patch=(2, 4, 4), width=32, depth=1, heads=1)  # 64 tokens: 4 blocks of 16
TINY = Budget(updates=4, regression=1, adapt_share=0.5, teacher_steps=3, clips=4, batch=2)


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DigitsTransformer:
    """A tiny teacher with random weights, in the place of the committed one."""
    path = tmp_path / "teacher.safetensors"
    torch.manual_seed(0)
    model = DigitsTransformer(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_teacher(model, path, {})
    monkeypatch.setattr(digits_experiment, "TEACHER_FILE", path)
    return load_teacher(path)


class Trainings:
    """In the place of the trainer: exports the model it would start from, and remembers what was asked for."""

    def __init__(self, teacher: DigitsTransformer) -> None:
        self.teacher, self.asked = teacher, list[RunConfig]()
        self.stop_at: int | None = None
        self.code = 0
        self.diverges = ""

    def __call__(self, config: RunConfig) -> int:
        if len(self.asked) == self.stop_at:
            return self.code
        if self.diverges and config.name.startswith(self.diverges):
            raise DivergedError("diverged at step 3: loss/critic is nan (and more)")
        self.asked.append(config)
        adapter = DigitsAdapter(self.teacher.config)
        export(
            self.teacher,
            Path(config.folder) / "export",
            family=None,
            grid=adapter.grid(config.latent, config.method.steps),
            config=config.model_dump(),
            schedule=adapter.schedule(config.latent),
            token_grid=self.teacher.config.grid,
        )
        return 0


class Still:
    """In the place of ``Sampler``: real clips for whoever asks."""

    loads = 0

    def __init__(self, template: DigitsTransformer, options: Mapping[str, Any]) -> None:
        self.config, self.options = template.config, options

    def load(self, weights: Mapping[str, Tensor]) -> None:
        Still.loads += 1

    def draw_all(self, way: Way, noise: Tensor, labels: Tensor, batch: int, progress: Callable[..., None]) -> Tensor:
        return real(self.config, len(noise), 7)[0]

    def density(self, sparse: bool, noise: Tensor, labels: Tensor) -> float:
        return 0.25 if sparse else 1.0

    def seconds(self, ways: list[Way], rounds: int = 5) -> dict[Way, float]:
        return {way: float(way.steps) for way in ways}


def _no_adapting(model: DigitsTransformer, config: RunConfig, path: Path, **_: Any) -> float:
    save_teacher(model, path, {})
    return 0.0


@pytest.fixture
def trainings(teacher: DigitsTransformer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainings]:
    made = Trainings(teacher)
    monkeypatch.setattr(digits_experiment, "train", made)
    monkeypatch.setattr(digits_experiment, "Sampler", Still)
    monkeypatch.setattr(digits_experiment, "adapt", _no_adapting)
    few = digits_sampling._judge(SMALL)[1][:40]  # judging is quick then
    monkeypatch.setattr(digits_sampling, "_judge", lambda config: (load_judge(digits_sampling.JUDGE_FILE), few))
    return made


def _row(name: str, seed: int, accuracy: float = 0.97, frechet: float = 10.0, **more: Any) -> Row:
    sparse = name not in {"real", "teacher"}
    given: dict[str, Any] = {
        "title": name,
        "steps": None if name == "real" else 4,
        "sparse": sparse,
        "clips": 500,
        "frame_accuracy": accuracy,
        "motion": 0.25,
        "density": 0.25 if sparse else 1.0,
        "settings": {},
        "made_by": {},
    }
    return Row(arm=name, seed=seed, accuracy=accuracy, frechet=frechet, **{**given, **more})


def _rows(seeds: int = 3, **changed: tuple[float, float]) -> list[Row]:
    """The joint student as good as its teacher and better than the rest, but for what is changed: accuracy, Frechet."""
    numbers = {"real": (0.99, 0.5), "teacher": (0.97, 10.0), "joint": (0.97, 10.0)}
    numbers |= dict.fromkeys(digits_table.RIVALS, (0.9, 20.0)) | changed
    return [_row(name, seed, *pair) for name, pair in numbers.items() for seed in range(seeds)]


# Configurations


def test_arms_differ_in_nothing_but_what_they_say(tmp_path: Path) -> None:
    runs = {one.name: configuration(one, FULL, 3, tmp_path) for one in ARMS}
    joint = runs["joint"].model_dump(exclude={"name"})
    assert (joint["seed"], joint["sparsity"]["when"], joint["sparsity"]["sparsity"]) == (3, "always", 0.75)
    differs = {
        name: {
            f"{section}.{key}"
            for section, value in run.model_dump(exclude={"name"}).items()
            if isinstance(value, dict)
            for key in value
            if value[key] != joint[section][key]
        }
        for name, run in runs.items()
    }
    assert differs.pop("dense") == {"sparsity.when"}
    assert differs.pop("sparsify_after_tuned") == {"sparsity.schedule"}
    assert differs.pop("distil_after") == {"sparsity.teacher_sparse", "model.weights", "loop.max_steps"}
    assert not any(differs.values())
    assert runs["sparsify_after_tuned"].sparsity.schedule == ((0, 0.0), (FULL.updates // 2, 0.75))
    assert runs["distil_after"].loop.max_steps + FULL.adapting == FULL.updates == runs["joint"].loop.max_steps


def test_a_short_runs_export_is_never_a_long_ones(tmp_path: Path) -> None:
    short, long = (Path(configuration(arm("joint"), budget, 0, tmp_path).folder) for budget in (QUICK, FULL))
    assert short != long
    other = configuration(arm("joint"), FULL, 0, tmp_path, teacher="another")
    assert Path(other.folder) != long
    assert settings(arm("joint"), QUICK, configuration(arm("joint"), QUICK, 0, tmp_path)) != settings(
        arm("joint"), FULL, configuration(arm("joint"), FULL, 0, tmp_path)
    )


# Bookkeeping


def test_finished_rows_are_not_made_again(tmp_path: Path, trainings: Trainings) -> None:
    def experiment(seeds: tuple[int, ...]) -> Experiment:
        return Experiment(tmp_path / "out", TINY, ARMS, seeds)

    trainings.stop_at = 2
    with pytest.raises(StoppedError):
        experiment((0, 1)).run()
    made = [row.arm for row in experiment((0, 1)).rows]
    assert made == [one.name for one in ARMS[:8]]
    assert made[-1] == "sparsify_after"  # of the dense arm's run: it needs none of its own
    trainings.stop_at = None
    Still.loads = 0
    experiment((0, 1)).run()
    assert Still.loads == 2 * (len(ARMS) - 1) - (len(made) - 1)  # none of what was there
    names = [config.name for config in trainings.asked]
    assert len(names) == len(set(names)) == 2 * 4
    assert {(row.arm, row.seed) for row in experiment((0, 1)).rows} == {(one.name, s) for one in ARMS for s in (0, 1)}
    before = (tmp_path / "out" / "rows.json").read_bytes()
    experiment((0, 1)).run()
    assert len(trainings.asked) == 8
    assert (tmp_path / "out" / "rows.json").read_bytes() == before


def test_a_row_that_was_lost_comes_from_the_export(tmp_path: Path, trainings: Trainings) -> None:
    one = Experiment(tmp_path, TINY, [arm("joint")], (0,))
    one.run()
    (tmp_path / "rows.json").unlink()
    again = Experiment(tmp_path, TINY, [arm("joint")], (0,))
    again.run()
    assert len(trainings.asked) == 1
    assert again.rows[0].accuracy == one.rows[0].accuracy
    assert again.rows[0].train_seconds is None and one.rows[0].train_seconds is not None


def test_other_settings_are_other_rows(tmp_path: Path, trainings: Trainings) -> None:
    Experiment(tmp_path, TINY, [arm("joint")], (0,)).run()
    other = Experiment(tmp_path, Budget(updates=6, clips=4, batch=2), [arm("joint")], (0,))
    assert other.rows == []
    other.run()
    assert len(trainings.asked) == 2
    assert len(read(tmp_path / "rows.json")) == 2
    assert len(Experiment(tmp_path, TINY, [arm("joint")], (0,)).rows) == 1


def test_other_presets_students_are_trained_anew(
    tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [arm("joint"), arm("adapted"), arm("distil_after")]
    Experiment(tmp_path, TINY, chosen, (0,)).run()
    changed = {**PRESETS["digits"], "optimizer.student.learning_rate": (1e-3, "a test")}
    monkeypatch.setitem(PRESETS, "digits", changed)
    other = Experiment(tmp_path, TINY, chosen, (0,))
    assert other.rows == []
    other.run()
    assert [config.name.split("-")[0] for config in trainings.asked] == ["joint", "distil_after"] * 2
    assert len({config.name for config in trainings.asked}) == 4
    assert len({config.model.weights for config in trainings.asked if config.model.weights}) == 2
    assert len(list(tmp_path.glob("adapted-*"))) == 2


def test_another_teacher_makes_the_rows_anew(
    tmp_path: Path, trainings: Trainings, teacher: DigitsTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    Experiment(tmp_path / "out", TINY, [arm("teacher")], (0,)).run()
    other = tmp_path / "other.safetensors"
    with torch.no_grad():
        next(teacher.parameters()).add_(1)
    save_teacher(teacher, other, {})
    monkeypatch.setattr(digits_experiment, "TEACHER_FILE", other)
    assert Experiment(tmp_path / "out", TINY, [arm("teacher")], (0,)).rows == []


def test_the_trainers_exit_code_is_the_commands(tmp_path: Path, trainings: Trainings, capsys: Any) -> None:
    trainings.stop_at, trainings.code = 0, 130
    assert digits_run.run(out=tmp_path, quick=True, full=False, seed=0) == 130
    trainings.code = 0  # a checkpoint on SIGTERM: no error, and no row either
    assert digits_run.run(out=tmp_path, quick=True, full=False, seed=0) == 0
    assert "the same command goes on" in capsys.readouterr().err
    assert read(tmp_path / "rows.json") == []


def test_all_rows_are_timed_in_one_go(tmp_path: Path, trainings: Trainings) -> None:
    one = Experiment(tmp_path, TINY, [arm("real"), arm("teacher"), arm("joint")], (0, 1))
    one.run()
    assert set(one.time().values()) == {3.0, 4.0}
    assert [row.seconds_per_clip for row in one.rows] == [None, None, 3.0, 3.0, 4.0, 4.0]
    assert one.time() == {}


def test_a_broken_rows_file_is_said(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"format": 1, "rows": [{"arm": "joint"}]}', '{"format": 7, "rows": []}'):
        (tmp_path / "rows.json").write_text(content)
        with pytest.raises(DataError, match=r"rows\.json .*move it away"):
            Book(tmp_path / "rows.json")


def test_an_unwritable_folder_is_said_before_training(tmp_path: Path, trainings: Trainings) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't write"):
        digits_run.run(out=tmp_path / "file" / "out", quick=True, full=False, seed=0)
    assert not trainings.asked


def test_rows_survive_the_disk(tmp_path: Path) -> None:
    rows = _rows()
    save(rows, tmp_path / "rows.json")
    assert read(tmp_path / "rows.json") == rows
    write(tmp_path / "a" / "b", "text")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


# The verdict


def test_met_also_where_the_student_only_equals_its_teacher() -> None:
    found = digits_table.verdict(_rows())
    assert (found.outcome, found.reasons) == ("met", ())
    assert len(found.claims) == 2 * (1 + len(digits_table.RIVALS))


@pytest.mark.parametrize(("accuracy", "frechet"), [(0.96, 10.0), (0.97, 10.1)])
def test_not_met_where_the_student_is_worse_in_one_metric(accuracy: float, frechet: float) -> None:
    found = digits_table.verdict(_rows(joint=(accuracy, frechet)))
    assert found.outcome == "not met"
    missed = [one.metric for one in found.claims if one.outcome != "met"]
    assert missed == ["accuracy" if accuracy < 0.97 else "frechet"]


@pytest.mark.parametrize("rival", digits_table.RIVALS)
def test_a_tie_with_a_sequential_order_is_not_better(rival: str) -> None:
    found = digits_table.verdict(_rows(**{rival: (0.97, 20.0)}))
    assert found.outcome == "not met"
    assert [(one.against, one.metric) for one in found.claims if one.outcome != "met"] == [(rival, "accuracy")]


def test_undecided_where_seeds_disagree() -> None:
    rows = [r for r in _rows() if r.arm != "joint"]
    rows += [_row("joint", seed, 0.97, distance) for seed, distance in enumerate((8.0, 9.0, 10.5))]
    found = digits_table.verdict(rows)
    assert found.outcome == "undecided"
    (one,) = [one for one in found.claims if one.outcome != "met"]
    assert (one.metric, one.against, one.wins, one.seeds) == ("frechet", "teacher", 2, 3)


def test_nothing_may_be_claimed_of_a_poor_teacher_or_judge_or_a_dense_student() -> None:
    poor = digits_table.verdict(_rows(teacher=(0.94, 30.0)))
    assert poor.outcome == "open" and "94.0% of the time; 95% are wanted" in poor.reasons[0]
    misread = digits_table.verdict(_rows(real=(0.97, 0.5)))
    assert misread.outcome == "open" and "98% are wanted" in misread.reasons[0]
    unknown = digits_table.verdict([r for r in _rows() if r.arm != "teacher"])
    assert unknown.outcome == "open" and "no row of the teacher's clips" in unknown.reasons[0]
    dense = [_row("joint", r.seed, density=0.3) if r.arm == "joint" else r for r in _rows()]
    assert digits_table.verdict(dense).outcome == "open"
    said = digits_table.sentences(_rows(teacher=(0.94, 30.0)), {})
    assert said[0].startswith("Nothing may be claimed")


def test_open_with_few_seeds_or_missing_arms() -> None:
    assert digits_table.verdict(_rows(seeds=2)).outcome == "open"
    assert digits_table.verdict([r for r in _rows() if r.arm != "distil_after"]).outcome == "open"
    assert digits_table.verdict([]).outcome == "open"
    assert digits_table.sentences(_rows(seeds=2), {})[0] == "Aim of the experiment: open: rows are missing."


# Table and files


def test_table_and_json_agree(tmp_path: Path) -> None:
    rows = [_row("joint", s, 0.9 + s / 100, 10 + s, motion=0.2 + s / 10, seconds_per_clip=0.5) for s in range(3)]
    save([*_rows(), *rows][-3:], tmp_path / "rows.json")
    kept = json.loads((tmp_path / "rows.json").read_text())["rows"]
    text = digits_table.markdown(digits_table.lines(read(tmp_path / "rows.json"), {"joint": "student"}))
    header, _, line = (re.split(r"\s*\|\s*", one.strip("| ")) for one in text.splitlines())
    cells = dict(zip(header, line))
    for column, key in (("accuracy", "accuracy"), ("Frechet distance", "frechet"), ("motion", "motion")):
        values = [row[key] for row in kept]
        shown = [float(x) for x in re.findall(r"[\d.]+", cells[column])]
        assert shown == pytest.approx([sum(values) / 3, min(values), max(values)], abs=5e-3)
    assert (cells["seeds"], cells["blocks kept"], cells["s / clip"]) == ("3", "0.250", "0.5")
    assert (cells["attention"], cells["steps"]) == ("sparse", "4")


def test_this_runs_line_stands_after_its_arms_and_says_so(
    tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    committed = tmp_path / "experiment.json"
    monkeypatch.setattr(digits_run, "COMMITTED", committed)
    monkeypatch.setattr(digits_run, "QUICK", TINY)
    out = tmp_path / "out"
    assert digits_run.run(out=out, quick=True, full=False, seed=4) == 0
    alone = capsys.readouterr().out
    assert "No results of the whole experiment are committed" in alone
    assert "--quick makes" in alone

    save(_rows(), committed)
    grey = digits_picture.to_grey(real(SMALL, 10, 0)[0])
    digits_picture.bundle({"joint": grey, "teacher": grey.clone()}, committed.with_suffix(".safetensors"))
    assert digits_run.run(out=out, quick=True, full=False, seed=4) == 0
    assert len(trainings.asked) == 1
    text = capsys.readouterr().out
    titles = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    place = titles.index("> this run: student, sparse (joint)")
    assert titles[place - 1] == "student, sparse (joint)"
    assert "Of the committed rows: Aim of the experiment: met" in text
    assert text == (out / "table.md").read_text()
    assert (out / "clips.png").stat().st_size > 0 and (out / "clips" / "joint.gif").stat().st_size > 0
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for width, wide in ((80, False), (200, True)):
        monkeypatch.setenv("COLUMNS", str(width))
        assert digits_run.run(out=out, quick=True, full=False, seed=4) == 0
        shown = capsys.readouterr().out
        assert "this run" in shown and "accuracy" in shown and "| ---" not in shown
        assert ("blocks kept" in shown) == wide
        assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in shown.splitlines()) <= width
    row = read(out / "rows.json")[0]
    assert row.seed == 4 and row.settings["updates"] == TINY.updates
    assert {"versions", "commit", "date", "machine"} <= row.made_by.keys()


def test_full_makes_what_the_default_shows(
    tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(digits_run, "FULL", TINY)
    committed = tmp_path / "committed" / "experiment.json"
    monkeypatch.setattr(digits_run, "COMMITTED", committed)
    assert digits_run.run(out=tmp_path / "out", quick=False, full=True, seed=0) == 0
    whole = capsys.readouterr()
    assert f"cp {tmp_path / 'out'}/commit/experiment.*" in whole.err
    committed.parent.mkdir()
    for path in (tmp_path / "out" / "commit").iterdir():
        (committed.parent / path.name).write_bytes(path.read_bytes())
    assert {p.suffix for p in committed.parent.iterdir()} == {".json", ".md", ".png", ".safetensors"}
    assert len(read(committed)) == len(ARMS) * len(SEEDS)
    assert digits_run.run(out=tmp_path / "other", quick=False, full=False, seed=1) == 0
    beside = capsys.readouterr().out
    lines = [line for line in whole.out.splitlines() if line.startswith("| ")]
    assert {re.sub(" +", " ", line) for line in lines} <= {re.sub(" +", " ", line) for line in beside.splitlines()}
    assert len(trainings.asked) == 4 * len(SEEDS) + 1


@pytest.mark.slow
def test_all_trained_arms_with_the_trainer_itself(
    tmp_path: Path, teacher: DigitsTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_digits, "TEACHER_FILE", digits_experiment.TEACHER_FILE)
    one = Experiment(tmp_path / "out", TINY, [a for a in ARMS if a.source in {"run", "adapted"}], (0,))
    one.run()
    rows = {row.arm: row for row in one.rows}
    assert {name: row.density for name, row in rows.items()} == dict.fromkeys(rows, 0.25) | {"dense": 1.0}
    exports = {
        name: read_export(Path(one.config(arm(name), 0).folder) / "export")[0]["patch_in.weight"]
        for name in ("dense", "joint", "sparsify_after_tuned", "distil_after")
    }
    start = teacher.patch_in.weight
    weights = [start, *exports.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert all(torch.allclose(start, other, atol=0.1) for other in weights)
    assert set(one.time(rounds=1)) == {Way(steps=4, cfg_scale=1.0, sparse=s) for s in (False, True)} | {
        Way(steps=3, cfg_scale=2.5, sparse=True)
    }


def test_every_ablation_changes_one_thing(tmp_path: Path) -> None:
    base, *others = (
        configuration(one, FULL, 0, tmp_path).model_dump(exclude={"name"}) for one in digits_ablation.arms()
    )
    for other in others:
        changed = [
            (s, k) for s, value in other.items() if isinstance(value, dict) for k in value if value[k] != base[s][k]
        ]
        assert len(changed) == 1
    assert base == configuration(arm("joint"), FULL, 0, tmp_path).model_dump(exclude={"name"})


def test_the_ablation_goes_on_and_ends_in_a_table(
    tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(digits_ablation, "QUICK", TINY)
    command = ["--out", str(tmp_path), "--quick"]
    trainings.stop_at, trainings.code = 3, 130
    assert digits_ablation.main(command) == 130
    assert len(read(tmp_path / "rows.json")) == 3
    trainings.stop_at = None
    assert digits_ablation.main(command) == 0
    assert len(trainings.asked) == len(digits_ablation.CHANGES)
    text = capsys.readouterr().out
    assert all(f"| {title} " in text for title, _ in digits_ablation.CHANGES.values())
    assert text == (tmp_path / "table.md").read_text()
    assert digits_ablation.main(["--out", str(tmp_path / "rows.json")]) == 3


def test_an_ablation_that_diverges_is_a_line_too(
    tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(digits_ablation, "QUICK", TINY)
    trainings.diverges = "separate-"
    assert digits_ablation.main(["--out", str(tmp_path), "--quick"]) == 0
    assert len(read(tmp_path / "rows.json")) == len(digits_ablation.CHANGES) - 1
    text = capsys.readouterr().out
    assert "- separate intervals: diverged at step 3: loss/critic is nan\n" in text and "| squared penalty" in text


# Judging and sampling


def test_real_clips_are_judged_good_and_noise_bad() -> None:
    config = DigitsConfig()
    clips, labels = real(config, 200, 0)
    good = judged(clips, labels, config)
    assert good.accuracy >= digits_table.JUDGE_BAR and good.frechet < 3 and good.clips == 200
    noise, asked = starts(config, 200, 0)
    bad = judged(noise, asked, config)
    assert bad.accuracy < 0.3 and bad.frechet > 30 * good.frechet
    wrong = judged(clips, (labels + 1) % NUM_CLASSES, config)
    assert wrong.accuracy < 0.05 and wrong.frechet == good.frechet


def test_arms_of_a_seed_start_from_equal_noise_and_seeds_from_other() -> None:
    (noise, labels), (same, _), (other, _) = (starts(SMALL, 20, seed) for seed in (1, 1, 2))
    assert torch.equal(noise, same) and not torch.equal(noise, other)
    assert labels.tolist() == [*range(10), *range(10)]


@pytest.mark.slow
def test_a_sampler_exchanges_weights_and_counts_blocks(teacher: DigitsTransformer) -> None:
    options = {"policy": "asa", "sparsity": 0.75, "block_size": 16, "when": "always", "min_tokens": 1}
    sampler = Sampler(teacher, {**options, "grid": teacher.config.grid})
    noise, labels = starts(teacher.config, 4, 0)
    dense, sparse = (Way(steps=2, cfg_scale=2.0, sparse=s) for s in (False, True))
    for shift in (0.0, 0.5):
        with torch.no_grad():
            teacher.patch_in.bias.add_(shift)
        sampler.load(teacher.state_dict())
        wanted = sample(teacher, noise, labels, steps=2, cfg_scale=2.0)
        torch.testing.assert_close(sampler.draw(dense, noise, labels), wanted, rtol=1e-4, atol=1e-4)
        assert float((sampler.draw(sparse, noise, labels) - wanted).abs().max()) > 1e-3
    assert sampler.density(False, noise, labels) == 1
    assert sampler.density(True, noise, labels) == pytest.approx(0.25)
    counts: list[tuple[int, int]] = []
    all_at_once = sampler.draw_all(dense, noise, labels, 2, lambda *now: counts.append(now))
    torch.testing.assert_close(all_at_once, wanted, rtol=1e-4, atol=1e-4)
    assert counts == [(2, 4), (4, 4)]


def test_a_sampler_that_stays_dense_is_no_sparse_arm(teacher: DigitsTransformer) -> None:
    sampler = Sampler(teacher, {"sparsity": 0.75, "block_size": 16, "when": "never"})
    with pytest.raises(ConfigError, match="did not run sparse"):
        sampler.density(True, *starts(teacher.config, 2, 0))


def test_an_export_is_read_back(tmp_path: Path, teacher: DigitsTransformer) -> None:
    config = configuration(arm("joint"), TINY, 0, tmp_path)
    Trainings(teacher)(config)
    weights, record = read_export(Path(config.folder) / "export")
    torch.testing.assert_close(weights, dict(teacher.state_dict()))
    assert record["steps"] == 4 and record["options"] == config.sparsity.options() | {"grid": [4, 4, 4]}
    for path in (Path(config.folder) / "export" / "transformer").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="lacks transformer"):
        read_export(Path(config.folder) / "export")


# Adapting the teacher


def test_a_walk_is_the_teachers_own_sampler(teacher: DigitsTransformer) -> None:
    walk = Walk(teacher, (1, 8, 16, 16), 4, steps=4, cfg_scale=2.0, seed=0)
    assert walk.place.tolist() == [0, 1, 2, 3]
    noise, label = walk.x[:1].clone(), walk.label[:1].clone()
    for _ in range(3):
        x, time, labels, velocity = walk.look()
        assert x.shape[0] == time.shape[0] == labels.shape[0] == 8
        torch.testing.assert_close(
            2 * velocity[0] - velocity[4], guided(teacher, x[:1], time[:1], label, 2.0)[0], rtol=1e-4, atol=1e-5
        )
        walk.advance(velocity)
    _, _, _, velocity = walk.look()
    end = walk.x[0] - (2 * velocity[0] - velocity[4]) / 4
    torch.testing.assert_close(end, sample(teacher, noise, label, steps=4, cfg_scale=2.0)[0], rtol=1e-4, atol=1e-5)
    walk.advance(velocity)
    assert walk.place.tolist() == [0, 1, 2, 3]
    assert float(walk.x[0].std()) == pytest.approx(1, abs=0.1)  # noise anew


@pytest.mark.slow
def test_adapting_brings_the_sparse_model_nearer_and_is_repeatable(tmp_path: Path, teacher: DigitsTransformer) -> None:
    config = configuration(arm("distil_after"), TINY, 0, tmp_path)
    losses = [
        adapt(teacher, config, tmp_path / f"{i}.safetensors", updates=n, steps=4) for i, n in enumerate((30, 2, 2))
    ]
    assert losses[0] < 0.9 * losses[1] and losses[1] == losses[2]
    long, short, again = (load_teacher(tmp_path / f"{i}.safetensors").state_dict() for i in range(3))
    assert all(torch.equal(short[name], again[name]) for name in short)
    assert not torch.equal(long["patch_in.weight"], short["patch_in.weight"])


@pytest.mark.slow
def test_a_diverging_adaptation_is_said(tmp_path: Path, teacher: DigitsTransformer) -> None:
    with torch.no_grad():
        teacher.patch_out.bias.fill_(float("nan"))
    config = configuration(arm("distil_after"), TINY, 0, tmp_path)
    with pytest.raises(DivergedError, match="at update 1"):
        digits_adapt.adapt(teacher, config, tmp_path / "x.safetensors", updates=2, steps=2)
    assert not (tmp_path / "x.safetensors").exists()


# Pictures


def test_strips_show_the_frames_in_order() -> None:
    grey = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    drawn = digits_picture.strips(grey)
    scale = 3
    for clip in range(2):
        for frame in range(3):
            left = clip * (3 * (4 * scale + 1) + 12) + frame * (4 * scale + 1)
            assert torch.equal(drawn[::scale, left : left + 4 * scale : scale], grey[clip, frame])


def test_grey_covers_black_to_white() -> None:
    clips = torch.tensor([-2.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 5, 1, 1)
    assert digits_picture.to_grey(clips).flatten().tolist() == [0, 0, 128, 255, 255]


def test_a_sheet_without_clips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no clips"):
        digits_picture.sheet({}, tmp_path / "x.png")


def test_arm_names_are_unique_and_known() -> None:
    names = [one.name for one in ARMS]
    assert len(set(names)) == len(names)
    assert {"joint", "teacher", "real", *digits_table.RIVALS} <= set(names)
    assert all(isinstance(one, Arm) and (one.run_of in {None, *names}) for one in ARMS)
