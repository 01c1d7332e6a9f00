"""Replace one attention site of the user's graph by ``blade::sparse_sdpa``.

The operator goes where the output was. Its inputs are the tensors that the user's own nodes hold, brought to
[B, H, S, D] only where they are not; its result is brought back to the shape, dtype and (where somebody could tell)
strides of the node it replaces. Then the old nodes that nothing uses any more go. If anything fails half way, what
was inserted is taken out again.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from blade_compile.passes.dims import Dim, Layout
from blade_compile.passes.emit import Emitter, RewriteError, matches
from blade_compile.passes.extents import hint
from blade_compile.passes.find_attention import AttentionSite
from blade_compile.passes.fx_utils import aten, erase_dead, fake_mode_of, is_tensor, same, shape_of, value_of
from blade_compile.passes.match import Match, Operand
from blade_compile.passes.operands import Plan
from blade_compile.passes.scores import MaskTerm

__all__ = ["RewriteError", "rewrite_site"]

SOFT_MASK = -1e38
"""Bias of a key hidden by a large negative number: absorbs any score, and survives a factor of log2(e) in fp32"""

_PACKS = {
    "contiguous", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "layer_norm", "rms_norm", "conv1d",
    "conv2d", "conv3d", "scaled_dot_product_attention", "sparse_sdpa", "sym_size", "size", "mean", "sum",
}  # fmt: skip
"""Calls whose result has the same strides whatever those of the input are."""
_HANDS_ON = {
    "transpose", "permute", "swapaxes", "unsqueeze", "squeeze", "chunk", "split", "unbind", "getitem", "dropout", "to",
    "float", "half", "bfloat16", "type", "type_as", "clone", "reshape", "flatten", "unflatten", "add", "mul", "sub",
    "div", "truediv", "cat", "gelu", "silu", "sigmoid", "pad",
}  # fmt: skip
"""Calls that work with any strides, but whose result may differ in strides too. ``view`` is neither."""


def rewrite_site(graph: fx.Graph, site: AttentionSite, op_kwargs: dict[str, Any]) -> fx.Node:
    """Rewrite ``site``; ``op_kwargs`` are the operator's arguments beside tensors and scale. Returns the new call.

    Numbers among ``op_kwargs`` may be SymInts over the graph's sizes.

    Raises:
        RewriteError: the site could not be written out; the graph is as it was.
    """
    found, plan, shadow = site.match, site.plan, site.shadow
    if found is None or plan is None or shadow is None:
        raise RewriteError(f"{site.name} was refused: {site.reason}")
    emitter = Emitter(graph, shadow, site.node, fake_mode_of(graph))
    try:
        call = _operator(emitter, found, plan, op_kwargs)
        out = _as_before(emitter, found, plan, call)
        _install(emitter, site, found, out)
    except RewriteError:
        emitter.undo()
        raise
    except Exception as error:
        emitter.undo()
        raise RewriteError(f"{type(error).__name__}: {error}") from error
    site.rewritten = True
    return call


# ---- inputs ----------------------------------------------------------------------------------------------------------
def _operator(emitter: Emitter, found: Match, plan: Plan, op_kwargs: dict[str, Any]) -> fx.Node:
    q = _operand(emitter, found, plan, plan.q, (plan.batch, plan.heads, (found.queries,), (found.features,)))
    k = _operand(emitter, found, plan, plan.k, (plan.batch, plan.kv_heads, (found.keys,), (found.features,)))
    v = _operand(emitter, found, plan, plan.v, (plan.batch, plan.kv_heads, (found.keys,), (found.channels,)))
    q = _scaled(emitter, found, plan, q)
    options = {name: _plain(emitter, value) for name, value in op_kwargs.items()}
    mask = _key_mask(emitter, found, plan)
    return emitter.call(torch.ops.blade.sparse_sdpa.default, q, k, v, key_mask=mask, scale=found.scale, **options)


def _plain(emitter: Emitter, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(emitter, item) for item in value]
    if isinstance(value, fx.Node) and value.graph is emitter.graph:
        return value
    return emitter.size(value) if isinstance(value, (torch.SymInt, fx.Node)) else value


def _operand(emitter: Emitter, found: Match, plan: Plan, operand: Operand, row: Layout) -> fx.Node:
    node = emitter.arrange(emitter.bring(operand.node), found.roles, operand.layout, row)
    return _cast(emitter, node, plan.dtype)


def _cast(emitter: Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if value_of(node).dtype == dtype else emitter.call(aten.to.dtype, node, dtype)


def _scaled(emitter: Emitter, found: Match, plan: Plan, q: fx.Node) -> fx.Node:
    """Factors that are tensors (learned temperatures) or symbols go into the queries: the scale stays a constant."""
    for factor, layout, inverse in found.factors:
        node = emitter.bring(factor)
        if is_tensor(node):
            want = tuple(_common(found, dim, layout) for dim in (plan.batch, plan.heads, (found.queries,)))
            node = emitter.arrange(node, found.roles, layout, (*want, ()))
        q = emitter.call(operator.truediv if inverse else operator.mul, q, node)
    return _cast(emitter, q, plan.dtype)


def _common(found: Match, dim: Dim, layout: Layout) -> Dim:
    """The whole dimension where ``layout`` runs over any part of it, else nothing."""
    present = {atom for d in found.roles.now(layout) for atom in d}
    return dim if any(atom in present for atom in dim) else ()


# ---- masks -----------------------------------------------------------------------------------------------------------
def _key_mask(emitter: Emitter, found: Match, plan: Plan) -> fx.Node | None:
    """All masks as one: bool (True attends) if all are hard, else an additive float bias. [B|1, T] or [B|1, H, T]."""
    if not found.masks:
        return None
    keep: fx.Node | None = None
    bias: fx.Node | None = None
    for term in found.masks:
        node = _keys_only(emitter, found, plan, term)
        if term.how == "add":
            node = _times(emitter, _cast_mask(emitter, node, plan), float(term.factor))
            bias = node if bias is None else emitter.call(aten.add.Tensor, bias, node)
            continue
        node = _cast(emitter, node, torch.bool)
        node = node if term.how == "keep" else emitter.call(aten.logical_not.default, node)
        if term.soft:
            node = _hidden(emitter, node, SOFT_MASK, found, plan)
            bias = node if bias is None else emitter.call(aten.add.Tensor, bias, node)
        else:
            keep = node if keep is None else emitter.call(aten.logical_and.default, keep, node)
    if bias is not None and keep is not None:
        hard = _hidden(emitter, keep, float("-inf"), found, plan)
        bias = emitter.call(aten.add.Tensor, bias, hard)
    mask = bias if bias is not None else keep
    return _without_unit_axes(emitter, mask)


def _mask_dtype(plan: Plan) -> torch.dtype:
    return torch.float64 if plan.dtype == torch.float64 else torch.float32


def _cast_mask(emitter: Emitter, node: fx.Node, plan: Plan) -> fx.Node:
    return _cast(emitter, node, _mask_dtype(plan))


def _times(emitter: Emitter, node: fx.Node, factor: float) -> fx.Node:
    return node if factor == 1.0 else emitter.call(aten.mul.Tensor, node, factor)


def _hidden(emitter: Emitter, keep: fx.Node, fill: float, found: Match, plan: Plan) -> fx.Node:
    """0 where ``keep``, else ``fill``."""
    device = value_of(plan.q.node).device
    options = {"dtype": _mask_dtype(plan), "device": device}
    zero = emitter.call(aten.scalar_tensor.default, 0.0, **options)
    low = emitter.call(aten.scalar_tensor.default, fill, **options)
    return emitter.call(aten.where.self, keep, zero, low)


def _keys_only(emitter: Emitter, found: Match, plan: Plan, term: MaskTerm) -> fx.Node:
    """A mask that does not vary along the queries as [B|1, H|1, 1, T]."""
    layout = found.roles.now(term.layout)
    node = emitter.bring(term.node)
    for d, dim in enumerate(layout):
        if found.queries in dim:
            node = emitter.call(aten.slice.Tensor, node, d, 0, 1)
    layout = tuple(() if found.queries in dim else dim for dim in layout)
    want = tuple(_common(found, dim, layout) for dim in (plan.batch, plan.heads))
    return emitter.arrange(node, found.roles, layout, (*want, (), (found.keys,)))


def _without_unit_axes(emitter: Emitter, mask: fx.Node | None) -> fx.Node | None:
    """[B|1, H|1, 1, T] as the operator takes it: [B|1, T], or [B|1, H, T] for masks that differ between heads."""
    if mask is None:
        return None
    per_head = not same(shape_of(mask)[1], 1)
    return emitter.call(aten.squeeze.dims, mask, [2] if per_head else [1, 2])


# ---- output ----------------------------------------------------------------------------------------------------------
def _as_before(emitter: Emitter, found: Match, plan: Plan, call: fx.Node) -> fx.Node:
    """The operator's [B, H, S, D] in the shape, dtype and strides of the node that it replaces."""
    row = (plan.batch, plan.heads, (found.queries,), (found.channels,))
    out = emitter.arrange(call, found.roles, row, found.out.layout)
    old = found.out.node
    out = _cast(emitter, out, value_of(old).dtype)
    if not matches(out, old):
        raise RewriteError(f"the output would be {shape_of(out)} and not {shape_of(old)}")
    if _same_strides(value_of(out), value_of(old)) or _nobody_sees_strides(old):
        return out
    return _restrided(emitter, out, value_of(old))


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    pairs = zip(a.shape, a.stride(), b.stride())
    return all(hint(x) == hint(y) for size, x, y in pairs if not (isinstance(size, int) and size == 1))


