"""``calibrate``: budgets for every site and head that keep the error of the model's output under a target.

Three kinds of runs, all on the user's own model and inputs:

    curves         one dense run per batch: each head's output error at each of LEVELS
    sensitivities  one run per site: what an error there does to the model's output
    checks         runs with the chosen budgets: does the output keep the target?

Errors of sites and heads are taken to add up as squares. The budgets that need the least work for a total error are
then found by one multiplier, the price of error (Lagrange); checks correct what this model of errors misses.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .budgets import FORMAT, KEPT_OPTIONS
from .config import BladeConfig
from .fidelity import always, relative_error
from .settings import settings_of
from .site_probe import dense_sdpa
from .site_runs import SiteRunner, site_runner

logger = logging.getLogger("blade_compile")

LEVELS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Sparsities that a head can get"""
PROBE_LEVEL = 0.8
"""Sparsity at which a site's effect on the output is measured"""
MARGIN = 0.85
"""Share of the target that the worst calibration batch may use up: other inputs differ"""
CHECKS = 8
"""Rounds of checking and correcting"""

Batch = tuple[tuple[Any, ...], dict[str, Any]]
Budgets = dict[str, list[int]]


@dataclass
class _Site:
    """What the runs have shown of a site. Indices: level, head."""

    shape: tuple[int, ...]
    error: Tensor
    "[len(LEVELS), H] squared error of a head's output over the squared norm of all heads' output, mean over batches"
    density: Tensor
    "[len(LEVELS)] kept share of the blocks"
    calls: int = 0
    gain: float = 0.0
    "squared relative error of the model's output per squared relative error of the site's"

    @property
    def work(self) -> float:
        """Of one head at full density, up to a constant of the model."""
        _, _, S, T, D = self.shape
        return float(S * T * D)


@dataclass
class _Run:
    """One calibration."""

    runner: SiteRunner
    batches: list[Batch]
    sites: dict[str, _Site] = field(default_factory=dict)
    dense: list[Any] = field(default_factory=list)


def calibrate(
    model: Any,
    batches: Iterable[Any],
    target: float = 0.05,
    *,
    options: BladeConfig | Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] = "blade-calibration.json",
) -> Path:
    """Find the budgets that keep the error of the model's output under ``target`` at the least work, and write them.

    The model runs about twice per batch, once per site, and up to CHECKS times per batch; without gradients, and
    everything is as before afterwards. Load the file by ``options={"calibration": path}``.

    Args:
        model: a module or function, plain or compiled in any way.
        batches: (args, kwargs) pairs that the model is called with: a few prompts, timesteps from the whole range.
        target: relative L2 error of the model's output that no batch may exceed, in (0, 1).
        options: policy, block size and so on, as for ``torch.compile``; budgets (sparsity, tau, ...) and ``when`` are
            not taken: budgets are what is found.
        path: where the file goes.

    Returns:
        The path of the file.

    Raises:
        ValueError: for a wrong target, wrong options or batches, or if no attention was rewritten.
    """
    if not isinstance(target, (int, float)) or isinstance(target, bool) or not 0 < target < 1:
        raise ValueError(f"target={target!r}; valid is a relative error between 0 and 1, such as 0.05.")
    config, given = dataclasses.replace(always(options), when="always"), _batches(batches)
    with site_runner(model, settings_of(config)) as runner:
        run = _Run(runner, given)
        _curves(run)
        _sensitivities(run)
        budgets, errors = _search(run, float(target))
    content = _content(config, run, budgets, errors, float(target))
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)
    logger.info("calibrated %d sites: mean density %.3f, error %.4g of %.4g", len(budgets), content["density"],
                content["error"], target)  # fmt: skip
    return path


def _batches(batches: Iterable[Any]) -> list[Batch]:
    given = list(batches)
    for batch in given:
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not pair or not isinstance(batch[0], (tuple, list)) or not isinstance(batch[1], Mapping):
            raise ValueError(
                f"batches holds a {type(batch).__name__}; valid are (args, kwargs) pairs, a tuple and a dict each."
            )
    if not given:
        raise ValueError("batches is empty; give a few (args, kwargs) pairs that the model is called with.")
    return [(tuple(args), dict(kwargs)) for args, kwargs in given]


# --- runs -------------------------------------------------------------------------------------------------------------


