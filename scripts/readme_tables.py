"""Fill README.md's result tables from the committed reports in ``benchmarks/results``.

``readme_tables.py`` writes them; ``readme_tables.py --check`` only says whether they are out of date.

The first tables are of each ``<name>/report.json`` (of ``python -m benchmarks``, or of its ``headline``): single
attentions at one length, steps, generations and training steps under the first policy, and the protocol's generations
with the stronger baselines and the published figures beside them. The last one is ``cpu_attention.json``'s worst case.
Between two more markers stands which source each committed result is of.
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
SINGLE = f"sparsity {AT['sparsity']}, block 128"
STRONGER = {"over_compiled": "over 50 compiled dense", "over_few": "over as few dense"}
MANY = "50"  # steps of the generations that few steps are compared with
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
    lines = ["", f"{_measured_on(on, content)}; all rows in [`{link}`]({link}):", ""]
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


def report_tables(reports: dict[str, dict[str, Any]]) -> list[str]:
    """Of reports by link. Those of one machine and one source share a heading and two tables: calls, generations."""
    groups: dict[str, list[str]] = {}
    for link, content in reports.items():
        groups.setdefault(_measured_on(content["title"].rpartition(" on ")[2], content), []).append(link)
    lines = []
    for heading, links in groups.items():
        rows = [row for link in links for row in reports[link]["rows"] if _is_shown(row)]
        if not rows:
            continue
        named = ", ".join(f"[{Path(link).parent.name}]({link})" for link in links)
        lines += ["", f"{heading}; all rows in {named}:"]
        lines += _calls(_first_of_each([row for row in rows if "calculation" not in row]))
        lines += _generations([row for row in rows if "calculation" in row])
    return lines


def _is_shown(row: Row) -> bool:
    """Sparse steps, generations and training steps, what the headline adds up, and one length and sparsity of `ops`."""
    if row["status"] != "ok" or "speedup" not in row or row["arm"] == row["baseline"]:
        return False
    if row["suite"] == "ops":
        return row["kind"] == "forward" and row["S"] == AT["S"] and row["arm"].endswith(SINGLE)
    return "calculation" in row or (row["suite"] in WHOLE and "density" in row)


def _first_of_each(rows: list[Row]) -> list[Row]:
    """Of a model the first policy, the same for all; single attentions have FlexAttention beside blade."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        first.setdefault((row["case"], row["arm"] if row["suite"] == "ops" else ""), row)
    return [*first.values()]


def _calls(rows: list[Row]) -> list[str]:
    head = ["what", "sparsity measured", "time", "rounds", "speed-up (20 to 80 %)", "over"]
    return _table(head, [[*_common(row), _span(row["speedup"]), row["baseline"]] for row in rows])


def _generations(rows: list[Row]) -> list[str]:
    head = ["whole generation", "", "time", "rounds", "over 50 eager dense", *STRONGER.values(), "published"]
    return _table(head, [
        [
            *_common(row), _span(row["speedup"]), *(_over(name, row) for name in STRONGER),
            f"{row['published_speedup']:g}x ({row['published_on']})" if "published_speedup" in row else "",
        ]
        for row in rows
    ])  # fmt: skip


def _over(name: str, row: Row) -> str:
    """Blank where the row is that baseline itself, or has many steps and would be compared with few."""
    if name not in row or row[name]["low"] == row[name]["high"] == 1 or (name == "over_few" and row["arm"][:2] == MANY):
        return ""
    return _span(row[name])


def _common(row: Row) -> list[str]:
    density = f"{1 - row['density']:.2f}" if "density" in row else ""
    seconds = row["seconds"]
    return [f"{row['case']}: {row['arm']}{_size(row)}", density, f"{seconds['median']:.3g} s", str(seconds["samples"])]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table after an empty line, without the columns that are empty; nothing where there is no row."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return ["", *(f"| {' | '.join(line)} |" for line in lines)] if rows else []


def _measured_on(on: str, content: dict[str, Any]) -> str:
    """What a table was measured on, whether anything else ran there, and of which source it is."""
    setup = content["setup"]
    load = setup["load"].replace(".", "", 1)
    noise = f"; not quiet, load {setup['load']} before the run" if load.isdigit() and float(setup["load"]) > 1 else ""
    earlier = ", of an earlier source" if _outdated(content) else ""
    return f"{on}{noise}; commit {setup['commit']}{earlier}"


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
    paths = sorted(results.glob("*/report.json"))
    links = [path.with_suffix(".html").relative_to(results.parent.parent).as_posix() for path in paths]
    lines = report_tables(dict(zip(links, (json.loads(path.read_text()) for path in paths), strict=True)))
    attention = results / "cpu_attention.json"
    if attention.exists():
        lines += attention_table(json.loads(attention.read_text()))
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
