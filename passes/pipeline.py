"""The graph passes as Inductor runs them, and the keys that keep its caches honest.

SparseAttentionPass  pre-grad: finds attention and rewrites what gains (the only pass that changes numerics)
JointPass            joint: one token order for all sites; masks are saved for the backward, never predicted again
KeyPass              post-grad: changes nothing; its uuid puts blade's sources and options into the cache key
InlineKernelsPass    post-grad, on request: Triton kernels that Inductor launches itself
Chain                a user's own passes in the same slot, before ours
"""

from __future__ import annotations

import functools
import hashlib
import logging
import operator
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

from blade_compile.kernels.carried import CLOCK

from .decide import CalibrationMismatchError, Settings, decide_site
from .find_attention import AttentionSite, find_sites
from .graph_dump import dump_graph
from .merge_orders import merge_orders
from .rewrite import RewriteError, rewrite_site

logger = logging.getLogger("blade_compile")

WITH_CLOCK = ContextVar("blade_with_clock", default=False)
"""Set while a graph is compiled whose last input is the clock of a generation"""


class SparseAttentionPass(CustomGraphPass):
    """Rewrites the attention sites that gain; everything else in the graph stays as it is."""

    def __init__(
        self, settings: Settings, key: str, on_sites: Callable[[list[AttentionSite]], None] | None = None
    ) -> None:
        self.settings = settings
        self.key = key
        self.on_sites = on_sites  # the report's ear; not used in compiled models, where a cache hit skips the pass

    def uuid(self) -> str:
        return self.key

    def __call__(self, graph: fx.Graph) -> None:
        start = time.perf_counter()
        try:
            sites = find_sites(graph)
        except Exception as error:  # noqa: BLE001 (a user's program never breaks because of us)
            warn_unreadable(error)
            return
        if sites:
            dump_graph(graph, "before")
        for site in sites:
            self._treat(graph, site)
        if sites:
            graph.lint()
            if graph.owning_module is not None:
                graph.owning_module.recompile()
            dump_graph(graph, "after")
            _log(sites, time.perf_counter() - start)
        if self.on_sites is not None:
            self.on_sites(sites)

    def _treat(self, graph: fx.Graph, site: AttentionSite) -> None:
        try:
            decide_site(site, self.settings)
            if site.code_refuses:
                return
            clock = _clock(graph)
            rewrite_site(graph, site, {**self.settings.op_kwargs(site), "clock": clock})
            site.rewritten = True
            if clock is None and WITH_CLOCK.get():
                _warn_apart(site.name)
        except CalibrationMismatchError:
            raise
        except RewriteError as error:
            site.refuse("unreadable", str(error))
        except Exception as error:
            site.refuse("unreadable", f"{type(error).__name__}: {error}")
            logger.debug("site %s could not be rewritten", site.name, exc_info=True)


def _clock(graph: fx.Graph) -> fx.Node | None:
    """The input that carries the step of a generation, where the backend has added one."""
    return next((node for node in graph.find_nodes(op="placeholder") if node.name == CLOCK), None)


@functools.cache
def _warn_apart(name: str) -> None:
    logger.warning(
        "the attention %s lies in a part of the model that is compiled apart (a branch of torch.cond, a checkpointed "
        "block): it carries no state over the steps of a generation, and searches at every call.",
        name,
    )


def _log(sites: list[AttentionSite], seconds: float) -> None:
    done = sum(site.rewritten for site in sites)
    logger.info("%d of %d attention sites rewritten in %.2f s", done, len(sites), seconds)
    for site in sites:
        logger.debug("  %s: %s (%s)", site.name, site.code, site.reason)


@functools.cache
def warn_unreadable_once(message: str) -> None:
    """One warning per distinct message and process."""
    logger.warning("%s", message)


def warn_unreadable(error: Exception) -> None:
    """The one warning for a model that can't be read."""
    logger.debug("the graph could not be read", exc_info=error)
    warn_unreadable_once(
        f"blade could not read a graph of this model ({type(error).__name__}: {error}); "
        "it is compiled by plain Inductor."
    )


class JointPass(CustomGraphPass):
    """Makes one token order for all sites, and keeps predicted masks out of recomputation: under activation
    checkpointing a recomputed probe could round differently and select other blocks than the forward pass did. Pinning
    costs only the int32 lists in memory.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def uuid(self) -> str:
        return self.key

    def __call__(self, graph: fx.Graph) -> None:
        merge_orders(graph)
        for node in graph.find_nodes(op="call_function", target=torch.ops.blade.mask_predict.default):
            for pinned in (node, *(user for user in node.users if user.target is operator.getitem)):
                pinned.meta["recompute"] = CheckpointPolicy.MUST_SAVE


class KeyPass(CustomGraphPass):
    """Changes nothing; its uuid is part of the compile cache's key, which knows nothing of an operator's kernels."""

    def __init__(self, key: str) -> None:
        self.key = key

    def uuid(self) -> str:
        return self.key

    def __call__(self, graph: fx.Graph) -> None:
        return


class InlineKernelsPass(KeyPass):
    """Hands blade's Triton kernels over to Inductor, which then launches them itself (``inline_kernels=True``)."""

    def __call__(self, graph: fx.Graph) -> None:
        from .inline import inline_kernels

        inline_kernels(graph)


class Chain(CustomGraphPass):
    """Several passes in one slot; not cacheable if one of them isn't."""

    def __init__(self, passes: Iterable[Callable[[fx.Graph], None]]) -> None:
        self.passes = tuple(passes)

    def uuid(self) -> Any | None:
        keys = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if any(key is None for key in keys) else tuple(keys)

    def __call__(self, graph: fx.Graph) -> None:
        for run in self.passes:
            run(graph)


def chain(users: Any, ours: CustomGraphPass) -> CustomGraphPass:
    """Ours after the user's own pass or list of passes for the slot, if there are any."""
    if users is None:
        return ours
    return Chain((*users, ours) if isinstance(users, (list, tuple)) else (users, ours))


def inductor_patches(settings: Settings, inductor_options: dict[str, Any]) -> dict[str, Any]:
    """The user's Inductor options with blade's passes in their slots."""
    key = cache_key(settings)
    patches = dict(inductor_options)
    for slot, ours in (
        ("pre_grad_custom_pass", SparseAttentionPass(settings, key)),
        ("joint_custom_pre_pass", JointPass(key)),
        ("post_grad_custom_post_pass", InlineKernelsPass(key) if settings.inline_kernels else KeyPass(key)),
    ):
        # What is set globally would be replaced by a patch, and has to run too.
        patches[slot] = chain(patches[slot] if slot in patches else getattr(inductor_config, slot), ours)
    return patches


def cache_key(settings: Settings) -> str:
    """Hash of blade's sources, the settings and everything outside the graph that a decision or a result hangs on."""
    return hashlib.sha256(repr((source_hash(), settings, _environment())).encode()).hexdigest()


@functools.cache
def source_hash() -> str:
    """Hash of every file of the kernels and the passes."""
    from blade_compile.kernels import ops

    digest = hashlib.sha256()
    for folder in (Path(ops.__file__).parent, Path(__file__).parent):
        for path in sorted(p for p in folder.iterdir() if p.suffix in {".py", ".cpp", ".h", ".json"}):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _environment() -> tuple[str, ...]:
    from blade_compile.kernels import compat, cost, dispatch

    families = [dispatch.family(torch.device("cpu"), dtype) for dtype in dispatch.KERNEL_DTYPES]
    return (*families, compat.triton_version(), cost.table_hash())
