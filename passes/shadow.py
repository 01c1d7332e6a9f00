"""The shadow: a pre-dispatch re-trace of a Dynamo graph in canonical ATen, with the way back.

Dynamo's graph holds the user's words: methods, functions, operators, in-place forms, opaque library calls. The same
graph run through ``make_fx(pre_dispatch=True)`` is one dialect: ``scaled_dot_product_attention``, ``softmax``,
``matmul``, ``einsum`` stay whole, ``F.multi_head_attention_forward`` opens up, and in-place calls form a chain of
values. Nothing is rewritten there; matchers read the shadow, and ``origin``, ``values`` and ``dynamo`` lead back.

A node that cannot be re-traced (higher-order operators, data-dependent sizes, tensor subclasses, anything that
raises) becomes one ``opaque`` shadow node with the value that Dynamo found, so one odd call costs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx, track_tensor_tree
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as _is_wrapper
from torch.utils._pytree import tree_leaves, tree_map

from blade_compile.passes.fused_layers import EQUIVALENTS
from blade_compile.passes.fx_utils import fake_mode_of, value_of

_enter_autocast, _exit_autocast = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def opaque(name: str, *inputs: Any) -> Any:
    """Stand-in for a Dynamo node that was not re-traced. Only ever a target in a shadow graph; never run."""
    raise RuntimeError(f"the shadow graph is for reading; {name} cannot be run")


@dataclass
class Shadow:
    """A shadow graph and its ties to the Dynamo graph."""

    graph: fx.Graph
    origin: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """shadow node -> the Dynamo node during which it was made"""
    values: dict[fx.Node, Any] = field(default_factory=dict)
    """Dynamo node -> the shadow node of its result (nested tuples for several results)"""
    dynamo: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """shadow node -> the earliest Dynamo node that has exactly this value"""
    storage: dict[fx.Node, int] = field(default_factory=dict)
    """shadow node -> a number shared by all nodes that view the same memory"""
    order: dict[fx.Node, int] = field(default_factory=dict)
    inputs: list[fx.Node] = field(default_factory=list)
    writes: list[tuple[fx.Node, Any]] | None = None
    """in-place calls and the memory they write, once asked for"""

    def finish(self) -> Shadow:
        """Drop dead nodes, number the rest, and note who shares memory with whom."""
        self.graph.eliminate_dead_code()
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.storage = {node: memory for node in self.order if (memory := _memory(value_of(node))) is not None}
        for table in (self.origin, self.dynamo):
            for node in [node for node in table if node not in self.order]:
                del table[node]
        return self

    def requires_grad(self, node: fx.Node) -> bool:
        """Whether an input of the shadow graph requires a gradient in the user's program."""
        value = value_of(self.dynamo[node]) if node in self.dynamo else None
        return bool(getattr(value, "requires_grad", False))


def identity_shadow(graph: fx.Graph) -> Shadow:
    """The Dynamo graph as its own shadow: what is left when the re-trace as a whole raises."""
    own = {node: node for node in graph.nodes}
    order = {node: index for index, node in enumerate(graph.nodes)}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return Shadow(graph, dict(own), dict(own), dict(own), {}, order, inputs)


def trace_shadow(graph: fx.Graph, fake_mode: Any | None = None) -> Shadow:
    """Re-trace ``graph`` (with fake values on its nodes) under its own fake mode. No guard, no real memory."""
    fake_mode = fake_mode or fake_mode_of(graph)
    if fake_mode is None:
        raise ValueError("the graph's nodes carry no fake values")
    inputs = [node for node in graph.nodes if _is_input(node)]
    # Quantised weights are wrappers whose products are plain: any plain weight of their shape reads the same.
    unwrap = not any(_holds_wrapper(value_of(node)) for node in graph.nodes if not _is_input(node))
    tracer = _Tracer(graph, inputs)
    trace = make_fx(tracer.run_with, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)
    try:
        with fake_mode, torch.no_grad():
            traced = trace(*[_fresh(value_of(node), unwrap) for node in inputs])
    finally:
        tracer.leave_all_autocast()
    tracer.shadow.graph = traced.graph
    return tracer.shadow.finish()


def _is_input(node: fx.Node) -> bool:
    """Placeholders, and parameters that export leaves as attributes."""
    if node.op == "placeholder":
        return True
    return node.op == "get_attr" and isinstance(value_of(node), torch.Tensor)


def _holds_wrapper(value: Any) -> bool:
    return any(isinstance(x, torch.Tensor) and _wraps(x) for x in tree_leaves(value))


