"""``python -m benchmarks``: compiled dense beside compiled sparse, as JSON rows, a table and one HTML file.

python -m benchmarks [--quick] [--suite NAME ...] [--out DIR]   run suites, write report.json and report.html
python -m benchmarks headline --model NAME [--out DIR]          the published comparisons (see headline.py)
python -m benchmarks compare A B                                what changed beyond noise
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import compare, headline, registry, report_html, runner, setup_info, suite_models
from benchmarks.models import MODELS
from benchmarks.tables import ROOT

Row = dict[str, Any]
SUITES = ("ops", "models", "pipeline", "distill", "compile", "fidelity")
QUICK = ("ops", "models")
for module in SUITES:  # the order of the report
    importlib.import_module(f"benchmarks.suite_{module}")


class Report:
    """A report in the making, written after every case: a stopped run loses one case only."""

    def __init__(
        self, plan: registry.Plan, out: Path, command: str, not_run: list[str], notes: list[str], title: str = "blade"
    ) -> None:
        """Print the setup."""
        self.plan, self.out = plan, out
        self.screen = Console(width=None if sys.stdout.isatty() else 150)
        device = torch.cuda.get_device_name() if plan.device.type == "cuda" else setup_info.cpu_name()
        self.content: dict[str, Any] = {
            "title": f"{title} on {device}",
            "command": command,
            "setup": setup_info.collect(),
            "notes": notes,
            "not_run": not_run,
            "rows": [],
            "sites": {},
        }
        self.screen.print("\n".join(setup_info.lines(self.content["setup"])), markup=False, highlight=False)

    def run(self, suite: str, cases: Iterable[registry.Case], rounds: int, budget: float) -> list[Row]:
        """Run cases one by one; returns their rows."""
        found = []
        for case in cases:
            rows = runner.run_case(suite, case, self.plan, rounds=rounds, budget=budget)
            if case.sites is not None and any(row["status"] == "ok" for row in rows):
                self.content["sites"][case.about["model"]] = case.sites()
            self.add(f"{suite}: {case.name}", rows)
            found += rows
            torch._dynamo.reset()
        return found

    def add(self, title: str, rows: list[Row]) -> None:
        """Keep rows, write the files, show a table."""
        self.content["rows"] += rows
        write(self.content, self.out)
        show(title, rows, self.screen)

    def end(self, start: float) -> int:
        """Print what a reader must not miss. Returns 1 where a result was wrong or an arm failed."""
        rows = self.content["rows"]
        wrong = [row for row in rows if row["status"] in ("wrong", "failed")]
        print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s: {self.out / 'report.html'}")
        for line in self.content["not_run"]:
            print(f"not run: {line}")
        for row in wrong:
            print(f"{row['status']}: {row['case']}, {row['arm']}: {row['reason']}", file=sys.stderr)
        return 1 if wrong else 0


def write(content: dict[str, Any], out: Path) -> None:
    """report.json and report.html."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "report.html").write_text(report_html.render(content))


