"""How blocks are chosen: the interface of a policy, the registry, and the recipe for adding one.

A policy ranks blocks: from a `Request` it makes a map fp32 [B, H, nQ, nK] of values >= 0, larger for blocks that matter
more; NaN marks a block that is always kept. `selection.select` turns a map into block lists by the caller's budget
(``sparsity`` or ``tau``), which is the same for every policy. A policy never sees the budget.

**Adding a policy**

1. Write ``kernels/policy_<name>.py`` with a function ``block_map(request) -> Tensor``: paper and equation in the
   docstring, ATen operators only (then the CPU and a GPU agree), nothing of size S x T (`aten.CHUNK_ELEMENTS` bounds a
   strip), no use of the global random state, no wait for a device. It is called with one sample at a time, so that a
   sample's map is the same alone and in a batch; ``request.options`` holds a value for each of the policy's options.
2. Keys that ``request.bias`` hides must change nothing, not even where they hold NaN; a block of which no key is
   visible gets 0. Let NaN of visible tokens through. `block_pooling` has the usual means and the softmax for this.
3. A policy that ranks by position sets ``needs_grid=True`` and asks `block_grid` where the blocks lie.
4. End the file with ``register(MapPolicy("<name>", block_map, defaults={...}, options={...}))``: ``defaults`` are the
   ``BladeConfig`` fields that it changes, ``options`` its own settings with their defaults. Import the file at the end
   of this one.
5. Test it in ``tests/kernels/test_policies.py`` against a plain reference that is written differently (loops).

A program can add its own in the same way: `register` is all that is needed.

Shapes: B batch, H query heads, Hkv key heads, S query tokens, T key tokens, D head dim, nQ = ceil(S / block),
nK = ceil(T / block).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """What a policy ranks the blocks of."""

    q: Tensor
    "[B, H, S, D]"
    k: Tensor
    "[B, Hkv, T, D]"
    bias: Tensor | None
    "added to the scores, fp32 (fp64 for fp64) [B|1, H|1, T]; minus infinity hides a key"
    scale: float
    block_size: int
    probe_tokens: int
    seed: int
    grid: tuple[int, int, int] | None
    "(T, H, W) of the tokens that are not protected, in raster order"
    order: str
    "the order that the tokens are in: ``none`` (raster), ``gilbert``, ``tile``"
    protect: tuple[tuple[int, int], ...]
    "ascending (start, length) key ranges that are not on the grid"
    options: Mapping[str, Any] = field(default_factory=dict)
    "the policy's own options"

    @property
    def compute(self) -> torch.dtype:
        """The dtype of scores: fp32, fp64 for fp64 inputs."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def sample(self, b: int) -> Request:
        """The request of one sample."""
        bias = self.bias if self.bias is None or self.bias.shape[0] == 1 else self.bias[b : b + 1]
        return dataclasses.replace(self, q=self.q[b : b + 1], k=self.k[b : b + 1], bias=bias)


class Policy(Protocol):
    """One way to rank blocks."""

    @property
    def name(self) -> str:
        """What ``BladeConfig.policy`` calls it."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The ``BladeConfig`` fields that it changes: ``sparsity``, ``tau``, ``block_size``."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Its own options and their defaults."""

    @property
    def needs_grid(self) -> bool:
        """Whether it can't rank without the token grid."""

    def block_map(self, request: Request) -> Tensor:
        """Scores of the blocks, fp32 [B, H, nQ, nK], values >= 0; NaN: always kept."""


@dataclass(frozen=True)
class MapPolicy:
    """A policy that is a function from one sample's request to its map."""

    name: str
    rank: Callable[[Request], Tensor]
    "the map [1, H, nQ, nK] of one sample, any float dtype; the heads may be an expanded dimension"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_grid: bool = False

    def block_map(self, request: Request) -> Tensor:
        """Scores of the blocks, fp32 [B, H, nQ, nK], values >= 0; NaN: always kept.

        Raises:
            ValueError: an option that the policy doesn't have, or no grid where it needs one.
        """
        for name in request.options:
            if name not in self.options:
                close = difflib.get_close_matches(name, self.options) or list(self.options) or ["none at all"]
                raise ValueError(f"policy {self.name!r} has no option {name!r}; valid: {', '.join(map(str, close))}.")
        if self.needs_grid and request.grid is None:
            raise ValueError(f"policy {self.name!r} ranks blocks by their place and found no token grid; set grid.")
        request = dataclasses.replace(request, options={**self.options, **request.options})
        maps = [self.rank(request.sample(b)).float() for b in range(request.q.shape[0])]
        if maps:
            return maps[0] if len(maps) == 1 else torch.cat(maps)
        H, nQ, nK = request.q.shape[1], *(-(-x.shape[2] // request.block_size) for x in (request.q, request.k))
        return request.q.new_empty(0, H, nQ, nK, dtype=torch.float32)


POLICIES: dict[str, Policy] = {}


def register(policy: Policy) -> None:
    """Make a policy available under its name: ``BladeConfig(policy=name)``. Usually a `MapPolicy`.

    Raises:
        ValueError: the name is taken.
    """
    if policy.name in POLICIES or policy.name == "dense":
        raise ValueError(f"a policy named {policy.name!r} exists; give yours another name.")
    POLICIES[policy.name] = policy


def names() -> tuple[str, ...]:
    """Valid values of ``BladeConfig.policy``."""
    first = ("asa", "asa_g", "adaspa", "dense")
    return (*first, *(name for name in POLICIES if name not in first))


def get(name: str) -> Policy:
    """The policy of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is unknown; valid are {', '.join(map(repr, POLICIES))}.")
    return POLICIES[name]


def global_window(text: str) -> int:
    """Tokens in a pooling window of ``asa_g``, from an operator's options."""
    return int(options_of(text).get("global_window", get("asa_g").options["global_window"]))


def defaults(name: str) -> Mapping[str, Any]:
    """The ``BladeConfig`` fields that a policy changes."""
    return POLICIES[name].defaults if name in POLICIES else {}


def options(name: str) -> tuple[str, ...]:
    """The names of a policy's own options."""
    return tuple(POLICIES[name].options) if name in POLICIES else ()


def needs_grid(name: str) -> bool:
    """Whether a policy can't rank without the token grid."""
    return name in POLICIES and POLICIES[name].needs_grid


@functools.lru_cache(256)
def options_of(text: str) -> Mapping[str, Any]:
    """The options in an operator's argument, which is JSON."""
    return json.loads(text) if text else {}  # type: ignore[no-any-return]


# Each file registers its policy. Imported last: they need what stands above.
from . import (  # noqa: E402
    policy_adaspa,  # noqa: F401
    policy_asa,  # noqa: F401
    policy_radial,  # noqa: F401
    policy_sparge,  # noqa: F401
    policy_sta,  # noqa: F401
    policy_vsa,  # noqa: F401
    policy_xattention,  # noqa: F401
)
