"""From a softmax up to the product of queries and keys: scales, masks and views on the way, in order.

``scores(...)`` finds the chain of single steps between QK^T and the softmax input and replays it downwards, so that
``(qk + mask) * scale`` and ``qk * scale + mask`` come out as what they are.
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from blade_compile.passes.codes import Refusal
from blade_compile.passes.dims import CASTS, VIEWS, Layout, Roles, forward, permutation
from blade_compile.passes.fx_utils import argument, aten, is_call, is_tensor, same, shape_of, value_of
from blade_compile.passes.products import PRODUCTS, Product, product

MULS = {aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar}
DIVS = {aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar}
ADDS = {aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar, aten.add_.Scalar}
SUBS = {aten.sub.Tensor, aten.sub_.Tensor, aten.sub.Scalar, aten.sub_.Scalar}
FILLS = {aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
WHERES = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar}
ARITHMETIC = MULS | DIVS | ADDS | SUBS
MAXIMA = {aten.amax.default, aten.max.dim, aten.max.default}
LOGSUMEXP = {aten.logsumexp.default}
DROPOUT = {aten.dropout.default, aten.dropout_.default, aten.native_dropout.default, aten.feature_dropout.default}
COPIES = {
    aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.clone.default,
    aten.detach.default, aten.detach_.default,
}  # fmt: skip
"""How ``torch.tensor(number)`` comes out of the re-trace, around the number itself."""

_UNKNOWN = "a tensor whose value is not known when compiling"

HIDDEN = -1e3
"""A fill at or below this makes a key invisible: exp(fill - max) is 0 next to any key that may be attended."""


STILL_HIDDEN = -100.0
"""The same after a scale: exp(-100) is 4e-44"""


@dataclass
class MaskTerm:
    """One mask as it meets the scores. ``how``: "add" (float bias), "keep" (True attends), "drop" (True is hidden)."""

    node: fx.Node
    layout: Layout
    how: str
    factor: Any = 1.0
    fill: float = float("-inf")
    """what hidden scores are set to; where it is finite, a row with nothing to attend to averages over all keys"""

    @property
    def soft(self) -> bool:
        """Hidden by a large negative number and not by minus infinity."""
        return self.fill != float("-inf")


@dataclass
class Scores:
    """QK^T and what happens to it before the softmax."""

    product: Product
    layout: Layout
    """at the softmax input"""
    scale: float = 1.0
    factors: list[tuple[fx.Node, Layout, bool]] = field(default_factory=list)
    """tensor or symbolic factors (node, layout, inverse) that do not vary over the keys"""
    masks: list[MaskTerm] = field(default_factory=list)
    shifts: list[Layout] = field(default_factory=list)
    """layouts of row maxima that were added or subtracted: the softmax ignores those that do not vary over the keys"""
    chain: list[fx.Node] = field(default_factory=list)


# ---- walking up ------------------------------------------------------------------------------------------------------
def path_to_product(node: Any, depth: int = 24, *, through_anything: bool = False) -> list[fx.Node] | None:
    """Nodes from a product of two tensors (first) down to ``node`` (last), by steps that keep the scores' meaning."""
    if not is_tensor(node) or depth == 0 or node.op != "call_function":
        return None
    if node.target in PRODUCTS:
        return [node]
    for source in _candidates(node, through_anything):
        path = path_to_product(source, depth - 1, through_anything=through_anything)
        if path is not None:
            return [*path, node]
    return None


def _candidates(node: fx.Node, through_anything: bool) -> list[Any]:
    if (
        node.target in CASTS | VIEWS | FILLS | DROPOUT
        or permutation(node) is not None
        or is_call(node, aten.expand.default)
    ):
        return [node.args[0]]
    if node.target in ARITHMETIC:
        return sorted((x for x in node.args[:2] if is_tensor(x)), key=lambda x: -len(shape_of(x)))
    if node.target in WHERES:
        return [x for x in node.args[1:3] if is_tensor(x)]
    if through_anything:
        sources = [x for x in node.all_input_nodes if is_tensor(x)]
        return sources if len(sources) <= 4 else []
    return []


