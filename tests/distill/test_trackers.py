"""Trackers against stand-ins of their packages: what they are told, and what is said where one is missing."""

from __future__ import annotations

import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from blade_compile.distill.config import RunConfig
from blade_compile.distill.errors import ConfigError
from blade_compile.distill.trackers import check_tracker, open_tracker
from blade_compile.distill.trainer import train
from tests.distill.tiny_digits import EAGER, config, eager

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def _config(tmp_path: Path, tracker: str) -> RunConfig:
    return config(tmp_path, **EAGER, tracker=tracker)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What stand-ins of all three packages are told."""
    calls: list[tuple[Any, ...]] = []

    def note(*name: str) -> Any:
        return lambda *args, **given: calls.append((*name, args, given))

    class SummaryWriter:
        def __init__(self, **given: Any) -> None:
            calls.append(("tensorboard", given))

        add_scalar = staticmethod(note("add_scalar"))
        close = staticmethod(note("close"))

    run = SimpleNamespace(log=note("log"), finish=note("finish"))
    stand_ins = {
        "torch.utils.tensorboard": {"SummaryWriter": SummaryWriter},
        "wandb": {
            "init": lambda **given: calls.append(("init", (), given)) or run,
        },
        "trackio": {"init": note("init"), "log": note("log"), "finish": note("finish")},
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(content, __spec__=ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_none(tmp_path: Path) -> None:
    check_tracker(_config(tmp_path, "none"))
    assert open_tracker(_config(tmp_path, "none"), tmp_path / "tracker", 0) is None
    assert not (tmp_path / "tracker").exists()


def test_tensorboard(tmp_path: Path, told: list[tuple[Any, ...]]) -> None:
    tracker = open_tracker(_config(tmp_path, "tensorboard"), tmp_path / "tracker", 7)
    assert tracker is not None
    tracker.log(8, {"loss/critic": 0.5, "sparsity": 0.75})
    tracker.close()
    assert told[0] == ("tensorboard", {"log_dir": str(tmp_path / "tracker"), "purge_step": 8})
    assert told[1:3] == [("add_scalar", ("loss/critic", 0.5, 8), {}), ("add_scalar", ("sparsity", 0.75, 8), {})]
    assert told[3][0] == "close"


def test_wandb_goes_on_with_its_run(tmp_path: Path, told: list[tuple[Any, ...]]) -> None:
    ids = []
    for _ in range(2):
        tracker = open_tracker(_config(tmp_path, "wandb"), tmp_path / "tracker", 0)
        assert tracker is not None
        tracker.log(1, {"loss/critic": 0.5})
        tracker.close()
        _, _, given = told[0]
        ids.append(given["id"])
        assert given["resume"] == "allow" and given["name"] == "run"
        assert given["config"]["method"]["cfg_scale"] == 2.0
        assert told[1:] == [("log", ({"loss/critic": 0.5},), {"step": 1}), ("finish", (), {})]
        told.clear()
    assert len(ids[0]) == 8 and ids[0] == ids[1]
    open_tracker(_config(tmp_path, "wandb"), tmp_path / "other", 0)
    assert told[0][2]["id"] != ids[0]


def test_trackio(tmp_path: Path, told: list[tuple[Any, ...]]) -> None:
    tracker = open_tracker(_config(tmp_path, "trackio"), tmp_path / "tracker", 0)
    assert tracker is not None
    tracker.log(3, {"loss/student": 1.5})
    tracker.close()
    assert told[0][2]["name"] == "run" and told[0][2]["resume"] == "allow"
    assert told[1:] == [("log", ({"loss/student": 1.5},), {"step": 3}), ("finish", (), {})]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ConfigError, match=re.escape(f"pip install 'blade-compile[{name}]'")):
        check_tracker(_config(tmp_path, name))
    extras = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\n{name} = ["{name}"]\n' in extras


def test_a_service_that_can_not_be_reached_is_one_line(tmp_path: Path, told: list[Any], monkeypatch: Any) -> None:
    def down(**given: Any) -> None:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(sys.modules["wandb"], "init", down)
    with pytest.raises(ConfigError, match=r"wandb can't be started: no route to host; set it up, or set tracker=none"):
        open_tracker(_config(tmp_path, "wandb"), tmp_path / "tracker", 0)


def test_a_run_tells_its_tracker_what_its_metrics_say(tmp_path: Path, told: list[tuple[Any, ...]]) -> None:
    with eager():
        train(_config(tmp_path, "trackio"))
    logged = [(args[0], given["step"]) for name, args, given in told if name == "log"]
    assert [step for _, step in logged] == [1, 2, 3, 4] and told[-1][0] == "finish"
    assert all({"loss/critic", "loss/student", "grad_norm/critic", "grad_norm/student"} <= set(n) for n, _ in logged)