def _nobody_sees_strides(node: fx.Node, depth: int = 10) -> bool:
    """True where every reader gives the same result for any strides (``view`` would raise)."""
    if depth == 0:
        return False
    for user in node.users:
        name = _call_name(user)
        if name not in _PACKS and not (name in _HANDS_ON and _nobody_sees_strides(user, depth - 1)):
            return False
    return True


def _call_name(node: fx.Node) -> str:
    if node.op == "output":
        return "output"
    target = node.target
    return target if isinstance(target, str) else getattr(target, "_opname", getattr(target, "__name__", ""))


def _restrided(emitter: Emitter, node: fx.Node, like: torch.Tensor) -> fx.Node:
    """A dense copy with the dimensions in memory order of ``like``."""
    order = sorted(range(like.dim()), key=lambda d: (-hint(like.stride()[d]), d))
    if order == list(range(like.dim())):
        return emitter.call(aten.contiguous.default, node)
    back = [order.index(d) for d in range(like.dim())]
    packed = emitter.call(aten.contiguous.default, emitter.call(aten.permute.default, node, order))
    return emitter.call(aten.permute.default, packed, back)


def _install(emitter: Emitter, site: AttentionSite, found: Match, out: fx.Node) -> None:
    """Give ``out`` to all readers of the old output and remove what is dead."""
    shadow, old = emitter.shadow, found.out.node
    own = shadow.dynamo.get(old)
    replaced = {own: out} if own is not None else _spliced(emitter, site.node, old, out)
    for node, new in replaced.items():
        node.replace_all_uses_with(new)
    shadow.dynamo[old] = out
    for copied, copy in emitter.copies.items():
        shadow.dynamo.setdefault(copied, copy)
    region = {n for n in emitter.graph.nodes if _belongs(shadow, n, set(found.region))}
    dead = [n for n in emitter.graph.nodes if n in region or n in replaced or n is site.node]
    erase_dead(dead, region | set(replaced))


