"""Token-axis rules of the ops that compute across an axis: projections, products, convolutions, reductions."""

from __future__ import annotations

from blade_compile.passes import axes
from blade_compile.passes.extents import hint
from blade_compile.passes.token_flow import LEAF, Flow, Step, is_tensor, same_axes, shape_of, token_wise


def linear(step: Step) -> Flow:
    if len(step.shape) - 1 in step.token_axes():
        return LEAF
    return same_axes(step, projects=True)


def product(step: Step) -> Flow:
    """Matmul and its kin: rows follow the first factor, columns the second; data times data is a new sequence."""
    at = 1 if step.name in ("addmm", "baddbmm", "addbmm") else 0
    left, right = step.arg(at, "batch1", "mat1", "input"), step.arg(at + 1, "batch2", "mat2", "other")
    if not (is_tensor(left) and is_tensor(right)):
        return LEAF
    if step.name == "__rmatmul__":
        left, right = right, left
    one, two, rank = shape_of(left), shape_of(right), len(step.shape)
    both = step.is_data(left) and step.is_data(right)
    row, column = (rank - 1, None) if len(two) == 1 else (rank - 2, rank - 1)
    if column not in step.token_axes():
        parts = axes.through_broadcast(step.parts, (*step.shape[: row + 1], one[-1]), one)
        mixes = both and row in step.token_axes()
        found = step.merge([step.state(left, parts)], projects=not both, mixes=mixes)
        if found is not LEAF or row in step.token_axes():
            return found
    if row in step.token_axes():
        return LEAF
    parts = axes.through_broadcast(step.parts, (*step.shape[:-2], two[-2], step.shape[-1]), two)
    return step.merge([step.state(right, parts)], projects=not both, mixes=both and column in step.token_axes())


def einsum(step: Step) -> Flow:
    equation = step.arg(0, "equation")
    rest = step.arg(1, "tensors", "operands")
    nodes = list(rest) if isinstance(rest, (list, tuple)) else list(step.node.args[1:])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return LEAF
    inputs, output = equation.replace(" ", "").split("->")
    states = []
    for letters, node in zip(inputs.split(","), nodes):
        axis_map = [letters.find(c) if c in letters else None for c in output]
        if step.is_data(node) or len(nodes) == 1:
            states.append(step.state(node, axes.through_axes(step.parts, axis_map)))
    data = [n for n in nodes if step.is_data(n)]
    contracts = any(c not in output for c in inputs.replace(",", ""))
    both = len(data) > 1 and contracts
    return step.merge(states, projects=contracts and not both, mixes=both)


def convolution(step: Step) -> Flow:
    """Token-wise along the axes where the kernel has size 1; else the sequence it mixed is kept as ``inner``."""
    node, weight = step.first(), step.arg(1, "weight")
    source = shape_of(node)
    if not is_tensor(weight) or len(source) != len(step.shape):
        return LEAF
    kernel = shape_of(weight)
    local = all(a == 0 or (a >= 2 and kernel[a] == 1 and source[a] == step.shape[a]) for a in step.token_axes())
    if local:
        return step.merge([step.state(node, step.parts)], projects=True)
    if any(inner != 1 or size != step.shape[a] or a < 2 for a, inner, size in step.parts):
        return LEAF
    parts = axes.normal([(a, 1, source[a]) for a, _, _ in step.parts])
    return Flow("leaf", inner=step.state(node, parts))


def along_dim(step: Step) -> Flow:
    """Token-wise unless the dim it works along is the token axis."""
    at = {"roll": 2, "gather": 1, "index_select": 1, "take_along_dim": 2}.get(step.name, 1)
    dims = {d % len(step.shape) for d in step.ints(at, "dim", "dims", default=-1)}
    node = step.first()
    if len(shape_of(node)) != len(step.shape) or (shape_of(node) != step.shape and step.token_axes() & dims):
        return LEAF
    if step.token_axes() & dims:
        return Flow("leaf", inner=step.state(node, step.parts))
    return same_axes(step, node)


def reduction(step: Step) -> Flow:
    node = step.first()
    source = shape_of(node)
    if len(source) == len(step.shape):
        return same_axes(step, node)
    dims = {d % len(source) for d in step.ints(1, "dim", "axis") if not isinstance(d, bool)}
    kept = [a for a in range(len(source)) if a not in dims]
    return step.renamed(node, kept) if len(kept) == len(step.shape) else token_wise(step)


def lookup(step: Step) -> Flow:
    """embedding(weight, ids): the tokens are those of the ids."""
    ids = step.arg(1, "indices", "input")
    if not is_tensor(ids) or not shape_of(ids) or len(step.shape) - 1 in step.token_axes():
        return LEAF
    if len(shape_of(ids)) == len(step.shape):  # F.embedding(ids, weight) at the torch level
        return LEAF
    return step.merge([step.state(ids, step.parts)], projects=True)


def indexing(step: Step) -> Flow:
    """x[..., ids, ...] with one 1-D index: token-wise if it picks along another axis; else a new sequence, with the one
    it picks from kept as ``inner``.
    """
    node, ids = step.first(), step.arg(1, "indices")
    if not isinstance(ids, (list, tuple)) or len(shape_of(node)) != len(step.shape):
        return LEAF
    picked = {axis for axis, item in enumerate(ids) if item is not None}
    simple = len(picked) == 1 and all(len(shape_of(i)) == 1 for i in ids if i is not None)
    if not simple:
        return LEAF
    if not picked & step.token_axes():
        return same_axes(step, node)
    (axis,) = picked
    return Flow("leaf", inner=step.state(node, axes.whole_axis(axis, hint(shape_of(node)[axis]))))
