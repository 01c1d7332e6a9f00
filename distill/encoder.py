"""The text encoder of a model folder: its pipeline without transformer and VAE, and a fingerprint of what it makes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blade_compile.distill.adapters import Adapter, load_adapter
from blade_compile.distill.config import RunConfig
from blade_compile.distill.embeddings import Encoder, is_parquet, prepare
from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.model_files import ModelFiles
from blade_compile.distill.prompts import read_prompts

_LEFT_OUT = ("transformer", "transformer_2", "vae", "image_encoder")


def text_pipeline(config: RunConfig) -> Any:
    """The pipeline with its text encoders alone. Raises ``ConfigError`` where the folder can't be loaded."""
    import diffusers

    files = ModelFiles(str(config.model.path), config.model.revision)
    index = files.json("model_index.json")
    kind = getattr(diffusers, str(index.get("_class_name")), None) or diffusers.DiffusionPipeline
    without: dict[str, Any] = {name: None for name in _LEFT_OUT if name in index}
    try:
        pipeline = kind.from_pretrained(
            files.location,
            revision=config.model.revision,
            torch_dtype=getattr(torch, config.model.dtype),
            trust_remote_code=config.model.trust_code,
            **without,
        )
    except (OSError, ValueError, TypeError, ImportError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{config.model.path}: the text encoder can't be loaded: {said}") from None
    return pipeline.to("cuda") if torch.cuda.is_available() else pipeline


def fingerprint(config: RunConfig, family: str) -> str:
    """What the embeddings depend on: model, its encoders' files, length of text, dtype.

    Weights count by name and size, not content: hashing tens of gigabytes would take longer than encoding.
    """
    said: dict[str, Any] = {
        "family": family,
        "length": config.data.max_sequence_length,
        "dtype": config.model.dtype,
        "factory": config.model.factory,
    }
    if family == "pixart":
        said["clean_caption"] = True  # earlier versions encoded captions as they were
    root = Path(str(config.model.path)).expanduser()
    if config.model.path is not None and root.is_dir():
        files = [p for p in sorted(root.glob("t*/**/*")) if p.is_file() and p.parts[len(root.parts)] != "transformer"]
        said["files"] = [(str(p.relative_to(root)), p.stat().st_size, _content(p)) for p in files]
    else:
        said["model"] = [config.model.path, config.model.revision]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _content(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.suffix in {".json", ".txt"} else None


def prepare_run(
    config: RunConfig,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Embed the prompts of a run. Returns how many were embedded now; see ``embeddings.prepare``.

    Of ready embeddings in FastVideo's Parquet, which lack it, the negative prompt alone.
    """
    if _lacks_negative(config):
        return prepare_negative(config, rank, world, progress)
    adapter = load_adapter(config.model)
    texts = run_prompts(config, adapter)
    if config.data.prompts is None and config.data.embeddings and not Path(config.embeddings).is_dir():
        raise DataError(f"data.embeddings: {config.embeddings} does not exist, and there is no data.prompts to make it")
    return prepare(
        config.embeddings,
        texts,
        config.data.negative_prompt,
        run_encoder(config, adapter),
        fingerprint(config, adapter.family),
        shard_size=config.data.shard_size,
        batch=config.data.encode_batch,
        rank=rank,
        world=world,
        progress=progress,
    )


def _lacks_negative(config: RunConfig) -> bool:
    """Whether the run's embeddings are ready ones in FastVideo's Parquet."""
    return config.data.prompts is None and config.data.embeddings is not None and is_parquet(config.data.embeddings)


def prepared_folder(config: RunConfig) -> str:
    """Where ``prepare_run`` writes: beside FastVideo's Parquet the run's own folder."""
    return f"{config.folder}/embeddings" if _lacks_negative(config) else config.embeddings


def prepare_negative(
    config: RunConfig,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Embed the negative prompt of a run alone. Returns 1, or 0 where it is there already or is another rank's.

    Raises:
        ConfigError: the model has no text encoder, or the folder holds embeddings of another one.
    """
    adapter = load_adapter(config.model)
    text = config.data.negative_prompt
    try:
        return prepare(
            prepared_folder(config),
            [text],
            text,
            run_encoder(config, adapter),
            fingerprint(config, adapter.family),
            rank=rank,
            world=world,
            progress=progress,
        )
    except ConfigError as error:
        raise ConfigError(
            "data.embeddings is FastVideo's Parquet, which has no negative prompt, and data.negative_prompt can't be "
            f"encoded for it: {error}; or set method.cfg_scale=1"
        ) from None


def run_prompts(config: RunConfig, adapter: Adapter) -> list[str]:
    """The texts to embed: of the file, or those that a factory's adapter brings with it."""
    if config.data.prompts is not None:
        return [prompt.text for prompt in read_prompts(config.data.prompts, config.data.columns)]
    own: tuple[str, ...] = getattr(adapter, "default_prompts", ())
    if not own:
        raise ConfigError("data.prompts: missing; `prepare` needs a file of prompts")
    return list(own)


def run_encoder(config: RunConfig, adapter: Adapter) -> Encoder:
    """From prompts to tensors; the pipeline is loaded when the first prompt needs it."""
    loaded: list[Any] = []

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        if not loaded:
            loaded.append(text_pipeline(config) if config.model.path is not None else None)
        return adapter.encode(loaded[0], prompts, config.data.max_sequence_length)

    return encode
