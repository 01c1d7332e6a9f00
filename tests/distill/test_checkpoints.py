"""Checkpoints: exact, whole whenever the writer ends, verified, shared between numbers of ranks, free of pickles."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from blade_compile.distill import checkpoints
from blade_compile.distill.checkpoint_files import difference
from blade_compile.distill.checkpoints import choose, load, read_record
from blade_compile.distill.errors import ConfigError, DataError
from tests.distill.checkpoint_worker import content, record_of, save, whole_tensors

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def _zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def _same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    def bits(tensor: Tensor) -> bytes:
        return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return all(bits(found[name]) == bits(wanted[name]) for name in wanted)


def _is_whole(path: Path | None, size: int = 1000) -> bool:
    """Whether a checkpoint holds what its step has to hold."""
    assert path is not None
    step = read_record(path)["step"]
    tensors = _zeros(content(step, size))
    return load(path, tensors) == {**record_of(step), "step": step} and _same(tensors, content(step, size))


def _start(mode: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distill.checkpoint_worker", mode, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _result(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


# One process


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_round_trip_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (24, 16), dtype=torch.uint8)  # NaN with payloads, infinities, subnormal numbers
    tensors = {"a": raw.bool() if dtype == torch.bool else raw.view(dtype), "scalar": torch.ones((), dtype=dtype)}
    tensors |= {"empty": torch.zeros(0, 4, dtype=dtype), "turned": tensors["a"].t(), "part": tensors["a"][3:5, :1]}
    tensors["tied"] = tensors["a"]
    found = _zeros(tensors)
    load(checkpoints.save(tmp_path, 1, tensors, {}, keep_last=1), found)
    assert _same(found, tensors)


def test_the_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = {"loss": 0.1 + 0.2, "none": None, "deep": {"list": [1, 2.5, "ü", True]}, "large": 2**70}
    path = checkpoints.save(tmp_path, 50, {"a": torch.ones(2)}, record, keep_last=1)
    assert path == tmp_path / "step_00000050"
    assert read_record(path) == load(path, {"a": torch.zeros(2)}) == {**record, "step": 50}


def test_parameters_are_filled_in_place(tmp_path: Path) -> None:
    wanted, layer = nn.Linear(3, 2), nn.Linear(3, 2)
    places = [parameter.data_ptr() for parameter in layer.parameters()]
    load(
        checkpoints.save(tmp_path, 1, dict(wanted.named_parameters()), {}, keep_last=1), dict(layer.named_parameters())
    )
    assert _same(dict(layer.named_parameters()), dict(wanted.named_parameters()))
    assert places == [parameter.data_ptr() for parameter in layer.parameters()]
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in layer.parameters())


def test_no_tensors_are_a_checkpoint_too(tmp_path: Path) -> None:
    assert load(checkpoints.save(tmp_path, 1, {}, {"a": 1}, keep_last=1), {}) == {"a": 1, "step": 1}
    assert choose(tmp_path, "auto") is not None


def test_a_part_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, 1, {"a": torch.ones(2), "b": torch.ones(3)}, {}, keep_last=1)
    tensors = {"a": torch.zeros(2)}
    with pytest.raises(ConfigError, match="of 'b' it has float32"):
        load(path, tensors)
    load(path, tensors, part=True)
    assert tensors["a"].sum() == 2
    with pytest.raises(ConfigError, match="of 'c' it has nothing"):
        load(path, {"c": torch.zeros(1)}, part=True)


def test_many_tensors_are_spread_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_FILE_BYTES", 1000)
    tensors = {str(i): torch.randn(100) for i in range(12)}
    path = checkpoints.save(tmp_path, 1, tensors, {}, keep_last=1)
    files = list(path.glob("*.safetensors"))
    assert len(files) == 6 and max(file.stat().st_size for file in files) < 3000
    found = _zeros(tensors)
    load(path, found)
    assert _same(found, tensors)


def test_only_the_last_ones_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000015", "step_00000020"]
    assert choose(tmp_path, "auto") == tmp_path / "step_00000020"


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, {"a": torch.zeros(2)}, {}, keep_last=1)
    path = checkpoints.save(tmp_path, 1, {"a": torch.ones(2)}, {"new": True}, keep_last=1)
    tensors = {"a": torch.zeros(2)}
    assert load(path, tensors)["new"] and tensors["a"].sum() == 2
    assert list(tmp_path.iterdir()) == [path]


def test_later_steps_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=3)
    save(tmp_path, 2, keep_last=3)
    assert choose(tmp_path, "auto") == tmp_path / "step_00000002"
    assert _is_whole(tmp_path / "aside_step_00000003")
    assert "step_00000003 is of a later step" in caplog.text
    save(tmp_path, 3, keep_last=3)
    assert sum(path.name.startswith("step_") for path in tmp_path.iterdir()) == 3


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    for name in (".partial-step_00000007", ".removed-step_00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").write_text("x")
    assert choose(tmp_path, "auto") is None
    save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_choose_auto_never_or_a_path(tmp_path: Path) -> None:
    assert choose(tmp_path / "none", "auto") is None
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert choose(tmp_path, "never") is None
    assert choose(tmp_path, "auto") == second
    assert choose(tmp_path / "none", str(first)) == first
    with pytest.raises(ConfigError, match="step_00000002, step_00000001"):
        choose(tmp_path, str(tmp_path))
    for none in (tmp_path / "step_00000009", Path(__file__)):
        with pytest.raises(ConfigError, match="is no checkpoint"):
            choose(tmp_path, str(none))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("count"), "'count' it has int64 \\[2\\], the run nothing"),
        (lambda t: t.update(more=torch.zeros(3)), "'more' it has nothing, the run float32 \\[3\\]"),
        (lambda t: t.update(count=torch.zeros(3, dtype=torch.int64)), "int64 \\[2\\], the run int64 \\[3\\]"),
        (lambda t: t.update(count=torch.zeros(2)), "int64 \\[2\\], the run float32 \\[2\\]"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    path = save(tmp_path, 1)
    tensors = _zeros(content(1))
    change(tensors)
    with pytest.raises(ConfigError, match=said):
        load(path, tensors)
    assert not any(tensor.any() for tensor in tensors.values())


# Damage


def _flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped in the middle": lambda path: _flip(path, path.stat().st_size // 2),
    "flipped at the end": lambda path: _flip(path, -3),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 2),
    "empty": lambda path: os.truncate(path, 0),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
FILES = ["shard-00001-model-00001-of-00001.safetensors", "record.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    DAMAGE[damage](newer / file)
    with caplog.at_level(logging.WARNING):
        assert choose(tmp_path, "auto") == older
    [warning] = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert "step_00000002 is damaged and skipped: " in warning
    assert file in warning or file == "manifest.json"  # a hash that was changed is another file's
    assert _is_whole(older)
    tensors = _zeros(content(2))
    for refused in (lambda: choose(tmp_path, str(newer)), lambda: load(newer, tensors)):
        with pytest.raises(DataError, match="step_00000002 is damaged"):
            refused()
    assert not any(tensor.any() for tensor in tensors.values())
    assert _is_whole(save(tmp_path, 2))  # and it is replaced by the next one of its step


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_refused(tmp_path: Path, file: str, damage: str) -> None:
    path = save(tmp_path, 1)
    DAMAGE[damage](path / file)
    if file == FILES[0] or (file == "manifest.json" and damage == "flipped in the middle"):
        assert read_record(path) == {**record_of(1), "step": 1}  # the tensors' file and hash are not looked at
        return
    with pytest.raises(DataError, match="is damaged"):
        read_record(path)


def test_any_flipped_bit_of_a_manifest_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 1, size=2)
    manifest = path / "manifest.json"
    size = manifest.stat().st_size
    found = 0
    for place in range(size):
        _flip(manifest, place, bit=3 * place % 8)
        if difference(path) is None:
            assert _is_whole(path, size=2)
        else:
            found += 1
        _flip(manifest, place, bit=3 * place % 8)
    assert found > 0.75 * size


def test_a_foreign_file_of_tensors_is_damage(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    shutil.copy(path / FILES[0], path / "copy.safetensors")
    with pytest.raises(DataError, match=r"copy\.safetensors is no part of it"):
        load(path, _zeros(content(1)))


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    os.truncate(save(tmp_path, 1) / FILES[0], 10)
    with pytest.raises(DataError, match="none whole"):
        choose(tmp_path, "auto")
    assert choose(tmp_path, "never") is None


def test_another_format_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 9}))
    with pytest.raises(DataError, match="has the format 9; this version reads 1"):
        load(path, _zeros(content(1)))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("unpickled")

    for module, names in ((pickle, ("load", "loads", "Unpickler", "_Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    assert _is_whole(choose(tmp_path, "auto"))


# Folders


def test_folders_and_checkpoints_behind_links(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    folder = tmp_path / "link"
    folder.symlink_to(tmp_path / "disk")
    path = save(folder, 1)
    assert path.parent == folder and _is_whole(choose(folder, "auto"))
    moved = tmp_path / "elsewhere"
    path.rename(moved)
    path.symlink_to(moved)
    assert _is_whole(choose(folder, "auto"))
    save(folder, 1)  # replaces the link, not what it shows
    assert not path.is_symlink() and _is_whole(path) and _is_whole(moved)
    path.rename(tmp_path / "again")
    path.symlink_to(tmp_path / "again")
    save(folder, 2, keep_last=1)
    assert not path.is_symlink() and _is_whole(tmp_path / "again")


@pytest.mark.parametrize("kind", ["file", "broken link", "under a file"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoints"
    if kind == "broken link":
        folder.symlink_to(tmp_path / "nowhere")
    else:
        folder.write_text("x")
    with pytest.raises(DataError, match="can't be written"):
        save(folder / "deeper" if kind == "under a file" else folder, 1)


def test_a_folder_without_permission(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir(mode=0o500)
    [outcome] = _result(_start("no_permission", folder))
    assert outcome.startswith("DataError") and "Permission denied; free space there or permit writing" in outcome
    assert not list(folder.iterdir())


# Ends of writers


def test_kill_9_at_random_times_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """20 kills, up to half a second after the writer began: before, within and after writes of 3 MB each."""
    worker = _start("kill_at_random", tmp_path)
    assert worker.stdin is not None and worker.stdout is not None
    delays, within, steps = random.Random(0), 0, [0]
    for _ in range(20):
        worker.stdin.write("\n")
        worker.stdin.flush()
        child = int(worker.stdout.readline())
        time.sleep(delays.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
        within += any(path.name.startswith(".partial-") for path in tmp_path.iterdir())
        chosen = choose(tmp_path, "auto")
        if chosen is None:
            assert steps == [0]
            continue
        assert _is_whole(chosen, size=100_000)
        steps.append(read_record(chosen)["step"])
    worker.communicate(timeout=60)
    assert steps == sorted(steps) and steps[-1] > 5
    assert within >= 5


def test_kill_9_before_every_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    outcome = _result(_start("kill_before", tmp_path))
    assert outcome["exit"] == 0 and outcome["points"] >= 50
    seen = set()
    for count in range(1, outcome["points"] + 1):
        place = tmp_path / str(count)
        done = int((place / "done").read_text() or 1) if (place / "done").exists() else 1
        chosen = choose(place, "auto")
        assert _is_whole(chosen) and read_record(chosen)["step"] in (done, done + 1), count
        assert all(difference(path) is None for path in place.glob("step_*")), count
        assert _is_whole(save(place, 4, keep_last=1))
        assert {path.name for path in place.iterdir()} - {"done"} == {"step_00000004"}, count
        seen.add(chosen.name)
    assert seen == {"step_00000001", "step_00000002", ".replaced-step_00000002", "step_00000003"}


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path: Path) -> None:
    first, *limited, last = _result(_start("full_disk", tmp_path))
    assert first == last == "fine"
    for outcome, chosen, names in limited:
        assert outcome.startswith("DataError") and "File too large; free space there" in outcome
        assert chosen == str(tmp_path / "step_00000001") and names == ["step_00000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]
    assert _is_whole(tmp_path / "step_00000001") and _is_whole(tmp_path / "step_00000003")


# Ranks


def test_two_ranks_and_one_read_each_other_s_checkpoints(tmp_path: Path) -> None:
    whole = whole_tensors()
    checkpoints.save(tmp_path / "one", 1, whole, record_of(1), keep_last=1)
    workers = [_start("ranks", tmp_path, RANK=str(rank)) for rank in range(2)]
    results = [_result(worker) for worker in workers]
    for result in results:
        assert result["one"] == result["two"] == [True, True]
        assert result["fsdp"] == [True]
        assert "File too large; free space there" in result["full on one rank"][0]
        assert result["chosen then"] == [str(tmp_path / "two" / "step_00000001")]
        assert result["next save"] == ["fine"]
        assert "of 'more' it has nothing" in result["misfit on one rank"][0]
        assert "none whole" in result["damaged"][0]

    trained = torch.load(tmp_path / "fsdp-0.pt")
    assert {"0.weight", "0.weight.exp_avg", "0.weight.step", "1.weight.exp_avg_sq"} < set(trained)
    for name, wanted in (("to one", whole), ("fsdp", trained)):
        path = tmp_path / name / "step_00000001"
        assert len(list(path.glob("*.safetensors"))) == 2
        found = _zeros(wanted)
        load(path, found)
        assert _same(found, wanted)
