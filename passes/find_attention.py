"""Find every attention call of a Dynamo (or export) graph, in whatever form it is written.

``find_sites`` scans for candidates, which costs nothing where there are none; re-traces the graph once (``shadow``);
reads each candidate (``match``, ``adapters``); and decides what the graph alone can decide: a site that must stay
dense has a code of ``codes.py``. What depends on options is decided elsewhere. ``rewrite`` replaces a site.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from blade_compile.kernels.checks import DTYPES, MAX_HEAD_DIM
from blade_compile.passes import adapters
from blade_compile.passes.codes import Refusal, sentence
from blade_compile.passes.dims import Dim
from blade_compile.passes.fx_utils import is_tensor, module_path, same, shape_of, value_of
from blade_compile.passes.lineage import Lineage
from blade_compile.passes.masks import check_mask, needs_gradient
from blade_compile.passes.match import SDPA, Match, Operand, candidate, match
from blade_compile.passes.mutation import check_not_mutated, writers
from blade_compile.passes.operands import Plan, plan
from blade_compile.passes.shadow import Shadow, identity_shadow, trace_shadow
from blade_compile.passes.sources import Sources, classify_sources, other_samples

logger = logging.getLogger("blade_compile")

REWRITTEN = "rewritten"
_OWNER = "blade_custom_autograd"

_OPAQUE_KINDS = {
    "multi_head_attention_forward": "mha",
    "_native_multi_head_attention": "mha",
    "_transformer_encoder_layer_fwd": "encoder_layer",
}
_WORDS = ("softmax", "attention", "attn", "exp", "transformer_encoder_layer", "fmha", "flash_fwd")


@dataclass
class AttentionSite:
    """One attention call. Sizes are ints or SymInts; None where a refused call could not be read that far."""

    name: str
    kind: str
    node: fx.Node
    """the Dynamo node whose result the attention is, or which contains it"""
    code: str | None = None
    reason: str = ""
    B: Any = None
    H: Any = None
    S: Any = None
    T: Any = None
    D: Any = None
    dtype: Any = None
    device: Any = None
    mask_kind: str = "none"
    """none, key (honoured exactly), causal, window or pairwise (left dense)"""
    mask_needs_grad: bool = False
    scale: float | None = None
    sources: Sources = field(default_factory=lambda: Sources("unknown"))
    grid: tuple[Any, ...] | None = None
    """(T, H, W) of the tokens that are not protected, ints or SymInts, where an order or a policy asks for it"""
    rewritten: bool = False
    match: Match | None = field(default=None, repr=False)
    plan: Plan | None = field(default=None, repr=False)
    shadow: Shadow | None = field(default=None, repr=False)

    @property
    def code_refuses(self) -> bool:
        """True where the site stays dense."""
        return self.code is not None and self.code != REWRITTEN

    @property
    def shape(self) -> tuple[Any, ...]:
        """(B, H, S, T, D)."""
        return (self.B, self.H, self.S, self.T, self.D)

    @property
    def protect_q(self) -> tuple[Any, ...]:
        """(start, length) of the query tokens that are not image or video."""
        return tuple(self.sources.protect_q)

    @property
    def protect_k(self) -> tuple[Any, ...]:
        """The same for the keys."""
        return tuple(self.sources.protect_k)

    def refuse(self, code: str, detail: object = "") -> None:
        """Leave the site dense, with a code of ``codes.py``."""
        self.code, self.reason = code, sentence(code, detail)

    def accept(self, remark: str = "") -> None:
        """Say that the site is (to be) rewritten; ``remark``: what the report adds."""
        self.code, self.reason = REWRITTEN, "; ".join(filter(None, (sentence(REWRITTEN), remark)))


def find_sites(graph_or_module: Any, *, fake_mode: Any = None) -> list[AttentionSite]:
    """All attention calls of one graph (not of its sub-graphs, which are passed in by themselves)."""
    graph = graph_or_module.graph if isinstance(graph_or_module, fx.GraphModule) else graph_or_module
    if not may_hold_attention(graph):
        return []
    mark_custom_autograd(graph)
    sites = [_refused(node, "flex", Refusal("flex")) for node in graph.nodes if _is_flex(node)]
    shadow = _shadow(graph, fake_mode)
    lineage = _lineage(shadow)
    for node in list(shadow.graph.nodes):
        site = _read(shadow, lineage, node)
        if site is not None:
            sites.append(site)
    owner = (graph.owning_module.meta if graph.owning_module is not None else {}).get(_OWNER)
    if owner is not None:
        for site in sites:
            site.refuse("autograd-function", owner)
    position = {node: index for index, node in enumerate(graph.nodes)}
    sites.sort(key=lambda site: position.get(site.node, 0))
    _name_apart(sites)
    return sites


def mark_custom_autograd(graph_or_module: Any) -> None:
    """Mark the bodies of ``autograd.Function`` calls: their backward is the user's, so their forward must stay.

    A body looks like any other graph once it is handed to a pass, and Inductor hands over bodies before the graph that
    calls them; so a backend calls this on the whole graph first.
    """
    graph = graph_or_module.graph if isinstance(graph_or_module, fx.GraphModule) else graph_or_module
    for node in graph.nodes:
        if node.op != "get_attr" or graph.owning_module is None:
            continue
        body = getattr(graph.owning_module, str(node.target), None)
        if not isinstance(body, fx.GraphModule):
            continue
        if any(getattr(user.target, "__name__", "") == "autograd_function_apply" for user in node.users):
            for inner in body.modules():
                if isinstance(inner, fx.GraphModule):
                    inner.meta[_OWNER] = "tensors"
        mark_custom_autograd(body)


def may_hold_attention(graph: fx.Graph) -> bool:
    """The scan that makes a graph without attention free: one pass over the names of its calls."""
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and any(word in _name(node.target) for word in _WORDS):
            return True
    return False


def _name(target: Any) -> str:
    """What a call is named, with the namespace of registered operators."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target)
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _is_flex(node: fx.Node) -> bool:
    return node.op == "call_function" and "flex_attention" in getattr(node.target, "__name__", "")


