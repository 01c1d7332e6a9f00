"""A student that is told K: it starts unchanged, K makes a difference, and for one K it folds into the plain model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from blade_compile.distill.adapter_hunyuan_video import HunyuanVideoAdapter
from blade_compile.distill.adapter_ltx import LTXAdapter
from blade_compile.distill.errors import ConfigError
from blade_compile.distill.export import gather, merged
from blade_compile.distill.roles import TRAINED, Roles
from blade_compile.distill.step_condition import StepLinear, add_step_condition, step_layers
from tests.distill import tiny_digits, tiny_families
from tests.distill.test_roles import LORA, family, inputs, made
from tests.distill.tiny_digits import EAGER, eager, kept_graphs

CHOICES = (1, 2, 4)
TOLD = {"method__steps": 4, "method__step_choices": list(CHOICES), "ema__decay": None, **EAGER}
FAMILIES = [*tiny_families.CONFIGS, "digits"]


def told(name: str, folder: Path, lora: object) -> tuple[Roles, tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Roles that are told K, and inputs."""
    if name == "digits":
        return made(folder, lora=lora, **TOLD), inputs()
    return family(name, folder, lora=lora, **TOLD)


def plain_model(name: str) -> nn.Module:
    return tiny_digits.build()[0] if name == "digits" else tiny_families.transformer(name)


