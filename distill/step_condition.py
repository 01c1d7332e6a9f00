"""A student that is told K: a learned bias for each number of steps on the last linear layer of the time embedding.

Every such layer gets a table ``[number of choices, out]`` for each role, which starts at zero, so that the model starts
unchanged, and is picked by K. For one K a table is a bias, so it is exported inside the layer's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blade_compile.distill.errors import ConfigError
from blade_compile.distill.sharding import whole

TABLE = "step_bias"


class StepLinear(nn.Linear):
    """A linear layer whose output depends on the number of steps; it keeps the weights of the one that it replaces.

    The tables are no part of the state dict: that stays the plain model's.
    """

    rows: Tensor

    def __init__(self, linear: nn.Linear, choices: Sequence[int], roles: Sequence[str]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        size = (len(choices), linear.out_features)
        setattr(self, TABLE, nn.ParameterDict({r: nn.Parameter(torch.zeros(size, device=device)) for r in roles}))
        self.choices = tuple(choices)
        self.register_buffer("rows", torch.arange(len(choices), device=device), persistent=False)
        self.role: str | None = None
        self.row: Tensor | None = None
        self.register_state_dict_post_hook(_without_tables)

    def tell(self, role: str | None, steps: int | None) -> None:
        """Use a role's bias for so many steps from now on; None: no bias, the plain layer."""
        self.role = role if steps is not None else None
        self.row = None if self.role is None or steps is None else self.rows[self.choices.index(steps)]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        out = F.linear(x, self.weight, self.bias)
        if self.role is None or self.row is None:
            return out
        # The row is a tensor, so that another K is no other graph.
        return out + F.embedding(self.row, getattr(self, TABLE)[self.role]).to(out.dtype)


def _without_tables(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [n for n in state if n.startswith(f"{prefix}{TABLE}.")]:
        del state[name]


def add_step_condition(
    model: nn.Module, layers: Sequence[str], choices: Sequence[int], roles: Sequence[str]
) -> list[str]:
    """Replace the time embedding's last linear layers, in place.

    Args:
        model: before adapters are put into it.
        layers: ends of their names (``Adapter.time_layers``).
        choices: every K.
        roles: that get tables of their own.

    Returns:
        The layers' names.

    Raises:
        ConfigError: the model has no such layer, or one without a bias.
    """
    found = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and any(name == end or name.endswith(f".{end}") for end in layers)
    }
    if not found:
        raise ConfigError(
            f"method.step_choices is {list(choices)}, but the model has no time embedding to tell K to (looked for "
            f"{', '.join(layers) or 'none: the adapter has no time_layers'}); set it to [] or add the adapter's "
            "time_layers"
        )
    for name, linear in found.items():
        if linear.bias is None:
            raise ConfigError(f"method.step_choices: {name} has no bias that K could change; set it to []")
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, StepLinear(linear, choices, roles))
    return list(found)


def step_layers(model: nn.Module) -> Iterator[tuple[str, StepLinear]]:
    """The layers that ``add_step_condition`` has put in, by name."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, StepLinear))


def step_biases(model: nn.Module, role: str, values: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The biases that a role's layers have for each K, whole tables and the layers' own added up.

    Args:
        model: with step layers.
        role: whose tables.
        values: the role's trained tensors, whole (not sharded), by name; a layer's own bias may be among them.

    Returns:
        For each K, tensors by the name of the layer's bias, in the dtype of that bias.
    """
    biases: dict[int, dict[str, Tensor]] = {}
    for name, layer in step_layers(model):
        own = values.get(f"{name}.bias")
        bias = whole(layer.bias) if own is None else own
        table = values[f"{name}.{TABLE}.{role}"]
        for row, k in enumerate(layer.choices):
            biases.setdefault(k, {})[f"{name}.bias"] = (bias.to(table.dtype) + table[row]).to(layer.bias.dtype)
    return biases
