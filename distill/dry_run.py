"""What a run would do, without doing it: parameters, attention calls, token grid, steps, memory and time per rank.

The transformer is built on the meta device at its full size; its attention calls and operations are those of one
forward pass there, or, for a model that reads values and so can't run without them, of its module names alone. Memory
and time are estimates: what they count is said beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blade_compile.distill.adapters import Adapter, load_model
from blade_compile.distill.config import RunConfig
from blade_compile.distill.cost import Pass, forward_cost, matmul_rate
from blade_compile.distill.errors import ConfigError
from blade_compile.distill.preflight import check_precision, check_settings
from blade_compile.distill.prompts import read_prompts

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class DryRun:
    """The answer. Sizes in bytes, of one rank."""

    family: str
    prediction: str
    parameters: int
    trained_parameters: int
    "of one role: student or critic"
    latent_shape: tuple[int, ...]
    grid: tuple[int, int, int]
    times: dict[int, tuple[float, ...]]
    "the student's steps by K"
    sites: int
    "self-attention calls in a forward pass, which backend='blade' can make sparse"
    other_sites: int
    "cross-attention and the like, which stay dense"
    sites_from: str
    "where that was read: a forward pass on meta, or module names"
    tokens: int
    sparsity: float | None
    prompts: int | None
    samples_per_update: int
    "of all ranks"
    world: int
    memory: dict[str, int] = field(default_factory=dict)
    flops_per_update: int | None = None
    seconds_per_update: float | None = None
    rate: float | None = None
    "operations per second assumed"
    rate_from: str = ""
    guidance: str = ""

    @property
    def total_memory(self) -> int:
        """All parts together."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"total_memory": self.total_memory}

    def rows(self) -> list[tuple[str, str]]:
        """What and how much, to be shown."""
        grid = " x ".join(map(str, self.grid))
        rows = [
            ("model", f"{self.family}, predicts {self.prediction}, {_count(self.parameters)} parameters"),
            ("trained", f"{_count(self.trained_parameters)} parameters each in student and critic"),
            ("latents", " x ".join(map(str, self.latent_shape))),
            ("tokens", f"{self.tokens:,}, grid {grid} (time, height, width)"),
            ("attention", f"{self.sites} calls can be sparse, {self.other_sites} stay dense ({self.sites_from})"),
            ("sparsity", _sparsity(self.sparsity)),
            ("guidance", self.guidance),
        ]
        rows += [(f"K = {k}", ", ".join(f"{t:.6g}" for t in times)) for k, times in self.times.items()]
        if self.prompts is not None:
            updates = self.prompts / self.samples_per_update
            said = f"{self.prompts:,}, seen once in {updates:.3g} updates of {self.samples_per_update}"
            rows.append(("prompts", said))
        rows += [(f"memory: {name}", _size(size)) for name, size in self.memory.items()]
        rows.append(("memory per rank", f"about {_size(self.total_memory)}, {self.world} rank{'s' * (self.world > 1)}"))
        if self.flops_per_update and self.seconds_per_update and self.rate:
            time = f"about {self.seconds_per_update:.3g} s ({self.flops_per_update / 1e12:.4g} TFLOP a rank, at "
            rows.append(("time per update", f"{time}{self.rate / 1e12:.3g} TFLOP/s {self.rate_from})"))
        return rows


