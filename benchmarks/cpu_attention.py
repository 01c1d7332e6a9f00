"""Attention on the CPU: blade beside dense SDPA and beside compiled FlexAttention on the same blocks, in one run.

    python -m benchmarks.cpu_attention [--quick] [--fresh] [--threads N] [--out DIR]

Every figure of a group (dtype, head dim, length) comes from the same interleaved rounds; each result is compared with
fp64 before it is timed. A stopped run goes on where it was. Writes ``cpu_attention.json`` and ``cpu_attention.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import setup_info, timing
from benchmarks.attention_gate import Problem, backward_gate, forward_gate
from benchmarks.attention_report import markdown
from benchmarks.gpu_cases import flex_options
from benchmarks.peak import Peak
from benchmarks.tables import ROOT, fingerprint
from blade_compile.kernels import ops  # noqa: F401 (registers the operators)

HEADS, BLOCK = 2, 128
LENGTHS, DIMS, DTYPES, SPARSITIES = (
    (2048, 4096, 8192, 16384),
    (64, 128),
    (torch.float32, torch.bfloat16),
    (0.0, 0.5, 0.8, 0.9),
)
BUDGET = 60.0  # seconds of rounds for one group
SOURCES = ("kernels/*.cpp", "kernels/*.h", "kernels/*.py", "benchmarks/attention_*.py", "benchmarks/cpu_attention.py")
Row = dict[str, Any]


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``float32``."""
    return str(dtype).removeprefix("torch.")


