"""Suite ``models``: one denoising step of a whole transformer, compiled dense and compiled by blade.

What certifies a sparse arm is its witness: the same options with every block kept, in fp32, which runs the same graph
and must be as exact as compiled dense. In the arms' own dtype rounding would hide attention that is plainly wrong: with
random weights it is a small part of the output. The error of a sparse arm is its distance from the step in fp32; with
random weights it says little about a trained model.
"""

from __future__ import annotations

import functools
import inspect
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
from blade_compile.config import BladeConfig

QUICK = ("wan2.1-1.3b",)
POLICIES: dict[str, dict[str, Any]] = {
    "blade asa, sparsity 0.8": {"sparsity": 0.8, "when": "always"},
    "blade asa, tau 0.95": {"tau": 0.95, "when": "always"},
    "blade asa_g, sparsity 0.8": {"policy": "asa_g", "sparsity": 0.8, "when": "always"},
    "blade vsa, sparsity 0.8": {"policy": "vsa", "sparsity": 0.8, "when": "always"},
    "blade sparge": {"policy": "sparge", "when": "always"},
    "blade xattention": {"policy": "xattention", "when": "always"},
    "blade sta, sparsity 0.8": {"policy": "sta", "sparsity": 0.8, "when": "always"},
    "blade radial, sparsity 0.8": {"policy": "radial", "sparsity": 0.8, "when": "always"},
}
"""AdaSpa is missing: without a generation it would search at every step. ``headline`` measures it by its phases."""
WIDE, NARROW = ("wan2.1-1.3b",), 3
"""Models that run under every policy; the others run under the first few"""
BASELINE, EVERY_BLOCK = "compiled dense", "blade, every block"
RECOMPILES = 64  # copies of a module share one code object, where Dynamo allows 8 graphs unless it is told otherwise
Call = Callable[[], Any]
Check = Callable[[Any], "float | None"]
Options = dict[str, Any]


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
        module = torch.compile(own, backend=backend, options=options, dynamic=False, **separately())
        return compiled_for_sure(self._step(module, inputs))

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


def separately() -> dict[str, Any]:
    """Arguments of ``torch.compile`` that let many copies of a module be compiled; in older versions, the setting."""
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": RECOMPILES}
    torch._dynamo.config.recompile_limit = RECOMPILES
    return {}


def compiled_for_sure(call: Call) -> Call:
    """The call, which fails at its first time where Dynamo gives up: eager code must not be timed as compiled."""
    done = False

    def run() -> Any:
        nonlocal done
        if done:
            return call()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            out = call()
        done = True
        return out

    return run


def contenders(model: Model, plan: Plan) -> Contenders:
    """The model on the plan's device."""
    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    return Contenders(model.build(size, dtype, plan.device, plan.seed), plan.device, best_sdpa(model, plan))


def best_sdpa(model: Model, plan: Plan) -> str:
    """The quickest dense kernel for the model's self-attention, with the mask that it hands over."""
    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    config = {**model.common, **size.config}
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    visible = model.visible(size) if model.visible is not None else None
    return sdpa.best(plan.device, dtype, heads, model.tokens(size), width, visible)


def every_block(options: Options) -> Options:
    """The options that run the same operators and drop nothing."""
    return {**options, "sparsity": 0.0, "when": "always"}


def _arms(model: Model, plan: Plan, policies: dict[str, Options]) -> list[Arm]:
    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    proofs = witnesses(model, plan, policies)
    reference = exact_output(model, size, plan)
    run, inputs = contenders(model, plan), model.inputs(size, dtype, plan.device, plan.seed)
    gate, about = StepGate(reference), {"sdpa": run.backend}
    every = run.compiled("blade", every_block({}), inputs)
    arms = [
        Arm(BASELINE, run.dense(inputs), gate.baseline, about=about, certified_by=DENSE_WITNESS),
        Arm("eager dense", run.eager(inputs), gate.as_near, about=about),
        Arm(EVERY_BLOCK, every, gate.as_near, certified_by=witness_of(next(iter(policies)))),
    ]
    for name, options in policies.items():
        call = run.compiled("blade", options, inputs)
        split = lambda call=call: {"split": time_split(call, plan.device)}  # noqa: E731
        arms.append(sparse_arm(name, call, gate.distance, options, witness_of(name), split))
    return arms + proofs


# --- what the arms rest on -------------------------------------------------------------------------------------------

DENSE_WITNESS = "compiled dense, fp32"


def witness_of(arm: str) -> str:
    """The name of the arm that a sparse arm rests on."""
    return f"{arm}: every block, fp32"