def _shadow(graph: fx.Graph, fake_mode: Any) -> Shadow:
    try:
        return trace_shadow(graph, fake_mode)
    except Exception as error:
        logger.debug("the graph could not be re-traced, only SDPA calls are seen", exc_info=error)
        if any(node.op.startswith("call_") and "softmax" in _name(node.target) for node in graph.nodes):
            _warn_once(
                f"blade could not re-trace a graph of this model ({type(error).__name__}: {error}); in this graph only "
                "calls of scaled_dot_product_attention are found, attention written with softmax stays dense."
            )
        return identity_shadow(graph)


@functools.cache
def _warn_once(message: str) -> None:
    """One warning per distinct message and process."""
    logger.warning("%s", message)


def _lineage(shadow: Shadow) -> Lineage:
    names = {node: str(shadow.dynamo[node].target) for node in shadow.inputs if node in shadow.dynamo}
    lineage = Lineage.of(shadow.graph, names)
    for node in shadow.inputs:
        own = value_of(shadow.dynamo[node]) if node in shadow.dynamo else None
        node.meta["parameter"] = isinstance(own, torch.nn.Parameter) or lineage.is_parameter(node)
    return lineage


def _read(shadow: Shadow, lineage: Lineage, node: fx.Node) -> AttentionSite | None:
    """The site around one shadow node, refused or not; None where there is none."""
    kind = adapters.kind_of(node)
    if kind is None and not candidate(node):
        return None
    where = shadow.origin.get(node, node)
    label = kind or ("sdpa" if node.target in SDPA else "matmul")
    label = _OPAQUE_KINDS.get(getattr(where.target, "__name__", ""), label)
    try:
        found = adapters.match(node) if kind is not None else match(node)
        if found is None:
            return None
        found.kind = label
        return _site(shadow, lineage, found)
    except Refusal as refusal:
        return _refused(where, label, refusal, node)
    except Exception as error:
        logger.debug("%s could not be read", node, exc_info=error)
        return _refused(where, label, Refusal("unreadable", f"{type(error).__name__}: {error}"), node)


def _refused(node: fx.Node, kind: str, refusal: Refusal, call: fx.Node | None = None) -> AttentionSite:
    site = AttentionSite(module_path(node), kind, node, refusal.code, refusal.reason)
    _measure(site, call or node)
    site.mask_kind = {"causal": "causal", "window": "window", "pair-mask": "pairwise"}.get(refusal.code, "none")
    return site


def _measure(site: AttentionSite, call: fx.Node) -> None:
    """Sizes for the report, as far as a call that was not matched shows them: [.., H, S, D], or scores [.., S, T]."""
    tensors = [x for x in call.all_input_nodes if is_tensor(x)]
    if not tensors or len(shape_of(tensors[0])) < 2:
        return
    shape = (1, 1, *shape_of(tensors[0]))[-4:]
    site.B, site.H, site.S = shape[:3]
    site.dtype, site.device = value_of(tensors[0]).dtype, value_of(tensors[0]).device
    if len(tensors) < 3:
        site.T = shape[3]
        return
    site.T, site.D = shape_of(tensors[1])[-2], shape[3]
    if site.kind.startswith(("flash", "xformers")):
        site.S, site.H, site.T = shape[1], shape[2], shape_of(tensors[1])[1]


