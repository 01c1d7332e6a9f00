"""VBench and VBench-2.0: lay the clips out as they want them, run them in the user's own interpreter, read the scores.

Both pin old versions of everything, so they can't be dependencies: ``--vbench-python`` names an interpreter that has
them. One folder per model::

    manifest.json                        what is drawn, with the seed of every clip
    videos/<dimension>/<prompt>-<i>.mp4  a clip that several dimensions want is drawn once and linked
    results/<dimension>_eval_results.json, logs/<dimension>.log

Nothing else may lie in a folder of videos: VBench takes its file suffix from the first name it sees there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from blade_compile.distill import clips as clip_files
from blade_compile.distill.errors import ConfigError, DataError


@dataclass(frozen=True)
class Suite:
    """One benchmark."""

    name: str
    package: str
    benchmark: str
    "class in the package"
    info: str
    "file in the package with all prompts and their dimensions"
    groups: Mapping[str, tuple[str, ...]]
    "published partial scores and the dimensions that they average"
    repeats: int
    "clips of a prompt"
    more_repeats: Mapping[str, int]
    "for these dimensions"
    group_weights: Mapping[str, float] = field(default_factory=dict)
    "in the total; 1 where absent"
    weights: Mapping[str, float] = field(default_factory=dict)
    "of a dimension in its group; 1 where absent"
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    "what counts as 0 and as 1; (0, 1) where absent"
    name_limit: int | None = None
    "characters of the prompt that the file name keeps"

    @property
    def dimensions(self) -> tuple[str, ...]:
        """All dimensions, group by group."""
        return tuple(d for group in self.groups.values() for d in group)

    def clips_of(self, dimension: str) -> int:
        """Clips of each of a dimension's prompts."""
        return self.more_repeats.get(dimension, self.repeats)


VBENCH = Suite(
    name="vbench",
    package="vbench",
    benchmark="VBench",
    info="VBench_full_info.json",
    groups={
        "quality": (
            "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
            "aesthetic_quality", "imaging_quality", "dynamic_degree",
        ),
        "semantic": (
            "object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene",
            "appearance_style", "temporal_style", "overall_consistency",
        ),
    },
    repeats=5,
    more_repeats={"temporal_flickering": 25},  # clips that move are filtered out before it is scored
    group_weights={"quality": 4.0},
    weights={"dynamic_degree": 0.5},
    ranges={
        "subject_consistency": (0.1462, 1.0),
        "background_consistency": (0.2615, 1.0),
        "temporal_flickering": (0.6293, 1.0),
        "motion_smoothness": (0.706, 0.9975),
        "scene": (0.0, 0.8222),
        "appearance_style": (0.0009, 0.2855),
        "temporal_style": (0.0, 0.364),
        "overall_consistency": (0.0, 0.364),
    },
)  # fmt: skip
"""Huang et al., CVPR 2024; ranges and weights as the leaderboard's scripts/constant.py has them"""

VBENCH2 = Suite(
    name="vbench2",
    package="vbench2",
    benchmark="VBench2",
    info="VBench2_full_info.json",
    groups={
        "creativity": ("Composition", "Diversity"),
        "commonsense": ("Instance_Preservation", "Motion_Rationality"),
        "controllability": (
            "Camera_Motion", "Complex_Landscape", "Complex_Plot", "Dynamic_Attribute", "Dynamic_Spatial_Relationship",
            "Human_Interaction", "Motion_Order_Understanding",
        ),
        "human_fidelity": ("Human_Anatomy", "Human_Clothes", "Human_Identity"),
        "physics": ("Material", "Mechanics", "Multi-View_Consistency", "Thermotics"),
    },
    repeats=3,
    more_repeats={"Diversity": 20},
    name_limit=180,
)  # fmt: skip
"""Zheng et al., 2025: the total is the plain mean of the five groups"""

SUITES = {suite.name: suite for suite in (VBENCH, VBENCH2)}

# Run by the other interpreter: the documented Python interface, which both suites share. Arguments, no user text.
_DRIVER = """\
import importlib, sys
import torch
package, benchmark, device, info, out, videos, dimension = sys.argv[1:]
run = getattr(importlib.import_module(package), benchmark)(torch.device(device), info, out)
run.evaluate(videos_path=videos, name=dimension, dimension_list=[dimension])
"""
_FIND = "import importlib, sys; print(importlib.import_module(sys.argv[1]).__file__)"


