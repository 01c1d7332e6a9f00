"""Write a student as stock diffusers loads it: weights, its scheduler, ``blade.json`` and a model card.

::

    export/
      pytorch_lora_weights.safetensors                              (LoRA)   or
      transformer/config.json, diffusion_pytorch_model.safetensors  (full weights, or adapters merged into them)
      scheduler/scheduler_config.json   the exact steps and shift of the training
      step_biases.safetensors           (told K) what to put into the weights for each K, by <K>.<name>
      blade.json                        K, guidance, levels, options of backend="blade"
      model_index.json                  (full weights) which classes the two folders hold
      README.md                         model card with the code to load it

The folder is written beside and renamed, so there is never half an export, and none is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from blade_compile.distill.config_sections import SparsityConfig
from blade_compile.distill.errors import ConfigError
from blade_compile.distill.grids import Grid
from blade_compile.distill.model_card import model_card
from blade_compile.distill.pipelines import PipelineFamily, classes, pipeline_family
from blade_compile.distill.samplers import student_scheduler
from blade_compile.distill.schedules import FlowSchedule, Schedule, schedule_of
from blade_compile.distill.sharding import whole

FORMAT = 1
RECORD = "blade.json"
STEP_BIASES = "step_biases.safetensors"
_SHARD = "10GB"
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of torch.compile and activation checkpointing


def _plain_name(name: str) -> str:
    """A parameter's name without what wrappers add."""
    for wrapper in _WRAPPERS:
        name = name.replace("." + wrapper, ".").removeprefix(wrapper)
    return name


def _unwrapped(student: nn.Module) -> nn.Module:
    """The model inside torch.compile, DDP and peft's own wrapper."""
    if isinstance(inner := getattr(student, "_orig_mod", None), nn.Module):
        return _unwrapped(inner)
    if isinstance(student, nn.parallel.DistributedDataParallel):
        return _unwrapped(student.module)
    base_model = getattr(student, "get_base_model", None)
    return base_model() if callable(base_model) else student


def gather(model: nn.Module, replaced: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All persistent tensors on the CPU, whole, under plain names.

    With sharded parameters every rank has to call this.

    Args:
        model: plain, or wrapped in any way.
        replaced: tensors to take instead, such as an average of the weights, by (plain) name.
    """
    found = {_plain_name(name): whole(tensor).cpu() for name, tensor in model.state_dict().items()}
    for name, tensor in (replaced or {}).items():
        plain = _plain_name(name)
        if plain not in found:
            raise ConfigError(f"{name!r} is to be exported, but the model has no such tensor")
        found[plain] = whole(tensor).cpu().to(found[plain].dtype)
    return found


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """Layers that hold adapters, by plain name."""
    if "peft" not in sys.modules:  # then nothing can hold adapters, and importing it takes seconds
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {_plain_name(name): m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def adapter_of(model: nn.Module, wanted: str | None = None) -> str | None:
    """The adapter to export; None where the model has none.

    Raises:
        ConfigError: there are several and none is named, or the named one is not there.
    """
    names = sorted({name for layer in _lora_layers(model).values() for name in layer.lora_A})
    if wanted is not None and wanted not in names:
        raise ConfigError(f"adapter {wanted!r} is not in the model, which has {', '.join(names) or 'none'}")
    if len(names) > 1 and wanted is None:
        raise ConfigError(f"the model has the adapters {', '.join(names)}; say which one is the student")
    return wanted or (names[0] if names else None)


def _factors(layer: Any, name: str, tensors: Mapping[str, Tensor], adapter: str) -> tuple[Tensor, Tensor]:
    """A and B of one layer's adapter.

    Raises:
        ConfigError: it is a variant that A, B and a scale don't describe, or no linear layer's.
    """
    a, b = (tensors.get(f"{name}.{part}.{adapter}.weight") for part in ("lora_A", "lora_B"))
    more = adapter in getattr(layer, "lora_magnitude_vector", ()) or f"{name}.lora_B.{adapter}.bias" in tensors
    if a is None or b is None or a.dim() != 2 or more:
        raise ConfigError(f"the adapter of {name} is no plain LoRA of a linear layer, so it can't be exported")
    return a, b


def merged(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """Weights with an adapter added, W + scale B A, under the names that the model has without adapters.

    The model itself isn't changed. Sums are taken in fp32 at least and rounded once.

    Args:
        model: with adapters on linear layers.
        tensors: from ``gather``.
        adapter: its name; others are left out.
    """
    out = dict(tensors)
    for name, layer in _lora_layers(model).items():
        base = f"{name}.base_layer."
        for key in [k for k in out if k.startswith(f"{name}.")]:
            tensor = out.pop(key)
            if key.startswith(base):
                out[f"{name}.{key.removeprefix(base)}"] = tensor
        if adapter not in layer.lora_A:
            continue
        a, b = _factors(layer, name, tensors, adapter)
        weight = out[f"{name}.weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = layer.scaling[adapter] * (b.to(wide) @ a.to(wide))
        out[f"{name}.weight"] = (weight.to(wide) + delta).to(weight.dtype)
    return out


def lora_tensors(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """An adapter's matrices as diffusers names them, ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``.

    peft's own function drops layers inside wrappers (activation checkpointing, compiled blocks), silently.
    """
    out = {}
    for name, layer in _lora_layers(model).items():
        if adapter in layer.lora_A:
            a, b = _factors(layer, name, tensors, adapter)
            out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = a.contiguous(), b.contiguous()
    return out


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def _jsonable(value: Any) -> Any:
    """A peft configuration in JSON's types."""
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_jsonable(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _save_lora(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str, family: PipelineFamily, to: Path) -> None:
    """``pytorch_lora_weights.safetensors`` with the pipeline's own names, and the adapter's scale in its metadata."""
    pipeline, _ = classes(family)
    settings: Any = model.peft_config  # what peft leaves on the model that it has injected adapters into
    pipeline.save_lora_weights(
        to,
        transformer_lora_layers=lora_tensors(model, tensors, adapter),
        transformer_lora_adapter_metadata=_jsonable(settings[adapter].to_dict()),
    )


def _save_full(model: Any, tensors: Mapping[str, Tensor], class_name: str | None, to: Path) -> None:
    """A diffusers model folder, in shards where it is large, without building the model a second time."""
    from huggingface_hub import split_torch_state_dict_into_shards

    to.mkdir()
    if hasattr(model, "save_config"):
        model.save_config(to)
        path = to / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        if class_name is not None:  # FSDP renames classes
            config["_class_name"] = class_name
        config.pop("_name_or_path", None)  # a folder of the machine that trained
        _write_json(path, config)
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=_SHARD, filename_pattern=pattern)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name].contiguous() for name in names}, to / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(to / "diffusion_pytorch_model.safetensors.index.json", index)


