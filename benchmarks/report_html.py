"""A report as one HTML file that needs no network: setup, plots, every row, the site tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import setup_info
from benchmarks.plots import PLOTS

Row = dict[str, Any]
TEMPLATE = Path(__file__).with_name("report.html.j2")


def render(content: dict[str, Any]) -> str:
    """The page of a report's content (see `benchmarks.__main__`)."""
    import jinja2

    rows: list[Row] = content["rows"]
    plots = {title: svg for title, draw in PLOTS.items() if (svg := draw(rows)) is not None}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"span": span, "quantity": quantity}
    return environment.from_string(TEMPLATE.read_text()).render(
        title=content["title"],
        command=content["command"],
        setup=setup_info.lines(content["setup"]),
        notes=content["notes"],
        plots=plots,
        cases=by_case(rows),
        sites=content["sites"],
        not_run=content["not_run"],
    )


def by_case(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows grouped by suite and case, in their order."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["suite"], row["case"]), []).append(row)
    return grouped


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
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
