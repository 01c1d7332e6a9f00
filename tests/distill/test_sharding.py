"""Two ranks are one: outputs, gradients, updates and averages, sharded (FSDP2) or copied, on the CPU over gloo.

``python -m tests.distill.test_sharding RANK WORLD FILE CHANGES`` is one rank: two steps of critic and student.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from blade_compile.distill.export import gather
from blade_compile.distill.optimizers import Optimizer
from blade_compile.distill.role_modules import keep_in_fp32, sharded_parts
from blade_compile.distill.roles import TRAINED, Role, Roles
from blade_compile.distill.sharding import shard, whole
from tests.distill import tiny_digits, tiny_families
from tests.distill.tiny_digits import eager

CASES: dict[str, dict[str, Any]] = {
    # compiled, sparse
    "lora": {"lora": {"rank": 4, "alpha": 8.0}, "parallel__activation_checkpointing": True},
    # not compiled, which the sharding has no part in
    "full": {"sparsity__when": "never"},
    "copies": {"sparsity__when": "never", "parallel__fsdp": False, "lora": {"rank": 4}},
}


@dataclass
class Rank:
    """One rank's roles, and its passes: equally large for one rank and for two, so that they share compiled graphs."""

    roles: Roles
    passes: list[tuple[Tensor, Tensor, dict[str, Tensor]]]
    found: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        common, roles = self.roles.config.optimizer, self.roles
        rule = {"student": common.student, "critic": common.critic}
        self.optimizers = {
            role: Optimizer(roles.parameters(role), rule[role], common, 10, replicated=roles.replicated)
            for role in TRAINED
        }

    def steps(self) -> None:
        """Two steps of critic and student."""
        for step in range(2):
            self.roles.set_step(step)
            self.update("critic", step, self.critic_loss)
            self.update("student", step, self.student_loss)
            self.roles.update_average(step)

    def update(self, role: Role, step: int, loss_of: Callable[..., tuple[Tensor, Tensor]]) -> None:
        outs = []
        for given in self.passes:
            out, loss = loss_of(*given)
            (loss / len(self.passes)).backward()
            outs.append(out.detach())
        self.found[f"{role}{step}"] = gathered(torch.cat(outs))
        if not self.roles.replicated:  # their gradients are averaged only in the update
            gradients = {n: p.grad for n, p in self.roles.parameters(role).items() if p.grad is not None}
            self.found |= {f"gradient{step}/{role}/{n}": whole(g).clone() for n, g in gradients.items()}
        self.found[f"norm{step}/{role}"] = torch.tensor(self.optimizers[role].update(step))

    def critic_loss(self, x: Tensor, time: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            rolled = self.roles.student(x, time, condition, steps=4)
        out = self.roles.critic(rolled, time, condition, steps=4)
        return out, out.square().mean()

    def student_loss(self, x: Tensor, time: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        out = self.roles.student(x, time, condition, steps=4)
        teacher = self.roles.teacher(x, time, condition)
        with torch.no_grad():
            critic = self.roles.critic(x, time, condition, steps=4)
        return out, (out - (teacher - critic + 0.9 * out.detach())).square().mean()

    @torch.no_grad()
    def end(self) -> None:
        """What the student gives at the end, and all that is kept of it."""
        roles, found = self.roles, self.found
        found["own"] = self.sample()
        with roles.averaged():
            found["averaged"] = self.sample()
        found |= {f"state/{n}": whole(t) for n, t in roles.state().items()}
        for role, optimizer in self.optimizers.items():
            found |= {f"{role}/{n}": whole(t) for n, t in optimizer.state().items()}
        found |= {f"bias/{n}": t for n, t in roles.step_biases().items()}
        found |= {f"export/{n}": t for n, t in gather(roles.module("student"), roles.folded(4)).items()}

    def sample(self) -> Tensor:
        return gathered(torch.cat([self.roles.student(*given, steps=2) for given in self.passes]))


def samples() -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Two passes of two samples."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(4, 1, 4, 16, 16, generator=draw)
    time = torch.rand(4, generator=draw)
    label = torch.arange(4)
    return [(x[i : i + 2], time[i : i + 2], {"label": label[i : i + 2]}) for i in (0, 2)]


def gathered(tensor: Tensor) -> Tensor:
    """All ranks' samples."""
    if not dist.is_initialized():
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def main(rank: int, world: int, file: str, changes: dict[str, Any]) -> None:
    mesh = None
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        mesh = dist.init_device_mesh("cpu", (world,))
    told = {"method__steps": 4, "method__step_choices": [1, 2, 4]}
    config = tiny_digits.config(Path(file).parent, **told, **changes)
    model, adapter = tiny_digits.build()
    roles = Roles(config, model, adapter, device=torch.device("cpu"), mesh=mesh)
    plain = config.sparsity.when == "never"
    one = Rank(roles, [given for i, given in enumerate(samples()) if i % world == rank])
    with eager() if plain else nullcontext():
        one.steps()
        one.end()
    assert plain or roles.sparsity()["sites"] == 2
    if mesh is not None:
        shards = {type(p).__name__ for p in roles.module("student").parameters()}
        assert shards == ({"DTensor"} if config.parallel.fsdp else {"Parameter"}), shards
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        save_file({name: t.detach().contiguous().clone() for name, t in one.found.items()}, file)


def run(folder: Path, world: int, changes: dict[str, Any]) -> dict[str, Tensor]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    file = folder / f"of_{world}.safetensors"
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    line = [sys.executable, "-m", "tests.distill.test_sharding"]
    ranks = [
        tiny_digits.start([*line, str(rank), str(world), str(file), json.dumps(changes)], **where)
        for rank in range(world)
    ]
    said = [process.communicate()[0] for process in ranks]
    assert all(process.returncode == 0 for process in ranks), "\n".join(text[-3000:] for text in said)
    return load_file(file)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case != "full" else ()) for case in CASES]
)
def test_two_ranks_are_one(tmp_path: Path, case: str) -> None:
    one, two = (run(tmp_path, world, CASES[case]) for world in (1, 2))
    if CASES[case].get("parallel__fsdp") is False:
        one = {name: t for name, t in one.items() if not name.startswith("gradient")}
    assert one.keys() == two.keys() and len(one) > 50
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert any(not torch.equal(one["own"], one[other]) for other in ("averaged", "student0"))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """This process as the only rank."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def sharded(family: str, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> nn.Module:
    """A family's transformer as a run shards it."""
    model = tiny_families.transformer(family)
    kept = keep_in_fp32(model, torch.device("cpu"))
    kind: Any = import_module(f"blade_compile.distill.adapter_{family}").ADAPTER
    shard(model, sharded_parts(model, kind), mesh, dtype, kept)
    return model


