"""Sample from an export with the exact steps of the training, dense or sparse: clips as mp4 or GIF, images as PNG."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from blade_compile.distill import clips
from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.export import STEP_BIASES, fingerprint, read_record
from blade_compile.distill.grids import Grid
from blade_compile.distill.pipelines import PipelineFamily, call_arguments, classes, load_scheduler, pipeline_family
from blade_compile.distill.preflight import load_weights
from blade_compile.distill.prompts import Prompt
from blade_compile.distill.samplers import student_scheduler
from blade_compile.distill.schedules import FlowSchedule, schedule_of
from blade_compile.generations import generation

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_WEIGHTS = {"lora": "pytorch_lora_weights.safetensors", "full": "transformer", "merged": "transformer"}


@dataclass(frozen=True)
class Sample:
    """What one call of a pipeline made."""

    frames: Tensor
    "uint8 ``[T, H, W, C]``; T is 1 for an image"
    latents: Tensor
    "of the last step, before the VAE, fp32, without the batch dimension"
    seconds: float
    "of the whole call"


@dataclass
class LoadedModel:
    """A pipeline that is ready to sample, and how it has to be called."""

    pipe: Any
    family: PipelineFamily
    steps: int
    cfg_scale: float = 1.0
    embedded_guidance: float | None = None
    negative_prompt: str = ""
    max_sequence_length: int | None = None
    size: Mapping[str, int] = field(default_factory=dict)
    sparse: bool = False
    identity: str = ""
    "of the weights and of how they run, so that samples of two models never mix in a folder"

    def __call__(self, prompt: str, seed: int, size: Mapping[str, int] | None = None) -> Sample:
        """Draw one sample.

        Args:
            prompt: text, or the class of a DiT.
            seed: of the noise; the same for every model, step count and sparsity.
            size: height, width, num_frames that differ from those of the training.

        Raises:
            DataError: the pipeline can't make this size.
        """
        arguments = call_arguments(
            self.family,
            self.pipe,
            prompt,
            steps=self.steps,
            cfg_scale=self.cfg_scale,
            seed=seed,
            size={**self.size, **(size or {})},
            embedded_guidance=self.embedded_guidance,
            negative_prompt=self.negative_prompt,
            max_sequence_length=self.max_sequence_length,
        )
        kept = _LastStep(self.pipe.scheduler, arguments["generator"])
        start = time.perf_counter()
        with kept, torch.no_grad(), generation(self.steps) if self.sparse else nullcontext():
            try:
                out = self.pipe(**arguments)
            except ValueError as error:
                if not size:
                    raise
                raise DataError(f"prompt {prompt!r} at {dict(size)}: {error}; change or remove its size") from error
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        made = out.frames[0] if self.family.video else out.images
        return Sample(clips.to_bytes(torch.as_tensor(made)), kept.latents, seconds)

    def unfit(self, prompt: Prompt) -> str | None:
        """What a prompt's file asks of its size that this model can't do; None: nothing."""
        asked = {name: wanted for name, wanted in _size_of(prompt).items() if wanted != self.size.get(name)}
        one_size = not self.family.pipeline or self.family.name == "dit"
        for name, wanted in asked.items():
            if one_size or (name == "num_frames" and not self.family.video):
                return f"{name} is {wanted}; this model makes {self.size.get(name, 1)}"
        return None


def _size_of(prompt: Prompt) -> dict[str, int]:
    """Height, width, num_frames that a prompt's file names."""
    named = {"height": prompt.height, "width": prompt.width, "num_frames": prompt.num_frames}
    return {name: value for name, value in named.items() if value is not None}


class _LastStep:
    """Keeps the latents that a scheduler's last step returned: every pipeline has a scheduler, few have callbacks.

    A scheduler that adds noise draws it from the sample's own generator, which most pipelines don't hand on.
    """

    def __init__(self, scheduler: Any, generator: torch.Generator) -> None:
        self.scheduler, self.generator = scheduler, generator
        self._latents: Tensor | None = None

    def __enter__(self) -> None:
        step = self.scheduler.step
        seeded = {"generator": self.generator} if "generator" in inspect.signature(step).parameters else {}

        def noted(*args: Any, **given: Any) -> Any:
            given = {**seeded, **given}
            out = step(*args, **given)
            self._latents = out[0] if isinstance(out, tuple) else out.prev_sample
            return out

        self.scheduler.step = noted

    def __exit__(self, *_: object) -> None:
        del self.scheduler.step  # the class's own again

    @property
    def latents(self) -> Tensor:
        if self._latents is None:
            raise ConfigError("the pipeline made no step; num_inference_steps has to be 1 or more")
        return self._latents[0].detach().float().cpu()


