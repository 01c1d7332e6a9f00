"""The headline protocol: the arithmetic on planted times, the arms on models too small to mean anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import headline, phases
from benchmarks.models import MODELS
from benchmarks.registry import Plan, WrongResultError
from benchmarks.runner import run_case
from tests.benchmarks.tiny_models import tiny

PLAN = Plan(torch.device("cpu"))
Row = dict[str, Any]


def _measured(**samples: list[float]) -> list[Row]:
    return [{"arm": arm, "status": "ok", "samples": times} for arm, times in samples.items()]


BLADE = {
    headline.EAGER: [4.0, 8.0, 4.0], headline.COMPILED: [2.0, 4.0, 2.0], headline.FEW: [1.0, 2.0, 1.0],
    headline.SPARSE: [0.5, 1.0, 0.5],
}  # fmt: skip


def test_generations_are_steps_times_their_number() -> None:
    rows = {row["arm"]: row for row in headline.generations("wan2.1-1.3b", _measured(**BLADE))}
    sparse = rows[headline.FEW_SPARSE]
    assert sparse["seconds"]["median"] == 8 * 0.5
    assert rows[headline.EAGER_50]["seconds"]["median"] == 50 * 4
    assert sparse["speedup"]["median"] == 50  # 200 s over 4 s; round by round, so that the slow second one counts alike
    assert sparse["speedup"]["low"] == sparse["speedup"]["high"] == 50
    assert sparse["over_compiled"]["median"] == 25
    assert sparse["over_few"]["median"] == 2
    assert sparse["calculation"] == "8 x (compiled sparse, one step)"
    assert (sparse["published_speedup"], sparse["published_seconds"]) == (14.10, 24.00)
    assert "H20" in sparse["published_on"]
    assert "published_speedup" not in rows[headline.COMPILED_50]  # nobody published this baseline


def test_adaspas_generation_adds_up_its_phases() -> None:
    options = headline.PROTOCOLS["hunyuanvideo"].options
    counts = phases.counts(options, 50)
    assert counts == {
        "AdaSpa, dense step": 9, "AdaSpa, search step": 1, "AdaSpa, reuse step": 39, "AdaSpa, refresh step": 1,
    }  # fmt: skip
    seconds = {"dense": 2.0, "search": 5.0, "reuse": 1.0, "refresh": 3.0}
    measured = {phases.arm_of(name): [s] * 3 for name, s in seconds.items()}
    measured |= {headline.EAGER: [4.0] * 3, headline.COMPILED: [2.0] * 3}
    rows = {row["arm"]: row for row in headline.generations("hunyuanvideo", _measured(**measured))}
    total = 9 * 2 + 5 + 39 * 1 + 3
    assert rows[headline.ADASPA_50]["seconds"]["median"] == total
    assert rows[headline.ADASPA_50]["over_compiled"]["median"] == pytest.approx(100 / total, abs=1e-3)
    assert rows[headline.ADASPA_50]["published_speedup"] == 1.78
    assert headline.FEW_SPARSE not in rows


def test_a_generation_without_a_measured_step_has_no_figure() -> None:
    measured = _measured(**BLADE)
    measured[-1] = {"arm": headline.SPARSE, "status": "wrong", "reason": "rests on another"}
    rows = {row["arm"]: row for row in headline.generations("wan2.1-1.3b", measured)}
    sparse = rows[headline.FEW_SPARSE]
    assert sparse["status"] == "failed"
    assert "wrong: rests on another" in sparse["reason"]
    assert not {"speedup", "seconds", "samples"} & sparse.keys()
    assert rows[headline.FEW_DENSE]["speedup"]["median"] == 25
    without_eager = headline.generations("wan2.1-1.3b", measured[1:])
    assert not any("speedup" in row for row in without_eager)


def test_protocols_are_of_published_shapes_and_sparsities() -> None:
    from blade_compile.config import BladeConfig

    for name, protocol in headline.PROTOCOLS.items():
        assert MODELS[name].tokens(MODELS[name].published) > 17_000
        assert BladeConfig.of(protocol.options).when == "always"
    adaspa = BladeConfig.of(headline.PROTOCOLS["hunyuanvideo"].options)
    assert (adaspa.budget, adaspa.schedule.searches(50)) == (0.8, (10, 30))
    assert any("scaled model" in line for line in headline.notes("wan2.1-1.3b", PLAN))
    assert not any("scaled model" in line for line in headline.notes("wan2.1-1.3b", Plan(torch.device("cuda"))))


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan2.1-1.3b", "cogvideox-5b"])
def test_steps_of_every_arm_are_measured(name: str) -> None:
    (case,) = headline.cases(name, PLAN, tiny(name))
    rows = run_case("headline", case, PLAN, rounds=3, budget=0.0)
    every = headline.witness_of(headline.SPARSE)
    timed = (headline.COMPILED, headline.EAGER, headline.FEW, headline.SPARSE)
    assert [(row["arm"], row["status"], "seconds" in row) for row in rows] == [
        *((arm, "ok", True) for arm in timed), *((arm, "ok", False) for arm in (headline.DENSE_WITNESS, every)),
    ]  # fmt: skip
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm[headline.SPARSE]["error"] > 10 * by_arm[every]["error"]
    assert by_arm[headline.SPARSE]["density"] < 1
    assert all(row["status"] == "ok" for row in headline.generations(name, rows))


def test_guidance_doubles_the_work() -> None:
    one = {
        "encoder_hidden_states": torch.arange(6.0).view(1, 3, 2),
        "timestep": torch.tensor([5]),
        "return_dict": False,
    }
    other, same = headline._guided(one, "calls")
    assert same is one
    assert not torch.equal(other["encoder_hidden_states"], one["encoder_hidden_states"])
    (both,) = headline._guided(one, "batch")
    assert both["encoder_hidden_states"].shape == (2, 3, 2)
    assert torch.equal(both["encoder_hidden_states"][1:], one["encoder_hidden_states"])
    assert both["timestep"].tolist() == [5, 5]
    assert headline._guided(one, "none") == (one,)


@pytest.mark.slow
@pytest.mark.usefixtures("no_inductor")
def test_every_phase_of_adaspa_is_measured() -> None:
    (case,) = headline.cases("hunyuanvideo", PLAN, tiny("hunyuanvideo", (4, 16, 16)))
    rows = run_case("headline", case, PLAN)
    by_arm = {row["arm"]: row for row in rows}
    assert set(by_arm) == {
        headline.EAGER, headline.COMPILED, *(phases.arm_of(p) for p in ("dense", "search", "reuse", "refresh")),
    }  # fmt: skip
    assert by_arm["AdaSpa, reuse step"]["density"] < 1
    assert by_arm["AdaSpa, dense step"]["density"] == 1
    assert all("peak_mib" in row for row in rows) or not any("peak_mib" in row for row in rows)
    assert by_arm["AdaSpa, reuse step"]["error"] > 10 * by_arm["AdaSpa, dense step"]["error"]


def test_memory_is_that_of_calls_that_compile_nothing() -> None:
    calls: list[str] = []
    dense = {name: lambda name=name: calls.append(name) for name in (headline.EAGER, headline.COMPILED)}
    options = {"policy": "adaspa", "search_steps": phases.SEARCHES}
    peaks = phases.peak_memory(dense, lambda: calls.append("sparse"), options, PLAN)
    assert calls == [headline.EAGER, headline.COMPILED, *["sparse"] * phases.SHORT]
    assert set(peaks) == {*dense, *(phases.arm_of(p) for p in ("dense", "search", "reuse", "refresh"))}


@pytest.mark.usefixtures("no_inductor")
def test_a_wrong_dense_phase_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(phases.StepGate):
        def as_near(self, out: torch.Tensor) -> float:
            raise WrongResultError("planted")

    monkeypatch.setattr(phases, "StepGate", Strict)
    monkeypatch.setattr(phases, "interleaved", lambda *_: pytest.fail("timed"))
    (case,) = headline.cases("hunyuanvideo", PLAN, tiny("hunyuanvideo", (4, 16, 16)))
    (row,) = run_case("headline", case, PLAN)
    assert (row["status"], row["reason"]) == ("wrong", "planted")


def test_phases_are_measured_in_turns_on_an_injected_clock() -> None:
    now, calls = [0.0], []

    def spend(name: str, seconds: float) -> Any:
        def run() -> None:
            calls.append(name)
            now[0] += seconds

        return run

    dense = {headline.EAGER: spend("eager", 4.0), headline.COMPILED: spend("compiled", 2.0)}
    options = {"policy": "adaspa", "search_steps": phases.SEARCHES}
    took = phases.interleaved(dense, spend("sparse", 1.0), options, 2, 60.0, clock=lambda: now[0])
    assert calls == ["sparse", "sparse", "eager", "compiled", *["sparse"] * 5, "compiled", "eager", *["sparse"] * 3]
    assert took[headline.EAGER] == [4.0, 4.0]
    assert all(took[phases.arm_of(p)] == [1.0, 1.0] for p in ("dense", "search", "reuse", "refresh"))
