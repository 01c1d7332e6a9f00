"""Attention on a GPU: tests first, then blade beside every dense SDPA and FlexAttention, in at most eight minutes.

    python -m benchmarks.gpu [--out DIR] [--seconds 480] [--only NAME] [--no-tests]

Runs from the repo root without an installation and downloads nothing. A failing test ends it before anything is
timed. Parts that the time doesn't reach are listed as not run. Writes ``gpu.json``, ``gpu.md`` and ``tests.log``.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_cases, setup_info, timing
from benchmarks.gpu_problem import SHAPES, Shape
from benchmarks.gpu_report import markdown
from benchmarks.tables import ROOT, fingerprint

TESTS = ("tests/gpu/test_*.py", "tests/kernels/test_accelerator.py", "tests/kernels/test_triton_*.py")
SOURCES = ("kernels/*.py", "kernels/*.json", "benchmarks/gpu*.py", "benchmarks/timing.py")
ROUNDS = 5
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,driver_version"
Row = dict[str, Any]


@dataclass
class Budget:
    """Seconds for the whole run. A part starts only if what it is expected to take is left."""

    seconds: float
    clock: Callable[[], float] = time.perf_counter
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (self.clock() - self.start)


@dataclass(frozen=True)
class Part:
    """Rows of one shape and direction, and the seconds they are expected to take."""

    name: str
    seconds: float
    run: Callable[[], list[Row]]


def plan(shapes: Iterable[Shape] = SHAPES) -> Iterator[Part]:
    """Forward and backward of each shape, in the order of the shapes."""
    for shape in shapes:
        # Six calls of each case; all cases together are some eight dense passes, here at a careful 300 TFLOP/s. The
        # rest is compiling: FlexAttention's kernels and ours.
        forward = 25 + 6 * 8 * shape.dense_flops / 3e14
        yield Part(f"forward, {shape.name}", forward, functools.partial(gpu_cases.forward_rows, shape, measure))
        backward = 25 + 6 * 8 * gpu_cases.BACKWARD_FLOPS * shape.dense_flops / 3e14
        yield Part(f"backward, {shape.name}", backward, functools.partial(gpu_cases.backward_rows, shape, measure))


def measure(cases: gpu_cases.Cases) -> dict[str, timing.Timing]:
    """Interleaved rounds; at least three, more within 20 seconds."""
    return timing.paired(cases, rounds=ROUNDS, budget=20)


def run_parts(parts: Iterable[Part], budget: Budget, put: Callable[[str, list[Row]], None]) -> dict[str, str]:
    """Run what the budget allows; returns the parts without rows, and why."""
    missing: dict[str, str] = {}
    for part in parts:
        if budget.left() < part.seconds:
            missing[part.name] = f"{part.seconds:.0f} s expected, {max(budget.left(), 0):.0f} s left"
            continue
        try:
            put(part.name, part.run())
        except Exception as error:  # noqa: BLE001 (one shape that fails must not cost the others)
            missing[part.name] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return missing


def run_tests(log: Path, seconds: float, run: Callable[..., Any] = subprocess.run) -> str:
    """Run the GPU's tests; returns why the run must not go on, or an empty string."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow"]
    command += sorted(str(path.relative_to(ROOT)) for pattern in TESTS for path in ROOT.glob(pattern))
    if importlib.util.find_spec("xdist"):
        # Most of the time is Triton compiling, on the host.
        command += ["-n", str(min(8, setup_info.usable_cores()))]
    try:
        done = run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1), check=False)
    except subprocess.TimeoutExpired:
        return f"the GPU tests took longer than {seconds:.0f} s"
    log.write_text(done.stdout + done.stderr)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return "" if done.returncode == 0 else f"the GPU tests failed ({last}); see {log}"


def setup() -> dict[str, str]:
    """GPU, driver, versions and commit. The source's fingerprint names it also where there is no git."""
    properties = torch.cuda.get_device_properties(0)
    try:
        commit = setup_info._commit()
    except OSError:
        commit = "unknown"
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory_gib": f"{properties.total_memory / 2**30:.0f}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": setup_info._version("triton"),
        "python": platform.python_version(),
        "commit": commit,
        "source": fingerprint(SOURCES),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def clocks() -> dict[str, str]:
    """Clocks, power and temperature as the driver reports them now; nothing where it can't be asked."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", f"--id={setup_info.driver_id(0)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCKS.split(","), done.stdout.strip().split(", "), strict=False))


class Results:
    """``gpu.json`` and ``gpu.md``, written after each part."""

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.content = folder / "gpu.json", {**content, "rows": [], "missing": {}}

    def put(self, part: str, rows: list[Row]) -> None:
        """Add a part's rows, each with the clocks just read."""
        now = clocks()
        self.content["rows"] += [{**row, "clocks": now} for row in rows]
        self.write()
        print(f"{time.strftime('%H:%M:%S')}  {part}: {len(rows)} rows", flush=True)

    def write(self) -> None:
        """Write both files."""
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(markdown(self.content))


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 1 where a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=str(__doc__).split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".cache/benchmarks/gpu", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=480, help="for everything, the tests included (default: 480)")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--no-tests", action="store_true", help="for tuning; the report then says so")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device, and torch sees none here. Nothing was measured.")
    budget = Budget(args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.no_tests and (why := run_tests(args.out / "tests.log", args.seconds * 0.6)):
        sys.exit(f"No report: {why}.")
    torch._dynamo.config.recompile_limit = 256  # FlexAttention is compiled for each shape, as a user's would be
    command = f"python -m benchmarks.gpu{' --no-tests' if args.no_tests else ''}"
    results = Results(args.out, {"command": command, "tested": not args.no_tests, "setup": setup()})
    with torch.no_grad():
        parts = [part for part in plan() if args.only in part.name]
        results.content["missing"] = run_parts(parts, budget, results.put)
    results.content["seconds"] = round(args.seconds - budget.left())
    results.write()
    print(results.path.with_suffix(".md").read_text())
    return int(any(why.startswith("failed") for why in results.content["missing"].values()))


if __name__ == "__main__":
    sys.exit(main())
