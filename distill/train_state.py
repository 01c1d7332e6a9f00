"""The models of a run and their optimizers: what a checkpoint holds and what is exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blade_compile.distill import checkpoints, preflight
from blade_compile.distill.adapters import load_model
from blade_compile.distill.config import RunConfig
from blade_compile.distill.export import export
from blade_compile.distill.grids import Grid
from blade_compile.distill.optimizers import Optimizer, learning_rate
from blade_compile.distill.ranks import Ranks
from blade_compile.distill.roles import TRAINED, Role, Roles


class TrainState:
    """Student, critic and teacher with the weights that the configuration names, and an optimizer for two of them."""

    def __init__(self, config: RunConfig, here: Ranks, *, train: bool = True) -> None:
        """Load the model. With several ranks all have to call this.

        Args:
            config: of the run.
            here: this process among the ranks.
            train: False: without optimizers, whose state is larger than the weights; enough for an export.

        Raises:
            ConfigError: it can't be loaded, or can't be trained as configured.
        """
        self.config = config
        model, self.adapter = load_model(config.model)
        preflight.load_weights(model, config.model.weights)
        self.roles = Roles(config, model, self.adapter, device=here.device, mesh=here.mesh)
        settings = {"student": config.optimizer.student, "critic": config.optimizer.critic}
        self.optimizers = {
            role: Optimizer(
                self.roles.parameters(role),
                settings[role],
                config.optimizer,
                config.loop.max_steps,
                replicated=self.roles.replicated,
            )
            for role in (TRAINED if train else ())
        }

    def rate(self, role: Role, step: int) -> float:
        """A role's learning rate at a step, counted from 0."""
        optimizer = self.optimizers[role]
        return learning_rate(optimizer.settings, step, optimizer.max_steps)

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name; the tensors themselves, to be written or to be filled."""
        tensors = self.roles.state()
        for role, optimizer in self.optimizers.items():
            tensors |= {f"{role}_optimizer.{name}": tensor for name, tensor in optimizer.state().items()}
        return tensors

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Go back to a checkpoint; returns its record. Raises as ``checkpoints.load`` does."""
        return checkpoints.load(checkpoint, self.tensors(), part=not self.optimizers)

    def all_finite(self) -> bool:
        """Whether every number of this rank is finite."""
        local = (t.to_local() if hasattr(t, "to_local") else t for t in self.tensors().values())
        return all(bool(torch.isfinite(tensor).all()) for tensor in local)

    def export(self, folder: Path, grids: Mapping[int, Grid], *, merge: bool = False) -> Path:
        """Write the student, or its average where there is one. With several ranks all have to call this.

        Args:
            folder: of the export; must not hold anything yet.
            grids: the steps for each K.
            merge: add adapters to the weights also where they could be exported by themselves. They are added in any
                case where their file couldn't hold all: biases of a student that is told K, base weights of a file.
        """
        config, adapter = self.config, self.adapter
        latent, method = config.latent, config.method
        family = preflight.family_of(adapter)
        return export(
            self.roles.module("student"),
            folder,
            family=family,
            grid=grids[method.steps],
            config=config.model_dump(mode="json"),
            scheduler_config=None if family is None else adapter.scheduler_config(latent),
            schedule=adapter.schedule(latent),
            adapter=self.roles.adapter_name("student"),
            replaced=self.roles.folded(method.steps),
            merge=merge or bool(method.step_choices) or config.model.weights is not None,
            token_grid=adapter.token_grid(latent),
            other_grids={k: grid for k, grid in grids.items() if k != method.steps},
            step_biases=self.roles.step_biases(),
            pipeline=None if family is None else adapter.pipeline.get("_class_name"),
        )
