"""The sections of a run's configuration: every field with its type, its default and what it means."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from blade_compile.config import BladeConfig
from blade_compile.distill.objective import NoiseWeight, Penalty

Family = Literal["auto", "wan", "cogvideox", "hunyuan_video", "ltx", "sd3", "flux", "pixart", "dit"]
Dtype = Literal["bfloat16", "float16", "float32"]
FAMILIES: tuple[str, ...] = get_args(Family)[1:]
ROLE_ALIASES = {"generator": "student", "real_score": "teacher", "fake_score": "critic"}
OWN_FACTORIES = "blade_compile."  # factories in this package are no foreign code

_FACTORY = re.compile(r"[\w.]+:[\w.]+")
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class Section(BaseModel):
    """What all parts of a configuration share: frozen, no unknown keys, a description on every field."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _roles(cls, value: Any) -> Any:
        """Read the roles' names in CausVid, Self-Forcing and DMD2 as student, teacher and critic."""
        if not isinstance(value, dict):
            return value
        for alias, name in ROLE_ALIASES.items():
            if alias in value and name in cls.model_fields:
                if name in value:
                    raise ValueError(f"{alias} and {name} are two names of one role; give one of them")
                value = {name if key == alias else key: item for key, item in value.items()}
        return value


class ModelConfig(Section):
    """The teacher, from which student and critic start."""

    path: str | None = Field(None, description="a folder or hub id in diffusers format")
    factory: str | None = Field(
        None, description="instead of path: module:callable that returns (nn.Module, adapter); see adapters.py"
    )
    family: Family = Field("auto", description=f"{', '.join(FAMILIES)}; auto: by the transformer's class")
    dtype: Dtype = Field("bfloat16", description="of the frozen weights: bfloat16, float16, float32")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    weights: str | None = Field(
        None, description="safetensors that replace the transformer's own weights in teacher, student and critic"
    )
    trust_code: bool = Field(False, description="run code that comes with the model or that factory names")

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.path is None) == (self.factory is None):
            both = "both are given" if self.path else "neither is given"
            raise ValueError(f"{both}; give either path (folder or hub id) or factory (module:callable)")
        if self.factory is not None:
            if not _FACTORY.fullmatch(self.factory):
                raise ValueError(f"factory is {self.factory!r}; valid is module:callable, such as my_models.wan:build")
            if not self.trust_code and not self.factory.startswith(OWN_FACTORIES):
                raise ValueError(f"factory {self.factory!r} is code of yours; set trust_code=true to run it")
        return self


class DataConfig(Section):
    """What the student is conditioned on. No image or video is needed."""

    prompts: str | None = Field(None, description=".txt (one a line), .jsonl, .csv, .parquet, or FastVideo's .json")
    negative_prompt: str = Field("", description="the teacher's unconditional input under guidance")
    embeddings: str | None = Field(
        None, description="folder that `prepare` fills, or FastVideo's Parquet; null: <output_dir>/<name>/embeddings"
    )
    columns: dict[str, str] = Field({}, description="your column names, as {prompt: text, seed: my_seed}")
    max_sequence_length: int | None = Field(None, gt=0, description="tokens of text; null: the pipeline's own")
    shard_size: int = Field(64, gt=0, description="prompts in one file of embeddings")
    encode_batch: int = Field(8, gt=0, description="prompts encoded at a time")


class LatentConfig(Section):
    """The clip that the student makes, in the pipeline's own units: frames and pixels before the VAE."""

    num_frames: int = Field(1, gt=0, description="frames; 1 for images")
    height: int = Field(512, gt=0, description="pixels")
    width: int = Field(512, gt=0, description="pixels")


