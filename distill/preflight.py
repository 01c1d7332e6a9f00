"""What is checked before a training starts, so that a wrong setting costs seconds, not hours."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from blade_compile.distill.adapters import Adapter
from blade_compile.distill.config import RunConfig
from blade_compile.distill.config_sections import LoopConfig
from blade_compile.distill.embeddings import Embeddings, ParquetEmbeddings, is_parquet
from blade_compile.distill.encoder import fingerprint, prepare_negative, prepare_run, prepared_folder
from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.grids import Grid
from blade_compile.distill.pipelines import PIPELINES
from blade_compile.distill.ranks import Ranks
from blade_compile.distill.run_folder import check_same
from blade_compile.distill.samplers import student_scheduler
from blade_compile.distill.trackers import check_tracker

Prompts = Embeddings | ParquetEmbeddings

_BY_LAYER = ("include", "exclude", "calibration")
_OURS = re.compile("[0-9a-f]{64}")
"""What ``encoder.fingerprint`` gives; embeddings made elsewhere name their encoder as they like"""


def family_of(adapter: Adapter) -> str | None:
    """The family as ``export`` takes it: None for a model that no pipeline of diffusers knows."""
    return adapter.family if adapter.family in PIPELINES else None


def check_settings(config: RunConfig, adapter: Adapter, world: int = 1) -> dict[int, Grid]:
    """Check all that needs neither weights nor prompts.

    Args:
        config: of the run.
        adapter: of the model.
        world: number of ranks.

    Returns:
        The student's steps for each K.

    Raises:
        ConfigError: float16 is asked for; the folder can't be written; guidance, clip or K don't fit the model; a
            tracker is not installed; the backend's options tell layers apart where blocks run one by one; no stock
            scheduler would take the student's steps.
    """
    check_precision(config)
    check_folder(Path(config.folder))
    check_tracker(config)
    parallel = config.parallel
    one_by_one = (world > 1 and parallel.fsdp) or parallel.activation_checkpointing
    tells_layers_apart(config, one_by_one and bool(adapter.block_lists))
    check_guidance(config, adapter)
    adapter.latent_shape(config.latent, config.loop.batch_size)
    adapter.token_grid(config.latent)
    grids = {k: adapter.grid(config.latent, k) for k in config.method.all_steps}
    family = family_of(adapter)
    if family is not None:
        schedule, base = adapter.schedule(config.latent), adapter.scheduler_config(config.latent)
        for grid in grids.values():
            student_scheduler(family, grid, schedule, base, config.method.eta)
    return grids


def open_prompts(
    config: RunConfig, adapter: Adapter, ranks: Ranks, progress: Callable[[int, int], None] = lambda done, total: None
) -> Prompts:
    """The embeddings of the run, made now where they aren't there yet.

    Raises:
        ConfigError: there are neither prompts nor embeddings, or the embeddings are of another encoder.
        DataError: prompts or embeddings are missing, malformed or damaged; the teacher is guided and there is no
            negative prompt.
    """
    if config.data.prompts is not None or config.data.embeddings is None:
        prepare_run(config, ranks.rank, ranks.world, progress)
        ranks.wait()
    prompts = _embeddings(config, adapter, ranks)
    if config.data.prompts is None and config.model.path is not None and isinstance(prompts, Embeddings):
        _check_encoder(config, adapter, prompts.encoder)
    if config.method.cfg_scale != 1:
        _check_fit(config, adapter, prompts.negative())
    _check_fit(config, adapter, prompts.batch([0]))
    return prompts


def _check_encoder(config: RunConfig, adapter: Adapter, encoder: str) -> None:
    """Raise ``ConfigError`` where ready embeddings are of another encoder than the model's."""
    if _OURS.fullmatch(encoder) and encoder != fingerprint(config, adapter.family):
        raise ConfigError(
            f"data.embeddings: {config.embeddings} was made by another text encoder, or with another model.path, "
            "model.revision, model.dtype or data.max_sequence_length; set back what differs, or give data.prompts and "
            "another folder, and run `blade-distill prepare`"
        )


def _embeddings(config: RunConfig, adapter: Adapter, ranks: Ranks) -> Prompts:
    """Those of the run; FastVideo's, which have no negative prompt, with the one that is encoded here."""
    if not is_parquet(config.embeddings):
        return Embeddings(config.embeddings)
    length, negative = config.data.max_sequence_length or _text_length(adapter), None
    if config.method.cfg_scale != 1:
        prepare_negative(config, ranks.rank, ranks.world)
        ranks.wait()
        negative = {name: tensor[0] for name, tensor in Embeddings(prepared_folder(config)).negative().items()}
    return ParquetEmbeddings(config.embeddings, length=length, negative=negative)


def _text_length(adapter: Adapter) -> int:
    """Tokens of text that the model takes by default."""
    example = _example(adapter).get("prompt_embeds")
    return 512 if example is None else example.shape[1]


def _example(adapter: Adapter) -> dict[str, Tensor]:
    """One prompt's embeddings, on the meta device; nothing where a factory's adapter doesn't say."""
    try:
        with torch.device("meta"):
            return adapter.example_embeddings(1, torch.float32)
    except (AttributeError, NotImplementedError):
        return {}