def _base_of(record: Mapping[str, Any], base: str | None) -> str:
    found = base or record.get("base_model")
    if not found:
        raise ConfigError("the export names no base model; give the folder or hub id of the one it was distilled from")
    return str(found)


def _revision_of(record: Mapping[str, Any], base: str | None) -> str | None:
    """Of the base model on the hub, where it is the one that the export names."""
    return None if base else record.get("base_revision")


def _load_pipeline(cls: Any, base: str, **given: Any) -> Any:
    try:
        return cls.from_pretrained(base, **given)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"can't load {base!r} as a {cls.__name__}: {first}; give its folder or hub id") from error


def _device(wanted: str | None) -> str:
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def _check_weights(folder: Path, record: Mapping[str, Any]) -> None:
    wanted = _WEIGHTS.get(str(record.get("weights")))
    if wanted is None or not (folder / wanted).exists():
        raise ConfigError(f"{folder} lacks {wanted or 'its weights'}; export the student again")


def _grid_for(record: Mapping[str, Any], steps: int | None) -> Grid:
    """The exported steps, or those of another K which the student was trained for."""
    if steps is None or steps == record["steps"]:
        entry: Mapping[str, Any] = record
    elif str(steps) in (choices := record.get("step_choices") or {}):
        entry = choices[str(steps)]
    else:
        known = sorted({record["steps"], *map(int, choices)})
        raise ConfigError(
            f"steps is {steps}: the student was trained for {', '.join(map(str, known))}; use one of them"
        )
    end = 0.0 if record["shift"] is not None else -1.0  # a clean sample's time, of flow matching and of VP schedules
    return Grid(tuple(entry["timesteps"]), tuple(entry["alphas"]), tuple(entry["sigmas"]), end)


def _scheduler_for(folder: Path, record: Mapping[str, Any], steps: int | None) -> Any:
    """The exported scheduler, or that of another K which the student was trained for."""
    grid, exported = _grid_for(record, steps), load_scheduler(folder / "scheduler")
    if grid.steps == record["steps"]:
        return exported
    config = {**exported.config, "_class_name": type(exported).__name__}
    horizon = float(config.get("num_train_timesteps", 1000))
    schedule = FlowSchedule(record["shift"], horizon) if record["shift"] is not None else schedule_of(config)
    return student_scheduler(record["family"], grid, schedule, config, record["eta"])


def _biases_for(folder: Path, record: Mapping[str, Any], steps: int | None) -> dict[str, Tensor]:
    """What tells a student which is told K that it is another one than the exported weights'."""
    file = folder / STEP_BIASES
    if steps is None or steps == record["steps"] or not file.is_file():
        return {}
    return {name.partition(".")[2]: tensor for name, tensor in load_file(file).items() if name.startswith(f"{steps}.")}


