"""``blade-distill digits``: distil the digits teacher, judge the student, show it beside the whole experiment.

Without options one seed of the joint sparse student, beside the committed rows; ``--full`` makes those rows: all arms
of ``digits_arms``, three seeds. Both write rows.json, table.md and clips.png, and go on where they were stopped.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from blade_compile.distill import digits_picture as picture
from blade_compile.distill import digits_table as table
from blade_compile.distill.digits_arms import ARMS, FULL, QUICK, SEEDS, Way
from blade_compile.distill.digits_arms import arm as arm_of
from blade_compile.distill.digits_experiment import Experiment, StoppedError, say
from blade_compile.distill.digits_rows import COMMITTED, Row, machine, read, save, write

TITLES = {arm.name: arm.title for arm in ARMS}
NOTES = (
    "Accuracy: share of clips that an independent classifier reads as the digit asked for. Frechet distance: of its "
    "features to those of real held-out clips. Motion: mean second difference of the centroid in pixels; the real "
    "clips' is right, not 0. Means over the seeds, with the least and the largest. All arms of a seed share noise, "
    "classes and the number of updates."
)
MARK = "> this run: "


def run(*, out: Path, quick: bool, full: bool, seed: int) -> int:
    """Run the command.

    Args:
        out: folder of all results; the same command with the same folder goes on.
        quick: few updates and clips.
        full: all arms and seeds.
        seed: of the run; not of ``full``, which has its own.

    Returns:
        The exit code: that of a training which stopped early, else 0.

    Raises:
        DistillError: the folder can't be written, or what the trainer says.
    """
    budget = QUICK if quick else FULL
    experiment = Experiment(out, budget, ARMS, SEEDS) if full else Experiment(out, budget, [arm_of("joint")], [seed])
    committed = read(COMMITTED)
    say(_plan(experiment))
    try:
        experiment.run()
    except StoppedError as stopped:
        say("stopped before the end; the same command goes on from there")
        return stopped.code
    finally:
        write(out / "table.md", report(experiment, committed, {}))
    times = experiment.time() if full else experiment.time(_others(experiment), rounds=3)
    finish(experiment, committed, times)
    return 0


def is_quick(experiment: Experiment) -> bool:
    """Whether this is the short form."""
    return experiment.budget == QUICK


def is_whole(experiment: Experiment) -> bool:
    """Whether these are all arms."""
    return experiment.arms is ARMS


def _plan(experiment: Experiment) -> str:
    updates = experiment.budget.updates
    if is_whole(experiment):
        count = len(experiment.arms) * len(experiment.seeds)
        return f"{count} rows, {updates} updates in each training: hours on 2 cores; stop and go on at will"
    minutes = "about 3" if is_quick(experiment) else "at most 15"
    return f"{updates} updates of the sparse student: {minutes} minutes on 2 cores"


def _others(experiment: Experiment) -> list[Way]:
    """What the student is timed against on this machine: itself dense and, with time enough, its teacher."""
    config = experiment.config(experiment.arms[0], experiment.seeds[0])
    dense = Way(steps=config.method.steps, cfg_scale=1.0, sparse=False)
    teacher = Way(steps=experiment.budget.teacher_steps, cfg_scale=config.method.cfg_scale, sparse=False)
    return [dense] if is_quick(experiment) else [dense, teacher]


def finish(experiment: Experiment, committed: Sequence[Row], times: Mapping[Way, float]) -> None:
    """Write table, rows and clips, and show the table."""
    out = experiment.out
    write(out / "table.md", report(experiment, committed, times))
    draw(experiment, COMMITTED.with_suffix(".safetensors"))
    show(experiment, committed, times)
    if is_whole(experiment):
        _for_commit(experiment)
        say(f"To commit the results: cp {quote(str(out))}/commit/experiment.* {quote(str(COMMITTED.parent))}")
    say(f"wrote {out}/table.md, {out}/rows.json, {out}/clips.png and {out}/clips/*.gif")


def lines(experiment: Experiment, committed: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table: all arms of this experiment, or the committed ones with this run's line after its own arm's."""
    if is_whole(experiment):
        return table.lines(experiment.rows, TITLES)
    found = table.lines(committed, TITLES)
    for line in table.lines(experiment.rows, TITLES, mark=MARK):
        title = line[0].removeprefix(MARK)
        place = next((i + 1 for i, other in enumerate(found) if other[0] == title), len(found))
        found.insert(place, line)
    return found


