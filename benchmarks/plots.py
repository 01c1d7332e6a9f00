"""Plots of a report as SVG text that follows the page's colours: text and axes are drawn in ``currentColor``.

Each is drawn from the rows that it selects, which the page names below it; the ideal line is 1 / density.
"""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
INK = "#010203"  # stands for the page's text colour until the SVG is written
COLOURS = ("#3b82c4", "#d97706", "#2f9e64", "#b0509b", "#6b7280", "#c2410c", "#0f9aa8", "#8a6d1f")
SAME_DENSITY = 0.1  # densities that differ by no more belong to the same point
PARTS = ("prediction", "selection", "attention", "rest")


@dataclass(frozen=True)
class Plot:
    """One figure of the page."""

    title: str
    select: Callable[[list[Row]], list[Row]]
    "the rows that it shows; none: there is no figure"
    draw: Callable[[list[Row]], str]
    note: str = ""


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
    figure, axes = plt.subplots(figsize=(5.8, 3.4), layout="constrained")
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=INK, alpha=0.15)
    return figure, axes


def _svg(figure: Any, axes: Any, legend: bool = True) -> str:
    from matplotlib import pyplot as plt

    if legend and (labels := axes.get_legend_handles_labels()[1]):
        # Outside: inside, the marker of a legend reads as a point of the data. The plot keeps its height.
        figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / 2))
        figure.legend(frameon=False, fontsize=9, ncols=2, loc="outside upper left")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)  # addresses of vocabularies
    # The page sets the width; the drawing keeps its proportions.
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r'height="[^"]*pt"', "", text, count=1), count=1)


def _timed(rows: Iterable[Row], kind: str) -> list[Row]:
    """Whole sparse operators of suite ``ops``."""
    mine = (r for r in rows if r["suite"] == "ops" and r.get("kind") == kind)
    return [r for r in mine if r.get("policy") and "speedup" in r]


def _forward(rows: Iterable[Row]) -> list[Row]:
    return [r for r in _timed(rows, "forward") if r["block"] == 128]


