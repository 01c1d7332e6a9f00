"""Suite ``models``: one denoising step of a whole transformer, compiled dense and compiled by blade.

What certifies the sparse arms is the arm that keeps every block: it runs the same graph and the same kernels and must
be as exact as compiled dense. The error of a sparse arm is its distance from the step in fp32; with random weights it
says little about a trained model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import sdpa
from benchmarks.attention_gate import relative
from benchmarks.demo import default_dtype
from benchmarks.models import MODELS, Model
from benchmarks.registry import Arm, Case, Plan, WrongResultError, suite
from benchmarks.split import kept, time_split

QUICK = ("wan2.1-1.3b",)
POLICIES: dict[str, dict[str, Any]] = {
    "blade asa, sparsity 0.8": {"sparsity": 0.8},
    "blade asa, tau 0.95": {"tau": 0.95},
    "blade asa_g, sparsity 0.8": {"policy": "asa_g", "sparsity": 0.8},
    "blade vsa, sparsity 0.8": {"policy": "vsa", "sparsity": 0.8},
    "blade sparge": {"policy": "sparge"},
    "blade xattention": {"policy": "xattention"},
    "blade sta, sparsity 0.8": {"policy": "sta", "sparsity": 0.8},
    "blade radial, sparsity 0.8": {"policy": "radial", "sparsity": 0.8},
}
"""AdaSpa is missing: without a generation it would search at every step. ``headline`` measures it by its phases."""
WIDE, NARROW = ("wan2.1-1.3b",), 3
"""Models that run under every policy; the others run under the first few"""
BASELINE, EVERY_BLOCK = "compiled dense", "blade, every block"
Call = Callable[[], Any]


@suite("models")
def cases(plan: Plan) -> Iterator[Case]:
    """One step of each model: published sizes on a GPU, scaled ones on a CPU; random weights."""
    for name in QUICK if plan.quick else MODELS:
        yield model_case(MODELS[name], plan)


def model_case(model: Model, plan: Plan) -> Case:
    """Compiled dense first: it is the baseline."""
    count = 1 if plan.quick else len(POLICIES) if model.name in WIDE else NARROW
    policies = dict(list(POLICIES.items())[:count])
    sites = lambda: site_table(model, plan)  # noqa: E731
    return Case(f"{model.name}, one step", lambda: _arms(model, plan, policies), about(model, plan), sites=sites)


def about(model: Model, plan: Plan) -> dict[str, Any]:
    """Columns of every row of a model."""
    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    return {
        "model": model.name,
        "size": model.describe(size),
        "dtype": str(dtype).removeprefix("torch."),
        "S": model.tokens(size),
        "weights": "random",
    }


@dataclass
class Contenders:
    """One model's calls: all share one set of weights, and each is compiled for itself."""

    model: nn.Module
    device: torch.device
    backend: str
    "of dense SDPA, see `sdpa`"

    def eager(self, *inputs: dict[str, Any]) -> Call:
        """The model as it is, called once for each of the inputs."""
        return self._step(self.model, inputs)

    def compiled(self, backend: str, options: dict[str, Any] | None, *inputs: dict[str, Any]) -> Call:
        """Compiled by a backend."""
        weights = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        # A module each, without a second copy of the weights: one must not see what was compiled for the other.
        own = deepcopy(self.model, weights)
        return self._step(torch.compile(own, backend=backend, options=options, dynamic=False), inputs)

    def dense(self, *inputs: dict[str, Any]) -> Call:
        """Compiled by Inductor with the device's best SDPA backend."""
        return self.compiled("inductor", None, *inputs)

    def _step(self, module: Callable[..., Any], inputs: tuple[dict[str, Any], ...]) -> Call:
        preferring = sdpa.preferring(self.backend)

        def run() -> Tensor:
            with preferring(), torch.no_grad():
                for given in inputs:
                    out: Tensor = module(**given)[0]
            return out

        return run


