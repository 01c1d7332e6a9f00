"""Writing nodes into the user's graph: each new node gets a fake value and the metadata of the node it serves.

ATen operators are used throughout: Dynamo's graph and export's take them alike, and they are safe for the compile
cache. ``Emitter.arrange`` turns a tensor of one layout (see ``dims``) into another with as few nodes as it takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from blade_compile.passes.dims import Dim, Layout, Roles
from blade_compile.passes.extents import expression
from blade_compile.passes.fx_utils import Size, aten, is_tensor, same, shape_of, value_of
from blade_compile.passes.shadow import Shadow, opaque

_COPIED = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom", "autograd_backward")


class RewriteError(Exception):
    """A site that looked rewritable could not be written out; the graph is as it was."""


class Emitter:
    """Inserts nodes before ``anchor``; ``undo`` takes all of them out again."""

    def __init__(self, graph: fx.Graph, shadow: Shadow, anchor: fx.Node, fake_mode: Any) -> None:
        self.graph, self.shadow, self.anchor, self.fake_mode = graph, shadow, anchor, fake_mode
        self.made: list[fx.Node] = []
        self.copies: dict[fx.Node, fx.Node] = {}
        self.key = "example_value" if "example_value" in anchor.meta or "val" not in anchor.meta else "val"
        self.before = self._position()

    def _position(self) -> set[fx.Node]:
        nodes: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node is self.anchor:
                return nodes
            nodes.add(node)
        raise RewriteError("the site's node is no longer in the graph")

    # ---- single nodes ---------------------------------------------------------------------------------------------
    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call with its fake value."""
        return self._insert(target, args, kwargs, self._run(target, args, kwargs))

    def _run(self, target: Any, args: Any, kwargs: Any) -> Any:
        values, options = tree_map(value_of, (list(args), kwargs))
        with self.fake_mode, torch.no_grad():
            return target(*values, **options)

    def _insert(self, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, tuple(args), kwargs)
        node.meta.update({name: self.anchor.meta[name] for name in _COPIED if name in self.anchor.meta})
        node.meta[self.key] = value
        self.made.append(node)
        self.before.add(node)
        return node

    def undo(self) -> None:
        """Take out every node that was inserted."""
        for node in reversed(self.made):
            if not node._erased and not node.users:
                self.graph.erase_node(node)

    # ---- from the shadow into the graph ---------------------------------------------------------------------------
    def bring(self, node: Any) -> Any:
        """The user's node for a shadow node; where there is none (inside an opaque call), a copy of the ATen call."""
        if not isinstance(node, fx.Node):
            return node
        own = self.shadow.dynamo.get(node)
        if own is not None and own in self.before:
            return own
        if node in self.copies:
            return self.copies[node]
        if node.op != "call_function" or node.target is opaque:
            raise RewriteError(f"{node} has no counterpart in the graph")
        args, kwargs = (fx.map_arg(x, self.bring) for x in (node.args, node.kwargs))
        self.copies[node] = self._insert(node.target, args, kwargs, value_of(node))
        return self.copies[node]

    def size(self, size: Size) -> Any:
        """A size as an argument: the int, or a node with exactly that symbolic value."""
        if isinstance(size, (int, fx.Node)):
            return self.bring(size)
        if isinstance(expression(size), int):
            return expression(size)
        wanted = expression(size)
        for node in self.graph.nodes:
            if node not in self.before:
                break
            value = value_of(node)
            if isinstance(value, torch.SymInt) and expression(value) == wanted:
                return node
        return self._size_of_some_tensor(size, wanted)

    def _size_of_some_tensor(self, size: Size, wanted: Any) -> fx.Node:
        for node in self.graph.nodes:
            if node not in self.before:
                break
            if not is_tensor(node):
                continue
            for dim, own in enumerate(shape_of(node)):
                if expression(own) == wanted:
                    return self._insert(aten.sym_size.int, (node, dim), {}, own)
        return self._computed(size, wanted)

    def _computed(self, size: Size, wanted: Any) -> fx.Node:
        """A size that no tensor has (the start of a range, say): sums and products of sizes that some have."""
        import operator

        import sympy

        if not isinstance(wanted, (sympy.Add, sympy.Mul)):
            raise RewriteError(f"no node holds the size {wanted}")
        combine = operator.add if isinstance(wanted, sympy.Add) else operator.mul
        result: Any = None
        for term in wanted.args:
            value: Any = int(term) if term.is_Integer else size.node.shape_env.create_symintnode(term, hint=None)
            part = self.size(value)
            result = part if result is None else self.call(combine, result, part)
        return result

    # ---- layouts --------------------------------------------------------------------------------------------------
    def arrange(self, node: fx.Node, roles: Roles, have: Layout, want: Layout, full: Layout | None = None) -> fx.Node:
        """``node`` of layout ``have`` as a tensor of layout ``want``.

        Atoms of ``want`` that ``have`` lacks are filled by expanding where ``full`` (default: ``want``) names them;
        a dimension that lacks all its atoms and is () in ``full`` stays at size 1.
        """
        have, want = roles.now(have), roles.now(want)
        full = want if full is None else roles.now(full)
        if have == want:
            return node
        node, pieces = self._split(node, roles, list(have), want)
        node, pieces = self._drop_units(node, pieces)
        present = {atom for piece in pieces for atom in piece}
        rows = [self._row(dim, wide, pieces, present) for dim, wide in zip(want, full)]
        node = self._permute(node, pieces, [piece for row in rows for piece in row if piece in pieces])
        return self._merge(node, roles, rows, present)

    def _split(self, node: fx.Node, roles: Roles, have: list[Dim], want: Layout) -> tuple[fx.Node, list[Dim]]:
        """Cut dimensions so that every piece lies whole inside one wanted dimension."""
        pieces: list[Dim] = []
        for dim in have:
            runs = _runs(dim, want)
            if len(runs) > 1:
                sizes = [roles.size(run) for run in runs]
                free = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
                given = [-1 if i == free[-1] else self.size(size) for i, size in enumerate(sizes)] if free else sizes
                node = self.call(aten.unflatten.int, node, len(pieces), given)
            pieces += runs
        return node, pieces

    def _drop_units(self, node: fx.Node, pieces: list[Dim]) -> tuple[fx.Node, list[Dim]]:
        for d in reversed([d for d, piece in enumerate(pieces) if not piece]):
            node = self.call(aten.squeeze.dim, node, d)
        return node, [piece for piece in pieces if piece]

    @staticmethod
    def _row(dim: Dim, wide: Dim, pieces: list[Dim], present: set[int]) -> list[Dim]:
        """The pieces of one wanted dimension, absent atoms as pieces of their own if they have to be filled in."""
        row: list[Dim] = []
        partly = any(atom in present for atom in dim)
        for atom in dim:
            piece = next((p for p in pieces if atom in p), None)
            if piece is not None and piece not in row:
                row.append(piece)
            elif piece is None and (partly or atom in wide):
                row.append((atom,))
        return row

    def _permute(self, node: fx.Node, pieces: list[Dim], order: list[Dim]) -> fx.Node:
        if sorted(order) != sorted(pieces):
            raise RewriteError("a dimension would be lost")
        places = [pieces.index(piece) for piece in order]
        return node if places == list(range(len(places))) else self.call(aten.permute.default, node, places)

    def _merge(self, node: fx.Node, roles: Roles, rows: list[list[Dim]], present: set[int]) -> fx.Node:
        """Put in missing dimensions, expand them, and flatten each row to one dimension."""
        flat = [piece for row in rows for piece in (row or [()])]
        for d, piece in enumerate(flat):
            if not piece or piece[0] not in present:
                node = self.call(aten.unsqueeze.default, node, d)
        if any(piece and piece[0] not in present for piece in flat):
            sizes = [self.size(roles.size(p)) if p and p[0] not in present else -1 for p in flat]
            node = self.call(aten.expand.default, node, sizes)
        for d, row in enumerate(rows):
            if len(row) > 1:
                node = self.call(aten.flatten.using_ints, node, d, d + len(row) - 1)
        return node


def _runs(dim: Dim, want: Layout) -> list[Dim]:
    """Cut a dimension where neighbouring atoms are not neighbours, in this order, in a wanted dimension."""
    runs: list[list[int]] = []
    for atom in dim:
        row = next((row for row in want if atom in row), ())
        follows = bool(runs) and runs[-1][-1] in row and row.index(runs[-1][-1]) + 1 == row.index(atom)
        if follows:
            runs[-1].append(atom)
        else:
            runs.append([atom])
    return [tuple(run) for run in runs] or [()]


def matches(a: fx.Node, b: fx.Node) -> bool:
    """Same shape and dtype."""
    x, y = value_of(a), value_of(b)
    return x.dtype == y.dtype and len(x.shape) == len(y.shape) and all(map(same, x.shape, y.shape))
