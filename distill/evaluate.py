"""Compare models at equal prompts and seeds: PSNR, SSIM, latent MMD, time and memory, in one table and one JSON.

``evaluate_student`` compares the student sparse, the same student dense, and its teacher; ``evaluate`` any models.
Every sample is kept on disk as it is made, so a stopped evaluation goes on where it was, and only one model is loaded
at a time.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blade_compile.distill.clips import slug, suffix_for
from blade_compile.distill.errors import DataError
from blade_compile.distill.export import fingerprint, read_record
from blade_compile.distill.generate import LoadedModel, Sample, load_student, load_teacher
from blade_compile.distill.metrics import mmd, psnr, ssim
from blade_compile.distill.vbench import (
    VBENCH,
    VBENCH2,
    Clip,
    Suite,
    find_info,
    lay_out,
    plan,
    read_info,
    read_results,
    scores,
    table,
)
from blade_compile.distill.vbench import run as run_vbench

Sampler = Callable[[str, int], Sample]
"""Draws a sample of a prompt with a seed"""


@dataclass(frozen=True)
class Spread:
    """A number over all prompts and seeds."""

    mean: float
    deviation: float
    "sample standard deviation; 0 for one value"

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.deviation:.2g}"


@dataclass(frozen=True)
class ModelResult:
    """What one model cost."""

    name: str
    samples: int
    seconds: float
    "median of a sample, without the first call, which compiles"
    first_seconds: float | None
    "of the first call; None where it wasn't timed"
    peak_bytes: int | None
    "largest memory while sampling: of the device, or of the process on the CPU; None where it can't be read"


@dataclass(frozen=True)
class PairResult:
    """How far two models are apart."""

    name: str
    reference: str
    psnr: Spread
    "dB, of 8-bit frames at equal seeds; equal frames count as 100"
    ssim: Spread | None
    "None for frames of less than 11 x 11"
    mmd: float | None
    "squared MMD of the latents; None with fewer than two samples or where the latents differ in size"


@dataclass(frozen=True)
class Evaluation:
    """All results."""

    prompts: int
    seeds: tuple[int, ...]
    device: str
    models: tuple[ModelResult, ...]
    pairs: tuple[PairResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def markdown(self) -> str:
        """Two tables: what each model costs, and how far they are apart."""
        lines = [
            f"{self.prompts} prompts, seeds {', '.join(map(str, self.seeds))}, {self.device}",
            "",
            "| model | samples | seconds | first call | peak memory |",
            "| --- | --- | --- | --- | --- |",
        ]
        for m in self.models:
            peak = "-" if m.peak_bytes is None else f"{m.peak_bytes / 2**30:.2f} GiB"
            first = "-" if m.first_seconds is None else f"{m.first_seconds:.3g}"
            lines.append(f"| {m.name} | {m.samples} | {m.seconds:.3g} | {first} | {peak} |")
        lines += ["", "| model | against | PSNR (dB) | SSIM | latent MMD² |", "| --- | --- | --- | --- | --- |"]
        for p in self.pairs:
            distance = "-" if p.mmd is None else f"{p.mmd:.3g}"
            likeness = "-" if p.ssim is None else str(p.ssim)
            lines.append(f"| {p.name} | {p.reference} | {p.psnr} | {likeness} | {distance} |")
        return "\n".join(lines) + "\n"


class _Peak:
    """The largest memory between start and stop."""

    def start(self) -> None:
        self.device = torch.cuda.is_available()
        if self.device:
            torch.cuda.reset_peak_memory_stats()
            return
        self.fresh = False
        with suppress(OSError):  # Linux: 5 resets the high-water mark of the process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.fresh = True

    def stop(self) -> int | None:
        if self.device:
            return int(torch.cuda.max_memory_allocated())
        if not self.fresh:
            return None
        with suppress(OSError, StopIteration, ValueError):
            status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _save(sample: Sample, path: Path, prompt: str) -> None:
    beside = path.with_suffix(".partial")
    tensors = {"frames": sample.frames.contiguous(), "latents": sample.latents.contiguous()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside, metadata={"prompt": prompt, "seconds": repr(sample.seconds)})
        beside.replace(path)
    except OSError as error:
        raise DataError(f"can't write {path}: {error.strerror or error}; free space or give another folder") from error


def _seconds(path: Path, prompt: str) -> float | None:
    """The time of a sample on disk; None where there is none of this prompt."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            return float(metadata["seconds"]) if metadata.get("prompt") == prompt else None
    except Exception as error:  # safetensors has a type of its own for a broken file
        raise DataError(f"can't read {path}: {error}; remove it to draw it again") from error


