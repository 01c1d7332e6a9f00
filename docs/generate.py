"""Fills the tables of these pages from `benchmarks/results`: between `<!-- generated: NAME -->` and `<!-- end -->`.

    python docs/generate.py [--check]

`make docs` does it; a test fails where a page is behind its results.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> Any:
    """A result file's content."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(header)
    lines = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(setup: dict[str, str]) -> str:
    """The line without which a figure means nothing."""
    gpu = f", {setup['gpu']}" if setup.get("gpu", "none") != "none" else ""
    where = f"{setup['cpu']} ({setup['isa']}), threads: {setup['threads']}{gpu}"
    return f"{where}; torch {setup['torch']}; commit {setup['commit']}, {setup['date']}."


def fidelity() -> str:
    """What each policy loses, raster order first."""
    found = load("fidelity")
    model = found["model"]
    about = (
        f"{machine(found['setup'])} Model: {model['layers']} layers, {model['heads']} heads of {model['head_dim']}, "
        f"{model['tokens']} tokens, blocks of {model['block_size']}."
    )
    rows = [
        [
            row["policy"], row["order"], row["sparsity"],
            *(f"{row[key]:.3f}" for key in ("density", "recall")), f"{row['recall'] / row['oracle']:.3f}",
            f"{row['l1']:.3f}",
        ]
        for row in found["policies"]
        if row["sparsity"] in {0.5, 0.8} and (row["order"] == "none" or row["policy"] == "asa")
    ]  # fmt: skip
    return f"{about}\n\n" + table(
        ["policy", "order", "sparsity", "density", "recall", "of oracle", "relative L1"], rows
    )


def speed() -> str:
    """Attention forward on the CPU, at the middle length."""
    found = load("cpu_attention")
    rows = [
        [
            row["dtype"], row["D"], f"{row['S']:,}", row["sparsity"], f"{row['density']:.3f}",
            f"{row['speedup']['median']:.1f}x",
        ]
        for name, part in found["parts"].items()
        if name.startswith("forward")
        for row in part
        if row["S"] == 8192
    ]  # fmt: skip
    return f"{machine(found['setup'])}\n\n" + table(
        ["dtype", "head dim", "tokens", "sparsity", "density", "over dense"], rows
    )


def adaspa() -> str:
    """A generation's steps by what they do."""
    found = load("adaspa")
    by_phase: dict[str, list[dict[str, float]]] = defaultdict(list)
    for step in found["steps"]:
        by_phase[step["phase"]].append(step)
    by_phase["all"] = found["steps"]
    rows = []
    for phase, steps in by_phase.items():
        dense, own = (sum(step[key] for step in steps) for key in ("dense", "adaspa"))
        rows.append([phase, len(steps), f"{dense:.1f}", f"{own:.1f}", f"{dense / own:.2f}x"])
    about = f"{machine(found['setup'])} {found['case'][0].removeprefix('diffusers ')}; {found['case'][2]}."
    return f"{about}\n\n" + table(["steps", "number", "dense, s", "adaspa, s", "dense / adaspa"], rows)


def calibration() -> str:
    """Targets, and what came of them on inputs that the calibration hadn't seen."""
    rows = [
        [row["target"], *(f"{row[key]:.3f}" for key in ("density", "error", "held_out"))]
        for row in load("fidelity")["calibration"]
    ]
    return table(["target", "density", "error when calibrated", "error on other inputs"], rows)


def versions() -> str:
    """What the conformance run was made with, and what the package asks for."""
    found = load("conformance")
    asked = re.findall(r'"(torch[^"]*)"', (DOCS.parent / "pyproject.toml").read_text())[0]
    python = re.findall(r'requires-python = "([^"]*)"', (DOCS.parent / "pyproject.toml").read_text())[0]
    passed = sum(row["outcome"] == "passed" for row in found["rows"])
    ran = found["versions"]
    rows = [
        ["PyTorch", ran["torch"], asked.removeprefix("torch")],
        ["Triton", ran["triton"], "the one that belongs to the PyTorch in use, or none"],
        ["diffusers", ran["diffusers"], "any whose attention is in one of the forms below"],
        ["Python", load("cpu_attention")["setup"]["python"], python],
    ]
    of, device = f"source {found['fingerprint']}", found["about"]["device"]
    line = f"Of {len(found['rows'])} rows {passed} passed; {of}, run on the {device.upper()}."
    if _outdated(found):
        line += (
            " **This is a run of an earlier source**: what came in or changed since is not in the tables below, and "
            f"`{found['command']}` makes them again."
        )
    return f"{line}\n\n" + table(["", "run", "allowed"], rows)


def _outdated(found: dict[str, Any]) -> bool:
    """Whether the files that a table was made from have changed since."""
    if str(DOCS.parent) not in sys.path:
        sys.path.append(str(DOCS.parent))
    from benchmarks.tables import fingerprint

    return bool(found["fingerprint"] != fingerprint(found["sources"]))


def chips() -> str:
    """Chips that every Triton kernel was compiled for, and GPUs that a committed result was made on."""
    by_chip: dict[str, list[bool]] = defaultdict(list)
    for row in load("offline")["rows"]:
        by_chip[re.findall(r"\b(?:sm_?\d+|gfx\w+)", row["kernel"])[0]].append(row["outcome"] == "passed")
    run = sorted(_gpus())
    rows = [[chip, f"{sum(ok)} of {len(ok)}"] for chip, ok in sorted(by_chip.items())]
    lines = ["Results in `benchmarks/results` made on a GPU: " + (", ".join(run) if run else "none") + "."]
    return "\n".join(lines) + "\n\n" + table(["chip", "kernels within their budgets"], rows)


def _gpus() -> set[str]:
    """The GPUs in the set-ups of committed results."""
    found = set()
    for path in RESULTS.rglob("*.json"):
        content = json.loads(path.read_text())
        setup = content.get("setup") if isinstance(content, dict) else None
        if isinstance(setup, dict) and setup.get("gpu", "none") not in {"none", ""}:
            found.add(str(setup["gpu"]))
    return found


def classes() -> str:
    """The cases of the conformance run, by family."""
    families: dict[str, list[list[object]]] = defaultdict(list)
    for row in load("conformance")["rows"]:
        refused = ", ".join(f"{number} {code}" for code, number in row.get("refused", {}).items())
        whole = {True: "yes", False: "no"}.get(row.get("fullgraph"), "")
        passed = "" if row["outcome"] == "passed" else f"**{row['outcome']}**"
        remark = "; ".join(filter(None, [passed, row.get("notes", "")]))
        cells = [f"`{row['case']}`", row.get("calls", ""), row.get("rewritten", ""), refused, whole, remark]
        families[row.get("family", "others")].append(cells)
    header = ["class or case", "attention calls", "sparse", "dense, by code", "one graph", "remarks"]
    parts = [f"### {family}\n\n{table(header, rows)}" for family, rows in sorted(families.items())]
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made for made in (fidelity, speed, adaspa, calibration, versions, chips, classes)
}


def filled(text: str) -> str:
    """A page with its tables made anew."""
    return PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]]()}\n\n{place[3]}", text)


def main() -> int:
    """Write the pages, or say which are behind. Returns 1 for those that are."""
    behind = [path for path in sorted(DOCS.glob("*.md")) if filled(path.read_text()) != path.read_text()]
    for path in behind:
        if "--check" in sys.argv[1:]:
            print(f"docs/{path.name} is behind benchmarks/results; run `make docs`")
        else:
            path.write_text(filled(path.read_text()))
    return int(bool(behind) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