def inputs(S: int, D: int, dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """Normal q, k, v (and more) [1, HEADS, S, D]."""
    generator = torch.Generator().manual_seed(S + D)
    return [torch.randn(1, HEADS, S, D, generator=generator).to(dtype) for _ in range(count)]


def problem(S: int, D: int, dtype: torch.dtype, sparsity: float) -> Problem:
    """Inputs with the lists that blade predicts for them."""
    q, k, v = inputs(S, D, dtype)
    num, idx = torch.ops.blade.mask_predict(q, k, sparsity=sparsity, block_size=BLOCK)
    return Problem(q, k, v, num, idx, BLOCK)


def flex_call(p: Problem) -> Callable[[], Tensor]:
    """Compiled FlexAttention over the same blocks: all of them as full blocks, so that no mask function runs."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    zeros = torch.zeros_like(p.num), torch.zeros_like(p.idx)  # of their own: one tensor given twice breaks its template
    lengths = (p.q.shape[2], p.k.shape[2])
    mask = BlockMask.from_kv_blocks(*zeros, p.num, p.idx, BLOCK_SIZE=p.block, seq_lengths=lengths)
    compiled = torch.compile(flex_attention, dynamic=False)
    options = flex_options(p.block) if p.q.is_cuda else None
    return lambda: compiled(p.q, p.k, p.v, block_mask=mask, kernel_options=options)


def forward_group(
    S: int, D: int, dtype: torch.dtype, *, sparsities: tuple[float, ...], rounds: int, peak: Peak
) -> list[Row]:
    """One row for each sparsity, all measured in the same rounds."""
    problems = {s: problem(S, D, dtype, s) for s in sparsities}
    full = problem(S, D, dtype, 0.0)
    peak_call, peak_flops = peak.case(dtype)
    cases: dict[str, timing.Case] = {
        "dense": lambda: F.scaled_dot_product_attention(full.q, full.k, full.v),
        "peak": peak_call,
    }
    gates = {"dense": forward_gate(full, strict=False)}
    for s, p in problems.items():
        blade, attend = f"blade {s}", f"attend {s}"
        cases[blade] = lambda p=p, s=s: torch.ops.blade.sparse_sdpa(p.q, p.k, p.v, sparsity=s, block_size=BLOCK)
        cases[attend] = lambda p=p: torch.ops.blade.block_sparse_attention(
            p.q, p.k, p.v, p.num, p.idx, block_size=BLOCK
        )[0]
        gates[blade] = gates[attend] = forward_gate(p)
        if s > 0:  # at density one FlexAttention is dense attention with another name
            cases[f"predict {s}"] = lambda p=p, s=s: torch.ops.blade.mask_predict(
                p.q, p.k, sparsity=s, block_size=BLOCK
            )
            cases[f"flex {s}"] = flex_call(p)
            gates[f"flex {s}"] = forward_gate(p, strict=False)
    errors: dict[str, float] = {}

    def gate(name: str, result: Any) -> None:
        if name in gates:
            errors[name] = gates[name](result)

    times = timing.paired(cases, rounds=rounds, gate=gate, budget=BUDGET)
    peak_rate = peak_flops / times["peak"].median
    head = {"dtype": name_of(dtype), "D": D, "S": S}
    return [{**head, **_forward_row(s, problems[s], times, errors, peak_rate)} for s in sparsities]


def _forward_row(
    s: float, p: Problem, times: dict[str, timing.Timing], errors: dict[str, float], peak_rate: float
) -> Row:
    dense, blade, attend = times["dense"], times[f"blade {s}"], times[f"attend {s}"]
    rate = p.flops / attend.median
    row: Row = {
        "sparsity": s,
        "density": round(p.kept_blocks / (HEADS * p.num_blocks**2), 4),
        "dense_ms": round(dense.median * 1e3, 3),
        "blade_ms": round(blade.median * 1e3, 3),
        "speedup": dense.over(blade).summary(2),
        "gflops": round(rate * 1e-9, 1),
        "peak_gflops": round(peak_rate * 1e-9, 1),
        "peak_share": round(rate / peak_rate, 3),
        "error": float(f"{errors[f'blade {s}']:.1e}"),
        "dense_error": float(f"{errors['dense']:.1e}"),
    }
    if f"flex {s}" in times:
        flex, predict = times[f"flex {s}"], times[f"predict {s}"]
        row["predict_share"] = round(predict.over(dense).median, 4)
        row["flex_ms"] = round(flex.median * 1e3, 3)
        row["over_flex"] = flex.over(attend).summary(2)
        row["over_flex_with_prediction"] = flex.over(blade).summary(2)
    return row


def scaling_row(S: int, D: int, dtype: torch.dtype, threads: int, rounds: int) -> Row:
    """One thread against all: blade with prediction, and dense."""
    p = problem(S, D, dtype, 0.8)

    def on(count: int, case: timing.Case) -> timing.Case:
        def run() -> Any:
            torch.set_num_threads(count)
            return case()

        return run

    blade = lambda: torch.ops.blade.sparse_sdpa(p.q, p.k, p.v, sparsity=0.8, block_size=BLOCK)  # noqa: E731
    dense = lambda: F.scaled_dot_product_attention(p.q, p.k, p.v)  # noqa: E731
    calls = {"blade": blade, "dense": dense}
    cases = {f"{name} {n}": on(n, call) for name, call in calls.items() for n in (1, threads)}
    check = forward_gate(p)
    times = timing.paired(
        cases, rounds=rounds, gate=lambda name, out: check(out) if "blade" in name else None, budget=BUDGET
    )
    torch.set_num_threads(threads)
    gains = {name: times[f"{name} 1"].over(times[f"{name} {threads}"]).summary(2) for name in calls}
    return {"dtype": name_of(dtype), "D": D, "S": S, "threads": threads, **gains}


def backward_row(S: int, D: int, dtype: torch.dtype, rounds: int) -> Row:
    """The backward operators alone: blade's at sparsity 0.8 against dense SDPA's."""
    p = problem(S, D, dtype, 0.8)
    grad_out = inputs(S, D, dtype, 4)[3]
    out, lse = torch.ops.blade.block_sparse_attention(p.q, p.k, p.v, p.num, p.idx, block_size=BLOCK)
    aten = torch.ops.aten
    dense_out, dense_lse = aten._scaled_dot_product_flash_attention_for_cpu(p.q, p.k, p.v)
    cases = {
        "dense": lambda: aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, p.q, p.k, p.v, dense_out, dense_lse, 0.0, False
        ),
        "blade": lambda: torch.ops.blade.block_sparse_attention_backward(
            grad_out, None, p.q, p.k, p.v, out, lse, p.num, p.idx, block_size=BLOCK
        ),
    }
    check, errors = backward_gate(p, grad_out), []

    def gate(name: str, grads: Any) -> None:
        if name == "blade":
            errors.append(check(grads))

    times = timing.paired(cases, rounds=rounds, gate=gate, budget=BUDGET)
    return {
        "dtype": name_of(dtype),
        "D": D,
        "S": S,
        "sparsity": 0.8,
        "dense_ms": round(times["dense"].median * 1e3, 2),
        "blade_ms": round(times["blade"].median * 1e3, 2),
        "speedup": times["dense"].over(times["blade"]).summary(2),
        "gflops": round(2.5e-9 * p.flops / times["blade"].median, 1),  # five products for the forward's two
        "error": float(f"{errors[0]:.1e}"),
    }


def plan(quick: bool, threads: int) -> Iterator[tuple[str, Callable[[Peak], list[Row]]]]:
    """Names and calls of the parts of a run, in order."""
    lengths, dims, sparsities = ((2048,), (128,), (0.0, 0.8)) if quick else (LENGTHS, DIMS, SPARSITIES)
    rounds, long = (3, 2048) if quick else (7, 8192)
    for dtype in DTYPES:
        for D in dims:
            for S in lengths:
                name = f"forward {name_of(dtype)} D={D} S={S}"
                yield (
                    name,
                    lambda peak, a=(S, D, dtype): forward_group(*a, sparsities=sparsities, rounds=rounds, peak=peak),
                )
    for dtype in DTYPES:
        for D in dims:
            yield f"backward {name_of(dtype)} D={D}", lambda _, a=(long, D, dtype): [backward_row(*a, rounds)]
            if threads > 1:
                yield (
                    f"scaling {name_of(dtype)} D={D}",
                    lambda _, a=(long, D, dtype): [scaling_row(*a, threads, rounds)],
                )


class Results:
    """``cpu_attention.json``, written after each part, valid for one source and one setup."""

    def __init__(self, folder: Path, info: dict[str, str], *, fresh: bool) -> None:
        self.path = folder / "cpu_attention.json"
        passing = ("date", "commit", "load")
        key = {"sources": fingerprint(SOURCES), **{k: v for k, v in info.items() if k not in passing}}
        self.content: dict[str, Any] = {
            "command": "python -m benchmarks.cpu_attention",
            "key": key,
            "setup": info,
            "parts": {},
        }
        if self.path.exists() and not fresh:
            found = json.loads(self.path.read_text())
            if found["key"] == key:
                self.content = found

    def put(self, part: str, rows: list[Row]) -> None:
        """Store a part and write both files."""
        self.content["parts"][part] = rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(markdown(self.content))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_attention", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="one length and head dim: a minute, into .cache/benchmarks"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what a stopped run has measured")
    parser.add_argument("--threads", type=int, default=setup_info.usable_cores(), help="default: every core")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: benchmarks/results)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 256  # FlexAttention is compiled for each shape, as a user's would be
    info = setup_info.collect()
    results = Results(
        args.out or ROOT / (".cache/benchmarks" if args.quick else "benchmarks/results"), info, fresh=args.fresh
    )
    print(*setup_info.lines(info), sep="\n")
    peak, start = Peak(), time.perf_counter()
    with torch.no_grad():
        for part, measure in plan(args.quick, args.threads):
            if part not in results.content["parts"]:
                results.put(part, measure(peak))
            print(f"{time.perf_counter() - start:5.0f} s  {part}", flush=True)
    print(results.path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