def _check_fit(config: RunConfig, adapter: Adapter, found: Mapping[str, Tensor]) -> None:
    """Raise ``DataError`` where embeddings lack a tensor that the model takes, or have another width than its text."""
    try:
        adapter.conditions(found, config.latent)
    except KeyError as missing:
        raise DataError(
            f"{config.embeddings} has no {missing.args[0]}, which {adapter.family} models take; it has "
            f"{', '.join(found)}; give data.prompts and run `blade-distill prepare`"
        ) from missing
    for name, tensor in _example(adapter).items():
        if name.endswith("embeds") and name in found and found[name].shape[-1] != tensor.shape[-1]:
            raise DataError(
                f"{config.embeddings}: {name} is {found[name].shape[-1]} wide and the model takes "
                f"{tensor.shape[-1]}: it was made for another; run `blade-distill prepare` into another folder"
            )


def prompts_fingerprint(prompts: Prompts) -> str:
    """Which prompts these are, in which order, by which encoder."""
    digest = hashlib.sha256(str(getattr(prompts, "encoder", "")).encode())
    for i in range(len(prompts)):
        digest.update(prompts.text(i).encode() + b"\0")
    return digest.hexdigest()


def check_resumed(record: Mapping[str, Any], config: RunConfig, path: Path, samples: int) -> None:
    """Refuse a checkpoint from which this run would not go on as if it had never stopped.

    Args:
        record: of the checkpoint.
        config: of this run.
        path: of the checkpoint.
        samples: of an update, on all ranks together.

    Raises:
        ConfigError: the configuration differs, an update has another number of samples, or the end is already passed.
    """
    check_same(record["config"], config, path)
    if record["samples"] != samples:
        raise ConfigError(
            f"{path} was made with {record['samples']} samples per update (ranks x loop.batch_size x "
            f"loop.grad_accumulation), this run has {samples}; change them so that their product is "
            f"{record['samples']}"
        )
    if record["step"] > config.loop.max_steps:
        raise ConfigError(
            f"{path} is past loop.max_steps, which is {config.loop.max_steps}; set it to {record['step']} or more"
        )


def check_precision(config: RunConfig) -> None:
    """Raise ``ConfigError`` for float16, which needs loss scaling, which there is none of."""
    for name, value in (("mixed_precision", config.parallel.mixed_precision), ("dtype", config.model.dtype)):
        if value == "float16":
            section = "model" if name == "dtype" else "parallel"
            raise ConfigError(f"{section}.{name} is float16, in which gradients of these losses vanish; use bfloat16")


def tells_layers_apart(config: RunConfig, block_by_block: bool) -> bool:
    """Whether the backend's options name layers, which blocks that share one compiled graph have no names for.

    Raises:
        ConfigError: they do, and the blocks have to run one by one.
    """
    named = [name for name in _BY_LAYER if name in config.sparsity.blade_options]
    if named and block_by_block:
        raise ConfigError(
            f"sparsity.blade_options has {', '.join(named)}, which tells layers apart, but with parallel.fsdp or "
            "parallel.activation_checkpointing all blocks share one compiled graph; leave it out or set both false"
        )
    return bool(named)


def check_folder(folder: Path) -> None:
    """Raise ``ConfigError`` where the run's folder can't be written."""
    here = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as error:
        raise ConfigError(f"output_dir: {here} can't be written ({error.strerror}); choose another") from None


def check_space(checkpoints: Path, tensors: Mapping[str, Tensor], loop: LoopConfig) -> None:
    """Raise ``DataError`` where the disk is too small for the checkpoints of a run.

    Args:
        checkpoints: their folder; what is there already is removed in the course of the run.
        tensors: what one holds; sharded ones count as a whole.
        loop: how many are written and kept. The next one is written before the oldest is removed.
    """
    count = min(loop.keep_last + 1, math.ceil(loop.max_steps / loop.checkpoint_every))
    each = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    free = shutil.disk_usage(_existing(checkpoints)).free
    free += sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file())
    if count * each > free:
        raise DataError(
            f"{checkpoints}: {count} checkpoints of {each / 2**30:.3g} GiB are at times there at once and "
            f"{free / 2**30:.3g} GiB are free; free space, lower loop.keep_last, or choose another output_dir"
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def check_guidance(config: RunConfig, adapter: Adapter) -> None:
    """Raise ``ConfigError`` where guidance is set that the model doesn't take."""
    takes = getattr(adapter, "embedded_guidance", False)
    if config.method.embedded_guidance is not None and not takes:
        raise ConfigError(
            f"method.embedded_guidance is {config.method.embedded_guidance:g}, but this {adapter.family} model takes "
            "none as an input; set it to null and use method.cfg_scale"
        )
    if takes and config.method.cfg_scale != 1:
        raise ConfigError(
            f"method.cfg_scale is {config.method.cfg_scale:g}, but this {adapter.family} model is guidance-distilled: "
            "set it to 1 and give the scale as method.embedded_guidance"
        )


def load_weights(model: nn.Module, path: str | None) -> None:
    """Replace a model's weights by those of a safetensors file, in place; None: leave them.

    Raises:
        ConfigError: the file is missing or damaged, or holds other tensors than the model.
    """
    if path is None:
        return
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.weights: {path} can't be read: {error}") from None
    except RuntimeError as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"model.weights: {path} doesn't fit the model: {said}") from None
