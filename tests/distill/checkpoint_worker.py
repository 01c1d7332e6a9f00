"""Processes that test_checkpoints.py starts: writers to kill, a writer on a full disk, ranks. They answer in JSON."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from blade_compile.distill import checkpoints
from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.randomness import generator

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def content(step: int, size: int = 1000) -> dict[str, Tensor]:
    """What the checkpoint of a step holds."""
    numbers = generator(step, "checkpoint")
    return {
        "student.weight": torch.randn(size, 7, generator=numbers),
        "student.half": torch.randn(3, 5, generator=numbers).bfloat16(),
        "optimizer.step": torch.tensor(float(step)),
        "empty": torch.zeros(0, 3),
        "count": torch.tensor([step, 2**60]),
    }


def record_of(step: int) -> dict[str, Any]:
    return {"samples": step * 16, "loss": 0.1 * step, "names": ["a", None]}


def save(folder: Path, step: int, size: int = 1000, keep_last: int = 2) -> Path:
    return checkpoints.save(folder, step, content(step, size), record_of(step), keep_last=keep_last)


def _say(answer: object) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _child(work: Any) -> int:
    """Fork: starting Python and torch for each of many writers would take minutes."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def kill_at_random(folder: Path) -> None:
    """For each line read, a child that saves without end; its pid goes out, and the reader kills it."""

    def work() -> None:
        last = checkpoints.choose(folder, "auto")
        step = checkpoints.read_record(last)["step"] if last else 0
        while True:
            step += 1
            save(folder, step, size=100_000)

    for _ in sys.stdin:
        child = _child(work)
        _say(child)
        os.waitpid(child, 0)


def kill_before(folder: Path) -> None:
    """Steps 1, 2, 2 and 3, killed before the first file operation after step 1, before the second, and so on."""
    for count in range(1, 1000):
        place = folder / str(count)
        save(place, 1)

        def work(count: int = count, place: Path = place) -> None:
            left = [count]

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                if event in FILE_EVENTS and str(place) in str(arguments[0]):
                    left[0] -= 1
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            for step in (2, 2, 3):
                save(place, step, keep_last=1)
                (place / "done").write_text(str(step))
            os._exit(0)

        _, status = os.waitpid(_child(work), 0)
        if os.WIFEXITED(status):
            _say({"points": count - 1, "exit": os.WEXITSTATUS(status)})
            return


def _outcome(work: Any) -> str:
    try:
        work()
    except (DataError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def _limit(size: int) -> None:
    """No file may become larger, which is how a full disk looks."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def full_disk(folder: Path) -> None:
    outcomes: list[Any] = [_outcome(lambda: save(folder, 1))]
    for size in (0, 100, 20_000):  # the first file, within its header, within its data
        _limit(size)
        outcome = _outcome(lambda: save(folder, 2))
        _limit(resource.RLIM_INFINITY)
        outcomes.append([outcome, str(checkpoints.choose(folder, "auto")), [path.name for path in folder.iterdir()]])
    outcomes.append(_outcome(lambda: save(folder, 3)))
    _say(outcomes)


def no_permission(folder: Path) -> None:
    """As a user who may not write there."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    _say([_outcome(lambda: save(folder, 1))])


def sharded(whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, some of them spread over the ranks: by rows, by columns, unevenly, not at all."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    places = {"rows": Shard(0), "uneven": Shard(0), "one_row": Shard(0), "columns": Shard(1), "copies": Replicate()}
    return {
        name: distribute_tensor(tensor.clone(), mesh, [places[name]]) if name in places else tensor.clone()
        for name, tensor in whole.items()
    }


def whole_tensors() -> dict[str, Tensor]:
    """What the ranks' tests save and load."""
    numbers = generator(0, "whole")
    shapes = {"rows": (8, 3), "uneven": (5, 4), "one_row": (1, 6), "columns": (4, 6), "copies": (3,), "plain": (7, 2)}
    drawn: dict[str, Tensor] = {name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()}
    return {**drawn, "scalar": torch.tensor(3.5), "half": torch.randn(9, generator=numbers).bfloat16()}


def _gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def _equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


def _zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def _trained() -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model sharded by FSDP2 after two steps of AdamW, and its state as plain names."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    state: dict[str, Tensor] = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        state |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return model, state


def ranks(folder: Path) -> None:
    """Two ranks: what one process saved is in ``one``; what they save goes to ``two``, ``to one``, ``fsdp``."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    whole, results = whole_tensors(), {}
    mine = sharded(whole)
    for target in ("two", "to one"):
        checkpoints.save(folder / target, 1, mine, record_of(1), keep_last=2)
    for source in ("one", "two"):
        empty = _zeros(mine)
        chosen = checkpoints.choose(folder / source, "auto")
        assert chosen is not None
        record = checkpoints.load(chosen, empty)
        results[source] = [_equal(_gathered(empty), whole), record == {**record_of(1), "step": 1}]

    _, state = _trained()
    path = checkpoints.save(folder / "fsdp", 1, state, {}, keep_last=2)
    torch.save({name: tensor.clone() for name, tensor in _gathered(state).items()}, folder / f"fsdp-{rank}.pt")
    before = {name: tensor.detach().clone() for name, tensor in _gathered(state).items()}
    with torch.no_grad():
        for tensor in state.values():
            tensor.zero_()
    checkpoints.load(path, state)
    results["fsdp"] = [_equal(_gathered(state), before)]

    _limit(50 if rank == 1 else resource.RLIM_INFINITY)
    results["full on one rank"] = [_outcome(lambda: checkpoints.save(folder / "two", 2, mine, {}, keep_last=2))]
    _limit(resource.RLIM_INFINITY)
    results["chosen then"] = [str(checkpoints.choose(folder / "two", "auto"))]
    results["next save"] = [_outcome(lambda: checkpoints.save(folder / "two", 3, mine, {}, keep_last=1))]

    other = {**mine, **({"more": torch.zeros(2)} if rank == 1 else {})}
    results["misfit on one rank"] = [_outcome(lambda: checkpoints.load(folder / "two" / "step_00000003", other))]
    if rank == 0:
        damaged = max((folder / "two" / "step_00000003").glob("*.safetensors"))
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    dist.barrier()
    results["damaged"] = [_outcome(lambda: checkpoints.choose(folder / "two", "auto"))]
    _say(results)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    modes = (kill_at_random, kill_before, full_disk, no_permission, ranks)
    {mode.__name__: mode for mode in modes}[sys.argv[1]](Path(sys.argv[2]))
