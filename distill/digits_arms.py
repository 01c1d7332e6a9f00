"""The arms of the digits experiment: what is trained, from which weights, and how it is sampled.

All arms share the number of updates, batch, learning rates, noise and labels; each changes only what its entry says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from blade_compile.distill.config import RunConfig, load

Source = Literal["real", "teacher", "adapted", "run"]
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much every arm is given, and how much it is judged on."""

    updates: int = 600
    "of a student in each trained arm; the last arm spends some of them on its teacher"
    regression: int = 60
    "the first updates of a student that follow the teacher itself (method.regression_updates)"
    adapt_share: float = 0.25
    "share of the updates with which the last arm makes its teacher sparse before it distils"
    teacher_steps: int = 50
    clips: int = 500
    "judged of each arm and seed; the Frechet distance of fewer clips is larger by chance"
    batch: int = 50
    "clips sampled at a time"

    @property
    def adapting(self) -> int:
        """Updates of the teacher in the last arm."""
        return round(self.adapt_share * self.updates)


FULL = Budget()
QUICK = Budget(updates=60, regression=30, clips=200)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How clips are sampled: all that the time per clip depends on."""

    steps: int
    cfg_scale: float
    sparse: bool


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of the table."""

    name: str
    title: str
    source: Source
    "of the weights: real clips have none; the teacher; the teacher adapted to sparse attention; a run of the trainer"
    sparse: bool
    "how it is sampled"
    few_steps: bool = False
    "K steps without guidance's help from more; False: as many as the teacher's"
    run_of: str | None = None
    "the arm whose run gives the weights, where it isn't its own"
    overrides: tuple[str, ...] = ()
    "what its run changes in the preset; ``{half}`` and ``{adapted}`` are filled in"
    adapted: bool = False
    "its run starts from the adapted teacher, whose share of the updates it pays"


_DENSE = ("sparsity.when=never",)
ARMS: tuple[Arm, ...] = (
    Arm(name="real", title="real clips of held-out digits", source="real", sparse=False),
    Arm(name="teacher", title="teacher", source="teacher", sparse=False),
    Arm(name="teacher_k", title="teacher in few steps", source="teacher", sparse=False, few_steps=True),
    Arm(name="dense", title="student, dense", source="run", sparse=False, few_steps=True, overrides=_DENSE),
    Arm(name="joint", title="student, sparse (joint)", source="run", sparse=True, few_steps=True),
    Arm(name="training_free", title="teacher, training-free sparse", source="teacher", sparse=True),
    Arm(
        name="training_free_k",
        title="teacher in few steps, training-free sparse",
        source="teacher",
        sparse=True,
        few_steps=True,
    ),
    Arm(
        name="sparsify_after",
        title="dense student, then sparse without training",
        source="run",
        sparse=True,
        few_steps=True,
        run_of="dense",
    ),
    Arm(
        name="sparsify_after_tuned",
        title="dense student, sparse for the last half of the updates",
        source="run",
        sparse=True,
        few_steps=True,
        overrides=("sparsity.schedule=[[0, 0.0], [{half}, {sparsity}]]",),
    ),
    Arm(name="adapted", title="teacher adapted to sparse attention", source="adapted", sparse=True),
    Arm(
        name="distil_after",
        title="adapted sparse teacher, then distilled",
        source="run",
        sparse=True,
        few_steps=True,
        overrides=("sparsity.teacher_sparse=true", "model.weights={adapted}"),
        adapted=True,
    ),
)


def arm(name: str, arms: Sequence[Arm] = ARMS) -> Arm:
    """An arm by its name."""
    return next(one for one in arms if one.name == name)


def training(config: RunConfig) -> dict[str, Any]:
    """What a trained student depends on beside teacher and seed, as plain values."""
    run = config.model_dump(mode="json", include={"latent", "method", "sparsity", "lora", "optimizer", "ema"})
    return {"updates": config.loop.max_steps, "batch": config.loop.batch_size, **run}


def _short(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def _plain(budget: Budget, seed: int, out: Path) -> list[str]:
    """What all runs change in the preset."""
    return [
        f"output_dir={json.dumps(str(out / 'runs'))}",
        f"seed={seed}",
        f"loop.max_steps={budget.updates}",
        f"method.regression_updates={budget.regression}",
        "loop.sample_every=0",
        "loop.keep_last=1",
        "loop.log_every=5",
    ]


def adapted_file(budget: Budget, seed: int, out: Path, teacher: str) -> Path:
    """Where the adapted teacher's weights are; arguments as of ``configuration``."""
    mark = _short(training(load("digits", _plain(budget, seed, out))), budget.teacher_steps, teacher)
    return out / f"adapted-{budget.adapting}-seed{seed}-{mark}.safetensors"


def configuration(one: Arm, budget: Budget, seed: int, out: Path, teacher: str = "") -> RunConfig:
    """The configuration of an arm's run; of one that trains nothing, the preset's with this budget.

    The run's name ends in a mark of all that its student depends on, so that what an earlier version or a shorter run
    left in the folder is never taken for this one.

    Args:
        one: the arm.
        budget: number of updates.
        seed: of weights, noise and probes.
        out: folder of the experiment; runs lie in ``out/runs``.
        teacher: what tells the teacher's weights from others.
    """
    adapted = adapted_file(budget, seed, out, teacher)
    updates = budget.updates - budget.adapting * one.adapted
    values = {
        "half": budget.updates // 2,
        "adapted": json.dumps(str(adapted.resolve())),
        "sparsity": load("digits").sparsity.sparsity,
    }
    own = [f"loop.max_steps={updates}", *(text.format(**values) for text in one.overrides)]
    config = load("digits", [*_plain(budget, seed, out), *own])
    mark = _short(training(config), teacher, adapted.name if one.adapted else "")
    return config.model_copy(update={"name": f"{one.name}-{updates}-seed{seed}-{mark}"})


def way(one: Arm, budget: Budget, config: RunConfig) -> Way:
    """How an arm is sampled: a student alone, the teacher with its guidance."""
    steps = config.method.steps if one.few_steps else budget.teacher_steps
    return Way(steps=steps, cfg_scale=1.0 if one.source == "run" else config.method.cfg_scale, sparse=one.sparse)


def settings(one: Arm, budget: Budget, config: RunConfig) -> dict[str, Any]:
    """What a row's numbers depend on beside the seed, as plain values: equal settings need not be run again."""
    trained = training(config)
    if one.source in {"real", "teacher"}:
        trained = {"sparsity": trained["sparsity"]} if one.sparse else {}
    shared = {"clips": budget.clips, **asdict(way(one, budget, config))}
    if one.adapted or one.source == "adapted":
        shared["adapting_updates"] = budget.adapting
    return {"source": one.source, "run_of": one.run_of, **shared, **trained}
