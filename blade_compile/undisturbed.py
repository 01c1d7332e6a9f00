"""Run a model as often as a report needs and leave everything as it was found."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_CONTAINERS = (dict, list, set, deque)


@contextlib.contextmanager
def undisturbed(model: nn.Module, *inputs: Any) -> Iterator[Callable[[], None]]:
    """Put back what running ``model`` on ``inputs`` changes: at exit, and whenever the yielded function is called.

    Put back are the random generators (torch on all devices, Python, numpy, generators among the inputs), buffers and
    input tensors that are written in place, and attributes of modules (counters, caches; containers one level deep).
    What a model keeps elsewhere, say in a global, is out of reach.
    """
    restore = [*_generators(inputs), _tensors(model, inputs)]
    if not any(nn.parameter.is_lazy(p) for p in model.parameters()):  # a lazy module's first run initialises it
        restore.append(_attributes(model))

    def rewind() -> None:
        for put_back in restore:
            put_back()

    try:
        yield rewind
    finally:
        rewind()


def _generators(inputs: tuple[Any, ...]) -> list[Callable[[], object]]:
    python, cpu = random.getstate(), torch.get_rng_state()
    restore: list[Callable[[], object]] = [lambda: random.setstate(python), lambda: torch.set_rng_state(cpu)]
    if torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
        restore.append(lambda: torch.cuda.set_rng_state_all(cuda))
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        state = numpy.get_state()
        restore.append(lambda: numpy.set_state(state))
    given = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Generator)]
    restore.extend(functools.partial(generator.set_state, generator.get_state()) for generator in given)
    return restore


def _tensors(model: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
    """Copies of the buffers and of the inputs, written back into those that changed."""
    tensors = {id(t): t for t in (*model.buffers(), *tree_leaves(inputs)) if isinstance(t, Tensor) and not t.is_meta}
    saved = [(t, _version(t), t.detach().clone()) for t in tensors.values()]

    def restore() -> None:
        for i, (tensor, version, copy) in enumerate(saved):
            if version is not None and tensor._version == version:
                continue
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(copy)
            saved[i] = (tensor, _version(tensor), copy)

    return restore


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written; inference tensors don't count."""
    return None if tensor.is_inference() else tensor._version


def _attributes(model: nn.Module) -> Callable[[], None]:
    modules = list(model.modules())
    saved = [(vars(m), _shallow(vars(m))) for m in modules]

    def restore() -> None:
        for attributes, (before, contents) in saved:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            for name, value in before.items():
                if attributes.get(name, restore) is not value:
                    attributes[name] = value
            for container, items in contents:
                if not _same(container, items):
                    _refill(container, items)

    return restore


def _shallow(attributes: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Any, list[Any]]]]:
    containers = [value for value in attributes.values() if type(value) in _CONTAINERS]
    return dict(attributes), [(c, list(c.items()) if isinstance(c, dict) else list(c)) for c in containers]


def _same(container: Any, items: list[Any]) -> bool:
    now = list(container.items()) if isinstance(container, dict) else list(container)
    if len(now) != len(items):
        return False
    if isinstance(container, dict):
        return all(a[0] == b[0] and a[1] is b[1] for a, b in zip(now, items, strict=True))
    return all(a is b for a, b in zip(now, items, strict=True))


def _refill(container: Any, items: list[Any]) -> None:
    container.clear()
    container.update(items) if isinstance(container, (dict, set)) else container.extend(items)
