"""Student, critic and teacher: what each computes, what they share, what is trained, what is compiled and when."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from blade_compile.distill.adapters import _cast
from blade_compile.distill.config_sections import LatentConfig
from blade_compile.distill.errors import ConfigError
from blade_compile.distill.role_modules import keep_in_fp32
from blade_compile.distill.roles import TRAINED, Role, Roles
from tests.distill import tiny_digits, tiny_families
from tests.distill.tiny_digits import EAGER, eager, kept_graphs

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8.0}
BOTH = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


@pytest.fixture(autouse=True)
def _kept_graphs() -> Iterator[None]:
    with kept_graphs():
        yield


def made(folder: Path, **changes: Any) -> Roles:
    model, adapter = tiny_digits.build()
    return Roles(tiny_digits.config(folder, **changes), model, adapter, device=CPU)


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(batch, 1, 4, 16, 16, generator=draw)
    return x, torch.rand(batch, generator=draw), {"label": torch.arange(batch)}


def shaken(roles: Roles, role: Role = "student", scale: float = 0.1) -> None:
    """Move what is trained of a role, by the same numbers at each call."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in roles.parameters(role).values():
            p.add_(scale * torch.randn(p.shape, generator=draw))


def storages(tensors: list[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize(
    ("lora", "dense"),
    [
        pytest.param(None, {"sparsity__sparsity": 0.0}, marks=pytest.mark.slow, id="zero"),
        pytest.param(LORA, {"sparsity__when": "never"}, id="never"),
    ],
)
def test_all_start_as_the_dense_module(tmp_path: Path, lora: Any, dense: dict[str, Any]) -> None:
    plain, _ = tiny_digits.build()
    x, time, condition = inputs()
    with torch.no_grad():
        exact = plain(x, time, condition["label"])
    roles = made(tmp_path, lora=lora, **dense)
    for out in (roles.student(x, time, condition, steps=2), roles.critic(x, time, condition, steps=2)):
        assert out.requires_grad and out.dtype == torch.float32
        torch.testing.assert_close(out.detach(), exact, rtol=1e-5, atol=1e-5)
    out = roles.teacher(x, time, condition)
    assert not out.requires_grad
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


@BOTH
def test_the_student_is_the_backend_on_the_plain_module(tmp_path: Path, lora: Any) -> None:
    plain, adapter = tiny_digits.build()
    config = tiny_digits.config(tmp_path, lora=lora)
    options = config.sparsity.options(grid=adapter.token_grid(config.latent))
    x, time, condition = inputs()
    with torch.no_grad():
        sparse = torch.compile(plain, backend="blade", options=options)(x, time, condition["label"])
        dense = plain(x, time, condition["label"])
        roles = made(tmp_path, lora=lora)
        out = roles.student(x, time, condition, steps=2)
        critic = roles.critic(x, time, condition, steps=2)
    torch.testing.assert_close(out, sparse, rtol=1e-4, atol=1e-4)
    assert (out - dense).abs().max() > 100 * (critic - dense).abs().max()
    assert roles.sparsity() == {"sites": 2, "sparsity": pytest.approx(0.5), "asked": 0.5}


@pytest.mark.parametrize("sparse", ["critic", "teacher"])
def test_critic_and_teacher_can_be_sparse(tmp_path: Path, sparse: Role) -> None:
    roles = made(tmp_path, lora=LORA, **{f"sparsity__{sparse}_sparse": True})
    x, time, condition = inputs()
    with torch.no_grad():
        outs = {
            "student": roles.student(x, time, condition, steps=2),
            "critic": roles.critic(x, time, condition, steps=2),
            "teacher": roles.teacher(x, time, condition),
        }
    same = {role: torch.allclose(out, outs["student"], atol=1e-5) for role, out in outs.items()}
    assert same == {"student": True, "critic": sparse == "critic", "teacher": sparse == "teacher"}


def test_one_copy_of_the_base_with_lora_three_without(tmp_path: Path) -> None:
    plain, _ = tiny_digits.build()
    names = dict(plain.named_parameters())
    base = sum(p.numel() * 4 for p in names.values())
    roles = made(tmp_path / "lora", lora=LORA)
    everything = [p for role in (*TRAINED, "teacher") for p in roles.module(role).parameters()]
    adapters = [p for role in TRAINED for p in roles.parameters(role).values()]
    assert sum(storages(everything).values()) == base + sum(storages(adapters).values())
    assert not storages(list(roles.parameters("student").values())).keys() & storages(
        list(roles.parameters("critic").values())
    )
    weight = "blocks.0.attention.qkv.base_layer.weight"
    assert len({roles.module(role).get_parameter(weight).data_ptr() for role in (*TRAINED, "teacher")}) == 1

    roles = made(tmp_path / "full")
    everything = [p for role in (*TRAINED, "teacher") for p in roles.module(role).parameters()]
    assert sum(storages(everything).values()) == 3 * base
    assert roles.parameters("student").keys() == roles.parameters("critic").keys() == names.keys()


@BOTH
def test_gradients_reach_only_the_role(tmp_path: Path, lora: Any) -> None:
    roles = made(tmp_path, lora=lora, method__step_choices=[1, 2], **EAGER)
    calls = {"student": roles.student, "critic": roles.critic}
    x, time, condition = inputs()
    with eager():
        for role in TRAINED:
            shaken(roles, role)
            outs = {other: call(x, time, condition, steps=2) for other, call in calls.items()}
            assert not roles.teacher(x, time, condition).requires_grad
            outs[role].square().mean().backward()
            reached = {other: {n for n, p in roles.parameters(other).items() if p.grad is not None} for other in calls}
            assert reached == {other: set(roles.parameters(role)) if other == role else set() for other in calls}
            assert all(p.grad is None for p in roles.module("teacher").parameters() if not p.requires_grad)
            for p in roles.parameters(role).values():
                assert p.grad is not None and p.grad.abs().sum() > 0
                p.grad = None


@pytest.mark.parametrize("lora", [pytest.param(None, marks=pytest.mark.slow), LORA], ids=["full", "lora"])
def test_switching_compiles_each_role_once(tmp_path: Path, lora: Any) -> None:
    roles = made(tmp_path, lora=lora, method__step_choices=[1, 2])
    x, time, condition = inputs()
    counters.clear()
    seen = []
    for turn in range(10):
        with torch.no_grad():
            roles.student(x, time, condition, steps=2)
        roles.student(x, time, condition, steps=1 + turn % 2)
        roles.critic(x, time, condition, steps=1 + turn % 2).sum().backward()
        roles.teacher(x, time, condition)
        seen.append(counters["stats"]["unique_graphs"])
    assert seen == [seen[0]] * 10
    # Rolling out, the student, the critic, the teacher. Behind adapters the second block's input has a gradient.
    assert seen[0] == (4 if lora is None else 6)
    assert not counters["graph_break"]


def test_recomputation_gives_equal_gradients_whatever_ran_since(tmp_path: Path) -> None:
    """The probe's sample and the role are those of the forward pass."""
    found = []
    for recompute in (False, True):
        roles = made(
            tmp_path,
            lora=LORA,
            method__step_choices=[1, 2],
            parallel__activation_checkpointing=recompute,
            sparsity__blade_options={"min_tokens": 1, "probe_tokens": 4, "seed": 3},
        )
        for role in TRAINED:
            shaken(roles, role)
        x, time, condition = inputs()
        out = roles.student(x, time, condition, steps=2)
        assert roles.sparsity()["sites"] == 2  # also where the first call has gradients
        roles.critic(x, time, condition, steps=1)
        roles.teacher(x, time, condition)
        out.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in roles.parameters("student").items() if p.grad is not None})
        assert all(p.grad is None for p in roles.parameters("critic").values())
    assert found[0].keys() == found[1].keys() and len(found[0]) == 9
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-9, msg=name)