def _fresh(value: Any, unwrap: bool = False) -> Any:
    """A new fake like ``value``: tracing in-place calls must not touch the values that Dynamo still holds."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    if _wraps(value):
        return torch.empty(value.shape, dtype=value.dtype, device=value.device) if unwrap else value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


class _Tracer(fx.Interpreter):
    """Runs the Dynamo graph under ``make_fx`` and notes which shadow nodes each step makes."""

    def __init__(self, graph: fx.Graph, inputs: list[fx.Node]) -> None:
        owner = graph.owning_module if graph.owning_module is not None else torch.nn.Module()
        super().__init__(owner, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self.inputs = inputs
        self.given: dict[fx.Node, Any] = {}
        self.shadow = Shadow(graph)
        self.autocast: list[Any] = []

    def run_with(self, *values: Any) -> Any:
        self.given = dict(zip(self.inputs, values))
        return self.run(*[self.given[node] for node in self.inputs if node.op == "placeholder"])

    def run_node(self, n: fx.Node) -> Any:
        tracer = get_proxy_mode().tracer  # type: ignore[union-attr]
        last = tracer.graph._root.prev
        value = self.given[n] if n in self.given else self._run(n, tracer)
        new = tracer.graph._root.prev
        while new is not last:
            self.shadow.origin[new] = n
            new = new.prev
        self._note(n, value, tracer)
        return value

    def _run(self, n: fx.Node, tracer: Any) -> Any:
        if n.op == "output":
            return super().run_node(n)
        if n.op == "get_attr" or not self._must_be_opaque(n):
            try:
                return self._call(n)
            except Exception:
                if n.op == "get_attr":
                    raise
        return self._opaque(n, tracer)

    def _call(self, n: fx.Node) -> Any:
        if n.target is _enter_autocast:
            self.autocast.append(torch.amp.autocast(*n.args))  # by itself the call would only be recorded
            return self.autocast[-1].__enter__()
        if n.target is _exit_autocast:
            return self.autocast.pop().__exit__(None, None, None)  # regions nest
        equivalent = EQUIVALENTS.get(n.target) if n.op == "call_function" else None
        if equivalent is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return equivalent(*args, **kwargs)

    def leave_all_autocast(self) -> None:
        """Leave what a graph that ends, or a trace that fails, inside a region has entered."""
        while self.autocast:
            self.autocast.pop().__exit__(None, None, None)

    def _must_be_opaque(self, n: fx.Node) -> bool:
        if isinstance(n.target, torch._ops.HigherOrderOperator):
            return True
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if any(isinstance(x, (torch.nn.Module, fx.GraphModule)) for x in tree_leaves((args, kwargs))):
            return True
        if any(isinstance(x, torch.Tensor) and _wraps(x) for x in tree_leaves((args, kwargs))):
            return True
        value = value_of(n)
        return value is not None and _data_dependent(value) and not _data_dependent((args, kwargs))

    def _opaque(self, n: fx.Node, tracer: Any) -> Any:
        value = value_of(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        slots = [get_proxy_slot(x, tracer, None) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        proxy = tracer.create_proxy(
            "call_function", opaque, (n.name, *[slot.proxy for slot in slots if slot is not None]), {}, name=n.name
        )
        if value is None:
            return None
        return track_tensor_tree(value, proxy, constant=None, tracer=tracer)

    def _note(self, n: fx.Node, value: Any, tracer: Any) -> None:
        def shadow_node(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return None
            slot = get_proxy_slot(x, tracer, None)
            if slot is None:
                return None
            node = slot.proxy.node
            self.shadow.dynamo.setdefault(node, n) if value is x else None
            return node

        self.shadow.values[n] = tree_map(shadow_node, value) if n.op != "output" else None


def _memory(value: Any) -> int | None:
    """A number for the storage behind a fake tensor; views share it, and ``meta`` keeps it alive."""
    if not isinstance(value, torch.Tensor) or _wraps(value) or value.layout != torch.strided:
        return None
    try:
        return value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # values inside vmap have none of their own
        return None


def _wraps(value: Any) -> bool:
    """True for tensor subclasses that hold other tensors (quantised weights, DTensor)."""
    return bool(_is_wrapper(value))


def _data_dependent(value: Any) -> bool:
    try:
        return bool(
            free_unbacked_symbols([x for x in tree_leaves(value) if isinstance(x, (torch.Tensor, torch.SymInt))])
        )
    except Exception:  # noqa: BLE001 (subclasses and odd values: not a size question)
        return False
