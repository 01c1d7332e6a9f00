"""Scopes of one generation: state kept apart by model, layer, branch and scope; one compilation; telling errors."""

from __future__ import annotations

import contextvars
import copy
import functools
import gc
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import blade_compile
from blade_compile import carriers, generations
from blade_compile.config import BladeConfig
from blade_compile.kernels import carried, observe, ops  # noqa: F401 (ops registers the operators)
from blade_compile.passes.pipeline import SparseAttentionPass
from blade_compile.settings import settings_of
from tests.blade_compile.models import Attention, TinyDiT, inputs
from tests.kernels.test_carried import SEARCHES, STEPS, PlainAdaSpa

ADASPA = {"policy": "adaspa", "when": "always", "block_size": 16, "sparsity": 0.6, "search_steps": SEARCHES}
SCHEDULED = {
    "when": "always",
    "block_size": 16,
    "probe_tokens": 8,
    "sparsity": 0.7,
    "dense_steps": 2,
    "sparsity_steps": ((5, 0.4),),
}
CARRIED = {"adaspa": ADASPA, "drift": {**ADASPA, "drift": 0.05}, "scheduled": SCHEDULED}


class Backend:
    """blade's rewriting and its carriers without Inductor: graphs run as they are. Counts compilations."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.config = BladeConfig.of(options)
        self.compiled = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.compiled += 1
        config = self.config
        return carriers.carry(
            gm, example_inputs, self.rewrite, policy=config.policy, schedule=config.schedule, identity=config
        )

    def rewrite(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        SparseAttentionPass(settings_of(self.config), "test")(gm.graph)
        gm.recompile()
        return gm


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    carriers._warn_once.cache_clear()
    with torch.no_grad():
        yield
    assert generations._open.get() == () and generations._names._users == 0


def compiled(model: nn.Module, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    return torch.compile(copy.deepcopy(model), backend=Backend(options or ADASPA), fullgraph=True, **kwargs)


def moved(args: tuple[Tensor, ...], step: int, branch: int = 0) -> tuple[Tensor, ...]:
    """The inputs of a step: near those of the step before, and other ones in each branch."""
    turn = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(7 + branch))
    return (args[0] * (1 - 0.3 * branch) + (0.05 * step + branch) * turn, *args[1:])


def loop(call: Callable[..., Tensor], args: tuple[Tensor, ...], steps: int = STEPS, branches: int = 1) -> list[Tensor]:
    """The outputs of a denoising loop."""
    return [call(*moved(args, step, branch)) for step in range(steps) for branch in range(branches)]


def loop_calls(call: Callable[..., Tensor], args: tuple[Tensor, ...], steps: int) -> list[Callable[[], Tensor]]:
    """The calls of a denoising loop, to be made later."""
    return [functools.partial(call, *moved(args, step)) for step in range(steps)]


def generated(call: Callable[..., Tensor], args: tuple[Tensor, ...], branches: int = 1) -> list[Tensor]:
    with blade_compile.generation(STEPS, branches):
        return loop(call, args, branches=branches)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# --- the result ------------------------------------------------------------------------------------------------------


def plain_loop(model: Attention, x: Tensor, branches: int) -> list[Tensor]:
    """A denoising loop with eager AdaSpa."""
    state = [PlainAdaSpa(0.6) for _ in range(branches)]
    outputs = []
    for step in range(STEPS):
        for branch in range(branches):
            (now,) = moved((x,), step, branch)
            q, k, v = (f(now).unflatten(-1, (2, -1)).transpose(1, 2) for f in (model.to_q, model.to_k, model.to_v))
            outputs.append(model.to_out(state[branch].step(step + 1, q, k, v).transpose(1, 2).flatten(2)))
    return outputs


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "clock"])
def test_a_loop_with_guidance_equals_the_plain_algorithm(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "DEVICE_DECIDES", on_device)
    model, x = Attention().double(), torch.randn(1, 90, 64, dtype=torch.float64)
    expected = plain_loop(model, x, 2)
    found = generated(compiled(model), (x,), branches=2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_through_inductor_with_one_compilation() -> None:
    model, x = Attention(), torch.randn(1, 90, 64)
    expected = plain_loop(copy.deepcopy(model).double(), x.double(), 2)
    call = torch.compile(model, backend="blade", options=ADASPA, fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        found = generated(call, (x,), branches=2)
        torch.testing.assert_close(found, [y.float() for y in expected], rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_regional_compilation_through_inductor() -> None:
    model, args = TinyDiT(), inputs()
    whole = generated(compiled(model), args, branches=2)
    torch._dynamo.utils.counters.clear()
    for block in model.blocks:
        block.compile(backend="blade", options=ADASPA, fullgraph=True)
    torch.testing.assert_close(generated(model, args, branches=2), whole, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
def test_cuda_graphs_replay_the_right_step() -> None:
    """Captured once per branch's shape, replayed at every step: the device's clock decides."""
    options = {**ADASPA, "block_size": 64, "mode": "reduce-overhead"}
    model, args = TinyDiT(layers=2).cuda(), tuple(x.cuda() for x in inputs(S=500))
    call = torch.compile(model, backend="blade", options=options, fullgraph=True)
    for _ in range(3):
        found, host = [], []
        plain = compiled(model, {**options, "mode": None})
        with blade_compile.generation(STEPS, 2):
            for step, branch in itertools.product(range(STEPS), range(2)):
                turn = tuple(x.cuda() for x in moved((args[0].cpu(), args[1].cpu()), step, branch))
                torch.compiler.cudagraph_mark_step_begin()
                found.append(call(*turn).clone())
                host.append(plain(*turn))
        torch.testing.assert_close(found, host, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CARRIED)
def test_fifty_steps_compile_once(name: str) -> None:
    backend = Backend(CARRIED[name])
    call = torch.compile(TinyDiT(layers=1), backend=backend, fullgraph=True)
    with blade_compile.generation(50, branches=2):
        loop(call, inputs(), 50, 2)
    assert backend.compiled == 1


@pytest.mark.parametrize("name", CARRIED)
def test_rows_of_a_batch_are_as_alone(name: str) -> None:
    model, args = TinyDiT().double(), tuple(x.double() for x in inputs(B=2))
    turned = generated(compiled(model, CARRIED[name]), args)
    call = compiled(model, CARRIED[name], dynamic=False)
    with blade_compile.generation(STEPS):
        for step in range(STEPS):
            alone = call(*(x[1:] for x in moved(args, step)))
            torch.testing.assert_close(turned[step][1:], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CARRIED)
def test_layers_that_share_a_graph_keep_their_own_masks(name: str) -> None:
    model, args = TinyDiT(layers=3), inputs()
    whole = generated(compiled(model, CARRIED[name]), args, branches=2)
    regional, backend = copy.deepcopy(model), Backend(CARRIED[name])
    for block in regional.blocks:
        block.compile(backend=backend, fullgraph=True)
    assert same(generated(regional, args, branches=2), whole)
    assert backend.compiled == 1  # or this tests nothing


def test_repeated_blocks_of_diffusers() -> None:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(1)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    args = (torch.randn(1, 4, 3, 8, 12), torch.tensor([500]), torch.randn(1, 8, 16))

    def call(model: Any) -> Callable[..., Tensor]:
        return lambda *inputs: model(*inputs, return_dict=False)[0]

    whole = copy.deepcopy(model)
    whole.compile(backend=Backend(ADASPA), fullgraph=True)
    backend = Backend(ADASPA)
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    found, expected = generated(call(model), args, branches=2), generated(call(whole), args, branches=2)
    assert same(found, expected) and backend.compiled == 1
    assert not same(expected, generated(call(whole), args))  # the branches do matter


def test_a_branch_with_other_text_goes_on_counting() -> None:
    """Its length recompiles the model; steps and masks go on."""
    model, (x, text) = TinyDiT(layers=1), inputs()
    backend = Backend(ADASPA)
    call = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    texts = (text, text[:, :5])
    found: list[list[Tensor]] = [[], []]
    with blade_compile.generation(STEPS, branches=2):
        for step in range(STEPS):
            for branch in range(2):
                found[branch].append(call(*moved((x, texts[branch]), step, branch)))
    assert backend.compiled == 2
    for branch in range(2):
        alone = compiled(model, dynamic=False)
        with blade_compile.generation(STEPS):
            want = [alone(*moved((x, texts[branch]), step, branch)) for step in range(STEPS)]
        torch.testing.assert_close(found[branch], want, rtol=1e-4, atol=1e-5)


def test_another_resolution_starts_over_in_its_own_generation() -> None:
    model = TinyDiT(layers=1)
    call = compiled(model, dynamic=True)
    plain = compiled(model, dynamic=False)
    for S in (96, 130, 96):
        args = inputs(S)
        torch.testing.assert_close(generated(call, args), generated(plain, args), rtol=1e-4, atol=1e-5)


def test_two_models_and_two_settings_of_one_model_in_one_scope() -> None:
    model, other, args = TinyDiT(layers=1), TinyDiT(layers=1), inputs()
    wants = [generated(compiled(m, o), args) for m, o in ((model, ADASPA), (other, ADASPA), (model, SCHEDULED))]
    calls = [
        torch.compile(m, backend=Backend(o), fullgraph=True)
        for m, o in ((model, ADASPA), (other, ADASPA), (model, SCHEDULED))
    ]
    found: list[list[Tensor]] = [[], [], []]
    with blade_compile.generation(STEPS):
        for step in range(STEPS):
            for call, outputs in zip(calls, found, strict=True):
                outputs.append(call(*moved(args, step)))
    assert all(map(same, found, wants))


# --- scopes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["host", "clock"])
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, tuple[Tensor, ...]]:
    monkeypatch.setattr(carriers, "DEVICE_DECIDES", request.param)
    return compiled(Attention()), (torch.randn(1, 90, 64),)


def test_generations_repeat(tiny: Any) -> None:
    call, args = tiny
    first = generated(call, args)
    scope = blade_compile.generation(STEPS)
    for _ in range(2):
        with scope:
            assert same(loop(call, args), first)


def test_generations_nest(tiny: Any) -> None:
    call, args = tiny
    want = generated(call, args)
    found = []
    with blade_compile.generation(STEPS):
        for step in range(STEPS):
            found.append(call(*moved(args, step)))
            if step in (1, 4):
                assert same(generated(call, args), want)
    assert same(found, want)


def test_generations_end_in_any_order(tiny: Any) -> None:
    call, args = tiny
    want = generated(call, args)
    outer, inner = blade_compile.generation(STEPS), blade_compile.generation(STEPS)
    outer.__enter__()
    found = [call(*moved(args, step)) for step in range(5)]
    inner.__enter__()
    other = loop(call, args, 4)
    with pytest.raises(ValueError, match="called 5 times"):
        outer.__exit__(None, None, None)  # the inner one goes on
    other += [call(*moved(args, step)) for step in range(4, STEPS)]
    inner.__exit__(None, None, None)
    assert same(other, want) and same(found, want[:5])
    with ExitStack() as stack:
        stack.enter_context(blade_compile.generation(STEPS))
        assert same(loop(call, args), want)


def test_interleaved_generations(tiny: Any) -> None:
    """Two tasks take turns, each in its own context and with its own input."""
    call, args = tiny
    wants = [generated(call, args), generated(call, moved(args, 0, 1))]
    contexts = [contextvars.copy_context() for _ in range(2)]
    scopes = [blade_compile.generation(STEPS) for _ in range(2)]
    found: list[list[Tensor]] = [[], []]
    for context, scope in zip(contexts, scopes, strict=True):
        context.run(scope.__enter__)
    for step in range(STEPS):
        for task, context in enumerate(contexts):
            own = moved(args, 0, 1) if task else args
            found[task].append(context.run(call, *moved(own, step)))
    for context, scope in zip(contexts, scopes, strict=True):
        context.run(scope.__exit__, None, None, None)
    assert all(map(same, found, wants))


def test_threads_have_their_own_generations() -> None:
    call, args = compiled(Attention()), (torch.randn(1, 90, 64),)
    want = generated(call, args)
    turns, results = threading.Barrier(2), {}

    def work(name: int) -> None:
        outputs = []
        with torch.no_grad(), blade_compile.generation(STEPS):
            for step in range(STEPS):
                turns.wait(timeout=60)
                outputs.append(call(*moved(args, step)))
        results[name] = outputs

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    with blade_compile.generation(STEPS):  # not theirs
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert same(results[0], want) and same(results[1], want)


def test_a_failed_generation_leaves_nothing_behind(tiny: Any) -> None:
    call, args = tiny
    want = generated(call, args)

    def failing() -> None:
        with blade_compile.generation(STEPS):
            loop(call, args, 5)
            raise RuntimeError("denoising failed")

    with pytest.raises(RuntimeError, match="denoising"):
        failing()
    assert same(generated(call, args), want)


def test_a_failed_call_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    call, args = compiled(Attention()), (torch.randn(1, 90, 64),)
    want = generated(call, args)
    real, fails = carriers.CarriedGraph._run, [4, 9]

    def flaky(self: Any, carrier: carried.Carrier, inputs: Any) -> Any:
        if fails and carrier.step == fails[0]:
            fails.pop(0)
            raise MemoryError
        return real(self, carrier, inputs)

    monkeypatch.setattr(carriers.CarriedGraph, "_run", flaky)
    found = []
    with blade_compile.generation(STEPS):
        for step in range(STEPS):
            try:
                found.append(call(*moved(args, step)))
            except MemoryError:
                found.append(call(*moved(args, step)))
    assert same(found, want) and not fails


def test_replaced_parameters_are_let_go_and_explained() -> None:
    """As sequential offloading does: new parameter objects at each step."""
    model, args = Attention(), (torch.randn(1, 90, 64),)
    call = torch.compile(model, backend=Backend(ADASPA), fullgraph=True)
    old = weakref.ref(model.to_q.weight)

    def offloaded() -> None:
        with blade_compile.generation(STEPS):
            for step in range(3):
                call(*moved(args, step))
                for layer in model.children():
                    layer.weight = nn.Parameter(layer.weight.detach().clone())
            gc.collect()
            assert old() is None
            scope = generations.innermost()
            assert scope is not None and len(scope.calls) <= 1

    with pytest.raises(ValueError, match=r"parameters.*replaced.*enable_model_cpu_offload"):
        offloaded()


@pytest.mark.parametrize("fails", [False, True])
def test_memory_is_free_after_the_generation(fails: bool) -> None:
    call, args = compiled(TinyDiT()), inputs()
    held: list[weakref.ref[Tensor]] = []
    with ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(RuntimeError))
        with blade_compile.generation(STEPS):
            loop(call, args)
            scope = generations.innermost()
            assert scope is not None
            for calls in scope.calls.values():
                held += [weakref.ref(x) for slot in calls.carrier.slots.values() for _, x in slot.tensors()]
            del scope, calls
            if fails:
                raise RuntimeError
    gc.collect()
    assert len(held) == 4 and all(ref() is None for ref in held)


def test_parameters_may_go_while_a_captured_carrier_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "DEVICE_DECIDES", True)
    made: list[carriers.CarriedGraph] = []
    real = carriers.CarriedGraph.__init__

    def remember(self: Any, *args: Any) -> None:
        made.append(self)
        real(self, *args)

    monkeypatch.setattr(carriers.CarriedGraph, "__init__", remember)
    call, args = compiled(Attention()), (torch.randn(1, 90, 64),)
    generated(call, args)
    assert len(made[0]._lasting) == 1
    del call
    torch._dynamo.reset()
    gc.collect()
    assert not made[0]._lasting


# --- branches that diffusers names -----------------------------------------------------------------------------------


def test_names_of_cache_context_are_branches() -> None:
    from diffusers.models.cache_utils import CacheMixin

    class Named(Attention, CacheMixin):
        pass

    original = CacheMixin.__dict__["cache_context"]
    model, x = Named(), torch.randn(1, 90, 64)
    want = generated(compiled(model), (x,), branches=2)
    call, found = compiled(model), []
    with blade_compile.generation(STEPS):
        assert CacheMixin.__dict__["cache_context"] is not original
        for step in range(STEPS):
            for branch, name in enumerate(("cond", "uncond")):
                with call.cache_context(name):
                    found.append(call(*moved((x,), step, branch)))
        with pytest.raises(ValueError, match=r"branch 'cond'.*13 times.*after 12 calls"), call.cache_context("cond"):
            call(x)
    assert same(found, want)
    assert CacheMixin.__dict__["cache_context"] is original

    def one_short() -> None:
        with blade_compile.generation(STEPS):
            for step, name in itertools.product(range(STEPS), ("cond", "uncond")):
                if (step, name) != (STEPS - 1, "uncond"):
                    with call.cache_context(name):
                        call(x)

    with pytest.raises(ValueError, match=r"branch 'uncond'.*11 times.*num_steps=12.*num_steps=11"):
        one_short()


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 2.0, "50", None, True])
@pytest.mark.parametrize("name", ["num_steps", "branches"])
def test_bad_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        blade_compile.generation(**{"num_steps": 5, name: value})


def test_wrong_counts_say_both_numbers(tiny: Any) -> None:
    call, args = tiny
    with (
        pytest.raises(ValueError, match=r"13 times.*num_steps=12, branches=1.*12 calls.*branches=2"),
        blade_compile.generation(STEPS),
    ):
        loop(call, args, STEPS + 1)
    with (
        pytest.raises(ValueError, match=r"10 times.*num_steps=12, branches=1.*12 calls"),
        blade_compile.generation(STEPS),
    ):
        loop(call, args, STEPS - 2)
    with (
        pytest.raises(ValueError, match=r"23 times.*24 calls.*23 calls don't divide into 2 branches"),
        blade_compile.generation(STEPS, branches=2),
    ):
        loop(call, args, 2 * STEPS - 1)
    with (
        pytest.raises(ValueError, match=r"12 times.*24 calls.*fit branches=1"),
        blade_compile.generation(STEPS, branches=2),
    ):
        loop(call, args)
    with pytest.raises(ValueError, match=r"\(3, 7\).*num_steps=5.*step 7"), blade_compile.generation(5):
        loop(call, args, 5)


def test_two_experts_may_share_the_steps() -> None:
    high, low = compiled(Attention()), compiled(Attention())
    args = (torch.randn(1, 90, 64),)
    with blade_compile.generation(STEPS):
        loop(high, args, 7)
        loop(low, args, STEPS - 7)
    runs = [*loop_calls(high, args, 7), *loop_calls(low, args, STEPS - 6)]
    with pytest.raises(ValueError, match="12 calls"), blade_compile.generation(STEPS):
        [run() for run in runs]


def test_a_shared_graph_without_weights_carries_nothing() -> None:
    """Layers that share it could not be told apart: one layer's mask must never serve another."""
    call = torch.compile(F.scaled_dot_product_attention, backend=Backend(ADASPA), fullgraph=True)
    layers = [tuple(torch.randn(1, 2, 90, 32) for _ in range(3)) for _ in range(2)]
    alone = [call(*layer) for layer in layers]
    with blade_compile.generation(3):
        for _ in range(3):
            assert same([call(*layer) for layer in layers], alone)


