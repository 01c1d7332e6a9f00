"""Where the queries and keys of an attention come from: one sequence, a part of it, or two sequences.

Shapes cannot tell: cross-attention may have as many keys as queries, and self-attention may have more (text or a cache
in front of the image). The graph can: ``lineage`` gives the ordered parts of q and k with the tensors they are made of,
and this file compares them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blade_compile.passes.extents import ZERO
from blade_compile.passes.lineage import Leaf, Lineage, Segment, Segments, aligned, take, total
from blade_compile.passes.protect import Part, image_leaves, protected
from blade_compile.passes.token_flow import op_name

if TYPE_CHECKING:
    from torch import fx

KINDS = ("self", "prefix", "suffix", "cross", "unknown")


@dataclass(frozen=True)
class Sources:
    """kind: "self" (same tokens), "prefix" / "suffix" (the queries are the first / last keys), "cross" (other tokens),
    "unknown" (the graph does not say; self if the lengths agree). protect_q / protect_k: token ranges that are not
    image, see ``protect``. reason: one sentence naming what was found.
    """

    kind: str
    protect_q: tuple[Part, ...] = ()
    protect_k: tuple[Part, ...] = ()
    reason: str = ""


def classify_sources(
    q_node: fx.Node,
    k_node: fx.Node,
    v_node: fx.Node,
    *,
    q_dim: int = -2,
    k_dim: int = -2,
    v_dim: int = -2,
    lineage: Lineage | None = None,
) -> Sources:
    """Classify an attention by its q [.., S, D], k and v [.., T, D] nodes; ``*_dim`` are their token axes.

    Works on a pre-dispatch ATen graph (``meta["val"]``) and on a Dynamo graph (``meta["example_value"]``); pass names
    of placeholders first with ``Lineage.of(graph, names)``. Never raises and never guards on a size.
    """
    try:
        lineage = lineage or Lineage.of(q_node.graph)
        sides = [lineage.segments(n, d) for n, d in ((q_node, q_dim), (k_node, k_dim), (v_node, v_dim))]
        return _classify(lineage, *sides)
    except Exception as error:  # noqa: BLE001 (the analysis must never break a compile)
        return Sources("unknown", reason=f"the graph could not be read ({type(error).__name__}: {error})")


_RESAMPLED = {"flip", "roll", "index", "index_select", "expand", "expand_as", "broadcast_to", "repeat"}


def other_samples(lineage: Lineage, q: tuple[fx.Node, int], other: tuple[fx.Node, int]) -> bool:
    """Whether the graph shows keys (or values) of other batch entries than the queries': a (node, batch axis) each.

    They are made of other ranges of a tensor that both come from, or went through a call that moves batch entries.
    """
    one, two = (_leaves(lineage, lineage.segments(*side)) for side in (q, other))
    if not one or not two or one & two:
        return False
    nodes = {leaf.node for leaf in one}
    return any(leaf.node in nodes for leaf in two) or _moves(one) != _moves(two)


def _moves(leaves: frozenset[Leaf]) -> set[tuple[str, str]]:
    """The calls among the leaves that move entries, with what they move by; alike on both sides they do no harm."""
    calls = [leaf.node for leaf in leaves if op_name(leaf.node) in _RESAMPLED]
    return {(op_name(call), str(call.args[1:])) for call in calls}


def _classify(lineage: Lineage, q: Segments, k: Segments, v: Segments) -> Sources:
    if not q or not k:
        return Sources("unknown", reason="the token axis of the queries or keys has one token or no known size")
    if _channels(q) and _channels(k):
        return Sources("channels", reason="queries and keys are the channels of a projection")
    kind, reason = _kind(lineage, q, k, v)
    if kind == "cross":
        return Sources(kind, reason=reason)
    return Sources(kind, protected(q, lineage), protected(k, lineage, image_leaves(q, lineage)), reason)


def _channels(segments: Segments) -> bool:
    """Whether the tokens are the output features of a linear layer, with nothing learned after it (XCiT)."""
    leaves = [leaf for segment in segments for leaf in segment.leaves]
    return all(op_name(leaf.node) == "linear" for leaf in leaves) and not any(s.projected for s in segments)


def _kind(lineage: Lineage, q: Segments, k: Segments, v: Segments) -> tuple[str, str]:
    size_q, size_k = total(q), total(k)
    if size_q == size_k and _same_tokens(lineage, q, k, v):
        return "self", f"queries and keys are made of the same tokens: {_describe(lineage, q)}"
    if size_k.hint > size_q.hint:
        extra = size_k - size_q
        if _same_tokens(lineage, q, take(k, extra, size_q), ()):
            return "suffix", f"the queries are the last keys, after {_describe(lineage, take(k, ZERO, extra))}"
        if _same_tokens(lineage, q, take(k, ZERO, size_q), ()):
            return "prefix", f"the queries are the first keys, before {_describe(lineage, take(k, size_q, extra))}"
    if _raw(lineage, q) and _raw(lineage, k):
        return "unknown", "queries and keys are separate graph inputs, so nothing tells where they come from"
    one, two = _leaves(lineage, q), _leaves(lineage, k)
    if size_q == size_k and one == two:
        return "self", f"queries and keys are the same tokens in another order: {_describe(lineage, q)}"
    if _related(_inner(lineage, one), _inner(lineage, two)):
        if size_q == size_k:
            return "self", f"queries and keys are separate convolutions or shifts of {_describe(lineage, q)}"
        return "unknown", f"the keys are a resampled or partial copy of the queries' sequence {_describe(lineage, q)}"
    if 2 * len(one & two) > min(len(one), len(two)):
        return "unknown", f"queries and keys share only some tokens: {_describe(lineage, k)}"
    return "cross", f"keys come from another tensor: {_describe(lineage, k)}"


def _same_tokens(lineage: Lineage, q: Segments, k: Segments, v: Segments) -> bool:
    """Whether q and k agree part by part; v (of k's length, or empty) decides where both only share something."""
    if total(k) != total(q):
        return False
    sides = aligned([q, k, v] if v and total(v) == total(k) else [q, k])
    if len({len(side) for side in sides}) > 1:
        return False
    groups = list(zip(*sides))
    # One token has no axis to be followed along (a class token cut off and put back): the others tell.
    telling = [group for group in groups if group[0].length.hint > 1] or groups
    return all(_related_parts(lineage, group) for group in telling)


def _related_parts(lineage: Lineage, group: tuple[Segment, ...]) -> bool:
    sides = [_leaves(lineage, (segment,)) for segment in group]
    return _related(*sides) or (_picked_alike(sides) and _related(*(_inner(lineage, side) for side in sides)))


def _picked_alike(sides: list[frozenset[Leaf]]) -> bool:
    """Whether all sides are tokens picked by the same index (the valid text tokens of each of q, k and v)."""
    nodes = [leaf.node for side in sides for leaf in side]
    return all(op_name(node) == "index" and node.args[1:] == nodes[0].args[1:] for node in nodes)


def _related(q: frozenset[Leaf], k: frozenset[Leaf], v: frozenset[Leaf] = frozenset()) -> bool:
    """Same origin: equal up to what was added to one side only (positions). Two streams to which the same positions
    were added share a leaf as well, so a part in common is not enough unless it is the values or the larger part.
    """
    shared = q & k
    if not shared:
        return False
    return shared in (q, k) or (bool(v) and v <= q) or 2 * len(shared) > min(len(q), len(k))


def _leaves(lineage: Lineage, segments: Segments) -> frozenset[Leaf]:
    """All leaves that depend on the call's inputs; weights (learned positions) only where there is nothing else."""
    every = frozenset().union(*(segment.leaves for segment in segments))
    return frozenset(leaf for leaf in every if lineage.is_data(leaf.node)) or every


def _inner(lineage: Lineage, leaves: frozenset[Leaf]) -> frozenset[Leaf]:
    """Leaves with those that are convolutions, shifts and the like replaced by what they read."""
    out: set[Leaf] = set()
    for leaf in leaves:
        states = lineage.inner.get(leaf.node, ())
        out.update(*(_leaves(lineage, lineage.resolve(state)) for state in states) if states else ({leaf},))
    return frozenset(out)


def _raw(lineage: Lineage, segments: Segments) -> bool:
    """Whether a sequence is a graph input on which no weight was applied."""
    inputs = all(leaf.node.op == "placeholder" for leaf in _leaves(lineage, segments))
    return inputs and not any(segment.projected for segment in segments)


def _describe(lineage: Lineage, segments: Segments) -> str:
    """The most telling leaves: graph inputs by name, else the ops whose outputs they are (at most three)."""
    leaves = sorted(_leaves(lineage, segments), key=lambda leaf: (lineage.order.get(leaf.node, 0), leaf.start.hint))
    inputs = [leaf for leaf in leaves if leaf.node.op in ("placeholder", "get_attr")]
    words = [_plain(lineage.name(leaf.node)) for leaf in inputs]
    words += [f"the output of {op_name(leaf.node)}" for leaf in leaves if leaf not in inputs]
    words = list(dict.fromkeys(words))
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _plain(name: str) -> str:
    """``L_self_modules_proj_parameters_pos_`` as ``self.proj.pos``."""
    name = re.sub(r"^[Ll]_(kwargs_|args_)?", "", name).strip("_")
    return re.sub(r"_(modules|parameters|buffers)_", ".", name)
