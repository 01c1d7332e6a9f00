"""Suite ``models``: one denoising step of a whole transformer, compiled dense and compiled by blade.

What certifies the sparse arms is the arm that keeps every block: it runs the same graph and the same kernel and must
be as exact as compiled dense. The error of a sparse arm is the distance from dense; with random weights it says
little about a trained model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.attention_gate import relative
from benchmarks.demo import default_dtype
from benchmarks.models import MODELS, Model
from benchmarks.registry import Arm, Case, Plan, WrongResultError, suite
from blade_compile.kernels import dispatch

QUICK = ("wan2.1-1.3b",)
POLICIES: dict[str, dict[str, Any]] = {
    "blade asa, sparsity 0.8": {"sparsity": 0.8},
    "blade asa, tau 0.95": {"tau": 0.95},
}
EVERY_BLOCK = {"sparsity": 0.0, "when": "always"}


@suite("models")
def cases(plan: Plan) -> Iterator[Case]:
    """One step of each model: published sizes on a GPU, scaled ones on a CPU; random weights."""
    for name in QUICK if plan.quick else MODELS:
        yield model_case(MODELS[name], plan)


def model_case(model: Model, plan: Plan) -> Case:
    """Compiled dense first: it is the baseline."""
    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    about = {
        "model": model.name,
        "size": model.describe(size),
        "dtype": str(dtype).removeprefix("torch."),
        "S": model.tokens(size),
        "weights": "random",
    }
    policies = dict(list(POLICIES.items())[:1]) if plan.quick else POLICIES
    sites = lambda: site_table(model, plan)  # noqa: E731
    return Case(f"{model.name}, one step", lambda: _arms(model, plan, policies), about, sites=sites)


def _arms(model: Model, plan: Plan, policies: dict[str, dict[str, Any]]) -> list[Arm]:
    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    eager, inputs = model.build(size, dtype, plan.device), model.inputs(size, dtype, plan.device)
    outputs: dict[str, Tensor] = {}

    def step(module: Callable[..., Any]) -> Callable[[], Tensor]:
        @torch.no_grad()
        def run() -> Tensor:
            out: Tensor = module(**inputs)[0]
            return out

        return run

    def compiled(backend: str, options: dict[str, Any] | None = None) -> Callable[[], Tensor]:
        # A copy each: a compiled module must not see what was compiled for the other one.
        return step(torch.compile(deepcopy(eager), backend=backend, options=options))

    reference = exact_output(model, size, plan)
    arms = [
        Arm("compiled dense", compiled("inductor"), as_near(reference, None, outputs, "compiled dense")),
        Arm("eager dense", step(eager), as_near(reference, "compiled dense", outputs)),
        Arm("blade, every block", compiled("blade", EVERY_BLOCK), as_near(reference, "compiled dense", outputs)),
    ]
    for name, options in policies.items():
        call = compiled("blade", options)
        split = lambda call=call: time_split(call, plan.device)  # noqa: E731
        arms.append(Arm(name, call, distance(outputs, "compiled dense"), about=dict(options), split=split))
    return arms


def site_table(model: Model, plan: Plan) -> dict[str, Any]:
    """`explain` on the model under the first policy."""
    import blade_compile

    size, dtype = model.size(plan.device), default_dtype(plan.device.type)
    module, inputs = model.build(size, dtype, plan.device), model.inputs(size, dtype, plan.device)
    with torch.no_grad():
        options = next(iter(POLICIES.values()))
        return blade_compile.explain(module, **inputs, blade_options=options).to_dict()


def time_split(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of blade's prediction and attention in one more call, and of the rest; each part waits for the device."""
    spent = {"prediction": 0.0, "attention": 0.0}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = _now(device)
            result = function(*args, **kwargs)
            spent[part] += _now(device) - start
            return result

        return run

    with (
        mock.patch.object(dispatch, "predict", timed("prediction", dispatch.predict)),
        mock.patch.object(dispatch, "attend", timed("attention", dispatch.attend)),
    ):
        start = _now(device)
        call()
        total = _now(device) - start
    return {**spent, "rest": total - sum(spent.values())}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def exact_output(model: Model, size: Any, plan: Plan) -> Tensor:
    """The step in fp32, eagerly, from the same weights as rounded for the other arms."""
    dtype = default_dtype(plan.device.type)
    module: nn.Module = model.build(size, dtype, plan.device).float()
    inputs = {key: _to_float(value) for key, value in model.inputs(size, dtype, plan.device).items()}
    with torch.no_grad():
        out: Tensor = module(**inputs)[0]
    return out


def _to_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def as_near(
    reference: Tensor, like: str | None, outputs: dict[str, Tensor], name: str = ""
) -> Callable[[Tensor], float]:
    """A check against fp32: at most twice the error of arm ``like``; without it, finite and no worse than rounding."""

    def check(out: Tensor) -> float:
        error = relative(out, reference.double())
        if name:
            outputs[name] = out.clone()
        eps = torch.finfo(out.dtype).eps
        # An fp32 arm may equal the fp32 reference to the last bit; another order of sums may not.
        rounding = eps + 16 * torch.finfo(torch.float32).eps
        limit = 100 * eps if like is None else 2 * relative(outputs[like], reference.double()) + rounding
        if not error <= limit:
            raise WrongResultError(f"error {error:.2e} against fp32, allowed {limit:.2e}")
        return error

    return check


def distance(outputs: dict[str, Tensor], name: str) -> Callable[[Tensor], float]:
    """A check that gives the distance from dense, and refuses what is not finite."""

    def check(out: Tensor) -> float:
        if not out.isfinite().all():
            raise WrongResultError("the output is not finite")
        return relative(out, outputs[name].double())

    return check
