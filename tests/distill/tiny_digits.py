"""A digits transformer of 64 tokens with random weights, as ``model.factory``, and runs of the trainer with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch
from torch._inductor import config as inductor

from blade_compile.distill.adapter_digits import DigitsAdapter
from blade_compile.distill.config import RunConfig, resolve
from blade_compile.distill.digits_model import DigitsConfig, DigitsTransformer

ROOT = Path(__file__).resolve().parents[2]
SIZES = DigitsConfig(frames=4, size=16, patch=(2, 4, 2), width=32, depth=2, heads=2)
FACTORY = "tests.distill.tiny_digits:build"


def build() -> tuple[nn.Module, DigitsAdapter]:
    """The model, always the same, and its adapter."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(3)
        model = DigitsTransformer(SIZES)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, DigitsAdapter(SIZES)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of a few steps, as nested sections; ``changes`` by dotted name with ``__`` for the dot."""
    given: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder),
        "model": {"factory": FACTORY, "trust_code": True, "dtype": "float32"},
        "latent": {"num_frames": SIZES.frames, "height": SIZES.size, "width": SIZES.size},
        "method": {"steps": 2, "cfg_scale": 2.0, "importance_weight": False},
        "sparsity": {"sparsity": 0.5, "block_size": 16, "blade_options": {"min_tokens": 1}},
        "lora": None,
        "optimizer": {"student": {"learning_rate": 1e-3}, "critic": {"learning_rate": 1e-3}},
        "ema": {"decay": 0.9},
        "loop": {"max_steps": 4, "batch_size": 2, "checkpoint_every": 2, "sample_every": 0},
        "parallel": {"mixed_precision": "float32", "activation_checkpointing": False},
    }
    for name, value in changes.items():
        *sections, last = name.split("__")
        here = given
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
    return given


def config(folder: Path, **changes: Any) -> RunConfig:
    """The same, checked."""
    return resolve(settings(folder, **changes))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


EAGER = {"sparsity__when": "never"}
"""Changes for a run that nothing is compiled in, which starts in a second: with ``eager`` or TORCHDYNAMO_DISABLE=1"""


@contextmanager
def eager() -> Iterator[None]:
    """No compilation inside."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def kept_graphs() -> Iterator[None]:
    """Compiled graphs are kept on disk between processes and between runs in one: only the first run is slow."""
    with inductor.patch(fx_graph_cache=True), functorch.patch(enable_autograd_cache=True):
        yield


def losses(folder: Path) -> list[tuple[int, float, float, float, float]]:
    """What has to be equal, bit by bit, however often a run was interrupted."""
    names = ("step", "loss/critic", "loss/student", "grad_norm/critic", "grad_norm/student")
    return [tuple(line[name] for name in names) for line in metrics(folder)]  # type: ignore[misc]


def command(folder: Path, *more: str, **changes: Any) -> list[str]:
    """The command line of a run, whose YAML is written beside its folder."""
    file = folder / "given.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings(folder, **changes)))  # JSON is YAML
    return [sys.executable, "-m", "blade_compile.distill.cli", "train", "-c", str(file), *more]


def start(arguments: list[str], before: Callable[[], None] | None = None, **environment: str) -> subprocess.Popen[str]:
    """A process in the root of the repository, whose output can be read. Compiled graphs are kept between processes."""
    kept = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=before,  # noqa: PLW1509 - limits of the child alone
    )
