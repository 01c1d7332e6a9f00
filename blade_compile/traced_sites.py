"""A backend that rewrites graphs as blade does, runs them eagerly and writes down what each attention site does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .eager_calls import module_around
from .kernels import ops, reference  # noqa: F401 (ops registers the operators)
from .passes.decide import Settings
from .passes.extents import hint
from .passes.find_attention import AttentionSite, may_hold_attention
from .passes.fx_utils import module_path
from .passes.pipeline import SparseAttentionPass
from .report import Range, Site
from .site_probe import Observation, observe_call, predicted

Handler = Callable[[str, Callable[..., Tensor], tuple[Any, ...], dict[str, Any]], Tensor]
"""Computes a site's attention instead of its operator: site, operator, arguments, keyword arguments -> output"""

_DENSE_BY_CHOICE = {"disabled", "never", "policy", "excluded", "too-short", "no-gain"}


@dataclass
class SiteLog:
    """What the graphs of one run of the model contained and did, in the order in which they ran."""

    paths: dict[int, str]
    "module path by ``id`` of the module"
    measure: bool = False
    failed: str = ""
    "why there was no run, where there was none"
    handler: Handler | None = None
    "computes the sites' attention; None: the operators do, and rows are filled"
    sites: dict[tuple[int, str, str], Site] = field(default_factory=dict)
    "by graph, module in which the graph ran, and name within the graph"
    unreadable: set[str] = field(default_factory=set)
    "module paths in graphs that the pass could not read"
    unrecognised: set[str] = field(default_factory=set)
    "module paths of softmax and attention operators, whether or not they became sites"

    def rows(self) -> list[Site]:
        """One row per site; names are unique (#1, #2 for several calls in one module)."""
        rows = list(self.sites.values())
        by_path: dict[str, list[Site]] = {}
        for row in rows:
            by_path.setdefault(row.path, []).append(row)
        for path, same in by_path.items():
            for number, row in enumerate(same, 1):
                row.name = path if len(same) == 1 else f"{path}#{number}"
        return rows


class ProbeBackend:
    """The backend; graphs that it returns fill ``log`` as they run."""

    def __init__(self, settings: Settings, log: SiteLog) -> None:
        self.settings = settings
        self.log = log

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """What Dynamo asks of a backend: something to call in place of the graph."""
        return ProbedGraph(gm, self.settings, self.log).run


class ProbedGraph:
    """A rewritten graph. Sites are found once, and get a row for each module that the graph runs in."""

    def __init__(self, gm: fx.GraphModule, settings: Settings, log: SiteLog) -> None:
        self.gm = gm
        self.settings = settings
        self.log = log
        self.sites: list[AttentionSite] = []
        self.names: list[str] = []
        self.around = ""
        self.unreadable: set[str] = set()
        self.suspects: set[str] = set()
        for part in _parts(gm):
            self._rewrite(part)

    def run(self, *inputs: Any) -> Any:
        """Execute; called from the user's frame that Dynamo compiled."""
        self.around = module_around(self.log.paths, 2)
        self.log.unreadable |= {_join(self.around, path) for path in self.unreadable}
        self.log.unrecognised |= {_join(self.around, path) for path in self.suspects}
        for site in self.sites:
            self._row(site).calls += 1
        return self.gm(*inputs)

    def _rewrite(self, part: fx.GraphModule) -> None:
        if not may_hold_attention(part.graph):
            return
        self.suspects |= _attention_like(part.graph)
        everything = {module_path(node) for node in part.graph.nodes}
        found: list[list[AttentionSite]] = []
        try:
            SparseAttentionPass(self.settings, "explain", on_sites=found.append)(part.graph)
        except Exception:  # noqa: BLE001 (the pass keeps its errors to itself; should one escape, it is a row)
            found.clear()
        if not found:
            self.unreadable |= everything
        for site in found[0] if found else ():
            self.sites.append(site)
            if site.rewritten:
                self._listen(part.graph, site)
        part.recompile()

    def _listen(self, graph: fx.Graph, site: AttentionSite) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.blade.sparse_sdpa.default):
            if node.kwargs.get("site") == site.name:
                node.target = self._listener(site, node.target)

    def _listener(self, site: AttentionSite, op: Any) -> Callable[..., Tensor]:
        def blade_site(*args: Any, **kwargs: Any) -> Tensor:
            if self.log.handler is not None:
                return self.log.handler(_join(self.around, site.name), op, args, kwargs)
            row = self._row(site)
            try:
                out, seen = observe_call(op, args, kwargs, first=row.ran is None, measure=self.log.measure)
            except Exception as error:  # noqa: BLE001 (the report goes on: the compiled model would have raised here)
                row.code, row.reason, row.rewritten = (
                    "unreadable",
                    f"the operator failed: {type(error).__name__}: {error}",
                    False,
                )
                return _dense(*args[:3], **kwargs)
            _take(row, seen, site, kwargs)
            return out

        return blade_site

    def _row(self, site: AttentionSite) -> Site:
        key = (id(self), self.around, site.name)
        row = self.log.sites.get(key)
        if row is None:
            row = self.log.sites[key] = _new_row(site, self.around, self.settings)
        return row


