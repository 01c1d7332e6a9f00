"""``python -m benchmarks headline --model NAME``: the published comparisons, and the stronger baselines beside them.

    python -m benchmarks headline --model wan2.1-1.3b|cogvideox-5b|hunyuanvideo [--out DIR] [--seed N]

One denoising step of every contender is measured, all interleaved in one process, on the published shapes on a GPU and
on a scaled model on a CPU. A generation's time is the step's times the number of steps, and its row says so. Text
encoder and VAE are left out, weights are random: with a fixed sparsity, times don't depend on them.

BLADE (arXiv 2508.10774, tables 1 and 2) compares 50 dense steps with guidance against 8 sparse steps of a student
without. AdaSpa (arXiv 2502.21079, table of HunyuanVideo) compares 50 steps with 50 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import phases
from benchmarks.demo import default_dtype
from benchmarks.models import MODELS, Model
from benchmarks.phases import COMPILED, EAGER
from benchmarks.registry import Arm, Case, Plan
from benchmarks.suite_models import (
    DENSE_WITNESS,
    StepGate,
    about,
    contenders,
    exact_output,
    sparse_arm,
    witness_of,
    witnesses,
)
from benchmarks.timing import Timing

Row = dict[str, Any]
FEW, SPARSE = "compiled dense, one step", "compiled sparse, one step"
STEPS = 50


@dataclass(frozen=True)
class Protocol:
    """What was published of a model."""

    model: str
    options: dict[str, Any]
    "of blade: the paper's policy and sparsity"
    hardware: str
    "of the published figures"
    published: dict[str, float]
    "by generation: its speed-up over 50 eager dense steps"
    seconds: dict[str, float]
    "by generation, where they were published"
    guidance: str = "calls"
    "``calls``: a model call for each branch; ``batch``: both in one; ``none``: it is an input of the model"
    few: int = 8
    "steps of the student; 0: none was published"


FEW_DENSE, FEW_SPARSE = "8 steps, compiled dense", "8 steps, compiled sparse"
EAGER_50, COMPILED_50, ADASPA_50 = "50 steps, eager dense", "50 steps, compiled dense", "50 steps, AdaSpa"
H20 = "one H20, dense attention by FlashAttention-2"
PROTOCOLS = {
    protocol.model: protocol
    for protocol in (
        Protocol(
            "wan2.1-1.3b",
            {"preset": "wan2.1-1.3b", "when": "always"},
            H20,
            {EAGER_50: 1.0, FEW_DENSE: 9.37, FEW_SPARSE: 14.10},
            {EAGER_50: 338.41, FEW_DENSE: 36.11, FEW_SPARSE: 24.00},
        ),
        Protocol(
            "cogvideox-5b",
            {"preset": "cogvideox-5b", "when": "always"},
            "hardware not said beside the figure; dense attention by FlashAttention-2",
            {EAGER_50: 1.0, FEW_DENSE: 7.93, FEW_SPARSE: 8.89},
            {},
            guidance="batch",
        ),
        Protocol(
            "hunyuanvideo",
            {"policy": "adaspa", "when": "always", "search_steps": (10, 30)},
            "one A100 80 GB, dense attention by FlashAttention-2",
            {EAGER_50: 1.0, ADASPA_50: 1.78},
            {EAGER_50: 3213.76, ADASPA_50: 1810.23},
            guidance="none",
            few=0,
        ),
    )
}


def cases(name: str, plan: Plan, model: Model | None = None) -> list[Case]:
    """The measured steps of a protocol. ``model``: instead of the one of that name."""
    protocol, model = PROTOCOLS[name], model or MODELS[name]
    head = about(model, plan)
    if protocol.few:
        return [Case(f"{name}, measured steps", lambda: step_arms(protocol, model, plan), head)]
    rows = lambda: phases.measure(model, plan, protocol.options, STEPS)  # noqa: E731
    return [Case(f"{name}, measured steps", about=head, rows=rows)]


def step_arms(protocol: Protocol, model: Model, plan: Plan) -> list[Arm]:
    """One step of each contender. Dense ones are held to fp32; the sparse one rests on a witness that drops nothing."""
    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    options = protocol.options
    proofs = witnesses(model, plan, {SPARSE: options})
    gate = StepGate(exact_output(model, size, plan))
    run = contenders(model, plan)
    one = model.inputs(size, dtype, plan.device, plan.seed)
    guided = _guided(one, protocol.guidance)
    both = (lambda check: lambda out: check(out[-1:])) if protocol.guidance == "batch" else (lambda check: check)
    dense = {"sdpa": run.backend}
    return [
        Arm(COMPILED, run.dense(*guided), both(gate.baseline), about=dense, certified_by=DENSE_WITNESS),
        Arm(EAGER, run.eager(*guided), both(gate.as_near), about=dense),
        Arm(FEW, run.dense(one), gate.as_near, about=dense, certified_by=DENSE_WITNESS),
        sparse_arm(SPARSE, run.compiled("blade", options, one), gate.distance, options, witness_of(SPARSE)),
        *proofs,
    ]


def _guided(one: dict[str, Any], how: str) -> tuple[dict[str, Any], ...]:
    """The inputs of one step with guidance; what the gate looks at comes last."""
    if how == "none":
        return (one,)
    other = {**one, "encoder_hidden_states": one["encoder_hidden_states"].flip(1)}
    if how == "calls":
        return other, one
    return ({name: _batched(name, value, other[name]) for name, value in one.items()},)


def _batched(name: str, value: Any, other: Any) -> Any:
    """Both branches in one call; what has no batch dimension stays."""
    return torch.cat([other, value]) if isinstance(value, torch.Tensor) and name != "img_ids" else value


# --- arithmetic ------------------------------------------------------------------------------------------------------


def generations(name: str, measured: list[Row]) -> list[Row]:
    """Whole generations out of measured steps: rows that say which rows they come from, and how.

    A generation that rests on a step without a time gets a row that says why, and no time.
    """
    protocol = PROTOCOLS[name]
    steps = {row["arm"]: row for row in measured}
    plans: list[tuple[str, dict[str, int]]] = [(EAGER_50, {EAGER: STEPS}), (COMPILED_50, {COMPILED: STEPS})]
    if protocol.few:
        plans += [(FEW_DENSE, {FEW: protocol.few}), (FEW_SPARSE, {SPARSE: protocol.few})]
    else:
        plans += [(ADASPA_50, phases.counts(protocol.options, STEPS))]
    totals = {title: _total(counts, steps) for title, counts in plans if _reason(counts, steps) is None}
    rows = []
    for title, counts in plans:
        row: Row = {"arm": title, "calculation": " + ".join(f"{n} x ({arm})" for arm, n in counts.items())}
        if title in protocol.published:
            row |= {"published_speedup": protocol.published[title], "published_on": protocol.hardware}
        if title in protocol.seconds:
            row["published_seconds"] = protocol.seconds[title]
        why = _reason(counts, steps)
        if why is not None:
            rows.append({**row, "status": "failed", "reason": why})
            continue
        row |= {"status": "ok", "seconds": totals[title].summary(4), "samples": [*totals[title].samples]}
        if EAGER_50 in totals:
            row |= {"baseline": EAGER_50, "speedup": totals[EAGER_50].over(totals[title]).summary(3)}
        for key, baseline in (("over_compiled", COMPILED_50), ("over_few", FEW_DENSE)):
            if baseline in totals:
                row[key] = totals[baseline].over(totals[title]).summary(3)
        rows.append(row)
    return rows


def _total(counts: dict[str, int], steps: dict[str, Row]) -> Timing:
    """Steps times their number, round by round, so that drift hits both sides of a ratio alike."""
    columns = [[count * s for s in steps[arm]["samples"]] for arm, count in counts.items()]
    return Timing(tuple(map(sum, zip(*columns, strict=True))))


def _reason(counts: dict[str, int], steps: dict[str, Row]) -> str | None:
    for arm in counts:
        row = steps.get(arm, {"status": "not measured"})
        if "samples" not in row:
            return f"{arm}: {row['status']}{': ' + row['reason'] if row.get('reason') else ''}"
    return None


def notes(name: str, plan: Plan) -> list[str]:
    """What a reader has to know before the figures."""
    protocol = PROTOCOLS[name]
    lines = [
        "Measured are single denoising steps; a generation is their time multiplied by their number, as its row says.",
        "Text encoder and VAE are left out; weights are random.",
        f"Published figures: {protocol.hardware}. They are quoted, not measured here.",
    ]
    if plan.device.type != "cuda":
        lines.insert(0, "No GPU was at hand: the same protocol on a scaled model. Its figures say nothing about the "
                     "published ones, which are of the published shapes on a GPU.")  # fmt: skip
    if protocol.few:
        lines.append("The sparsity is the paper's (preset), reached by its cap on the kept blocks; see the density.")
    else:
        lines.append(
            "AdaSpa is dense before step 10, searches at steps 10 and 30, and reuses its masks in between. The model "
            "takes its guidance as an input: there is no second branch."
        )
    return lines
