"""What each dimension of a tensor *is*: roles that follow tensors through views, permutations and products.

A role ("atom") is a number with a size: a batch axis, the heads, the queries, the keys, the head dimension. The layout
of a tensor gives every dimension the tuple of atoms it runs over, outermost first: scores [B*H, S, T] have the layout
``((b, h), (s,), (t,))``. Dimensions of size 1 have ``()``: they run over nothing and broadcast against anything. So
[B, H, S, D], merged heads, einsum orders, 5-D windows and grouped heads are all one case for the matchers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

from blade_compile.passes.fx_utils import Size, argument, aten, is_call, is_tensor, quotient, same, shape_of, value_of

Dim = tuple[int, ...]
Layout = tuple[Dim, ...]

VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.contiguous.default,
    aten.clone.default, aten.alias.default, aten.view_as.default, aten.reshape_as.default, aten.lift_fresh.default,
}  # fmt: skip
"""Row-major: the layout follows from the two shapes alone."""

SWAPS = {aten.transpose.int, aten.swapaxes.default, aten.swapdims.default}
LAST_TWO = {aten.mT.default, aten.t.default, aten.adjoint.default, aten.numpy_T.default}
CASTS = {
    aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default,
    torch.ops.prims.convert_element_type.default,
}  # fmt: skip


@dataclass
class Roles:
    """The atoms of one match."""

    sizes: list[Size] = field(default_factory=list)
    parts: dict[int, Dim] = field(default_factory=dict)
    """atom -> the atoms it was split into"""
    whole: set[int] = field(default_factory=set)
    """atoms that must not be split: queries, keys, head dimensions"""

    def new(self, size: Size) -> Dim:
        """A fresh atom as a dimension; none for size 1."""
        if isinstance(size, int) and size == 1:
            return ()
        self.sizes.append(size)
        return (len(self.sizes) - 1,)

    def fresh(self, shape: tuple[Size, ...]) -> Layout:
        """A layout of new atoms."""
        return tuple(self.new(size) for size in shape)

    def now(self, layout: Layout) -> Layout:
        """The layout in terms of the finest atoms known by now."""
        return tuple(tuple(leaf for atom in dim for leaf in self.leaves(atom)) for dim in layout)

    def leaves(self, atom: int) -> Dim:
        """The finest parts of an atom."""
        if atom not in self.parts:
            return (atom,)
        return tuple(leaf for part in self.parts[atom] for leaf in self.leaves(part))

    def size(self, dim: Dim) -> Size:
        """The size of a dimension that runs over these atoms."""
        return prod((self.sizes[atom] for atom in dim), start=1)

    def split(self, atom: int, sizes: list[Size]) -> Dim | None:
        """Cut an atom into parts, outermost first; None for atoms that must stay whole."""
        if atom in self.whole:
            return None
        dims = [self.new(size) for size in sizes]
        self.parts[atom] = tuple(part for dim in dims for part in dim)
        return self.parts[atom]

    # ---- views ----------------------------------------------------------------------------------------------------
    def regroup(self, layout: Layout, old: tuple[Size, ...], new: tuple[Size, ...]) -> Layout | None:
        """The layout after a row-major view from shape ``old`` to ``new``; None where atoms would be cut unevenly."""
        layout = self.now(layout)
        olds = [(dim, size) for dim, size in zip(layout, old) if not _unit(size)]
        news = [size for size in new if not _unit(size)]
        dims: list[Dim] = []
        i = j = 0
        while i < len(olds) or j < len(news):
            span = _equal_span([size for _, size in olds[i:]], news[j:])
            if span is None:
                return None
            atoms = tuple(atom for dim, _ in olds[i : i + span[0]] for atom in dim)
            piece = self._deal(atoms, news[j : j + span[1]])
            if piece is None:
                return None
            dims += piece
            i, j = i + span[0], j + span[1]
        rest = iter(dims)
        return tuple(() if _unit(size) else next(rest) for size in new)

    def _deal(self, atoms: Dim, sizes: list[Size]) -> list[Dim] | None:
        """Deal a row-major run of atoms to dimensions of the given sizes, splitting atoms where one covers several."""
        dims: list[Dim] = []
        queue = list(atoms)
        while len(dims) < len(sizes):
            size = sizes[len(dims)]
            taken: list[int] = []
            while queue and not same(self.size(tuple(taken)), size):
                atom = queue.pop(0)
                parts = self._cut(atom, quotient(size, self.size(tuple(taken))))
                if parts is None:
                    taken.append(atom)
                else:
                    queue = [*parts, *queue]
            if not same(self.size(tuple(taken)), size):
                return None
            dims.append(tuple(taken))
        return dims if not queue else None

    def _cut(self, atom: int, size: Size | None) -> Dim | None:
        """Split the outer part of ``size`` off an atom that is a proper multiple of it."""
        rest = quotient(self.sizes[atom], size) if size is not None else None
        if rest is None or _unit(rest) or _unit(size):
            return None
        return self.split(atom, [size, rest])


def _unit(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def _equal_span(old: list[Size], new: list[Size]) -> tuple[int, int] | None:
    """The shortest prefixes of both shapes with equal products (at most 6 dimensions together)."""
    for total in range(2, 8):
        for a in range(1, total):
            if a <= len(old) and total - a <= len(new) and same(prod(old[:a]), prod(new[: total - a])):
                return a, total - a
    return None


# ---- one step along a shadow graph -----------------------------------------------------------------------------------
def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """``p`` with output dimension i = input dimension p[i]; None where ``node`` is no permutation."""
    if node.op != "call_function" or not node.args or not is_tensor(node.args[0]):
        return None
    rank = len(shape_of(node.args[0]))
    order = list(range(rank))
    if node.target in SWAPS:
        a, b = node.args[1] % rank, node.args[2] % rank
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    if node.target in LAST_TWO and (rank == 2 or node.target in (aten.mT.default, aten.adjoint.default)):
        return (*order[:-2], rank - 1, rank - 2)
    if is_call(node, aten.permute.default):
        return tuple(d % rank for d in node.args[1])
    if is_call(node, {aten.movedim.int, aten.movedim.intlist}):
        return _moved(rank, node.args[1], node.args[2])
    return None


def _moved(rank: int, source: Any, target: Any) -> tuple[int, ...]:
    sources = [d % rank for d in ([source] if isinstance(source, int) else source)]
    targets = [d % rank for d in ([target] if isinstance(target, int) else target)]
    rest = iter([d for d in range(rank) if d not in sources])
    return tuple(sources[targets.index(d)] if d in targets else next(rest) for d in range(rank))


def forward(roles: Roles, node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of a view, permutation or cast from that of its first argument; None for any other call."""
    if is_call(node, CASTS):
        return layout if _floating(node.args[0]) and _floating(node) else None  # int and bool lose the values
    if is_call(node, VIEWS):
        return roles.regroup(layout, shape_of(node.args[0]), shape_of(node))
    order = permutation(node)
    if order is not None:
        layout = roles.now(layout)
        return tuple(layout[d] for d in order)
    if is_call(node, aten.expand.default) and _same_shape(node.args[0], node):
        return layout
    return None


