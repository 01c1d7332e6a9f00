"""What is checked before a training starts, so that a wrong setting costs seconds, not hours."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from blade_compile.distill.adapters import Adapter
from blade_compile.distill.config import RunConfig
from blade_compile.distill.dry_run import check_folder, check_guidance
from blade_compile.distill.embeddings import Embeddings, ParquetEmbeddings, open_embeddings
from blade_compile.distill.encoder import prepare_run
from blade_compile.distill.errors import ConfigError
from blade_compile.distill.grids import Grid
from blade_compile.distill.pipelines import PIPELINES
from blade_compile.distill.ranks import Ranks
from blade_compile.distill.run_folder import check_same
from blade_compile.distill.samplers import student_scheduler
from blade_compile.distill.trackers import check_tracker

Prompts = Embeddings | ParquetEmbeddings


def family_of(adapter: Adapter) -> str | None:
    """The family as ``export`` takes it: None for a model that no pipeline of diffusers knows."""
    return adapter.family if adapter.family in PIPELINES else None


def check_settings(config: RunConfig, adapter: Adapter) -> dict[int, Grid]:
    """Check all that needs neither weights nor prompts.

    Returns:
        The student's steps for each K.

    Raises:
        ConfigError: the folder can't be written; guidance, clip or K don't fit the model; a tracker is not installed;
            no stock scheduler would take the student's steps.
    """
    check_folder(Path(config.folder))
    check_tracker(config)
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
    prompts = open_embeddings(config.embeddings)
    if config.method.cfg_scale != 1:
        adapter.conditions(prompts.negative(), config.latent)
    adapter.conditions(prompts.batch([0]), config.latent)
    return prompts


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
