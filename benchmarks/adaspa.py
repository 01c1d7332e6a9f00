"""AdaSpa over a whole generation beside dense attention: time per step, and what the searches cost.

    python -m benchmarks.adaspa [--small] [--steps 50] [--out DIR]

The same Wan transformer compiled by plain Inductor and by blade with ``policy="adaspa"`` walks through a generation, a
dense and a sparse step in turns. A gate before the clock: the first, dense steps of both agree. Then the searches alone
are timed on one layer's tensors beside dense attention. Random weights: times don't depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import blade_compile
from benchmarks import setup_info, timing, wan
from benchmarks.attention_report import table
from benchmarks.demo import default_dtype
from benchmarks.tables import RESULTS
from blade_compile.config import BladeConfig
from blade_compile.fidelity import relative_error
from blade_compile.kernels import dense, search
from blade_compile.kernels.schedule import Phase
from blade_compile.settings import settings_of
from blade_compile.site_runs import site_runner

Row = dict[str, Any]
ROUNDS = 5


@torch.no_grad()
def walk(case: wan.Case, dtype: torch.dtype, device: str, steps: int, options: dict[str, Any]) -> Row:
    """Seconds of every step of a generation, dense and sparse, and the phase of each."""
    model, inputs = case.build(dtype, device), case.inputs(dtype, device)
    plain = torch.compile(deepcopy(model), backend="inductor")
    sparse = torch.compile(model, backend="blade", options=options)
    want = plain(**inputs)[0]
    with blade_compile.generation(1):  # compiles; a generation of one step is a dense one
        got = sparse(**inputs)[0]
    error = relative_error(got, want)
    if not error < 0.02:
        raise AssertionError(f"a dense step of both differs by {error:.3g}: nothing is timed")
    schedule, seconds = BladeConfig.of(options).schedule, []
    with blade_compile.generation(steps):
        for step in range(1, steps + 1):
            inputs["timestep"].fill_(round(1000 * (1 - (step - 1) / steps)))
            pair = {name: _seconds(run, inputs) for name, run in (("dense", plain), ("adaspa", sparse))}
            seconds.append({"step": step, "phase": schedule.phase("adaspa", step, steps).name.lower(), **pair})
    return {"gate": error, "steps": seconds, "search": searches(model, inputs, options)}


def _seconds(run: Callable[..., Any], inputs: Row) -> float:
    start = time.perf_counter()
    run(**inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def searches(model: torch.nn.Module, inputs: Row, options: dict[str, Any]) -> Row:
    """The two searches on the first layer's tensors, as shares of one dense attention there."""
    config = BladeConfig.of(options)
    found: list[tuple[Tensor, ...]] = []

    def keep(_: str, op: Callable[..., Tensor], args: tuple[Any, ...], kwargs: Row) -> Tensor:
        if not found:
            found.append(tuple(x.clone() for x in args[:3]))
        return op(*args, **kwargs)

    with site_runner(model, settings_of(config)) as runner:
        runner.run(keep, (), inputs)
    q, k, v = found[0]
    scale = q.shape[-1] ** -0.5
    lse = search.lse_and_block_sums(q, k, None, scale, config.block)[0]
    times = timing.paired(
        {
            "dense": lambda: dense.attention(q, k, v, None, scale),
            "first": lambda: search.lse_and_block_sums(q, k, None, scale, config.block),
            "cached": lambda: search.block_sums(q, k, lse, None, scale, config.block),
        },
        rounds=ROUNDS,
    )
    return {name: times[name].over(times["dense"]).summary(3) for name in ("first", "cached")}


def markdown(report: Row) -> list[str]:
    """The report for reading."""
    steps, found = report["steps"], report["search"]
    lines = ["# AdaSpa over a generation", "", *setup_info.lines(report["setup"]), "", *report["case"], ""]
    rows = []
    for phase in [p.name.lower() for p in Phase]:
        own = [row for row in steps if row["phase"] == phase]
        if own:
            each = [statistics.median(row[name] for row in own) for name in ("dense", "adaspa")]
            ratio = statistics.median(row["dense"] / row["adaspa"] for row in own)
            rows.append([phase, len(own), *(f"{s:.3f}" for s in each), f"{ratio:.2f}x"])
    total = {name: sum(row[name] for row in steps) for name in ("dense", "adaspa")}
    rows.append(["all", len(steps), *(f"{s:.1f}" for s in total.values()), f"{total['dense'] / total['adaspa']:.2f}x"])
    lines += table(("steps", "number", "dense, s", "adaspa, s", "paired ratio"), rows)
    cost = (found["first"]["median"] + found["cached"]["median"] * report["later_searches"]) / len(steps)
    said = (
        f"A first search takes {found['first']['median']:.2f} of one dense attention, a later one from the cached LSE "
        f"{found['cached']['median']:.2f}; together {100 * cost:.1f} % of {len(steps)} dense attentions (aim: 5 %)."
    )
    return [*lines, "", said, ""]


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaspa", description=str(__doc__).split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a shorter video")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report (default: benchmarks/results)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = wan.SMALL if args.small else wan.REAL if device == "cuda" else wan.THIRD
    dtype, options = default_dtype(device), {"policy": "adaspa", "when": "always"}
    report = {"setup": setup_info.collect(), "case": [*case.describe(), f"{dtype}, {options}"], "options": options}
    report |= walk(case, dtype, device, args.steps, options)
    report["later_searches"] = sum(row["phase"] == "refresh" for row in report["steps"])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "adaspa.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "adaspa.md").write_text("\n".join(markdown(report)))
    print("\n".join(markdown(report)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
