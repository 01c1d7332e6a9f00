"""Where the token axis of a tensor lies: components, and how views, permutations and broadcasting move them.

The token index of a tensor is written as an ordered tuple of components ``(axis, inner, size)``, outermost first: it
is the row-major combination of the digits ``(index[axis] // inner) % size``. One plain axis of S tokens is
``((a, 1, S),)``; tokens (h, w) of a feature map [B, C, h, w] are ``((2, 1, h), (3, 1, w))``; tokens inside a flattened
[B*S, C] are ``((0, 1, S),)`` while the batch is ``((0, S, B),)``. Sizes are hints (plain ints): geometry only, never
lengths.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

Component = tuple[int, int, int]
Components = tuple[Component, ...]


def whole_axis(axis: int, size: int) -> Components:
    """Components of tokens that fill one axis; none where there is but one."""
    return ((axis, 1, size),) if size > 1 else ()


def normal(parts: Sequence[Component]) -> Components:
    """Drop size-1 digits and join neighbours that continue each other on one axis."""
    out: list[Component] = []
    for axis, inner, size in parts:
        if size == 1:
            continue
        if out and out[-1][0] == axis and out[-1][1] == inner * size:
            out[-1] = (axis, inner, out[-1][2] * size)
        else:
            out.append((axis, inner, size))
    return tuple(out)


def through_view(parts: Components, shape: Sequence[int], source: Sequence[int]) -> Components | None:
    """Components on ``source`` of a row-major view that has ``shape``; None where a digit straddles source axes."""
    if prod(shape) != prod(source):
        return None
    out: list[Component] = []
    for axis, inner, size in parts:
        piece = _digits(inner * prod(shape[axis + 1 :]), size, source)
        if piece is None:
            return None
        out.extend(piece)
    return normal(out)


def _digits(unit: int, size: int, source: Sequence[int]) -> list[Component] | None:
    """Split the digit ``(linear // unit) % size`` of a row-major index into digits of the source axes."""
    out: list[Component] = []
    stride = 1
    for axis in range(len(source) - 1, -1, -1):
        dim = source[axis]
        if size > 1 and dim > 1 and unit < stride * dim:
            if unit < stride or unit % stride:
                return None
            inner = unit // stride
            room = dim // inner
            take = min(room, size)
            if dim % inner or room % take or size % take:
                return None
            out.insert(0, (axis, inner, take))
            unit, size = unit * take, size // take
        stride *= dim
    return out if size == 1 else None


def through_axes(parts: Components, axis_map: Sequence[int | None]) -> Components | None:
    """Components after renaming axes: ``axis_map[a]`` is the source axis of output axis ``a`` (None: it has none)."""
    out: list[Component] = []
    for axis, inner, size in parts:
        source = axis_map[axis]
        if source is None:
            return None
        out.append((source, inner, size))
    return tuple(out)


def through_broadcast(parts: Components, shape: Sequence[int], source: Sequence[int]) -> Components | None:
    """Components on an operand of a broadcasting op (axes aligned from the right); None if it carries no tokens."""
    shift = len(shape) - len(source)
    out: list[Component] = []
    for axis, inner, size in parts:
        if axis < shift or source[axis - shift] != shape[axis]:
            return None
        out.append((axis - shift, inner, size))
    return tuple(out)


def fills(shape: Sequence[int], source: Sequence[int]) -> bool:
    """Whether an operand has the full size of the output on every axis (it is no table, gate or mask)."""
    shift = len(shape) - len(source)
    return all(size == 1 or (axis >= shift and source[axis - shift] == size) for axis, size in enumerate(shape))
