"""One token order for all layers: equal calls of ``blade::token_order`` in a graph become the first of them.

Autograd's partitioner merges equal calls in training; for inference nothing does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def merge_orders(graph: fx.Graph) -> int:
    """Give every reader of an equal later call the first one; returns how many calls went."""
    first: dict[Any, fx.Node] = {}
    merged = 0
    for node in graph.find_nodes(op="call_function", target=torch.ops.blade.token_order.default):
        kept = first.setdefault(_key(node.args), node)
        if kept is not node and not node.kwargs:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            merged += 1
    return merged


def _key(value: Any) -> Any:
    return tuple(map(_key, value)) if isinstance(value, (list, tuple)) else value
