"""The picture of a fidelity report: recall and relative L1 of every head, sites from top to bottom."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .fidelity import Fidelity


def draw(fidelity: Fidelity, path: str | os.PathLike[str]) -> None:
    """Write the picture; the file's suffix decides the format.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "the heat map is drawn by matplotlib, which is not installed; pip install matplotlib."
        ) from None
    sites = fidelity.sites
    heads = max(len(site.recall) for site in sites)
    figure = Figure(figsize=(4 + 0.45 * heads, 1.6 + 0.3 * len(sites)), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axes, (metric, title, colours) in zip(
        panels, (("recall", "recall of attention mass", "viridis"), ("l1", "relative L1 of the output", "magma_r"))
    ):
        grid = torch.full((len(sites), heads), float("nan"))
        for row, site in enumerate(sites):
            values = getattr(site, metric)
            grid[row, : len(values)] = torch.tensor(values)
        image = axes.imshow(grid.numpy(), aspect="auto", cmap=colours, vmax=1.0 if metric == "recall" else None)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("head")
        axes.set_xticks(range(heads))
        figure.colorbar(image, ax=axes, shrink=0.9)
    panels[0].set_yticks(range(len(sites)), [site.name for site in sites], fontsize=8)
    figure.suptitle(f"relative L2 error of the model's output: {fidelity.error:.3g}", fontsize=10)
    figure.savefig(path)