def _paths(folder: Path, prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[Path, str, int]]:
    return [
        (folder / f"{i:04d}-{slug(prompt, 40)}-{seed}.safetensors", prompt, seed)
        for i, prompt in enumerate(prompts)
        for seed in seeds
    ]


def sample_all(
    name: str,
    load: Callable[[], Sampler],
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    identity: str = "",
) -> ModelResult:
    """Draw every prompt with every seed into ``folder``; what is there is kept.

    Args:
        name: of the model.
        load: called once, when there is something to draw.
        prompts, seeds: what to draw.
        folder: of this model's samples.
        identity: of the weights and settings; samples of another are not taken for its own.

    Raises:
        DataError: the folder is another model's, or can't be read or written.
    """
    items, peak = _paths(folder, prompts, seeds), _Peak()
    sampler: Sampler | None = None
    cost = folder / "cost.json"
    known: dict[str, Any] = json.loads(cost.read_text(encoding="utf-8")) if cost.is_file() else {}
    if known.setdefault("identity", identity) != identity:
        raise DataError(f"{folder} holds samples of {known['identity']!r}, not of {identity!r}; give another folder")
    seconds = []
    for path, prompt, seed in items:
        took = _seconds(path, prompt)
        if took is None:
            if sampler is None:
                sampler = load()
                first = sampler(prompt, seed).seconds  # compiles; drawn again below, so that it counts for nothing
                known.setdefault("first_seconds", first)
                peak.start()
            sample = sampler(prompt, seed)
            _save(sample, path, prompt)
            took = sample.seconds
            known["peak_bytes"] = max(filter(None, (known.get("peak_bytes"), peak.stop())), default=None)
            cost.write_text(json.dumps(known), encoding="utf-8")
        seconds.append(took)
    del sampler
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return ModelResult(
        name, len(items), median(seconds), known.get("first_seconds"), known.get("peak_bytes")
    )  # fmt: skip


def _spread(values: Sequence[float]) -> Spread:
    return Spread(fmean(values), stdev(values) if len(values) > 1 else 0.0)


def compare(name: str, reference: str, ours: Sequence[Path], theirs: Sequence[Path]) -> PairResult:
    """Compare samples of two models that were drawn with the same prompts and seeds.

    Args:
        name, reference: of the models.
        ours, theirs: files of ``sample_all`` in the same order.
    """
    ratios, likenesses = [], []
    latents: list[tuple[Tensor, Tensor]] = []
    for ours_path, theirs_path in zip(ours, theirs, strict=True):
        a, b = load_file(ours_path), load_file(theirs_path)
        if a["frames"].shape != b["frames"].shape:
            raise DataError(
                f"{name} makes frames of {tuple(a['frames'].shape)} and {reference} of {tuple(b['frames'].shape)}; "
                "give both the same height, width and num_frames"
            )
        x, y = (t["frames"].movedim(-1, 1).unsqueeze(0) for t in (a, b))  # [1, T, C, H, W]
        ratios.append(min(float(psnr(x, y, 255.0)), 100.0))
        if min(x.shape[-2:]) >= 11:
            likenesses.append(float(ssim(x, y, 255.0)))
        latents.append((a["latents"], b["latents"]))
    fit = len(latents) > 1 and all(a.numel() == b.numel() == latents[0][0].numel() for a, b in latents)
    distance = None
    if fit:
        distance = mmd(torch.stack([a.flatten() for a, _ in latents]), torch.stack([b.flatten() for _, b in latents]))
    whole = len(likenesses) == len(ratios)
    return PairResult(name, reference, _spread(ratios), _spread(likenesses) if whole else None, distance)


