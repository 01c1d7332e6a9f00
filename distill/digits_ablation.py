"""What makes the digits student converge, one change at a time: ``python -m blade_compile.distill.digits_ablation``.

Every line differs from the joint sparse student of ``blade-distill digits`` in one setting; all have the same number of
updates, noise and classes. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from blade_compile.distill import digits_picture as picture
from blade_compile.distill import digits_table as table
from blade_compile.distill.digits_arms import FULL, QUICK, Arm, Budget
from blade_compile.distill.digits_experiment import Experiment, StoppedError, say
from blade_compile.distill.digits_rows import machine, write
from blade_compile.distill.errors import DistillError, DivergedError

CHANGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "as_it_is": ("student, sparse (joint), as it is", ()),
    "separate": ("separate intervals", ("method.intervals=separate",)),
    "critic_1": ("one update of the critic for one of the student", ("method.critic_updates=1",)),
    "no_regression": ("no first updates by regression", ("method.regression_updates=0",)),
    "importance": ("with the importance weight", ("method.importance_weight=true",)),
    "min_snr": ("critic weighted by min-SNR", ("method.weighting=min_snr",)),
    "squared": ("squared penalty", ("method.penalty=squared",)),
    "no_average": ("no average of the weights", ("ema.decay=null",)),
    "eta_0.9": ("eta 0.9", ("method.eta=0.9",)),
}


def arms() -> tuple[Arm, ...]:
    """One arm for each change."""
    return tuple(
        Arm(name=name, title=title, source="run", sparse=True, few_steps=True, overrides=overrides)
        for name, (title, overrides) in CHANGES.items()
    )


def report(experiment: Experiment, failed: Mapping[str, str]) -> str:
    """The table as markdown. ``failed``: what stopped a line, by its title."""
    lines = table.lines(experiment.rows, {arm.name: arm.title for arm in experiment.arms})
    budget = experiment.budget
    said = (
        f"{budget.updates} updates, {budget.clips} clips, seed {', '.join(map(str, experiment.seeds))}; {machine()}. "
        "One seed says little about differences of a point of accuracy."
    )
    ends = "".join(f"\n- {title}: {why}" for title, why in failed.items())
    return f"# Moving digits: one change at a time\n\n{table.markdown(lines)}\n{said}\n{ends and ends + chr(10)}"


def make(out: Path, budget: Budget, seed: int) -> dict[str, str]:
    """Make every line. Returns what stopped those that diverged, by title: that is a result too.

    Raises:
        StoppedError: a training was interrupted.
    """
    failed = {}
    for arm in arms():
        try:
            Experiment(out, budget, [arm], (seed,)).run()
        except DivergedError as error:
            failed[arm.title] = str(error).partition(" (")[0]
            say(f"  {failed[arm.title]}")
    return failed


def run(out: Path, budget: Budget, seed: int) -> int:
    """Train, judge and time every line. Returns the exit code."""
    failed: dict[str, str] = {}
    try:
        failed = make(out, budget, seed)
    except StoppedError as stopped:
        say("stopped before the end; the same command goes on from there")
        return stopped.code
    finally:
        whole = Experiment(out, budget, arms(), (seed,))
        write(out / "table.md", report(whole, failed))
    whole.time()
    write(out / "table.md", report(whole, failed))
    files = {arm.title: whole.clips_file(arm, seed) for arm in whole.arms if arm.title not in failed}
    picture.sheet(picture.kept(files), out / "clips.png")
    sys.stdout.write(report(whole, failed))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m blade_compile.distill.digits_ablation", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of all results; goes on with what is there")
    parser.add_argument("--quick", action="store_true", help="few updates and clips, for a look")
    parser.add_argument("--updates", type=int, help=f"of each student; {FULL.updates} if not given")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    budget = QUICK if given.quick else FULL
    try:
        return run(given.out, replace(budget, updates=given.updates or budget.updates), given.seed)
    except DistillError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
