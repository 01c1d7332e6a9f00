"""Which parts of a model are compiled, by whom and with which options: all four ways that torch offers.

torch.compile(model)                    an OptimizedModule around it, its ``forward`` compiled
model.compile()                         in place: ``_compiled_call_impl`` of the module
model.compile_repeated_blocks()         (diffusers) the same on many submodules
model.forward = torch.compile(...)      an attribute of the module
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule


@dataclass
class Region:
    """A module that is compiled as one."""

    module: nn.Module
    "the plain module"
    path: str
    "its module path"
    how: str = "wrapped"
    "``wrapped`` (OptimizedModule), ``in-place`` or ``forward``: Dynamo's frames differ a little"
    attributes: dict[str, Any] | None = None
    key: str = ""
    "where the compiled callable is kept: ``attributes[key]``; None for the model itself"
    plain: Any = None
    "what stands there to run it uncompiled"
    context: Any = None
    "Dynamo's context, which knows the options; None where it was not found or where nothing is compiled"
    inside: bool = False
    "whether it lies inside another region, where Dynamo inlines it"

    @property
    def backend(self) -> Any:
        """The backend as ``torch.compile`` wrapped it."""
        from torch._dynamo.eval_frame import innermost_backend

        return None if self.context is None else innermost_backend(self.context.callback)

    @property
    def backend_name(self) -> str:
        """As given to ``torch.compile``."""
        backend = self.backend
        return str(
            getattr(backend, "compiler_name", None) or getattr(backend, "__name__", None) or type(backend).__name__
        )

    @property
    def by_blade(self) -> bool:
        """Whether blade compiled it."""
        from .backend import blade

        backend = self.backend
        return getattr(backend, "compiler_fn", backend) is blade

    @property
    def options(self) -> Mapping[str, Any]:
        """Keyword arguments that the backend was given: mode, options."""
        return dict(getattr(self.backend, "kwargs", {})) if self.by_blade else {}

    @property
    def fullgraph(self) -> bool:
        """Whether a graph break is an error."""
        return bool(getattr(self.context, "fullgraph", False))

    @property
    def dynamic(self) -> bool | None:
        """The ``dynamic`` argument of ``torch.compile``."""
        return getattr(self.context, "_dynamic", None)


def unwrap(model: Any) -> tuple[nn.Module, Any]:
    """The plain module behind what a user calls, and the compiled object around it (None if it is plain).

    A function becomes a module without a name.
    """
    if isinstance(model, OptimizedModule):
        return model._orig_mod, model
    if isinstance(model, nn.Module):
        return model, None
    if not callable(model):
        raise ValueError(
            f"explain was given a {type(model).__name__}; valid are a module, plain or compiled, and a function."
        )
    plain = getattr(model, "_torchdynamo_orig_callable", model)
    owner = getattr(plain, "__self__", None)
    if isinstance(owner, nn.Module) and getattr(plain, "__name__", "") in {
        "forward",
        "__call__",
        "_call_impl",
        "_wrapped_call_impl",
    }:
        return owner, model if plain is not model else None
    return _Function(plain), model if plain is not model else None


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def module_paths(root: nn.Module) -> dict[int, str]:
    """Path of each module by identity; wrappers of compiled submodules leave no trace in it."""
    paths: dict[int, str] = {}
    for path, module in root.named_modules():
        paths[id(module)] = ".".join(part for part in path.split(".") if part != "_orig_mod")
    return paths


def find_regions(root: nn.Module, compiled: Any) -> list[Region]:
    """The compiled parts of a model, outer before inner; a model that is plain throughout counts as one region."""
    paths = module_paths(root)
    regions = [] if compiled is None else [Region(root, "", context=_context_of(compiled))]
    for module in root.modules():
        regions.extend(_of_module(module, paths))
    if not regions:
        return [Region(root, "")]
    for region in regions:
        outer = [r for r in regions if r is not region and _holds(r, region, regions)]
        region.inside = bool(outer)
    return regions


def _holds(outer: Region, inner: Region, order: list[Region]) -> bool:
    if outer.module is inner.module:
        return order.index(outer) < order.index(inner)
    return any(m is inner.module for m in outer.module.modules())


def _of_module(module: nn.Module, paths: dict[int, str]) -> list[Region]:
    own = vars(module)
    if isinstance(module, OptimizedModule):
        inner = module._orig_mod
        return [Region(inner, paths[id(inner)], "wrapped", own, "forward", inner._call_impl, module.dynamo_ctx)]
    found = []
    in_place = own.get("_compiled_call_impl")
    if in_place is not None:
        found.append(
            Region(module, paths[id(module)], "in-place", own, "_compiled_call_impl", None, _context_of(in_place))
        )
    forward = own.get("forward")
    plain = getattr(forward, "_torchdynamo_orig_callable", None)
    if plain is not None:
        found.append(Region(module, paths[id(module)], "forward", own, "forward", plain, _context_of(forward)))
    return found


def _context_of(compiled: Any) -> Any:
    """Dynamo's context behind a compiled module or function; a function keeps it in its closure."""
    if isinstance(compiled, nn.Module):
        return getattr(compiled, "dynamo_ctx", None)
    names = getattr(getattr(compiled, "__code__", None), "co_freevars", ())
    cells = getattr(compiled, "__closure__", None) or ()
    found = dict(zip(names, cells, strict=True)).get("self")
    context = found.cell_contents if found is not None else None
    return context if isinstance(context, torch._dynamo.eval_frame._TorchDynamoContext) else None