def _groups(rows: Iterable[Row], label: Callable[[Row], str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[label(row)].append(row)
    return found


def _longer(groups: dict[str, list[Row]]) -> list[Row]:
    """The rows of lines with two points or more."""
    return [row for found in groups.values() if len(found) > 1 for row in found]


def _of_length(row: Row) -> str:
    return f"{row['dtype']}, D {row['D']}, sparsity {row['sparsity']}"


def select_over_length(rows: list[Row]) -> list[Row]:
    """Whole operator with blocks of 128, at sparsity 0.8 where that was measured."""
    found = _longer(_groups(_forward(rows), _of_length))
    return [r for r in found if r["sparsity"] == 0.8] or found


def draw_over_length(rows: list[Row]) -> str:
    """A line for each dtype, head dimension and sparsity."""
    figure, axes = _figure()
    for label, found in _groups(rows, _of_length).items():
        _line(axes, found, "S", label)
    longest = max(rows, key=lambda r: r["S"])
    axes.axhline(1 / longest["density"], color=INK, linestyle=":", linewidth=1, label="ideal: 1 / density")
    axes.set(xlabel="tokens", ylabel="speed-up over dense", ylim=(0, None), xscale="log")
    ticks = sorted({r["S"] for r in rows})
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    return _svg(figure, axes)


def _of_sparsity(row: Row) -> str:
    return f"{row['dtype']}, D {row['D']}"


def select_over_sparsity(rows: list[Row]) -> list[Row]:
    """Whole operator with blocks of 128 at the longest length."""
    found = _forward(rows)
    longest = max((r["S"] for r in found), default=0)
    return _longer(_groups((r for r in found if r["S"] == longest), _of_sparsity))


def draw_over_sparsity(rows: list[Row]) -> str:
    """A line for each dtype and head dimension, beside the ideal one."""
    figure, axes = _figure()
    for label, found in _groups(rows, _of_sparsity).items():
        _line(axes, found, "sparsity", label)
    points = sorted({(r["sparsity"], 1 / r["density"]) for r in rows})
    axes.plot(*zip(*points, strict=True), color=INK, linestyle=":", linewidth=1, label="ideal: 1 / density")
    axes.set(xlabel=f"sparsity, {rows[0]['S']:,} tokens", ylabel="speed-up over dense", ylim=(0, None))
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


def select_split(rows: list[Row]) -> list[Row]:
    """Steps of whole models whose parts were measured."""
    return [r for r in rows if "prediction" in r.get("split", {}) and r["suite"] == "models"]


def draw_split(rows: list[Row]) -> str:
    """Where a model's step spends its time."""
    figure, axes = _figure()
    figure.set_figheight(1.2 + 0.35 * len(rows))
    labels = [f"{r['model']}: {r['arm']}" for r in rows]
    start = [0.0] * len(rows)
    for part in PARTS:
        values = [r["split"].get(part, 0.0) for r in rows]
        axes.barh(labels, values, left=start, label=part, height=0.6)
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0)
    axes.set(xlabel="seconds of one step")
    figure.legend(frameon=False, fontsize=9, ncols=4, loc="outside upper center")
    return _svg(figure, axes, legend=False)


def select_fidelity(rows: list[Row]) -> list[Row]:
    """Policies that suite ``ops`` timed and suite ``fidelity`` compared, at the same sparsity: both rows of each.

    Only where both kept about as much: what a policy by thresholds keeps depends on the queries and keys.
    """
    timed = {_chosen(r): r for r in _timed(rows, "policies")}
    pairs = [(timed[key], r) for r in rows if r["suite"] == "fidelity" and "l1" in r and (key := _chosen(r)) in timed]
    alike = [pair for pair in pairs if abs(pair[0]["density"] - pair[1]["density"]) <= SAME_DENSITY]
    return [row for pair in alike for row in pair]


def _chosen(row: Row) -> tuple[Any, Any]:
    return row.get("policy"), row.get("sparsity")


def draw_fidelity(rows: list[Row]) -> str:
    """A line for each policy through its sparsities."""
    figure, axes = _figure()
    timed, compared = rows[::2], rows[1::2]
    labels = [r["arm"].removeprefix("blade ").partition(", sparsity")[0] for r in timed]
    for index, label in enumerate(dict.fromkeys(labels)):
        pairs = [
            (t["speedup"]["median"], c["l1"]) for t, c, its in zip(timed, compared, labels, strict=True) if its == label
        ]
        axes.plot(
            *zip(*sorted(pairs), strict=True), label=label, marker="os^DvP*X"[index % 8], markersize=5,
            color=COLOURS[index % len(COLOURS)], linewidth=1,
        )  # fmt: skip
    axes.set(xlabel="speed-up of the operator over dense", ylabel="relative L1 error of attention")
    axes.set(xlim=(0, None), ylim=(0, None))
    return _svg(figure, axes)


def select_distance(rows: list[Row]) -> list[Row]:
    """Sparse arms of whole models."""
    return [r for r in rows if r["suite"] == "models" and "density" in r and "speedup" in r]


def draw_distance(rows: list[Row]) -> str:
    """A point for each arm, a colour for each model."""
    figure, axes = _figure()
    for index, (model, mine) in enumerate(_groups(rows, lambda r: r["model"]).items()):
        axes.scatter(
            [r["speedup"]["median"] for r in mine], [r["error"] for r in mine], label=model,
            color=COLOURS[index % len(COLOURS)], marker="os^Dv"[index % 5],
        )  # fmt: skip
    axes.set(xlabel="speed-up of a step over compiled dense", ylabel="error against fp32, relative L2")
    axes.set(xlim=(0, None), ylim=(0, None))
    return _svg(figure, axes)


def select_generations(rows: list[Row]) -> list[Row]:
    """Whole generations of the headline protocol."""
    return [r for r in rows if "calculation" in r and "speedup" in r]


def draw_generations(rows: list[Row]) -> str:
    """Bars of speed-ups over 50 eager dense steps, and the published figure as a line across."""
    figure, axes = _figure()
    figure.set_figheight(1.2 + 0.45 * len(rows))
    labels = [r["arm"] for r in rows]
    axes.barh(labels, [r["speedup"]["median"] for r in rows], height=0.6, label="here")
    for place, row in enumerate(rows):
        if "published_speedup" in row:
            x, label = row["published_speedup"], "published" if not place else None
            axes.plot([x, x], [place - 0.4, place + 0.4], color=COLOURS[1], linewidth=2, label=label)
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0)
    axes.set(xlabel="speed-up over 50 eager dense steps")
    return _svg(figure, axes)


PLOTS = (
    Plot("Whole generations, here and published", select_generations, draw_generations),
    Plot("Speed-up against length", select_over_length, draw_over_length),
    Plot("Speed-up against sparsity", select_over_sparsity, draw_over_sparsity),
    Plot("Where a step's time goes", select_split, draw_split),
    Plot(
        "Fidelity against speed", select_fidelity, draw_fidelity,
        "Errors on a trained model's queries and keys, speed at a length that matters: two rows for each point, "
        "which kept about as much (within 0.1).",
    ),
    Plot("Error against speed, random weights", select_distance, draw_distance),
)  # fmt: skip