def dry_run(config: RunConfig, world: int = 1, *, rate: float | None = None) -> DryRun:
    """Check that a run can start and say what it would cost.

    Args:
        config: the run.
        world: number of ranks.
        rate: operations per second of a rank; None: a matrix product is timed here.

    Raises:
        ConfigError: the model can't be built or run, a setting doesn't fit it (``preflight.check_settings``), or there
            is no attention to make sparse.
        DataError: the prompts can't be read.
    """
    prompts = None if config.data.prompts is None else len(read_prompts(config.data.prompts, config.data.columns))
    check_precision(config)
    model, adapter = load_model(config.model, meta=True)
    times = {k: grid.times for k, grid in check_settings(config, adapter, world).items()}
    grid = adapter.token_grid(config.latent)
    trained = _mark_trained(model, config, adapter)
    cost, said = _cost(config, model, adapter)
    sites, others, tokens = _sites(model, grid, cost)
    flops, seconds, rate_from = None, None, "given"
    if cost is not None:
        flops = update_flops(config, cost)
        if rate is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            rate = matmul_rate(device, getattr(torch, config.parallel.mixed_precision))
            rate_from = f"of a matrix product on this {device.type}"
        seconds = flops / rate
    return DryRun(
        family=adapter.family,
        prediction=adapter.prediction,
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=trained,
        latent_shape=adapter.latent_shape(config.latent, config.loop.batch_size),
        grid=grid,
        times=times,
        sites=sites,
        other_sites=others,
        sites_from=said,
        tokens=tokens,
        sparsity=config.sparsity.options().get("sparsity"),
        prompts=prompts,
        samples_per_update=world * config.loop.batch_size * config.loop.grad_accumulation,
        world=world,
        memory=memory(config, model, adapter, trained, cost, world),
        flops_per_update=flops,
        seconds_per_update=seconds,
        rate=rate,
        rate_from=rate_from,
        guidance=config.guidance,
    )


def _sites(model: nn.Module, grid: tuple[int, int, int], cost: Pass | None) -> tuple[int, int, int]:
    """Self-attention calls over the grid, other calls, and tokens of the former."""
    free = math.prod(grid)
    if cost is None:
        names = [n for n, m in model.named_modules() if hasattr(m, "to_q") and hasattr(m, "to_k")]
        crossed = [n for n in names if n.endswith("attn2")]
        if not names:
            raise ConfigError("no attention was found in the model, by its modules' names; nothing could be sparse")
        return len(names) - len(crossed), len(crossed), free
    own = [call for call in cost.calls if call.is_self and call.queries >= free]
    if not own:
        found = sorted({(call.queries, call.keys) for call in cost.calls})
        raise ConfigError(
            f"no attention over the {free:,} tokens of the grid {grid} was found (queries, keys: {found or 'none'}); "
            "the adapter's token_grid has to multiply to the token count"
        )
    longest = max(call.queries for call in own)
    own = [call for call in own if call.queries in {free, longest}]  # not the refiner of a text longer than the grid
    return len(own), len(cost.calls) - len(own), longest


def _cost(config: RunConfig, model: nn.Module, adapter: Adapter) -> tuple[Pass | None, str]:
    """One forward pass of a rank's batch on meta; None for models that can't run there."""
    batch = config.loop.batch_size
    try:
        x = torch.empty(adapter.latent_shape(config.latent, batch), device="meta", dtype=_dtype(model))
        x.requires_grad_(True)
        time = torch.empty(batch, device="meta")
        with torch.device("meta"):
            condition = adapter.conditions(example_embeddings(adapter, batch, _dtype(model)), config.latent)
        condition = {name: _to_meta(value) for name, value in condition.items()}
        call = partial(adapter.call, model, x, time, condition, config.method.embedded_guidance)
        return forward_cost(call, model), "counted in a forward pass on the meta device"
    except ConfigError:
        raise
    except Exception as error:  # models are free to read values, which meta tensors lack
        said = f"{type(error).__name__}: {error}".split("\n")[0]
        if not (isinstance(error, NotImplementedError) or "meta" in str(error).lower()):
            raise ConfigError(
                f"a forward pass of the model fails: {said[:300]}; latents and conditions have to be those of the "
                f"model ({type(adapter).__name__})"
            ) from error
        return None, f"by module names: the model can't run on meta, {said[:100]}"


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the largest parameter: some of the small ones stay in fp32."""
    largest = max(model.parameters(), key=Tensor.numel, default=None)
    return torch.float32 if largest is None else largest.dtype


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(item) for item in value)
    return {k: _to_meta(v) for k, v in value.items()} if isinstance(value, dict) else value


def example_embeddings(adapter: Adapter, batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Embeddings of the sizes that the family has by default, on the meta device."""
    made: Mapping[str, Tensor] = adapter.example_embeddings(batch, dtype)
    return {name: tensor.to("meta") for name, tensor in made.items()}