@pytest.mark.parametrize("family", ["dit", "wan"])
def test_a_sharded_transformer_is_the_plain_one(family: str, mesh: DeviceMesh) -> None:
    """DiT's output layer reads its first block's time embedding after the blocks are sharded again."""
    plain, model = tiny_families.transformer(family), sharded(family, mesh)
    outs = [module(**tiny_families.inputs(family), return_dict=False)[0] for module in (plain, model)]
    torch.testing.assert_close(outs[1], outs[0])
    for out in outs:
        out.square().mean().backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(whole(parameter.grad), gradients[name].grad, msg=name)


def test_kept_layers_are_gathered_in_fp32(mesh: DeviceMesh) -> None:
    model: Any = sharded("wan", mesh, torch.bfloat16)
    embedder, seen = model.condition_embedder.time_embedder, []
    for layer in (embedder.linear_1, model.condition_embedder.time_proj):
        layer.register_forward_hook(lambda one, args, out: seen.append((one.weight.dtype, args[0].dtype, out.dtype)))
    given = {name: t.bfloat16() if name != "timestep" else t for name, t in tiny_families.inputs("wan").items()}
    with torch.autocast("cpu", torch.bfloat16):
        model(**given, return_dict=False)[0].float().mean().backward()
    assert seen == [(torch.float32,) * 3, (torch.bfloat16,) * 3]
    assert embedder.linear_1.weight.grad is not None


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
