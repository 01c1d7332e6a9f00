"""How the blocks of a model run: compiled for the role that it plays now, and recomputed in the backward pass if asked.

One module may play several roles (adapters over one set of weights), so each block asks at every call which role is
on, and its recomputation plays the role of its forward pass, whatever was played since.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blade_compile.distill.step_condition import StepLinear
from blade_compile.kernels import observe

RECOMPILES = 64
"""Graphs of a role: with and without gradients, first blocks and others, batch sizes, kinds of blocks"""


@dataclass(frozen=True)
class Part:
    """A role as its module plays it in one call."""

    role: str
    compiled: Mapping[Any, Callable[..., Any]]
    "by class of block"
    adapter: str | None = None
    "of LoRA; None: the plain weights"
    steps: int | None = None
    "K where the role is told it"


@dataclass
class Tally:
    """The block-sparse attention calls of one call of the model: their number and the kept share of their blocks."""

    densities: list[float] = field(default_factory=list)

    @property
    def sparsity(self) -> float | None:
        """Dropped share of the blocks, mean over the calls."""
        return 1 - sum(self.densities) / len(self.densities) if self.densities else None


class Stage:
    """A module whose forward pass, or whose blocks', are compiled for each role that it plays."""

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], *, recompute: bool) -> None:
        """Take over the forward functions of ``blocks``, which may be the module itself."""
        self.module = module
        self.part: Part | None = None
        self.tally: Tally | None = None
        self.blocks = list(blocks)
        self.kinds = {type(block): type(block).forward for block in blocks}
        for block in blocks:
            block.forward = _Forward(self, block, recompute)
        inside = {id(layer) for block in blocks for layer in block.modules()}
        self._outside = [m for m in _switches(module) if id(m) not in inside]

    def play(self, part: Part) -> None:
        """Be this role from here on."""
        self.part = part
        _switch(self._outside, part)

    def plain(self) -> None:
        """Give the blocks their own forward functions back."""
        for block in self.blocks:
            vars(block).pop("forward", None)

    def compile(self, role: str, **how: Any) -> dict[Any, Callable[..., Any]]:
        """Compile the blocks' forward functions for a role, one for each class of blocks: layers share their graphs.

        Args:
            role: in the functions' names.
            how: arguments of ``torch.compile``.
        """
        return {kind: _compiled(forward, f"{role}_{kind.__name__}", how) for kind, forward in self.kinds.items()}


class _Forward:
    """The forward function of one block."""

    def __init__(self, stage: Stage, block: nn.Module, recompute: bool) -> None:
        self.stage, self.block, self.recompute = stage, block, recompute
        self.kind = type(block)  # sharding gives the block another one
        self.switches = _switches(block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part = self.stage.part
        assert part is not None, "the module is called outside its roles"
        run: Callable[..., Any] = partial(self._run, part, **kwargs)
        if self.recompute and torch.is_grad_enabled():
            # Of the compiled function: the same kernels again, so that the same blocks are chosen.
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        tally = self.stage.tally
        if tally is None:
            return run(*args)
        with observe.record() as events:
            out = run(*args)
        tally.densities += [1.0 if e.path == "sdpa" else e.density for e in events if e.op in observe.ATTENTIONS]
        return out

    def _run(self, part: Part, *args: Any, **kwargs: Any) -> Any:
        _switch(self.switches, part)
        return part.compiled[self.kind](self.block, *args, **kwargs)


def _compiled(function: Any, name: str, how: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile a function under a code object of its own, where Dynamo keeps its graphs apart from other roles'."""
    if isinstance(function, FunctionType):
        code = function.__code__.replace(co_name=name)
        copy = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
        copy.__kwdefaults__ = function.__kwdefaults__
        function = copy
    known = inspect.signature(torch.compile).parameters
    settings: dict[str, Any] = {"recompile_limit": RECOMPILES} if "recompile_limit" in known else {}
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False, **settings | dict(how))
    return compiled


def _switches(module: nn.Module) -> list[Any]:
    """Layers that behave differently from role to role."""
    return [m for m in module.modules() if isinstance(m, StepLinear) or hasattr(m, "_active_adapter")]


def _switch(layers: Sequence[Any], part: Part) -> None:
    for layer in layers:
        if isinstance(layer, StepLinear):
            layer.tell(part.role, part.steps)
        else:  # peft's own functions also change which parameters require gradients
            layer._disable_adapters = part.adapter is None
            if part.adapter is not None:
                layer._active_adapter = part.adapter
