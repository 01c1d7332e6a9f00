"""Arms and seeds of the digits experiment in one folder: what is finished is a row on disk and never made twice.

::

    out/
      rows.json                    a row for each finished arm and seed, with all that made it
      runs/<arm>-<updates>-...     folders of the trainer, with its own checkpoints
      adapted-*.safetensors        teachers adapted to sparse attention
      clips/                       the first clips of each arm and seed
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blade_compile.distill import digits_picture as picture
from blade_compile.distill.adapter_digits import TEACHER_FILE
from blade_compile.distill.config import RunConfig
from blade_compile.distill.digits_adapt import adapt
from blade_compile.distill.digits_arms import Arm, Budget, Way, adapted_file, configuration, settings, way
from blade_compile.distill.digits_arms import arm as arm_of
from blade_compile.distill.digits_model import DigitsTransformer
from blade_compile.distill.digits_rows import Book, Row, digest, made_by, write
from blade_compile.distill.digits_sampling import JUDGE_FILE, Sampler, judged, read_export, real, starts
from blade_compile.distill.digits_teacher import load_teacher


class StoppedError(Exception):
    """A training ended before its end, with the trainer's exit code. The same command goes on."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def train(config: RunConfig) -> int:
    """The trainer; imported here, since it isn't needed where all is trained."""
    from blade_compile.distill import trainer

    return trainer.train(config, resume="auto")


def say(text: str) -> None:
    """A line of progress, on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def counter(what: str) -> Callable[[int, int], None]:
    """Progress that stays on one line of a terminal; nothing elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{what}: {done} of {total}" + "\n" * (done == total))
            sys.stderr.flush()

    return show


def way_of(row: Row) -> Way:
    """How a row's clips were sampled."""
    return Way(**{name: row.settings[name] for name in ("steps", "cfg_scale", "sparse")})


