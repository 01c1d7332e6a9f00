"""``measure``: what sparse attention loses, for every site and head, on a model's own tensors."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .backend import split_options
from .config import BladeConfig
from .kernels import dispatch, lists, observe, search
from .settings import settings_of
from .site_probe import dense_sdpa
from .site_runs import site_runner

METRICS = ("density", "recall", "oracle", "l1", "cosine")


@dataclass(frozen=True)
class SiteFidelity:
    """One attention site. Each list has one number for each head, the mean over calls and the batch."""

    name: str
    shape: tuple[int, int, int, int, int]
    "(B, H, S, T, D)"
    density: list[float]
    "kept share of the blocks"
    recall: list[float]
    "share of the exact softmax mass on kept blocks"
    oracle: list[float]
    "the most that the same number of blocks in each row can hold"
    l1: list[float]
    "sum |sparse - dense| / sum |dense| of the attention's output"
    cosine: list[float]
    "of the flattened outputs"

    def mean(self, metric: str) -> float:
        """Mean over the heads."""
        values = getattr(self, metric)
        return float(sum(values) / len(values))


@dataclass(frozen=True)
class Fidelity:
    """What `measure` hands back: ``print`` shows a table."""

    sites: list[SiteFidelity]
    error: float
    "relative L2 error of the model's output, sparse against dense"
    options: dict[str, Any]
    "blade's options, where they differ from the defaults"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json.dumps`` takes."""
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Draw recall and relative L1 as heat maps, sites x heads; the suffix says the format. Needs matplotlib."""
        from .heat_map import draw

        draw(self, path)

    def __str__(self) -> str:
        head = ["site", *METRICS, "worst head (l1)"]
        rows = [
            [
                site.name,
                *(f"{site.mean(metric):.4f}" for metric in METRICS),
                f"{max(range(len(site.l1)), key=site.l1.__getitem__)}: {max(site.l1):.4f}",
            ]
            for site in self.sites
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        pad = lambda row: "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()  # noqa: E731
        first = f"relative L2 error of the model's output: {self.error:.4g}; {len(self.sites)} sparse sites"
        return "\n".join([first, "", pad(head), pad(["-" * width for width in widths]), *map(pad, rows)])


def measure(
    model: Any, *inputs: Any, options: BladeConfig | Mapping[str, Any] | None = None, **kwargs: Any
) -> Fidelity:
    """Run a model dense and sparse and compare: each rewritten site, and the output.

    The model runs twice, without gradients; it, its inputs and the random state are as before afterwards.

    Args:
        model: a module or function, plain or compiled in any way.
        inputs, kwargs: what it is called with.
        options: as for ``torch.compile(backend="blade", options=...)``. ``when`` counts as ``always`` unless given:
            what is asked is what is lost, not whether it pays.

    Returns:
        Recall of attention mass, the oracle's recall at the same budget, relative L1 and cosine of each head's output,
        and the relative L2 error of the model's output.

    Raises:
        ValueError: for wrong options, or if no attention was rewritten.
    """
    config = always(options)
    found: dict[str, list[tuple[tuple[int, ...], dict[str, Tensor]]]] = {}

    def handler(name: str, op: Callable[..., Tensor], args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
        out, numbers = compare(op, args, given)
        q, k = args[:2]
        found.setdefault(name, []).append(((*q.shape[:3], k.shape[2], q.shape[3]), numbers))
        return out

    with site_runner(model, settings_of(config)) as runner:
        sparse = runner.run(handler, inputs, kwargs)
        if not found:
            raise ValueError(
                "no attention of this model was rewritten under these options, so there is nothing to measure; "
                "blade_compile.explain(model, ...) says why for each."
            )
        dense = runner.plain(inputs, kwargs)
    sites = [_site(name, calls) for name, calls in found.items()]
    return Fidelity(sites, relative_error(sparse, dense), changed(config))


def always(options: BladeConfig | Mapping[str, Any] | None) -> BladeConfig:
    """The configuration of the options, sparse at every site that they don't leave out."""
    if isinstance(options, BladeConfig):
        config = options
    else:
        config = split_options(None, options)[0]
        if options is not None and "when" in options:
            return config
    return dataclasses.replace(config, when="always") if config.when == "auto" else config


def changed(config: BladeConfig) -> dict[str, Any]:
    """The fields that differ from the defaults."""
    default = BladeConfig()
    pairs = ((name, getattr(config, name)) for name in BladeConfig.names())
    return {name: value for name, value in pairs if value != getattr(default, name)}


def compare(
    op: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """``blade::sparse_sdpa``'s output on a site's tensors, and `METRICS` of each head, fp64 [H] each."""
    with observe.record() as events:
        out = op(*args, **kwargs)
    event = next(e for e in reversed(events) if e.op in observe.ATTENTIONS)
    scale = args[4] if len(args) > 4 else kwargs.get("scale")
    mask = args[3] if len(args) > 3 else kwargs.get("key_mask")
    q, k, v = args[:3]
    dense = dense_sdpa(q, k, v, mask, scale)()
    numbers = dict(zip(("density", "recall", "oracle"), mass(event, scale), strict=True))
    wrong, right = (out - dense).double(), dense.double()
    over = (0, 2, 3)
    numbers["l1"] = wrong.abs().sum(over) / right.abs().sum(over).clamp(min=1e-300)
    flat, flat_dense = (x.double().transpose(0, 1).flatten(1) for x in (out, dense))
    numbers["cosine"] = torch.nn.functional.cosine_similarity(flat, flat_dense, dim=1, eps=1e-300)
    return out, numbers


def mass(event: observe.Event, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Density, recall and the oracle's recall of each head, fp64 [H]: from the lists and the exact block sums."""
    q, k = event.inputs[:2]
    nK = -(-k.shape[2] // event.block_size)
    bias = dispatch.key_bias(event.key_mask, q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    sums = search.lse_and_block_sums(q, k, bias, scale, event.block_size)[1].double()
    num = event.kv_num_blocks.expand(sums.shape[:3])
    if event.path in ("sdpa", "full"):
        keep = torch.ones_like(sums, dtype=torch.bool)
    else:
        keep = lists.kept_blocks(num, event.kv_indices.expand(*sums.shape[:3], -1), nK)
    best = sums.sort(-1, descending=True).values
    rank = torch.arange(nK, device=sums.device)
    total = sums.sum((0, 2, 3)).clamp(min=1e-300)
    recall = torch.where(keep, sums, 0.0).sum((0, 2, 3)) / total
    oracle = torch.where(rank < keep.sum(-1, keepdim=True), best, 0.0).sum((0, 2, 3)) / total
    return keep.double().mean((0, 2, 3)), recall, oracle


def relative_error(got: Any, want: Any) -> float:
    """||got - want|| / ||want|| over all floating-point tensors of an output."""
    wrong = norm = 0.0
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        if isinstance(b, Tensor) and b.is_floating_point():
            wrong += (a.double() - b.double()).square().sum().item()
            norm += b.double().square().sum().item()
    return (wrong / norm) ** 0.5 if norm else float(wrong > 0)


def _site(name: str, calls: list[tuple[tuple[int, ...], dict[str, Tensor]]]) -> SiteFidelity:
    means = {
        metric: torch.stack([numbers[metric].cpu() for _, numbers in calls]).mean(0).tolist() for metric in METRICS
    }
    return SiteFidelity(name=name, shape=calls[0][0], **means)  # type: ignore[arg-type]