def load_student(
    folder: str | Path,
    *,
    base: str | None = None,
    sparse: bool = True,
    compiled: bool = True,
    steps: int | None = None,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
    trust_code: bool = False,
) -> LoadedModel:
    """Load an export into its stock pipeline, or, where diffusers has none, into its factory's model.

    Args:
        folder: of the export.
        base: folder or hub id of the base model; None: the one that the export names.
        sparse: compile the transformer with backend="blade" and the options of the training; False: dense.
        compiled: where dense: compile with Inductor, so that times compare; False: eager.
        steps: K, of a student that was trained for several.
        device: ``cuda``, ``cpu``, ..; None: cuda where there is one.
        options: of backend="blade", in addition to or instead of the exported ones.
        trust_code: run the factory that the export names, if it names one.

    Raises:
        ConfigError: the folder is no export, or the base model can't be loaded.
    """
    path, record = Path(folder), read_record(folder)
    _check_weights(path, record)
    asked, how = {**record["options"], **(options or {})}, "sparse" if sparse else "dense"
    identity = f"student {fingerprint(path)}, {steps or record['steps']} steps, {how}"
    identity += f", {dict(options)}" if sparse and options else ""
    if record["family"] is None:
        from blade_compile.distill import factory_student

        return factory_student.load(
            path, record, grid=_grid_for(record, steps), sparse=sparse, compiled=compiled, device=_device(device),
            options=asked, identity=identity, trust_code=trust_code, biases=_biases_for(path, record, steps),
        )  # fmt: skip
    family = pipeline_family(record["family"], record.get("pipeline"))
    scheduler = _scheduler_for(path, record, steps)
    pipeline, transformer = classes(family)
    dtype = _DTYPES[record.get("dtype") or "bfloat16"]
    source, given = _base_of(record, base), {"revision": _revision_of(record, base), "torch_dtype": dtype}
    if record["weights"] == "lora":
        pipe = _load_pipeline(pipeline, source, **given)
        pipe.load_lora_weights(path)
    else:
        model = transformer.from_pretrained(path, subfolder="transformer", torch_dtype=dtype)
        pipe = _load_pipeline(pipeline, source, transformer=model, **given)
    pipe.scheduler = scheduler
    pipe.to(_device(device))
    pipe.set_progress_bar_config(disable=True)
    if biases := _biases_for(path, record, steps):
        pipe.transformer.load_state_dict({**pipe.transformer.state_dict(), **biases})
    if sparse:
        pipe.transformer.compile(backend="blade", options=asked)
    elif compiled:
        pipe.transformer.compile()
    return LoadedModel(
        pipe,
        family,
        steps or int(record["steps"]),
        float(record["cfg_scale"]),
        record.get("embedded_guidance"),
        max_sequence_length=record.get("max_sequence_length"),
        size=_size(record),
        sparse=sparse,
        identity=identity,
    )


def load_teacher(
    folder: str | Path,
    *,
    base: str | None = None,
    steps: int = 50,
    cfg_scale: float | None = None,
    negative_prompt: str | None = None,
    compiled: bool = True,
    device: str | None = None,
    trust_code: bool = False,
) -> LoadedModel:
    """The model that an export was distilled from: dense, with its own scheduler and guidance.

    Args:
        folder: of the export, which names the base model, its weights, the size and the guidance.
        base: folder or hub id of the whole teacher instead of the one named, whose weights then are its own.
        steps: of the teacher's scheduler.
        cfg_scale: None: as in the training.
        negative_prompt: the unconditional input; None: as in the training.
        compiled: compile the transformer with Inductor.
        device: None: cuda where there is one.
        trust_code: run the factory that the export names, if it names one.

    Raises:
        ConfigError: the folder is no export, or the teacher can't be loaded.
    """
    record = read_record(folder)
    scale = record.get("teacher_cfg_scale") if cfg_scale is None else cfg_scale
    guidance = 1.0 if scale is None else float(scale)
    without = (record.get("negative_prompt") or "") if negative_prompt is None else negative_prompt
    if record["family"] is None:
        from blade_compile.distill import factory_student

        return factory_student.load_teacher(
            Path(folder), record, steps=steps, cfg_scale=guidance, negative_prompt=without, compiled=compiled,
            device=_device(device), trust_code=trust_code,
        )  # fmt: skip
    family = pipeline_family(record["family"], record.get("pipeline"))
    dtype = _DTYPES[record.get("dtype") or "bfloat16"]
    source = _base_of(record, base)
    pipe = _load_pipeline(classes(family)[0], source, revision=_revision_of(record, base), torch_dtype=dtype)
    try:
        load_weights(pipe.transformer, None if base else record.get("base_weights"))
    except ConfigError as error:
        raise ConfigError(f"{error}; or name the whole teacher by --base") from None
    pipe.to(_device(device))
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.transformer.compile()
    return LoadedModel(
        pipe,
        family,
        steps,
        guidance,
        record.get("embedded_guidance"),
        without,
        record.get("max_sequence_length"),
        _size(record),
        identity=f"teacher {source}, {steps} steps, guidance {scale}",
    )


def _size(record: Mapping[str, Any]) -> dict[str, int]:
    latent = record.get("latent") or {}
    missing = [key for key in ("height", "width", "num_frames") if key not in latent]
    if missing:
        raise ConfigError(f"blade.json lacks latent.{missing[0]}; export the student again")
    return {key: int(latent[key]) for key in ("height", "width", "num_frames")}