class Experiment:
    """Arms and seeds in one folder.

    Args:
        out: folder; what an earlier command finished there is kept.
        budget: updates and clips.
        arms: the lines of the table.
        seeds: of each arm.

    Raises:
        DataError: the folder can't be written, or its ``rows.json`` is something else.
    """

    def __init__(self, out: Path, budget: Budget, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
        self.out, self.budget, self.arms, self.seeds = out, budget, arms, seeds
        write(out / ".writable", "")  # fail now, not after the first training
        (out / ".writable").unlink()
        self.book = Book(out / "rows.json")
        self._samplers: dict[str, Sampler] = {}

    @cached_property
    def teacher(self) -> DigitsTransformer:
        """The dense teacher, on the CPU."""
        return load_teacher(TEACHER_FILE)

    @cached_property
    def _files(self) -> dict[str, str]:
        return {"teacher": digest(TEACHER_FILE), "judge": digest(JUDGE_FILE)}

    def config(self, arm: Arm, seed: int) -> RunConfig:
        """Of an arm's run."""
        return configuration(arm, self.budget, seed, self.out, self._files["teacher"])

    def row(self, arm: Arm, seed: int) -> Row | None:
        """The finished row, if there is one."""
        return self.book.find(arm.name, seed, self._settings(arm, seed))

    def _settings(self, arm: Arm, seed: int) -> dict[str, Any]:
        return settings(arm, self.budget, self.config(arm, seed)) | self._files

    @property
    def rows(self) -> list[Row]:
        """All finished rows of these arms and seeds."""
        found = [self.row(arm, seed) for arm in self.arms for seed in self.seeds]
        return [row for row in found if row is not None]

    def clips_file(self, arm: Arm, seed: int) -> Path:
        """Where an arm's first clips are kept."""
        return self.out / "clips" / f"{arm.name}-{self.budget.updates}-seed{seed}.safetensors"

    def run(self, progress: Callable[[str], None] = say) -> None:
        """Make every row that isn't there.

        Raises:
            StoppedError: a training did not come to its end.
        """
        todo = [(arm, seed) for seed in self.seeds for arm in self.arms if self.row(arm, seed) is None]
        for number, (arm, seed) in enumerate(todo, 1):
            progress(f"[{number} of {len(todo)}] {arm.title}, seed {seed}")
            row = self._make(arm, seed)
            progress(f"  accuracy {row.accuracy:.3f}, Frechet distance {row.frechet:.2f}, motion {row.motion:.3f}")

    def _make(self, arm: Arm, seed: int) -> Row:
        """Train what is to be trained, sample, judge, and keep the row."""
        sizes, config = self.teacher.config, self.config(arm, seed)
        how = density = took = None
        if arm.source == "real":
            clips, labels = real(sizes, self.budget.clips, seed)
        else:
            weights, options, took = self._weights(arm, seed, config)
            how, sampler = way(arm, self.budget, config), self._sampler(options)
            sampler.load(weights)
            noise, labels = starts(sizes, self.budget.clips, seed)
            clips = sampler.draw_all(how, noise, labels, self.budget.batch, counter("  clips"))
            density = sampler.density(arm.sparse, noise[:4], labels[:4])
        found = judged(clips, labels, sizes)
        picture.keep(picture.to_grey(clips), self.clips_file(arm, seed))
        return self.book.add(
            Row(
                arm=arm.name,
                title=arm.title,
                seed=seed,
                steps=None if how is None else how.steps,
                sparse=arm.sparse,
                clips=found.clips,
                accuracy=found.accuracy,
                frame_accuracy=found.frame_accuracy,
                frechet=found.frechet,
                motion=found.acceleration,
                density=density,
                train_seconds=None if took is None else round(took, 1),
                settings=self._settings(arm, seed),
                made_by=made_by(),
            )
        )

    def _weights(
        self, arm: Arm, seed: int, config: RunConfig
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any], float | None]:
        """Weights, the options to run them sparse with, and the seconds of training in this process, if there was."""
        options = config.sparsity.options(grid=self.teacher.config.grid)
        if arm.source == "teacher":
            return self.teacher.state_dict(), options, None
        start, trained = time.monotonic(), False
        if arm.source == "adapted" or arm.adapted:
            trained = self._adapt(config, seed)
        if arm.source == "adapted":
            weights: Mapping[str, Tensor] = load_teacher(self._adapted(seed)).state_dict()
        else:
            run = config if arm.run_of is None else self.config(arm_of(arm.run_of, self.arms), seed)
            trained = self._train(run) or trained
            weights, record = read_export(Path(run.folder) / "export")
            options = record["options"] if arm.run_of is None and arm.sparse else options
        return weights, options, time.monotonic() - start if trained else None

    def _train(self, config: RunConfig) -> bool:
        """Train one student unless it is there. Raises ``StoppedError`` where it didn't come to its end."""
        export = Path(config.folder) / "export"
        if export.is_dir():
            return False
        code = train(config)
        self._forget_compiled()
        if code or not export.is_dir():
            raise StoppedError(code)
        return True

    def _adapted(self, seed: int) -> Path:
        return adapted_file(self.budget, seed, self.out, self._files["teacher"])

    def _adapt(self, config: RunConfig, seed: int) -> bool:
        """Adapt the teacher to sparse attention unless it is there."""
        path = self._adapted(seed)
        if path.is_file():
            return False
        updates, steps = self.budget.adapting, self.budget.teacher_steps
        loss = adapt(self.teacher, config, path, updates=updates, steps=steps, progress=counter("  adapting"))
        say(f"  teacher adapted to sparse attention in {updates} updates, mean squared error {loss:.4g}")
        self._forget_compiled()
        return True

    def _forget_compiled(self) -> None:
        """Free what a training compiled: the models of a dozen of them would reach Dynamo's limit of variants."""
        self._samplers.clear()
        torch._dynamo.reset()

    def _sampler(self, options: Mapping[str, Any]) -> Sampler:
        """The compiled model for these options of blade."""
        key = json.dumps(options, sort_keys=True)  # an export has lists for tuples
        if key not in self._samplers:
            self._samplers[key] = Sampler(self.teacher, options)
        return self._samplers[key]

    def time(self, others: Sequence[Way] = (), rounds: int = 5) -> dict[Way, float]:
        """Time the ways in which the rows are sampled, all in one go, unless every row has its time.

        Args:
            others: ways to time beside them, for comparison.
            rounds: of the median.

        Returns:
            Seconds per clip; empty where nothing was to be timed.
        """
        mine = [row for row in self.rows if row.steps is not None]
        if all(row.seconds_per_clip is not None for row in mine) and not others:
            return {}
        ways = dict.fromkeys([*map(way_of, mine), *others])
        options = self.config(self.arms[-1], self.seeds[0]).sparsity.options(grid=self.teacher.config.grid)
        found = self._sampler(options).seconds(list(ways), rounds)
        self.book.update(lambda row: replace(row, seconds_per_clip=found[way_of(row)]) if row in mine else row)
        return found
