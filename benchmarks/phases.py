"""The steps of an AdaSpa generation by what they do: dense, search, reuse, refresh; each measured beside dense steps.

A generation of five steps with searches at steps 2 and 4 goes through all of them; it is repeated, with dense steps of
the same model in its midst. A generation of 50 steps consists of the same steps in other numbers.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch

import blade_compile
from benchmarks import timing
from benchmarks.demo import default_dtype
from benchmarks.models import Model
from benchmarks.registry import Plan
from benchmarks.runner import PeakMemory
from benchmarks.split import kept
from benchmarks.suite_models import (
    StepGate,
    contenders,
    every_block,
    exact_contenders,
    exact_output,
    sparse_for_sure,
    witness,
)
from blade_compile.config import BladeConfig

Row = dict[str, Any]
Call = Callable[[], Any]
SHORT, SEARCHES = 5, (2, 4)
EAGER, COMPILED = "eager dense, one step with guidance", "compiled dense, one step with guidance"


def arm_of(phase: str) -> str:
    """The name of a phase's row."""
    return f"AdaSpa, {phase} step"


def phase(options: dict[str, Any], step: int, steps: int) -> str:
    """What a step of a generation does, counted from 1."""
    return BladeConfig.of(options).schedule.phase("adaspa", step, steps).name.lower()


def counts(options: dict[str, Any], steps: int) -> dict[str, int]:
    """How many steps of each phase a generation has."""
    return dict(Counter(arm_of(phase(options, step, steps)) for step in range(1, steps + 1)))


def measure(
    model: Model, plan: Plan, options: dict[str, Any], steps: int, rounds: int = 7, budget: float = 300.0
) -> list[Row]:
    """Rows of eager and compiled dense steps and of each phase. `WrongResultError` where a dense phase is wrong.

    And where a phase is, with every block kept in fp32: see `suite_models.witnesses`.
    """
    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    short = {**options, "search_steps": SEARCHES}
    certify(model, plan, short)
    gate = StepGate(exact_output(model, size, plan))
    run, inputs = contenders(model, plan), model.inputs(size, dtype, plan.device, plan.seed)
    calls = {EAGER: run.eager(inputs), COMPILED: run.dense(inputs)}
    sparse = run.compiled("blade", short, inputs)
    errors = {COMPILED: gate.baseline(calls[COMPILED]()), EAGER: gate.as_near(calls[EAGER]())}
    with blade_compile.generation(SHORT):  # compiles
        outputs = {phase(short, step, SHORT): sparse() for step in range(1, SHORT + 1)}
    for name, out in outputs.items():
        errors[arm_of(name)] = (gate.as_near if name in ("dense", "search") else gate.distance)(out)
    del outputs
    with blade_compile.generation(SHORT):
        found = {phase(short, step, SHORT): kept(sparse) for step in range(1, SHORT + 1)}
    densities = {arm_of(name): sparse_for_sure(f, options if name == "reuse" else {}) for name, f in found.items()}
    peaks = peak_memory(calls, sparse, short, plan)
    samples = interleaved(calls, sparse, short, rounds, budget)
    rows = []
    for arm, took in samples.items():
        times = timing.Timing(tuple(took))
        row: Row = {"arm": arm, "seconds": times.summary(7), "samples": [round(s, 7) for s in took]}
        over = timing.Timing(tuple(samples[COMPILED])).over(times)
        row |= {"baseline": COMPILED, "speedup": over.summary(3), "error": float(f"{errors[arm]:.2e}")}
        if arm in counts(options, steps):
            row |= {**options, **densities[arm]}
        else:
            row["sdpa"] = run.backend
        if (peak := peaks[arm]) is not None:
            row["peak_mib"] = round(peak, 1)
        rows.append(row)
    return rows


def certify(model: Model, plan: Plan, options: dict[str, Any]) -> None:
    """Raise `WrongResultError` unless compiled dense, and every phase with every block kept, are exact in fp32."""
    run, inputs = exact_contenders(model, plan)
    gate = StepGate(run.eager(inputs)())
    gate.baseline(run.dense(inputs)())
    sparse = run.compiled("blade", every_block(options), inputs)
    with blade_compile.generation(SHORT):
        for _ in range(SHORT):
            proof = witness("", sparse, gate.as_near, blade=True)
            gate.as_near(proof.call())
    torch._dynamo.reset()


def peak_memory(dense: dict[str, Call], sparse: Call, options: dict[str, Any], plan: Plan) -> dict[str, float | None]:
    """MiB that each dense call and each phase takes at most, in calls that compile nothing."""
    peaks = {}
    for name, call in dense.items():
        memory = PeakMemory(plan.device)
        call()
        peaks[name] = memory.mib()
    with blade_compile.generation(SHORT):
        for step in range(1, SHORT + 1):
            memory = PeakMemory(plan.device)
            sparse()
            peaks[arm_of(phase(options, step, SHORT))] = memory.mib()
    return peaks


def interleaved(
    dense: dict[str, Call],
    sparse: Call,
    options: dict[str, Any],
    rounds: int,
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every dense call and of every phase, one sample a round: a round is one short generation.

    Where a phase comes twice in a round, the later one counts. After ``budget`` seconds no further round starts, but
    two are always run: steps of the largest models take half a minute.
    """
    start = time.perf_counter()
    samples: dict[str, list[float]] = defaultdict(list)
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - start > budget:
            break
        seen: dict[str, float] = {}
        with blade_compile.generation(SHORT):
            for step in range(1, SHORT + 1):
                seen[arm_of(phase(options, step, SHORT))] = timing.sample(sparse, clock=clock)
                if step == SHORT // 2:
                    names = list(dense) if done % 2 == 0 else list(reversed(dense))
                    seen |= {name: timing.sample(dense[name], clock=clock) for name in names}
        for name, seconds in seen.items():
            samples[name].append(seconds)
    return {name: samples[name] for name in (*dense, *(n for n in samples if n not in dense))}