def witnesses(model: Model, plan: Plan, policies: dict[str, Options]) -> list[Arm]:
    """Arms that are only checked, in fp32: compiled dense, and every policy's options with every block kept.

    Their outputs are made here, before the models that are timed take up the memory. At most two layers of each kind
    run: all layers go through the same passes and kernels.
    """
    run, inputs = exact_contenders(model, plan)
    gate = StepGate(run.eager(inputs)())
    arms = [witness(DENSE_WITNESS, run.dense(inputs), gate.baseline)]
    for name, options in policies.items():
        every = run.compiled("blade", every_block(options), inputs)
        arms.append(witness(witness_of(name), every, gate.as_near, blade=True))
    torch._dynamo.reset()
    return arms


def exact_contenders(model: Model, plan: Plan) -> tuple[Contenders, Options]:
    """The shallow model in fp32, and its inputs."""
    shallow = model.shallow()
    size, dtype = shallow.size(plan.device), default_dtype(plan.device.type)
    module = shallow.build(size, dtype, plan.device, plan.seed).float()
    return Contenders(module, plan.device, "default"), _exact_inputs(shallow, size, plan)


def witness(name: str, call: Call, check: Check, blade: bool = False) -> Arm:
    """An arm whose call is made now, once; it hands out what came of that.

    ``blade``: whether it fails where no attention ran through blade's operators.
    """
    made: list[Any] = []
    try:
        found = kept(lambda: made.append(call()))
        if blade:
            sparse_for_sure(found, {})
    except Exception as error:  # noqa: BLE001 (what rests on it gets the reason)
        return Arm(name, functools.partial(_raise, error.with_traceback(None)), timed=False)
    return Arm(name, lambda: made[0], check, timed=False)


def _raise(error: Exception) -> None:
    raise error


def sparse_arm(
    name: str,
    call: Call,
    check: Check,
    options: Options,
    certified_by: str,
    after: Callable[[], dict[str, Any]] = dict,
) -> Arm:
    """An arm of blade. It fails unless blade's operators ran, and left blocks out where the options ask for it."""
    found: dict[str, float] = {}

    def checked(out: Any) -> float | None:
        error = check(out)
        found.update(sparse_for_sure(kept(call), options))
        return error

    return Arm(name, call, checked, about=dict(options), certified_by=certified_by, after=lambda: found | after())


def sparse_for_sure(found: dict[str, float], options: Options) -> dict[str, float]:
    """What `split.kept` has found, unless that is not what the options ask for."""
    if not found:
        raise RuntimeError("no attention ran through blade's operators, so this would time dense attention")
    config = BladeConfig.of(options)
    if found["density"] >= 1 and (config.budget or config.max_keep < 1):
        raise RuntimeError(f"every block was kept, though the options are {options}")
    return found


def site_table(model: Model, plan: Plan) -> dict[str, Any]:
    """`explain` on the model under the first policy."""
    import blade_compile

    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    module = model.build(size, dtype, plan.device, plan.seed)
    inputs = model.inputs(size, dtype, plan.device, plan.seed)
    with torch.no_grad():
        options = next(iter(POLICIES.values()))
        return blade_compile.explain(module, **inputs, blade_options=options).to_dict()


def exact_output(model: Model, size: Any, plan: Plan) -> Tensor:
    """The step in fp32, eagerly, from the same weights as rounded for the other arms."""
    module: nn.Module = model.build(size, default_dtype(plan.device.type), plan.device, plan.seed).float()
    with torch.no_grad():
        out: Tensor = module(**_exact_inputs(model, size, plan))[0]
    return out


def _exact_inputs(model: Model, size: Any, plan: Plan) -> Options:
    """The inputs in fp32, as rounded for the other arms."""
    inputs = model.inputs(size, default_dtype(plan.device.type), plan.device, plan.seed)
    return {key: to_float(value) for key, value in inputs.items()}


def to_float(value: Any) -> Any:
    """Tensors of numbers in fp32, all else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class StepGate:
    """Checks of a step's output against fp32. `baseline` has to come first: the others are held to its error."""

    def __init__(self, reference: Tensor, rounding: float = 100, most: float = 0.5) -> None:
        """``rounding``: steps of the dtype that the baseline may be off, ``most`` at most; more where errors add up."""
        self.reference, self.rounding, self.most = reference.double(), rounding, most
        self.allowed = float("nan")  # nothing is right before the baseline is

    def baseline(self, out: Tensor) -> float:
        """No worse than rounding, and nowhere near another result."""
        eps = torch.finfo(out.dtype).eps
        error = self._checked(out, min(self.rounding * eps, self.most))
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
