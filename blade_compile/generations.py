"""``with blade_compile.generation(num_steps=50, branches=2):`` the scope of one generation.

A scope counts the calls of every compiled model within it, so that policies which carry state over steps know the step
and the branch of guidance. It lives in a context variable: threads and tasks have their own, the innermost counts, and
scopes may be left in any order. All state is freed on leaving, also through an exception.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any

from .kernels.carried import Carrier

_open: ContextVar[tuple[Scope, ...]] = ContextVar("blade_generations", default=())
_branch_name: ContextVar[str | None] = ContextVar("blade_branch_name", default=None)


class generation:  # noqa: N801 (used like a function: ``with generation(50):``)
    """One generation with a policy that carries state over steps: masks are reset on entry and freed on exit.

    Args:
        num_steps: model calls of each branch, 50 for the usual 50 denoising steps.
        branches: model calls per step that take turns, 2 for classifier-free guidance as two calls. Not needed where a
            diffusers pipeline names its branches with ``cache_context("cond")``, nor for guidance as a larger batch.

    Raises:
        ValueError: a number that is not a positive integer; within the scope and on leaving it, a model that is called
            more or less often than ``num_steps * branches`` times.
    """

    def __init__(self, num_steps: int, branches: int = 1) -> None:
        for name, value in (("num_steps", num_steps), ("branches", branches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"generation: {name}={value!r}; valid is an integer from 1.")
        self.num_steps = num_steps
        self.branches = branches
        self._entered: list[Scope] = []

    def __enter__(self) -> generation:
        scope = Scope(self.num_steps, self.branches)
        self._entered.append(scope)
        _open.set((*_open.get(), scope))
        _names.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        here = _open.get()
        mine = [scope for scope in here if scope in self._entered]
        scope = mine[-1] if mine else self._entered[-1]
        self._entered.remove(scope)
        _open.set(tuple(other for other in here if other is not scope))
        _names.release()
        try:
            if kind is None:
                scope.check()
        finally:
            scope.close()


def innermost() -> Scope | None:
    """The scope that counts now, None outside of all."""
    scopes = _open.get()
    return scopes[-1] if scopes else None


class Calls:
    """How often one compiled graph was called on one set of parameters, and its state."""

    def __init__(self, scope: Scope, carrier: Carrier, label: str) -> None:
        self.scope = scope
        self.carrier = carrier
        self.label = label
        self.anchors: list[weakref.ref[Any]] = []
        self.unnamed = 0
        self.by_branch: dict[str | int, int] = {}

    @contextlib.contextmanager
    def next(self) -> Iterator[Carrier]:
        """Count a call and tell the carrier its step and branch; a call that fails is not counted."""
        name = _branch_name.get()
        branch: str | int = self.unnamed % self.scope.branches if name is None else name
        done = self.by_branch.get(branch, 0)
        if done >= self.scope.num_steps and self.carrier.used:
            raise ValueError(self._too_many(branch))
        self.by_branch[branch] = done + 1
        self.unnamed += name is None
        self.carrier.begin(min(done + 1, self.scope.num_steps), list(self.by_branch).index(branch))
        try:
            yield self.carrier
        except BaseException:
            self.by_branch[branch] = done
            if not done:
                del self.by_branch[branch]
            self.unnamed -= name is None
            raise

    def _too_many(self, branch: str | int) -> str:
        n, b = self.scope.num_steps, self.scope.branches
        what = f"branch {branch!r} of " if isinstance(branch, str) else ""
        calls = self.by_branch[branch] if isinstance(branch, str) else self.unnamed
        limit = n if isinstance(branch, str) else n * b
        return (
            f"{what}{self.label} is called {calls + 1} times, but generation(num_steps={n}, branches={b}) is over "
            f"after {limit} calls. Give branches=2 for classifier-free guidance as two calls per step, the right "
            "num_steps, and each generation a scope of its own (is one left open?)."
        )

    def problem(self) -> str | None:
        """What does not fit at the end of the generation."""
        if not self.carrier.used:
            return None
        n, b = self.scope.num_steps, self.scope.branches
        said = f"generation(num_steps={n}, branches={b})"
        if self.unnamed != n * b and any(isinstance(branch, int) for branch in self.by_branch):
            hint = ""
            if self.unnamed % b:
                hint = f" {self.unnamed} calls don't divide into {b} branches."
            elif self.unnamed == n:
                hint = " The calls fit branches=1."
            return (
                f"{self.label} was called {self.unnamed} times in {said}, which expects {n * b} calls.{hint} "
                "Give the number of model calls as num_steps times branches; masks were searched at the wrong steps."
            )
        for branch, done in self.by_branch.items():
            if isinstance(branch, str) and done != n:
                return (
                    f"branch {branch!r} of {self.label} was called {done} times in {said}, which expects {n} calls. "
                    f"Give num_steps={done}; masks were searched at the wrong steps."
                )
        return None


class Scope:
    """The calls within one open generation."""

    def __init__(self, num_steps: int, branches: int) -> None:
        self.num_steps = num_steps
        self.branches = branches
        self.calls: dict[Hashable, Calls] = {}
        self.lost = ""
        "the label of a model whose parameters went before it had all its calls"
        self._lock = threading.Lock()

    def calls_of(
        self, key: Hashable, make_carrier: Callable[[Scope], Carrier], anchors: tuple[Any, ...], label: str
    ) -> Calls:
        """The counter of a graph on a set of parameters; ``anchors`` are what ``key`` is made of the ids of."""
        with self._lock:
            found = self.calls.get(key)
            if found is None:
                found = self.calls[key] = Calls(self, make_carrier(self), label)
                # Their ids are the key. Held weakly: what offloading replaces has to go; and its state with it, before
                # another object gets the id.
                gone = functools.partial(_forget, weakref.ref(self), key)
                found.anchors = [weakref.ref(anchor, gone) for anchor in anchors]
            return found

    def check(self) -> None:
        """Raise ValueError for a model that was called too rarely."""
        if self.lost:
            raise ValueError(
                f"the parameters of {self.lost} were replaced within the generation, so that nothing tells its layers "
                "apart and no mask was carried over steps (sequential CPU offloading does this); use "
                "enable_model_cpu_offload(), or a policy without state."
            )
        if self._shared():
            return
        for calls in self.calls.values():
            problem = calls.problem()
            if problem:
                raise ValueError(problem)

    def _shared(self) -> bool:
        """Whether two models took turns over the steps, as the experts for high and low noise of Wan2.2 do."""
        used = [calls for calls in self.calls.values() if calls.carrier.used]
        counts = {sum(calls.by_branch.values()) for calls in used}
        names = {branch for calls in used for branch in calls.by_branch if isinstance(branch, str)}
        total = self.num_steps * (len(names) or self.branches)
        return len(used) > 1 and (sum(counts) == total or (len(counts) == 1 and 2 * counts.pop() == total))

    def close(self) -> None:
        """Free all state."""
        for calls in self.calls.values():
            if not calls.carrier.on_device:
                calls.carrier.clear()
        self.calls.clear()


def _forget(scope: weakref.ref[Scope], key: Hashable, _anchor: object) -> None:
    """Drop the state of parameters that are gone."""
    owner = scope()
    calls = None if owner is None else owner.calls.pop(key, None)
    if owner is not None and calls is not None and calls.problem():
        owner.lost = calls.label


class _BranchNames:
    """Listens to diffusers' ``cache_context`` while a generation is open anywhere in the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._undo: Callable[[], None] | None = None

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            if self._undo is None and "diffusers" in sys.modules:
                self._undo = _listen()

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._undo is not None:
                self._undo()
                self._undo = None


def _listen() -> Callable[[], None] | None:
    """Wrap ``CacheMixin.cache_context``; returns what takes the wrapper off again."""
    try:
        from diffusers.models.cache_utils import CacheMixin
    except ImportError:  # older or broken: then ``branches`` says what there is to say
        return None
    original = CacheMixin.__dict__.get("cache_context")
    if original is None:
        return None

    @contextlib.contextmanager
    def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        token = _branch_name.set(name)
        try:
            with original(self, name, *args, **kwargs) as value:
                yield value
        finally:
            _branch_name.reset(token)

    wrapper = functools.update_wrapper(cache_context, original)
    CacheMixin.cache_context = wrapper  # type: ignore[method-assign]

    def undo() -> None:
        # Somebody may have wrapped the wrapper meanwhile: then it stays, and does no harm.
        if CacheMixin.__dict__.get("cache_context") is wrapper:
            CacheMixin.cache_context = original  # type: ignore[method-assign]

    return undo


_names = _BranchNames()