def remarks(experiment: Experiment, committed: Sequence[Row], times: Mapping[Way, float]) -> list[str]:
    """What the table means, line by line."""
    budget = experiment.budget
    said = [
        f"{budget.updates} updates in each training, {budget.clips} clips judged of each arm and seed; {machine()}."
    ]
    if is_quick(experiment):
        said.append(
            f"--quick makes {FULL.updates // budget.updates} times fewer updates and judges fewer clips (their Frechet "
            "distance is larger by chance): it shows that everything runs, not how good the method is."
        )
    if times:
        ways = "; ".join(f"{_named(one)} {seconds:.3g} s" for one, seconds in times.items())
        said.append(f"Time per clip here, compiled, taking turns, medians: {ways}.")
    judged = experiment.rows if is_whole(experiment) else committed
    if not judged:
        return [*said, "No results of the whole experiment are committed; `blade-distill digits --full` makes them."]
    where = "" if is_whole(experiment) else "Of the committed rows: "
    first, *rest = table.sentences(judged, TITLES)
    return [*said, where + first, *rest]


def _named(one: Way) -> str:
    guided = ", guided" if one.cfg_scale != 1 else ""
    return f"{one.steps} steps {'sparse' if one.sparse else 'dense'}{guided}"


def report(experiment: Experiment, committed: Sequence[Row], times: Mapping[Way, float]) -> str:
    """Table and remarks as markdown that also reads as plain text."""
    listed = "\n".join(f"- {remark}" for remark in remarks(experiment, committed, times))
    return f"# Moving digits\n\n{table.markdown(lines(experiment, committed))}\n{NOTES}\n\n{listed}\n"


def show(experiment: Experiment, committed: Sequence[Row], times: Mapping[Way, float]) -> None:
    """On a terminal with rich, elsewhere as plain text."""
    if not sys.stdout.isatty():
        sys.stdout.write(report(experiment, committed, times))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(table.rich_table(lines(experiment, committed), "Moving digits", console.width))
    for remark in (NOTES, *remarks(experiment, committed, times)):
        console.print(remark, markup=False)


def draw(experiment: Experiment, committed_clips: Path) -> None:
    """``clips.png`` with the committed arms and this run's, and a GIF of each arm of this run; of the first seed."""
    whole = is_whole(experiment)
    titled = (
        {}
        if whole
        else {TITLES[name]: clips for name, clips in picture.unbundle(committed_clips, list(TITLES)).items()}
    )
    for name, clips in _first_clips(experiment).items():
        titled[TITLES[name] if whole else MARK + TITLES[name]] = clips
        picture.animate(clips, experiment.out / "clips" / f"{name}.gif")
    picture.sheet(titled, experiment.out / "clips.png")


def _first_clips(experiment: Experiment) -> dict[str, picture.Tensor]:
    seed = experiment.seeds[0]
    return picture.kept({arm.name: experiment.clips_file(arm, seed) for arm in experiment.arms})


def _for_commit(experiment: Experiment) -> None:
    """The four files of ``distill/digits/experiment.*`` in ``out/commit``."""
    folder = experiment.out / "commit"
    save(experiment.rows, folder / "experiment.json")
    picture.bundle(_first_clips(experiment), folder / "experiment.safetensors")
    shutil.copyfile(experiment.out / "table.md", folder / "experiment.md")
    shutil.copyfile(experiment.out / "clips.png", folder / "experiment.png")
