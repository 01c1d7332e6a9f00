"""Fits the constants of the cost model on this machine.

    python -m benchmarks.calibrate_cost --out my_table.json     # then set BLADE_COST_TABLE=my_table.json
    python -m benchmarks.calibrate_cost --shipped               # every family of kernels/cost_table.json

Times dense SDPA, the block kernel and the prediction on a small grid of sizes, on the GPU if there is one, else on one
thread and by the processor's clock, and solves for the constants (non-negative, least squares of relative errors). The
features are the derivatives of ``cost.expressions`` by each constant: the model and its fit can't part.
``benchmarks.auto_choice`` then checks what the constants decide.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import sympy
import torch
import torch.nn.functional as F

from benchmarks import setup_info, timing
from benchmarks.tables import ROOT
from blade_compile.kernels import cost, cpu_build, dispatch, lists, ops  # noqa: F401 (ops registers the operators)

SHIPPED = ROOT / "kernels/cost_table.json"
CPU = torch.device("cpu")
HEADS = {"cpu": 2, "cuda": 24}  # a GPU has to be full, or the cost is not one of the work
# What torch's own kernels see of the machine, so that an older processor's dense attention is imitated too. Its
# matrix library can't be told: the families of smaller instruction sets hold dense times of a newer machine's library.
IMITATE = {
    "avx512_bf16": {},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "plain": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
NO_COMPILER = {"CXX": "blade-calibrates-without-a-compiler"}
Sizes = dict[str, float]


def grid(device: torch.device = CPU) -> dict[str, list[Sizes]]:
    """Sizes to time, for each of the cost model's three expressions."""
    if device.type == "cuda":
        return _gpu_grid()
    square = [(S, S, D) for D in (64, 128) for S in (128, 256, 512, 1024, 2048, 4096)]
    shapes = [*square, (512, 4096, 128), (4096, 512, 64), (1024, 1024, 40), (1024, 1024, 96)]
    dense = [_sizes(*shape) for shape in shapes]
    attention = [_sizes(*shape, density=d) for shape in shapes for d in ((1.0, 0.25) if shape[0] > 256 else (1.0,))]
    attention += [_sizes(4096, 4096, D, density=d) for D in (64, 128) for d in (0.5, 0.1, 0.04)]
    attention += [
        _sizes(S, S, D, block=b, density=0.25) for D in (64, 128) for b, S in ((64, 2048), (32, 1024), (16, 1024))
    ]
    predict = [_sizes(S, S, D) for D in (64, 128) for S in (512, 2048, 4096, 8192)]
    predict += [
        _sizes(S, S, D, block=b, probe=p)
        for D in (64, 128)
        for b, p, S in ((64, 16, 4096), (128, 8, 4096), (32, 8, 1024))
    ]
    return {"dense": dense, "attention": attention, "predict": predict}


def _gpu_grid() -> dict[str, list[Sizes]]:
    shapes = [(S, S, D) for D in (64, 128) for S in (1024, 2048, 4096, 8192, 16384)]
    shapes += [(1024, 8192, 128), (8192, 1024, 64), (4096, 4096, 40), (4096, 4096, 96)]
    dense = [_sizes(*shape, heads=HEADS["cuda"]) for shape in shapes]
    attention = [{**sizes, "density": d} for sizes in dense for d in (1.0, 0.5, 0.25, 0.1)]
    attention += [{**sizes, "block": 64, "density": d} for sizes in dense for d in (1.0, 0.25)]
    predict = [{**sizes, "block": b} for sizes in dense for b in (64, 128)]
    return {"dense": dense, "attention": attention, "predict": predict}


def _sizes(
    S: int, T: int, D: int, block: int = 128, probe: int = 16, density: float = 1.0, heads: int = HEADS["cpu"]
) -> Sizes:
    return {"B": 1, "H": heads, "S": S, "T": T, "D": D, "block": block, "probe": probe, "density": density}


