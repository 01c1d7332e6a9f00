"""The attention benchmark's result file as Markdown: setup first, then the worst case, then every row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import setup_info

Row = dict[str, Any]
AT = (8192, 0.8)  # where the worst case is quoted


def markdown(content: dict[str, Any]) -> str:
    """The whole report."""
    parts: dict[str, list[Row]] = content["parts"]
    forward, backward, scaling = (_rows(parts, kind) for kind in ("forward", "backward", "scaling"))
    lines = [
        "# Attention on the CPU",
        "",
        *(f"- {line}" for line in setup_info.lines(content["setup"])),
        "- 1 x 2 heads, blocks of 128 tokens, 16 probe tokens, normal random inputs; medians of interleaved rounds,",
        "  20th to 80th percentile in brackets; every result compared with fp64 on sampled rows before it is timed.",
        f"- made by `{content['command']}`",
        "",
        *_worst(forward, backward, scaling),
        "## Forward",
        "",
        "`blade` is prediction + block-sparse attention; `predict` is prediction's share of dense time; `over flex`",
        "and GFLOP/s are for attention alone, on the same blocks; `peak` is the share of the measured rate of the",
        "multiply-add instruction of that dtype (`benchmarks/peak.cpp`).",
        "",
        *_forward_table(forward),
    ]
    if backward:
        lines += ["", "## Backward", "", "The backward operators alone, sparsity 0.8.", "", *_backward_table(backward)]
    if scaling:
        lines += [
            "",
            "## Threads",
            "",
            "Time on one thread over time on all; sparsity 0.8.",
            "",
            *_scaling_table(scaling),
        ]
    return "\n".join(lines) + "\n"


def _rows(parts: dict[str, list[Row]], kind: str) -> list[Row]:
    return [row for name, rows in parts.items() if name.startswith(kind) for row in rows]


def _worst(forward: list[Row], backward: list[Row], scaling: list[Row]) -> list[str]:
    """The worst dtype and head dim at the length and sparsity that the aims are stated for."""
    at = [row for row in forward if (row["S"], row["sparsity"]) == AT]
    if not at:
        return []
    worst: Callable[[Callable[[Row], float]], float] = lambda value: min(map(value, at))  # noqa: E731
    found = [
        ("over dense, prediction included", f"{worst(lambda r: r['speedup']['median']):.1f}x", "8x"),
        ("prediction, of dense time", f"{-worst(lambda r: -r['predict_share']):.1%}", "at most 2 %"),
        ("over FlexAttention on the same blocks", f"{worst(lambda r: r['over_flex']['median']):.1f}x", "2x"),
        ("of the instruction peak on kept blocks", f"{worst(lambda r: r['peak_share']):.0%}", "80 %"),
    ]
    if backward:
        found.append(("backward over dense's", f"{min(r['speedup']['median'] for r in backward):.1f}x", "3x"))
    if scaling:
        threads = scaling[0]["threads"]
        found.append(
            (f"{threads} threads over one", f"{min(r['blade']['median'] for r in scaling):.2f}x", "1.8x for two")
        )
    title = f"Worst case of dtype and head dim at S = {AT[0]:,} and sparsity {AT[1]}"
    return [*table((title, "measured", "aim"), found), ""]


def _forward_table(rows: list[Row]) -> list[str]:
    head = (
        "dtype",
        "D",
        "S",
        "sparsity",
        "dense ms",
        "blade ms",
        "speed-up",
        "predict",
        "over flex",
        "GFLOP/s",
        "peak",
        "error (dense's)",
    )
    body = []
    for r in rows:
        predicted = "predict_share" in r
        body.append(
            (
                r["dtype"],
                r["D"],
                f"{r['S']:,}",
                r["sparsity"],
                f"{r['dense_ms']:.1f}",
                f"{r['blade_ms']:.1f}",
                _span(r["speedup"]),
                f"{r['predict_share']:.1%}" if predicted else "",
                _span(r["over_flex"]) if predicted else "",
                f"{r['gflops']:.0f}",
                f"{r['peak_share']:.0%}",
                f"{r['error']:.0e} ({r['dense_error']:.0e})",
            )
        )
    return table(head, body)


def _backward_table(rows: list[Row]) -> list[str]:
    head = ("dtype", "D", "S", "dense ms", "blade ms", "speed-up", "GFLOP/s", "error")
    body = [
        (
            r["dtype"],
            r["D"],
            f"{r['S']:,}",
            f"{r['dense_ms']:.0f}",
            f"{r['blade_ms']:.0f}",
            _span(r["speedup"]),
            f"{r['gflops']:.0f}",
            f"{r['error']:.0e}",
        )
        for r in rows
    ]
    return table(head, body)


def _scaling_table(rows: list[Row]) -> list[str]:
    head = ("dtype", "D", "S", "threads", "blade", "dense")
    return table(
        head, [(r["dtype"], r["D"], f"{r['S']:,}", r["threads"], _span(r["blade"]), _span(r["dense"])) for r in rows]
    )


def _span(summary: dict[str, float]) -> str:
    return f"{summary['median']:.2f}x ({summary['low']:.2f}-{summary['high']:.2f})"


def table(head: Iterable[str], body: Iterable[Iterable[Any]]) -> list[str]:
    """Markdown lines."""
    names = list(head)
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in body]
