"""State over steps for a compiled graph: a hidden input, the clock, and who fills it before each call.

Dynamo's graph gets one more input, an int32 tensor on the graph's device that Inductor takes for a static one, so that
no step recompiles and CUDA graphs may be captured. What the backend returns looks for the open generation, counts the
call for the parameters that it is called on, sets the clock in place and calls the compiled graph. Parameters tell
models apart, and layers that share one graph (regional compilation); recompilations of one model go on counting.

The private fields of Dynamo that this needs are used in `with_clock` alone. Where they are missing, blade warns once
and every call searches for itself.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import generations
from .kernels import carried, ops  # noqa: F401 (ops registers the operators)
from .kernels.carried import Carrier, Schedule
from .passes.pipeline import WITH_CLOCK

logger = logging.getLogger("blade_compile")

DEVICE_DECIDES = False
"""Decide by the device's clock also where no CUDA graph can be captured: for tests."""

CompileGraph = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def carry(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compile_graph: CompileGraph,
    *,
    policy: str,
    schedule: Schedule,
    identity: object = None,
    cuda_graphs: bool = False,
) -> Callable[..., Any]:
    """Compile a graph with ``compile_graph``; with a clock where the configuration carries state over steps.

    Args:
        gm, example_inputs: what Dynamo gives a backend. ``gm`` is left as it is.
        compile_graph: compiles a graph on example inputs. The graph that it gets has a last placeholder named
            ``carried.CLOCK``, which attention sites may use.
        policy, schedule: the configuration (``BladeConfig.schedule``). One that carries nothing, and a graph that needs
            gradients, gets no clock.
        identity: tells compilations of one model with different options apart, by its ``repr``.
        cuda_graphs: whether Inductor may capture CUDA graphs.
    """
    if not schedule.carries(policy):
        return compile_graph(gm, list(example_inputs))
    if _needs_gradients(example_inputs):
        if generations.innermost() is not None:
            _warn_once(
                "a model is compiled with gradients within blade_compile.generation: its attention carries no state "
                "over steps; call it under torch.no_grad() or torch.inference_mode()."
            )
        return compile_graph(gm, list(example_inputs))
    clock = _new_clock(example_inputs)
    try:
        copied, inputs = with_clock(gm, example_inputs, clock)
    except Exception as error:  # noqa: BLE001 (private fields: another torch may have others)
        _warn_once(
            f"state can't be carried over steps with this version of torch ({type(error).__name__}: {error}): "
            "masks are searched at every call."
        )
        return compile_graph(gm, list(example_inputs))
    on_device = DEVICE_DECIDES or (cuda_graphs and clock.device.type != "cpu")
    token = WITH_CLOCK.set(True)
    try:
        compiled = compile_graph(copied, inputs)
    finally:
        WITH_CLOCK.reset(token)
    return CarriedGraph(compiled, clock, policy, schedule, repr(identity), on_device, _static(gm))


