"""Suite ``compile``: how long compiling takes, with empty and with filled caches, and how many graphs come of it.

Each sample is a process of its own (see ``compile_time``), Inductor's and blade's in turns; the second process of a
pair of caches finds what the first one left.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import timing
from benchmarks.compile_time import BACKENDS, build_kernels, compiling, fresh_process
from benchmarks.registry import Case, Plan, suite

PAIRS, LAYERS = 3, 4
CACHES = ("cold", "warm")
Row = dict[str, Any]
Found = dict[str, float]
Process = Callable[[str, str, bool], Found]
"what a fresh process found: (backend, folder of its caches, whether to try other resolutions)"


@suite("compile")
def cases(plan: Plan) -> Iterator[Case]:
    """A Wan transformer compiled in fresh processes, on the CPU; and the kernels that are built once per machine."""
    about = {
        "size": f"WanTransformer3DModel, {LAYERS} layers, 2 heads of 128, 2,304 tokens", "dtype": "float32",
        "weights": "random",
    }  # fmt: skip
    yield Case("compiling a transformer's forward pass", about=about, rows=_rows, device=torch.device("cpu"))


def _rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as kernels:
        built = build_kernels(kernels)  # once per machine: not a part of compiling a model

        def run(backend: str, caches: str, resolutions: bool) -> Found:
            return fresh_process(backend, LAYERS, kernels, caches, "wall", resolutions)

        return [*rows_of(*samples(run, PAIRS)), row_of_build(built)]


def row_of_build(seconds: float) -> Row:
    """What a first-time user waits for on top of the cold compilation."""
    took = timing.Timing((seconds,))
    return {"arm": "first build of the CPU kernels", "seconds": took.summary(3), "samples": [round(seconds, 4)]}


def samples(run: Process, pairs: int) -> tuple[dict[str, list[Found]], dict[str, Found]]:
    """What the processes found, by ``<backend>, <caches>``, and each backend's with other resolutions."""
    found: dict[str, list[Found]] = {f"{backend}, {caches}": [] for caches in CACHES for backend in BACKENDS}
    counted: dict[str, Found] = {}
    for pair in range(pairs):
        for backend in BACKENDS if pair % 2 == 0 else reversed(BACKENDS):
            with tempfile.TemporaryDirectory() as folder:
                for caches in CACHES:
                    found[f"{backend}, {caches}"].append(run(backend, folder, False))
                if not pair:
                    counted[backend] = run(backend, folder, True)
    return found, counted


def rows_of(found: dict[str, list[Found]], counted: dict[str, Found]) -> list[Row]:
    """A row for each backend with cold and with warm caches; speed-ups over Inductor with the same caches."""
    rows: list[Row] = []
    times = {arm: timing.Timing(tuple(compiling(f) for f in each)) for arm, each in found.items()}
    for arm, took in times.items():
        backend, caches = arm.split(", ")
        baseline = f"{BACKENDS[0]}, {caches}"
        row = {"arm": arm, "seconds": took.summary(3), "samples": [round(s, 4) for s in took.samples]}
        row |= {"baseline": baseline, "speedup": times[baseline].over(took).summary(3)}
        if caches == CACHES[0]:
            first = found[arm][0]
            row |= {
                "graphs": first["graphs"],
                "recompiles_by_step": first["by_step"],
                "recompiles_by_resolution": counted[backend]["by_resolution"],
            }
        rows.append(row)
    return rows
