"""Train the teacher of the digits experiment: ``python -m blade_compile.distill.digits_teacher --out DIR --minutes M``.

Flow matching on clips of the ``teacher`` split, with Muon for the matrices of the blocks (Jordan et al.) and AdamW
for the rest, and an average of the weights whose window grows with the run (Karras et al., EDM2, eq. 127). The run
resumes where it was stopped: the batch of a step depends on the seed and the step alone, and checkpoints are written
beside and renamed. The rates fall over the last part of the given minutes; a longer run is the same command with more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blade_compile.distill.digits_data import NUM_CLASSES, ClipSpec, sample_clips
from blade_compile.distill.digits_judge import Judge, load_judge, real_clips, score, train_judge
from blade_compile.distill.digits_model import NULL_CLASS, DigitsConfig, DigitsTransformer, sample
from blade_compile.distill.muon import Muon

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
STATE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """How the teacher is trained."""

    model: DigitsConfig = field(default_factory=DigitsConfig)
    seed: int = 0
    batch: int = 16
    "clips of a step"
    lr: float = 3e-3
    "of AdamW: embeddings, modulation, first and last layer"
    matrix_lr: float = 6e-3
    "of Muon: the matrices of attention and MLP; 0: AdamW for all"
    warmup: int = 100
    "steps over which the rates rise"
    cooldown: float = 0.4
    "last share of the time over which the rates fall to zero"
    ema_gamma: float = 12.0
    "the weights' average has a decay of (1 - 1/t)^(gamma + 1) at step t"
    drop_label: float = 0.1
    "share of clips trained without their class, for guidance"
    time_mean: float = 0.0
    "mean of the logit-normal half of the times; the other half is uniform"
    bf16: bool = False
    "autocast to bf16; slower than fp32 on processors without bf16 matrix instructions"
    attention: str = "torch"
    "``torch``: Inductor; ``blade``: exact attention by blade's kernels; ``eager``: no compilation"


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    seconds: float = 0.0


def muon_matrices(model: DigitsTransformer) -> list[nn.Parameter]:
    """The weights that Muon may orthogonalise: matrices of the blocks, but not the modulation, which starts at 0."""
    return [
        p
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and p.ndim == 2 and "modulation" not in name
    ]


def optimizers(model: DigitsTransformer, settings: TeacherSettings) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices where ``matrix_lr`` is not 0. Each group remembers its ``base_lr``."""
    matrices = muon_matrices(model) if settings.matrix_lr else []
    held = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in held]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ]
    if matrices:
        found.append(Muon(matrices, lr=settings.matrix_lr))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return found


def rate_factor(step: int, done: float, settings: TeacherSettings) -> float:
    """Warm-up, a constant part, then a linear fall.

    Args:
        step: from 0.
        done: share of the run's time that has passed.
        settings: ``warmup`` and ``cooldown``.
    """
    rise = min(1.0, (step + 1) / settings.warmup)
    fall = min(1.0, max(0.0, 1 - done) / settings.cooldown)
    return rise * fall


def draw_times(count: int, mean: float, generator: torch.Generator) -> Tensor:
    """Times in [0, 1]: half uniform, half logit-normal (Esser et al., section 3.1). fp32 ``[count]``."""
    uniform = torch.rand(count, generator=generator)
    normal = torch.sigmoid(mean + torch.randn(count, generator=generator))
    return torch.where(torch.rand(count, generator=generator) < 0.5, uniform, normal)


