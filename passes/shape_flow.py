"""Token-axis rules of the ops that only move data: views, permutations, slices, concatenation, padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade_compile.passes import axes
from blade_compile.passes.extents import Extent, hint
from blade_compile.passes.token_flow import LEAF, Flow, Step, first_only, is_tensor, shape_of, value_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from blade_compile.passes.axes import Components


def view(step: Step) -> Flow:
    node = step.first()
    return step.merge([step.state(node, axes.through_view(step.parts, step.shape, shape_of(node)))])


def permutation(step: Step) -> Flow:
    node, rank = step.first(), len(step.shape)
    order = list(range(rank))
    if step.name in ("permute", "permute_copy"):
        order = [d % rank for d in step.ints(1, "dims")]
    elif step.name in ("movedim", "moveaxis"):
        source, target = ([d % rank for d in step.ints(i, n)] for i, n in ((1, "source"), (2, "destination")))
        if isinstance(step.arg(1, "source"), int):
            source, target = source[:1], [hint(step.arg(2, "destination")) % rank]
        rest = [d for d in range(rank) if d not in source]
        order = [source[target.index(d)] if d in target else rest.pop(0) for d in range(rank)]
    elif step.name == "T":
        order.reverse()
    else:
        pair = (-2, -1) if step.name in ("t", "mT", "mH", "adjoint") else (step.arg(1, "dim0"), step.arg(2, "dim1"))
        if rank >= 2:
            one, two = (hint(d) % rank for d in pair)
            order[one], order[two] = two, one
    return step.renamed(node, order)


def complex_view(step: Step) -> Flow:
    """view_as_complex / view_as_real: the feature axis [..., D, 2] becomes [..., D] and back."""
    node = step.first()
    tokens_on_pairs = step.name == "view_as_real" and len(step.shape) - 1 in step.token_axes()
    return LEAF if tokens_on_pairs else step.merge([step.state(node, step.parts)])


def attribute(step: Step) -> Flow:
    """``getattr(x, "mT")`` at the torch level."""
    if step.arg(1) not in ("T", "mT", "mH"):
        return first_only(step) if step.arg(1) in ("data", "real", "imag") else LEAF
    step.name = str(step.arg(1))
    return permutation(step)


def repetition(step: Step) -> Flow:
    """Expand / repeat: fine as long as the tokens themselves are not repeated."""
    node = step.first()
    return step.merge([step.state(node, axes.through_broadcast(step.parts, step.shape, shape_of(node)))])


def taken(step: Step, node: fx.Node, axis_map: Sequence[int | None], starts: dict[int, Any]) -> Flow:
    """A slice: ``starts[a]`` is the first index read along *source* axis ``a`` (absent: the whole axis is read)."""
    parts = axes.through_axes(step.parts, axis_map)
    cut = [p for p in parts or () if p[0] in starts]
    if parts is None or not cut:
        return step.merge([step.state(node, parts)])
    (axis, inner, size), shape = cut[0], value_of(node).shape
    if len(cut) > 1 or inner != 1 or parts[0] != cut[0] or size != hint(step.value.shape[axis_map.index(axis)]):
        return LEAF
    tail = parts[1:]
    start = value_of(starts[axis]) or 0
    start = start + shape[axis] if hint(start) < 0 else start
    whole = (*axes.whole_axis(axis, hint(shape[axis])), *tail)
    width = 1
    for _, _, extent in tail:
        width *= extent
    length = Extent(step.value.shape[axis_map.index(axis)]).times(width)
    return Flow("take", (((node, None, whole),),), start=Extent(start).times(width), length=length)


def slicing(step: Step) -> Flow:
    node, rank = step.first(), len(step.shape)
    axis = hint(step.arg(1, "dim", default=0)) % rank
    if step.name == "slice" and step.arg(4, "step", default=1) != 1:
        return LEAF if axis in step.token_axes() else step.renamed(node, list(range(rank)))
    return taken(step, node, list(range(rank)), {axis: step.arg(2, "start", default=0)})


def selection(step: Step) -> Flow:
    node = step.first()
    rank = len(shape_of(node))
    axis = hint(step.arg(1, "dim", default=0)) % rank
    return step.renamed(node, [a for a in range(rank) if a != axis])


def pieces(step: Step) -> Flow:
    """One output of chunk / split / unbind."""
    node, index = step.first(), step.index or 0
    rank = len(shape_of(node))
    if step.name == "unbind":
        axis = hint(step.arg(1, "dim", default=0)) % rank
        return step.renamed(node, [a for a in range(rank) if a != axis])
    axis = hint(step.arg(2, "dim", default=0)) % rank
    start: Any = 0
    for earlier in value_of(step.node)[:index]:
        start = start + earlier.shape[axis]
    return taken(step, node, list(range(rank)), {axis: start})


def getitem(step: Step) -> Flow:
    """Python indexing at the torch level, and the choice of one output of a multi-output op."""
    node, items = step.node.args
    if not is_tensor(node):
        return Flow("layers", (((node, items, step.parts),),)) if isinstance(items, int) else LEAF
    rank = len(shape_of(node))
    items = list(items) if isinstance(items, (tuple, list)) else [items]
    if any(is_tensor(i) or isinstance(i, (list, bool)) for i in items):
        return LEAF
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    spread = [slice(None)] * (rank - used)
    at = next((p for p, i in enumerate(items) if i is Ellipsis), len(items))
    axis_map: list[int | None] = []
    starts: dict[int, Any] = {}
    axis = 0
    for item in [*items[:at], *spread, *items[at + 1 :]]:
        if item is None:
            axis_map.append(None)
            continue
        if isinstance(item, slice):
            if item.step not in (None, 1) and len(axis_map) in step.token_axes():
                return LEAF
            if item.start is not None or item.stop is not None:
                starts[axis] = item.start
            axis_map.append(axis)
        axis += 1
    return taken(step, node, axis_map, starts)


def concatenation(step: Step) -> Flow:
    nodes = [n for n in step.arg(0, "tensors") if is_tensor(n) and 0 not in shape_of(n)]
    axis = hint(step.arg(1, "dim", "axis", default=0)) % len(step.shape)
    if axis not in step.token_axes():
        return step.merge([step.state(n, step.parts) for n in nodes])
    if len(nodes) == 1:
        return step.merge([step.state(nodes[0], step.parts)])
    head, tail = step.parts[0], step.parts[1:]
    if head != (axis, 1, step.shape[axis]) or any(a == axis for a, _, _ in tail):
        # The batch was concatenated under a flattened [B*S, C]: whole sequences follow each other.
        same = [n for n in nodes if shape_of(n)[axis] % _span(step.parts, axis) == 0]
        return step.merge([step.state(n, step.parts) for n in same]) if len(same) == len(nodes) else LEAF
    layer = tuple((n, None, (*axes.whole_axis(axis, shape_of(n)[axis]), *tail)) for n in nodes)
    return Flow("layers", (layer,))


def _span(parts: Components, axis: int) -> int:
    return max(inner * size for a, inner, size in parts if a == axis)


def stacking(step: Step) -> Flow:
    """stack, and pad_sequence of equally long samples: a new axis that is not the token axis."""
    axis = hint(step.arg(1, "dim", default=0)) % len(step.shape) if step.name == "stack" else 0
    axis_map = [None if a == axis else a - (a > axis) for a in range(len(step.shape))]
    parts = axes.through_axes(step.parts, axis_map)
    nodes = [n for n in step.arg(0, "tensors", "sequences") if is_tensor(n)]
    if parts is None:
        return LEAF
    pairs = [(axis_map[a], a) for a in step.token_axes()]
    full = [n for n in nodes if all(old is not None and shape_of(n)[old] == step.shape[new] for old, new in pairs)]
    return step.merge([step.state(n, parts) for n in full])


def padding(step: Step) -> Flow:
    node, pads, rank = step.first(), step.arg(1, "pad"), len(step.shape)
    starts, ends = ([0] * rank, [0] * rank)
    for i in range(len(pads) // 2):
        starts[rank - 1 - i], ends[rank - 1 - i] = value_of(pads[2 * i]), value_of(pads[2 * i + 1])
    moved = [a for a in step.token_axes() if hint(starts[a]) or hint(ends[a])]
    if not moved:
        return step.renamed(node, list(range(rank)))
    axis, head = moved[0], step.parts[0]
    if len(moved) > 1 or head != (axis, 1, step.shape[axis]) or hint(starts[axis]) < 0 or hint(ends[axis]) < 0:
        return LEAF
    tail = step.parts[1:]
    width = 1
    for _, _, size in tail:
        width *= size
    whole = (node, None, (*axes.whole_axis(axis, shape_of(node)[axis]), *tail))
    ordered = (Extent(starts[axis]).times(width), whole, Extent(ends[axis]).times(width))
    return Flow("layers", (tuple(o for o in ordered if not isinstance(o, Extent) or o.hint),))
