"""A backend for pass tests: find, rewrite at sparsity 0, run the graph eagerly. With every block kept the result must
equal the user's own, so a wrong scale, mask, layout or dtype shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from blade_compile.kernels import ops  # noqa: F401 (registers the operators)
from blade_compile.passes.find_attention import AttentionSite, find_sites, mark_custom_autograd
from blade_compile.passes.rewrite import rewrite_site
from tests.tools import count_ops

DENSE = {"sparsity": 0.0, "when": "always", "block_size": 16}


class Rewriting:
    """The sites, graphs and number of compilations of what was compiled with it."""

    def __init__(self, **op_kwargs: Any) -> None:
        self.op_kwargs = {**DENSE, **op_kwargs}
        self.sites: list[AttentionSite] = []
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        mark_custom_autograd(gm)
        for module in list(gm.modules()):
            if isinstance(module, fx.GraphModule):
                self.rewrite(module)
        self.graphs.append(gm)
        return gm

    def rewrite(self, gm: fx.GraphModule) -> None:
        for site in find_sites(gm):
            if not site.code_refuses:
                rewrite_site(gm.graph, site, self.op_kwargs)
                site.accept()
            self.sites.append(site)
        gm.graph.lint()
        gm.recompile()

    @property
    def codes(self) -> list[str | None]:
        return [site.code for site in self.sites]

    def count(self, op: str) -> int:
        return sum(count_ops(graph)[op] for graph in self.graphs)


def compiled(call: Callable[..., Any], backend: Rewriting, *inputs: Any, **options: Any) -> Any:
    return torch.compile(call, backend=backend, **options)(*inputs)


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def copies(inputs: Sequence[Any], *, grad: bool = False) -> list[Any]:
    """Independent inputs with the same values; float tensors require gradients on request."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, torch.nn.Parameter):
            return x
        return x.detach().clone().requires_grad_(grad and x.is_floating_point())

    return [copy(x) for x in inputs]
