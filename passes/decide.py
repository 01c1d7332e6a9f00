"""Which of the sites that can be rewritten are: the settings, the shapes and the cost model decide."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from blade_compile.kernels import cost, dispatch, policies, reference
from blade_compile.kernels.schedule import Schedule

from . import grid
from .extents import hint
from .find_attention import AttentionSite

logger = logging.getLogger("blade_compile")


@dataclass(frozen=True)
class Budget:
    """Calibrated sparsity of a site's heads, and the sizes that it was found at."""

    sparsity: tuple[float, ...]
    S: int
    T: int
    D: int


class CalibrationMismatchError(ValueError):
    """The calibration belongs to another model or to other sizes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the passes need to know of the user's options (contract: ``BladeConfig``), as plain values."""

    policy: str = "asa"
    sparsity: float | None = None
    tau: float = 0.95
    min_keep: float = 0.05
    max_keep: float = 1.0
    block_size: int = 128
    probe_tokens: int = 16
    seed: int = 0
    protect: str | tuple[tuple[int, int], ...] = "auto"
    when: str = "auto"
    min_tokens: int = 2048
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    inline_kernels: bool = False
    policy_options: str = ""
    "the policy's own options, as JSON"
    schedule: str = ""
    "what changes over the steps of a generation, as JSON; empty: nothing"
    order: str = "none"
    grid: tuple[int, int, int] | None = None
    "token grid; None: found in the graph"
    budgets: tuple[tuple[str, Budget], ...] = ()
    "what a calibration has found, by site; empty: nothing is calibrated"

    def op_kwargs(self, site: AttentionSite) -> dict[str, Any]:
        """Arguments of ``blade::sparse_sdpa`` beside the tensors and the scale."""
        protect_q, protect_k = (_flat(ranges) for ranges in self.protected(site))
        return {
            "protect_q": protect_q,
            "protect_k": protect_k,
            "policy": self.policy,
            "sparsity": self.sparsity,
            "tau": self.tau,
            "min_keep": self.min_keep,
            "max_keep": self.max_keep,
            "block_size": self.block_size,
            "probe_tokens": self.probe_tokens,
            "seed": self.seed,
            "when": self.when,
            "min_tokens": self.min_tokens,
            "site": site.name,
            "options": self.policy_options,
            "head_sparsity": list(dict(self.budgets)[site.name].sparsity) if self.budgets else [],
            "grid": list(site.grid or ()),
            "order": self.order if site.grid else "none",
            "schedule": self.schedule,
        }

    def protected(self, site: AttentionSite) -> tuple[Any, Any]:
        """(start, length) ranges of the query tokens and of the key tokens that are never dropped."""
        if isinstance(self.protect, str):
            return site.protect_q, site.protect_k
        return self.protect, self.protect


def _flat(ranges: Any) -> list[Any]:
    return [number for start, length in ranges for number in (start, length)]


def decide_site(site: AttentionSite, settings: Settings) -> None:
    """Refuse a site for the settings' sake, or accept it: sets its code and reason."""
    if site.code_refuses:
        return None
    if settings.when == "never":
        return site.refuse("never")
    if settings.policy == "dense":
        return site.refuse("policy", "policy='dense' keeps every attention dense")
    if _matches(site.name, settings.exclude) or (settings.include and not _matches(site.name, settings.include)):
        return site.refuse("excluded")
    if settings.when == "auto":
        if statically_known_true(settings.min_tokens > site.T):
            return site.refuse("too-short", f"{site.T} key tokens, fewer than min_tokens={settings.min_tokens}")
        why = _no_gain(site, settings)
        if why is not None:
            return site.refuse("no-gain", why)
    if settings.budgets and not any(_budget(site, settings).sparsity):
        return site.refuse("no-gain", "the calibration keeps every block of this site")
    if not isinstance(settings.protect, str):
        for start, length in settings.protect:
            if statically_known_true(start + length > site.T):
                warn_outside(start, length, hint(site.T))
    if settings.order != "none" or policies.needs_grid(settings.policy):
        found = _grid(site, settings)
        if found.sizes is None and policies.needs_grid(settings.policy):
            return site.refuse("no-grid", found.sentence)
        site.grid = found.sizes
        site.accept(found.sentence)
    else:
        site.accept()
    return None


