"""Student, critic and teacher: one set of weights with two adapters, or three copies, each run through torch.compile.

=======  ==============================  ======================  ==============================================
role     weights                         compiled by             trained
=======  ==============================  ======================  ==============================================
student  base and adapter "student"      blade, sparse           the adapter (without LoRA: all its weights)
critic   base and adapter "critic"       Inductor, or blade      the adapter (without LoRA: all its weights)
teacher  base                            Inductor, or blade      nothing
=======  ==============================  ======================  ==============================================

Blocks are compiled one by one, so that layers share a graph. What is trained is kept in fp32;
``parallel.mixed_precision`` is the precision of forward and backward passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from blade_compile.config import BladeConfig
from blade_compile.diagnosis import explain
from blade_compile.distill.adapters import Adapter
from blade_compile.distill.config import RunConfig
from blade_compile.distill.errors import ConfigError
from blade_compile.distill.preflight import check_precision, tells_layers_apart
from blade_compile.distill.role_blocks import Part, Stage, Tally
from blade_compile.distill.role_modules import (
    TRAINED,
    Role,
    belongs,
    blocks_of,
    keep_in_fp32,
    make_modules,
    sharded_parts,
)
from blade_compile.distill.schedules import wide
from blade_compile.distill.sharding import shard, whole
from blade_compile.distill.step_condition import TABLE, step_biases


class Roles:
    """The three models of a run. Without LoRA each is a module of its own, else all are the one that is given."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        adapter: Adapter,
        *,
        device: torch.device,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """Put adapters or copies in place, compile, and shard.

        Args:
            config: of the run.
            model: from ``load_model``, frozen and in eval mode; it is changed and becomes the teacher.
            adapter: of its family.
            device: where it runs.
            mesh: one-dimensional, of all ranks; with ``parallel.fsdp`` weights are sharded over it. None: one rank.

        Raises:
            ConfigError: float16 is asked for, no layer fits ``lora.targets``, there is nothing to tell K to, or the
                options of the backend tell layers apart where blocks have to run one by one.
        """
        check_precision(config)
        self.config, self.adapter, self.device = config, adapter, device
        sharded = mesh is not None and mesh.size() > 1 and config.parallel.fsdp
        self._modules = make_modules(config, model, adapter)
        self._compute = getattr(torch, config.parallel.mixed_precision)
        self._inputs = {role: self._input_dtype(module, sharded) for role, module in self._modules.items()}
        self._stages: dict[int, Stage] = {}
        for module in self._distinct():
            blocks = blocks_of(module, adapter)
            recompute = config.parallel.activation_checkpointing and bool(blocks)
            kept = keep_in_fp32(module, device) if self._compute != torch.float32 else []
            units = blocks if blocks and not tells_layers_apart(config, sharded or recompute) else [module]
            self._stages[id(module)] = Stage(module, units, recompute=recompute)
            if sharded and mesh is not None:
                trained = any(p.requires_grad for p in module.parameters())
                gathered = self._compute if trained and config.lora is None else None
                shard(module, sharded_parts(module, adapter), mesh, gathered, kept)
            else:
                module.to(device)
        self.replicated = mesh is not None and mesh.size() > 1 and not sharded
        "whether each rank has a copy, whose gradients have to be averaged"
        self.average: dict[str, Tensor] | None = None
        if config.ema.decay is not None:
            self.average = {name: p.detach().clone() for name, p in self.parameters("student").items()}
        self._parts = {role: self._part(role, 0) for role in self._modules}
        self._options = self._blade_options(0)
        self._measured: Tally | None = None
        self._measure = True

    # --- what runs ----------------------------------------------------------------------------------------------------

    def student(self, x: Tensor, time: Tensor, condition: Mapping[str, Any], *, steps: int) -> Tensor:
        """The student's prediction, sparse; with gradients where they are enabled.

        Args:
            x: noisy latents ``[B, ...]``.
            time: of the scheduler, ``[B]``.
            condition: from ``adapter.conditions``.
            steps: K, which the student is told where there are several.

        Returns:
            What ``adapter.prediction`` says, fp32, in the shape of ``x``.

        Raises:
            ConfigError: no attention call of the model runs block-sparse, though that is asked for.
        """
        measuring = self._measure
        stage = self._stage("student")
        stage.tally = Tally() if measuring else None
        try:
            out = self._call("student", x, time, condition, steps)
        finally:
            tally, stage.tally = stage.tally, None
        if measuring:
            self._measured, self._measure = tally, False
            if tally is not None and not tally.densities and self._wants_sparse():
                self._refuse(x, time, condition)
        return out

    def critic(self, x: Tensor, time: Tensor, condition: Mapping[str, Any], *, steps: int) -> Tensor:
        """The critic's prediction, as ``student``; dense, or sparse with ``sparsity.critic_sparse``."""
        return self._call("critic", x, time, condition, steps)

    @torch.no_grad()
    def teacher(self, x: Tensor, time: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """The teacher's prediction, without gradients; dense, or sparse with ``sparsity.teacher_sparse``."""
        return self._call("teacher", x, time, condition, None)

    def set_step(self, step: int) -> None:
        """Say which training step begins: ``sparsity.schedule`` may change the options, which compiles anew."""
        self._measure = True
        options = self._blade_options(step)
        if options == self._options:
            return
        self._options = options
        for role in self._modules:
            if self._sparse(role):
                self._parts[role] = self._part(role, step)

    def _call(self, role: Role, x: Tensor, time: Tensor, condition: Mapping[str, Any], steps: int | None) -> Tensor:
        told = steps if self.config.method.step_choices and role != "teacher" else None
        stage = self._stage(role)
        stage.play(replace(self._parts[role], steps=told))
        with self._autocast():
            return wide(self._predict(role, x, time, condition))

    def _predict(self, role: Role, x: Tensor, time: Tensor, condition: Mapping[str, Any]) -> Tensor:
        dtype = self._inputs[role]
        given = {name: _cast(value, dtype) for name, value in condition.items()}
        guidance = self.config.method.embedded_guidance
        return self.adapter.call(self._modules[role], x.to(dtype), time, given, guidance)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._compute == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._compute)

    def _input_dtype(self, module: nn.Module, sharded: bool) -> torch.dtype:
        """Of latents and text: that of the weights as the forward pass sees them."""
        largest = max(module.parameters(), key=Tensor.numel)
        gathered = sharded and self.config.lora is None and largest.requires_grad
        return self._compute if gathered else largest.dtype

    # --- compiling ----------------------------------------------------------------------------------------------------

    def _blade_options(self, step: int | None) -> dict[str, Any]:
        return self.config.sparsity.options(grid=self.adapter.token_grid(self.config.latent), step=step)

    def _sparse(self, role: Role) -> bool:
        sparsity = self.config.sparsity
        return {"student": True, "critic": sparsity.critic_sparse, "teacher": sparsity.teacher_sparse}[role]

    def _part(self, role: Role, step: int) -> Part:
        how: dict[str, Any] = {}
        if self._sparse(role):
            # A sparse teacher is distilled as it is, whatever the student has come to.
            how = {"backend": "blade", "options": self._blade_options(None if role == "teacher" else step)}
        adapter = role if self.config.lora is not None and role != "teacher" else None
        return Part(role, self._stage(role).compile(role, **how), adapter)

    def _stage(self, role: Role) -> Stage:
        return self._stages[id(self._modules[role])]

    def _distinct(self) -> list[nn.Module]:
        return list({id(m): m for m in self._modules.values()}.values())

    # --- sparsity -----------------------------------------------------------------------------------------------------

    def sparsity(self) -> dict[str, Any]:
        """Of the student's first call in this step, on this rank.

        Returns:
            ``sites``: attention calls that ran through the block-sparse operator; ``sparsity``: share of the key
            blocks that they dropped, None before the first call; ``asked``: what the options ask for, None for tau.
        """
        tally = self._measured
        asked = self._options.get("sparsity")
        if tally is None:
            return {"sites": 0, "sparsity": None, "asked": asked}
        return {"sites": len(tally.densities), "sparsity": tally.sparsity, "asked": asked}

    def _wants_sparse(self) -> bool:
        config = BladeConfig.of(self._options)
        return config.when != "never" and config.policy != "dense" and config.budget != 0

    def _refuse(self, x: Tensor, time: Tensor, condition: Mapping[str, Any]) -> None:
        """Raise, with the backend's reasons."""
        stage = self._stage("student")
        stage.plain()
        seen: list[tuple[Any, Any]] = []
        hook = stage.module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad(), self._autocast():
            self._predict("student", x, time, condition)
            hook.remove()
            args, kwargs = seen[0]
            report = explain(stage.module, *args, blade_options=self._options, **kwargs)
        reasons = list(dict.fromkeys(f"{site.path}: {site.reason}" for site in report if not site.rewritten))[:4]
        said = "; ".join([report.headline, *reasons, *report.notes[:2]])
        raise ConfigError(
            f"sparsity: no attention call of the student runs block-sparse ({said}); change sparsity's options, or "
            "set sparsity.when=never to train a dense student"
        )

    # --- what is trained ----------------------------------------------------------------------------------------------

    def module(self, role: Role) -> nn.Module:
        """The role's module: for LoRA the shared one, with the adapters ``student`` and ``critic``."""
        return self._modules[role]

    def adapter_name(self, role: Role) -> str | None:
        """The name of the role's adapter in its module, for ``export``; None without LoRA."""
        return role if self.config.lora is not None and role != "teacher" else None

    def parameters(self, role: Role) -> dict[str, nn.Parameter]:
        """What is trained of a role, fp32, by the names in the plain module, the same on all ranks and in all runs."""
        if role == "teacher":
            return {}
        named = self._modules[role].named_parameters()
        return {name: p for name, p in named if p.requires_grad and belongs(name, role, self.config.lora)}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the roles: ``student.<name>``, ``critic.<name>`` and ``average.<name>``."""
        tensors = {f"{role}.{name}": p.detach() for role in TRAINED for name, p in self.parameters(role).items()}
        return tensors | {f"average.{name}": t for name, t in (self.average or {}).items()}

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Follow the student after its update in this step (counted from 0); does nothing without ``ema.decay``.

        The decay of the n-th step that counts is at most n / (n + 5), so that the start is soon forgotten.
        """
        ema = self.config.ema
        if self.average is None or ema.decay is None:
            return
        count = step - ema.start_step + 1
        decay = min(ema.decay, count / (count + 5)) if count > 0 else 0.0
        for name, parameter in self.parameters("student").items():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The student has the averaged weights inside, and its own again after; without an average nothing changes."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters("student").items() if self.average is not None else ():
            assert self.average is not None
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)

    def folded(self, steps: int) -> dict[str, Tensor]:
        """What ``export.export`` takes as ``replaced=``: the student's tensors, averaged where there is an average.

        For a student that is told K, the bias of ``steps`` is added to its layer's own, so that stock diffusers loads
        it as the student for that K; ``step_biases`` has the others. An export as a LoRA file holds no biases: with
        ``method.step_choices`` give ``merge=True``. With sharded weights all ranks have to call this.
        """
        tensors = self._final()
        own = {name: t for name, t in tensors.items() if f".{TABLE}." not in name}
        biases = step_biases(self.module("student"), "student", tensors) if self._told() else {}
        return own | biases.get(steps, {})

    def step_biases(self) -> dict[str, Tensor]:
        """For every K of a student that is told K, the biases to put into the exported model for that K.

        Returns:
            ``<K>.<name of the bias>``, as ``step_biases.safetensors`` holds it beside an export; empty for one K.
        """
        if not self._told():
            return {}
        found = step_biases(self.module("student"), "student", self._final())
        return {f"{k}.{name}": bias for k, biases in found.items() for name, bias in biases.items()}

    def _told(self) -> bool:
        return bool(self.config.method.step_choices)

    def _final(self) -> dict[str, Tensor]:
        tensors: Mapping[str, Tensor] = self.parameters("student") if self.average is None else self.average
        return {name: whole(t) for name, t in tensors.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
