"""What each policy loses on real queries and keys: a video diffusion transformer trained on handwritten digits.

    python -m benchmarks.fidelity [--out DIR] [--block 16]

The digits teacher (``distill/digits``) draws clips in STEPS steps with guidance; at some of them the queries, keys and
values of every layer are kept. On these tensors every policy, in every order and at every sparsity, is compared with
dense attention: recall of attention mass, the most that the same blocks could hold (the oracle), relative L1 and cosine
of the output. Then budgets are calibrated on some classes and steps and checked on others. Writes ``fidelity.json``,
``fidelity.md`` and a heat map.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import blade_compile
from benchmarks import setup_info
from benchmarks.attention_report import table
from benchmarks.tables import RESULTS
from blade_compile.config import BladeConfig
from blade_compile.distill import digits_teacher
from blade_compile.distill.digits_model import guided
from blade_compile.distill.digits_teacher import load_teacher
from blade_compile.fidelity import METRICS, compare, mass, relative_error
from blade_compile.kernels import observe
from blade_compile.settings import settings_of
from blade_compile.site_runs import site_runner

TEACHER = Path(digits_teacher.__file__).with_name("digits") / "teacher.safetensors"
STEPS, CFG_SCALE = 50, 3.0
KEPT_STEPS = (1, 9, 19, 29, 39, 48)
"""Steps, counted from 0, whose tensors are kept"""
CLASSES = 8
SPARSITIES = (0.5, 0.75, 0.8, 0.9)
ORDERS = ("none", "gilbert", "tile")
POLICIES: dict[str, dict[str, Any]] = {
    "asa": {},
    "asa, mean probe": {"policy": "asa", "probe": "mean"},
    "asa_g": {"policy": "asa_g", "global_window": 16},
    "adaspa": {"policy": "adaspa"},
    "adaspa, equal heads": {"policy": "adaspa", "head_adaptive": False},
    "vsa": {"policy": "vsa"},
    "sparge": {"policy": "sparge"},
    "xattention": {"policy": "xattention", "stride": 8},
    "sta": {"policy": "sta"},
    "radial": {"policy": "radial"},
}
Row = dict[str, Any]
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Capture:
    """Queries, keys and values of one layer at one step, [2 * CLASSES, H, S, D]: with and without the class."""

    step: int
    site: str
    q: Tensor
    k: Tensor
    v: Tensor


def times() -> list[float]:
    """The sampler's times, STEPS + 1 of them, from 1 to 0."""
    even: list[float] = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64).tolist()
    return even


@torch.no_grad()
def trajectory(model: nn.Module, labels: Tensor, seed: int) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
    """Step and the model's inputs (with and without the class in one batch) along the way from noise to clips."""
    clips = model.config  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 1, clips.frames, clips.size, clips.size, generator=generator)
    grid = times()
    for step in range(STEPS):
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def watched(*inputs: Tensor, seen: list[tuple[Tensor, Tensor, Tensor]] = seen) -> Tensor:
            seen.append(inputs)  # type: ignore[arg-type]
            return model(*inputs)  # type: ignore[no-any-return]

        velocity = guided(watched, x, torch.full((len(x),), grid[step]), labels, CFG_SCALE)  # type: ignore[arg-type]
        yield step, seen[0]
        x = x + (grid[step + 1] - grid[step]) * velocity


def captures(model: nn.Module, block: int) -> list[Capture]:
    """The tensors that everything is measured on."""
    found: list[Capture] = []
    config = BladeConfig(when="always", block_size=block, sparsity=0.0)
    with site_runner(model, settings_of(config)) as runner:
        for step, inputs in trajectory(model, torch.arange(CLASSES), seed=0):
            if step in KEPT_STEPS:
                runner.run(functools.partial(_keep, found, step), inputs, {})
    return found