def test_models_without_state_are_not_counted() -> None:
    text_encoder = compiled(nn.Linear(4, 4))
    dense = compiled(Attention(), {"policy": "dense"})
    short = compiled(Attention(), {**ADASPA, "when": "auto"})
    call, args = compiled(Attention()), (torch.randn(1, 90, 64),)
    with blade_compile.generation(STEPS):
        text_encoder(torch.randn(1, 4))
        dense(*args)
        short(*args)
        loop(call, args)


@pytest.mark.parametrize(("name", "words"), [("adaspa", "searched at every call"), ("scheduled", "have no effect")])
def test_outside_a_generation_it_says_so_once(name: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    call, args = compiled(Attention(), CARRIED[name]), (torch.randn(1, 90, 64),)
    with caplog.at_level(logging.WARNING, "blade_compile"), observe.record() as events:
        outputs = loop(call, args, 3)
    said = [r.getMessage() for r in caplog.records if r.name == "blade_compile"]
    assert len(said) == 1 and words in said[0] and "blade_compile.generation" in said[0]
    assert [e.path for e in events if e.op == "mask_predict"].count("reuse") == 0
    assert len([e for e in events if e.op == "mask_predict" and e.density < 0.6]) == 3
    assert torch.equal(call(*moved(args, 2)), outputs[2])  # nothing is remembered


def test_training_carries_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, args = Attention(), (torch.randn(1, 90, 64),)
    call = torch.compile(model, backend=Backend(ADASPA), fullgraph=True)
    with (
        caplog.at_level(logging.WARNING, "blade_compile"),
        observe.record() as events,
        blade_compile.generation(STEPS),
        torch.enable_grad(),
    ):
        for _ in range(2):
            call(*args).sum().backward()
    assert "no_grad" in caplog.text and model.to_q.weight.grad is not None
    assert {e.path for e in events if e.op == "mask_predict"}.isdisjoint({"reuse"})


def test_another_torch_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("_dynamo_source")

    monkeypatch.setattr(carriers, "with_clock", missing)
    args = (torch.randn(1, 90, 64),)
    with caplog.at_level(logging.WARNING, "blade_compile"), blade_compile.generation(STEPS):
        for _ in range(2):
            compiled(Attention())(*args)
    assert len(caplog.records) == 1 and "_dynamo_source" in caplog.text and "every call" in caplog.text


def test_the_clock_is_a_static_input_and_dynamos_graph_stays_as_it_is() -> None:
    """The self-test of the private fields: what Inductor is told is what Dynamo tells it of a module's buffer."""
    seen: dict[str, Any] = {}

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        before = [node.name for node in gm.graph.nodes]
        clock = carriers._new_clock(example_inputs)
        copied, more = carriers.with_clock(gm, example_inputs, clock)
        assert [node.name for node in gm.graph.nodes] == before
        placeholders = copied.graph.find_nodes(op="placeholder")
        assert placeholders[-1].name == carried.CLOCK and len(placeholders) == len(more) == len(example_inputs) + 1
        assert more[-1].shape == clock.shape and more[-1].dtype == torch.int32

        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(graph: fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
            seen["static"] = set(kwargs["static_input_idxs"])
            seen["clock"] = len(inputs) - 1
            return compile_fx_inner(graph, inputs, **kwargs)

        run = compile_fx(copied, more, inner_compile=inner)
        return lambda *args: run(*args, clock)

    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert seen["clock"] in seen["static"]