def test_recomputation_keeps_less(tmp_path: Path) -> None:
    x, time, condition = inputs()
    sizes = []
    for recompute in (False, True):
        roles = made(tmp_path, parallel__activation_checkpointing=recompute, **EAGER)
        kept = {}

        def pack(t: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t
            return t

        with eager(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            roles.student(x, time, condition, steps=2)
        weights = storages(list(roles.module("student").parameters()))
        sizes.append(sum(s for p, s in storages(list(kept.values())).items() if p not in weights))
    assert sizes[1] < 0.3 * sizes[0]


def test_the_average_follows_and_is_put_in_and_taken_out(tmp_path: Path) -> None:
    roles = made(tmp_path, lora=LORA, ema__decay=0.75, ema__start_step=1, **EAGER)
    name = "blocks.0.attention.qkv.lora_B.student.weight"
    expected = torch.zeros(96, 4)
    assert roles.average is not None
    for step, decay in enumerate([0.0, 1 / 6, 2 / 7, 3 / 8]):
        with torch.no_grad():
            roles.parameters("student")[name].fill_(step + 1)
        roles.update_average(step)
        expected = decay * expected + (1 - decay) * (step + 1)
        torch.testing.assert_close(roles.average[name], expected)
    roles.update_average(1000)
    torch.testing.assert_close(roles.average[name], 0.75 * expected + 0.25 * 4)

    x, time, condition = inputs()
    own = {n: p.detach().clone() for n, p in roles.parameters("student").items()}
    average = {n: t.clone() for n, t in roles.average.items()}
    with eager(), torch.no_grad():
        before = roles.student(x, time, condition, steps=2)
        with roles.averaged():
            assert all(torch.equal(p, average[n]) for n, p in roles.parameters("student").items())
            inside = roles.student(x, time, condition, steps=2)
        assert torch.equal(roles.student(x, time, condition, steps=2), before)
    assert not torch.allclose(inside, before)
    assert all(torch.equal(p, own[n]) for n, p in roles.parameters("student").items())
    assert all(torch.equal(t, average[n]) for n, t in roles.average.items())
    assert roles.folded(2).keys() == average.keys()
    assert all(torch.equal(t, average[n]) for n, t in roles.folded(2).items())


def test_without_an_average_the_student_itself(tmp_path: Path) -> None:
    roles = made(tmp_path, lora=LORA, ema__decay=None, **EAGER)
    shaken(roles)
    roles.update_average(0)
    assert roles.average is None
    with roles.averaged():
        assert all(torch.equal(t, roles.parameters("student")[n]) for n, t in roles.folded(2).items())
    names = {f"{role}.{n}" for role in TRAINED for n in roles.parameters(role)}
    assert roles.state().keys() == names


def test_the_schedule_changes_the_density(tmp_path: Path) -> None:
    roles = made(tmp_path, lora=LORA, sparsity__schedule=[[0, 0.0], [3, 0.5], [5, 0.75]])
    x, time, condition = inputs()
    with torch.no_grad():
        plain = roles.teacher(x, time, condition)
        seen = []
        for step in range(6):
            roles.set_step(step)
            out = roles.student(x, time, condition, steps=2)
            seen.append((roles.sparsity()["asked"], roles.sparsity()["sparsity"]))
            assert torch.allclose(out, plain, atol=1e-5) == (step < 3)
        assert torch.equal(roles.teacher(x, time, condition), plain)
    assert seen == [(s, pytest.approx(s)) for s in (0.0, 0.0, 0.0, 0.5, 0.5, 0.75)]


class CausalAdapter:
    """Of a model that no attention of can be made sparse."""

    family, block_lists, prediction = "causal", (), "flow"

    def token_grid(self, latent: LatentConfig) -> tuple[int, int, int]:
        return 1, 8, 8

    def call(
        self, model: nn.Module, x: Tensor, time: Tensor, condition: dict[str, Any], guidance: float | None = None
    ) -> Tensor:
        out: Tensor = model(x)
        return out


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


def causal(folder: Path, **changes: Any) -> Roles:
    adapter: Any = CausalAdapter()
    return Roles(tiny_digits.config(folder, **changes), Causal().eval(), adapter, device=CPU)


def test_a_model_that_nothing_of_is_rewritten_is_refused(tmp_path: Path) -> None:
    x, time = torch.randn(1, 64, 16), torch.rand(1)
    roles = causal(tmp_path)
    with pytest.raises(ConfigError, match="causal") as refused:
        roles.student(x, time, {}, steps=2)
    assert "sparsity.when=never" in str(refused.value) and "\n" not in str(refused.value)
    with torch.no_grad():
        for dense in ({"sparsity__when": "never"}, {"sparsity__sparsity": 0.0}):
            out = causal(tmp_path, **dense).student(x, time, {}, steps=2)
            assert out.shape == x.shape


def test_options_that_name_layers_mean_the_same_as_in_the_exported_model(tmp_path: Path) -> None:
    """Blocks that share one graph have no names."""
    options = {"min_tokens": 1, "exclude": ["blocks.0.*"]}
    roles = made(tmp_path, sparsity__blade_options=options)
    x, time, condition = inputs()
    with torch.no_grad():
        roles.student(x, time, condition, steps=2)
    assert roles.sparsity()["sites"] == 1
    with pytest.raises(ConfigError, match="blade_options has exclude"):
        made(tmp_path, sparsity__blade_options=options, parallel__activation_checkpointing=True)


def test_a_student_that_falls_back_to_dense_later_is_refused(tmp_path: Path) -> None:
    roles = made(tmp_path)
    x, time, condition = inputs()
    with torch.no_grad():
        roles.student(x, time, condition, steps=2)
        roles.set_step(1)
        with eager(), pytest.raises(ConfigError, match="no attention call"):
            roles.student(x, time, condition, steps=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel__mixed_precision": "float16"}, "parallel.mixed_precision is float16"),
        ({"model__dtype": "float16"}, "model.dtype is float16"),
        ({"lora": {"targets": ["to_q"]}}, "no linear layer"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made(tmp_path, **changes)


CLIPS = {"wan": (9, 64, 64), "cogvideox": (9, 64, 64), "flux": (1, 128, 128)}


def family(
    name: str, folder: Path, *, loaded: bool = False, **changes: Any
) -> tuple[Roles, tuple[Tensor, Tensor, dict[str, Any]]]:
    """Roles of a tiny model of diffusers, and inputs of a batch of two; ``loaded``: what diffusers keeps is fp32."""
    frames, height, width = CLIPS.get(name, (1, 128, 128))
    latent = {"num_frames": frames, "height": height, "width": width}
    guided = {"method__embedded_guidance": 3.5, "method__cfg_scale": 1.0} if name == "flux" else {}
    config = tiny_digits.config(folder, latent=latent, **guided, **changes)
    adapter = import_module(f"blade_compile.distill.adapter_{name}").ADAPTER(
        tiny_families.CONFIGS[name][1], tiny_families.SCHEDULERS[name]
    )
    dtype = getattr(torch, config.model.dtype)
    model = tiny_families.transformer(name).requires_grad_(False)
    if loaded:
        _cast(model, dtype)
    else:
        model.to(dtype)
    draw = torch.Generator().manual_seed(9)
    embeddings = adapter.example_embeddings(2, dtype)
    for key in embeddings.keys() & {"prompt_embeds", "prompt_attention_mask"}:
        embeddings[key] = embeddings[key][:, :16]
    for key, tensor in embeddings.items():
        if tensor.is_floating_point() and "mask" not in key:
            embeddings[key] = torch.randn(tensor.shape, generator=draw).to(dtype)
    x = torch.randn(adapter.latent_shape(config.latent, 2), generator=draw)
    given = x, torch.tensor([250.0, 750.0]), adapter.conditions(embeddings, config.latent)
    return Roles(config, model, adapter, device=CPU), given


@pytest.mark.parametrize("name", list(tiny_families.CONFIGS))
@BOTH
def test_mixed_precision_of_every_family(tmp_path: Path, name: str, lora: Any) -> None:
    """Inputs, autocast and weights in bf16 fit together; what is trained stays fp32."""
    exact, (x, time, condition) = family(name, tmp_path, lora=lora, **EAGER)
    low = {"model__dtype": "bfloat16", "parallel__mixed_precision": "bfloat16"}
    roles, given = family(name, tmp_path, lora=lora, parallel__activation_checkpointing=True, **low, **EAGER)
    with eager():
        with torch.no_grad():
            wanted = exact.teacher(x, time, condition)
        out = roles.student(*given, steps=2)
        teacher = roles.teacher(*given)
        out.square().mean().backward()
    assert out.dtype == teacher.dtype == torch.float32
    for found in (out.detach(), teacher):
        assert (found - wanted).norm() < 0.05 * wanted.norm()
    assert {p.dtype for p in roles.parameters("student").values()} == {torch.float32}
    assert sum(p.grad is not None and p.grad.isfinite().all() for p in roles.parameters("student").values())
    assert {p.dtype for p in roles.module("teacher").parameters() if not p.requires_grad} == {torch.bfloat16}


@BOTH
def test_wans_time_embedding_runs_in_fp32_in_every_role(tmp_path: Path, lora: Any) -> None:
    low = {"model__dtype": "bfloat16", "parallel__mixed_precision": "bfloat16"}
    roles, given = family("wan", tmp_path, loaded=True, lora=lora, **low, **EAGER)
    for role in (*TRAINED, "teacher"):
        embedder: Any = roles.module(role).get_submodule("condition_embedder")
        layers, seen = (embedder.time_embedder.linear_1, embedder.time_embedder.linear_2, embedder.time_proj), []
        hooks = [
            layer.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.dtype)) for layer in layers
        ]
        with eager():
            getattr(roles, role)(*given, **({} if role == "teacher" else {"steps": 2}))
        assert seen == [torch.float32, torch.float32, torch.bfloat16], role
        for hook in hooks:
            hook.remove()


def test_a_kept_layer_compiles_whole_with_adapters() -> None:
    model: Any = tiny_families.transformer("wan")
    _cast(model, torch.bfloat16)
    tiny_families.with_adapter(model, target_modules=["linear_1"])
    (kept,) = keep_in_fp32(model, CPU)
    given = torch.tensor([500.0]), torch.randn(1, 8, 16).bfloat16()
    compiled = torch.compile(model.condition_embedder, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(*given)[:3], model.condition_embedder(*given)[:3])
        assert kept(torch.ones(1, 32)).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_blocks_of_diffusers_run_sparse(tmp_path: Path, name: str) -> None:
    sparse = {"sparsity": 0.5, "block_size": 16, "blade_options": {"min_tokens": 1}}
    more = {"lora": LORA, "method__step_choices": [1, 2], "parallel__activation_checkpointing": True}
    roles, given = family(name, tmp_path, sparsity=sparse, **more)
    out = roles.student(*given, steps=2)
    assert roles.sparsity()["sites"] == 1 and roles.sparsity()["sparsity"] > 0.2
    teacher = roles.teacher(*given)
    out.square().mean().backward()
    assert (out.detach() - teacher).abs().max() > 1e-3
    missing = [n for n, p in roles.parameters("student").items() if p.grad is None]
    assert not missing