def contenders(model: Model, plan: Plan) -> Contenders:
    """The model on the plan's device."""
    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    config = {**model.common, **size.config}
    backend = sdpa.best(
        plan.device, dtype, config["num_attention_heads"], model.tokens(size), config["attention_head_dim"]
    )
    return Contenders(model.build(size, dtype, plan.device), plan.device, backend)


def every_block(options: dict[str, Any]) -> dict[str, Any]:
    """The options that run the same operators and drop nothing."""
    return {**options, "sparsity": 0.0, "when": "always"}


def _arms(model: Model, plan: Plan, policies: dict[str, dict[str, Any]]) -> list[Arm]:
    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    reference = exact_output(model, size, plan)
    run, inputs = contenders(model, plan), model.inputs(size, dtype, plan.device)
    gate = StepGate(reference)
    arms = [
        Arm(BASELINE, run.dense(inputs), gate.baseline, about={"sdpa": run.backend}),
        Arm("eager dense", run.eager(inputs), gate.as_near, about={"sdpa": run.backend}),
        Arm(EVERY_BLOCK, run.compiled("blade", every_block({}), inputs), gate.as_near),
    ]
    for name, options in policies.items():
        call = run.compiled("blade", options, inputs)
        after = lambda call=call: {**kept(call), "split": time_split(call, plan.device)}  # noqa: E731
        witness = EVERY_BLOCK
        arms.append(Arm(name, call, gate.distance, about=dict(options), certified_by=witness, after=after))
    return arms


def site_table(model: Model, plan: Plan) -> dict[str, Any]:
    """`explain` on the model under the first policy."""
    import blade_compile

    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    module, inputs = model.build(size, dtype, plan.device), model.inputs(size, dtype, plan.device)
    with torch.no_grad():
        options = next(iter(POLICIES.values()))
        return blade_compile.explain(module, **inputs, blade_options=options).to_dict()


def exact_output(model: Model, size: Any, plan: Plan) -> Tensor:
    """The step in fp32, eagerly, from the same weights as rounded for the other arms."""
    dtype = default_dtype(plan.device.type)
    module: nn.Module = model.build(size, dtype, plan.device).float()
    inputs = {key: to_float(value) for key, value in model.inputs(size, dtype, plan.device).items()}
    with torch.no_grad():
        out: Tensor = module(**inputs)[0]
    return out


def to_float(value: Any) -> Any:
    """Tensors of numbers in fp32, all else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class StepGate:
    """Checks of a step's output against fp32. `baseline` has to come first: the others are held to its error."""

    def __init__(self, reference: Tensor, rounding: float = 100) -> None:
        """``rounding``: steps of the dtype that the baseline may be off; more where errors add up."""
        self.reference, self.rounding = reference.double(), rounding
        self.allowed = float("nan")  # nothing is right before the baseline is

    def baseline(self, out: Tensor) -> float:
        """No worse than rounding, and nowhere near another result."""
        eps = torch.finfo(out.dtype).eps
        error = self._checked(out, min(self.rounding * eps, 0.5))
        # An fp32 arm may equal the fp32 reference to the last bit; another order of sums may not.
        self.allowed = 2 * error + eps + self.rounding / 6 * torch.finfo(torch.float32).eps
        return error

    def as_near(self, out: Tensor) -> float:
        """At most twice the baseline's error."""
        return self._checked(out, self.allowed)

    def distance(self, out: Tensor) -> float:
        """How far it is, whatever that is; refuses what is not finite or has another shape."""
        return self._checked(out, float("inf"))

    def _checked(self, out: Tensor, allowed: float) -> float:
        if out.shape != self.reference.shape:
            raise WrongResultError(f"the output has shape {tuple(out.shape)}, not {tuple(self.reference.shape)}")
        if not out.isfinite().all():
            raise WrongResultError("the output is not finite")
        error = relative(out, self.reference)
        if not error <= allowed:
            raise WrongResultError(f"error {error:.2e} against fp32, allowed {allowed:.2e}")
        return error
