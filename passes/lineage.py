"""What the tokens of any tensor in a graph are made of: an ordered list of parts, each with the tensors it comes from.

``Lineage`` walks backwards from a node along its token axis (``flow_rules``) and answers with segments: the sequence
is ``segments[0]`` followed by ``segments[1]`` and so on, as the concatenations in the graph built it. A segment names
its leaves: ranges of graph inputs, of attention outputs, of anything the walk can't see through. Results are memoised
per graph, and an attention keeps the parts of its queries, so that a concatenation in front of the first of 60 layers
is still known in the last at the cost of one pass over the graph.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from blade_compile.passes import axes
from blade_compile.passes.extents import ZERO, Extent, hint
from blade_compile.passes.flow_rules import POSITIONAL, flow
from blade_compile.passes.token_flow import LEAF, Flow, State, op_name, value_of
from blade_compile.passes.write_flow import BUFFERS, is_written, written

_PARAMETER = re.compile(r"_(parameters|buffers)_")
_SUBGRAPH_CALLS = ("checkpoint", "invoke_subgraph", "wrap", "autocast", "set_grad")


@dataclass(frozen=True)
class Leaf:
    """Tokens ``start .. start + length`` of a tensor where the walk ended."""

    node: fx.Node
    start: Extent
    length: Extent


@dataclass(frozen=True)
class Segment:
    """A run of tokens of common origin. ``projected``: a weight was applied since the leaves."""

    length: Extent
    leaves: frozenset[Leaf]
    projected: bool = False

    def part(self, start: Extent, length: Extent) -> Segment:
        """The tokens ``start .. start + length`` of this segment."""
        if start.key == 0 and length == self.length:
            return self
        leaves = frozenset(Leaf(leaf.node, leaf.start + start, length) for leaf in self.leaves)
        return Segment(length, leaves, self.projected)


Segments = tuple[Segment, ...]


def total(segments: Segments) -> Extent:
    """Number of tokens."""
    out = ZERO
    for segment in segments:
        out = out + segment.length
    return out


def take(segments: Segments, start: Extent, length: Extent) -> Segments:
    """The segments of a slice. Boundaries are ordered by their hints, equal ones taken as equal for all sizes."""
    out: list[Segment] = []
    low, stop = ZERO, start + length
    for segment in segments:
        high = low + segment.length
        begin = low if low.hint >= start.hint else start
        end = high if high.hint <= stop.hint else stop
        if end.hint > begin.hint:
            aligned = begin is low and end is high
            out.append(segment if aligned else segment.part(begin - low, end - begin))
        low = high
    return tuple(out)


def boundaries(segments: Segments) -> list[Extent]:
    """Starts of all segments, and the end of the last."""
    out = [ZERO]
    for segment in segments:
        out.append(out[-1] + segment.length)
    return out


def aligned(lists: list[Segments]) -> list[Segments]:
    """The same sequences cut at the union of their boundaries."""
    if all(len(segments) == 1 for segments in lists):
        return lists
    marks = {mark.hint: mark for segments in reversed(lists) for mark in boundaries(segments)}
    ordered = [marks[h] for h in sorted(marks)]
    steps = list(itertools.pairwise(ordered))
    return [tuple(s for a, b in steps for s in take(segments, a, b - a)) for segments in lists]


def merged(lists: list[Segments]) -> Segments:
    """Token by token union of equally long sequences."""
    lists = list(dict.fromkeys(lists))
    if len(lists) == 1:
        return lists[0]
    lists = aligned(lists)
    if len({len(segments) for segments in lists}) > 1:
        lists = [segments for segments in lists if len(segments) == len(lists[0])]
    return tuple(
        Segment(group[0].length, frozenset().union(*(s.leaves for s in group)), any(s.projected for s in group))
        for group in zip(*lists)
    )


class Lineage:
    """Memoised token lineage of one graph, and of the subgraphs that are bound to it.

    names: the user-visible names of placeholders whose own names say nothing (a re-traced graph); parameters are
    recognised by Dynamo's naming (``..._parameters_...``), by their type, or as ``get_attr``.
    """

    def __init__(self, graph: fx.Graph, names: dict[fx.Node, str] | None = None) -> None:
        self.names = dict(names or {})
        self.bindings: dict[fx.Node, fx.Node] = {}
        self.inner: dict[fx.Node, list[State]] = {}  # leaf -> the sequences it mixed (convolution, shift)
        self._segments: dict[State, Segments] = {}
        self._flows: dict[State, Flow] = {}
        self.order: dict[fx.Node, int] = {}
        self._data: dict[fx.Node, bool] = {}
        self._add(graph)

    @classmethod
    def of(cls, graph: fx.Graph, names: dict[fx.Node, str] | None = None) -> Lineage:
        """The lineage of a graph, made once; ``names`` are added to those already known."""
        found = getattr(graph, "_blade_lineage", None)
        if found is None:
            found = graph._blade_lineage = cls(graph, names)  # on the graph itself, so that both die together
        elif names:
            found.names.update(names)
        return found

    def bind(self, placeholder: fx.Node, outer: fx.Node) -> None:
        """Say that an input of a subgraph is a tensor of the calling graph (only for subgraphs called once)."""
        self.bindings[placeholder] = outer

    def name(self, node: fx.Node) -> str:
        """The name of a graph input as the user's code knows it, as far as it was passed on."""
        return self.names.get(node) or str(node.meta.get("source_name") or node.name)

    def is_data(self, node: fx.Node) -> bool:
        """Whether a node depends on the call's inputs, not only on weights and constants."""
        if node not in self._data:
            self._add(node.graph)
        return self._data.get(node, True)

    def _add(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            self.order[node] = len(self.order)
            if node.op == "placeholder":
                self._data[node] = not self.is_parameter(node)
            elif node.op == "get_attr":
                self._data[node] = False
            elif op_name(node) in BUFFERS:
                self._data[node] = is_written(node)
            elif op_name(node) in POSITIONAL:
                self._data[node] = False
            else:
                tensors = (a for a in node.all_input_nodes if not isinstance(value_of(a), (int, torch.SymInt)))
                self._data[node] = any(self._data.get(a, True) for a in tensors)

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether a placeholder is a weight or a buffer of a module."""
        if node in self.bindings:
            return not self.is_data(self.bindings[node])
        value = value_of(node)
        typed = node.type is torch.nn.Parameter or isinstance(value, torch.nn.Parameter)
        return typed or bool(_PARAMETER.search(self.name(node)))

    def segments(self, node: fx.Node, axis: int) -> Segments:
        """Parts of the sequence along ``axis`` of a node; empty when that axis has one token or no known size."""
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or not -value.dim() <= axis < value.dim():
            return ()
        axis %= value.dim()
        parts = axes.whole_axis(axis, hint(value.shape[axis]))
        return self.resolve((node, None, parts)) if parts else ()

    def resolve(self, state: State) -> Segments:
        """Evaluate a state with an explicit stack: a deep model is deeper than Python's recursion limit."""
        stack = [state]
        while stack:
            top = stack[-1]
            if top in self._segments:
                stack.pop()
                continue
            step = self.flow(top)
            waiting = [s for s in step.states() if s not in self._segments]
            if waiting:
                stack.extend(waiting)
                continue
            self._segments[top] = self._combine(top, step)
            stack.pop()
        return self._segments[state]

    def flow(self, state: State) -> Flow:
        """One step back from a state, memoised."""
        found = self._flows.get(state)
        if found is None:
            found = self._flows[state] = self._flow(*state)
        return found

    def _flow(self, node: fx.Node, index: int | None, parts: axes.Components) -> Flow:
        if node.op == "placeholder" and node in self.bindings:
            return Flow("layers", (((self.bindings[node], None, parts),),))
        if node.op not in ("call_function", "call_method") or not parts:
            return LEAF
        inner = _subgraph_output(node, index, self)
        if inner is not None:
            return Flow("layers", (((inner, None, parts),),))
        try:
            return written(node, parts) if op_name(node) in BUFFERS else flow(node, index, parts, self.is_data)
        except Exception:  # noqa: BLE001 (an op spelt in a way the rules don't know: the walk ends there)
            return LEAF

    def _combine(self, state: State, step: Flow) -> Segments:
        whole = self._extent(state)
        found: Segments = ()
        if step.kind == "layers":
            found = merged([self._concatenated(state[0], layer) for layer in step.layers])
        elif step.kind == "take":
            found = take(self._segments[step.states()[0]], step.start, step.length)
        if step.inner is not None:
            self.inner.setdefault(state[0], []).append(step.inner)
        if not found or total(found).hint != whole.hint:
            found = (Segment(whole, frozenset({Leaf(state[0], ZERO, whole)})),)
        if step.mixes:
            starts = boundaries(found)
            return tuple(
                Segment(s.length, frozenset({Leaf(state[0], start, s.length)}), True) for s, start in zip(found, starts)
            )
        if step.projects:
            found = tuple(s if s.projected else replace(s, projected=True) for s in found)
        return found

    def _concatenated(self, node: fx.Node, layer: tuple[State | Extent, ...]) -> Segments:
        found: Segments = ()
        for item in layer:
            if isinstance(item, Extent):
                found += (Segment(item, frozenset({Leaf(node, total(found), item)}), True),)
            else:
                found += self._segments[item]
        return found

    def _extent(self, state: State) -> Extent:
        """Number of tokens of a state: symbolic as far as the token axis covers whole axes."""
        node, index, parts = state
        value = value_of(node)
        shape = (value[index] if index is not None and isinstance(value, (tuple, list)) else value).shape
        out = Extent(1)
        for axis, inner, size in parts:
            whole = inner == 1 and size == hint(shape[axis])
            out = Extent(out.value * (shape[axis] if whole else size))
        return out


def _subgraph_output(node: fx.Node, index: int | None, lineage: Lineage) -> fx.Node | None:
    """The node inside a checkpointed (or otherwise wrapped) subgraph that gives this output; binds its inputs."""
    name = getattr(node.target, "__name__", "")
    root = node.graph.owning_module
    if root is None or not any(word in str(name) for word in _SUBGRAPH_CALLS):
        return None
    at = next((i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr"), None)
    module: Any = getattr(root, str(node.args[at].target), None) if at is not None else None
    if not isinstance(module, fx.GraphModule) or at is None or len(node.args[at].users) > 1:
        return None
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    given = [a for a in node.args[at + 1 :] if not isinstance(a, str)]
    if len(inputs) != len(given):
        return None
    for placeholder, outer in zip(inputs, given):
        if isinstance(outer, fx.Node):
            lineage.bind(placeholder, outer)
    output = next(n for n in module.graph.nodes if n.op == "output").args[0]
    if isinstance(output, (tuple, list)):
        output = output[index or 0] if index is not None or len(output) == 1 else None
    return output if isinstance(output, fx.Node) else None