def blocked_by(node: fx.Node) -> Refusal | None:
    """Why a softmax input that comes from a product by other steps is no plain attention; None if it does not."""
    path = path_to_product(node, depth=12, through_anything=True)
    if path is None:
        return None
    strange = [n for n in path[1:] if n.target not in CASTS | VIEWS | FILLS | ARITHMETIC | WHERES]
    for n in strange:
        if is_call(n, {aten.tanh.default, aten.tanh_.default}):
            return Refusal("softcap")
        if is_call(n, {aten.cat.default, aten.concat.default, aten.constant_pad_nd.default, aten.pad.default}):
            return Refusal("sink")
    names = [_name(n) for n in strange if permutation(n) is None]
    return Refusal("scores-modified", ", ".join(names[:2]) or "steps that cannot be followed")


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


# ---- replaying down --------------------------------------------------------------------------------------------------
def replay(roles: Roles, path: list[fx.Node]) -> Scores:
    """Read the steps of a path, first to last."""
    first = product(roles, path[0])
    if first is None:
        raise Refusal("unreadable", f"the product {path[0]}")
    shared = {atom for dim in first.lhs_layout for atom in dim} & {atom for dim in first.out_layout for atom in dim}
    shared &= {atom for dim in first.rhs_layout for atom in dim}
    for layout in (first.lhs_layout, first.rhs_layout):  # only batch atoms may be cut by views further down
        roles.whole.update(atom for dim in layout for atom in dim if atom not in shared)
    scores = Scores(first, first.out_layout, chain=list(path))
    scores.scale = _constant(first.alpha, "alpha")
    if first.bias is not None:
        factor = _constant(first.beta, "beta")
        scores.masks.append(MaskTerm(first.bias, _aligned(scores.layout, first.bias), "add", factor))
    for above, node in itertools.pairwise(path):
        _step(roles, scores, above, node)
    return scores


def _step(roles: Roles, scores: Scores, above: fx.Node, node: fx.Node) -> None:
    if node.target in ARITHMETIC:
        _arithmetic(roles, scores, above, node)
    elif node.target in DROPOUT and is_tensor(node):
        check_no_dropout(node.args[1], training=node.args[2])
    elif node.target in FILLS:
        _hide(scores, node.args[1], "drop", node.args[2], node)
    elif node.target in WHERES:
        condition, yes, no = node.args[:3]
        keeps = yes is above
        _hide(scores, condition, "keep" if keeps else "drop", no if keeps else yes, node)
    else:
        layout = forward(roles, node, scores.layout)
        if layout is None:
            raise Refusal("scores-modified", _name(node))
        scores.layout = layout
        return
    if len(shape_of(node)) != len(shape_of(above)) or not all(map(same, shape_of(node), shape_of(above))):
        raise Refusal("pair-mask", "that widens the scores")


def _arithmetic(roles: Roles, scores: Scores, above: fx.Node, node: fx.Node) -> None:
    left, right = node.args[:2]
    other = right if left is above else left
    if other is above:
        raise Refusal("scores-modified", _name(node))
    if node.target in ADDS | SUBS:
        _add(scores, other, node, negative=node.target in SUBS, flipped=node.target in SUBS and right is above)
        return
    if node.target in DIVS and (right is above or node.kwargs.get("rounding_mode")):
        raise Refusal("scores-modified", _name(node))
    inverse = node.target in DIVS
    number = constant_of(other)
    if number is not None:
        factor = 1.0 / number if inverse else number
        scores.scale *= factor
        for term in scores.masks:
            term.factor, term.fill = term.factor * factor, term.fill * factor
            if term.how != "add" and not term.fill <= STILL_HIDDEN:
                raise Refusal("scores-modified", f"a factor {factor:g} after the mask")
        return
    if scores.masks:
        raise Refusal("scores-modified", "a tensor factor after the mask")
    layout = _aligned(scores.layout, other)
    scores.factors.append((other, layout, inverse))


