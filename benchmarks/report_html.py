"""A report as one HTML file that needs no network: setup, plots, every row, the site tables.

Every cell with a figure names the value in ``report.json`` that it shows, as a path in ``data-source``: `shown` gives
the cell's text for a path, so that a page can be checked against its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import setup_info
from benchmarks.plots import PLOTS, Plot

Row = dict[str, Any]
TEMPLATE = Path(__file__).with_name("report.html.j2")


def render(content: dict[str, Any]) -> str:
    """The page of a report's content (see `benchmarks.__main__`)."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        title=content["title"],
        command=content["command"],
        setup=setup_info.lines(content["setup"]),
        notes=content["notes"],
        plots=[figure for plot in PLOTS if (figure := _figure(plot, content["rows"])) is not None],
        cases=[_case(key, rows) for key, rows in by_case(content["rows"]).items()],
        sites={model: _sites(model, report) for model, report in content["sites"].items()},
        not_run=content["not_run"],
    )


def _figure(plot: Plot, rows: list[Row]) -> dict[str, Any] | None:
    chosen = plot.select(rows)
    if not chosen:
        return None
    places = {id(row): place for place, row in enumerate(rows)}
    found = [places[id(row)] for row in chosen]
    return {"title": plot.title, "note": plot.note, "svg": plot.draw(chosen), "rows": found}


def by_case(rows: list[Row]) -> dict[tuple[str, str], list[tuple[int, Row]]]:
    """Rows with their places, grouped by suite and case, in their order."""
    grouped: dict[tuple[str, str], list[tuple[int, Row]]] = {}
    for place, row in enumerate(rows):
        grouped.setdefault((row["suite"], row["case"]), []).append((place, row))
    return grouped


# --- figures and their places ----------------------------------------------------------------------------------------


def span(figures: dict[str, float] | None, unit: str = "") -> str:
    """``3.42x (3.30-3.51)``, or nothing."""
    if not figures:
        return ""
    if unit == "s":
        return f"{quantity(figures['median'])} ({quantity(figures['low'])} to {quantity(figures['high'])})"
    return f"{figures['median']:.2f}x ({figures['low']:.2f}-{figures['high']:.2f})"


def quantity(seconds: float | None) -> str:
    """Seconds with a fitting unit."""
    if seconds is None:
        return ""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.4g} {unit}" if seconds >= 100 else f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _seconds(figures: dict[str, float] | None) -> str:
    return span(figures, "s")


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "seconds": ("time", _seconds),
    "samples": ("rounds", lambda samples: str(len(samples))),
    "speedup": ("speed-up", span),
    "published_speedup": ("published", _times),
    "published_seconds": ("published time", quantity),
    "over_compiled": ("over 50 compiled dense", span),
    "over_few": ("over as few dense", span),
    "density": ("density", str),
    "tflops": ("TFLOP/s on kept", str),
    "attention_flops": ("FLOP on kept", lambda flops: f"{flops:.3g}"),
    "error": ("error", str),
    "distance": ("distance from dense", str),
    "recall": ("recall", str),
    "oracle": ("most possible", str),
    "l1": ("relative L1", str),
    "cosine": ("cosine", str),
    "graphs": ("graphs", str),
    "recompiles_by_step": ("recompiled by steps", str),
    "recompiles_by_resolution": ("by 2 resolutions", str),
    "peak_mib": ("peak MiB", str),
    "sdpa": ("dense kernel", str),
    "published_on": ("published on", str),
    "calculation": ("calculation", str),
}
"""Columns of a case's table, each only where a row has it. A row's ``first_call`` is none: the arms of a case share
caches, so that it is no compile time; suite ``compile`` has those."""


def _shape(sizes: list[int | None]) -> str:
    """Batch, heads, tokens (of queries and keys where they differ) and head dimension."""
    if None in sizes:
        return ""
    B, H, S, T, D = sizes
    return f"{B} x {H} x {S if S == T else f'{S}/{T}'} x {D}"


def _share(value: float) -> str:
    return f"{value:.3f}"


SITE_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "shape": ("B x H x S x D", _shape),
    "density": ("density", _share),
    "recall": ("recall", _share),
    "predicted_dense": ("dense, predicted", quantity),
    "predicted_sparse": ("sparse, predicted", quantity),
}
"""Figures of an attention site, as `blade_compile.explain` gives them"""


def shown(content: dict[str, Any], path: str) -> str:
    """The text of the cell that shows the value at a path, such as ``rows/3/speedup``."""
    value: Any = content
    *_, before, name = parts = path.split("/")
    for part in parts:
        value = value[int(part)] if isinstance(value, list) else value[part]
    if before == "split":
        return quantity(value)
    if parts[0] == "sites":
        return SITE_COLUMNS[name][1](value) if name in SITE_COLUMNS else str(value)
    return COLUMNS[name][1](value) if name in COLUMNS else str(value)


def _case(key: tuple[str, str], placed: list[tuple[int, Row]]) -> dict[str, Any]:
    here = [(place, row) for place, row in placed if row["status"] != "absent"]
    names = [name for name in COLUMNS if any(name in row for _, row in here)]
    parts = list(dict.fromkeys(part for _, row in here for part in row.get("split", {})))
    first = placed[0][1]
    return {
        "suite": key[0],
        "case": key[1],
        "about": f"{first['size']}, {first['dtype']}, weights: {first['weights']}." if "size" in first else "",
        "titles": [COLUMNS[name][0] for name in names] + parts,
        "rows": [_line(place, row, names, parts) for place, row in here],
        "absent": [row for _, row in placed if row["status"] == "absent"],
    }


def _line(place: int, row: Row, names: list[str], parts: list[str]) -> dict[str, Any]:
    cells = [_cell({"rows": {str(place): row}}, f"rows/{place}/{name}", name in row) for name in names]
    split = row.get("split", {})
    cells += [_cell({"rows": {str(place): row}}, f"rows/{place}/split/{part}", part in split) for part in parts]
    why = "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
    return {"place": place, "arm": row["arm"], "cells": cells, "why": why, "of": row.get("of")}


def _cell(content: dict[str, Any], path: str, there: bool) -> dict[str, str]:
    return {"text": shown(content, path), "source": path} if there else {"text": "", "source": ""}


def _sites(model: str, report: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in SITE_COLUMNS if any(site.get(name) is not None for site in report["sites"])]
    lines = []
    for place, site in enumerate(report["sites"]):
        source = f"sites/{model}/sites/{place}"
        there = {name: site.get(name) is not None for name in names}
        cells = [_cell({"sites": {model: report}}, f"{source}/{name}", there[name]) for name in names]
        lines.append({**site, "cells": cells, "source": source})
    return {"headline": report["headline"], "titles": [SITE_COLUMNS[name][0] for name in names], "sites": lines}
