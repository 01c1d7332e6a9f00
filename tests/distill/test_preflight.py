"""What is checked before a training, without one."""

from __future__ import annotations

import shutil
import types
from pathlib import Path

import pytest
import torch

from blade_compile.distill import preflight
from blade_compile.distill.config import load
from blade_compile.distill.errors import ConfigError, DataError
from tests.distill import tiny_digits


def test_a_disk_that_is_too_small_for_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = load("digits", ["loop.keep_last=2", "loop.max_steps=10", "loop.checkpoint_every=2"]).loop
    tensors = {"student.a": torch.zeros(200, dtype=torch.float32), "step": torch.zeros(())}
    disk = types.SimpleNamespace(free=3 * 804)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    folder = tmp_path / "run" / "checkpoints"
    preflight.check_space(folder, tensors, loop)
    disk.free -= 1
    with pytest.raises(DataError, match=r"3 checkpoints of .* lower loop.keep_last") as said:
        preflight.check_space(folder, tensors, loop)
    assert "\n" not in str(said.value)
    preflight.check_space(folder, tensors, loop.model_copy(update={"max_steps": 4}))  # only two are ever made
    folder.mkdir(parents=True)
    (folder / "old").write_bytes(b"1")  # is removed in the course of the run
    preflight.check_space(folder, tensors, loop)


def test_options_by_layer_need_blocks_that_are_compiled_apart(tmp_path: Path) -> None:
    options = {"min_tokens": 1, "exclude": ["blocks.0.*"]}
    _, adapter = tiny_digits.build()
    config = tiny_digits.config(tmp_path, sparsity__blade_options=options)
    assert preflight.check_settings(config, adapter).keys() == {2}
    with pytest.raises(ConfigError, match="blade_options has exclude"):
        preflight.check_settings(config, adapter, world=2)
    copies = tiny_digits.config(tmp_path, sparsity__blade_options=options, parallel__fsdp=False)
    assert preflight.check_settings(copies, adapter, world=2)