def with_clock(gm: fx.GraphModule, example_inputs: Sequence[Any], clock: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of Dynamo's graph with the clock as its last input, and its example inputs.

    Dynamo goes on reading its own graph afterwards, which therefore must not gain a placeholder. The source and the
    mark of a static input are what Dynamo gives the buffers of a module.
    """
    from torch._dynamo.source import ConstantSource
    from torch._guards import detect_fake_mode

    fake_mode = detect_fake_mode(list(example_inputs))
    placeholders = gm.graph.find_nodes(op="placeholder")
    if fake_mode is None or not placeholders or not all(hasattr(p, "_dynamo_source") for p in placeholders):
        raise RuntimeError("Dynamo's graph has no sources of its inputs")
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for node, copy in copies.items():
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
    graph.output_node().meta.update(gm.graph.output_node().meta)
    with graph.inserting_after(copies[placeholders[-1]]):
        added = graph.placeholder(carried.CLOCK)
    added._dynamo_source = ConstantSource(source_name=carried.CLOCK)
    added.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    fake = fake_mode.from_tensor(clock, static_shapes=True)
    # Dynamo traced under a fake mode of its own, in which the passes compute; the example inputs have another one.
    values = (p.meta.get("example_value") for p in placeholders)
    traced = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), fake_mode)
    added.meta["example_value"] = fake if traced is fake_mode else traced.from_tensor(clock, static_shapes=True)
    graph.lint()
    copied = fx.GraphModule(gm, graph)
    for name, value in vars(gm).items():
        if name not in vars(copied):
            setattr(copied, name, value)
    copied.meta = gm.meta
    return copied, [*example_inputs, fake]


def _static(gm: fx.GraphModule) -> frozenset[int]:
    """Inputs that Dynamo takes for a module's own: their addresses stay."""
    marks = [p.meta.get("tensor_dict") or {} for p in gm.graph.find_nodes(op="placeholder")]
    return frozenset(i for i, mark in enumerate(marks) if "_dynamo_static_input_type" in mark)


class CarriedGraph:
    """A compiled graph that takes the clock as its last input, and fills it for each call."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        clock: Tensor,
        policy: str,
        schedule: Schedule,
        identity: str,
        on_device: bool,
        static: frozenset[int] = frozenset(),
    ) -> None:
        self.compiled = compiled
        self.clock = clock
        self.policy = policy
        self.schedule = schedule
        self.identity = identity
        self.on_device = on_device
        self.static = static
        self.frame = _frame()
        self._own: list[int] | None = None
        self._shown: tuple[int, ...] | None = None
        self._lasting: dict[Hashable, _Lasting] = {}

    def __call__(self, *args: Any) -> Any:
        """Run the graph, as a step of the open generation if there is one."""
        scope = generations.innermost()
        if scope is None or _capturing(self.clock):
            self._say_stateless(scope is not None)
            return self._outside(args)
        if not self._own_places(args):
            _warn_once(
                f"{self._label()} has no parameters or buffers of its own, so that nothing tells the layers that share "
                "it apart: no masks are carried over steps there. Compile the module that holds the weights."
            )
            return self._outside(args)
        key, anchors = self._key(args)
        calls = scope.calls_of(key, lambda s: self._carrier(s, key, anchors), anchors, self._label())
        with calls.next() as carrier:
            if self.on_device:
                self._lasting[key].belongs_to(scope)
            return self._run(carrier, args)

    def _outside(self, args: tuple[Any, ...]) -> Any:
        if not self.on_device:
            return self._run(None, args)
        # A captured graph may be replayed: it has to be the same one as within a generation.
        key, anchors = self._key(args)
        if key not in self._lasting:
            self._make_lasting(key, anchors, 1, 2)
        carrier = self._lasting[key].carrier
        carrier.begin(0, 0)
        return self._run(carrier, args)

    def _run(self, carrier: Carrier | None, args: tuple[Any, ...]) -> Any:
        if carrier is not None:
            self._show(carrier.clock(self.policy, self.schedule))
        if carrier is None or not carrier.on_device:
            with carried.using(carrier):
                return self.compiled(*args, self.clock)
        if carrier.branch >= carrier.branches:
            raise ValueError(
                f"{self._label()} is called in branch {carrier.branch + 1}, but its CUDA graph was captured for "
                f"{carrier.branches}; give generation(..., branches={carrier.branch + 1}) from the first call on."
            )
        known = len(carrier.slots)
        with carried.using(carrier):
            result = self.compiled(*args, self.clock)
        if len(carrier.slots) != known:
            carrier.settle()
        return result

    def _show(self, numbers: tuple[int, ...]) -> None:
        """Set the clock in place, on the device's stream: at its address a captured graph reads it."""
        if numbers == self._shown:
            return
        self._shown = numbers
        for place, number in enumerate(numbers):
            self.clock[place].fill_(number)

    # --- who carries --------------------------------------------------------------------------------------------------
    def _key(self, args: tuple[Any, ...]) -> tuple[Hashable, tuple[Any, ...]]:
        """What tells states apart, and the objects whose ids it is made of."""
        anchors = tuple(args[i] for i in self._own_places(args))
        return (self.identity, self.frame, *map(id, anchors)), anchors

    def _own_places(self, args: tuple[Any, ...]) -> list[int]:
        """Which arguments are a module's own tensors: parameters, and what Dynamo marks as static (buffers)."""
        if self._own is None:  # the same places at every call: Dynamo guards the types of a graph's inputs
            self._own = [i for i, x in enumerate(args) if isinstance(x, nn.Parameter) or i in self.static]
        return self._own

    def _carrier(self, scope: generations.Scope, key: Hashable, anchors: tuple[Any, ...]) -> Carrier:
        self.schedule.phase(self.policy, 1, scope.num_steps)  # raises where the schedule does not fit the generation
        if not self.on_device:
            return Carrier(scope.num_steps, scope.branches)
        if key not in self._lasting:
            self._make_lasting(key, anchors, scope.num_steps, max(2, scope.branches))
        return self._lasting[key].carrier

    def _make_lasting(self, key: Hashable, anchors: tuple[Any, ...], num_steps: int, branches: int) -> None:
        self._lasting[key] = _Lasting(Carrier(num_steps, branches, on_device=True))
        # Through a weak reference: a finalizer must not keep a graph that is gone, and its memory, alive.
        if anchors:
            weakref.finalize(anchors[0], _forget_lasting, weakref.ref(self), key)

    def _label(self) -> str:
        return f"the compiled model (frame {self.frame})" if self.frame is not None else "the compiled model"

    def _say_stateless(self, within: bool) -> None:
        if within:
            _warn_once("a CUDA graph is captured around a compiled model: masks are not carried over steps in it.")
        elif self.policy == "adaspa":
            _warn_once(
                "policy 'adaspa' runs outside blade_compile.generation(num_steps=...): masks are searched at every "
                "call, which is right but slower."
            )
        else:
            _warn_once(
                "dense_steps and sparsity_steps have no effect outside blade_compile.generation(num_steps=...): "
                "nothing there says which step it is."
            )


def _forget_lasting(graph: weakref.ref[CarriedGraph], key: Hashable) -> None:
    owner = graph()
    if owner is not None:
        owner._lasting.pop(key, None)


class _Lasting:
    """A carrier whose slots captured CUDA graphs refer to: it outlives generations, which take turns in it."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier
        self.owner: weakref.ref[generations.Scope] | None = None
        self.waiting: weakref.WeakKeyDictionary[generations.Scope, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def belongs_to(self, scope: generations.Scope) -> None:
        """Let a generation's state take the place of another's."""
        owner = None if self.owner is None else self.owner()
        self.carrier.num_steps = scope.num_steps
        if owner is scope:
            return
        if owner is not None and owner.calls:  # still open
            self.waiting[owner] = self.carrier.take()
        self.carrier.put(self.waiting.pop(scope, {}))
        self.owner = weakref.ref(scope)


def _needs_gradients(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)


def _new_clock(example_inputs: Sequence[Any]) -> Tensor:
    """On the device of the graph: the first that is not the CPU."""
    devices = [x.device for x in example_inputs if isinstance(x, Tensor)]
    device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    # Dynamo's fake mode is off here; an ordinary tensor also where a model is compiled under inference_mode.
    with torch.inference_mode(False), torch._subclasses.fake_tensor.unset_fake_temporarily():
        return torch.zeros(len(carried.CLOCK_NUMBERS), dtype=torch.int32, device=device)


def _capturing(clock: Tensor) -> bool:
    return clock.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _frame() -> int | None:
    """Dynamo's number of the code that is being compiled: recompilations share it."""
    from torch._guards import CompileContext

    compiling = CompileContext.current_compile_id()
    return None if compiling is None else compiling.frame_id


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
