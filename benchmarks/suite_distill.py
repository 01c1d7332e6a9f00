"""Suite ``distill``: one step of the trainer, from the roll-out to both updates, with a dense and a sparse student.

A Wan transformer with LoRA for student and critic, as `blade-distill` trains it: the student's K steps, one update of
the critic and one of the student against the guided teacher. Only the student is sparse. The learning rate is next to
0, so that every step starts from the same weights and the arms can be compared; the optimizers run all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import sdpa
from benchmarks.demo import default_dtype
from benchmarks.models import MODELS, Model
from benchmarks.registry import Arm, Case, Plan, suite
from benchmarks.suite_models import (
    BASELINE,
    DENSE_WITNESS,
    EVERY_BLOCK,
    StepGate,
    about,
    best_sdpa,
    sparse_arm,
    witness,
    witness_of,
)
from blade_compile.distill.adapters import Adapter
from blade_compile.distill.config import RunConfig, resolve

MODEL, K, CFG_SCALE, SPARSITY = "wan2.1-1.3b", 4, 5.0, 0.8
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
STILL = 1e-30  # a learning rate that no weight in fp32 notices
SPARSE = f"compiled sparse student, sparsity {SPARSITY}"


@suite("distill")
def cases(plan: Plan) -> Iterator[Case]:
    """One training step: eager dense, compiled dense, compiled with a sparse student."""
    yield training_case(MODELS[MODEL], plan)


def training_case(model: Model, plan: Plan) -> Case:
    """Compiled dense first: it is the baseline."""
    columns = about(model, plan) | {"steps": K, "cfg_scale": CFG_SCALE}
    return Case(f"{model.name}, one training step, K = {K}", lambda: _arms(model, plan), columns)


def _arms(model: Model, plan: Plan) -> list[Arm]:
    dtype = default_dtype(plan.device.type)
    proofs = witnesses(model, plan)
    # The gradients of a step in fp32, relative to their size; K steps and two backward passes add up.
    gate = StepGate(eagerly(TrainingStep(model, plan, torch.float32, "never"))(), rounding=2000)
    dense, every = TrainingStep(model, plan, dtype, "never"), TrainingStep(model, plan, dtype, "always", 0.0)
    sparse = TrainingStep(model, plan, dtype, "always", SPARSITY)
    about = {"sdpa": dense.best}
    return [
        Arm(BASELINE, dense, gate.baseline, about=about, certified_by=DENSE_WITNESS),
        Arm("eager dense", eagerly(TrainingStep(model, plan, dtype, "never")), gate.as_near, about=about),
        Arm(EVERY_BLOCK, every, gate.as_near, certified_by=witness_of(SPARSE), timed=False),
        sparse_arm(SPARSE, sparse, gate.distance, {"sparsity": SPARSITY}, EVERY_BLOCK),
        *proofs,
    ]


def witnesses(model: Model, plan: Plan) -> list[Arm]:
    """Arms that are only checked: steps in fp32 of a shallow transformer, see `suite_models.witnesses`."""
    step = lambda when, sparsity: TrainingStep(model.shallow(), plan, torch.float32, when, sparsity)  # noqa: E731
    gate = StepGate(eagerly(step("never", SPARSITY))(), rounding=2000)
    arms = [
        witness(DENSE_WITNESS, step("never", SPARSITY), gate.baseline),
        witness(witness_of(SPARSE), step("always", 0.0), gate.as_near, blade=True),
    ]
    torch._dynamo.reset()
    return arms


def eagerly(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same without any compiler."""

    def run() -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return call()

    return run


class TrainingStep:
    """Roll-out, critic's update and student's update on fixed random numbers; returns the student's gradients, flat."""

    def __init__(self, model: Model, plan: Plan, dtype: torch.dtype, when: str, sparsity: float = SPARSITY) -> None:
        """Build the roles. ``when``: "never" trains a dense student."""
        from blade_compile.distill.matching import Matching
        from blade_compile.distill.optimizers import Optimizer
        from blade_compile.distill.roles import TRAINED, Roles

        self.plan, self.text, self.best = plan, model.size(plan.device).text, best_sdpa(model, plan)
        self.config = run_config(model, plan, dtype, when, sparsity)
        native = default_dtype(plan.device.type)
        module = model.build(model.size(plan.device), native, plan.device, plan.seed)
        module = module if dtype == native else module.to(dtype)
        self.adapter = adapter_of(module)
        self.roles = Roles(self.config, module, self.adapter, device=plan.device)
        self._wake_adapters()
        latent = self.config.latent
        grid = self.adapter.grid(latent, K)
        self.matching = Matching(self.roles, self.adapter.schedule(latent), grid, self.config.method)
        settings = {"student": self.config.optimizer.student, "critic": self.config.optimizer.critic}
        self.optimizers = {
            role: Optimizer(self.roles.parameters(role), settings[role], self.config.optimizer, 1) for role in TRAINED
        }
        self.conditions = [self._condition(row) for row in range(2)]

    def _wake_adapters(self) -> None:
        """LoRA starts at zero, where half of its gradients vanish; the arms are compared somewhere else."""
        generator = torch.Generator().manual_seed(self.plan.seed)
        with torch.no_grad():
            for role in ("student", "critic"):
                for name, parameter in sorted(self.roles.parameters(role).items()):
                    if "lora_B" in name:
                        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))

    def _condition(self, row: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.plan.seed + row)
        embeds = torch.randn(1, self.text, 4096, generator=generator).to(self.plan.device)
        return self.adapter.conditions({"prompt_embeds": embeds}, self.config.latent)

    def __call__(self) -> Tensor:
        with sdpa.preferring(self.best)():
            return self._run()

    def _run(self) -> Tensor:
        from blade_compile.distill.matching import Draws

        draws = Draws(self.plan.seed, 0, [0], self.plan.device)
        start = draws.normal(self.adapter.latent_shape(self.config.latent, 1)[1:], "start")
        with_text, without = self.conditions
        rolled = self.matching.roll_out(start, with_text, draws)
        self.matching.critic_loss(rolled, with_text, draws).backward()
        self.optimizers["critic"].update(0)
        self.matching.student_loss(rolled, with_text, without, draws).backward()
        student = self.roles.parameters("student")
        gradients = torch.cat([p.grad.flatten() for p in student.values() if p.grad is not None])
        self.optimizers["student"].update(0)
        return gradients


def adapter_of(module: nn.Module) -> Adapter:
    """Wan's adapter for a module's configuration."""
    from blade_compile.distill.adapter_wan import WanAdapter

    return WanAdapter(dict(module.config), FLOW)  # type: ignore[call-overload]


def run_config(model: Model, plan: Plan, dtype: torch.dtype, when: str, sparsity: float) -> RunConfig:
    """A run's configuration: LoRA for Wan, TDM as by default."""
    frames, height, width = model.size(plan.device).latent
    large = plan.device.type == "cuda"  # activations of the published size would not fit
    precision = str(dtype).removeprefix("torch.")
    return resolve({
        "name": "step",
        "model": {"path": "given"},
        "data": {"embeddings": "given"},
        "latent": {"num_frames": 4 * frames - 3, "height": 8 * height, "width": 8 * width},
        "method": {"steps": K, "cfg_scale": CFG_SCALE},
        "sparsity": {"sparsity": sparsity, "when": when},
        "lora": {"rank": 16, "alpha": 16},
        "optimizer": {"student": {"learning_rate": STILL}, "critic": {"learning_rate": STILL}},
        "parallel": {"mixed_precision": precision, "fsdp": False, "activation_checkpointing": large},
    })  # fmt: skip
