"""The grid of an attention's tokens: how many frames, rows and columns they are, read from the graph.

A token order that follows space and time needs T x H x W, and the attention sees one axis of tokens. The graph knows
more: somewhere that axis was made by flattening a convolution's output or a tensor of patches, it is split again when
the output is put together, and position tables are flattened in the same way. ``axes`` writes a token index as digits
of axes, outermost first, so following the tokens back (``lineage``) until they are three digits, or two for an image,
gives the grid in raster order. Nothing is guarded on: sizes may be symbolic and are compared as expressions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import fx

from blade_compile.passes import axes
from blade_compile.passes.axes import Components
from blade_compile.passes.extents import Count, Extent, expression, hint, hints
from blade_compile.passes.find_attention import AttentionSite
from blade_compile.passes.fx_utils import is_tensor, module_path, quotient, same, value_of
from blade_compile.passes.lineage import Lineage
from blade_compile.passes.token_flow import State, op_name

_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"}

_EVIDENCE = (
    "the output of {op}{where}",  # the pixels of a convolution
    "the frames, rows and columns of {op}{where}",  # patches of a tensor
    "the output that {op}{where} puts together",
    "a position table that {op}{where} flattens",
)
_CONVOLUTION, _PATCHES, _OUTPUT, _TABLE = range(len(_EVIDENCE))


@dataclass(frozen=True)
class Grid:
    """sizes: (T, H, W), T outermost, their product the tokens that are not protected; ints or SymInts over the graph's
    sizes; None where the graph does not tell. sentence: where it was found, or why not.
    """

    sizes: tuple[Count, Count, Count] | None
    sentence: str


@dataclass(frozen=True)
class _Candidate:
    """A grid that one node of the graph suggests. Equal candidates of equal kind are one."""

    kind: int
    key: tuple[Any, ...]
    sizes: tuple[Count, ...] = field(compare=False)
    node: fx.Node = field(compare=False)


def find_grid(site: AttentionSite, protect: Sequence[tuple[int, int]] | None = None) -> Grid:
    """The grid of the tokens of ``site`` that are not protected. Never raises, never guards on a size.

    protect: (start, length) ranges that stand in for the site's own.
    """
    try:
        return _find(site, site.protect_q if protect is None else protect)
    except Exception as error:  # noqa: BLE001 (the analysis must never break a compile)
        return Grid(None, f"no grid: the graph could not be read ({type(error).__name__}: {error})")


def _find(site: AttentionSite, protect: Iterable[tuple[Any, Any]]) -> Grid:
    found, shadow = site.match, site.shadow
    if found is None or shadow is None:
        return Grid(None, "no grid: the attention could not be read")
    layout = found.roles.now(found.q.layout)
    if (found.queries,) not in layout:
        return Grid(None, "no grid: the tokens do not have an axis of their own")
    axis = layout.index((found.queries,))
    free = Extent(site.S)
    for _, length in protect:
        free = free - Extent(length)
    view = _Evidence.of(shadow.graph)
    state = (found.q.node, None, axes.whole_axis(axis, hint(site.S)))
    candidates = [c for c in view.candidates(state, free) if _available(c.sizes, site.node)]
    return _chosen(candidates, free, lambda node: module_path(shadow.origin.get(node, node)))


# ---- candidates ------------------------------------------------------------------------------------------------------
class _Evidence:
    """What one graph says about grids, kept on it: a walk serves all layers."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.lineage = Lineage.of(graph)
        self.above: dict[State, frozenset[State]] = {}  # state -> the states of its tokens that are several digits
        self.other: dict[Any, list[_Candidate]] = {}
        self._fixed: dict[fx.Node, bool] = {}

    @classmethod
    def of(cls, graph: fx.Graph) -> _Evidence:
        """The one of a graph."""
        found = getattr(graph, "_blade_grids", None)
        if found is None:
            found = graph._blade_grids = cls(graph)  # type: ignore[attr-defined]
        return found  # type: ignore[no-any-return]

    def candidates(self, state: State, free: Extent) -> list[_Candidate]:
        """All that is known about the tokens of ``state``, of which ``free`` lie on the grid."""
        above = [c for s in self.split_states(state) if (c := _upstream(s, free)) is not None]
        node, index, parts = state
        leaves = {leaf.node for segment in self.lineage.resolve((node, index, parts)) for leaf in segment.leaves}
        leaves = {leaf for leaf in leaves if self.lineage.is_data(leaf)}
        key = (free.key, frozenset(leaves))
        if key not in self.other:
            self.other[key] = [*self._outputs(free, leaves), *self._tables(free)]
        above.sort(key=lambda c: (c.kind, self.lineage.order[c.node]))
        return list(dict.fromkeys([*above, *self.other[key]]))

    def split_states(self, state: State) -> frozenset[State]:
        """The states that the tokens pass through on their way down here, where their axis is two or three digits."""
        stack = [state]
        while stack:
            top = stack[-1]
            if top in self.above:
                stack.pop()
                continue
            before = self.lineage.flow(top).states() if top[2] else []
            waiting = [s for s in before if s not in self.above]
            if waiting:
                stack.extend(waiting)
                continue
            own = frozenset({top}) if len(top[2]) in (2, 3) else frozenset[State]()
            self.above[top] = own.union(*(self.above[s] for s in before))
            stack.pop()
        return self.above[state]

    def _views(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Row-major views and what they read."""
        for node in self.graph.nodes:
            if node.op in ("call_function", "call_method") and op_name(node) in _VIEWS and is_tensor(node):
                source = node.args[0] if node.args else node.kwargs.get("self")
                if isinstance(source, fx.Node) and is_tensor(source):
                    yield node, source

    def _outputs(self, free: Extent, leaves: set[fx.Node]) -> Iterator[_Candidate]:
        """Views that split the axis of these very tokens."""
        for node, source in self._views():
            for axis in _axes_of(source, free):
                parts = _through(source, axis, node)
                if parts is not None and self._shares(source, axis, leaves):
                    yield from _candidate(_OUTPUT, node, node, parts, free)

    def _shares(self, node: fx.Node, axis: int, leaves: set[fx.Node]) -> bool:
        return any(leaf.node in leaves for part in self.lineage.segments(node, axis) for leaf in part.leaves)

    def _tables(self, free: Extent) -> Iterator[_Candidate]:
        """Views that flatten something that is no data to as many entries."""
        for node, source in self._views():
            if not self._is_fixed(source):
                continue
            for axis in _axes_of(node, free):
                parts = _through(node, axis, source)
                if parts is not None:
                    yield from _candidate(_TABLE, node, source, parts, free)

    def _is_fixed(self, node: fx.Node) -> bool:
        """Whether a node depends on nothing but positions, weights and what else the model owns."""
        if not self._fixed:
            for n in self.graph.nodes:
                owned = n.op == "placeholder" and re.match(r"l_self_", self.lineage.name(n), re.IGNORECASE)
                inputs = [x for x in n.all_input_nodes if not isinstance(value_of(x), (int, torch.SymInt))]
                made = n.op != "placeholder" and all(self._fixed.get(x, False) for x in inputs)
                self._fixed[n] = bool(owned) or made or not self.lineage.is_data(n)
        return self._fixed.get(node, False)


def _axes_of(node: fx.Node, free: Extent) -> list[int]:
    return [axis for axis, size in enumerate(value_of(node).shape) if same(size, free.value)]


def _through(node: fx.Node, axis: int, other: fx.Node) -> Components | None:
    """The digits on ``other`` of an axis of ``node``, one being a view of the other; None if they are one or many."""
    shape, source = hints(value_of(node).shape), hints(value_of(other).shape)
    parts = axes.through_view(axes.whole_axis(axis, shape[axis]), shape, source)
    return parts if parts is not None and len(parts) in (2, 3) else None


def _upstream(state: State, free: Extent) -> _Candidate | None:
    node, index, parts = state
    kind = _CONVOLUTION if re.search(r"conv\d?d?$|convolution", op_name(node)) else _PATCHES
    return next(_candidate(kind, node, node, parts, free, index), None)


def _candidate(
    kind: int, node: fx.Node, holder: fx.Node, parts: Components, free: Extent, index: int | None = None
) -> Iterator[_Candidate]:
    """The candidate whose digits are ``parts`` on ``holder``, if they multiply to the tokens for all sizes."""
    if prod(size for _, _, size in parts) != free.hint:
        return
    value = value_of(holder)
    shape = (value[index] if index is not None and isinstance(value, (tuple, list)) else value).shape
    sizes = [_size(shape[axis], inner, size) for axis, inner, size in parts]
    unknown = [i for i, size in enumerate(sizes) if size is None]
    if len(unknown) == 1:
        sizes[unknown[0]] = quotient(free.value, prod(size for size in sizes if size is not None))
    known = [size for size in sizes if size is not None]
    if len(known) == len(parts) and Extent(prod(known)) == free:
        yield _Candidate(kind, tuple(expression(size) for size in known), tuple(known), node)


def _size(whole: Count, inner: int, size: int) -> Count | None:
    """The size of a digit of an axis; None where it cannot be told from the axis alone."""
    if isinstance(whole, int) or (inner == 1 and size == hint(whole)):
        return size if isinstance(whole, int) else whole
    return quotient(whole, inner) if inner * size == hint(whole) else None


def _available(sizes: tuple[Count, ...], site: fx.Node) -> bool:
    """Whether a rewrite of ``site`` can name the sizes: symbolic ones must be those of something before it."""
    symbolic = {expression(size) for size in sizes if isinstance(size, torch.SymInt)}
    symbolic = {size for size in symbolic if not isinstance(size, int)}
    if not symbolic:
        return True
    for node in site.graph.nodes:
        if node is site:
            return False
        value = value_of(node)
        held = [value] if isinstance(value, torch.SymInt) else value.shape if isinstance(value, torch.Tensor) else ()
        symbolic -= {expression(size) for size in held if isinstance(size, torch.SymInt)}
        if not symbolic:
            return True
    return False


# ---- the choice ------------------------------------------------------------------------------------------------------
def _chosen(candidates: list[_Candidate], free: Extent, path: Callable[[fx.Node], str]) -> Grid:
    """The grid that the strongest evidence agrees on; a finer reading of the same split counts for all."""
    finest = [c for c in candidates if not any(_refines(other, c) for other in candidates)]
    for kinds in ((_CONVOLUTION,), (_PATCHES,), (_OUTPUT, _TABLE)):
        group = sorted((c for c in finest if c.kind in kinds), key=lambda c: c.kind)
        if not group:
            continue
        if any(other.key != group[0].key for other in group):
            seen = " and ".join(dict.fromkeys(_times(c.sizes) for c in group))
            return Grid(None, f"no grid: the graph suggests {seen}; give grid=(T, H, W)")
        T, H, W = (1,) * (3 - len(group[0].sizes)) + group[0].sizes
        return Grid((T, H, W), f"{_times((T, H, W))} tokens, from {_where(group[0], path)}")
    return Grid(
        None,
        f"no grid: no convolution, patches or position table in the graph shows {free.key} tokens as frames, rows and "
        "columns; give grid=(T, H, W)",
    )


def _refines(fine: _Candidate, coarse: _Candidate) -> bool:
    """Whether ``coarse`` is ``fine`` with two neighbouring axes taken as one."""
    if len(fine.sizes) != len(coarse.sizes) + 1:
        return False
    one, two = fine.sizes, coarse.sizes
    merged = [(*one[:i], a * b, *one[i + 2 :]) for i, (a, b) in enumerate(pairwise(one))]
    return any(all(map(same, sizes, two)) for sizes in merged)


def _times(sizes: tuple[Count, ...]) -> str:
    return " x ".join(str(expression(size)) for size in sizes)


def _where(found: _Candidate, path: Callable[[fx.Node], str]) -> str:
    place = path(found.node)
    op = "an input" if found.node.op == "placeholder" else op_name(found.node)
    return _EVIDENCE[found.kind].format(op=op, where=f" in {place}" if place else "")
