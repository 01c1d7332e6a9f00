"""Fill README.md's result tables from the committed reports in ``benchmarks/results``.

``readme_tables.py`` writes them; ``readme_tables.py --check`` only says whether they are out of date.

The first table is ``cpu_attention.json``'s worst case. Each ``<name>/report.json`` (of ``python -m benchmarks``, or of
its ``headline``) adds one with its whole steps, generations and training steps, and the stronger baselines and the
published figures beside them. Between two more markers stands which source each committed result is of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RESULT_MARKS = "<!-- results -->", "<!-- end of results -->"
SOURCE_MARKS = "<!-- sources -->", "<!-- end of sources -->"
AT = {"S": 8192, "sparsity": 0.8}
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
WHOLE = ("models", "pipeline", "distill")
STRONGER = {"over_compiled": "over 50 compiled dense", "over_few": "over as few dense"}
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
    setup, link = content["setup"], "benchmarks/results/cpu_attention.md"
    on = f"{setup['cpu']} ({setup['isa']}), {setup['threads']} threads, PyTorch {setup['torch'].split('+')[0]}"
    lines = [_heading(on, content, link), ""]
    lines += [f"| {where} | {over} | prediction | backward over dense |", "| --- | --- | --- | --- | --- |"]
    for dtype in dict.fromkeys(row["dtype"] for row in at):
        mine = [row for row in at if row["dtype"] == dtype]
        dims = " and ".join(str(d) for d in sorted({row["D"] for row in mine}))
        back = [row["speedup"]["median"] for row in backward if row["dtype"] == dtype]
        lines.append(
            f"| {NAMES[dtype]}, worst of head dims {dims} | {min(r['speedup']['median'] for r in mine):.1f}x "
            f"| {min(r['over_flex_with_prediction']['median'] for r in mine):.1f}x "
            f"| {100 * max(r['predict_share'] for r in mine):.1f} % of dense "
            f"| {f'{min(back):.1f}x' if back else ''} |"
        )
    return lines


def report_table(content: dict[str, Any], link: str) -> list[str]:
    """Whole steps and generations of a report: the sparse arms that have a speed-up, and their baselines' time."""
    chosen = [row for row in content["rows"] if _is_whole(row)]
    if not chosen:
        return []
    stronger = [name for name in STRONGER if any(name in row for row in chosen)]
    published = any("published_speedup" in row for row in chosen)
    head = ["what", "sparsity measured", "time", "rounds", "speed-up (20 to 80 %)", "over"]
    head += [*(STRONGER[name] for name in stronger), *(["published"] if published else [])]
    lines = ["", _heading(content["title"].rpartition(" on ")[2], content, link), ""]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in chosen:
        density = f"{1 - row['density']:.2f}" if "density" in row else ""
        cells = [
            f"{row['case']}: {row['arm']}{_size(row)}", density, f"{row['seconds']['median']:.3g} s",
            str(row["seconds"]["samples"]), _span(row["speedup"]), row["baseline"],
            *(_span(row[name]) if name in row else "" for name in stronger),
        ]  # fmt: skip
        if published:
            figure = row.get("published_speedup")
            cells.append(f"{figure:g}x ({row['published_on']})" if figure else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _heading(on: str, content: dict[str, Any], link: str) -> str:
    """What a table was measured on, whether anything else ran there, of which source it is, and where its rows are."""
    setup = content["setup"]
    load = setup["load"].replace(".", "", 1)
    noise = f"; not quiet, load {setup['load']} before the run" if load.isdigit() and float(setup["load"]) > 1 else ""
    earlier = ", of an earlier source" if _outdated(content) else ""
    return f"{on}{noise}; commit {setup['commit']}{earlier}; all rows in [`{link}`]({link}):"


def _span(figures: dict[str, float]) -> str:
    return f"{figures['median']:.2f}x ({figures['low']:.2f}-{figures['high']:.2f})"


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
    return "\n".join(lines)


def sources(results: Path = RESULTS) -> str:
    """Which source the committed results are of: the commits of times, and which fingerprints no longer match."""
    at, outdated = [], []
    for path in sorted([*results.glob("*.json"), *results.glob("*/report.json")]):
        content = json.loads(path.read_text())
        page = next((page for end in (".md", ".html") if (page := path.with_suffix(end)).exists()), path)
        name = f"`{page.relative_to(results).as_posix()}`"
        if "setup" in content:
            at.append(f"{name} {content['setup']['commit']}")
        if _outdated(content):
            outdated.append(f"{name} (`{content['command']}` makes it again)")
    lines = [f"Measurements are of the source at their commit (`+`: with changes): {', '.join(at)}."] if at else []
    lines += [f"Of an earlier source by their fingerprints: {', '.join(outdated)}."] if outdated else []
    return "\n".join(lines)


def _outdated(content: dict[str, Any]) -> bool:
    """Whether the files that a result was made from have changed. One without a fingerprint only has its commit."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from benchmarks.cpu_attention import SOURCES
    from benchmarks.tables import fingerprint

    if "fingerprint" in content:
        return bool(content["fingerprint"] != fingerprint(content["sources"]))
    return bool("key" in content and content["key"]["sources"] != fingerprint(SOURCES))


def updated(text: str, results: Path = RESULTS) -> str:
    """README.md's text with fresh tables."""
    for (start, end), made in ((RESULT_MARKS, tables(results)), (SOURCE_MARKS, sources(results))):
        if start not in text or end not in text:
            raise ValueError(f"README.md has no lines {start} and {end} to put its results between")
        before, rest = text.split(start, 1)
        text = f"{before}{start}\n{made}\n{end}{rest.split(end, 1)[1]}"
    return text


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
