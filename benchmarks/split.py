"""What happens inside one call of a compiled model: where its time goes, and which share of the blocks it kept.

Both listen at blade's own operators in a call of their own, after the clock: the timed calls run undisturbed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_cases import BACKWARD_FLOPS
from blade_compile.kernels import (
    accelerator,
    cpu_probe,
    dispatch,
    observe,
    ops_carried,
    ops_global,
    policy_adaspa,
    selection,
)

PARTS = ("prediction", "selection", "attention", "rest")
OFF = "off the clock"
Call = Callable[..., Any]


def quietest(measure: Callable[[], dict[str, float]], times: int) -> dict[str, float]:
    """The parts of the call that took least: a single one may have had a neighbour."""
    return min((measure() for _ in range(times)), key=lambda parts: sum(parts.values()))


def time_split(call: Call, device: torch.device, times: int = 3) -> dict[str, float]:
    """Seconds of the parts of the quietest of a few more calls, in which each part waits for the device.

    Prediction is the map of blocks, selection the lists made of it. Where one kernel does both, selection is what it
    takes longer than the map alone, which is made a second time, off the clock.
    """
    return quietest(lambda: _time_split(call, device), times)


def _time_split(call: Call, device: torch.device) -> dict[str, float]:
    clock = _Clock(device, ("prediction", "selection", "attention", OFF))
    with clock.listening():
        start = clock.now()
        call()
        total = clock.now() - start - clock.spent[OFF]
    # Every selection happens within a prediction.
    chosen, attended = clock.spent["selection"], clock.spent["attention"]
    predicted = max(0.0, clock.spent["prediction"] - chosen)
    seconds = {"prediction": predicted, "selection": chosen, "attention": attended}
    seconds["rest"] = max(0.0, total - predicted - chosen - attended)
    return {part: round(seconds[part], 6) for part in PARTS}


def kept(call: Call) -> dict[str, float]:
    """Density of the attention calls that run block-sparse, counted from their lists, and FLOPs on what they keep.

    Nothing where none does. The density is the mean over the forward calls; a call that stayed dense after all counts
    as 1. Global tokens are keys that each query attends to on top of its blocks. FLOPs are those of the backward pass
    too, where there is one.
    """
    densities: list[float] = []
    flops = 0.0
    tokens = 0.0  # global tokens that a query of the running call sees, mean over the heads

    def visible(*args: Any) -> Any:
        nonlocal tokens
        seen = hide(*args)
        tokens = seen.bias.isfinite().double().mean((0, 1)).sum().item()
        return seen

    def tally(event: observe.Event) -> None:  # keeps numbers only: the tensors of all layers would fill the memory
        nonlocal flops
        forward = event.op.removesuffix("_backward")
        if forward not in observe.ATTENTIONS:
            return
        (B, H, S, D), T = event.inputs[0].shape, event.inputs[1].shape[2]
        density = 1.0 if event.path == "sdpa" else event.density
        if forward == "global_sparse_attention" and event.path != "sdpa" and T:
            density += tokens / T
        if forward == event.op:
            densities.append(density)
        flops += (4.0 if forward == event.op else 4.0 * BACKWARD_FLOPS) * B * H * S * T * D * density

    hide = ops_global._visible
    with (
        observe.record(),
        mock.patch.object(observe, "notify", tally),
        mock.patch.object(ops_global, "_visible", visible),
    ):
        call()
    if not densities:
        return {}
    return {"density": round(sum(densities) / len(densities), 4), "attention_flops": round(flops)}


def time_parts(
    call: Call, parts: Mapping[str, tuple[Any, str]], device: torch.device, times: int = 2
) -> dict[str, float]:
    """Seconds of named parts, given as (object, method), and of the rest, in the quietest of a few more calls."""
    return quietest(lambda: _time_parts(call, parts, device), times)


def _time_parts(call: Call, parts: Mapping[str, tuple[Any, str]], device: torch.device) -> dict[str, float]:
    clock = _Clock(device, (*parts,))
    with contextlib.ExitStack() as stack:
        for part, (owner, method) in parts.items():
            clock.listen(stack, owner, method, part)
        start = clock.now()
        call()
        total = clock.now() - start
    seconds = {**clock.spent, "rest": max(0.0, total - sum(clock.spent.values()))}
    return {part: round(value, 6) for part, value in seconds.items()}


class _Clock:
    """Seconds spent in each part; a part within a part of the same name counts once."""

    def __init__(self, device: torch.device, parts: tuple[str, ...]) -> None:
        self.device = device
        self.spent = dict.fromkeys(parts, 0.0)
        self._open: set[str] = set()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def listen(self, stack: contextlib.ExitStack, owner: Any, method: str, part: str) -> None:
        """Count a function's seconds while the stack is open."""
        stack.enter_context(mock.patch.object(owner, method, self.around(part, getattr(owner, method))))

    def around(self, part: str, function: Call) -> Call:
        def run(*args: Any, **kwargs: Any) -> Any:
            if part in self._open:
                return function(*args, **kwargs)
            self._open.add(part)
            start, before = self.now(), self.spent.get(OFF, 0.0)
            try:
                return function(*args, **kwargs)
            finally:
                self._open.discard(part)
                self.spent[part] += self.now() - start - (self.spent.get(OFF, 0.0) - before)

        return run

    def fused(self, predict: Call, map_alone: Call, count: int) -> Call:
        """A kernel that predicts and selects at once; ``map_alone`` takes its first ``count`` arguments."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = predict(*args, **kwargs)
            middle = self.now()
            map_alone(*args[:count])
            extra = self.now() - middle
            self.spent["selection"] += max(0.0, middle - start - extra)
            self.spent[OFF] += extra
            return result

        return run

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Blade's operators report to this clock."""
        with contextlib.ExitStack() as stack:
            for module, name, part in (
                (dispatch, "predict", "prediction"),
                (ops_carried, "predict", "prediction"),
                (selection, "select", "selection"),
                (policy_adaspa, "select", "selection"),
                (dispatch, "attend", "attention"),
                (ops_global, "_attend", "attention"),
                (ops_carried, "attend_densely", "attention"),
            ):
                self.listen(stack, module, name, part)
            fused = self.fused(cpu_probe.predict, cpu_probe.probe_map, 7)
            stack.enter_context(mock.patch.object(cpu_probe, "predict", fused))
            fused = self.fused(accelerator.select, accelerator.probe_map, 7)
            stack.enter_context(mock.patch.object(accelerator, "select", fused))
            yield
