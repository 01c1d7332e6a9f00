"""Runs that are interrupted from outside, by signals, kill -9 anywhere, a full disk: their losses are the same."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blade_compile.distill.checkpoints import choose
from blade_compile.distill.trainer import train
from tests.distill.tiny_digits import EAGER, command, config, eager, losses, metrics, start

STEPS = 40
CHANGES: dict[str, Any] = {
    **EAGER, "loop__max_steps": STEPS, "loop__checkpoint_every": 2, "loop__keep_last": 2, "method__eta": 0.9,
}  # fmt: skip
NOT_COMPILED = {"TORCHDYNAMO_DISABLE": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, float, float, float]]:
    """What the run gives where nothing interrupts it."""
    folder = tmp_path_factory.mktemp("whole")
    with eager():
        assert train(config(folder, **CHANGES)) == 0
    return losses(folder)


def _start(folder: Path, **changes: Any) -> subprocess.Popen[str]:
    return start(command(folder, **{**CHANGES, **changes}), **NOT_COMPILED)


def _until(process: subprocess.Popen[str], condition: Callable[[], bool], *, over: bool = False) -> None:
    """Wait for something; ``over``: or for a good end."""
    end = time.monotonic() + 120
    while not condition():
        if over and process.poll() == 0:
            return
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the run did not come so far"
        time.sleep(0.005)


def _steps(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def _finish(folder: Path, expected: int = 0, **changes: Any) -> str:
    process = _start(folder, **changes)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == expected, said
    return said


def test_a_signal_checkpoints_and_the_same_command_goes_on(tmp_path: Path, whole: list[Any]) -> None:
    """One run, stopped by each of the three signals in turn."""
    rarely = {"loop__checkpoint_every": 1000}
    reached = 0
    for number, code in ((signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)):
        process = _start(tmp_path, **rarely)
        _until(process, lambda: _steps(tmp_path) > reached)  # noqa: B023
        process.send_signal(number)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == code, said
        assert not reached or f"from step {reached}" in said
        reached = _steps(tmp_path)
        assert f"stopped by {number.name} after step {reached} of {STEPS}, which is not the end" in said
        found = choose(tmp_path / "run" / "checkpoints", "auto")
        assert found is not None and found.name == f"step_{reached:08d}"
    assert f"from step {reached}" in _finish(tmp_path, **rarely)
    assert losses(tmp_path) == whole


def test_a_second_sigint_is_not_waited_for(tmp_path: Path) -> None:
    """Both arrive while one step is being made, which here never ends."""
    code = (
        "import sys, time\n"
        "from blade_compile.distill import cli, trainer\n"
        "def stuck(self):\n"
        "    print('stuck', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
        "trainer.Trainer._step = stuck\n"
        "sys.argv[:] = ['blade-distill', *sys.argv[1:]]\n"
        "sys.exit(cli.main())\n"
    )
    arguments = command(tmp_path, **CHANGES)
    process = start([arguments[0], "-c", code, *arguments[3:]], **NOT_COMPILED)
    assert process.stdout is not None
    while "stuck" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


def _killed_at_random(folder: Path, kills: int, seed: int) -> int:
    """Kill the run at random moments, some of them inside a checkpoint's writing. Returns how many were inside."""
    draw, inside = random.Random(seed), 0
    for _ in range(kills):
        process = _start(folder)
        before = _steps(folder)
        if draw.random() < 0.5:
            _until(process, lambda: _partial(folder), over=True)
            time.sleep(draw.random() * 0.004)
        else:
            _until(process, lambda: _steps(folder) not in {0, before}, over=True)  # noqa: B023
            time.sleep(draw.random() * 0.1)
        process.kill()
        process.communicate()
        inside += _partial(folder)
        if (folder / "run" / "export").exists():  # it came to its end first: begin again
            shutil.rmtree(folder / "run")
    return inside


def _partial(folder: Path) -> bool:
    return any((folder / "run" / "checkpoints").glob(".partial-*"))


def test_killed_at_3_random_points(tmp_path: Path, whole: list[Any]) -> None:
    _killed_at_random(tmp_path, 3, seed=1)
    _finish(tmp_path)
    assert losses(tmp_path) == whole


@pytest.mark.slow
def test_killed_at_20_random_points(tmp_path: Path, whole: list[Any]) -> None:
    inside = _killed_at_random(tmp_path, 20, seed=2)
    _finish(tmp_path)
    assert losses(tmp_path) == whole and inside >= 3


def test_a_full_disk_ends_with_3_and_the_checkpoint_before_is_whole(tmp_path: Path, whole: list[Any]) -> None:
    with eager():
        assert train(config(tmp_path, **CHANGES | {"loop__max_steps": 4})) == 0
    shutil.rmtree(tmp_path / "run" / "export")
    size = max(p.stat().st_size for p in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    limit = size // 2

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(command(tmp_path, **CHANGES), before=full, **NOT_COMPILED)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 3, said
    last = [line for line in said.splitlines() if line.startswith("blade-distill: ")]
    assert len(last) == 1 and "free space" in last[0] and "step_00000006" in last[0]
    found = choose(tmp_path / "run" / "checkpoints", "auto")
    assert found is not None and found.name == "step_00000004"
    _finish(tmp_path)
    assert losses(tmp_path) == whole


def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, whole: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with eager():
        assert train(config(tmp_path, **CHANGES | {"loop__max_steps": 6})) == 0
        shard = next((tmp_path / "run" / "checkpoints" / "step_00000006").glob("*.safetensors"))
        content = bytearray(shard.read_bytes())
        content[-3] ^= 1
        shard.write_bytes(content)
        assert train(config(tmp_path, **CHANGES)) == 0
    assert "step_00000006 is damaged and skipped" in caplog.text
    assert losses(tmp_path) == whole


def test_a_line_cut_off_in_the_metrics_is_dropped(tmp_path: Path, whole: list[Any]) -> None:
    with eager():
        assert train(config(tmp_path, **CHANGES | {"loop__max_steps": 5})) == 0
        with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": 9}) + '\n{"step": 1')
        assert train(config(tmp_path, **CHANGES)) == 0
    assert losses(tmp_path) == whole and len(metrics(tmp_path)) == STEPS
