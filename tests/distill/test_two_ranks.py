"""Two processes that share the work give what one gives with twice the batch, sharded or not."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blade_compile.distill.trainer import train
from tests.distill.tiny_digits import EAGER, command, config, eager, losses, start

CHANGES: dict[str, Any] = {
    **EAGER, "loop__max_steps": 4, "method__eta": 0.9, "method__regression_updates": 1, "loop__sample_every": 4,
}  # fmt: skip
WEIGHTS = "run/export/transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank with a batch of 4."""
    folder = tmp_path_factory.mktemp("one")
    with eager():
        assert train(config(folder, **CHANGES, loop__batch_size=4)) == 0
    return folder


def _two(folder: Path, **changes: Any) -> list[str]:
    """Two gloo ranks with a batch of 2 each, started as torchrun starts them. Returns what they said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"TORCHDYNAMO_DISABLE": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = command(folder, **{**CHANGES, "loop__batch_size": 2, **changes})
    both = [start(arguments, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return said


@pytest.mark.parametrize("fsdp", [True, False])
def test_two_ranks_are_one_with_twice_the_batch(fsdp: bool, one: Path, tmp_path: Path) -> None:
    first, second = _two(tmp_path, parallel__fsdp=fsdp)
    assert "step 4/4" in first and "step" not in second  # the first rank speaks
    for alone, shared in zip(losses(one), losses(tmp_path), strict=True):
        assert shared == pytest.approx(alone, rel=2e-3)
    mine, theirs = load_file(tmp_path / WEIGHTS), load_file(one / WEIGHTS)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=2e-3, atol=2e-4)
    assert len(list((tmp_path / "run/samples/step_00000004").glob("*.gif"))) == 2


def test_one_rank_goes_on_from_two(one: Path, tmp_path: Path) -> None:
    _two(tmp_path, loop__max_steps=2)
    (tmp_path / "run" / "export").rename(tmp_path / "early")
    with eager():
        assert train(config(tmp_path, **CHANGES, loop__batch_size=4)) == 0
    for alone, shared in zip(losses(one), losses(tmp_path), strict=True):
        assert shared == pytest.approx(alone, rel=2e-3)
