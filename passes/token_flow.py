"""One step back along the token axis: from an op's output to the operands its tokens come from.

This file holds the vocabulary of the rules and the token-wise ones; ``shape_flow`` holds those of views and slices,
``mixing_flow`` those of products and reductions, ``flow_rules`` the table from op names to rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from blade_compile.passes import axes
from blade_compile.passes.axes import Components
from blade_compile.passes.extents import ZERO, Extent, hint, hints

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# A state of the walk: a node, the index into it when it returns several tensors, and where its token axis lies.
State = tuple[fx.Node, int | None, Components]


@dataclass(frozen=True)
class Flow:
    """What the tokens of an op's output are made of.

    ``layers``: the output is, token by token, made of every layer; a layer is an ordered list of sequences one after
    the other (an ``Extent`` stands for that many padding tokens). ``take``: the tokens ``start .. start + length`` of
    the one sequence in the one layer. ``leaf``: the walk ends here. ``projects``: a weight was applied. ``mixes``:
    every token also saw data of other tokens (an attention), so the result is a new sequence with the parts of the old
    one. ``inner``: the sequence that a leaf mixed.
    """

    kind: str
    layers: tuple[tuple[State | Extent, ...], ...] = ()
    start: Extent = ZERO
    length: Extent = ZERO
    projects: bool = False
    mixes: bool = False
    inner: State | None = None

    def states(self) -> list[State]:
        """Every sequence in every layer."""
        return [item for layer in self.layers for item in layer if not isinstance(item, Extent)]


LEAF = Flow("leaf")


def value_of(arg: Any) -> Any:
    """The fake value of a node (shadow: ``val``, Dynamo: ``example_value``); other arguments are returned as is."""
    if isinstance(arg, fx.Node):
        return arg.meta.get("val", arg.meta.get("example_value"))
    return arg


def is_tensor(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and isinstance(value_of(arg), torch.Tensor)


def op_name(node: fx.Node) -> str:
    """Bare name of the op: overload, namespace and the in-place underscore removed."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
    else:
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def tensor_args(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.all_input_nodes if is_tensor(arg)]


class Step:
    """An op seen from one of its outputs: readable access to its arguments and shapes."""

    def __init__(self, node: fx.Node, index: int | None, parts: Components, is_data: Callable[[fx.Node], bool]):
        self.node, self.index, self.parts, self.is_data = node, index, parts, is_data
        self.name = op_name(node)
        value = value_of(node)
        self.value = value[index] if index is not None and isinstance(value, (tuple, list)) else value
        self.shape = hints(self.value.shape)

    def arg(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by position or by any of its names."""
        if position < len(self.node.args):
            return self.node.args[position]
        return next((self.node.kwargs[n] for n in names if n in self.node.kwargs), default)

    def first(self) -> fx.Node:
        """The tensor the op works on."""
        node = self.arg(0, "input", "self", "query", "q")
        return node if is_tensor(node) else tensor_args(self.node)[0]

    def ints(self, position: int, *names: str, default: Any = None) -> list[int]:
        """A dims argument given as an int, a list, or (methods) as the rest of the positional arguments."""
        found = self.arg(position, *names, default=default)
        if isinstance(found, int) and len(self.node.args) > position + 1:
            found = self.node.args[position:]
        if found is None:
            return []
        return [hint(value_of(d)) for d in (found if isinstance(found, (list, tuple)) else [found])]

    def token_axes(self) -> set[int]:
        """The output axes that hold a part of the token index."""
        return {axis for axis, _, _ in self.parts}

    def state(self, node: fx.Node, parts: Components | None) -> State | None:
        """A state of the walk at an operand; None where the operand carries no tokens."""
        return None if parts is None else (node, None, parts)

    def merge(self, states: Iterable[State | None], *, projects: bool = False, mixes: bool = False) -> Flow:
        """The token-by-token union of sequences."""
        found = tuple((s,) for s in dict.fromkeys(states) if s is not None)
        return Flow("layers", found, projects=projects, mixes=mixes) if found else LEAF

    def renamed(self, node: fx.Node, axis_map: Sequence[int | None], **flags: bool) -> Flow:
        """One operand, its axes being ``axis_map[a]`` for output axis ``a``."""
        return self.merge([self.state(node, axes.through_axes(self.parts, axis_map))], **flags)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return hints(value_of(node).shape)


def token_wise(step: Step, operands: Sequence[fx.Node] | None = None, **flags: bool) -> Flow:
    """Follow the operands that carry tokens at full size; tables, gates and masks are no sources."""
    carrying = []
    for node in tensor_args(step.node) if operands is None else operands:
        if not is_tensor(node):
            continue
        parts = axes.through_broadcast(step.parts, step.shape, shape_of(node))
        if parts is not None:
            carrying.append((node, parts))
    full = [(n, p) for n, p in carrying if axes.fills(step.shape, shape_of(n))]
    if not full and carrying:
        widest = max(len([s for s in shape_of(n) if s > 1]) for n, _ in carrying)
        full = [(n, p) for n, p in carrying if len([s for s in shape_of(n) if s > 1]) == widest]
    return step.merge([step.state(n, p) for n, p in full], **flags)


def first_only(step: Step) -> Flow:
    return token_wise(step, [step.first()])


def second_only(step: Step) -> Flow:
    return token_wise(step, [step.arg(1, "src", "other")])


def where(step: Step) -> Flow:
    return token_wise(step, [step.arg(1, "self", "input"), step.arg(2, "other")])


def same_axes(step: Step, node: fx.Node | None = None, **flags: bool) -> Flow:
    """Output axes are the operand's own axes by position; sizes must agree on the token axes."""
    if node is None and not tensor_args(step.node):
        return LEAF
    node = node or step.first()
    source = shape_of(node)
    ok = len(source) == len(step.shape) and all(source[a] == step.shape[a] for a in step.token_axes())
    return step.merge([step.state(node, step.parts) if ok else None], **flags)
