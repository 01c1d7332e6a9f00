"""Compile with Dynamo and leave nothing behind: no cache entry, no skipped frame, no learned dynamic size.

Dynamo keeps its results and its verdicts ("this frame can't be traced") on the code objects of the user's functions.
A report that compiled in the ordinary way would use up recompiles, make frames eager for good that a later
``fullgraph=True`` could capture, and let the user's next compile start with dynamic shapes.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import fx

from .kernels import compat
from .regions import Region

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


class PrivateCompile:
    """One backend's compiled functions; `forget` takes back all that Dynamo noted on their account."""

    def __init__(self, backend: Backend, *, fullgraph: bool = False, dynamic: bool | None = None) -> None:
        kwargs: dict[str, Any] = {"backend": backend, "nopython": fullgraph, "dynamic": dynamic}
        self.backend = backend
        self._copies: dict[FunctionType, FunctionType] = {}
        try:  # a recompile region of its own, where torch has them: the user's entries are not even looked at
            self.context: Any = torch._dynamo.optimize(**kwargs, isolate_recompiles=True)
        except TypeError:
            self.context = torch._dynamo.optimize(**kwargs)
        self.callback = None
        if callable(getattr(self.context, "callback", None)):
            self.callback = self.context.callback = _Traceless(self.context.callback)

    @contextlib.contextmanager
    def compiled(self, region: Region) -> Iterator[Callable[..., Any]]:
        """The region's module as a function that is compiled the way ``torch.compile`` compiles it."""
        with contextlib.ExitStack() as stack:
            if region.how == "forward":
                yield self.context(self._fresh_code(region.plain))
                return
            module = region.module
            if "forward" not in vars(module):
                forward = self._fresh_code(module.forward)
                if forward is not module.forward:
                    stack.enter_context(replaced(vars(module), "forward", forward))
            yield self.context(module if region.how == "wrapped" else module._call_impl)

    def _fresh_code(self, method: Any) -> Any:
        """The method with a code object of its own, where Dynamo keeps its results apart from the user's.

        One copy for all modules of a class, which share compiled code as layers do.
        """
        function = getattr(method, "__func__", None)
        if not isinstance(function, FunctionType) or torch._dynamo.trace_rules.check(function):
            return method
        copy = self._copies.get(function)
        if copy is None:
            code = function.__code__.replace()
            copy = FunctionType(
                code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
            )
            copy.__kwdefaults__ = function.__kwdefaults__
            self._copies[function] = copy
        return MethodType(copy, method.__self__)

    def forget(self) -> None:
        """Drop every cache entry of this backend."""
        from torch._dynamo import eval_frame

        for code in self.callback.codes if self.callback else ():
            for entry in torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code):
                if eval_frame.innermost_backend(entry.backend) is self.backend:
                    _invalidate(entry)
        eval_frame.cached_backends.pop(id(self.backend), None)


class _Traceless:
    """Dynamo's frame callback, except that a frame it gives up is tried again by the next compile."""

    def __init__(self, callback: Any) -> None:
        self._torchdynamo_orig_backend = callback  # where torch looks for the backend behind a callback
        self.codes: set[CodeType] = set()

    def __call__(self, frame: Any, *args: Any, **kwargs: Any) -> Any:
        result = self._torchdynamo_orig_backend(frame, *args, **kwargs)
        reason = getattr(result, "skip_reason", None) or ""
        if result.guarded_code is not None:
            self.codes.add(frame.f_code)
        elif "skipfiles" not in reason:  # torch's own files are skipped by everyone: let Dynamo remember that
            result.apply_to_code = False
        return result


def _invalidate(entry: Any) -> None:
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    state = getattr(entry.guard_manager, "extra_state", None)
    if state is not None:
        state.invalidate(entry, DeletedGuardManagerWrapper("compiled for a report of blade_compile.explain"))


@contextlib.contextmanager
def fresh_dynamo() -> Iterator[dict[str, Counter[str]]]:
    """Compile as if for the first time: static sizes as far as the user did not ask otherwise, no recompile limit.

    Yields Dynamo's counters, which start empty and get their old values back at exit.
    """
    from torch._dynamo import config, pgo, utils

    wanted: dict[str, Any] = {
        "automatic_dynamic_shapes": False,
        "automatic_dynamic_local_pgo": False,
        "automatic_dynamic_remote_pgo": False,
        "recompile_limit": 1 << 20,
        "accumulated_recompile_limit": 1 << 20,
        "error_on_recompile": False,
        "suppress_errors": False,
        "caching_precompile": False,
    }
    known = compat.known_settings(config, wanted)
    learned = getattr(pgo, "_CODE_STATE", None)
    if learned is not None:
        pgo._CODE_STATE = type(learned)(learned.default_factory)
    with config.patch(known), torch.compiler.set_stance("default"):
        counted = {name: counter.copy() for name, counter in utils.counters.items()}
        utils.counters.clear()
        try:
            yield utils.counters
        finally:
            utils.counters.clear()
            utils.counters.update(counted)
            if hasattr(pgo, "_CODE_STATE"):
                pgo._CODE_STATE = learned


@contextlib.contextmanager
def replaced(attributes: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """``attributes[name]`` is ``value`` while the context is open."""
    there, before = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if there:
            attributes[name] = before
        else:
            del attributes[name]
