"""Tokens written into a buffer: ``out = empty_like(x); out[..., 0::2] = a; out[:, n:] = b``.

Rotary embeddings (Wan) and ragged batches (Lumina2) build their result this way. The walk meets the buffer, whose own
op says nothing; what it holds is found among its users, as index assignments (``setitem`` in a Dynamo graph, ``copy_``
into a chain of ``slice`` / ``select`` in ATen).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blade_compile.passes import axes
from blade_compile.passes.extents import Extent, hint
from blade_compile.passes.token_flow import LEAF, Flow, State, is_tensor, op_name, shape_of, value_of

if TYPE_CHECKING:
    from torch import fx

    from blade_compile.passes.axes import Components

BUFFERS = frozenset(
    [
        "empty",
        "zeros",
        "ones",
        "full",
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "empty_strided",
        "new_empty_strided",
    ]
)


@dataclass
class _Window:
    """A view of the buffer: the buffer axis of each of its axes, the token range, and what else was selected."""

    node: fx.Node
    axes: list[int]
    start: Extent
    length: Extent
    other: tuple[Any, ...] = field(default=())


def writes_to(buffer: fx.Node) -> list[tuple[fx.Node, list[tuple[str, Any]]]]:
    """(value, chain) of each assignment into a buffer, in program order.

    A chain step is ("slice", (dim, start, step)) or ("select", (dim, index)).
    """
    found: list[tuple[fx.Node, list[tuple[str, Any]]]] = []
    stack: list[tuple[fx.Node, list[tuple[str, Any]]]] = [(buffer, [])]
    while stack:
        node, chain = stack.pop()
        for user in node.users:
            name = op_name(user)
            if name == "setitem" and user.args[0] is node and is_tensor(user.args[2]):
                steps = _index_steps(user.args[1], len(shape_of(node)))
                if steps is not None:
                    found.append((user.args[2], chain + steps))
            elif name == "copy" and user.args[0] is node and is_tensor(user.args[1]):
                found.append((user.args[1], chain))
            elif name == "slice" and user.args[0] is node:
                given = (*user.args[1:], *(0, None, None, 1)[len(user.args) - 1 :])
                stack.append((user, [*chain, ("slice", (hint(given[0]), given[1], given[3]))]))
            elif name == "select" and user.args[0] is node:
                stack.append((user, [*chain, ("select", (hint(user.args[1]), user.args[2]))]))
    order = {node: i for i, node in enumerate(buffer.graph.nodes)}
    return sorted(found, key=lambda write: order.get(write[0], 0))


def is_written(buffer: fx.Node) -> bool:
    """Whether anything at all is written into a buffer, understood or not."""
    names = {op_name(user) for user in buffer.users if user.args and user.args[0] is buffer}
    return bool(names & {"setitem", "copy", "index_put", "masked_scatter", "scatter"}) or bool(writes_to(buffer))


def _index_steps(items: Any, rank: int) -> list[tuple[str, Any]] | None:
    """A Python index as slice and select steps, last axis first so that earlier axis numbers stay valid."""
    items = list(items) if isinstance(items, (tuple, list)) else [items]
    if any(i is None or is_tensor(i) or isinstance(i, (list, bool)) for i in items):
        return None
    at = next((p for p, i in enumerate(items) if i is Ellipsis), len(items))
    spread = [slice(None)] * (rank - len([i for i in items if i is not Ellipsis]))
    steps: list[tuple[str, Any]] = []
    for axis, item in enumerate([*items[:at], *spread, *items[at + 1 :]]):
        if not isinstance(item, slice):
            steps.insert(0, ("select", (axis, item)))
        elif item != slice(None):
            steps.insert(0, ("slice", (axis, item.start, 1 if item.step is None else item.step)))
    return steps


def written(buffer: fx.Node, parts: Components) -> Flow:
    """The layers written into a buffer, each an ordered list of values and gaps along the token axis."""
    if len(parts) != 1 or parts[0] != (parts[0][0], 1, shape_of(buffer)[parts[0][0]]):
        return LEAF
    token_axis = parts[0][0]
    size = value_of(buffer).shape[token_axis]
    groups: dict[Any, list[tuple[Extent, Extent, State]]] = {}
    for number, (value, chain) in enumerate(writes_to(buffer)):
        window = _window(buffer, chain, token_axis, size, value)
        if window is None:
            return LEAF
        shape = tuple(shape_of(buffer)[a] if a != token_axis else window.length.hint for a in window.axes)
        inner = axes.whole_axis(window.axes.index(token_axis), window.length.hint)
        source = axes.through_broadcast(inner, shape, shape_of(value)) if inner else None
        if source is not None:
            whole = window.length.hint == hint(size)
            key = ("whole", number) if whole else window.other
            groups.setdefault(key, []).append((window.start, window.length, (value, None, source)))
    layers = [_tiled(group, Extent(size)) for group in groups.values()]
    clean = tuple(dict.fromkeys(layer for layer in layers if layer is not None))
    return Flow("layers", clean) if clean and len(layers) == len([x for x in layers if x]) else LEAF


def _window(buffer: fx.Node, chain: list[tuple[str, Any]], token_axis: int, size: Any, value: fx.Node) -> Any:
    left = list(range(len(shape_of(buffer))))
    window = _Window(buffer, left, Extent(0), Extent(size))
    for kind, (dim, *rest) in chain:
        axis = left[dim]
        if kind == "select":
            if axis == token_axis:
                return None
            left.pop(dim % len(left))
            window.other += (("select", axis, str(rest[0])),)
        elif axis != token_axis:
            window.other += (("slice", axis, str(rest)),) if rest[0] or rest[1] != 1 else ()
        elif rest[1] != 1:
            return None
        else:
            start = value_of(rest[0]) or 0
            start = start + size if hint(start) < 0 else start
            window.start = window.start + Extent(start)
            back = len(left) - left.index(token_axis)
            shape = value_of(value).shape
            window.length = Extent(shape[-back]) if len(shape) >= back else Extent(1)
    return window


def _tiled(group: list[tuple[Extent, Extent, State]], size: Extent) -> tuple[Any, ...] | None:
    """Assigned ranges in order with the gaps between them; None if they overlap."""
    out: list[Any] = []
    end = Extent(0)
    for start, length, state in sorted(group, key=lambda item: item[0].hint):
        if start.hint < end.hint:
            return None
        if start.hint > end.hint:
            out.append(start - end)
        out.append(state)
        end = start + length
    if end.hint > size.hint:
        return None
    return (*out, size - end) if end.hint < size.hint else tuple(out)