def train(roles: Roles) -> None:
    """As if: every trained tensor of the student and of the critic gets other values."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for role in TRAINED:
            for p in roles.parameters(role).values():
                p.add_(0.1 * torch.randn(p.shape, generator=draw))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_it_starts_neutral_knows_k_and_folds(tmp_path: Path, name: str, lora: object) -> None:
    roles, (x, time, condition) = told(name, tmp_path, lora)
    assert roles.average is None
    plain = plain_model(name)
    with eager(), torch.no_grad():
        exact = roles.teacher(x, time, condition)
        for k in CHOICES:
            for call in (roles.student, roles.critic):
                torch.testing.assert_close(call(x, time, condition, steps=k), exact, rtol=0, atol=0)
        train(roles)
        outs = {k: roles.student(x, time, condition, steps=k) for k in CHOICES}
        critic = roles.critic(x, time, condition, steps=4)
        assert len({float(out.sum()) for out in (*outs.values(), critic, exact)}) == 5
        torch.testing.assert_close(roles.teacher(x, time, condition), exact, rtol=0, atol=0)

        for k in CHOICES:
            tensors = gather(roles.module("student"), roles.folded(k))
            if lora is not None:
                tensors = merged(roles.module("student"), tensors, "student")
            plain.load_state_dict(tensors)  # strict: no more names and no fewer than the plain model's
            out = roles.adapter.call(plain, x, time, condition, roles.config.method.embedded_guidance)
            torch.testing.assert_close(out, outs[k], rtol=1e-4, atol=1e-5 * float(exact.abs().max() + 1))


def test_the_biases_of_every_k_replace_the_exported_one(tmp_path: Path) -> None:
    roles, (x, time, condition) = made(tmp_path, **TOLD | {"ema__decay": 0.9}), inputs()
    train(roles)
    roles.update_average(3)
    biases = roles.step_biases()
    assert sorted(biases) == [f"{k}.time.2.bias" for k in CHOICES]
    plain = plain_model("digits")
    plain.load_state_dict(gather(roles.module("student"), roles.folded(4)))
    with eager(), torch.no_grad(), roles.averaged():
        for k in CHOICES:
            plain.load_state_dict({"time.2.bias": biases[f"{k}.time.2.bias"]}, strict=False)
            wanted = roles.student(x, time, condition, steps=k)
            torch.testing.assert_close(plain(x, time, condition["label"]), wanted, rtol=1e-4, atol=1e-5)


def test_one_k_needs_none(tmp_path: Path) -> None:
    roles = made(tmp_path, **EAGER)
    assert roles.step_biases() == {} and not list(step_layers(roles.module("student")))
    assert roles.folded(2).keys() == dict(tiny_digits.build()[0].named_parameters()).keys()


def test_tables_are_trained_with_the_role_and_no_part_of_the_model(tmp_path: Path) -> None:
    roles, (x, time, condition) = told("digits", tmp_path, LORA)
    plain = plain_model("digits").state_dict()
    names = {n.replace(".base_layer", "") for n in roles.module("student").state_dict() if ".lora_" not in n}
    assert names == plain.keys()
    with eager():
        roles.student(x, time, condition, steps=2).square().mean().backward()
    table = roles.parameters("student")["time.2.step_bias.student"]
    assert table.shape == (3, 32) and table.dtype == torch.float32
    assert table.grad is not None and (table.grad.abs().sum(1) > 0).tolist() == [False, True, False]
    assert roles.parameters("critic")["time.2.step_bias.critic"].grad is None


def test_another_k_is_no_other_graph() -> None:
    layer = StepLinear(nn.Linear(4, 4), CHOICES, ["student"])
    with torch.no_grad():
        layer.step_bias["student"].copy_(torch.arange(12.0).view(3, 4))
    compiled = torch.compile(layer, dynamic=False, backend="aot_eager")
    x = torch.randn(2, 4)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    counters.clear()
    for row, k in enumerate(CHOICES):
        layer.tell("student", k)
        torch.testing.assert_close(compiled(x), plain + layer.step_bias["student"][row])
    assert counters["stats"]["unique_graphs"] == 1
    layer.tell(None, None)
    torch.testing.assert_close(compiled(x), plain)


@pytest.mark.slow
def test_time_embeddings_inside_blocks_are_told_in_the_recomputation_too(tmp_path: Path) -> None:
    """DiT has one in each block."""
    found = []
    for recompute in (False, True):
        with kept_graphs():
            roles, given = family("dit", tmp_path, lora=LORA, parallel__activation_checkpointing=recompute, **TOLD)
            train(roles)
            out = roles.student(*given, steps=4)
            roles.critic(*given, steps=1)
            roles.teacher(*given)
            out.square().mean().backward()
        (name,) = (n for n in roles.parameters("student") if "step_bias" in n)
        found.append(roles.parameters("student")[name].grad)
    assert found[0] is not None and found[1] is not None
    assert (found[1].abs().sum(1) > 0).tolist() == [False, False, True]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_the_other_families_have_the_layers_that_their_adapters_name() -> None:
    hunyuan = diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6), in_channels=4, out_channels=4,
    )  # fmt: skip
    found = add_step_condition(hunyuan, HunyuanVideoAdapter.time_layers, CHOICES, ["student"])
    assert "time_text_embed.timestep_embedder.linear_2" in found
    ltx = diffusers.LTXVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, in_channels=4, out_channels=4,
        cross_attention_dim=32, caption_channels=16,
    )  # fmt: skip
    assert add_step_condition(ltx, LTXAdapter.time_layers, CHOICES, ["student"]) == [
        "time_embed.emb.timestep_embedder.linear_2"
    ]
    for name in tiny_families.CONFIGS:
        layers = import_module(f"blade_compile.distill.adapter_{name}").ADAPTER.time_layers
        assert len(add_step_condition(tiny_families.transformer(name), layers, CHOICES, ["student"])) == 1


@pytest.mark.parametrize(
    ("layers", "said"), [(("nowhere",), "no time embedding"), ((), "no time_layers"), (("own",), "no bias")]
)
def test_a_model_that_k_cannot_be_told_to_is_refused(layers: tuple[str, ...], said: str) -> None:
    model = nn.ModuleDict({"own": nn.Linear(4, 4, bias=False)})
    with pytest.raises(ConfigError, match=said):
        add_step_condition(model, layers, CHOICES, ["student"])