def call(what: str, sizes: Sizes, dtype: torch.dtype, device: torch.device = CPU) -> tuple[timing.Case, Sizes]:
    """What an expression predicts, as a call, and the sizes with the density that it really has."""
    H, S, T, D, block = (int(sizes[name]) for name in ("H", "S", "T", "D", "block"))
    q, k, v = (torch.randn(1, H, n, D, device=device).to(dtype) for n in (S, T, T))
    if what == "dense":
        return lambda: F.scaled_dot_product_attention(q, k, v), sizes
    if what == "predict":
        probe = int(sizes["probe"])
        return lambda: torch.ops.blade.mask_predict(q, k, sparsity=0.8, block_size=block, probe_tokens=probe), sizes
    nQ, nK = -(-S // block), -(-T // block)
    if sizes["density"] == 1:
        num, idx = lists.full_lists(1, H, nQ, nK, q.device)
    else:
        num, idx = torch.ops.blade.mask_predict(q, k, sparsity=1 - sizes["density"], block_size=block, probe_tokens=4)
    kept = float(num.double().mean()) / nK
    return lambda: torch.ops.blade.block_sparse_attention(q, k, v, num, idx, block_size=block), {
        **sizes,
        "density": kept,
    }


def fit(
    what: str, dtype: torch.dtype, rounds: int, device: torch.device = CPU
) -> tuple[dict[str, float], dict[str, float]]:
    """The constants of one expression, and how far its predictions are off on the grid.

    The latter: median relative error, and the 10th and 90th percentile of predicted / measured.
    """
    rows, seconds = [], []
    # One thread by its own time; what a GPU does is no time of this process.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for wanted in grid(device)[what]:
        case, sizes = call(what, wanted, dtype, device)
        rows.append(sizes)
        seconds.append(timing.paired({"": case}, rounds=rounds, clock=clock)[""].low)
    names, features = _features(what, rows)
    measured = np.array(seconds) * 1e12  # constants are in picoseconds
    solution = nonnegative_least_squares(features / measured[:, None], np.ones(len(measured)))
    ratio = features @ solution / measured
    low, high = np.quantile(ratio, (0.1, 0.9))
    errors = {"median": float(np.median(abs(ratio - 1))), "low": float(low), "high": float(high)}
    return dict(zip(names, map(float, solution), strict=True)), errors


def _features(what: str, rows: list[Sizes]) -> tuple[list[str], np.ndarray]:
    """The expression's constants, and its derivatives by them [rows, constants]."""
    expression = cost.expressions()[what]
    names = [name for name in cost.CONSTANTS if sympy.Symbol(name, positive=True) in expression.free_symbols]
    symbols = [sympy.Symbol(name, positive=True) for name in cost.NAMES]
    slopes = [
        sympy.lambdify(symbols, sympy.diff(expression, sympy.Symbol(name, positive=True)), "math") for name in names
    ]
    return names, np.array([[slope(*(row[n] for n in cost.NAMES)) for slope in slopes] for row in rows], dtype=float)


def nonnegative_least_squares(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solve for the x >= 0 that minimises |A x - b| (Lawson and Hanson 1974, chapter 23). A [m, n], b [m] -> [n]."""
    scale = np.linalg.norm(A, axis=0)
    A = A / scale
    x, free = np.zeros(A.shape[1]), np.zeros(A.shape[1], dtype=bool)
    for _ in range(10 * len(x)):
        gradient = np.where(free, -np.inf, A.T @ (b - A @ x))
        if gradient.max() < 1e-9:
            break
        free[gradient.argmax()] = True
        while True:
            trial = np.zeros_like(x)
            trial[free] = np.linalg.lstsq(A[:, free], b, rcond=None)[0]
            blocked = free & (trial <= 0)
            if not blocked.any():
                break
            step = (x[blocked] / (x[blocked] - trial[blocked])).min()  # as far as the first constant that reaches 0
            x = x + step * (trial - x)
            free &= x > 1e-12
        x = trial
    return x / scale


def calibrate(dtypes: list[torch.dtype], rounds: int, device: torch.device = CPU) -> dict[str, Any]:
    """This process's table entries: family -> setup, constants and errors of the fit, each by dtype."""
    torch.set_num_threads(1)
    info = setup_info.collect()
    where = f"{info['cpu']}, one thread" if device.type == "cpu" else torch.cuda.get_device_name(device)
    setup = (
        f"{where}, torch {info['torch']}, {info['compiler'] if device.type == 'cpu' else 'triton ' + info['triton']}"
    )
    imitated = " ".join(
        f"{name}={os.environ[name]}" for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if name in os.environ
    )
    entries: dict[str, Any] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        family = dispatch.family(device, dtype)
        head = {
            "setup": f"{setup}; {imitated}" if imitated else setup,
            "date": info["date"],
            "constants": {},
            "margin": {},
            "fit": {},
        }
        entry = entries.setdefault(family, head)
        constants: dict[str, float] = {}
        for what in grid(device):
            found, errors = fit(what, dtype, rounds, device)
            constants.update({key: float(f"{value:.4g}") for key, value in found.items()})
            entry["fit"].setdefault(name, {})[what] = {key: round(value, 3) for key, value in errors.items()}
            print(f"{family:18s} {name:9s} {what:9s} off by {errors['median']:.0%} (median), predicted / measured "
                  f"{errors['low']:.2f} to {errors['high']:.2f} (10-90 %)", flush=True)  # fmt: skip
        entry["constants"][name] = constants
        # Block attention may be as much slower, and dense as much faster, than predicted.
        errors = entry["fit"][name]
        entry["margin"][name] = round(min(cost.MARGIN, errors["attention"]["low"] / errors["dense"]["high"]), 2)
    return entries


def merge(path: Path, entries: dict[str, Any]) -> None:
    """Add entries to a table file; dtypes that were not measured now stay."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for family, entry in entries.items():
        before = found.get(family, {})
        for part in ("constants", "margin", "fit"):
            entry[part] = {**before.get(part, {}), **entry[part]}
        found[family] = entry
    path.write_text(json.dumps(found, indent=1) + "\n")


def calibrate_shipped(out: Path, rounds: int) -> None:
    """Every family that this machine can run or imitate, each in a process of its own."""
    kernels = ["float32", "bfloat16", "float16"]
    runs = [({"BLADE_CPU_ISA": isa, **IMITATE[isa]}, kernels) for isa in cpu_build.available_isas()]
    runs.append((NO_COMPILER, [*kernels, "float64"]))
    for environment, dtypes in runs:
        command = [
            sys.executable,
            "-m",
            "benchmarks.calibrate_cost",
            "--device=cpu",
            "--out",
            str(out),
            "--rounds",
            str(rounds),
            "--dtypes",
            *dtypes,
        ]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrate_cost", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--out", type=Path, help="table file to write or add to; name it in BLADE_COST_TABLE")
    parser.add_argument(
        "--shipped", action="store_true", help=f"measure every family, into {SHIPPED.relative_to(ROOT)}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    args = parser.parse_args(argv)
    if not args.out and not args.shipped:
        parser.error("say where to write: --out FILE (or --shipped for the table in this repository)")
    if args.shipped:
        calibrate_shipped(args.out or SHIPPED, args.rounds)
        return
    with torch.no_grad():
        merge(args.out, calibrate([getattr(torch, n) for n in args.dtypes], args.rounds, torch.device(args.device)))
    print(f"written; use it with BLADE_COST_TABLE={args.out}")


if __name__ == "__main__":
    main()
