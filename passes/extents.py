"""Token counts that may be symbolic: arithmetic, equality and order without ever adding a guard.

Comparing two ``SymInt`` values in the usual way records a guard, that is, it changes when the user's program
recompiles. An analysis must not do that, so equality is decided on the sympy expressions (equal for *all* sizes) and
order on the size hints (the sizes of the call being compiled).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, Union

import sympy
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

Count: TypeAlias = Union[int, torch.SymInt]  # noqa: UP007 (evaluated when imported)

# Stand-ins for sizes that have no hint (data-dependent ones): distinct primes, so that shapes still factor uniquely.
_PRIMES = (8191, 7919, 6151, 5003, 4001, 3001, 2003, 1009)


def expression(value: Count) -> Any:
    """The expanded sympy expression of a count, or a plain int when it is constant."""
    if isinstance(value, int):
        return value
    expr = sympy.expand(value.node.expr)
    return int(expr) if expr.is_number else expr


def hint(value: Count) -> int:
    """The count in the call being compiled; a made-up prime per symbol where no size is known yet."""
    if isinstance(value, int):
        return value
    try:
        known = value.node.hint
        if known is not None:
            return int(known)
    except Exception:  # noqa: BLE001, S110 (data-dependent sizes refuse a hint, each version in its own way)
        pass
    symbols = sorted(value.node.expr.free_symbols, key=str)
    sizes = {s: _PRIMES[i % len(_PRIMES)] for i, s in enumerate(symbols)}
    return int(value.node.expr.xreplace(sizes))


def hints(shape: Iterable[Count]) -> tuple[int, ...]:
    """The shape in the call being compiled."""
    return tuple(hint(size) for size in shape)


class Extent:
    """An immutable token count: hashable, equal when the expressions are equal, ordered by hint."""

    __slots__ = ("hint", "key", "value")

    def __init__(self, value: Count) -> None:
        self.key = expression(value)
        self.value: Count = self.key if isinstance(self.key, int) else value
        self.hint = hint(self.value)

    def __add__(self, other: Extent) -> Extent:
        if other.key == 0:
            return self
        return other if self.key == 0 else Extent(self.value + other.value)

    def __sub__(self, other: Extent) -> Extent:
        return self if other.key == 0 else Extent(self.value - other.value)

    def times(self, factor: int) -> Extent:
        """The product with a plain int."""
        return self if factor == 1 else Extent(self.value * factor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extent) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Extent({self.key})"


ZERO = Extent(0)
