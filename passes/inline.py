"""Late inlining: attention operators whose Triton kernel Inductor then launches itself (``inline_kernels=True``).

The operator stays whole through autograd and Inductor's own passes. In the post-grad graph its launcher is traced on
fake tensors, with each kernel launch as a node, and these nodes take the operator's place: Inductor allocates the
results and launches the kernel by its own launcher, without a Python operator for each call. Only forward attention is
inlined, where ``when="always"`` and every size is known: ``auto`` and other sizes are decided as the operator runs.
"""

from __future__ import annotations

import logging
import operator
from typing import Any

import torch
from torch import Tensor, fx

from blade_compile.kernels import accelerator, dispatch

from .fx_utils import arguments, fake_mode_of, value_of

logger = logging.getLogger("blade_compile")

TENSORS = ("q", "k", "v", "kv_num_blocks", "kv_indices", "key_mask")


def inline_kernels(graph: fx.Graph) -> int:
    """Replace the attention operators whose kernel can be launched directly; returns how many. The others stay."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=torch.ops.blade.block_sparse_attention.default):
        try:
            if launchable(node):
                _splice(graph, node, traced(graph, node))
                count += 1
        except Exception as error:
            logger.debug("%s stays an operator (%s: %s)", node, type(error).__name__, error, exc_info=True)
    return count


def launchable(node: fx.Node) -> bool:
    """Whether a launch for this operator is known now: a Triton kernel, decided at compile time, no open size."""
    call = arguments(node)
    sizes = [(*value_of(x).shape, *value_of(x).stride()) for x in _tensors(node)]
    static = all(type(size) is int for shape in sizes for size in shape)
    taken_apart = all(user.target is operator.getitem for user in node.users)
    return (
        taken_apart
        and static
        and call["when"] == "always"
        and accelerator.runs_triton(value_of(call["q"]), call["block_size"])
    )


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The operator's tensor arguments that are given."""
    call = arguments(node)
    return [call[name] for name in TENSORS if call[name] is not None]


def traced(graph: fx.Graph, node: fx.Node) -> fx.GraphModule:
    """The launch as a graph of the operator's tensors: allocations and one node for each kernel."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    call = arguments(node)
    scale = call["scale"] if call["scale"] is not None else value_of(call["q"]).shape[-1] ** -0.5

    def run(q: Tensor, k: Tensor, v: Tensor, num: Tensor, idx: Tensor, *mask: Tensor) -> tuple[Tensor, Tensor]:
        bias = dispatch.key_bias(mask[0] if mask else None, q.dtype)
        return accelerator.traceable_forward(q, k, v, num, idx, bias, scale, call["block_size"])

    mode = fake_mode_of(graph)
    assert mode is not None
    with mode:
        return make_fx(run, decomposition_table=select_decomp_table())(*map(value_of, _tensors(node)))


def _splice(graph: fx.Graph, node: fx.Node, launch: fx.GraphModule) -> None:
    """Put a traced launch in the place of an operator: its results take over the operator's ``getitem`` nodes."""
    placeholders = launch.graph.find_nodes(op="placeholder")
    copies: dict[fx.Node, Any] = dict(zip(placeholders, _tensors(node), strict=True))
    with graph.inserting_before(node):
        for inner in launch.graph.nodes:
            if inner.op == "output":
                results = [copies[value] for value in inner.args[0]]
            elif inner.op != "placeholder":
                copies[inner] = _copied(graph, inner, copies)
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def _copied(graph: fx.Graph, inner: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
    copy = graph.node_copy(inner, lambda old: copies[old])
    if isinstance(inner.target, torch._ops.HigherOrderOperator):
        # The strides are numbers in the launch: Inductor has to keep to these, not only to their order.
        copy.meta["eager_input_vals"] = fx.map_arg((copy.args, copy.kwargs), value_of)
    return copy
