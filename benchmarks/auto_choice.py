"""What the cost model decides beside what is measured: ``when="auto"`` must never be slower than dense attention.

    python -m benchmarks.auto_choice [--threads 1 2] [--clock cpu] [--out DIR]

Sizes that the calibration did not see. Each is timed, interleaved, as dense SDPA, as the operator under ``auto`` and
with ``always``, on one thread and on all. Writes ``auto_choice.json`` and ``auto_choice.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import setup_info, timing
from benchmarks.attention_report import table
from benchmarks.tables import ROOT
from blade_compile.kernels import cost, dispatch, ops  # noqa: F401 (registers the operators)

HEADS, BLOCK, PROBE, MIN_TOKENS = 2, 128, 16, 2048  # all but the heads are the defaults of BladeConfig
NOISE = 0.05  # a repeated measurement of one call differs by this much
# (S, T, D, sparsity): from `min_tokens` up; lengths that are no multiple of a block; S unlike T. The first two lie
# below `min_tokens`: there the operator runs dense attention at some cost of its own, if it was inserted at all (it is
# only where lengths are dynamic).
SIZES = [
    (512, 512, 128, 0.8),
    (1024, 1024, 128, 0.8),
    *((S, S, D, s) for S in (2048, 3072) for D in (64, 128) for s in (0.2, 0.5, 0.9)),
    (128, 4096, 128, 0.8),
    (300, 2300, 64, 0.8),
    (2100, 2100, 40, 0.5),
    (1000, 3000, 96, 0.8),
    (2048, 2048, 256, 0.8),
    (6144, 6144, 128, 0.8),
]
Row = dict[str, Any]


def measure(size: tuple[int, int, int, float], dtype: torch.dtype, rounds: int, clock: Any) -> Row:
    """One size on the current number of threads."""
    S, T, D, sparsity = size
    q, k, v = (torch.randn(1, HEADS, n, D).to(dtype) for n in (S, T, T))
    settings = {"sparsity": sparsity, "block_size": BLOCK, "probe_tokens": PROBE}
    cases = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "auto": lambda: torch.ops.blade.sparse_sdpa(q, k, v, **settings, when="auto"),
        "always": lambda: torch.ops.blade.sparse_sdpa(q, k, v, **settings),
    }
    times = timing.paired(cases, rounds=rounds, clock=clock, budget=20)
    sizes = (1, HEADS, S, T, D, BLOCK)
    family, name = dispatch.family(q.device, dtype), str(dtype).removeprefix("torch.")
    nK = -(-T // BLOCK)
    kept = max(1, int((1 - sparsity) * nK + 1e-6)) / nK
    named = dict(zip(cost.NAMES[:6], sizes, strict=True), probe=PROBE)
    predicted = cost.seconds(family, name, "dense", **named, density=1.0) / sum(
        cost.seconds(family, name, what, **named, density=kept) for what in ("attention", "predict")
    )
    return {
        "dtype": name,
        "S": S,
        "T": T,
        "D": D,
        "sparsity": sparsity,
        "threads": torch.get_num_threads(),
        "choice": dispatch.decide(q, k, BLOCK, PROBE, kept) if T >= MIN_TOKENS else "too short",
        "predicted": round(predicted, 2),
        "always": times["dense"].over(times["always"]).summary(2),
        "auto": times["dense"].over(times["auto"]).summary(2),
    }


def markdown(content: dict[str, Any]) -> str:
    """Setup, the worst case of each thread count, every row."""
    rows: list[Row] = content["rows"]
    lines = ['# What `when="auto"` chooses', "", *(f"- {line}" for line in setup_info.lines(content["setup"]))]
    lines += [f"- made by `{content['command']}`; speed-ups over dense SDPA, median of interleaved rounds", ""]
    for threads in sorted({row["threads"] for row in rows}):
        mine = [row for row in rows if row["threads"] == threads]
        worst = min(mine, key=lambda row: row["auto"]["median"])
        slower = sum(row["auto"]["high"] < 1 - NOISE for row in mine)
        where = f"S={worst['S']}, T={worst['T']}, D={worst['D']}, {worst['dtype']}"
        lines += [
            f"- {threads} thread(s): `auto` at its worst runs at {worst['auto']['median']:.2f}x dense ({where}); it is",
            f"  slower than dense beyond {NOISE:.0%} in {slower} of {len(mine)} cases",
        ]
    head = (
        "dtype",
        "S",
        "T",
        "D",
        "sparsity",
        "threads",
        "chosen",
        "sparse, predicted",
        "sparse, measured",
        "auto, measured",
    )
    first = ("dtype", "S", "T", "D", "sparsity", "threads", "choice")
    cells = []
    for r in rows:
        auto = f"{r['auto']['median']:.2f}x ({r['auto']['low']:.2f}-{r['auto']['high']:.2f})"
        cells.append((*(r[key] for key in first), f"{r['predicted']:.2f}x", f"{r['always']['median']:.2f}x", auto))
    return "\n".join([*lines, "", *table(head, cells)]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.auto_choice", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, setup_info.usable_cores()}))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="three rounds of every third size")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread on a busy machine"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args(argv)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    sizes, rounds = (SIZES[::3], 3) if args.quick else (SIZES, args.rounds)
    info, rows = setup_info.collect(), []
    with torch.no_grad():
        for threads in args.threads:
            torch.set_num_threads(threads)
            for dtype in args.dtypes:
                rows += [measure(size, getattr(torch, dtype), rounds, clock) for size in sizes]
    content = {"command": "python -m benchmarks.auto_choice", "setup": info, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "auto_choice.json").write_text(json.dumps(content, indent=1) + "\n")
    (args.out / "auto_choice.md").write_text(markdown(content))
    print(markdown(content))


if __name__ == "__main__":
    main()