def _add(scores: Scores, other: Any, node: fx.Node, *, negative: bool, flipped: bool) -> None:
    alpha = node.kwargs.get("alpha", 1)
    if flipped:
        raise Refusal("scores-modified", "a subtraction from a tensor")
    if constant_of(other) is not None:
        return  # the softmax does not see a shift that is the same for all keys
    statistic = reduced(other)
    if is_call(statistic, MAXIMA | LOGSUMEXP) and statistic.args[0] in scores.chain:
        scores.shifts.append(_aligned(scores.layout, other))
        return
    factor = _constant(alpha, "alpha") * (-1.0 if negative else 1.0)
    if not is_tensor(other):
        return  # a symbolic number is a shift too
    scores.masks.append(MaskTerm(other, _aligned(scores.layout, other), "add", factor))


def _hide(scores: Scores, condition: Any, how: str, fill: Any, node: fx.Node) -> None:
    number = constant_of(fill)
    if number is None or not number <= HIDDEN:
        raise Refusal("scores-modified", f"{_name(node)} with {_UNKNOWN if number is None else number}")
    if not is_tensor(condition):
        raise Refusal("scores-modified", _name(node))
    scores.masks.append(MaskTerm(condition, _aligned(scores.layout, condition), how, fill=number))


def check_shifts(roles: Roles, shifts: list[Layout], keys: int) -> None:
    """Raise unless every shift is the same for all keys of a query, whatever dimensions it was reduced over."""
    if any(keys in dim for layout in shifts for dim in roles.now(layout)):
        raise Refusal("scores-modified", "the subtraction of a maximum that varies over the keys")


def reduced(node: Any) -> Any:
    """What a row statistic is before it is brought into shape: ``x.max(-1).values.unsqueeze(-1)`` is ``x.max(-1)``."""
    while is_tensor(node) and (node.target in CASTS or is_call(node, {aten.detach.default, aten.unsqueeze.default})):
        node = node.args[0]
    return node.args[0] if is_call(node, operator.getitem) and node.args[1] == 0 else node


def _aligned(layout: Layout, other: Any) -> Layout:
    """The dims of the scores that the dimensions of a broadcast operand run over; () where it has size 1."""
    if not is_tensor(other):
        return ()
    shape = shape_of(other)
    if len(shape) > len(layout):
        raise Refusal("pair-mask", "that widens the scores")
    dims = layout[len(layout) - len(shape) :]
    return tuple(() if isinstance(size, int) and size == 1 else dim for size, dim in zip(shape, dims))


def _constant(value: Any, what: str) -> float:
    number = constant_of(value)
    if number is None:
        raise Refusal("scores-modified", f"a symbolic {what}")
    return number


def check_no_dropout(p: Any, training: Any = True) -> None:
    """Raise unless dropout does nothing. A symbolic probability that is 0 now is guarded to stay 0."""
    if training is False:
        return
    number = constant_of(p)
    if number is None and isinstance(value_of(p), torch.SymFloat):
        number = 0.0 if bool(value_of(p) == 0.0) else None
    if number != 0.0:
        raise Refusal("dropout", f"p={number if number is not None else 'unknown'}")


def constant_of(value: Any) -> float | None:
    """The number that an argument certainly is; None for tensors and symbols."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    number = _filled_with(value)
    if number is None or not is_tensor(value):
        return number
    return in_dtype(number, value_of(value).dtype)


def _filled_with(node: fx.Node) -> float | None:
    """The number every element of a node was made from, before the node's own dtype rounds it."""
    if is_call(node, COPIES | CASTS):
        return constant_of(node.args[0])
    if is_call(node, aten.scalar_tensor.default):
        return constant_of(node.args[0])
    if is_call(node, {aten.full.default, aten.full_like.default, aten.new_full.default}):
        return constant_of(argument(node, "fill_value"))
    if node.op == "get_attr" and node.graph.owning_module is not None:
        tensor = getattr(node.graph.owning_module, str(node.target), None)
        real = isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor and tensor.numel() == 1
        return float(tensor.item()) if real and tensor is not None else None
    number = value_of(node)
    return float(number) if isinstance(number, (int, float)) else None


def in_dtype(number: float, dtype: torch.dtype) -> float | None:
    """A number as a tensor of this dtype holds it. Python's own arithmetic: a fake mode may be active."""
    if dtype.is_floating_point:
        return number if abs(number) <= torch.finfo(dtype).max else math.copysign(math.inf, number)
    if dtype == torch.bool:
        return float(bool(number))
    return float(math.trunc(number)) if math.isfinite(number) else None