def show(title: str, rows: list[Row], screen: Console) -> None:
    """The rows of a case as a table in the terminal; absent arms as one line."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("arm", max_width=60)
    names = ("seconds", "speedup", "published_speedup", "density", "error", "distance", "recall", "graphs", "peak_mib")
    names = tuple(name for name in names if any(name in row for row in rows))
    for name in names:
        table.add_column(report_html.COLUMNS[name][0], justify="right")
    table.add_column("")
    for row in rows:
        if row["status"] == "absent":
            continue
        cells = (report_html.COLUMNS[name][1](row[name]) if name in row else "" for name in names)
        table.add_row(row["arm"], *cells, "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}")
    if table.row_count:
        screen.print(table)
    absent = ", ".join(f"{row['arm']} ({row['reason']})" for row in rows if row["status"] == "absent")
    if absent:
        screen.print(f"not here: {absent}", soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 0, or 1 where an arm's result was wrong or a comparison found something slower."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {"compare": _compare, "headline": _headline, "render": _render}
    if argv[:1] and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two lengths and one model: under two minutes")
    parser.add_argument("--suite", nargs="+", choices=SUITES, help="default: all; with --quick: ops and models")
    _common(parser)
    args = parser.parse_args(argv)
    start, plan = time.perf_counter(), registry.Plan(device(), args.quick, args.seed)
    suites = args.suite or list(QUICK if args.quick else SUITES)
    report = Report(plan, args.out, _command(argv), _not_run(suites, plan), _notes(plan))
    rounds, budget = (5, 8.0) if plan.quick else (9, 60.0)
    for name in suites:
        report.run(name, registry.SUITES[name](plan), rounds, budget)
    return report.end(start)


def _headline(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks headline", description=str(headline.__doc__).split("\n", 1)[0]
    )
    parser.add_argument("--model", required=True, choices=list(headline.PROTOCOLS))
    _common(parser)
    args = parser.parse_args(argv)
    start, plan = time.perf_counter(), registry.Plan(device(), seed=args.seed)
    others = [f"headline --model {name}: not asked for" for name in headline.PROTOCOLS if name != args.model]
    command = _command(["headline", *argv])
    title = f"blade: {args.model}, whole generations,"
    report = Report(plan, args.out, command, others, headline.notes(args.model, plan), title)
    steps = report.run("headline", headline.cases(args.model, plan), 7, 180.0)
    rows = headline.generations(args.model, steps)
    head = {"suite": "headline", "case": f"{args.model}, whole generations", "seed": plan.seed}
    head |= suite_models.about(MODELS[args.model], plan) | setup_info.stamp(plan.device)
    report.add(head["case"], [{**head, **row} for row in rows])
    return report.end(start)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "report", help="folder (default: .cache/report)")
    parser.add_argument("--seed", type=int, default=0)


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _command(argv: list[str]) -> str:
    """What to type for the same report: where it was written is the reader's own business."""
    place = argv.index("--out") if "--out" in argv else len(argv)
    return " ".join(["python -m benchmarks", *argv[:place], *argv[place + 2 :]])


def _notes(plan: registry.Plan) -> list[str]:
    notes = ["Weights and attention inputs are random, but for suite fidelity: times don't depend on them, errors do."]
    if plan.device.type == "cpu":
        notes.append(
            "No GPU was at hand: models are scaled down so that a CPU steps through them in seconds. Attention keeps "
            "its share of the FLOPs, to within two points: width and tokens shrink together."
        )
    return notes


def _not_run(suites: list[str], plan: registry.Plan) -> list[str]:
    lines = [f"suite {name}: not asked for" for name in SUITES if name not in suites]
    if plan.quick and "ops" in suites:
        lines.append(
            "--quick: suite ops at other lengths, head dimensions, dtypes, sparsities, blocks, policies, and backward"
        )
    if "models" in suites:
        if plan.quick:
            others = [name for name in MODELS if name not in suite_models.QUICK]
            lines.append(f"--quick: models {', '.join(others)}; other policies")
        else:
            names = [*suite_models.POLICIES][: suite_models.NARROW]
            lines.append(f"models other than {', '.join(suite_models.WIDE)}: policies other than {', '.join(names)}")
        lines.append(
            "models: FlexAttention, whose blocks are only known inside an attention call (suite ops has it); AdaSpa "
            "(headline --model hunyuanvideo)"
        )
    lines += [f"headline --model {name}: a command of its own" for name in headline.PROTOCOLS]
    return lines


def _render(argv: list[str]) -> int:
    """Draw pages anew after a change of how they look; nothing is measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks render", description=_render.__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="each with a report.json")
    for folder in parser.parse_args(argv).folders:
        try:
            compare.load(folder)
        except ValueError as error:
            parser.error(str(error))
        write(json.loads((folder / "report.json").read_text()), folder)
    return 0


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