def _parts(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph's own subgraphs, inner before outer, in the order of Inductor's pre-grad passes."""
    used = {node.target for node in gm.graph.find_nodes(op="get_attr")}
    children = [child for name, child in gm.named_children() if name in used and isinstance(child, fx.GraphModule)]
    return [part for child in children for part in _parts(child)] + [gm]


def _attention_like(graph: fx.Graph) -> set[str]:
    words = ("softmax", "attention", "attn", "transformer_encoder_layer")
    by_hand = ("exp", "exp_", "exp2")
    names = {
        node: str(getattr(node.target, "__name__", node.target)) for node in graph.nodes if node.op.startswith("call")
    }
    return {module_path(node) for node, name in names.items() if name in by_hand or any(word in name for word in words)}


def _join(around: str, path: str) -> str:
    return ".".join(part for part in (around, path) if part)


def _new_row(site: AttentionSite, around: str, settings: Settings) -> Site:
    """A row with what is known before the site runs; ``calls`` is counted by the caller."""
    row = Site(
        name=_join(around, module_path(site.node)) or site.kind,
        kind=site.kind,
        rewritten=site.rewritten,
        code=site.code or "unreadable",
        reason=site.reason,
        shape=tuple(None if size is None else hint(size) for size in site.shape),
        dtype=None if site.dtype is None else str(site.dtype).removeprefix("torch."),
        mask=site.mask_kind,
        calls=0,
    )
    shape = tuple(size for size in row.shape if size is not None)
    if not site.rewritten and site.dtype is not None and site.device is not None and len(shape) == 5:
        density = _best_density(shape[3], settings)
        device = torch.device(site.device)
        times = predicted(shape, site.dtype, device, settings.block_size, settings.probe_tokens, density)
        row.predicted_dense, sparse = times
        row.predicted_sparse = sparse if row.code in _DENSE_BY_CHOICE else None
    return row


def _best_density(num_keys: int, settings: Settings) -> float:
    """The density that the decision was based on: the budget, or the least that ``tau`` may keep."""
    num_blocks = -(-num_keys // settings.block_size)
    share = settings.min_keep if settings.sparsity is None else 1 - settings.sparsity
    return reference.keep_count(share, num_blocks) / num_blocks


def _take(row: Site, seen: Observation, site: AttentionSite, kwargs: dict[str, Any]) -> None:
    """Add what one call showed to its row."""
    first = row.ran is None
    row.shape, row.dtype, row.ran, row.block_size = seen.shape, seen.dtype, seen.ran, seen.block_size
    row.protected_q, row.protected_k = _ranges(kwargs.get("protect_q")), _ranges(kwargs.get("protect_k"))
    if seen.density is not None:
        before = 0.0 if first or row.density is None else row.density * (row.calls - 1)
        row.density = seen.density if first else (before + seen.density) / row.calls
    if first:
        row.recall, row.measured_dense, row.measured_sparse = seen.recall, seen.measured_dense, seen.measured_sparse
        if seen.density is None:
            row.code, row.reason = _ran_dense(seen, kwargs.get("min_tokens", 0))
        elif seen.density == 1:
            row.reason = f"keeps every block ({seen.ran} is at least as fast as SDPA here, or the options say so)"
        sizes = (
            seen.shape,
            getattr(torch, seen.dtype),
            torch.device(site.device),
            seen.block_size,
            kwargs.get("probe_tokens", 16),
        )
        row.predicted_dense, row.predicted_sparse = predicted(*sizes, 1.0 if seen.density is None else seen.density)


def _ran_dense(seen: Observation, min_tokens: int) -> tuple[str, str]:
    """The sizes were symbolic in the graph, so the operator decided."""
    tokens = f"{seen.shape[2]} x {seen.shape[3]} tokens"
    if seen.shape[3] < min_tokens:
        return "too-short", f"rewritten, but runs SDPA at {tokens}: fewer keys than min_tokens={min_tokens}"
    return "no-gain", f"rewritten, but runs SDPA at {tokens}: it is predicted to be as fast"


def _ranges(flat: Any) -> tuple[Range, ...]:
    numbers = [int(n) for n in flat or ()]
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _dense(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None, **_: Any
) -> Tensor:
    mask = reference.additive_mask(key_mask, q.dtype)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