def _site(shadow: Shadow, lineage: Lineage, found: Match) -> AttentionSite:
    out = found.out.node
    where = shadow.dynamo.get(out) or shadow.origin[out]
    site = AttentionSite(module_path(where), found.kind, where, match=found, shadow=shadow, scale=found.scale)
    try:
        _describe(site, found)
        _check(site, shadow, lineage, found)
    except Refusal as refusal:
        site.code, site.reason = refusal.code, refusal.reason
        site.mask_kind = _refused(where, "", refusal).mask_kind if found.masks else "none"
    return site


def _describe(site: AttentionSite, found: Match) -> None:
    site.plan = chosen = plan(found)
    roles = found.roles
    site.B, site.H = roles.size(chosen.batch), roles.size(chosen.heads)
    site.S, site.T, site.D = (roles.sizes[atom] for atom in (found.queries, found.keys, found.features))
    value = value_of(found.out.node)
    value = value[0] if isinstance(value, (tuple, list)) else value
    site.dtype, site.device = chosen.dtype, value.device
    site.mask_kind = "key" if found.masks else "none"


def _check(site: AttentionSite, shadow: Shadow, lineage: Lineage, found: Match) -> None:
    """Refuse what the graph alone rules out."""
    for operand in (found.q, found.k, found.v):
        value = value_of(operand.node)
        if is_traceable_wrapper_subclass(value):
            raise Refusal("subclass", type(value).__name__)
    if site.dtype not in DTYPES:
        raise Refusal("dtype", site.dtype)
    _check_head_dims(found)
    placeholders = {node: shadow.requires_grad(node) for node in shadow.inputs}
    written = writers(shadow)

    def writers_of(node: fx.Node) -> list[fx.Node]:
        return written.get(shadow.storage.get(node), [])

    for term in found.masks:
        if is_tensor(term.node):
            site.mask_needs_grad |= needs_gradient(term.node, placeholders, writers_of)
        check_mask(found.roles, term, found.queries, found.keys, site.mask_needs_grad, lambda n: bool(writers_of(n)))
    site.sources = _sources(lineage, found)
    if site.sources.kind == "channels":
        raise Refusal("channels")
    if site.sources.kind == "cross":
        raise Refusal("cross", site.sources.reason)
    if _of_other_samples(lineage, found, site.plan):
        raise Refusal("cross", "other batch entries than those of the queries")
    if site.sources.kind == "unknown" and not _same_length(found):
        raise Refusal(
            "cross", f"{site.T} keys for {site.S} queries, and the graph does not show that one holds the other"
        )
    if site.plan is not None:
        check_not_mutated(shadow, found, site.plan)


def _check_head_dims(found: Match) -> None:
    sizes = [found.roles.sizes[atom] for atom in (found.features, found.channels)]
    # A symbolic head dimension is rare (raw q, k, v under dynamic=True); comparing it adds the one guard it needs.
    if not same(*sizes) or sizes[0] > MAX_HEAD_DIM:
        raise Refusal("head-dim", " and ".join(dict.fromkeys(str(size) for size in sizes)))


def _same_length(found: Match) -> bool:
    return same(found.roles.sizes[found.queries], found.roles.sizes[found.keys])


def _sources(lineage: Lineage, found: Match) -> Sources:
    axes = []
    for operand, atom in ((found.q, found.queries), (found.k, found.keys), (found.v, found.keys)):
        axis = _axis(found, operand, (atom,))
        if axis is None:
            return Sources("unknown", reason="the tokens do not have an axis of their own")
        axes.append(axis)
    q_dim, k_dim, v_dim = axes
    return classify_sources(
        found.q.node, found.k.node, found.v.node, q_dim=q_dim, k_dim=k_dim, v_dim=v_dim, lineage=lineage
    )


def _of_other_samples(lineage: Lineage, found: Match, chosen: Plan | None) -> bool:
    axes = [_axis(found, operand, chosen.batch) if chosen else None for operand in (found.q, found.k, found.v)]
    q, k, v = ((operand.node, axis) for operand, axis in zip((found.q, found.k, found.v), axes))
    return any(
        q[1] is not None and side[1] is not None and other_samples(lineage, (q[0], q[1]), (side[0], side[1]))
        for side in (k, v)
    )


def _axis(found: Match, operand: Operand, dim: Dim) -> int | None:
    layout = found.roles.now(operand.layout)
    return layout.index(dim) if dim in layout else None


def _name_apart(sites: list[AttentionSite]) -> None:
    """Several calls in one module are told apart by #1, #2."""
    for site in sites:
        site.name = site.name or site.kind
    total, seen = Counter(site.name for site in sites), Counter[str]()
    for site in sites:
        if total[site.name] > 1:
            seen[site.name] += 1
            site.name = f"{site.name}#{seen[site.name]}"
