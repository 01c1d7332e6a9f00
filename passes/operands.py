"""How the operands of a match become what the operator wants: [B, H, S, D], [B, Hkv, T, D], one dtype.

The operator should get the tensors that the user made, not copies: so from each operand of the products this walks
back over transposes, merges of batch and heads, repeated key heads and casts to a wider dtype, as long as that brings
it nearer to the wanted layout. ``plan`` only decides; ``rewrite`` emits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from blade_compile.passes.dims import CASTS, VIEWS, Dim, Roles, backward
from blade_compile.passes.fx_utils import aten, is_call, is_tensor, shape_of, value_of
from blade_compile.passes.match import Match, Operand


@dataclass
class Plan:
    """What goes into the operator."""

    batch: Dim
    heads: Dim
    kv_heads: Dim
    q: Operand
    k: Operand
    v: Operand
    dtype: torch.dtype
    masks: list[fx.Node]
    factors: list[fx.Node]

    def inputs(self) -> list[fx.Node]:
        """Shadow nodes that the rewritten call reads."""
        return [self.q.node, self.k.node, self.v.node, *self.masks, *self.factors]


def plan(found: Match) -> Plan:
    """Choose sources, batch and head atoms, and the dtype that the operator runs in."""
    roles = found.roles
    options = [_options(roles, operand) for operand in (found.q, found.k, found.v)]
    fixed = {found.queries, found.keys, found.features, found.channels}
    batch, heads = _batch_and_heads(found, options, fixed)
    kv_heads = _kv_heads(roles, options, heads)
    rows: list[tuple[Dim, ...]] = [
        (batch, heads, (found.queries,), (found.features,)),
        (batch, kv_heads, (found.keys,), (found.features,)),
        (batch, kv_heads, (found.keys,), (found.channels,)),
    ]
    chosen = [_nearest(roles, option, row) for option, row in zip(options, rows)]
    factors = [node for node, _, _ in found.factors if isinstance(node, fx.Node)]
    dtype = _dtype(found, chosen)
    q, k, v = chosen
    return Plan(batch, heads, kv_heads, q, k, v, dtype, [term.node for term in found.masks], factors)


def _options(roles: Roles, operand: Operand) -> list[Operand]:
    """The operand itself, then what it is a view, repetition or exact widening of, outwards."""
    options = [operand]
    node, layout = operand.node, operand.layout
    while node.op == "call_function" and node.args and is_tensor(node.args[0]):
        if _widens(node):
            source = layout
        elif is_call(node, {aten.contiguous.default, aten.clone.default}) or not is_call(node, CASTS):
            source_layout = backward(roles, node, layout)
            if source_layout is None:
                break
            source = source_layout
        else:
            break
        node, layout = node.args[0], source
        options.append(Operand(node, layout))
    return options


def _widens(node: fx.Node) -> bool:
    """A cast that loses nothing: bf16 or fp16 to fp32, or to the same dtype."""
    if not is_call(node, CASTS):
        return False
    old, new = value_of(node.args[0]), value_of(node)
    if old.device != new.device:
        return False
    return old.dtype == new.dtype or (
        old.is_floating_point() and torch.promote_types(old.dtype, new.dtype) == new.dtype
    )


def _batch_and_heads(found: Match, options: list[list[Operand]], fixed: set[int]) -> tuple[Dim, Dim]:
    """Which atoms are heads. The user's own 4-D shape of the queries says it best."""
    roles = found.roles
    atoms = [atom for dim in roles.now(found.out.layout) for atom in dim if atom not in fixed]
    for option in (o for row in options for o in row):
        dims = [dim for dim in roles.now(option.layout) if not set(dim) & fixed]
        if len(shape_of(option.node)) == 4 and len(dims) == 2 and (*dims[0], *dims[1]) == tuple(atoms):
            return dims[0], dims[1]
    for option in (o for row in options for o in row):
        for dim in roles.now(option.layout):  # [.., H * D]: heads are what shares a dimension with the features
            heads = tuple(atom for atom in dim if atom not in fixed)
            if heads and len(heads) + 1 == len(dim) and dim[-1] in fixed and heads == tuple(atoms[-len(heads) :]):
                return tuple(atoms[: -len(heads)]), heads
    lone = _shared_suffix(roles, options, atoms)
    rank = len(shape_of(found.q.node))
    if lone and rank >= 5 and len(atoms) > lone:
        lone += 1
    if not lone:
        lone = 1 if atoms and rank >= 4 else 0
    cut = len(atoms) - lone
    return tuple(atoms[:cut]), tuple(atoms[cut:])


def _shared_suffix(roles: Roles, options: list[list[Operand]], atoms: list[int]) -> int:
    """How many of the last batch atoms keys and values lack: query heads that share a key head."""
    present = {atom for row in options[1:] for dim in roles.now(row[-1].layout) for atom in dim}
    count = 0
    while count < len(atoms) and atoms[-1 - count] not in present:
        count += 1
    return count


def _kv_heads(roles: Roles, options: list[list[Operand]], heads: Dim) -> Dim:
    """The outer head atoms that keys and values have at their source; all of them where that is no prefix."""
    present = {atom for row in options[1:] for dim in roles.now(row[-1].layout) for atom in dim}
    own = tuple(atom for atom in heads if atom in present)
    return own if own == heads[: len(own)] else heads


def _nearest(roles: Roles, options: list[Operand], row: tuple[Dim, ...]) -> Operand:
    """The nearest source that already is the wanted layout; else the one that needs the least work."""

    def work(option: Operand) -> int:
        layout = roles.now(option.layout)
        if layout == row:
            return 0
        extra = sum(1 for dim in layout for atom in dim if atom not in {a for d in row for a in d})
        cut = sum(1 for dim in layout if dim and not any(_inside(dim, wanted) for wanted in row))
        return 1 + 8 * extra + 4 * cut + (len(layout) != 4)

    narrow = _narrowest(options)
    return min((o for o in options if value_of(o.node).dtype == narrow), key=work)


def _inside(dim: Dim, wanted: Dim) -> bool:
    return all(atom in wanted for atom in dim)


def _narrowest(options: list[Operand]) -> torch.dtype:
    return min((value_of(o.node).dtype for o in options), key=lambda dtype: dtype.itemsize)


def _dtype(found: Match, chosen: list[Operand]) -> torch.dtype:
    """The dtype that loses nothing against the user's: what was multiplied, or wider where the output was wider."""
    out = value_of(found.out.node)
    out_dtype = (out[0] if isinstance(out, (tuple, list)) else out).dtype
    dtypes = [value_of(o.node).dtype for o in chosen]
    if found.scores_dtype is not None:
        # under autocast the products run in a narrower dtype than their operands
        dtypes[:2] = [min(d, found.scores_dtype, key=lambda x: x.itemsize) for d in dtypes[:2]]
        dtypes[2] = min(dtypes[2], out_dtype, key=lambda x: x.itemsize)
    else:
        dtypes = [out_dtype] * 3
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    if out_dtype.itemsize > widest.itemsize and not _only_narrowed(found.out.node, widest):
        return out_dtype
    return widest


def _only_narrowed(node: fx.Node, dtype: torch.dtype, depth: int = 6) -> bool:
    """True where every reader, through views, first casts to ``dtype``: a wider output would be thrown away."""
    if depth == 0 or not node.users:
        return False
    for user in node.users:
        if is_call(user, CASTS) and value_of(user).dtype == dtype:
            continue
        if is_call(user, VIEWS | {aten.transpose.int, aten.permute.default}) and _only_narrowed(user, dtype, depth - 1):
            continue
        return False
    return True