def _belongs(shadow: Any, node: fx.Node, region: set[fx.Node]) -> bool:
    """True for a user's node whose result is one of the region's values."""
    value = shadow.values.get(node)
    return isinstance(value, fx.Node) and value in region


def _spliced(emitter: Emitter, whole: fx.Node, old: fx.Node, out: fx.Node) -> dict[fx.Node, fx.Node]:
    """The results of an opaque call, computed by copies of the ATen calls inside it around the new attention."""
    emitter.copies[old] = out
    results = emitter.shadow.values[whole]
    if isinstance(results, fx.Node):
        return {whole: _result(emitter, results)}
    replaced = {}
    for user in list(whole.users):
        if user.op != "call_function" or user.target is not operator.getitem:
            raise RewriteError("the results of the call are passed on as a tuple")
        inner = results[user.args[1]]
        if inner is None and not user.users:
            continue
        if inner is None:
            raise RewriteError("a result of the call could not be followed")
        replaced[user] = _result(emitter, inner)
    return replaced


def _result(emitter: Emitter, inner: fx.Node) -> fx.Node:
    """A copy of an opaque call's result. The call's own node holds that value too, but is on its way out."""
    own = emitter.shadow.dynamo.pop(inner, None)
    if own is not None and own in emitter.before and own is not emitter.anchor:
        emitter.shadow.dynamo[inner] = own
    return emitter.bring(inner)