def lora_layers(model: nn.Module, targets: Sequence[str]) -> list[nn.Linear]:
    """The linear layers that get adapters, by peft's rule: the name, or its end after a dot.

    Raises:
        ConfigError: there is none.
    """
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    layers = [m for name, m in linear if any(name == t or name.endswith(f".{t}") for t in targets)]
    if not layers:
        raise ConfigError(f"lora.targets {list(targets)}: no linear layer of the model has such a name")
    return layers


def _mark_trained(model: nn.Module, config: RunConfig, adapter: Adapter) -> int:
    """Let what is trained require gradients, for what the forward pass keeps. Returns the number of parameters."""
    if config.lora is None:
        model.requires_grad_(True)
        return sum(p.numel() for p in model.parameters())
    layers = lora_layers(model, config.lora.targets or adapter.lora_targets)
    for layer in layers:
        layer.requires_grad_(True)
    return sum(config.lora.rank * (m.in_features + m.out_features) for m in layers)


def update_flops(config: RunConfig, cost: Pass) -> int:
    """Operations of one update of student and critic, on one rank.

    A backward pass counts as two forward passes, recomputation as one more. Per sample: K passes of the student for
    the roll-out; one with gradient; the critic's updates, each with gradient (and one of the teacher for the
    regulariser); two of the teacher, or one without guidance; one of the critic.
    """
    method = config.method
    trained = 4 if config.parallel.activation_checkpointing else 3
    steps = sum(method.all_steps) / len(method.all_steps)
    sparsity = config.sparsity.options().get("sparsity") or 0.0
    sparse = cost.flops - sparsity * cost.attention_flops
    critic = sparse if config.sparsity.critic_sparse else cost.flops
    teacher = (1 if method.cfg_scale == 1 else 2) + method.critic_updates * (method.regulariser > 0)
    total = (steps + trained) * sparse + (method.critic_updates * trained + 1) * critic + teacher * cost.flops
    return int(total * config.loop.grad_accumulation)


def memory(
    config: RunConfig, model: nn.Module, adapter: Adapter, trained: int, cost: Pass | None, world: int
) -> dict[str, int]:
    """Bytes of one rank by purpose. Weights that are trained, their gradients and AdamW's moments count in fp32."""
    shards = world if config.parallel.fsdp else 1
    parameters = sum(p.numel() for p in model.parameters())
    base = parameters * _BYTES[config.model.dtype]
    made = {"frozen weights": base // shards}
    if config.lora is None:
        made["frozen weights (teacher)"] = made.pop("frozen weights")
    made["student and critic: weights, gradients, moments"] = 2 * trained * 16 // shards
    if config.ema.decay is not None:
        made["average of the student"] = trained * 4 // shards
    if shards > 1:
        blocks = max(1, sum(len(_list(model, name)) for name in adapter.block_lists))
        made["weights gathered for two blocks"] = 2 * base // blocks
    if cost is not None:
        made["activations"] = _activations(config, model, adapter, cost)
    return made


def _activations(config: RunConfig, model: nn.Module, adapter: Adapter, cost: Pass) -> int:
    """All that is saved; with checkpointing one block's share of it, and one tensor of tokens for each block."""
    if not config.parallel.activation_checkpointing:
        return cost.saved_bytes
    blocks = sum(len(_list(model, name)) for name in adapter.block_lists)
    if not blocks:
        return cost.saved_bytes
    widest = max((m.out_features for m in model.modules() if isinstance(m, nn.Linear)), default=0)
    queries = (p.shape[0] for name, p in model.named_parameters() if name.endswith("to_q.weight"))
    width = min(widest, max(queries, default=widest))
    tokens = max((call.queries for call in cost.calls if call.is_self), default=0)
    inputs = blocks * config.loop.batch_size * tokens * width * _BYTES[config.parallel.mixed_precision]
    return min(cost.saved_bytes, cost.saved_bytes // blocks + inputs)


def _list(model: nn.Module, name: str) -> Any:
    return getattr(model, name, ())


def _sparsity(value: float | None) -> str:
    return "chosen by tau" if value is None else f"{value:g}, density {1 - value:g}"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _size(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def write(report: DryRun, path: Path) -> None:
    """The report as JSON."""
    path.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
