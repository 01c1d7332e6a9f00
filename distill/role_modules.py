"""The modules of the three roles: one with two adapters, or three copies; and which of their parameters are trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from blade_compile.distill.adapters import Adapter
from blade_compile.distill.config import RunConfig
from blade_compile.distill.config_sections import LoraConfig
from blade_compile.distill.dry_run import lora_layers
from blade_compile.distill.schedules import wide
from blade_compile.distill.step_condition import TABLE, add_step_condition

Role = Literal["student", "critic", "teacher"]
TRAINED: tuple[Role, ...] = ("student", "critic")


def make_modules(config: RunConfig, model: nn.Module, adapter: Adapter) -> dict[Role, nn.Module]:
    """The module of each role, its trained parameters in fp32 and requiring gradients.

    Args:
        config: of the run.
        model: frozen; with LoRA it gets the adapters and plays all roles, without it becomes the teacher.
        adapter: of its family.

    Raises:
        ConfigError: no layer fits ``lora.targets``, or there is nothing to tell K to.
    """
    model.eval().requires_grad_(False)
    layers, choices = tuple(getattr(adapter, "time_layers", ())), config.method.step_choices
    if config.lora is not None:
        if choices:
            add_step_condition(model, layers, choices, TRAINED)
        _add_adapters(model, config.lora, adapter, config.seed)
        return {"student": model, "critic": model, "teacher": model}
    made: dict[Role, nn.Module] = {"teacher": model}
    for role in TRAINED:
        made[role] = copy.deepcopy(model)
        if choices:
            add_step_condition(made[role], layers, choices, [role])
        for parameter in made[role].parameters():
            parameter.data = wide(parameter.data)
            parameter.requires_grad_(parameter.is_floating_point())
    return made


def _add_adapters(model: nn.Module, lora: LoraConfig, adapter: Adapter, seed: int) -> None:
    """Adapters "student" and "critic", which change nothing yet, in fp32, the same on all ranks."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = list(lora.targets or adapter.lora_targets)
    lora_layers(model, targets)  # raises where there is none
    given: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": targets}
    settings = PeftConfig(**given)  # without dropout
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are meant
        torch.manual_seed(seed)
        for role in TRAINED:
            inject_adapter_in_model(settings, model, adapter_name=role)
    for name, parameter in model.named_parameters():
        if any(belongs(name, role, lora) for role in TRAINED):
            parameter.data = wide(parameter.data)
            parameter.requires_grad_(True)


def belongs(name: str, role: Role, lora: LoraConfig | None) -> bool:
    """Whether a trained parameter is this role's."""
    parts = name.split(".")
    return lora is None or (role in parts and any(p in parts for p in ("lora_A", "lora_B", TABLE)))


def sharded_parts(module: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """The blocks that are sharded by themselves: all but those that the module reads outside their own call."""
    held = {id(module.get_submodule(name)) for name in getattr(adapter, "held_by_root", ())}
    return [block for block in blocks_of(module, adapter) if id(block) not in held]


def keep_in_fp32(module: nn.Module, device: torch.device) -> list[nn.Module]:
    """Run the layers that diffusers keeps in fp32 (Wan's time embedding) without autocast, as the pipeline runs them.

    Of what ``_keep_in_fp32_modules`` names only modules with linear layers need it: norms are computed in fp32 under
    autocast as well. To be called after copies are made: a copy's forward function would be the original's.

    Returns:
        The modules.
    """
    names = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    found = [m for name, m in module.named_modules() if name.rpartition(".")[2] in names]
    kept = [m for m in found if any(isinstance(layer, nn.Linear) for layer in m.modules())]
    kept = [m for m in kept if all(p.dtype == torch.float32 for p in m.parameters())]
    for one in kept:
        one.forward = _without_autocast(one.forward, device.type)
    return kept


def _without_autocast(forward: Callable[..., Any], device: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return forward(*args, **kwargs)

    return run


def blocks_of(module: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """The members of the adapter's block lists that the module has."""
    lists: Sequence[Any] = [getattr(module, name, ()) for name in adapter.block_lists]
    return [block for blocks in lists for block in blocks]