@dataclass(frozen=True)
class Clip:
    """One clip to draw."""

    prompt: str
    "what the model is given; another wording of the suite's prompt, where one is given"
    seed: int
    files: tuple[str, ...]
    "places below ``videos/``, one for each dimension that wants it"


def clip_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of one clip, the same for every model: different for each prompt and index, and not picked by hand."""
    digest = hashlib.sha256(f"{seed}\0{prompt}\0{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _check_dimensions(suite: Suite, wanted: Sequence[str] | None) -> tuple[str, ...]:
    unknown = [d for d in wanted or () if d not in suite.dimensions]
    if unknown:
        raise ConfigError(f"{suite.name} has no dimension {unknown[0]!r}; it has {', '.join(suite.dimensions)}")
    return tuple(wanted) if wanted else suite.dimensions


def read_info(path: str | Path) -> list[dict[str, Any]]:
    """The prompts of a suite with their dimensions, from its ``*_full_info.json``."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        bad = [e for e in found if not isinstance(e["prompt_en"], str) or not isinstance(e["dimension"], list)]
    except FileNotFoundError:
        raise DataError(f"{path} is not there; give the suite's full_info.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no full_info.json of VBench: {type(error).__name__} {error}") from error
    if bad:
        raise DataError(f"{path} has an entry whose prompt_en is no text or whose dimension is no list: {bad[0]}")
    return list(found)


def plan(
    suite: Suite,
    info: Sequence[Mapping[str, Any]],
    *,
    dimensions: Sequence[str] | None = None,
    reworded: Mapping[str, str] | None = None,
    seed: int = 0,
    suffix: str = ".mp4",
) -> list[Clip]:
    """All clips that a suite wants.

    Args:
        suite: ``VBENCH`` or ``VBENCH2``.
        info: from ``read_info``.
        dimensions: some of the suite's; None: all.
        reworded: longer prompts for the model by the suite's prompt, which stays the file's name.
        seed: of the whole run.
        suffix: of the files; VBench-2.0 reads ``.mp4`` only.

    Raises:
        ConfigError: an unknown dimension, or a suffix that the suite can't read.
        DataError: a prompt that can't be a file's name, or none for a dimension.
    """
    wanted = _check_dimensions(suite, dimensions)
    if suffix not in ((".mp4",) if suite is VBENCH2 else (".mp4", ".gif")):
        raise ConfigError(f"{suite.name} doesn't read {suffix}; {clip_files.INSTALL_VIDEO} to write .mp4")
    files: dict[tuple[str, int], list[str]] = {}
    empty = set(wanted)
    for entry in info:
        prompt = entry["prompt_en"]
        for dimension in (d for d in wanted if d in entry["dimension"]):
            empty.discard(dimension)
            for i in range(suite.clips_of(dimension)):
                name = _file_name(prompt, i, suffix, suite.name_limit)
                places = files.setdefault((prompt, i), [])
                if f"{dimension}/{name}" not in places:
                    places.append(f"{dimension}/{name}")
    if empty:
        raise DataError(
            f"the full_info.json has no prompt for {', '.join(sorted(empty))}; it is another suite's, or cut"
        )
    given = reworded or {}
    return [Clip(given.get(p, p), clip_seed(seed, p, i), tuple(places)) for (p, i), places in files.items()]


def _file_name(prompt: str, index: int, suffix: str, limit: int | None) -> str:
    name = f"{prompt[:limit]}-{index}{suffix}"
    if "/" in name or "\0" in name or len(name.encode()) > 255:
        raise DataError(f"the prompt {prompt[:60]!r}.. can't be the name of a file, which VBench wants")
    return name


