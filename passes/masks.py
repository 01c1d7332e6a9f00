"""What a mask is: whether it depends on the key alone, or on query and key together.

A mask on keys may come as [T], [B, 1, 1, T], an expanded [B, 1, S, T], or as [B*H, 1, T] repeated over heads. What
counts is that it does not vary along the queries. ``constant_along`` proves that from the graph; a tensor handed in
as [.., S, T] proves nothing and counts as pairwise. A mask is never dropped: unproven means dense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from blade_compile.passes.codes import Refusal
from blade_compile.passes.dims import CASTS, VIEWS, Roles, permutation
from blade_compile.passes.fx_utils import aten, is_call, is_tensor, shape_of, value_of
from blade_compile.passes.scores import MaskTerm

CONSTANTS = {
    aten.full.default, aten.zeros.default, aten.ones.default, aten.full_like.default, aten.zeros_like.default,
    aten.ones_like.default, aten.new_full.default, aten.new_zeros.default, aten.new_ones.default,
    aten.scalar_tensor.default,
}  # fmt: skip
TRIANGLES = {
    aten.tril.default: "tril",
    aten.triu.default: "triu",
    aten.tril_.default: "tril",
    aten.triu_.default: "triu",
}


def check_mask(
    roles: Roles, term: MaskTerm, queries: int, keys: int, needs_grad: bool, written: Callable[[fx.Node], bool]
) -> None:
    """Raise the refusal of a mask that cannot be passed on as a mask on keys.

    ``written`` says whether some in-place call writes the memory of a node: its values are then not what made it.
    """
    layout = roles.now(term.layout)
    along = [d for d, dim in enumerate(layout) if queries in dim]
    if not any(keys in dim for dim in layout):
        raise Refusal("pair-mask", f"{_shape(term.node)} masks queries, not keys; it")
    for d in along:
        if len(layout[d]) > 1 or not constant_along(term.node, d, written):
            raise _pairwise(term.node)
    if any(keys in dim and len(dim) > 1 for dim in layout):
        raise Refusal("unreadable", f"a mask {_shape(term.node)} that flattens the keys")
    if term.how == "add" and needs_grad:
        raise Refusal("mask-grad")


def _pairwise(node: fx.Node) -> Refusal:
    """Causal and banded masks by name, where the graph shows how they are built."""
    seen = {TRIANGLES[n.target] for n in ancestors(node, 40) if n.op == "call_function" and n.target in TRIANGLES}
    if len(seen) == 2:
        return Refusal("window", "a mask built with tril and triu")
    if seen:
        return Refusal("causal", f"a mask built with {seen.pop()}")
    return Refusal("pair-mask", _shape(node))


def _shape(node: fx.Node) -> str:
    return "[" + ", ".join(str(size) for size in shape_of(node)) + "]"


def constant_along(node: Any, dim: int, written: Callable[[fx.Node], bool], depth: int = 30) -> bool:
    """True where the graph shows that ``node`` has the same values at every index of ``dim``."""
    if not is_tensor(node):
        return True
    shape = shape_of(node)
    if isinstance(shape[dim], int) and shape[dim] == 1:
        return True
    if node.op != "call_function" or depth == 0 or written(node):
        return False
    if node.target in CONSTANTS:
        return True
    source = node.args[0] if node.args else None
    if node.target in CASTS or is_call(node, {aten.contiguous.default, aten.clone.default, aten.alias.default}):
        return constant_along(source, dim, written, depth - 1)
    if is_call(node, aten.expand.default):
        inner = dim - (len(shape) - len(shape_of(source)))
        return inner < 0 or constant_along(source, inner, written, depth - 1)
    if is_call(node, aten.repeat.default):
        inner = dim - (len(shape) - len(shape_of(source)))
        return inner < 0 or constant_along(source, inner, written, depth - 1)
    order = permutation(node)
    if order is not None:
        return constant_along(source, order[dim], written, depth - 1)
    if node.target in VIEWS:
        place = _view_dim(shape, shape_of(source), dim)
        return place is not None and constant_along(source, place, written, depth - 1)
    if is_call(node, {aten.slice.Tensor, aten.repeat_interleave.self_int, aten.narrow.default}):
        return len(shape_of(source)) == len(shape) and constant_along(source, dim, written, depth - 1)
    if is_call(node, {aten.select.int}):
        skipped = node.args[1] % len(shape_of(source))
        return constant_along(source, dim + (dim >= skipped), written, depth - 1)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return all(_constant_operand(x, shape, dim, written, depth) for x in node.all_input_nodes)
    return False


def _constant_operand(
    operand: fx.Node, shape: tuple[Any, ...], dim: int, written: Callable[[fx.Node], bool], depth: int
) -> bool:
    if not is_tensor(operand):
        return True
    inner = dim - (len(shape) - len(shape_of(operand)))
    return inner < 0 or constant_along(operand, inner, written, depth - 1)


def _view_dim(shape: tuple[Any, ...], source: tuple[Any, ...], dim: int) -> int | None:
    """The dimension of ``source`` that is ``dim`` of a row-major view; None where it is cut or merged."""
    roles = Roles()
    before = roles.fresh(source)
    roles.whole.update(atom for dims in before for atom in dims)
    after = roles.regroup(before, source, shape)
    if after is None or len(after[dim]) != 1:
        return None
    return next(d for d, dims in enumerate(before) if dims == after[dim])


def ancestors(node: fx.Node, limit: int) -> list[fx.Node]:
    """Up to ``limit`` nodes that ``node`` is computed from, nearest first."""
    seen: dict[fx.Node, None] = {}
    work = [node]
    while work and len(seen) < limit:
        current = work.pop(0)
        if current not in seen:
            seen[current] = None
            work.extend(current.all_input_nodes)
    return list(seen)


def needs_gradient(
    node: fx.Node, placeholders: dict[fx.Node, bool], writers: Callable[[fx.Node], list[fx.Node]]
) -> bool:
    """True where a gradient would flow into ``node``: a float path from an input that requires one.

    ``placeholders`` says of each input of the shadow graph whether it requires a gradient.
    """
    seen: set[fx.Node] = set()
    work = [node]
    while work:
        current = work.pop()
        value = value_of(current)
        if current in seen or (isinstance(value, torch.Tensor) and not value.is_floating_point()):
            continue
        if is_call(current, aten.detach.default):
            continue
        seen.add(current)
        if placeholders.get(current, False):
            return True
        work.extend(current.all_input_nodes)
        work.extend(writers(current))
    return False
