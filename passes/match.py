"""The structural matchers: one shadow node in, one :class:`Match` out, whatever the spelling.

A match says, in terms of roles (``dims``), which tensors are queries, keys and values, what scales and masks the
scores, and which node is the output. What is no attention gives None; attention that has to stay dense raises
:class:`Refusal`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from blade_compile.passes.codes import Refusal
from blade_compile.passes.dims import Layout, Roles, forward
from blade_compile.passes.fx_utils import argument, aten, is_call, is_call_in_place, is_tensor, same, shape_of, value_of
from blade_compile.passes.masks import CONSTANTS
from blade_compile.passes.products import PRODUCTS, Product, product
from blade_compile.passes.scores import (
    DIVS,
    DROPOUT,
    LOGSUMEXP,
    MAXIMA,
    SUBS,
    MaskTerm,
    blocked_by,
    check_no_dropout,
    check_shifts,
    constant_of,
    path_to_product,
    reduced,
    replay,
)

SDPA = {
    aten.scaled_dot_product_attention.default,
    torch.nn.functional.scaled_dot_product_attention,
    torch._C._nn.scaled_dot_product_attention,
}
SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default}
EXP = {aten.exp.default, aten.exp_.default}
_SDPA_ARGS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass
class Operand:
    """A tensor with the roles of its dimensions."""

    node: fx.Node
    layout: Layout


@dataclass
class Match:
    """One attention call in the shadow graph."""

    kind: str
    roles: Roles
    out: Operand
    q: Operand
    k: Operand
    v: Operand
    queries: int
    keys: int
    features: int
    channels: int
    """atoms: query tokens, key tokens, head dimension of queries and keys, head dimension of values"""
    scale: float | None = None
    """None: 1/sqrt(head dimension)"""
    factors: list[tuple[fx.Node, Layout, bool]] = field(default_factory=list)
    masks: list[MaskTerm] = field(default_factory=list)
    region: list[fx.Node] = field(default_factory=list)
    """everything between the inputs and the output, output included"""
    scores_dtype: torch.dtype | None = None
    """what queries and keys were multiplied in, autocast included"""


def candidate(node: fx.Node) -> bool:
    """True for the node that every spelling has exactly one of."""
    return node.op == "call_function" and (
        node.target in SDPA
        or node.target in SOFTMAX
        or _quotient(node) is not None
        or _exp_of_difference(node) is not None
    )


def match(node: fx.Node) -> Match | None:
    """Read the attention around a candidate node."""
    return _match_sdpa(node) if node.target in SDPA else _match_softmax(node)


# ---- F.scaled_dot_product_attention ----------------------------------------------------------------------------------
def _match_sdpa(node: fx.Node) -> Match:
    args = dict(zip(_SDPA_ARGS, node.args)) | dict(node.kwargs)
    q, k, v, mask = (args.get(name) for name in ("query", "key", "value", "attn_mask"))
    check_no_dropout(args.get("dropout_p", 0.0))
    if args.get("is_causal", False):
        raise Refusal("causal", "is_causal=True")
    if not all(is_tensor(x) and len(shape_of(x)) >= 2 for x in (q, k, v)):
        raise Refusal("unreadable", "the shapes of queries, keys and values")
    roles = Roles()
    operands, (s, t, d, e) = _sdpa_operands(roles, q, k, v, gqa=bool(args.get("enable_gqa", False)))
    batch = tuple(_widest(dims) for dims in zip(*(_left_padded(o.layout[:-2]) for o in operands)))
    out = Operand(node, (*batch[len(batch) - len(shape_of(node)) + 2 :], (s,), (e,)))
    found = Match("sdpa", roles, out, operands[0], operands[1], operands[2], s, t, d, e, region=[node])
    found.scale = constant_of(args.get("scale"))
    if found.scale is None and args.get("scale") is not None:
        found.scale, found.factors = 1.0, [(args["scale"], (), False)]
    if mask is not None:
        found.masks.append(_sdpa_mask(mask, (*batch, (s,), (t,))))
    return found


def _sdpa_operands(
    roles: Roles, q: fx.Node, k: fx.Node, v: fx.Node, *, gqa: bool, heads_first: bool = True
) -> tuple[list[Operand], tuple[int, int, int, int]]:
    """Layouts of [..., S, D], [..., T, D] and [..., T, E] (or [B, S, H, D]); grouped heads share their outer part."""
    shapes = [shape_of(x) if heads_first else _swapped(shape_of(x)) for x in (q, k, v)]
    ends = [roles.new(size) for size in (shapes[0][-2], shapes[1][-2], shapes[0][-1], shapes[2][-1])]
    if not ends[0] or not ends[1]:
        raise Refusal("too-short", "a single token attends or is attended to")
    if not ends[2] or not ends[3]:
        raise Refusal("head-dim", "1")
    s, t, d, e = (dim[0] for dim in ends)
    roles.whole.update((s, t, d, e))
    rows = [_left_padded(shape[:-2], 1) for shape in shapes]
    if gqa and len(shapes[0]) >= 3 and not same(rows[0][-1], rows[1][-1]):
        shared = roles.new(rows[1][-1])
        heads = [(*shared, *roles.new(rows[0][-1] // rows[1][-1])), shared, shared]
    else:
        heads = _shared(roles, [row[-1] for row in rows])
    batches = [_shared(roles, list(sizes)) for sizes in zip(*(row[:-1] for row in rows))]
    layouts = []
    for index, x in enumerate((q, k, v)):
        row = (*(dims[index] for dims in batches), heads[index])
        tail = ((s,), (d,)) if index == 0 else ((t,), (d,)) if index == 1 else ((t,), (e,))
        layout = (*row[len(row) - len(shape_of(x)) + 2 :], *tail)
        layouts.append(Operand(x, layout if heads_first else _swapped(layout)))
    return layouts, (s, t, d, e)


def _swapped(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """[B, S, H, D] as [B, H, S, D] and back."""
    return (row[0], row[2], row[1], row[3])


def _left_padded(row: Any, filler: Any = (), rank: int = 8) -> tuple[Any, ...]:
    return (*(filler,) * (rank - len(row)), *row)


def _shared(roles: Roles, sizes: list[Any]) -> list[Any]:
    """One atom for a batch dimension that three tensors share; size 1 broadcasts."""
    full = next((size for size in sizes if not (isinstance(size, int) and size == 1)), 1)
    dim = roles.new(full)
    if any(not (isinstance(size, int) and size == 1) and not same(size, full) for size in sizes):
        raise Refusal("unreadable", f"batch sizes {sizes}")
    return [() if isinstance(size, int) and size == 1 else dim for size in sizes]


def _widest(dims: Any) -> Any:
    return max(dims, key=len)


def _sdpa_mask(mask: fx.Node, layout: Layout) -> MaskTerm:
    shape = shape_of(mask)
    dims = layout[len(layout) - len(shape) :]
    aligned = tuple(() if isinstance(size, int) and size == 1 else dim for size, dim in zip(shape, dims))
    return MaskTerm(mask, aligned, "keep" if value_of(mask).dtype == torch.bool else "add")


# ---- softmax between two products ------------------------------------------------------------------------------------
def _match_softmax(node: fx.Node) -> Match | None:
    inside = _normaliser(node)
    if inside is None or not is_tensor(inside.source):
        return None
    path = path_to_product(inside.source)
    if path is None:
        refusal = blocked_by(inside.source)
        if refusal is not None and _meets_product(node):
            raise refusal
        return None
    if not _meets_product(node):
        return None
    roles = Roles()
    first = product(roles, path[0])
    if first is None or _is_parameter(first.lhs) or _is_parameter(first.rhs):
        return None  # a product with a weight matrix is a layer: routers and classifiers
    scores = replay(roles, path)
    queries_first, (s, t, d) = _score_roles(roles, scores.product, scores.layout, inside.dim)
    check_shifts(roles, scores.shifts, t)
    _check_unused([*path, *inside.nodes], {*path, *inside.nodes}, node, inside.source)
    walked, weights = _to_values(roles, node, scores.layout)
    values, out, e = _value_roles(roles, weights, t, s)
    head = scores.product
    lhs, rhs = Operand(head.lhs, head.lhs_layout), Operand(head.rhs, head.rhs_layout)
    q, k = (lhs, rhs) if queries_first else (rhs, lhs)
    region = [*path, *inside.nodes, *walked, out.node]
    found = Match("matmul", roles, out, q, k, values, s, t, d, e, scores.scale, scores.factors, scores.masks, region)
    found.scores_dtype = value_of(head.node).dtype
    return found


@dataclass
class _Normaliser:
    source: Any
    dim: int
    nodes: list[fx.Node]


def _normaliser(node: fx.Node) -> _Normaliser | None:
    """Softmax by name, as exp(x) / sum(exp(x)), or as exp(x - logsumexp(x))."""
    if node.target in SOFTMAX:
        dim = argument(node, "dim")
        rank = len(shape_of(node))
        return _Normaliser(node.args[0], dim % rank, [node]) if isinstance(dim, int) and rank else None
    quotient = _quotient(node)
    if quotient is not None:
        exp, total, dim = quotient
        return _Normaliser(exp.args[0], dim, [exp, *total, node])
    dim = _exp_of_difference(node)
    return _Normaliser(node.args[0], dim, [node]) if dim is not None else None


def _quotient(node: fx.Node) -> tuple[fx.Node, list[fx.Node], int] | None:
    """(exp, [sum and what lies between], dim) of ``e / e.sum(dim, keepdim=True)``."""
    if not is_call(node, DIVS) or len(node.args) < 2 or not is_call(node.args[0], EXP):
        return None
    exp, below, between = node.args[0], node.args[1], []
    divisor = below.args[0] if is_call(below, aten.expand.default) else below
    while is_call(below, {aten.unsqueeze.default, aten.clamp_min.default, aten.expand.default}):
        between.append(below)
        below = below.args[0]
    if not is_call(below, aten.sum.dim_IntList) or below.args[0] is not exp:
        return None
    dim = _row_dim(below, divisor, exp)
    if dim is None or not all(_clamps_nothing(step, exp, dim) for step in between):
        return None
    return exp, [below, *between], dim


def _row_dim(reduction: fx.Node, result: Any, source: fx.Node) -> int | None:
    """The one dim that ``reduction`` runs over, where ``result`` meets ``source`` with size 1 there and only there."""
    dims = argument(reduction, "dim")
    rank = len(shape_of(source))
    if not is_tensor(result) or not value_of(result).dtype.is_floating_point or len(shape_of(result)) != rank:
        return None
    if not isinstance(dims, int) and (not dims or len(dims) != 1):
        return None
    dim = (dims if isinstance(dims, int) else dims[0]) % rank
    rows = [1 if d == dim else size for d, size in enumerate(shape_of(source))]
    return dim if all(map(same, shape_of(result), rows)) else None


def _clamps_nothing(step: fx.Node, exp: fx.Node, dim: int) -> bool:
    """False for a lower bound that the sum may fall below: with the row maximum subtracted it is at least 1."""
    if not is_call(step, aten.clamp_min.default):
        return True
    bound, shifted = constant_of(step.args[1]), exp.args[0]
    if bound is None or bound > 1 or not is_call(shifted, SUBS) or shifted.kwargs.get("alpha", 1) != 1:
        return False
    source, maximum = shifted.args[:2]
    statistic = reduced(maximum)
    own = is_call(statistic, {aten.amax.default, aten.max.dim}) and statistic.args[0] is source
    return own and _row_dim(statistic, maximum, source) == dim


def _exp_of_difference(node: fx.Node) -> int | None:
    """The dim of ``exp(x - x.logsumexp(dim, keepdim=True))``."""
    if not is_call(node, EXP) or not is_call(node.args[0], SUBS) or node.args[0].kwargs.get("alpha", 1) != 1:
        return None
    left, right = node.args[0].args[:2]
    total = reduced(right)
    if not is_call(total, LOGSUMEXP) or total.args[0] is not left:
        return None
    return _row_dim(total, right, left)


def _is_parameter(node: fx.Node) -> bool:
    """True where an operand is a parameter, seen through views: ``shadow`` marks the inputs that are."""
    while is_tensor(node) and node.op == "call_function" and node.args and is_tensor(node.args[0]):
        if forward(Roles(), node, tuple(() for _ in shape_of(node.args[0]))) is None:
            return False
        node = node.args[0]
    return bool(node.meta.get("parameter", False))


def _score_roles(roles: Roles, head: Product, layout: Layout, dim: int) -> tuple[bool, tuple[int, int, int]]:
    """Whether the left operand holds the queries, and the atoms (queries, keys, head dimension)."""
    keys = roles.now(layout)[dim]
    left, right = (_atoms(roles, side) for side in (head.lhs_layout, head.rhs_layout))
    result = _atoms(roles, head.out_layout)
    if len(keys) != 1 or (keys[0] in left and keys[0] in right):
        raise Refusal("softmax-dim")
    queries_first = keys[0] in right
    q_side, k_side = (left, right) if queries_first else (right, left)
    inner = [atom for atom in q_side if atom in k_side and atom not in result]
    rows = [atom for atom in q_side if atom not in k_side and atom not in inner]
    if len(inner) != 1 or not rows:
        raise Refusal("unreadable", "which dimensions are queries, keys and head dimension")
    equal = [atom for atom in rows if same(roles.sizes[atom], roles.sizes[keys[0]])]
    queries = (equal or rows)[-1]
    roles.whole.update((queries, keys[0], inner[0]))
    return queries_first, (queries, keys[0], inner[0])


def _atoms(roles: Roles, layout: Layout) -> list[int]:
    return [atom for dim in roles.now(layout) for atom in dim]


# ---- from the weights down -------------------------------------------------------------------------------------------
def _meets_product(node: fx.Node, depth: int = 8) -> bool:
    """True where the weights reach a product with another tensor by few steps: the mark of attention."""
    if depth == 0:
        return False
    for user in node.users:
        if user.op == "call_function" and user.target in PRODUCTS:
            return True
        if user.op == "call_function" and len(user.all_input_nodes) <= 3 and _meets_product(user, depth - 1):
            return True
    return False


def _to_values(roles: Roles, node: fx.Node, layout: Layout) -> tuple[list[fx.Node], Operand]:
    """Steps from the softmax to the operand of its product with the values."""
    walked: list[fx.Node] = []
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise Refusal("weights-used", "weights")
        user = users[0]
        if user.op == "call_function" and user.target in PRODUCTS:
            return walked, Operand(node, layout)
        if user.op == "output":
            raise Refusal("weights-used", "weights")
        if user.target in DROPOUT:
            check_no_dropout(user.args[1], training=user.args[2] if len(user.args) > 2 else True)
        elif is_call(user, operator.getitem):
            if user.args[1] != 0:
                raise Refusal("weights-modified", "a dropout mask")
        else:
            step = forward(roles, user, layout)
            if step is None:
                raise Refusal("weights-modified", str(getattr(user.target, "_opname", user.target)))
            layout = step
        walked.append(user)
        node = user


def _value_roles(roles: Roles, weights: Operand, t: int, s: int) -> tuple[Operand, Operand, int]:
    """(values, output, channel atom) of the product that the weights enter."""
    node = next(iter(weights.node.users))
    if is_call(node, aten.einsum.default) and len(node.args[1]) != 2:
        raise Refusal("unreadable", "an einsum of more than two tensors")
    second = product(roles, node, {weights.node: weights.layout})
    if second is None or second.lhs is second.rhs or second.bias is not None or second.alpha != 1:
        raise Refusal("unreadable", f"the product {node} of weights and values")
    left = second.lhs is weights.node
    values = Operand(second.rhs, second.rhs_layout) if left else Operand(second.lhs, second.lhs_layout)
    mine, theirs, result = (_atoms(roles, x) for x in (weights.layout, values.layout, second.out_layout))
    if t not in theirs or t in result:
        raise Refusal("softmax-dim")
    own = [atom for atom in theirs if atom not in mine]
    if len(own) != 1 or s in theirs:
        raise Refusal("unreadable", "which dimension holds the values' channels")
    roles.whole.add(own[0])
    return values, Operand(node, second.out_layout), own[0]


def _check_unused(nodes: list[fx.Node], region: set[fx.Node], end: fx.Node, source: fx.Node) -> None:
    """Scores and weights must have no reader outside the region (a row maximum counts as inside)."""
    for node in nodes:
        if node is end:
            continue
        for user in node.users:
            if user in region or _stays_inside(user, region):
                continue
            if is_call_in_place(user):
                raise Refusal("mutation", f"the value of {node}")
            raise Refusal("weights-used", "scores")


def _stays_inside(user: fx.Node, region: set[fx.Node], depth: int = 5) -> bool:
    """A row statistic, or a constant of the scores' shape, whose every use is back in the region."""
    small = is_call(user, MAXIMA | LOGSUMEXP | CONSTANTS)
    carries = is_call(user, {operator.getitem, aten.detach.default, aten.unsqueeze.default, aten.to.dtype})
    if depth == 0 or not (small or carries):
        return False
    return all(next_user in region or _stays_inside(next_user, region, depth - 1) for next_user in user.users)