def _keep(
    found: list[Capture], step: int, site: str, op: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    found.append(Capture(step, site, *(x.clone() for x in args[:3])))
    return op(*args, **kwargs)


def operator_arguments(config: BladeConfig) -> dict[str, Any]:
    """``blade::sparse_sdpa``'s keyword arguments for a configuration."""
    return {
        "policy": config.policy, "sparsity": config.budget, "tau": config.mass, "min_keep": config.min_keep,
        "max_keep": config.max_keep, "block_size": config.block, "probe_tokens": config.probe_tokens,
        "seed": config.seed, "when": "always", "options": config.policy_options, "grid": list(config.grid or ()),
        "order": config.inner_order,
    }  # fmt: skip


def policy_rows(found: list[Capture], grid: tuple[int, int, int], block: int) -> Iterator[Row]:
    """One row for each policy, order and sparsity: means over layers, heads, steps and clips."""
    for name, options in POLICIES.items():
        for order in ORDERS:
            for sparsity in SPARSITIES:
                config = BladeConfig(
                    **options, sparsity=sparsity, order=order, grid=grid, block_size=block, probe_tokens=min(16, block)
                )
                arguments = operator_arguments(config)
                numbers = [compare(torch.ops.blade.sparse_sdpa.default, (c.q, c.k, c.v), arguments)[1] for c in found]
                yield {"policy": name, "order": order, "sparsity": sparsity, **_means(numbers)}


def reuse_rows(found: list[Capture], block: int) -> Iterator[Row]:
    """AdaSpa's masks of an earlier step on the tensors of later ones, and the searched mask beside them."""
    by_place = {(c.step, c.site): c for c in found}
    for sparsity in SPARSITIES:
        for searched, used in ((9, 19), (9, 29), (29, 39), (29, 48)):
            config = BladeConfig(policy="adaspa", sparsity=sparsity, block_size=block, probe_tokens=min(16, block))
            numbers = []
            for site in dict.fromkeys(c.site for c in found):
                old, new = by_place[searched, site], by_place[used, site]
                num, idx = blade_compile.mask_predict(old.q, old.k, config=config)
                event = observe.Event("block_sparse_attention", "", "aten", (new.q, new.k, new.v), num, idx, block)
                numbers.append(dict(zip(("density", "recall", "oracle"), mass(event, None), strict=True)))
            yield {"policy": "adaspa, reused", "order": f"step {searched + 1} at {used + 1}", "sparsity": sparsity,
                   **_means(numbers)}  # fmt: skip


def _means(numbers: list[dict[str, Tensor]]) -> dict[str, float]:
    names = [metric for metric in METRICS if metric in numbers[0]]
    return {name: torch.stack([n[name] for n in numbers]).mean().item() for name in names}


def calibration_rows(model: nn.Module, block: int) -> Iterator[Row]:
    """Budgets found on some classes and steps, and the error that they make on others."""
    known = [inputs for step, inputs in trajectory(model, torch.tensor([0, 3, 6]), seed=1) if step in (2, 15, 30, 45)]
    other = [
        inputs for step, inputs in trajectory(model, torch.tensor([1, 5, 8]), seed=2) if step in (0, 8, 24, 38, 49)
    ]
    with tempfile.TemporaryDirectory() as folder:
        for target in (0.02, 0.05, 0.1):
            path = Path(folder) / f"{target}.json"
            options = {"block_size": block, "probe_tokens": min(16, block)}
            batches = [(inputs, {}) for inputs in known]
            blade_compile.calibrate(model, batches, target, options=options, path=path)
            content = json.loads(path.read_text())
            errors = errors_under(model, path, other)
            yield {
                "target": target, "density": content["density"], "error": content["error"],
                "held_out": max(errors), "held_out_mean": sum(errors) / len(errors), "met": max(errors) <= target,
            }  # fmt: skip


def errors_under(model: nn.Module, path: Path, batches: list[Inputs]) -> list[float]:
    """Relative L2 error of the model's output with a calibration, compiled as users compile it."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="blade", options={"calibration": str(path), "when": "always"})
    with torch.no_grad():
        return [relative_error(compiled(*inputs), model(*inputs)) for inputs in batches]


def markdown(report: Row) -> list[str]:
    """The report for reading."""
    setup = ", ".join(f"{key} {report['model'][key]}" for key in report["model"])
    lines = ["# Fidelity on real queries and keys", "", *setup_info.lines(report["setup"]), "", f"Model: {setup}.", ""]
    head = ("policy", "order", "sparsity", "density", "recall", "oracle", "of oracle", "relative L1", "cosine")
    lines += table(head, [_cells(row) for row in report["policies"]])
    lines += ["", "## AdaSpa's masks, reused", ""]
    lines += table(head[:7], [_cells(row)[:7] for row in report["reuse"]])
    lines += ["", "## Calibration", "", "Relative L2 error of the model's output; the worst batch counts.", ""]
    names = ("target", "density", "error when calibrated", "error on other classes and steps", "mean there", "met")
    rows = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in report["calibration"]]
    return [*lines, *table(names, rows), ""]


def _cells(row: Row) -> list[str]:
    numbers = [row["density"], row["recall"], row["oracle"], row["recall"] / row["oracle"]]
    return [
        row["policy"], row["order"], f"{row['sparsity']:g}", *(f"{x:.4f}" for x in numbers),
        *(f"{row[name]:.4f}" for name in ("l1", "cosine") if name in row),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report (default: benchmarks/results)")
    parser.add_argument("--block", type=int, default=16, choices=(16, 32, 64), help="block size (default: 16)")
    parser.add_argument("--weights", type=Path, default=TEACHER, help="the teacher (default: the one of blade-distill)")
    args = parser.parse_args(argv)
    model = load_teacher(args.weights)
    grid = model.config.grid
    found = captures(model, args.block)
    shape = tuple(found[0].q.shape)
    report: Row = {
        "setup": setup_info.collect(),
        "model": {
            "grid": grid, "tokens": shape[2], "layers": len({c.site for c in found}), "heads": shape[1],
            "head_dim": shape[3], "block_size": args.block, "steps": [step + 1 for step in KEPT_STEPS],
            "clips": CLASSES,
        },
    }  # fmt: skip
    report["policies"] = list(policy_rows(found, grid, args.block))
    report["reuse"] = list(reuse_rows(found, args.block))
    report["calibration"] = list(calibration_rows(model, args.block))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fidelity.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "fidelity.md").write_text("\n".join(markdown(report)))
    inputs = dict(trajectory(model, torch.arange(CLASSES), seed=0))[KEPT_STEPS[2]]
    options = {"sparsity": 0.8, "block_size": args.block, "probe_tokens": min(16, args.block)}
    blade_compile.measure(model, *inputs, options=options).save_picture(args.out / "fidelity.png")
    print("\n".join(markdown(report)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