def _floating(node: fx.Node) -> bool:
    return bool(value_of(node).dtype.is_floating_point)


def backward(roles: Roles, node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of the first argument of a view, permutation or repetition from that of its result."""
    if is_call(node, VIEWS):
        return roles.regroup(layout, shape_of(node), shape_of(node.args[0]))
    order = permutation(node)
    if order is not None:
        layout = roles.now(layout)
        return tuple(layout[order.index(d)] for d in range(len(order)))
    if is_call(node, aten.expand.default):
        return _unexpand(roles, node, layout)
    if is_call(node, aten.repeat_interleave.self_int):
        return _unrepeat(roles, node, layout)
    return None


def _unexpand(roles: Roles, node: fx.Node, layout: Layout) -> Layout | None:
    old, new = shape_of(node.args[0]), shape_of(node)
    layout = roles.now(layout)[len(new) - len(old) :]  # dimensions that expand put in front carry one value
    return tuple(() if _unit(size) else dim for size, dim in zip(old, layout))


def _unrepeat(roles: Roles, node: fx.Node, layout: Layout) -> Layout | None:
    dim, times = argument(node, "dim"), argument(node, "repeats")
    if dim is None or not isinstance(times, int):
        return None
    old = shape_of(node.args[0])
    dim %= len(old)
    wide = (*old[: dim + 1], times, *old[dim + 1 :])
    split = roles.regroup(layout, shape_of(node), wide)
    if split is None:
        return None
    return (*split[: dim + 1], *split[dim + 2 :])


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return len(shape_of(a)) == len(shape_of(b)) and all(same(x, y) for x, y in zip(shape_of(a), shape_of(b)))