def evaluate(
    models: Mapping[str, Callable[[], Sampler]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    identity: str = "",
) -> Evaluation:
    """Draw from every model and compare each with every later one.

    Args:
        models: names and loaders; a loader is called when its turn comes, and its model is freed afterwards. The order
            matters: each is compared against those after it.
        prompts: what to draw.
        seeds: each prompt is drawn with each.
        out: folder for the samples, ``evaluation.json`` and ``evaluation.md``.
        identity: of the models' weights and settings, so that a later run doesn't take these samples for its own.

    Raises:
        DataError: no prompts or seeds, frames that don't compare, or a folder that can't be written.
    """
    if not prompts or not seeds:
        raise DataError(f"found {len(prompts)} prompts and {len(seeds)} seeds; give one or more of each")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    costs = [sample_all(name, load, prompts, seeds, folder / slug(name), identity) for name, load in models.items()]
    files = {name: [path for path, _, _ in _paths(folder / slug(name), prompts, seeds)] for name in models}
    pairs = [compare(a, b, files[a], files[b]) for a, b in combinations(models, 2)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result = Evaluation(len(prompts), tuple(seeds), device, tuple(costs), tuple(pairs))
    (folder / "evaluation.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(result.markdown(), encoding="utf-8")
    return result


def evaluate_student(
    export: str | Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    *,
    base: str | None = None,
    teacher_steps: int = 50,
    teacher_cfg_scale: float | None = None,
    negative_prompt: str | None = None,
    with_teacher: bool = True,
    compiled: bool = True,
    device: str | None = None,
    trust_code: bool = False,
) -> Evaluation:
    """Compare a student sparse, dense, and its teacher.

    Args:
        export: folder of the export.
        prompts, seeds: what to draw.
        out: folder of the results.
        base: the base model, where it is not the one that the export names.
        teacher_steps, teacher_cfg_scale, negative_prompt: how the teacher samples; None: as in the training.
        with_teacher: False leaves the teacher out.
        compiled: compile also what is dense, so that times compare.
        device: None: cuda where there is one.
        trust_code: run the factory that the export names, if it names one.
    """
    common: dict[str, Any] = {"base": base, "compiled": compiled, "device": device, "trust_code": trust_code}
    record = read_record(export)
    steps = record["steps"]
    if negative_prompt is None:
        negative_prompt = record.get("negative_prompt") or ""
    models: dict[str, Callable[[], Sampler]] = {
        f"student sparse, {steps} steps": partial(load_student, export, sparse=True, **common),
        f"student dense, {steps} steps": partial(load_student, export, sparse=False, **common),
    }
    if with_teacher:
        models[f"teacher, {teacher_steps} steps"] = partial(
            load_teacher,
            export,
            steps=teacher_steps,
            cfg_scale=teacher_cfg_scale,
            negative_prompt=negative_prompt,
            **common,
        )
    identity = f"{fingerprint(export)}, base {base}, {compiled=}, {teacher_cfg_scale=}, {negative_prompt=}"
    return evaluate(models, prompts, seeds, out, identity)


def score_by_vbench(
    suite: Suite,
    export: str | Path,
    out: str | Path,
    python: str | Path,
    *,
    base: str | None = None,
    teacher_steps: int = 50,
    dimensions: Sequence[str] = (),
    info: str | Path | None = None,
    checkout: str | Path | None = None,
    device: str | None = None,
    trust_code: bool = False,
) -> tuple[str, list[str]]:
    """Draw a suite's clips from teacher and student, score them in the other interpreter, and put both in one table.

    Args:
        suite: ``vbench.VBENCH`` or ``vbench.VBENCH2``.
        export: folder of the export.
        out: folder for clips and results, one below it for each model. A stopped run goes on.
        python: interpreter that has the suite.
        base, teacher_steps, device, trust_code: as in ``evaluate_student``; the teacher samples as in the training.
        dimensions: some of the suite's; empty: all.
        info: the suite's full_info.json; None: asked from the interpreter.
        checkout: folder to run the suite in; VBench-2.0 wants its checkout.

    Returns:
        The table, and what failed as ``model/dimension``.
    """
    source = Path(info) if info else find_info(suite, str(python), checkout)
    clips = plan(suite, read_info(source), dimensions=dimensions or None, suffix=suffix_for(video=True))
    common: dict[str, Any] = {"base": base, "device": device, "trust_code": trust_code}
    models: dict[str, Callable[[], LoadedModel]] = {
        "teacher": partial(load_teacher, export, steps=teacher_steps, **common),
        "student": partial(load_student, export, **common),
    }
    found, failed = {}, []
    for name, load in models.items():
        folder = Path(out) / name
        _draw_clips(suite, clips, load, folder, f"{name} {fingerprint(export)}, base {base}, {teacher_steps} steps")
        failed += [f"{name}/{d}" for d in run_vbench(suite, clips, folder, str(python), info=source, checkout=checkout)]
        found[name] = scores(suite, read_results(suite, folder))
    text = table(suite, found)
    (Path(out) / f"{suite.name}.md").write_text(text, encoding="utf-8")
    plain = {name: asdict(model) for name, model in found.items()}
    (Path(out) / f"{suite.name}.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    return text, failed


def _draw_clips(suite: Suite, clips: Sequence[Clip], load: Callable[[], LoadedModel], folder: Path, model: str) -> None:
    """Draw what is missing; the model is loaded at the first clip and freed at the end."""
    loaded: list[LoadedModel] = []

    def draw(prompt: str, seed: int) -> Tensor:
        if not loaded:
            loaded.append(load())
        return loaded[0](prompt, seed).frames

    lay_out(suite, clips, draw, folder, model=model)
    loaded.clear()
    gc.collect()


def evaluate_export(
    export: str | Path,
    prompts: Sequence[str],
    out: str | Path,
    *,
    base: str | None = None,
    seeds: int = 1,
    teacher_steps: int = 50,
    vbench: str | None = None,
    vbench_python: str | Path | None = None,
    dimensions: Sequence[str] = (),
    device: str | None = None,
    trust_code: bool = False,
) -> None:
    """What ``blade-distill eval`` does; the tables go to the terminal, too.

    Args:
        export: folder of the export.
        prompts: what to draw.
        out: folder of the results.
        base: the teacher, where it is not the one that the export names.
        seeds: clips per prompt; their seeds are 0, 1, ..
        teacher_steps: of the teacher.
        vbench: ``1`` for VBench, ``2`` for VBench-2.0, None for neither.
        vbench_python: interpreter that has it; for VBench-2.0 its checkout is the working directory.
        dimensions: of VBench; empty: all.
        device: None: cuda where there is one.
        trust_code: run the factory that the export names, if it names one.

    Raises:
        DataError: VBench failed on a dimension; the others are in the table.
    """
    common: dict[str, Any] = {
        "base": base, "teacher_steps": teacher_steps, "device": device, "trust_code": trust_code,
    }  # fmt: skip
    result = evaluate_student(export, prompts, range(seeds), out, **common)
    sys.stdout.write(result.markdown())
    if vbench is None:
        return
    suite, folder = (VBENCH2 if vbench == "2" else VBENCH), Path(out) / f"vbench{vbench}"
    text, failed = score_by_vbench(
        suite,
        export,
        folder,
        str(vbench_python),
        dimensions=dimensions,
        **common,
    )
    sys.stdout.write(f"\n{text}")
    if failed:
        raise DataError(f"{suite.name} failed on {', '.join(failed)}; see logs/ in {folder}, and repeat the command")