class MethodConfig(Section):
    """Trajectory Distribution Matching; the equations stand in objective.py."""

    steps: int = Field(4, gt=0, description="K, the student's model calls")
    step_choices: tuple[int, ...] = Field(
        (), description="several K for one student that is told K, such as [1, 2, 4, 8]; empty: steps alone"
    )
    cfg_scale: float = Field(3.5, ge=0, description="teacher's guidance x_u + s (x_c - x_u); 1: none")
    embedded_guidance: float | None = Field(
        None, ge=0, description="guidance given to guidance-distilled models (Flux-dev, HunyuanVideo) as an input"
    )
    intervals: Literal["separate", "overlapping"] = Field(
        "separate", description="compare the scores inside the step's own interval, or up to pure noise"
    )
    eta: float = Field(1.0, ge=0, le=1, description="share of the estimated noise kept at a step; 1: deterministic")
    importance_weight: bool = Field(True, description="weigh the critic's samples by TDM's (tempered) density ratio")
    weighting: NoiseWeight = Field("min_snr", description="of the critic's error: min_snr, inverse_variance, one")
    gamma: float = Field(5.0, gt=0, description="cap of min_snr")
    penalty: Penalty = Field("pseudo_huber", description="of the student: pseudo_huber, squared")
    huber_c: float = Field(1e-3, gt=0, description="c of pseudo_huber")
    normaliser: bool = Field(True, description="divide the student's loss by mean |x0 - teacher| per sample")
    normaliser_cap: float | None = Field(None, gt=0, description="largest such divisor; null: no cap")
    regulariser: float = Field(0.0, ge=0, description="lambda: pull of the critic towards the unguided teacher")
    tau_min: float = Field(0.02, ge=0, lt=1, description="lowest noise at which the scores are compared, in [0, 1)")
    tau_max: float = Field(0.99, gt=0, le=1, description="highest; 1 - tau_max also stays free above each interval")
    critic_updates: int = Field(1, gt=0, description="of the critic for one of the student")
    regression_updates: int = Field(
        0,
        ge=0,
        description="first updates of the student that follow the guided teacher itself, at the student's points",
    )

    @property
    def all_steps(self) -> tuple[int, ...]:
        """Every K that the student is trained for."""
        return self.step_choices or (self.steps,)

    @field_validator("step_choices")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(k < 1 for k in value) or list(value) != sorted(set(value)):
            raise ValueError(f"{list(value)}; valid are different numbers of steps from 1 up, ascending")
        return value

    @model_validator(mode="after")
    def _fits(self) -> MethodConfig:
        if self.step_choices and self.steps not in self.step_choices:
            raise ValueError(f"steps is {self.steps}, not one of step_choices {list(self.step_choices)}; add it")
        if self.tau_min >= self.tau_max:
            raise ValueError(f"tau_min is {self.tau_min} and tau_max {self.tau_max}; tau_min has to be below tau_max")
        return self


