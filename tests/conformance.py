"""``make conformance``: every transformer class of diffusers, vision blocks and every spelling, compiled and compared.

A row is one case of the zoo, judged by `tests.zoo.judge`. Rows are written as they come into
``benchmarks/results/conformance.json``, and a stopped run goes on where it was as long as neither source nor versions
have changed; ``conformance.md`` beside it is the same for reading. Cases run in worker processes: one that crashes or
hangs costs its own row only.

    python -m tests.conformance [--only NAME ...] [--list] [--again] [--jobs N]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from benchmarks.tables import RESULTS, ROOT, Row, Table, stale

if TYPE_CHECKING:
    from tests.zoo.entry import Entry

NAME = "conformance"
COMMAND = "make conformance"
SOURCES = [
    "kernels/*.py",
    "kernels/*.cpp",
    "kernels/*.h",
    "passes/*.py",
    "blade_compile/*.py",
    "tests/zoo/*.py",
    "tests/passes/spellings.py",
    "tests/conformance.py",
    # The rows are made on the CPU: what runs on accelerators only has tests of its own.
    "!kernels/accelerator.py",
    "!kernels/triton_*.py",
    "!passes/inline.py",
    # Nor do rows depend on what their options never reach: other policies, orders, state over steps, calibration.
    *("!kernels/" + name for name in ("policy_*.py", "carried*.py", "global_*.py", "ops_carried.py", "ops_global.py")),
    *("!kernels/" + name for name in ("*order.py", "schedule.py", "*search.py", "selection.py", "presets.py")),
    *("!kernels/" + name for name in ("block_*.py", "density.py")),
    *("!passes/" + name for name in ("grid.py", "merge_orders.py", "graph_dump.py")),
    *("!blade_compile/" + name for name in ("budgets.py", "calibration.py", "carriers.py", "fidelity.py")),
    *("!blade_compile/" + name for name in ("functional.py", "generations.py", "heat_map.py")),
]
PACKAGES = ["torch", "triton", "diffusers"]
MARK = "row of the conformance table: "
# A worker takes a few cases, so that its imports are paid once; the longest case takes well under this.
BATCH = 6
SECONDS_PER_CASE = 900
# Graphs are compiled afresh in every run; compiled C++ is kept, its name is a hash of its content.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
    "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
    "TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / "inductor"),
    "HF_HUB_OFFLINE": "1",
}


def entries() -> dict[str, Entry]:
    """All cases by name, in the order of the table."""
    from tests.zoo import diffusers_zoo, spelling_entries, vision_blocks

    found = [*diffusers_zoo.ENTRIES, *vision_blocks.ENTRIES, *spelling_entries.ENTRIES]
    return {entry.name: entry for entry in found}


def table() -> Table:
    """The committed table: its rows if it belongs to this source and these versions, else empty."""
    about = {"options": {"when": "always", "block_size": 16, "min_tokens": 1}, "device": "cpu"}
    return Table(NAME, command=COMMAND, sources=SOURCES, packages=PACKAGES, key="case", about=about)


def check_current() -> list[str]:
    """What is wrong with the committed table: missing, stale, incomplete, or with failed rows. Empty where nothing."""
    path = RESULTS / f"{NAME}.json"
    if not path.exists():
        return [f"{path.name} is missing; run `{COMMAND}`"]
    stored = json.loads(path.read_text())
    reason = stale(stored)
    problems = [f"{path.name}: {reason}"] if reason else []
    rows = {row["case"]: row for row in stored["rows"]}
    cases = entries()
    problems += [f"{name} has no row; run `{COMMAND}`" for name in cases if name not in rows]
    problems += [f"{name} has a row but is no case" for name in rows if name not in cases]
    problems += [f"{name}: {'; '.join(row['problems'])}" for name, row in rows.items() if row["outcome"] != "passed"]
    return problems


# --- workers ----------------------------------------------------------------------------------------------------------


def work(names: list[str]) -> None:
    """Judge the named cases in this process and print a row for each."""
    import logging
    import warnings

    from tests.zoo.judge import judge

    warnings.filterwarnings("ignore")
    logging.getLogger("blade_compile").setLevel(logging.ERROR)
    known = entries()
    for name in names:
        _say(MARK + json.dumps(judge(known[name])))


def rows_of(names: list[str]) -> Iterator[Row]:
    """Judge the named cases in worker processes, a new one after each crash or hang."""
    waiting = list(names)
    while waiting:
        for row in _one_worker(waiting):
            waiting.remove(row["case"])
            yield row
        if waiting:
            name = waiting.pop(0)
            yield {"case": name, "outcome": "failed", "problems": ["the process died or hung"]}


def _one_worker(names: list[str]) -> Iterator[Row]:
    """The rows that one process gets done, in the order of `names`."""
    command = [sys.executable, "-m", "tests.conformance", "--worker", *names]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    timer = threading.Timer(SECONDS_PER_CASE, process.kill)
    timer.start()
    for line in process.stdout:
        if line.startswith(MARK):
            timer.cancel()
            yield json.loads(line.removeprefix(MARK))
            timer = threading.Timer(SECONDS_PER_CASE, process.kill)
            timer.start()
    timer.cancel()
    process.wait()


def run(names: list[str], results: Table, jobs: int) -> None:
    """Judge the named cases and put their rows into the table as they come."""
    batches = [names[start : start + BATCH] for start in range(0, len(names), BATCH)]
    lock, done = threading.Lock(), 0

    def one(batch: list[str]) -> None:
        nonlocal done
        for row in rows_of(batch):
            with lock:
                done += 1
                results.put(row)
                _say(f"{done}/{len(names)} {_line(row)}")

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(one, batches):
            pass


def _line(row: Row) -> str:
    text = f"{row['case']}: {row['outcome']}, {row.get('rewritten', '?')} of {row.get('calls', '?')} rewritten"
    return text + "".join(f"\n    {problem}" for problem in row["problems"])


# --- the table for reading --------------------------------------------------------------------------------------------


def markdown(head: Row, rows: dict[str, Row], order: list[str]) -> str:
    """The table as Markdown, one section for each family."""
    listed = [rows[name] for name in order if name in rows]
    passed = sum(row["outcome"] == "passed" for row in listed)
    at = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    lines = [
        "# Conformance",
        "",
        f"{passed} of {len(order)} cases pass. {at}; source {head['fingerprint']}. Made by `{COMMAND}`.",
        "",
        "Each case runs with `when='always'`, `block_size=16`. *calls*: attention calls counted in an eager run;",
        "*rewritten*: how many of them run block-sparse; *left dense*: the others, by the report's code. *error*:",
        "relative to fp64, of plain Inductor and of blade with every block kept (the larger of `sparsity=0` and",
        "`tau=1`); the block kernel's executions are counted and equal the rewritten calls. *change*: relative",
        "difference of the output at `sparsity=0.5`. *whole*: plain Inductor and blade compile with `fullgraph=True`.",
    ]
    family = None
    for row in listed:
        if row.get("family") != family:
            family = row.get("family")
            lines += ["", f"## {family}", "", "| case | calls | rewritten | left dense | whole | error | change | |"]
            lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        lines.append(_markdown_row(row))
    return "\n".join(lines) + "\n"


def _markdown_row(row: Row) -> str:
    refused = ", ".join(f"{count} {code}" for code, count in row.get("refused", {}).items())
    errors: dict[str, Any] = row.get("error", {})
    kept = max((value for name, value in errors.items() if name != "dense"), default=None)
    error = "" if kept is None else f"{errors['dense']:.1e} / {kept:.1e}"
    change = f"{row['change']:.1e}" if row.get("change") is not None else ""
    gradient = row.get("gradient error")
    remarks = [row.get("notes", ""), *(f"**{problem}**" for problem in row["problems"])]
    if "inductor fails" in row:
        remarks.append(f"plain Inductor fails on the CPU, and blade alike: {row['inductor fails']}")
    if gradient:
        remarks.append(f"gradients {gradient['dense']:.1e} / {gradient['sparsity=0']:.1e}")
    whole = {True: "yes", False: "no"}.get(row.get("fullgraph"), "")
    cells = [row["case"], row.get("calls", ""), row.get("rewritten", ""), refused, whole, error, change]
    text = "; ".join(remark for remark in remarks if remark)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in (*cells, text)) + " |"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run what has no passed row yet. Returns 0 where every case has passed."""
    parser = argparse.ArgumentParser(prog="make conformance", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name starts so")
    parser.add_argument("--list", action="store_true", help="list the cases and what their rows say")
    parser.add_argument("--again", action="store_true", help="run cases that have passed already too")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return 0
    results, order = table(), list(entries())
    names = [name for name in order if not options.only or name.startswith(tuple(options.only))]
    if options.list:
        for name in names:
            _say(_line(results.rows[name]) if name in results.rows else f"{name}: not run")
        return 0
    results.keep_only(order)
    due = [n for n in names if options.again or results.rows.get(n, {}).get("outcome") != "passed"]
    run(due, results, options.jobs)
    (RESULTS / f"{NAME}.md").write_text(markdown(results.head, results.rows, order))
    failed = [name for name in names if results.rows[name]["outcome"] != "passed"]
    _say(f"{len(names) - len(failed)} of {len(names)} cases passed; {results.path.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
