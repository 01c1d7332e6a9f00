"""Which of the sites that can be rewritten are: the settings, the shapes and the cost model decide."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from blade_compile.kernels import cost, dispatch, reference

from .find_attention import AttentionSite


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

    def op_kwargs(self, site: AttentionSite) -> dict[str, Any]:
        """Arguments of ``blade::sparse_sdpa`` beside the tensors and the scale."""
        if isinstance(self.protect, str):
            protect_q, protect_k = _flat(site.protect_q), _flat(site.protect_k)
        else:
            protect_q = protect_k = _flat(self.protect)
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
        }


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
    site.accept()
    return None


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
    share = settings.min_keep if settings.sparsity is None else 1 - settings.sparsity
    kept = reference.keep_count(share, nK) / nK
    dtype = str(site.dtype).removeprefix("torch.")
    if cost.choose(family, dtype, (*sizes, settings.block_size), settings.probe_tokens, kept) == "sdpa":
        return f"dense is predicted to be as fast at {site.S} x {site.T} tokens"
    return None
