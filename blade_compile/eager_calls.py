"""Count every attention call of a model as it runs eagerly: what a report holds against what the graphs contained.

Dynamo leaves frames that it can't trace to Python without a word, and attention that runs there is in no graph. Here a
function mode watches all torch calls: attention functions and operators by name, attention written out by hand by
following products of two activations through a softmax into a second product.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_KINDS = {
    "scaled_dot_product_attention": "sdpa",
    "multi_head_attention_forward": "mha",
    "_native_multi_head_attention": "mha",
    "_transformer_encoder_layer_fwd": "encoder_layer",
    "flex_attention": "flex",
}
# Kernels of other libraries, registered as operators: flash_attn::_flash_attn_forward, xformers_flash::flash_fwd, ...
_FOREIGN = re.compile(r"(flash|attn|attention|fmha|sage).*(fwd|forward|attention|attn)")
_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "mm"}
_NORMALISERS = {"softmax", "_softmax", "exp", "exp_", "exp2"}
_ENDS = {"linear", "layer_norm", "group_norm", "rms_norm", "conv1d", "conv2d", "conv3d", "embedding"}


@dataclass
class Call:
    """One attention call as it ran."""

    path: str
    "path of the innermost module around it"
    kind: str
    shape: tuple[int | None, ...] = (None,) * 5
    "(B, H, S, T, D)"
    dtype: str | None = None
    backend: str | None = None
    "name of the library's attention backend that it went through, None for the native one"


def attention_calls(run: Callable[[], object], paths: dict[int, str]) -> list[Call]:
    """The attention calls of one eager run, in order.

    Args:
        run: runs the model once. Nothing that it calls is compiled meanwhile.
        paths: module path by ``id`` of the module.
    """
    watch = _Watch(paths)
    # force_eager: FlexAttention compiles itself, and Dynamo would trace into the mode.
    with torch.compiler.set_stance("force_eager"), watch_diffusers(watch.note_backend), watch:
        run()
    return watch.calls


def module_around(paths: dict[int, str], depth: int = 1) -> str:
    """Path of the innermost module whose method is on the Python stack; empty where there is none."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        path = paths.get(id(frame.f_locals.get("self")))
        if path is not None:
            return path
        frame = frame.f_back
    return ""


class _Watch(TorchFunctionMode):
    def __init__(self, paths: dict[int, str]) -> None:
        super().__init__()
        self.paths = paths
        self.calls: list[Call] = []
        self.state: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> "scores" or "weights"
        self.quiet = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.quiet:
            name = _name(func)
            kind = _KINDS.get(name) or ("foreign" if _is_foreign(func, name) else None)
            if kind is not None:
                self._note(kind, *_operands(args, kwargs))
            else:
                self._follow(name, args, kwargs, result)
        return result

    @contextlib.contextmanager
    def note_backend(self, backend: str, q: Any, k: Any) -> Iterator[None]:
        """Count a call of another library's attention backend; what it calls in turn isn't counted again."""
        self._note("backend", q, k, backend=backend, tokens=1)
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    def _note(self, kind: str, q: Any, k: Any, *, backend: str | None = None, tokens: int = 2) -> None:
        call = Call(module_around(self.paths, 3), kind, backend=backend)
        if isinstance(q, Tensor):
            call.dtype = str(q.dtype).removeprefix("torch.")
            if isinstance(k, Tensor) and q.dim() == k.dim() == 4:
                heads = 3 - tokens
                call.shape = (q.shape[0], q.shape[heads], q.shape[tokens], k.shape[tokens], q.shape[3])
        self.calls.append(call)

    def _follow(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Hand-written attention: product -> scores, softmax of scores -> weights, product of weights -> attention."""
        tensors = [x for x in _flat(args, kwargs) if isinstance(x, Tensor)]
        states = {self.state.get(x) for x in tensors if x in self.state}
        if name in _PRODUCTS:
            if "weights" in states:
                weights = next(x for x in tensors if self.state.get(x) == "weights")
                values = next((x for x in tensors if x is not weights), weights)
                del self.state[weights]  # counted once, however many products the weights enter
                self.calls.append(_by_hand(module_around(self.paths, 3), weights, values))
            elif isinstance(result, Tensor) and result.dim() > 2 and _two_activations(tensors):
                self.state[result] = "scores"
        elif states and name not in _ENDS and isinstance(result, Tensor):
            state = "weights" if name in _NORMALISERS or "weights" in states else "scores"
            if result.numel() >= max(x.numel() for x in tensors if x in self.state):
                self.state[result] = state


def _by_hand(path: str, weights: Tensor, values: Tensor) -> Call:
    shape: tuple[int | None, ...] = (None,) * 5
    if weights.dim() == 4:
        B, H, S, T = weights.shape
        shape = (B, H, S, T, values.shape[-1])
    return Call(path, "matmul", shape, str(values.dtype).removeprefix("torch."))


def _two_activations(tensors: list[Tensor]) -> bool:
    return len(tensors) > 1 and not any(isinstance(x, nn.Parameter) for x in tensors)


def _name(func: Any) -> str:
    """The bare name of what a function mode is given: a function, a method, an operator, a higher-order operator."""
    packet = getattr(func, "overloadpacket", func)
    return str(getattr(packet, "__name__", packet)).rsplit(".", maxsplit=1)[-1]


def _is_foreign(func: Any, name: str) -> bool:
    packet = getattr(func, "overloadpacket", func)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    qualified = packet._qualified_op_name.lower()
    return (
        not qualified.startswith("aten::")
        and "backward" not in name
        and "bwd" not in name
        and bool(_FOREIGN.search(qualified))
    )


def _operands(args: Any, kwargs: Any) -> tuple[Any, Any]:
    q = args[0] if args else kwargs.get("query")
    k = args[1] if len(args) > 1 else kwargs.get("key")
    return q, k


def _flat(args: Any, kwargs: Any) -> Iterator[Any]:
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, (list, tuple)):
            yield from arg
        else:
            yield arg


# --- diffusers --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watch_diffusers(note: Callable[..., Any]) -> Iterator[None]:
    """Report calls of diffusers' attention backends other than the native ones, which call SDPA and are seen anyway.

    Does nothing where diffusers has not been imported. Some of these kernels are no torch operators at all, so that the
    registry is the only place where they can be counted.
    """
    module = sys.modules.get("diffusers.models.attention_dispatch")
    backends = getattr(getattr(module, "_AttentionBackendRegistry", None), "_backends", None)
    if not isinstance(backends, dict):
        yield
        return
    before = dict(backends)
    for key, function in before.items():
        name = str(getattr(key, "value", key))
        if "native" not in name:
            backends[key] = _noted(function, name, note)
    try:
        yield
    finally:
        backends.clear()
        backends.update(before)


def _noted(function: Callable[..., Any], name: str, note: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        q, k = _operands(args, kwargs)
        with note(name, q, k):
            return function(*args, **kwargs)

    return run
