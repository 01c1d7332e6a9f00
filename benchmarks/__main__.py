"""``python -m benchmarks``: compiled dense beside compiled sparse, as JSON rows, a table and one HTML file.

python -m benchmarks [--quick] [--suite NAME ...] [--out DIR]   run suites, write report.json and report.html
python -m benchmarks compare A B                                what changed beyond noise
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import compare, registry, report_html, runner, setup_info
from benchmarks.tables import ROOT

Row = dict[str, Any]
for module in ("suite_ops", "suite_models"):  # the order of the report
    importlib.import_module(f"benchmarks.{module}")


def run(suites: list[str], plan: registry.Plan, out: Path, command: str) -> dict[str, Any]:
    """Run suites and write the report after every case: a stopped run loses one case only."""
    screen = Console(width=None if sys.stdout.isatty() else 150)
    content: dict[str, Any] = {
        "title": f"blade on {torch.cuda.get_device_name() if plan.device.type == 'cuda' else setup_info.cpu_name()}",
        "command": command,
        "setup": setup_info.collect(),
        "notes": _notes(plan),
        "not_run": _not_run(suites, plan),
        "rows": [],
        "sites": {},
    }
    screen.print("\n".join(setup_info.lines(content["setup"])), markup=False, highlight=False)
    rounds, budget = (5, 8.0) if plan.quick else (9, 60.0)
    for name in suites:
        for case in registry.SUITES[name](plan):
            rows = runner.run_case(name, case, plan, rounds=rounds, budget=budget)
            content["rows"] += rows
            if case.sites is not None and any(row["status"] == "ok" for row in rows):
                content["sites"][case.about["model"]] = case.sites()
            write(content, out)
            show(name, case, rows, screen)
            torch._dynamo.reset()
    return content


def _notes(plan: registry.Plan) -> list[str]:
    notes = ["Weights and attention inputs are random: times don't depend on them, errors do."]
    if plan.device.type == "cpu":
        notes.append("No GPU was at hand: models are scaled down so that a CPU steps through them in seconds.")
    return notes


def _not_run(suites: list[str], plan: registry.Plan) -> list[str]:
    lines = [f"suite {name}: not asked for" for name in registry.SUITES if name not in suites]
    if plan.quick:
        from benchmarks.suite_models import MODELS, QUICK

        models = [name for name in MODELS if name not in QUICK]
        lines.append(
            "--quick: other lengths, head dimensions, dtypes, sparsities, blocks and the backward of suite ops"
        )
        lines.append(f"--quick: models {', '.join(models)}")
    return lines


def write(content: dict[str, Any], out: Path) -> None:
    """report.json and report.html."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "report.html").write_text(report_html.render(content))


def show(name: str, case: registry.Case, rows: list[Row], screen: Console) -> None:
    """One case as a table in the terminal; absent arms as one line."""
    table = Table(title=f"{name}: {case.name}", title_justify="left", box=None, pad_edge=False)
    table.add_column("arm", max_width=60)
    for column in ("time", "speed-up", "density", "error", "peak MiB"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows:
        if row["status"] == "absent":
            continue
        table.add_row(
            row["arm"],
            report_html.quantity(row.get("seconds", {}).get("median")),
            report_html.span(row.get("speedup")),
            *(str(row.get(key, "")) for key in ("density", "error", "peak_mib")),
            "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}",
        )
    screen.print(table)
    if case.absent:
        screen.print("not here: " + ", ".join(f"{arm} ({why})" for arm, why in case.absent.items()), soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 0, or 1 where an arm's result was wrong or a comparison found something slower."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return _compare(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two lengths and one model: under two minutes")
    parser.add_argument("--suite", nargs="+", choices=sorted(registry.SUITES), default=list(registry.SUITES))
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "report", help="folder (default: .cache/report)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    command = " ".join(["python -m benchmarks", *(a for a in argv if a != str(args.out) and a != "--out")])
    content = run(args.suite, registry.Plan(device, args.quick, args.seed), args.out, command)
    wrong = [row for row in content["rows"] if row["status"] in ("wrong", "failed")]
    print(f"{len(content['rows'])} rows in {time.perf_counter() - start:.0f} s: {args.out / 'report.html'}")
    for line in content["not_run"]:
        print(f"not run: {line}")
    for row in wrong:
        print(f"{row['status']}: {row['case']}, {row['arm']}: {row['reason']}", file=sys.stderr)
    return 1 if wrong else 0


def _compare(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=compare.__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args(argv)
    try:
        before, after = compare.load(args.before), compare.load(args.after)
    except ValueError as error:
        parser.error(str(error))
    print(compare.text(before, after))
    slower = any(change.verdict == "slower" for change in compare.changes(before, after))
    return 1 if slower or compare.lost(before, after) else 0


if __name__ == "__main__":
    sys.exit(main())