def _at(sparsity: float | list[float], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A site's arguments with another budget."""
    one = isinstance(sparsity, float)
    return {**kwargs, "sparsity": sparsity if one else None, "head_sparsity": [] if one else sparsity, "when": "always"}


def _dense(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    mask = args[3] if len(args) > 3 else kwargs.get("key_mask")
    q, k, v = args[:3]
    return dense_sdpa(q, k, v, mask, kwargs.get("scale"))()


def _curves(run: _Run) -> None:
    """Error of each head at each level, on what the dense model computes."""

    def handler(name: str, op: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if kwargs["site"] != name:
            raise ValueError(
                f"{name!r} is {kwargs['site']!r} in its graph: the model's graph breaks there, or only parts of it are "
                "compiled, so a compiled model could not find its budgets again. Calibrate the plain model, and make "
                "it compile with fullgraph=True."
            )
        dense = _dense(args, kwargs)
        q, k = args[:2]
        shape = (*q.shape[:3], k.shape[2], q.shape[3])
        zero = torch.zeros(len(LEVELS), q.shape[1], dtype=torch.float64)
        site = run.sites.setdefault(name, _Site(shape, zero, torch.zeros(len(LEVELS), dtype=torch.float64)))
        norm = dense.double().square().sum().clamp(min=1e-300)
        for level, sparsity in enumerate(LEVELS):
            out = op(*args, **_at(sparsity, kwargs)) if sparsity else dense
            site.error[level] += ((out - dense).double().square().sum((0, 2, 3)) / norm).cpu()
            site.density[level] = 1.0 - sparsity
        site.calls += 1
        return dense

    for args, kwargs in run.batches:
        run.dense.append(run.runner.run(handler, args, kwargs))
    if not run.sites:
        raise ValueError(
            "no attention of this model was rewritten under these options, so there is nothing to calibrate; "
            "blade_compile.explain(model, ...) says why for each."
        )
    for site in run.sites.values():
        # More blocks never count as a worse choice, and no level is free of error by luck.
        site.error = (site.error / site.calls).flip(0).cummin(0).values.flip(0)


def _sensitivities(run: _Run) -> None:
    """What an error of each site alone does to the model's output."""
    probe = LEVELS.index(PROBE_LEVEL)
    some = {0, len(run.batches) - 1}
    for probed, site in run.sites.items():

        def handler(
            name: str, op: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], probed: str = probed
        ) -> Tensor:
            return op(*args, **_at(PROBE_LEVEL, kwargs)) if name == probed else _dense(args, kwargs)

        error = max(relative_error(run.runner.run(handler, *run.batches[i]), run.dense[i]) for i in some)
        site.gain = error**2 / max(site.error[probe].sum().item(), 1e-300)


def _errors(run: _Run, budgets: Budgets) -> list[float]:
    """The output's relative error on each batch."""

    def handler(name: str, op: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        levels = budgets[name]
        if not any(levels):
            return _dense(args, kwargs)
        return op(*args, **_at([LEVELS[level] for level in levels], kwargs))

    return [
        relative_error(run.runner.run(handler, args, kwargs), dense)
        for (args, kwargs), dense in zip(run.batches, run.dense, strict=True)
    ]


# --- the choice of budgets --------------------------------------------------------------------------------------------


def _search(run: _Run, target: float) -> tuple[Budgets, list[float]]:
    """The cheapest budgets found whose worst batch stays within the target's margin, and their errors.

    The modelled error is off by an unknown factor, so what is allowed of it is searched: in steps of four until one
    value keeps the target and one breaks it, then halfway between them. Equal budgets are checked once.
    """
    best: Budgets = {name: [0] * site.error.shape[1] for name, site in run.sites.items()}
    errors, aim = [0.0] * len(run.batches), MARGIN * target
    allowed, kept, broken = aim**2, 0.0, float("inf")
    known: dict[str, list[float]] = {}
    while len(known) < CHECKS and broken > 1.1 * kept and aim**2 * 1e-6 < allowed < aim**2 * 1e6:
        budgets = choose(run.sites, allowed)
        key = json.dumps(budgets)
        if key not in known:
            known[key] = _errors(run, budgets)
            logger.debug("allowed %.3g: error %.4g at %.3f", allowed**0.5, max(known[key]), _density(run, budgets))
        if max(known[key]) <= aim:
            kept = allowed
            if _work(run, budgets) < _work(run, best):
                best, errors = budgets, known[key]
        else:
            broken = allowed
        allowed = 4 * kept if broken == float("inf") else broken / 4 if not kept else (kept * broken) ** 0.5
    return best, errors


def choose(sites: Mapping[str, Any], allowed: float) -> Budgets:
    """Levels of the least work whose modelled squared error is at most ``allowed``.

    For a price of error each head takes the level of the lowest work + price * error; the price is found by bisection.
    """
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        levels = {name: _cheapest(site, 10.0**middle) for name, site in sites.items()}
        error = sum(_modelled(sites[name], chosen) for name, chosen in levels.items())
        low, high = (low, middle) if error <= allowed else (middle, high)
    return {name: _cheapest(site, 10.0**high) for name, site in sites.items()}


def _cheapest(site: Any, price: float) -> list[int]:
    cost = site.work * site.density[:, None] + price * site.gain * site.error
    levels: list[int] = cost.argmin(0).tolist()
    return levels


def _modelled(site: Any, levels: list[int]) -> float:
    return float(site.gain * sum(site.error[level, head].item() for head, level in enumerate(levels)))


def _work(run: _Run, budgets: Budgets) -> float:
    return sum(
        site.work * sum(site.density[level].item() for level in budgets[name]) for name, site in run.sites.items()
    )


def _density(run: _Run, budgets: Budgets) -> float:
    full = sum(site.work * len(budgets[name]) for name, site in run.sites.items())
    return _work(run, budgets) / full


def _content(config: BladeConfig, run: _Run, budgets: Budgets, errors: list[float], target: float) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "blade": __version__,
        "target": target,
        "error": max(errors),
        "errors": errors,
        "density": _density(run, budgets),
        "options": {name: getattr(config, name) for name in KEPT_OPTIONS},
        "sites": {
            name: {
                "heads": site.shape[1],
                "tokens": [site.shape[2], site.shape[3]],
                "head_dim": site.shape[4],
                "sparsity": [LEVELS[level] for level in budgets[name]],
            }
            for name, site in run.sites.items()
        },
    }
