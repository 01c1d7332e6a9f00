"""The fit finds constants that are known, and writes what the cost model reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import calibrate_cost, timing
from blade_compile.kernels import cost


@pytest.fixture
def fresh_cost() -> Any:
    caches = (cost.table, cost.table_hash, cost.choose)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_least_squares_are_not_negative() -> None:
    rng = np.random.default_rng(0)
    A = rng.random((30, 4)) * [1.0, 1e6, 1e-3, 1.0]
    exact = np.array([2.0, 3e-6, 0.0, 5.0])
    np.testing.assert_allclose(calibrate_cost.nonnegative_least_squares(A, A @ exact), exact, rtol=1e-6, atol=1e-9)
    pulled = calibrate_cost.nonnegative_least_squares(A, A @ np.array([2.0, 3e-6, -500.0, 5.0]))
    assert (pulled >= 0).all()
    assert pulled[2] == 0


@pytest.mark.parametrize("what", ["dense", "attention", "predict"])
def test_fit_recovers_the_constants_that_made_the_times(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = {name: float(i + 1) * (1e6 if name.endswith("call") else 10) for i, name in enumerate(cost.CONSTANTS)}
    rows = iter(calibrate_cost.grid()[what])

    def predicted(*_: object, **__: object) -> dict[str, timing.Timing]:
        sizes = next(rows)
        values = [sizes[name] for name in cost.NAMES] + [exact[name] for name in cost.CONSTANTS]
        return {"": timing.Timing((cost._compiled()[what](*values) * 1e-12,))}

    monkeypatch.setattr(timing, "paired", predicted)
    monkeypatch.setattr(calibrate_cost, "call", lambda _, sizes, *__: (lambda: None, sizes))
    found, errors = calibrate_cost.fit(what, torch.float32, rounds=1)
    assert errors["median"] < 1e-6
    for name, value in found.items():
        assert value == pytest.approx(exact[name], rel=1e-3), name


def test_every_constant_is_fitted_once() -> None:
    names = [name for what in calibrate_cost.grid() for name in calibrate_cost._features(what, [])[0]]
    assert sorted(names) == sorted(cost.CONSTANTS)


def test_the_written_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_cost: None) -> None:
    path = tmp_path / "table.json"
    constants = dict.fromkeys(cost.CONSTANTS, 1.0)
    entry = {"setup": "here", "date": "today", "constants": {"float32": constants}, "margin": {}, "fit": {}}
    calibrate_cost.merge(path, {"cpu-plain": entry})
    more = {"setup": "here", "date": "today", "constants": {"bfloat16": constants}, "margin": {}, "fit": {}}
    calibrate_cost.merge(path, {"cpu-plain": more})
    assert set(json.loads(path.read_text())["cpu-plain"]["constants"]) == {"float32", "bfloat16"}
    monkeypatch.setenv("BLADE_COST_TABLE", str(path))
    assert cost.table()["cpu-plain"]["constants"]["bfloat16"] == constants
    assert "cpu-aten" in cost.table()


@pytest.mark.parametrize("content", ["not json", "[]", '{"cpu-plain": {"constants": {"float32": {"dense_flop": 1}}}}'])
def test_a_broken_file_is_not(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_cost: None, caplog: pytest.LogCaptureFixture
) -> None:
    shipped = cost.table()
    cost.table.cache_clear()
    path = tmp_path / "table.json"
    path.write_text(content)
    monkeypatch.setenv("BLADE_COST_TABLE", str(path))
    assert cost.table() == shipped
    assert "BLADE_COST_TABLE" in caplog.text