def _grid(site: AttentionSite, settings: Settings) -> grid.Grid:
    """The configured token grid, else the one that the graph tells."""
    protect = settings.protected(site)[0]
    if settings.grid is None:
        return grid.find_grid(site, protect)
    free = site.S - sum(length for _, length in protect)
    if statically_known_true(math.prod(settings.grid) != free):
        misfit = f"no grid: {settings.grid} is given and the site has {hint(free)} tokens beside the protected ones"
        warn_misfit(settings.grid, hint(free))
        return grid.Grid(None, misfit)
    return grid.Grid(settings.grid, f"the grid {settings.grid} is given")


@functools.cache
def warn_outside(start: int, length: int, tokens: int) -> None:
    """One warning per range and number of tokens."""
    logger.warning(
        "protect=(%d, %d) reaches beyond the %d tokens of an attention here; what lies beyond protects nothing.",
        start, length, tokens,
    )  # fmt: skip


@functools.cache
def warn_misfit(given: tuple[int, int, int], tokens: int) -> None:
    """One warning per grid and number of tokens."""
    logger.warning(
        "grid=%s holds %d tokens, but attention here runs over %d beside the protected ones: they stay in their order.",
        given, math.prod(given), tokens,
    )  # fmt: skip


def _budget(site: AttentionSite, settings: Settings) -> Budget:
    """The calibrated budget of a site.

    Raises:
        CalibrationMismatchError: there is none, or it was found at other sizes.
    """
    known = dict(settings.budgets)
    found = known.get(site.name)
    if found is None:
        raise CalibrationMismatchError(
            f"the calibration has no budget for {site.name!r}, it names {len(known)} sites such as "
            f"{next(iter(known))!r}: it belongs to another model, or this one is compiled in parts; "
            "calibrate this model and compile it as a whole."
        )
    wanted = (len(found.sparsity), found.S, found.T, found.D)
    sizes = (site.H, site.S, site.T, site.D)
    # Comparing a symbolic size guards on it: another size compiles anew, and is refused here.
    if not all(bool(size == n) for size, n in zip(sizes, wanted)):
        raise CalibrationMismatchError(
            f"the calibration of {site.name!r} was made for (heads, queries, keys, head dim) = {wanted}, here they are "
            f"{tuple(map(hint, sizes))}; calibrate at this resolution."
        )
    return found


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    plain = name.split("#", maxsplit=1)[0]
    return any(fnmatchcase(plain, p) or fnmatchcase(plain, f"*.{p}") for p in patterns)


def _no_gain(site: AttentionSite, settings: Settings) -> str | None:
    """Why SDPA is at least as fast, as far as that is known at compile time; None: sparse may gain.

    With symbolic sizes the operator decides as it runs.
    """
    device = site.device if isinstance(site.device, torch.device) else torch.device(site.device)
    family = dispatch.family(device, site.dtype)
    if not cost.measured(family):
        return f"no cost constants for {family}, so dense is kept; when='always' or BLADE_COST_TABLE changes that"
    sizes = (site.B, site.H, site.S, site.T, site.D)
    if not all(type(size) is int for size in sizes):
        return None
    nK = -(-site.T // settings.block_size)
    levels = [level for level in Schedule.parse(settings.schedule).levels(settings.sparsity) if level is not None]
    share = 1 - max(levels) if levels else settings.min_keep
    if settings.budgets:
        heads = _budget(site, settings).sparsity
        share = 1 - sum(heads) / len(heads)
    kept = reference.keep_count(share, nK) / nK
    dtype = str(site.dtype).removeprefix("torch.")
    if cost.choose(family, dtype, (*sizes, settings.block_size), settings.probe_tokens, kept) == "sdpa":
        return f"dense is predicted to be as fast at {site.S} x {site.T} tokens"
    return None