def versions() -> dict[str, str]:
    """Versions of what made the student."""
    found = {}
    for name in ("blade-compile", "torch", "diffusers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _grid_record(grid: Grid) -> dict[str, Any]:
    return {"timesteps": list(grid.times), "sigmas": list(grid.sigmas), "alphas": list(grid.alphas)}


def record_of(
    family: str | None,
    grid: Grid,
    schedule: Schedule,
    config: Mapping[str, Any],
    *,
    weights: str,
    scheduler: str | None = None,
    token_grid: tuple[int, int, int] | None = None,
    other_grids: Mapping[int, Grid] | None = None,
    pipeline: str | None = None,
) -> dict[str, Any]:
    """The content of ``blade.json``."""
    model, method, data = (config.get(section) or {} for section in ("model", "method", "data"))
    options = SparsityConfig.model_validate(config.get("sparsity") or {}).options(token_grid)
    return {
        "format": FORMAT,
        "family": family,
        "base_model": model.get("path"),
        "base_revision": model.get("revision"),
        "base_weights": model.get("weights"),
        "pipeline": pipeline,
        "factory": model.get("factory"),
        "dtype": model.get("dtype"),
        "weights": weights,
        "scheduler": scheduler,
        "steps": grid.steps,
        "cfg_scale": 1.0,
        "embedded_guidance": method.get("embedded_guidance"),
        "teacher_cfg_scale": method.get("cfg_scale"),
        "negative_prompt": data.get("negative_prompt", ""),
        "max_sequence_length": data.get("max_sequence_length"),
        "eta": method.get("eta", 1.0),
        "prediction": schedule.prediction,
        "shift": schedule.shift if isinstance(schedule, FlowSchedule) else None,
        **_grid_record(grid),
        "step_choices": {str(k): _grid_record(g) for k, g in sorted((other_grids or {}).items())},
        "latent": dict(config.get("latent") or {}),
        "options": options,
        "versions": versions(),
    }


def check_target(folder: Path) -> None:
    """Raise ``ConfigError`` where a folder can't become an export: it is a file, or holds files."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is there and is no folder; give another")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} already holds files, and an export is never overwritten; remove it or give another"
        )


def _in_one_piece(folder: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder beside its place and rename it there."""
    beside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        fill(beside)
        beside.replace(folder)  # an empty folder there is replaced, one with files is not
    except OSError as error:
        raise ConfigError(
            f"can't write {folder}: {error.strerror or error}; free space or give another folder"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def export(
    student: nn.Module,
    folder: str | Path,
    *,
    family: str | None,
    grid: Grid,
    config: Mapping[str, Any],
    scheduler_config: Mapping[str, Any] | None = None,
    schedule: Schedule | None = None,
    adapter: str | None = None,
    replaced: Mapping[str, Tensor] | None = None,
    merge: bool = False,
    token_grid: tuple[int, int, int] | None = None,
    other_grids: Mapping[int, Grid] | None = None,
    step_biases: Mapping[str, Tensor] | None = None,
    pipeline: str | None = None,
) -> Path:
    """Export a student.

    With several ranks all have to call this; the first one writes.

    Args:
        student: the trained model, plain or with adapters, wrapped in torch.compile, DDP, FSDP or not.
        folder: of the export; must not hold anything yet.
        family: one of ``pipelines.PIPELINES``; None for a model of one's own, whose weights alone are written.
        grid: the steps that it was trained on.
        config: of the run (``RunConfig.model_dump()``): model, data, method, latent and sparsity are read.
        scheduler_config: of the base model; None: only with ``schedule``, and not for VP models of a family.
        schedule: of the model, where it is not the configuration's own (a shift fixed at one resolution).
        adapter: the student's, where the model has several.
        replaced: tensors to write instead of the model's, such as the average of its weights.
        merge: add the adapter to the weights also where the pipeline could load it by itself.
        token_grid: (T, H, W) to write into the options of backend="blade".
        other_grids: of a student that is told K: the steps for other K.
        step_biases: of the same: what to put into the weights for each K, by ``<K>.<name>``.
        pipeline: the class that the base's ``model_index.json`` names, for families that have several.

    Returns:
        The folder.

    Raises:
        ConfigError: it holds files, can't be written, or no stock scheduler takes the steps.
    """
    target = Path(folder)
    check_target(target)
    known = None if family is None else pipeline_family(family, pipeline)
    if schedule is None:
        if scheduler_config is None:
            raise ConfigError("neither a schedule nor the base's scheduler_config.json is given; give one")
        schedule = schedule_of(scheduler_config)
    eta = float((config.get("method") or {}).get("eta", 1.0))
    scheduler = None if known is None else student_scheduler(family, grid, schedule, scheduler_config, eta)
    model = _unwrapped(student)
    name = adapter_of(model, adapter)
    tensors = gather(model, replaced)
    as_lora = name is not None and known is not None and known.loads_lora and not merge
    weights = "lora" if as_lora else "merged" if name is not None else "full"
    record = record_of(
        family,
        grid,
        schedule,
        config,
        weights=weights,
        scheduler=scheduler and type(scheduler).__name__,
        token_grid=token_grid,
        other_grids=other_grids,
        pipeline=None if known is None else known.pipeline,
    )

    def fill(beside: Path) -> None:
        if as_lora and known is not None and name is not None:
            _save_lora(model, tensors, name, known, beside)
        else:
            whole = tensors if name is None else merged(model, tensors, name)
            _save_full(model, whole, None if known is None else known.transformer, beside / "transformer")
        if scheduler is not None:
            scheduler.save_pretrained(beside / "scheduler")
        if step_biases:
            save_file({name: tensor.cpu().contiguous() for name, tensor in step_biases.items()}, beside / STEP_BIASES)
        if known is not None and not as_lora:
            parts = {"transformer": known.transformer, "scheduler": type(scheduler).__name__}
            index = {part: ["diffusers", part_class] for part, part_class in parts.items()}
            _write_json(beside / "model_index.json", {"_class_name": known.pipeline, **index})
        _write_json(beside / RECORD, record)
        (beside / "README.md").write_text(model_card(record, known), encoding="utf-8")

    if not dist.is_initialized() or dist.get_rank() == 0:
        _in_one_piece(target, fill)
    return target


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read ``blade.json`` of an export.

    Raises:
        ConfigError: there is none, or it isn't one that this version reads.
    """
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {RECORD}: it is no export of blade-distill; give its folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ConfigError(f"{path} has the format {found!r}; this version reads {FORMAT}")
    return record


def fingerprint(folder: str | Path) -> str:
    """A short name for what an export holds: changes with its record and whenever its weights are written anew."""
    root = Path(folder)
    digest = hashlib.sha256((root / RECORD).read_bytes())
    for path in sorted(root.rglob("*.safetensors")):
        state = path.stat()
        digest.update(f"{path.relative_to(root)} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]
