"""The GPU benchmark's result file as Markdown: setup, what the aims ask for, then every row."""

from __future__ import annotations

from typing import Any

from benchmarks.attention_report import table

Row = dict[str, Any]
AT = ("Wan2.1-1.3B", 0.8)  # where the aims are stated
POINT = "FlashInfer's point"
RECORD = {"forward": 524, "backward": 374}  # TFLOP/s published for it on Hopper


def markdown(content: dict[str, Any]) -> str:
    """The whole report."""
    setup, rows, missing = content["setup"], content["rows"], content["missing"]
    tests = "the GPU tests passed just before" if content["tested"] else "**the GPU tests were not run**"
    lines = [
        "# Attention on a GPU",
        "",
        "- {gpu} (capability {capability}, {multiprocessors} multiprocessors, {memory_gib} GiB)".format_map(setup)
        + _clocks(rows),
        "- torch {torch}, CUDA {cuda}, cuDNN {cudnn}, Triton {triton}, Python {python}".format_map(setup),
        f"- commit {setup['commit']}, source {setup['source']}, {setup['date']}; {tests}",
        "- bf16, normal random inputs, medians of interleaved rounds, 20th to 80th percentile in brackets; errors are",
        "  relative, on sampled rows against fp64. `dense` is the fastest SDPA backend; `attend` the operator alone.",
        f"- made by `{content['command']}`",
        "",
        *_aims(rows),
    ]
    for direction in ("forward", "backward"):
        found = [row for row in rows if row["direction"] == direction]
        if found:
            lines += [f"## {direction.capitalize()}", "", *_rows(found), ""]
    if missing:
        lines += ["## Not run", "", *table(("part", "why"), missing.items()), ""]
    return "\n".join(lines)


def _clocks(rows: list[Row]) -> str:
    seen = [row["clocks"] for row in rows if row.get("clocks")]
    return f"; clocks after the last part: SM {seen[-1]['clocks.sm']}, memory {seen[-1]['clocks.mem']}" if seen else ""


def _aims(rows: list[Row]) -> list[str]:
    """What was measured beside what is aimed at; only what was measured."""
    found: list[tuple[str, str, str]] = []
    at = {row["direction"]: row for row in rows if (row["shape"], row["sparsity"]) == AT}
    for direction, aim in (("forward", "90 %"), ("backward", "80 %")):
        if row := at.get(direction):
            found.append((f"{direction}: of dense's rate", f"{row['dense_rate_share']:.0%}", aim))
    if (row := at.get("forward")) and "op_ms" in row:
        found.append(("whole op over dense", _span(row["op_speedup"]), "4x"))
        found.append(("prediction, of dense time", f"{row['predict_share']:.1%}", "at most 5 %"))
    flex = [row for row in at.values() if "over_flex" in row]
    found += [(f"{row['direction']}: over FlexAttention", _span(row["over_flex"]), "1x") for row in flex]
    point = [row for row in rows if row["shape"] == POINT]
    found += [
        (f"{POINT}, {row['direction']}, TFLOP/s", f"{row['tflops']:.0f}", f"{RECORD[row['direction']]}")
        for row in point
    ]
    if not found:
        return []
    return [f"## {AT[0]}, sparsity {AT[1]}", "", *table(("", "measured", "aim"), found), ""]


def _rows(rows: list[Row]) -> list[str]:
    forward = rows[0]["direction"] == "forward"
    head = ["shape", "S", "H", "D", "block", "sparsity", "dense ms", "attend ms", "TFLOP/s", "of dense's", "over flex"]
    head += ["predict ms", "select ms", "op ms", "op over dense"] if forward else ["over dense"]
    body = []
    for r in rows:
        cells = [r["shape"], f"{r['S']:,}", r["H"], r["D"], r["block"], f"{r['sparsity']:.2f}"]
        cells += [f"{r['dense_ms'][r['best_dense']]:.2f} ({r['best_dense']})", f"{r['attend_ms']:.2f}"]
        cells += [f"{r['tflops']:.0f}", f"{r['dense_rate_share']:.0%}"]
        cells.append(_span(r["over_flex"]) if "over_flex" in r else "")
        if forward:
            cells += [f"{r[name]:.3f}" if r.get(name) else "" for name in ("predict_ms", "select_ms", "op_ms")]
            cells.append(_span(r["op_speedup"]) if "op_speedup" in r else "")
        else:
            cells.append(_span(r["speedup"]))
        error = r["error"]
        body.append([*cells, f"{error:.0e}" + (f" ({r['dense_error']:.0e})" if "dense_error" in r else "")])
    return table([*head, "error (dense's)"], body)


def _span(summary: dict[str, float]) -> str:
    return f"{summary['median']:.2f}x ({summary['low']:.2f}-{summary['high']:.2f})"
