"""Compile time of blade beside Inductor's: a fresh process with empty caches for each, alternating.

    python -m benchmarks.compile_time [--pairs 5] [--quick] [--out DIR]

What is timed is the first call of a compiled Wan-like transformer less a later one, after Inductor has compiled
something trivial: starting Python, imports of torch and Inductor's workers count for neither. The C++ kernels are
built beforehand, once per machine; their build time is given apart. Writes ``compile_time.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import setup_info, timing
from benchmarks.attention_report import table
from benchmarks.tables import ROOT

BACKENDS = ("inductor", "blade")
MARK = "compile-time-result "


def cpu_seconds() -> float:
    """Processor time of this process and of the compilers that it waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def contender(backend: str, layers: int, clock: str, resolutions: bool) -> None:
    """Runs in a process of its own: print the seconds of the first and the third call as one line of JSON.

    And the graphs of the first call, those that other timesteps added, and, if asked for, two other resolutions.
    """
    from benchmarks import wan

    wan.TINY.model["num_layers"] = layers
    model, inputs = wan.TINY.build(torch.float32, "cpu"), wan.TINY.inputs(torch.float32, "cpu")
    torch.compile(lambda x: (x * 2 + 1).sum())(torch.ones(64))
    graphs = _graphs()
    options = {"sparsity": 0.8, "when": "always"} if backend == "blade" else None
    compiled = torch.compile(model, backend=backend, options=options)
    seconds, counts, now = [], [], cpu_seconds if clock == "cpu" else time.perf_counter
    with torch.no_grad():
        for call in range(3):
            inputs["timestep"] = torch.tensor([900 - call])
            start = now()
            compiled(**inputs)
            seconds.append(now() - start)
            counts.append(_graphs() - graphs)
        found = {"first": seconds[0], "step": seconds[2], "graphs": counts[0], "by_step": counts[2] - counts[0]}
        for width in (384, 448) if resolutions else ():
            compiled(**dataclasses.replace(wan.TINY, width=width).inputs(torch.float32, "cpu"))
    if resolutions:
        found["by_resolution"] = _graphs() - graphs - counts[2]
    print(MARK + json.dumps(found))


def _graphs() -> int:
    """Graphs that Dynamo has handed to a compiler."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def measure(backend: str, layers: int, kernels: str, clock: str) -> float:
    """Seconds that one backend takes to compile the model, in a fresh process with empty caches."""
    with tempfile.TemporaryDirectory() as folder:
        return compiling(fresh_process(backend, layers, kernels, folder, clock))


def compiling(found: dict[str, float]) -> float:
    """Seconds of the first call beyond a later one."""
    return found["first"] - found["step"]


def fresh_process(
    backend: str, layers: int, kernels: str, caches: str, clock: str, resolutions: bool = False
) -> dict[str, float]:
    """What `contender` prints in a process of its own. ``caches``: Inductor's folder; ``kernels``: blade's."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches, "BLADE_CACHE_DIR": kernels}
    environment |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    if clock == "cpu":  # compilers as children of the process, so that their time is seen
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.compile_time", "--contender", backend]
    command += ["--layers", str(layers), "--clock", clock, *(["--resolutions"] if resolutions else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not marked:
        raise RuntimeError(f"{backend} failed with code {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(marked[0].removeprefix(MARK))
    return found


def build_kernels(folder: str) -> float:
    """Seconds to build the C++ kernels into an empty folder; later processes load them from there."""
    load = "from blade_compile.kernels import cpu_build; s = time.time(); cpu_build.load()"
    code = f"import time; {load}; print(time.time() - s)"
    environment = {**os.environ, "BLADE_CACHE_DIR": folder}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def markdown(content: dict[str, Any]) -> str:
    """Setup and the one table."""
    ratio, times = content["ratio"], content["seconds"]
    rows = [(name, f"{t['median']:.1f} s ({t['low']:.1f}-{t['high']:.1f})") for name, t in times.items()]
    rows.append(("blade / inductor, paired", f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"))
    return "\n".join([
        "# Compile time",
        "",
        *(f"- {line}" for line in setup_info.lines(content["setup"])),
        f"- {content['model']}",
        f"- {ratio['samples']} alternating pairs, a fresh process and empty caches each; {content['clock']} time",
        "- aim: at most 1.25",
        f"- the C++ kernels were built before, once per machine, in {content['kernel_build_seconds']:.1f} s",
        f"- made by `{content['command']}`",
        "",
        *table(("compile time", "median (20-80 %)"), rows),
    ]) + "\n"  # fmt: skip


def _command(argv: list[str]) -> str:
    """What to type for the same figures: where they were written is the reader's own business."""
    place = argv.index("--out") if "--out" in argv else len(argv)
    return " ".join(["python -m benchmarks.compile_time", *argv[:place], *argv[place + 2 :]])


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_time", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one pair, one layer")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a busy machine; one thread")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--contender", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--resolutions", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.contender:
        contender(args.contender, args.layers, args.clock, args.resolutions)
        return
    pairs, layers = (1, 1) if args.quick else (args.pairs, args.layers)
    info = setup_info.collect()
    samples: dict[str, list[float]] = {name: [] for name in BACKENDS}
    with tempfile.TemporaryDirectory() as kernels:
        build = build_kernels(kernels)
        for pair in range(pairs):
            for name in BACKENDS if pair % 2 == 0 else reversed(BACKENDS):
                samples[name].append(measure(name, layers, kernels, args.clock))
                print(f"pair {pair + 1} of {pairs}: {name} {samples[name][-1]:.1f} s", flush=True)
    times = {name: timing.Timing(tuple(values)) for name, values in samples.items()}
    content = {
        "setup": info,
        "command": _command(sys.argv[1:] if argv is None else argv),
        "model": f"WanTransformer3DModel, {layers} layers, 2 heads of 128, 2,304 tokens, fp32, forward",
        "clock": args.clock,
        "kernel_build_seconds": round(build, 2),
        "seconds": {name: t.summary(3) for name, t in times.items()},
        "ratio": times["blade"].over(times["inductor"]).summary(3),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "compile_time.json").write_text(json.dumps(content, indent=1) + "\n")
    (args.out / "compile_time.md").write_text(markdown(content))
    print(markdown(content))


if __name__ == "__main__":
    main()
