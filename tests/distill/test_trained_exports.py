"""Students of every family, trained from a model folder and ready embeddings, in the stock pipelines that load them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from blade_compile.distill import embeddings
from blade_compile.distill.adapters import Adapter, load_adapter
from blade_compile.distill.config import RunConfig, resolve
from blade_compile.distill.export import read_record
from blade_compile.distill.pipelines import PIPELINES
from blade_compile.distill.trainer import export_run, train
from tests.distill import tiny_digits
from tests.distill.tiny_families import pipeline, run, stock, transformer

LATENT = {
    "wan": {"num_frames": 9, "height": 64, "width": 64},
    "cogvideox": {"num_frames": 9, "height": 64, "width": 64},
    "sd3": {"height": 128, "width": 128},
    "flux": {"height": 128, "width": 128},
    "pixart": {"height": 128, "width": 128},
    "dit": {"height": 128, "width": 128},
}
ADAPTERS = {"wan", "cogvideox", "sd3", "flux"}
"families whose stock pipeline loads LoRA by itself; the others' weights are merged"


def _embed(adapter: Adapter, folder: Path) -> None:
    """Embeddings of the family's own names and sizes, a different one for each prompt."""

    def encode(texts: Sequence[str]) -> dict[str, Tensor]:
        made = adapter.example_embeddings(len(texts), torch.float32)
        if adapter.family == "dit":
            return {name: torch.tensor([len(text) for text in texts]) for name in made}
        draw = torch.Generator().manual_seed(len(texts[0]))
        short = {
            name: value[:, :8] if value.dim() == 3 or name.endswith("mask") else value for name, value in made.items()
        }
        return {
            name: torch.ones_like(value) if name.endswith("mask") else torch.randn(value.shape, generator=draw)
            for name, value in short.items()
        }

    embeddings.prepare(folder, ["a", "of"], "ugly", encode, "drawn", batch=1)


def _config(family: str, root: Path, **changes: Any) -> RunConfig:
    """A run of two steps from a model folder of the family."""
    pipe = pipeline(family, transformer(family))
    if family == "pixart":  # PixArt-sigma has the same parts, and another length of text
        pipe = diffusers.PixArtSigmaPipeline(**pipe.components)
    pipe.save_pretrained(root / "model")
    quick = {"lora": {"rank": 4, "alpha": 8.0}, "loop__max_steps": 2, "optimizer__student": {"learning_rate": 0.05}}
    given = tiny_digits.settings(root, **quick, **changes)
    given["model"] = {"path": str(root / "model"), "dtype": "float32"}
    given["latent"] = LATENT[family]
    given["data"] = {"embeddings": str(root / "embeddings")}
    if family == "flux":
        given["method"] |= {"cfg_scale": 1.0, "embedded_guidance": 3.5}
    config = resolve(given)
    _embed(load_adapter(config.model), root / "embeddings")
    return config


def _check(family: str, root: Path) -> None:
    """The export is of its kind, not the teacher, and equal to the merged weights of the same checkpoint."""
    export = root / "run" / "export"
    assert read_record(export)["weights"] == ("lora" if family in ADAPTERS else "merged")
    assert read_record(export)["pipeline"] == {"pixart": "PixArtSigmaPipeline"}.get(family, PIPELINES[family].pipeline)
    made = run(stock(family, export).transformer, family)
    assert not torch.allclose(made, run(transformer(family), family), rtol=1e-2, atol=1e-3)
    merged = export_run(root / "run", out=root / "merged", merge=True)
    assert read_record(merged)["weights"] == "merged"
    torch.testing.assert_close(run(stock(family, merged).transformer, family), made, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in LATENT if family != "wan"])
def test_a_trained_student_in_the_stock_pipeline(family: str, tmp_path: Path) -> None:
    with tiny_digits.eager():
        assert train(_config(family, tmp_path, **tiny_digits.EAGER)) == 0
    _check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", LATENT)
def test_a_student_trained_compiled_and_sparse_in_the_stock_pipeline(family: str, tmp_path: Path) -> None:
    with tiny_digits.kept_graphs():
        assert train(_config(family, tmp_path)) == 0
    assert all(line["sparsity"] > 0.05 for line in tiny_digits.metrics(tmp_path))
    _check(family, tmp_path)
