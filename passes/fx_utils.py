"""Small helpers for fx graphs of every level: Dynamo's (``example_value``), export's and ``make_fx``'s (``val``)."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from blade_compile.passes.extents import expression, hint

Size = Any  # int or torch.SymInt
aten = torch.ops.aten


def value_of(node: object) -> Any:
    """The fake value of a node; anything that is not a node stands for itself."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(value_of(node), torch.Tensor)


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    return tuple(value_of(node).shape)


def same(a: Size, b: Size) -> bool:
    """Sizes equal for every value of their symbols. Adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(expression(a) == expression(b))


def quotient(size: Size, by: Size) -> Size | None:
    """``size / by`` where that is a whole number for every value of the symbols, else None. Adds no guard."""
    top, bottom = expression(size), expression(by)
    if isinstance(top, int) and isinstance(bottom, int):
        return top // bottom if bottom and top % bottom == 0 else None
    ratio = sympy.cancel(sympy.sympify(top) / bottom)
    if not ratio.is_polynomial(*ratio.free_symbols) or any(not c.is_Integer for c in _coefficients(ratio)):
        return None
    if ratio.is_Integer:
        return int(ratio)
    symbolic = size if isinstance(size, torch.SymInt) else by
    return symbolic.node.shape_env.create_symintnode(ratio, hint=hint(size) // hint(by))


def _coefficients(ratio: Any) -> list[Any]:
    symbols = sorted(ratio.free_symbols, key=str)
    return sympy.Poly(ratio, *symbols).coeffs() if symbols else [ratio]


def is_call(node: object, targets: Any) -> bool:
    """True where ``node`` calls one of ``targets`` (a set, or one target)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return node.target in targets if isinstance(targets, (set, frozenset)) else node.target is targets


def is_call_in_place(node: fx.Node) -> bool:
    """True for an ATen call that writes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument of an ATen call by its schema name, given positionally, by keyword or left at its default."""
    if name in node.kwargs:
        return node.kwargs[name]
    for index, spec in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if spec.name == name:
            if index < len(node.args):
                return node.args[index]
            return spec.default_value if spec.has_default_value() else default
    return default


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an ATen call by schema name, defaults included."""
    return {spec.name: argument(node, spec.name) for spec in node.target._schema.arguments}  # type: ignore[union-attr]


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module around ``node``, without ``self``; empty at the top or where unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))
    return clean_path(path[0] if isinstance(path, (tuple, list)) else path)


def clean_path(path: str) -> str:
    """``L['self'].blocks[0].attn`` or ``L['self'].__dict__['_modules']['blocks']...`` as ``blocks.0.attn``."""
    for bracket in ("L[", "G["):
        if path.startswith(bracket):
            path = path[path.index("]") + 1 :]
    for text in ("__dict__", "_modules", "['", '["', "[", "']", '"]', "]"):
        path = path.replace(text, ".")
    return ".".join(part for part in path.split(".") if part)


def fake_mode_of(graph: fx.Graph) -> Any | None:
    """The fake mode in which the graph's values live; Dynamo's differs from the one a backend is called under."""
    for node in graph.nodes:
        mode = getattr(value_of(node), "fake_mode", None)
        if mode is not None:
            return mode
    return None


def erase_dead(nodes: list[fx.Node], removable: set[fx.Node]) -> int:
    """Erase ``nodes`` (in graph order) that nobody uses, last first, then what only they used.

    In-place calls among ``removable`` go too: they wrote a tensor that is gone. Other impure nodes stay.
    """
    erased = 0
    work = list(nodes)
    while work:
        node = work.pop()
        if node._erased or node.users or node.op in ("placeholder", "output"):
            continue
        if node not in removable and (node.is_impure() or _mutates(node)):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        erased += 1
        work.extend(inputs)
    return erased


def _mutates(node: fx.Node) -> bool:
    """True for a call that writes one of its arguments, or draws random numbers: removing it would be seen."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return node.op == "call_module"
    name = getattr(node.target, "__name__", str(node.target))
    return name.startswith("i") and getattr(node.target, "__module__", "") == "_operator" and name[1:] in _INPLACE


_INPLACE = {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift", "matmul"}
