"""What a zoo entry is, and how its random weights and inputs are made.

A zoo model is a real class with a tiny configuration and random weights. Three things make it a useful test of an
attention rewrite, and none of them holds for a freshly constructed model:

* the weights depend on nothing but the parameter's name, so that two processes build the same model;
* no layer is zero at the start (adaLN-zero gates, zero output projections), so that attention reaches the output;
* queries and keys are scaled up, so that attention isn't near-uniform and dropping a block is visible.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# Last component of the path of a linear map that yields queries, keys, or all of q, k and v at once.
_QUERY_KEY = re.compile(
    r"(to|add|linear)_(added_)?[qk](_proj)?|[qk](_proj|_img|_add|_lin)?|w[qk]|query|key"
    r"|(to_)?(added_)?qkv(_proj)?|to_kv"
)


def _makes_queries_or_keys(module_name: str) -> bool:
    """Whether a module of this name is a query, key or packed projection, or a norm of queries or keys."""
    words = set(module_name.split("_"))
    normed = any("norm" in word for word in words) and bool(words & {"q", "k", "query", "key"})
    return normed or _QUERY_KEY.fullmatch(module_name) is not None


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Args:
        name: unique name; for diffusers the class name, and for a second configuration of a class ``Class:variant``.
        build: makes the model in fp32, eval mode, with prepared weights. Deterministic.
        inputs: maps a seed to ``(args, kwargs)``; fp32 and integer CPU tensors.
        family: the file it comes from, a heading of the conformance table.
        fullgraph: whether plain Inductor compiles it with ``fullgraph=True``.
        breaks: judged with graph breaks although it compiles whole; ``notes`` say why.
        warm: one eager forward is needed before ``fullgraph`` compiles (a table made at the first call).
        backward: whether the conformance run compares parameter gradients too.
        not_self: calls with as many keys as queries that are nevertheless not plain self-attention over tokens.
        long_keys: calls whose queries are a prefix or suffix of longer keys: self-attention all the same.
        codes: the report's code of each site, where it is known beforehand; None: judged by the eager calls.
        notes: what is particular about it, for the table.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    family: str
    fullgraph: bool = True
    breaks: bool = False
    warm: bool = False
    backward: bool = False
    not_self: int = 0
    long_keys: int = 0
    codes: tuple[str, ...] | None = None
    notes: str = ""


@dataclass
class Draw:
    """Seeded source of a model's inputs. `normal` is N(0, 1); every shape is given in full."""

    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator)


def key_lengths(tokens: int, *lengths: int) -> torch.Tensor:
    """Padding mask int64 [len(lengths), tokens], 1 for the first `lengths[b]` tokens of sample b."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def rotary(draw: Draw, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) tables [tokens, dim] whose two halves of each pair agree, as rotary embeddings expect."""
    angle = (6.28 * draw.uniform(tokens, dim // 2)).repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


def grid_ids(frames: int, height: int, width: int, axes: int = 3) -> torch.Tensor:
    """Position ids fp32 [frames * height * width, axes]: frame, row, column, zeros."""
    ids = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))
    return torch.nn.functional.pad(ids, (0, axes - 3)).float()


def prepare_weights(model: nn.Module, gain: float = 1.7) -> nn.Module:
    """Gives `model` its weights: random from each parameter's name, queries and keys scaled by `gain`; eval mode.

    With unit-variance inputs the attention scores get a standard deviation of about ``gain ** 2``.
    """
    owners = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            path, _, leaf = name.rpartition(".")
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            value = _initial(noise, owners[path], leaf)
            if _makes_queries_or_keys(path.rpartition(".")[2]):
                value = value * gain
            parameter.copy_(value)
    return model.eval()


def _initial(noise: torch.Tensor, owner: nn.Module, leaf: str) -> torch.Tensor:
    """A parameter's value from unit noise: variance-preserving matrices, norm weights near one, nothing zero."""
    if noise.ndim >= 2:
        if isinstance(owner, nn.Embedding):
            return noise
        if leaf == "weight" or leaf.endswith("_weight"):
            # Transposed convolutions store the input channels first; for these sizes the difference is harmless.
            return noise / (noise[0].numel() ** 0.5)
        return 0.3 * noise
    return 0.1 * noise if "bias" in leaf else 1 + 0.1 * noise


def align_keys(model: nn.Module, share: float = 0.85) -> None:
    """Makes each key projection resemble its query projection.

    For models whose queries and keys pass a norm without weights, where scaling the projections changes nothing:
    aligned projections give each token a large score with itself and its likes.
    """
    for module in model.modules():
        for query, key in (("to_q", "to_k"), ("add_q_proj", "add_k_proj")):
            query_map, key_map = getattr(module, query, None), getattr(module, key, None)
            if isinstance(query_map, nn.Linear) and isinstance(key_map, nn.Linear):
                key_map.weight.mul_((1 - share**2) ** 0.5).add_(query_map.weight, alpha=share)


def diffusers_entry(
    name: str,
    family: str,
    config: dict[str, Any],
    inputs: Callable[[Draw], dict[str, Any]],
    *,
    gain: float = 1.7,
    return_dict: bool = True,
    finish: Callable[[nn.Module], None] | None = None,
    **facts: Any,
) -> Entry:
    """An `Entry` for the class `name` of diffusers, built as ``cls(**config)`` and called with keywords only.

    `return_dict=False` in the entry means that forward has no such keyword; `finish` changes the prepared model.
    """

    def build() -> nn.Module:
        import diffusers

        model = prepare_weights(getattr(diffusers, name.partition(":")[0])(**config), gain)
        if finish is not None:
            with torch.no_grad():
                finish(model)
        return model

    def make(seed: int) -> Inputs:
        keywords = inputs(Draw(seed))
        return (), {**keywords, "return_dict": False} if return_dict else keywords

    return Entry(name=name, build=build, inputs=make, family=family, **facts)