class SparsityConfig(Section):
    """How the student's attention is made sparse, in training as in inference: options of backend="blade"."""

    policy: str = Field("asa", description="asa, asa_g, adaspa, dense, or another of the backend's policies")
    sparsity: float | None = Field(None, ge=0, lt=1, description="share of key blocks dropped; null: tau decides")
    tau: float = Field(0.95, gt=0, le=1, description="predicted attention mass to keep where sparsity is null")
    block_size: int | None = Field(None, description="16, 32, 64, 128 tokens; null: the policy's own")
    order: Literal["none", "gilbert", "tile"] = Field("none", description="token order inside the attention")
    when: Literal["auto", "always", "never"] = Field(
        "always", description="always: train on what is exported; auto: sparse where it is faster; never: dense"
    )
    schedule: tuple[tuple[int, float], ...] = Field(
        (), description="[[training step, sparsity], ..], steps ascending from 0: the sparsity from that step on"
    )
    critic_sparse: bool = Field(False, description="the critic is sparse too, as in BLADE's released code")
    teacher_sparse: bool = Field(False, description="the teacher is sparse too: distil what is already sparse")
    blade_options: dict[str, Any] = Field({}, description="more options of the backend, such as {probe_tokens: 32}")

    @field_validator("blade_options", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """PyYAML reads 1e-5 as text; where no field gives the type, it is repaired here."""
        if not isinstance(value, dict):
            return value
        return {k: float(v) if isinstance(v, str) and _EXPONENT.fullmatch(v) else v for k, v in value.items()}

    @model_validator(mode="after")
    def _valid_for_the_backend(self) -> SparsityConfig:
        steps = [step for step, _ in self.schedule]
        if steps and (steps[0] != 0 or steps != sorted(set(steps))):
            raise ValueError(f"schedule has the steps {steps}; they have to ascend from 0")
        for _, sparsity in self.schedule or ((0, self.sparsity),):
            twice = {"policy", "sparsity", "block_size", "order", "when", "tau"} & set(self.blade_options)
            if twice:
                raise ValueError(f"blade_options holds {', '.join(sorted(twice))}; set them in this section itself")
            BladeConfig.of(self._options(sparsity))
        return self

    def _options(self, sparsity: float | None) -> dict[str, Any]:
        own = {"policy": self.policy, "sparsity": sparsity, "block_size": self.block_size, "order": self.order}
        if self.tau != BladeConfig.tau:
            own["tau"] = self.tau
        return {k: v for k, v in own.items() if v is not None} | {"when": self.when} | self.blade_options

    def at(self, step: int) -> float | None:
        """The sparsity at a training step; None: ``tau`` decides."""
        return next((s for first, s in reversed(self.schedule) if first <= step), self.sparsity)

    def options(self, grid: tuple[int, int, int] | None = None, step: int | None = None) -> dict[str, Any]:
        """Options of ``torch.compile(model, backend="blade", options=..)``.

        Args:
            grid: the token grid, where the adapter knows it.
            step: of the training; None: what the student ends with.
        """
        last = self.schedule[-1][1] if self.schedule else self.sparsity
        options = self._options(last if step is None else self.at(step))
        return options if grid is None or "grid" in options else options | {"grid": grid}


class LoraConfig(Section):
    """Low-rank adapters on student and critic over one shared copy of the weights."""

    rank: int = Field(64, gt=0, description="rank")
    alpha: float = Field(64.0, gt=0, description="scale is alpha / rank")
    targets: tuple[str, ...] = Field((), description="names of linear layers, as peft takes them; empty: the family's")


class RoleOptimizer(Section):
    """Learning rate of the student, or of the critic."""

    learning_rate: float = Field(1e-4, gt=0, description="of AdamW")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up: constant, cosine to 0")


class CriticOptimizer(RoleOptimizer):
    """The critic learns faster than the student by default."""

    learning_rate: float = Field(5e-4, gt=0, description="of AdamW")


class OptimizerConfig(Section):
    """AdamW for each role."""

    student: RoleOptimizer = Field(RoleOptimizer(), description="the trained few-step model")
    critic: CriticOptimizer = Field(CriticOptimizer(), description="the fake score")
    betas: tuple[float, float] = Field((0.0, 0.95), description="of AdamW")
    weight_decay: float = Field(1e-4, ge=0, description="of AdamW")
    clip: float = Field(1.0, gt=0, description="largest gradient norm, of student and critic each")

    @field_validator("betas")
    @classmethod
    def _in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"{list(value)}; both have to lie in [0, 1)")
        return value


class EmaConfig(Section):
    """Moving average of the student's weights, which is what is exported."""

    decay: float | None = Field(None, gt=0, lt=1, description="per step; null: none, the weights themselves")
    start_step: int = Field(0, ge=0, description="first step that counts")


class LoopConfig(Section):
    """How long, how much at a time, and what is written when."""

    max_steps: int = Field(300, gt=0, description="student updates")
    batch_size: int = Field(1, gt=0, description="samples per rank and pass")
    grad_accumulation: int = Field(1, gt=0, description="passes per update")
    checkpoint_every: int = Field(50, gt=0, description="steps")
    keep_last: int = Field(3, gt=0, description="checkpoints that stay on disk")
    sample_every: int = Field(100, ge=0, description="steps between sample clips; 0: none")
    log_every: int = Field(1, gt=0, description="steps between lines of metrics.jsonl")
    stop_after_minutes: float | None = Field(None, gt=0, description="checkpoint and stop then; null: no limit")


class ParallelConfig(Section):
    """Use of several ranks and of memory. The number of ranks is torchrun's."""

    fsdp: bool = Field(True, description="shard weights over the ranks (FSDP2); false: a copy on each rank")
    mixed_precision: Dtype = Field("bfloat16", description="of forward and backward: bfloat16, float16, float32")
    activation_checkpointing: bool = Field(True, description="keep one activation per block, recompute the rest")
