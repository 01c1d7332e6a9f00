"""``make demo``: a Wan video transformer compiled by plain Inductor and by blade, and compared.

    python -m benchmarks.demo [--dtype float32|bfloat16] [--sparsity 0.8] [--steps 5] [--small] [--out FILE]

On a CUDA machine the model is Wan2.1-1.3B as published; elsewhere one a third as wide, on a video with a third of the
tokens, so that attention has the same share of the work. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from benchmarks import setup_info, timing, wan
from blade_compile.kernels import cpu_build

Result = dict[str, Any]
BUDGET = 120.0  # seconds of timed steps: on a slow machine three pairs have to do


class Screen:
    """Progress bars on a terminal, a line for each finished task elsewhere."""

    def __init__(self) -> None:
        self.console = Console()
        self.live = self.console.is_terminal
        if not self.live:
            self.console = Console(width=160)

    def say(self, *lines: str) -> None:
        """Print lines as they are."""
        for line in lines:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def task(
        self, title: str, work: Callable[[Callable[[int], None]], Any], total: int | None = None
    ) -> tuple[Any, float]:
        """Run ``work(advance)``; return what it returns and its seconds. ``advance(done)`` moves the bar."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        start = time.perf_counter()
        with Progress(*columns, console=self.console, transient=True, disable=not self.live) as progress:
            bar = progress.add_task(title, total=total)
            result = work(lambda done: progress.update(bar, completed=done))
        seconds = time.perf_counter() - start
        self.say(f"{seconds:7.1f} s  {title}")
        return result, seconds


def default_dtype(device: str) -> torch.dtype:
    """bf16, the format of the published weights, where the machine computes in it; else fp32."""
    fast = device == "cuda" or cpu_build.loaded_isa() == "avx512_bf16"
    return torch.bfloat16 if fast else torch.float32


def compiled(
    model: nn.Module, inputs: dict[str, Any], backend: str, options: dict[str, Any]
) -> tuple[Callable[..., Any], Tensor]:
    """The compiled model after its first call, with empty caches: what a first-time user waits for. And its output."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        run = torch.compile(model, backend=backend, options=options or None)
        return run, run(**inputs)[0]


def wake_compiler() -> None:
    """Compile something small first: neither contender pays for starting Inductor and its workers."""
    compiled_add = torch.compile(lambda x: (x * 2 + 1).sum(), backend="inductor")
    compiled_add(torch.ones(64))


def compare(
    case: wan.Case, dtype: torch.dtype, device: str, options: dict[str, Any], steps: int, screen: Screen
) -> Result:
    """Compile both ways, explain, time, and measure the difference of the outputs."""
    import blade_compile

    (model, inputs), _ = screen.task(
        "build the model", lambda _: (case.build(dtype, device), case.inputs(dtype, device))
    )
    screen.task("start the compiler", lambda _: wake_compiler())
    contenders = {"inductor": {}, "blade": options}
    runs, outputs, first = {}, {}, {}
    for backend, settings in contenders.items():
        # A copy each: a compiled module must not see what was compiled for the other one.
        work = lambda _, b=backend, s=settings: compiled(deepcopy(model), inputs, b, s)  # noqa: E731
        (runs[backend], outputs[backend]), first[backend] = screen.task(f"compile with {backend}, first step", work)
    report, _ = screen.task("explain", lambda _: blade_compile.explain(runs["blade"], **inputs))
    cases = {backend: lambda run=run: run(**inputs) for backend, run in runs.items()}
    title = f"time {steps} alternating pairs of steps"
    times, _ = screen.task(
        title, lambda advance: timing.paired(cases, rounds=steps, on_round=advance, budget=BUDGET), total=steps
    )
    densities = [site.density for site in report.sites if site.density is not None]
    dense, blade = (outputs[name].double() for name in ("inductor", "blade"))
    return {
        "report": report,
        "first_step": first,
        "compile": {name: max(0.0, first[name] - times[name].median) for name in first},
        "step": {name: times[name].summary(4) for name in times},
        "speedup": times["inductor"].over(times["blade"]).summary(3),
        "density": sum(densities) / len(densities) if densities else None,
        "error": float((blade - dense).norm() / dense.norm()),
    }


def show(result: Result, screen: Screen) -> None:
    """The site table, then dense beside blade."""
    screen.say("", "Attention sites, as blade_compile.explain gives them", "")
    if screen.live:
        screen.console.print(result["report"])
    else:
        screen.say(str(result["report"]))
    screen.say("", "Dense beside blade", "")
    table = Table(box=box.ROUNDED if screen.live else None, pad_edge=screen.live)
    for column in ("", "Inductor (dense)", "blade"):
        table.add_column(column)
    step, speedup = result["step"], result["speedup"]
    table.add_row("compile (cold caches)", *(f"{result['compile'][name]:.1f} s" for name in step))
    spans = (f"{t['median']:.3f} s  (20-80 %: {t['low']:.3f}-{t['high']:.3f})" for t in step.values())
    table.add_row("one denoising step, median", *spans)
    table.add_row(
        "speed-up per step, paired", "1", f"{speedup['median']:.2f}x  ({speedup['low']:.2f}-{speedup['high']:.2f})"
    )
    density = "none runs sparse" if result["density"] is None else f"{result['density']:.3f}"
    table.add_row("density of sparse sites", "1", density)
    table.add_row("output error, relative L2", "0", f"{result['error']:.2e}")
    screen.console.print(table)
    screen.say(
        "Weights are random. Times don't depend on them; the error does. Random weights attend almost evenly to all",
        "tokens, the hardest case for a sparse mask and one that a trained model doesn't meet: the error shows that",
        "the outputs differ as they should, and says little about a trained model: blade_compile.explain on it does.",
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 where the machine computes in it"
    )
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument(
        "--when", choices=("auto", "always"), default="auto", help="always: the block path even where it is slower"
    )
    parser.add_argument("--steps", type=int, default=5, help="pairs of timed steps")
    parser.add_argument("--small", action="store_true", help="a shorter video: a look in two minutes")
    parser.add_argument("--out", type=Path, help="also write everything as JSON to this file")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    case = wan.SMALL if args.small else wan.REAL if device == "cuda" else wan.THIRD
    options = {"sparsity": args.sparsity, "when": args.when}
    screen, info, start = Screen(), setup_info.collect(), time.perf_counter()
    screen.say(
        *case.describe(),
        f"{str(dtype).removeprefix('torch.')}, random weights, batch 1, on {device}",
        f"blade: {options}",
    )
    screen.say(*setup_info.lines(info), "")
    with torch.no_grad():
        result = compare(case, dtype, device, options, args.steps, screen)
    show(result, screen)
    screen.say(f"whole run: {time.perf_counter() - start:.0f} s")
    if args.out:
        model = {**case.model, "tokens": case.tokens, "text_tokens": case.text, "dtype": str(dtype), "device": device}
        content = {"setup": info, "model": model, "options": options, **result, "report": result["report"].to_dict()}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