@dataclass(frozen=True)
class Written:
    """One sample on disk."""

    file: str
    prompt: str
    seed: int
    seconds: float
    model: str
    "``LoadedModel.identity``"


def _old_entries(manifest: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        return {entry["file"]: asdict(Written(**entry)) for entry in found}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"can't read {manifest}: {error}; remove it to start again") from error


def generate(
    model: LoadedModel,
    prompts: Sequence[str | Prompt],
    out: str | Path,
    *,
    seeds: Iterable[int] = (0,),
    suffix: str | None = None,
    fps: int | None = None,
) -> list[Written]:
    """Write ``<prompt-slug>-<seed>.<suffix>`` for every prompt and seed, and ``prompts.json``. What is there is kept.

    Args:
        model: from ``load_student`` or ``load_teacher``.
        prompts: texts, or classes of a DiT; those of a file with their own seed and size. A size other than the
            training's stands in the file's name, as ``<prompt-slug>-480x832x81-<seed>``.
        out: folder for the files.
        seeds: each prompt is drawn once with each. One with a seed of its own starts there and counts on alike.
        suffix: ``.mp4``, ``.gif`` or ``.png``; None: the best that can be written.
        fps: of clips; None: the family's.

    Returns:
        What is in the folder now, in the order of prompts and seeds.

    Raises:
        DataError: no prompts, a size that the model can't make, the folder can't be written, or a file in it is
            another model's.
    """
    if not prompts:
        raise DataError("there are no prompts to sample; give one or more")
    wanted = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    for one in wanted:  # before anything is sampled
        if (why := model.unfit(one)) is not None:
            raise DataError(f"prompt {one.text!r}: {why}; remove it from the file")
    target, ending = Path(out), clips.suffix_for(model.family.video, suffix)
    manifest = target / "prompts.json"
    try:
        target.mkdir(parents=True, exist_ok=True)  # fail before anything is sampled
    except OSError as error:
        raise DataError(f"can't write {target}: {error.strerror or error}; give another folder") from error
    known, done = _old_entries(manifest), []
    chosen = list(seeds)
    for one, slug in zip(wanted, _unique_slugs([one.text for one in wanted])):
        prompt, size = one.text, _size_of(one)
        other = any(value != model.size.get(key) for key, value in size.items())
        name = f"{slug}-{'x'.join(map(str, {**model.size, **size}.values()))}" if other else slug
        for seed in chosen if one.seed is None else [one.seed + seed - chosen[0] for seed in chosen]:
            file = f"{name}-{seed}{ending}"
            before = known.get(file)
            if before is not None and (target / file).is_file():
                if (before["prompt"], before["model"]) != (prompt, model.identity):
                    raise DataError(f"{target / file} is of {before['model']!r}; give another folder or remove it")
                done.append(Written(**before))
                continue
            sample = model(prompt, seed, size or None)
            clips.write(sample.frames, target / file, fps or model.family.fps or 8)
            done.append(Written(file, prompt, seed, round(sample.seconds, 3), model.identity))
            known[file] = asdict(done[-1])
            _write_manifest(manifest, list(known.values()))
    return done


def generate_from_export(
    export: str | Path,
    prompts: Sequence[str | Prompt],
    out: str | Path,
    *,
    base: str | None = None,
    seeds: Iterable[int] = (0,),
    sparse: bool = True,
    device: str | None = None,
    trust_code: bool = False,
) -> list[Path]:
    """Load an export and sample from it: what ``blade-distill generate`` does.

    Returns:
        The files.
    """
    if not prompts:
        raise DataError("there are no prompts to sample; give one or more")
    model = load_student(export, base=base, sparse=sparse, compiled=False, device=device, trust_code=trust_code)
    return [Path(out) / made.file for made in generate(model, prompts, out, seeds=seeds)]


def _unique_slugs(prompts: Sequence[str]) -> list[str]:
    """Slugs, with a number where two different prompts would have the same."""
    names: dict[str, str] = {}
    for prompt in prompts:
        if prompt in names:
            continue
        name, count = clips.slug(prompt), 1
        while name in names.values():
            count += 1
            name = f"{clips.slug(prompt)}-v{count}"
        names[prompt] = name
    return [names[prompt] for prompt in prompts]


def _write_manifest(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    beside = path.with_name(f".{path.name}")
    try:
        beside.write_text(json.dumps(list(entries), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise DataError(f"can't write {path}: {error.strerror or error}") from error