def batch_of(step: int, settings: TeacherSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The noisy clips, times, labels and target velocities of a step; a function of the seed and the step."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_000_007 + step)
    clips, labels = sample_clips("teacher", settings.batch, settings.model.clips, generator)
    dropped = torch.rand(len(labels), generator=generator) < settings.drop_label
    times = draw_times(len(labels), settings.time_mean, generator)
    noise = torch.randn(clips.shape, generator=generator)
    s = times.view(-1, 1, 1, 1, 1)
    return (1 - s) * clips + s * noise, times, labels.masked_fill(dropped, NULL_CLASS), noise - clips


def average(ema: nn.Module, model: nn.Module, step: int, gamma: float) -> None:
    """Move the average towards the weights after update ``step`` (from 1)."""
    decay = (1 - 1 / step) ** (gamma + 1)
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def compiled(model: DigitsTransformer, attention: str, bf16: bool) -> Velocity:
    """The model as it is trained."""
    run: Velocity = model
    if attention == "torch":
        run = torch.compile(model)
    elif attention == "blade":
        exact: dict[str, Any] = {"sparsity": 0.0, "when": "always", "block_size": 64, "min_tokens": 1}
        run = torch.compile(model, backend="blade", options=exact)
    elif attention != "eager":
        raise ValueError(f"attention is {attention!r}: use torch, blade or eager")

    def velocity(x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return run(x, times, labels)

    return velocity


class Trainer:
    """Model, average, optimisers and progress of one run, with its checkpoint."""

    def __init__(self, settings: TeacherSettings) -> None:
        self.settings = settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = DigitsTransformer(settings.model)
        self.ema = deepcopy(self.model).requires_grad_(False)
        self.optimizers = optimizers(self.model, settings)
        self.progress = Progress()
        self.velocity = compiled(self.model, settings.attention, settings.bf16)

    def update(self, done: float) -> float:
        """One gradient step; returns the loss. ``done`` is the share of the run's time that has passed."""
        factor = rate_factor(self.progress.step, done, self.settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        x, times, labels, target = batch_of(self.progress.step, self.settings)
        loss = (self.velocity(x, times, labels) - target).square().mean()
        self.model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.progress.step += 1
        average(self.ema, self.model, self.progress.step, self.settings.ema_gamma)
        return float(loss.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        found |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for parameter, values in optimizer.state_dict()["state"].items():
                found |= {f"optimizer.{i}.{parameter}.{name}": value for name, value in values.items()}
        return {name: value.contiguous() for name, value in found.items()}

    def save(self, path: Path) -> None:
        """Write a checkpoint beside ``path`` and rename it, so that a reader never sees half of one."""
        metadata = {"progress": json.dumps(asdict(self.progress)), "settings": json.dumps(asdict(self.settings))}
        save_atomically(self.tensors(), path, metadata)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; ``ValueError`` if it is of another model."""
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (safe_open has no iterator)
        theirs = json.loads(metadata["settings"])["model"]
        mine = json.loads(json.dumps(asdict(self.settings.model)))
        if theirs != mine:
            raise ValueError(f"{path} holds a model of {theirs}, not of {mine}; use the same sizes or another --out")
        self.model.load_state_dict(_below(tensors, "model."))
        self.ema.load_state_dict(_below(tensors, "ema."))
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in _below(tensors, f"optimizer.{i}.").items():
                parameter, _, what = name.partition(".")
                state.setdefault(int(parameter), {})[what] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.progress = Progress(**json.loads(metadata["progress"]))


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file beside ``path``, flush it to the disk and rename it."""
    beside = path.with_name(path.name + ".part")
    save_file(tensors, beside, metadata)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def save_teacher(model: DigitsTransformer, path: Path, metadata: dict[str, str]) -> None:
    """Write weights with the sizes that they need, for ``load_teacher``."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_atomically(tensors, path, {**metadata, "model": json.dumps(asdict(model.config))})


def load_teacher(path: Path) -> DigitsTransformer:
    """Read weights written by ``save_teacher``: the model in evaluation mode, without gradients."""
    with safe_open(path, "pt") as stored:
        sizes = json.loads(stored.metadata()["model"])
        tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118 (no iterator)
    model = DigitsTransformer(DigitsConfig(**{**sizes, "patch": tuple(sizes["patch"])}))
    if not model.rotary_cos.is_meta:  # on the meta device there is nothing to fill
        model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def evaluate(
    model: nn.Module, judge: Judge, settings: TeacherSettings, *, clips: int, steps: int, cfg_scale: float
) -> tuple[dict[str, float], Tensor]:
    """Sample clips of all classes from fixed noise and judge them. Returns numbers and the clips."""
    config = settings.model
    generator = torch.Generator().manual_seed(settings.seed + 12_345)
    labels = torch.arange(clips) % NUM_CLASSES
    noise = torch.randn(clips, 1, config.frames, config.size, config.size, generator=generator)
    real, _ = real_clips(config.clips, 1000)
    parts = [sample(model, x, y, steps=steps, cfg_scale=cfg_scale) for x, y in zip(noise.split(50), labels.split(50))]
    made = torch.cat(parts)
    return {**score(judge, made, labels, real).as_dict(), "steps": steps, "cfg_scale": cfg_scale}, made


def save_picture(clips: Tensor, path: Path, columns: int = 2) -> None:
    """Draw clips as rows of frames, for a look; needs pillow and does nothing without it."""
    try:
        from PIL import Image
    except ImportError:
        return
    frames = torch.nn.functional.pad(clips[:, 0].clamp(-1, 1), (0, 1, 0, 1), value=0.0)
    rows = frames.permute(0, 2, 1, 3).flatten(2)  # [B, H, T * W]
    rows = rows[: len(rows) // columns * columns].unflatten(0, (-1, columns))
    picture = rows.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    grey = ((picture + 1) * 127.5).to(torch.uint8).numpy()
    Image.fromarray(grey).resize((grey.shape[1] * 4, grey.shape[0] * 4), 0).save(path)


def _log(path: Path, **values: float | str) -> None:
    line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()})
    with path.open("a") as file:
        file.write(line + "\n")
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _forget_after(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that a resumed run starts from: those steps are made again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def train(
    settings: TeacherSettings,
    out: Path,
    *,
    minutes: float,
    save_every: float = 150,
    judge_every: float = 600,
    final_clips: int = 200,
) -> Trainer:
    """Train until the run has taken ``minutes``, counting earlier calls with the same folder.

    Args:
        settings: how.
        out: folder for ``state.safetensors``, ``teacher.safetensors`` (the average), ``teacher.json`` (what made it),
            ``judge.safetensors``, ``metrics.jsonl`` and pictures.
        minutes: time of the whole run; the learning rates fall towards its end.
        save_every: seconds between checkpoints.
        judge_every: seconds between looks at samples.
        final_clips: how many clips of 50 steps are judged at the end.
    """
    out.mkdir(parents=True, exist_ok=True)
    trainer, metrics, total = Trainer(settings), out / "metrics.jsonl", minutes * 60
    if (out / STATE).exists():
        trainer.load(out / STATE)
        _forget_after(metrics, trainer.progress.step)
    judge = _judge(out / "judge.safetensors", settings.model.clips)
    before, start = trainer.progress.seconds, time.monotonic()
    mean, saved, judged = 0.0, before, before
    while trainer.progress.seconds < total:
        loss = trainer.update(trainer.progress.seconds / total)
        step, seconds = trainer.progress.step, before + time.monotonic() - start
        trainer.progress.seconds = seconds
        if not loss < 100:
            raise FloatingPointError(f"loss is {loss} at step {step}: the last good state is {out / STATE}")
        mean = loss if mean == 0 else 0.99 * mean + 0.01 * loss
        if step % 100 == 0:
            _log(metrics, step=step, seconds=seconds, loss=mean)
        if seconds - saved > save_every:
            saved = seconds
            trainer.save(out / STATE)
        if seconds - judged > judge_every:
            judged = seconds
            look(trainer, judge, out, clips=100, steps=20)
    trainer.save(out / STATE)
    look(trainer, judge, out, clips=final_clips, steps=50)
    return trainer


def _judge(path: Path, spec: ClipSpec) -> Judge:
    """The run's judge: read, or trained once and written."""
    if not path.exists():
        save_atomically(dict(train_judge(spec).state_dict()), path, {"clips": json.dumps(asdict(spec))})
    return load_judge(path)


def look(trainer: Trainer, judge: Judge, out: Path, *, clips: int, steps: int) -> None:
    """Judge the average's samples, write them as a picture and keep its weights."""
    numbers, made = evaluate(trainer.ema, judge, trainer.settings, clips=clips, steps=steps, cfg_scale=2.5)
    progress = trainer.progress
    _log(out / "metrics.jsonl", step=progress.step, seconds=progress.seconds, **numbers)
    save_picture(made[:40], out / f"samples_{progress.step:06d}.png")
    metadata = {"settings": json.dumps(asdict(trainer.settings)), "progress": json.dumps(asdict(progress))}
    save_teacher(trainer.ema, out / "teacher.safetensors", metadata)
    _describe(trainer.settings, judge, out)


def _describe(settings: TeacherSettings, judge: Judge, out: Path) -> None:
    """Write ``teacher.json``: what made the weights beside it, how well real clips are read, and the curve."""
    clips, labels = real_clips(settings.model.clips, 2000)
    others, _ = real_clips(settings.model.clips, 2000, seed=2)
    seen, seen_labels = sample_clips(
        "teacher", 2000, settings.model.clips, torch.Generator().manual_seed(3), balanced=True
    )
    described = {
        "command": " ".join(["python -m blade_compile.distill.digits_teacher", *sys.argv[1:]]),
        "settings": asdict(settings),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "real_held_out": score(judge, clips, labels, others).as_dict(),
        "real_teacher_split": score(judge, seen, seen_labels, others).as_dict(),
        "curve": [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()],
    }
    beside = out / "teacher.json.part"
    beside.write_text(json.dumps(described, indent=1) + "\n")
    beside.replace(out / "teacher.json")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m blade_compile.distill.digits_teacher", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; an earlier run there is continued")
    parser.add_argument("--minutes", type=float, required=True, help="time of the whole run")
    parser.add_argument("--judge-every", type=float, default=600, help="seconds between looks at samples")
    parser.add_argument("--final-clips", type=int, default=200, help="clips of 50 steps that are judged at the end")
    for cls in (DigitsConfig, TeacherSettings):
        default = cls()
        for one in fields(cls):  # type: ignore[arg-type]
            value = getattr(default, one.name)
            if one.name == "patch":
                parser.add_argument("--patch", type=int, nargs=3, default=list(value), help="frames, rows, columns")
            elif isinstance(value, bool):
                parser.add_argument(
                    f"--{one.name.replace('_', '-')}", action=argparse.BooleanOptionalAction, default=value
                )
            elif one.name != "model":
                parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(value), default=value)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The script. Returns the exit code: 0, or 2 for settings that don't fit."""
    given = vars(_parser().parse_args(arguments))
    try:
        given["patch"] = tuple(given["patch"])
        sizes = {f.name: given[f.name] for f in fields(DigitsConfig)}
        own = {f.name: given[f.name] for f in fields(TeacherSettings) if f.name != "model"}
        settings = TeacherSettings(model=DigitsConfig(**sizes), **own)
        train(
            settings,
            given["out"],
            minutes=given["minutes"],
            judge_every=given["judge_every"],
            final_clips=given["final_clips"],
        )
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
