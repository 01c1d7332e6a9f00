"""Matrix products in every spelling as one thing: a contraction of two operands with named dimensions.

``matmul``, ``mm``, ``bmm``, ``baddbmm`` and ``einsum`` become a :class:`Product`: the layouts (see ``dims``) of both
operands and of the result, over shared atoms. Given the layout of one operand, the other's follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from blade_compile.passes.dims import Dim, Layout, Roles
from blade_compile.passes.fx_utils import argument, aten, is_call, is_tensor, same, shape_of

PRODUCTS = {
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default, aten.addmm.default,
    aten.einsum.default,
}  # fmt: skip


@dataclass
class Product:
    """``out = alpha * lhs @ rhs + beta * bias``, with layouts."""

    node: fx.Node
    lhs: fx.Node
    rhs: fx.Node
    lhs_layout: Layout
    rhs_layout: Layout
    out_layout: Layout
    bias: fx.Node | None = None
    alpha: Any = 1
    beta: Any = 1


def product(roles: Roles, node: fx.Node, known: dict[fx.Node, Layout] | None = None) -> Product | None:
    """Read ``node`` as a product; ``known`` gives the layout of one operand. None for what cannot be read."""
    known = known or {}
    if is_call(node, aten.einsum.default):
        return _einsum(roles, node, known)
    if not is_call(node, PRODUCTS):
        return None
    first = 1 if node.target in (aten.baddbmm.default, aten.addmm.default) else 0
    lhs, rhs = node.args[first], node.args[first + 1]
    if not (is_tensor(lhs) and is_tensor(rhs)) or min(len(shape_of(lhs)), len(shape_of(rhs))) < 2:
        return None
    left, right = _matmul_layouts(roles, lhs, rhs, known)
    if left is None or right is None:
        return None
    out = (*_joined(left[:-2], right[:-2]), left[-2], right[-1])
    result = Product(node, lhs, rhs, left, right, out)
    if first:
        result.alpha, result.beta = argument(node, "alpha"), argument(node, "beta")
        result.bias = None if result.beta == 0 else node.args[0]
    return result


def _matmul_layouts(
    roles: Roles, lhs: fx.Node, rhs: fx.Node, known: dict[fx.Node, Layout]
) -> tuple[Layout | None, Layout | None]:
    if lhs in known:
        left = roles.now(known[lhs])
        return left, _other(roles, left, shape_of(rhs), shape_of(lhs), inner=(-1, -2))
    right = roles.now(known[rhs]) if rhs in known else roles.fresh(shape_of(rhs))
    return _other(roles, right, shape_of(lhs), shape_of(rhs), inner=(-2, -1)), right


def _other(
    roles: Roles, layout: Layout, shape: tuple[Any, ...], known_shape: tuple[Any, ...], inner: tuple[int, int]
) -> Layout | None:
    """Layout of the unknown operand: batch dimensions aligned from the right, the inner dimension shared."""
    dims: list[Dim] = [roles.new(size) for size in shape]
    for back in range(3, len(shape) + 1):
        if back <= len(layout) and layout[-back]:
            if same(shape[-back], known_shape[-back]):
                dims[-back] = layout[-back]
            elif dims[-back]:
                return None
    if not same(shape[inner[1]], known_shape[inner[0]]):
        return None
    dims[inner[1]] = layout[inner[0]]
    return tuple(dims)


def _joined(left: Layout, right: Layout) -> Layout:
    """Batch dimensions of the result."""
    rank = max(len(left), len(right))
    left, right = ((),) * (rank - len(left)) + left, ((),) * (rank - len(right)) + right
    return tuple(a or b for a, b in zip(left, right))


def _einsum(roles: Roles, node: fx.Node, known: dict[fx.Node, Layout]) -> Product | None:
    operands = node.args[1]
    if len(operands) != 2 or not all(is_tensor(x) for x in operands):
        return None
    spelled = _letters(str(node.args[0]), [len(shape_of(x)) for x in operands])
    if spelled is None:
        return None
    (left, right), out = spelled
    dims: dict[str, Dim] = {}
    for letters, operand in sorted(zip((left, right), operands), key=lambda pair: pair[1] not in known):
        layout = known.get(operand)
        layout = roles.now(layout) if layout is not None else None
        for position, (letter, size) in enumerate(zip(letters, shape_of(operand))):
            if layout is not None and letter not in dims:
                dims[letter] = layout[position]
            elif not dims.get(letter):
                dims[letter] = roles.new(size)
    layouts = [
        tuple(() if isinstance(size, int) and size == 1 else dims[letter] for letter, size in zip(letters, shape_of(x)))
        for letters, x in zip((left, right), operands)
    ]
    return Product(node, operands[0], operands[1], layouts[0], layouts[1], tuple(dims[letter] for letter in out))


def _letters(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """Operand and result letters with ``...`` written out as digits; None for repeated letters (diagonals)."""
    equation = equation.replace(" ", "")
    sources, arrow, out = equation.partition("->")
    terms = sources.split(",")
    if len(terms) != len(ranks):
        return None
    spelled = []
    for term, rank in zip(terms, ranks):
        hidden = rank - len(term.replace("...", ""))
        # the batch dimensions of `...` align from the right
        spelled.append(term.replace("...", "".join(str(d) for d in reversed(range(hidden)))))
    if not arrow:
        return None
    longest = max((term for term in spelled), key=lambda term: sum(c.isdigit() for c in term))
    out = out.replace("...", "".join(c for c in longest if c.isdigit()))
    if any(len(set(term)) != len(term) for term in (*spelled, out)):
        return None
    return spelled, out