def lay_out(
    suite: Suite,
    clips: Sequence[Clip],
    draw: Callable[[str, int], Tensor],
    folder: str | Path,
    *,
    model: str,
    fps: int = 8,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Draw the clips that are not there yet.

    Args:
        suite: of the clips.
        clips: from ``plan``.
        draw: prompt and seed to frames ``[T, H, W, C]``, uint8 or in [0, 1].
        folder: of this model and suite.
        model: what is being drawn from, so that clips of two models never mix.
        fps: frames per second.
        rank, world_size: each rank draws its share.

    Returns:
        How many were drawn now.

    Raises:
        DataError: the folder belongs to another model or plan, or can't be written.
    """
    root = Path(folder)
    _claim(root, {"suite": suite.name, "model": model, "clips": [asdict(c) for c in clips]})
    drawn = 0
    for clip in clips[rank::world_size]:
        first, *others = (root / "videos" / file for file in clip.files)
        if not first.is_file():
            beside = root / "drawing" / f"{rank}{first.suffix}"
            clip_files.write(draw(clip.prompt, clip.seed), beside, fps)
            first.parent.mkdir(parents=True, exist_ok=True)
            beside.replace(first)
            drawn += 1
        for other in others:
            _link(first, other)
    shutil.rmtree(root / "drawing", ignore_errors=True)
    return drawn


def _claim(root: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or compare it with the one that is there."""
    path, text = root / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            if json.loads(path.read_text(encoding="utf-8")) != json.loads(text):
                raise DataError(f"{root} holds clips of another model, seed or set of prompts; give another folder")
            return
        beside = path.with_name(f".manifest-{os.getpid()}.json")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise DataError(f"can't write {root}: {error.strerror or error}; give another folder") from error


def _link(source: Path, target: Path) -> None:
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without hard links
        beside = target.parent.parent / f".linking-{os.getpid()}{target.suffix}"
        shutil.copyfile(source, beside)
        beside.replace(target)


def find_info(suite: Suite, python: str, checkout: str | Path | None = None) -> Path:
    """The suite's ``*_full_info.json``, asked from the interpreter that has it.

    Args:
        suite: to look for.
        python: the interpreter.
        checkout: folder to run it in: VBench-2.0 is a checkout, not an installed package.
    """
    try:
        run = subprocess.run(
            [python, "-c", _FIND, suite.package], cwd=checkout, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise ConfigError(
            f"{python} can't import {suite.package} ({said[-1] if said else 'no output'}); give the interpreter that"
            " has it, and for VBench-2.0 the folder of its checkout"
        ) from error
    lines = run.stdout.strip().splitlines()  # packages may print while they are imported
    return Path(checkout or ".", lines[-1] if lines else "").with_name(suite.info)


def command(
    suite: Suite, dimension: str, folder: str | Path, python: str, info: str | Path, device: str = "cuda"
) -> list[str]:
    """The command that scores one dimension; paths in it are absolute, so it runs anywhere."""
    root = Path(folder).resolve()
    videos = root / "videos" / dimension
    filtered = root / "filtered" / "filtered_videos"
    if dimension == "temporal_flickering" and filtered.is_dir():
        videos = filtered
    given = (suite.package, suite.benchmark, device, Path(info).resolve(), root / "results", videos, dimension)
    return [python, "-c", _DRIVER, *map(str, given)]


def _filter_static(root: Path, python: str, checkout: str | Path | None) -> None:
    """VBench's own filter for temporal flickering, which only still clips may enter. Once."""
    tool, out = Path(shutil.which(python) or python).with_name("vbench"), root / "filtered"
    if (out / "filtered_videos").is_dir() or not tool.is_file():
        return
    given = ["--videos_path", root / "videos" / "temporal_flickering", "--result_path", out]
    _logged([str(tool), "static_filter", *map(str, given)], root / "logs" / "static_filter.log", checkout)


def _logged(arguments: Sequence[str], log: Path, cwd: str | Path | None) -> bool:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        try:
            run = subprocess.run(arguments, cwd=cwd, stdout=stream, stderr=subprocess.STDOUT, check=False)
        except OSError as error:
            raise ConfigError(
                f"can't run {arguments[0]}: {error.strerror}; give the interpreter that has VBench"
            ) from error
    return run.returncode == 0


def run(
    suite: Suite,
    clips: Sequence[Clip],
    folder: str | Path,
    python: str,
    *,
    info: str | Path | None = None,
    checkout: str | Path | None = None,
    device: str = "cuda",
) -> list[str]:
    """Score every dimension of the plan that has no result yet, one process each.

    Args:
        suite: of the clips.
        clips: from ``plan``; all have to be drawn.
        folder: of ``lay_out``.
        python: interpreter that has the suite.
        info: the suite's full_info.json; None: asked from the interpreter.
        checkout: folder to run in.
        device: that the suite is given.

    Returns:
        The dimensions that failed; ``logs/<dimension>.log`` says why.
    """
    root = Path(folder)
    missing = [file for clip in clips for file in clip.files if not (root / "videos" / file).is_file()]
    if missing:
        raise DataError(f"{len(missing)} clips are not drawn yet, such as {missing[0]!r}; draw them first")
    wanted = dict.fromkeys(file.split("/")[0] for clip in clips for file in clip.files)
    done = read_results(suite, root)
    left, failed = [dimension for dimension in wanted if dimension not in done], []
    if not left:
        return []
    source = info or find_info(suite, python, checkout)
    if "temporal_flickering" in left:
        _filter_static(root.resolve(), python, checkout)
    (root / "results").mkdir(parents=True, exist_ok=True)
    for dimension in left:
        arguments = command(suite, dimension, root, python, source, device)
        finished = _logged(arguments, root / "logs" / f"{dimension}.log", checkout)
        if not finished or dimension not in read_results(suite, root):
            with suppress(FileNotFoundError):
                _result(root, dimension).unlink()
            failed.append(dimension)
    return failed


def _result(root: Path, dimension: str) -> Path:
    return root / "results" / f"{dimension}_eval_results.json"


def read_results(suite: Suite, folder: str | Path) -> dict[str, float]:
    """The raw scores that are there, by dimension.

    Result files hold ``{dimension: [score, details of each clip]}``; others than ours (several dimensions in a file,
    any name that ends so) are read too.

    Raises:
        DataError: a file that isn't of this form.
    """
    found: dict[str, float] = {}
    for path in sorted((Path(folder) / "results").rglob("*_eval_results.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for dimension, value in content.items():
                score = float(value[0])
                if dimension in suite.dimensions and math.isfinite(score):
                    found[dimension] = score
        except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise DataError(f"{path} is no result of {suite.name} ({error}); remove it to score again") from error
    if found.get("imaging_quality", 0.0) > 1:
        found["imaging_quality"] /= 100  # older releases write it from 0 to 100
    return found


@dataclass(frozen=True)
class Scores:
    """What a suite publishes of a model."""

    raw: Mapping[str, float]
    normalised: Mapping[str, float]
    groups: Mapping[str, float | None]
    "None where a dimension of the group is missing"
    total: float | None


def scores(suite: Suite, raw: Mapping[str, float]) -> Scores:
    """Normalise each dimension to its published range, average the groups, and the groups to the total."""
    normalised = {}
    for dimension in suite.dimensions:
        if dimension in raw:
            low, high = suite.ranges.get(dimension, (0.0, 1.0))
            normalised[dimension] = (raw[dimension] - low) / (high - low)
    groups: dict[str, float | None] = {}
    for name, members in suite.groups.items():
        weights = [suite.weights.get(d, 1.0) for d in members]
        whole = all(d in normalised for d in members)
        groups[name] = sum(w * normalised[d] for w, d in zip(weights, members)) / sum(weights) if whole else None
    known = [(suite.group_weights.get(name, 1.0), value) for name, value in groups.items() if value is not None]
    total = sum(w * v for w, v in known) / sum(w for w, _ in known) if len(known) == len(groups) else None
    return Scores(dict(raw), normalised, groups, total)


def _raw_score(model: Scores, dimension: str) -> float | None:
    return model.raw.get(dimension)


def _group_score(model: Scores, group: str) -> float | None:
    return model.groups[group]


def table(suite: Suite, models: Mapping[str, Scores]) -> str:
    """One table: raw scores by dimension, normalised groups and total, and what each model differs from the first.

    Args:
        suite: of the scores.
        models: by name; the first is the reference (the teacher).
    """
    names = list(models)
    first, others = models[names[0]], names[1:]
    lines = [
        "| " + " | ".join([suite.name, *names, *(f"{name} - {names[0]}" for name in others)]) + " |",
        "| " + " | ".join(["---"] * (1 + len(names) + len(others))) + " |",
    ]

    def row(label: str, pick: Callable[[Scores], float | None]) -> str:
        values = [pick(models[name]) for name in names]
        base = pick(first)
        deltas = [None if v is None or base is None else v - base for v in values[1:]]
        cells = ["-" if v is None else f"{v:.4f}" for v in values] + ["-" if d is None else f"{d:+.4f}" for d in deltas]
        return "| " + " | ".join([label, *cells]) + " |"

    for group, members in suite.groups.items():
        shown = [d for d in members if any(d in model.raw for model in models.values())]
        lines += [row(d.replace("_", " "), partial(_raw_score, dimension=d)) for d in shown]
        lines.append(row(f"**{group.replace('_', ' ')}** (normalised)", partial(_group_score, group=group)))
    lines.append(row("**total** (normalised)", lambda s: s.total))
    return "\n".join(lines) + "\n"
