"""In-place calls that would make a rewrite read the wrong value.

The new operator runs where the output was; the old products read their inputs earlier. If a tensor is written in
between, or a view of the scores goes stale because its base is written, the rewrite would compute something else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from blade_compile.passes.codes import Refusal
from blade_compile.passes.match import Match
from blade_compile.passes.operands import Plan
from blade_compile.passes.shadow import Shadow, opaque


def check_not_mutated(shadow: Shadow, found: Match, plan: Plan) -> None:
    """Raise where an input of the site, or a node inside it, is overwritten between its use and the output."""
    writes = writes_of(shadow)
    if not writes:
        return
    region = set(found.region)
    end = shadow.order[found.out.node]
    inputs = [*plan.inputs(), *(x.node for x in (found.q, found.k, found.v))]
    for node in (*inputs, *found.region):
        read, memory = _first_read(shadow, node, region), shadow.storage.get(node)
        for write, written in writes:
            if memory is None or written != memory or not read < shadow.order[write] < end:
                continue
            stale = any(shadow.order[write] < shadow.order[user] and user is not write for user in node.users)
            if write not in region or (node in region and stale):
                raise Refusal("mutation", f"the value of {shadow.dynamo.get(node, node)}")


def _first_read(shadow: Shadow, node: fx.Node, region: set[fx.Node]) -> int:
    """When the site first reads ``node``; when it is made, for nodes inside and for sources further up."""
    born = shadow.order.get(node, -1)
    readers = [shadow.order[user] for user in node.users if user in region]
    return born if node in region or not readers else min(readers)


def writes_of(shadow: Shadow) -> list[tuple[fx.Node, Any]]:
    """(node, memory it writes) for every in-place call of the shadow."""
    if shadow.writes is None:
        shadow.writes = [(node, memory) for node in shadow.graph.nodes for memory in _written(shadow, node)]
    return shadow.writes


def writers(shadow: Shadow) -> dict[Any, list[fx.Node]]:
    """Memory -> the in-place calls that write it."""
    found: dict[Any, list[fx.Node]] = {}
    for node, memory in writes_of(shadow):
        found.setdefault(memory, []).append(node)
    return found


def _written(shadow: Shadow, node: fx.Node) -> list[Any]:
    if node.op != "call_function":
        return []
    if node.target is opaque:
        wrapper = "mutation" in str(getattr(shadow.origin[node].target, "__name__", ""))
        return [shadow.storage[x] for x in node.all_input_nodes if wrapper and x in shadow.storage]
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    schema = node.target._schema
    named = dict(zip((spec.name for spec in schema.arguments), node.args)) | dict(node.kwargs)
    written = [named.get(s.name) for s in schema.arguments if s.alias_info is not None and s.alias_info.is_write]
    return [shadow.storage[x] for x in written if isinstance(x, fx.Node) and x in shadow.storage]
