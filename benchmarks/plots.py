"""Plots of a report as SVG text that follows the page's colours: text and axes are drawn in ``currentColor``.

Every point of a plot is a row of the report; the ideal line is 1 / density.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
INK = "#010203"  # stands for the page's text colour until the SVG is written
COLOURS = ("#3b82c4", "#d97706", "#2f9e64", "#b0509b", "#6b7280", "#c2410c")


def _figure() -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "blade",
            "font.family": "sans-serif",
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
            "axes.prop_cycle": mpl.cycler(color=COLOURS),
        }
    )
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=INK, alpha=0.15)
    return figure, axes


def _svg(figure: Any, axes: Any, legend: bool = True) -> str:
    from matplotlib import pyplot as plt

    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # The page sets the width; the drawing keeps its proportions.
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r'height="[^"]*pt"', "", text, count=1), count=1)


def _sparse(rows: Iterable[Row]) -> list[Row]:
    return [r for r in rows if r.get("policy") and "speedup" in r and r.get("kind") == "forward"]


def speedup_over_length(rows: list[Row]) -> str | None:
    """Whole operator over dense, one line for each dtype, head dimension and sparsity (the largest block)."""
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in _sparse(rows):
        if row["block"] == 128:
            lines[f"{row['dtype']}, D {row['D']}, sparsity {row['sparsity']}"].append(row)
    lines = {label: found for label, found in lines.items() if len(found) > 1}
    if not lines:
        return None
    shown = {label: found for label, found in lines.items() if "sparsity 0.8" in label} or lines
    figure, axes = _figure()
    for label, found in shown.items():
        _line(axes, found, "S", label)
    longest = max((r for found in shown.values() for r in found), key=lambda r: r["S"])
    axes.axhline(1 / longest["density"], color=INK, linestyle=":", linewidth=1, label="ideal: 1 / density")
    axes.set(xlabel="tokens", ylabel="speed-up over dense", ylim=(0, None), xscale="log")
    ticks = sorted({r["S"] for found in shown.values() for r in found})
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    return _svg(figure, axes)


def speedup_over_sparsity(rows: list[Row]) -> str | None:
    """Whole operator over dense at the longest length, beside the ideal line."""
    sparse = _sparse(rows)
    longest = max((r["S"] for r in sparse), default=0)
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in sparse:
        if row["S"] == longest and row["block"] == 128:
            lines[f"{row['dtype']}, D {row['D']}"].append(row)
    if not any(len(found) > 1 for found in lines.values()):
        return None
    figure, axes = _figure()
    for label, found in lines.items():
        _line(axes, found, "sparsity", label)
    points = sorted({(r["sparsity"], 1 / r["density"]) for found in lines.values() for r in found})
    axes.plot(*zip(*points, strict=True), color=INK, linestyle=":", linewidth=1, label="ideal: 1 / density")
    axes.set(xlabel=f"sparsity, {longest:,} tokens", ylabel="speed-up over dense", ylim=(0, None))
    return _svg(figure, axes)


def _line(axes: Any, rows: list[Row], x: str, label: str) -> None:
    ordered = sorted(rows, key=lambda r: r[x])
    axes.plot([r[x] for r in ordered], [r["speedup"]["median"] for r in ordered], marker="o", markersize=4, label=label)
    axes.fill_between(
        [r[x] for r in ordered],
        [r["speedup"]["low"] for r in ordered],
        [r["speedup"]["high"] for r in ordered],
        alpha=0.2,
    )


def time_split(rows: list[Row]) -> str | None:
    """Where a model's step spends its time: prediction, attention, the rest."""
    found = [r for r in rows if "split" in r]
    if not found:
        return None
    figure, axes = _figure()
    figure.set_figheight(1.2 + 0.35 * len(found))
    labels = [f"{r['model']}: {r['arm']}" for r in found]
    start = [0.0] * len(found)
    for part in ("prediction", "attention", "rest"):
        values = [r["split"].get(part, 0.0) for r in found]
        axes.barh(labels, values, left=start, label=part, height=0.6)
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0)
    axes.set(xlabel="seconds of one step")
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return _svg(figure, axes, legend=False)


def fidelity_and_speed(rows: list[Row]) -> str | None:
    """Distance from dense against speed-up, for every sparse arm of a model."""
    found = [r for r in rows if r["suite"] == "models" and r["arm"].startswith("blade asa") and "speedup" in r]
    if not found:
        return None
    figure, axes = _figure()
    for index, model in enumerate(dict.fromkeys(r["model"] for r in found)):
        mine = [r for r in found if r["model"] == model]
        axes.scatter(
            [r["speedup"]["median"] for r in mine], [r["error"] for r in mine], label=model,
            color=COLOURS[index % len(COLOURS)], marker="os^Dv"[index % 5],
        )  # fmt: skip
    axes.set(xlabel="speed-up of a step over compiled dense", ylabel="distance from dense, relative L2")
    return _svg(figure, axes)


PLOTS = {
    "Speed-up against length": speedup_over_length,
    "Speed-up against sparsity": speedup_over_sparsity,
    "Where a step's time goes": time_split,
    "Distance from dense against speed": fidelity_and_speed,
}
