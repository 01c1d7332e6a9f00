"""What tests share: the one tolerance policy, and a backend that counts operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

GraphPass = Callable[[fx.GraphModule, Sequence[object]], fx.GraphModule]


def assert_close(actual: Tensor, exact: Tensor, plain: Tensor, name: str = "out") -> None:
    """The tolerance policy: an error of at most twice plain PyTorch's in the same precision, plus a floor.

    The floor is two rounding steps of the output's dtype at its largest value: plain PyTorch may be lucky, and is on
    some processors. Infinities and NaN have to stand in the same places. Masks, indices and counts are never compared
    with this function: they are equal or wrong.

    Args:
        actual: the result under test, any float dtype.
        exact: the same from the fp64 reference, same shape.
        plain: the same from plain PyTorch in the precision of ``actual``, same shape.
        name: what is compared ("out", "dq", ...), for the message.

    Raises:
        AssertionError: with the error, the bound and the worst place.
    """
    assert actual.shape == exact.shape == plain.shape, f"{name}: {actual.shape}, {exact.shape}, {plain.shape}"
    assert exact.dtype == torch.float64, f"{name}: the reference has to be fp64, not {exact.dtype}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype} is compared with plain PyTorch in {plain.dtype}"
    step = torch.finfo(actual.dtype).eps
    actual, exact, plain = (x.detach().double().cpu() for x in (actual, exact, plain))
    finite = exact.isfinite()
    torch.testing.assert_close(actual[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    error = torch.where(finite, (actual - exact).abs(), 0.0)
    plain_error = torch.where(finite & plain.isfinite(), (plain - exact).abs(), 0.0).max()
    bound = float(2 * plain_error + 2 * step * exact[finite].abs().max())
    worst = int(error.nan_to_num(nan=float("inf")).argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    found = float(error.flatten()[worst])
    assert found <= bound, f"{name}: error {found:.3e} at {place}, allowed {bound:.3e} (plain: {plain_error:.3e})"


def count_ops(gm: fx.GraphModule) -> Counter[str]:
    """Count the calls in a graph and its subgraphs, by name: ``"blade.sparse_sdpa"``, ``"linear"``, ``".view"``."""
    counts: Counter[str] = Counter()
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            counts.update(_op_name(node) for node in module.graph.nodes if node.op in ("call_function", "call_method"))
    return counts


def _op_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    packet = getattr(node.target, "overloadpacket", node.target)  # blade.sparse_sdpa.default -> blade.sparse_sdpa
    if isinstance(packet, torch._ops.OpOverloadPacket):
        return str(packet)
    return str(getattr(packet, "__name__", packet))


class RecordingBackend:
    """A ``torch.compile`` backend that runs graph passes, counts the operators before and after, and executes eagerly.

    ``before`` and ``after`` hold one ``Counter`` per graph, in the order of compilation, and ``graphs`` the rewritten
    graphs themselves. ``backend.after[0]["blade.sparse_sdpa"] == 2`` is what a pass test asserts.
    """

    def __init__(self, *passes: GraphPass) -> None:
        self.passes = passes
        self.before: list[Counter[str]] = []
        self.after: list[Counter[str]] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        self.before.append(count_ops(gm))
        for run_pass in self.passes:
            gm = run_pass(gm, example_inputs)
            gm.graph.lint()
            gm.recompile()
        self.after.append(count_ops(gm))
        self.graphs.append(gm)
        return gm.forward
