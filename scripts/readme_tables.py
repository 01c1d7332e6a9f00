"""Fill README.md's result tables from the committed reports in ``benchmarks/results``.

``readme_tables.py`` writes them; ``readme_tables.py --check`` only says whether they are out of date.

The first table is ``cpu_attention.json``'s worst case. Each ``<name>/report.json`` (of ``python -m benchmarks``, or of
its ``headline``) adds one with its whole steps, generations and training steps, and the published figures beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results -->", "<!-- end of results -->"
AT = {"S": 8192, "sparsity": 0.8}
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
WHOLE = ("models", "pipeline", "distill")
Row = dict[str, Any]


def attention_table(content: dict[str, Any]) -> list[str]:
    """The worst head dimension of each dtype at one length and sparsity."""
    forward, backward = (
        [row for name, rows in content["parts"].items() if name.startswith(kind) for row in rows]
        for kind in ("forward", "backward")
    )
    at = [row for row in forward if all(row[name] == value for name, value in AT.items())]
    where = f"one attention at {AT['S']:,} tokens, sparsity {AT['sparsity']}, prediction included"
    over = "over dense SDPA | over FlexAttention on the same blocks"
    lines = [f"| {where} | {over} | prediction | backward over dense |", "| --- | --- | --- | --- | --- |"]
    for dtype in dict.fromkeys(row["dtype"] for row in at):
        mine = [row for row in at if row["dtype"] == dtype]
        dims = " and ".join(str(d) for d in sorted({row["D"] for row in mine}))
        back = [row["speedup"]["median"] for row in backward if row["dtype"] == dtype]
        lines.append(
            f"| {NAMES[dtype]}, worst of head dims {dims} | {min(r['speedup']['median'] for r in mine):.1f}x "
            f"| {min(r['over_flex']['median'] for r in mine):.1f}x "
            f"| {100 * max(r['predict_share'] for r in mine):.1f} % of dense "
            f"| {f'{min(back):.1f}x' if back else ''} |"
        )
    return lines


def report_table(content: dict[str, Any], link: str) -> list[str]:
    """Whole steps and generations of a report: the sparse arms that have a speed-up, and their baselines' time."""
    chosen = [row for row in content["rows"] if _is_whole(row)]
    if not chosen:
        return []
    published = any("published_speedup" in row for row in chosen)
    head = ["what", "sparsity measured", "time", "speed-up (20 to 80 %)", "over", *(["published"] if published else [])]
    lines = ["", f"{content['title'].rpartition(' on ')[2]}, all rows in [`{link}`]({link}):", ""]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in chosen:
        span = row["speedup"]
        density = f"{1 - row['density']:.2f}" if "density" in row else ""
        cells = [
            f"{row['case']}: {row['arm']}{_size(row)}", density, f"{row['seconds']['median']:.3g} s",
            f"{span['median']:.2f}x ({span['low']:.2f}-{span['high']:.2f})", row["baseline"],
        ]  # fmt: skip
        if published:
            figure = row.get("published_speedup")
            cells.append(f"{figure:g}x ({row['published_on']})" if figure else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _is_whole(row: Row) -> bool:
    if row["status"] != "ok" or "speedup" not in row or row["arm"] == row["baseline"]:
        return False
    return "calculation" in row or (row["suite"] in WHOLE and "density" in row)


def _size(row: Row) -> str:
    return ", scaled-down model" if "scaled down" in row.get("size", "") else ""


def tables(results: Path = RESULTS) -> str:
    """What stands between the two markers."""
    lines = []
    attention = results / "cpu_attention.json"
    if attention.exists():
        lines += attention_table(json.loads(attention.read_text()))
    for path in sorted(results.glob("*/report.json")):
        link = path.with_suffix(".html").relative_to(results.parent.parent).as_posix()
        lines += report_table(json.loads(path.read_text()), link)
    return "\n".join([START, *lines, END])


def updated(text: str, results: Path = RESULTS) -> str:
    """README.md's text with fresh tables."""
    if START not in text or END not in text:
        raise ValueError(f"README.md has no lines {START} and {END} to put its result tables between")
    before, rest = text.split(START, 1)
    return before + tables(results) + rest.split(END, 1)[1]


def main() -> int:
    """Write or check. Returns 1 where a check finds them out of date."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    wanted = updated(text)
    if text == wanted:
        return 0
    if "--check" in sys.argv[1:]:
        print("README.md: the result tables are out of date; run scripts/readme_tables.py")
        return 1
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
