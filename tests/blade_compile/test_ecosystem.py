"""blade with what its users combine it with: diffusers, LoRA, quantised weights, offloading, export, AOTInductor."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import blade_compile
from blade_compile.backend import inductor_options
from blade_compile.kernels import observe
from tests.blade_compile.models import DENSE, HALF, TinyDiT, inputs


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ).eval()  # fmt: skip


def wan_inputs(frames: int = 3, height: int = 16) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(1, 4, frames, height, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, 16),
    }


@pytest.fixture
def events() -> Iterator[list[observe.Event]]:
    with torch.no_grad(), observe.record() as seen:
        yield seen


def attention_runs(events: list[observe.Event]) -> int:
    return sum(event.op == "block_sparse_attention" for event in events)


@pytest.mark.slow
def test_wan_in_place(wan: nn.Module, events: list[observe.Event]) -> None:
    model, kwargs = copy.deepcopy(wan), wan_inputs()
    want = model(**kwargs, return_dict=False)[0]
    model.compile(backend="blade", options=DENSE, fullgraph=True)
    torch.testing.assert_close(model(**kwargs, return_dict=False)[0], want, rtol=1e-4, atol=1e-4)
    assert {event.site for event in events} == {"blocks.0.attn1", "blocks.1.attn1"}


def test_repeated_blocks(wan: nn.Module, events: list[observe.Event]) -> None:
    model, kwargs = copy.deepcopy(wan), wan_inputs()
    want = model(**kwargs, return_dict=False)[0]
    model.compile_repeated_blocks(backend="blade", options=DENSE, fullgraph=True)
    torch.testing.assert_close(model(**kwargs, return_dict=False)[0], want, rtol=1e-4, atol=1e-4)
    assert attention_runs(events) == 2


@pytest.mark.slow
def test_lora_adapter(wan: nn.Module, events: list[observe.Event]) -> None:
    from peft import LoraConfig

    model, kwargs = copy.deepcopy(wan), wan_inputs()
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
    want = model(**kwargs, return_dict=False)[0]
    assert not torch.equal(want, wan(**kwargs, return_dict=False)[0])
    model.compile(backend="blade", options=DENSE, fullgraph=True)
    torch.testing.assert_close(model(**kwargs, return_dict=False)[0], want, rtol=1e-4, atol=1e-4)
    assert attention_runs(events) == 2


@pytest.mark.slow
def test_int8_weights(events: list[observe.Event]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, args = TinyDiT(), inputs()
    quantize_(model, Int8WeightOnlyConfig())
    want = model(*args)
    out = torch.compile(model, backend="blade", options=DENSE)(*args)
    torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)
    assert attention_runs(events) == 2


def test_offloading_hooks(events: list[observe.Event]) -> None:
    from accelerate import cpu_offload_with_hook  # what a pipeline's enable_model_cpu_offload attaches

    model, args = TinyDiT(), inputs()
    want = model(*args)
    model, _ = cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    model.compile(backend="blade", options=DENSE)
    torch.testing.assert_close(model(*args), want, rtol=1e-4, atol=1e-5)
    assert attention_runs(events) == 2


@pytest.mark.slow
def test_export_and_aot_inductor(events: list[observe.Event], tmp_path: Path) -> None:
    model, args = TinyDiT(layers=1), inputs()
    exported = torch.export.export(model, args)
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "model.pt2"), inductor_configs=inductor_options(HALF)
    )
    out = torch._inductor.aoti_load_package(package)(*args)
    assert attention_runs(events) == 1
    compiled = torch.compile(model, backend="blade", options=HALF)(*args)
    torch.testing.assert_close(out, compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_selective_checkpointing_can_name_the_operator() -> None:
    from functools import partial

    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        saved = op is torch.ops.blade.block_sparse_attention.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    block, args = TinyDiT(layers=1), inputs()

    contexts = partial(create_selective_checkpoint_contexts, policy)

    def forward(x: Tensor, text: Tensor) -> Tensor:
        return checkpoint(block, x, text, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]

    with observe.record() as seen:
        torch.compile(forward, backend="blade", options=HALF)(*args).sum().backward()
    assert [event.op for event in seen].count("block_sparse_attention") == 1


def test_gradient_reaches_q_k_v_through_a_compiled_direct_call() -> None:
    q, k, v = (torch.randn(1, 2, 64, 32, requires_grad=True) for _ in range(3))
    config = {"when": "always", "sparsity": 0.5, "block_size": 16}

    def loss(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return blade_compile.sparse_attention(a, b, c, config=config).square().sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    for g, w in zip(got, torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(g, w)
