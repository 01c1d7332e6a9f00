"""Suites that time more than a step: a pipeline's generation, a training step, compilers in processes, fidelity."""

from __future__ import annotations

import pytest
import torch

from benchmarks import compile_time, suite_compile, suite_distill, suite_fidelity, suite_pipeline
from benchmarks.registry import Arm, Plan, WrongResultError
from benchmarks.suite_models import EVERY_BLOCK
from tests.benchmarks.tiny_models import tiny

PLAN = Plan(torch.device("cpu"))
WAN = tiny("wan2.1-1.3b", (2, 16, 32))


def _by_name(arms: list[Arm]) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms}


@pytest.mark.slow
@pytest.mark.usefixtures("no_inductor")
def test_a_generation_goes_from_the_prompt_to_frames() -> None:
    case = suite_pipeline.pipeline_case(WAN, PLAN, steps=1)
    assert case.about["text_encoder"] == "tiny"
    arms = _by_name(case.arms())
    for arm in arms.values():
        assert arm.check is not None
        error = arm.check(arm.call())
        assert error is not None
        assert (error < 1e-5) == (arm.name != suite_pipeline.SPARSE)
    every = arms[EVERY_BLOCK]
    out = every.call()
    assert out.shape == (1, 5, 3, 128, 256)
    assert every.check is not None
    with pytest.raises(WrongResultError, match="against fp32"):
        every.check(out * 1.001)
    sparse = arms["blade asa, sparsity 0.8"]
    assert sparse.after is not None
    found = sparse.after()
    assert found["density"] == 0.5
    split = found["split"]
    assert set(split) == {"text encoder", "transformer", "VAE", "rest"}
    assert all(seconds > 0 for seconds in split.values())
    assert sparse.certified_by == EVERY_BLOCK


def test_frames_depend_on_the_transformer() -> None:
    run = suite_pipeline.pipelines(WAN, PLAN, 1, torch.float32)
    before = run.generation()()
    with torch.no_grad():
        run.transformer.proj_out.weight.mul_(1.01)
    after = run.generation()()
    assert (after - before).norm() > 1e-4 * before.norm()


def test_a_training_step_starts_from_the_same_weights_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_distill, "K", 1)
    step = suite_distill.TrainingStep(WAN, PLAN, torch.float32, "never")
    before = {name: p.detach().clone() for name, p in step.roles.parameters("student").items()}
    first, second = (suite_distill.eagerly(step)() for _ in range(2))
    assert first.norm() > 0
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for name, parameter in step.roles.parameters("student").items():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-20)


@pytest.mark.slow
@pytest.mark.usefixtures("no_inductor")
def test_a_training_steps_arms_are_held_to_the_same_gradients() -> None:
    arms = _by_name(suite_distill.training_case(WAN, PLAN).arms())
    errors = {}
    for name, arm in arms.items():
        assert arm.check is not None
        errors[name] = arm.check(arm.call())
    assert 100 * errors[EVERY_BLOCK] < 3e-3 < errors[suite_distill.SPARSE]  # type: ignore[operator]
    sparse = arms[suite_distill.SPARSE]
    assert sparse.after is not None
    found = sparse.after()
    assert found["density"] < 1
    every = arms[EVERY_BLOCK]
    assert every.check is not None
    with pytest.raises(WrongResultError):
        every.check(every.call() * 1.01)


def test_compilers_are_compared_with_the_same_caches() -> None:
    calls: list[tuple[str, str, bool]] = []

    def process(backend: str, caches: str, resolutions: bool) -> dict[str, float]:
        warm = any(folder == caches for _, folder, _ in calls)
        calls.append((backend, caches, resolutions))
        first = {"inductor": 10.0, "blade": 12.0}[backend] / (4 if warm else 1)
        return {"first": first + 1, "step": 1.0, "graphs": 1, "by_step": 0, "by_resolution": 1}

    rows = {row["arm"]: row for row in suite_compile.rows_of(*suite_compile.samples(process, 2))}
    assert [b for b, _, more in calls if not more] == ["inductor"] * 2 + ["blade"] * 4 + ["inductor"] * 2
    assert len({folder for _, folder, _ in calls}) == 4
    assert rows["blade, cold"]["seconds"]["median"] == 12
    assert rows["blade, warm"]["seconds"]["median"] == 3
    assert rows["blade, cold"]["speedup"]["median"] == rows["blade, warm"]["speedup"]["median"] == 0.833
    assert rows["blade, warm"]["baseline"] == "inductor, warm"
    assert (rows["blade, cold"]["graphs"], rows["blade, cold"]["recompiles_by_step"]) == (1, 0)
    assert rows["blade, cold"]["recompiles_by_resolution"] == 1
    build = suite_compile.row_of_build(9.5)
    assert (build["arm"], build["seconds"]["median"]) == ("first build of the CPU kernels", 9.5)
    assert [case.device for case in suite_compile.cases(Plan(torch.device("cuda")))] == [torch.device("cpu")]
    typed = ["--pairs", "3", "--out", "somewhere", "--layers", "2"]
    assert compile_time._command(typed) == "python -m benchmarks.compile_time --pairs 3 --layers 2"


@pytest.mark.slow
def test_a_fresh_process_counts_graphs() -> None:
    from benchmarks.compile_time import fresh_process

    found = fresh_process("blade", 1, ".cache/blade", ".cache/inductor", "wall", resolutions=True)
    assert found["first"] > found["step"] > 0
    assert (found["graphs"], found["by_step"]) == (1, 0)
    assert 1 <= found["by_resolution"] <= 2


def test_fidelity_rows_are_those_of_the_fidelity_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import fidelity

    monkeypatch.setattr(fidelity, "KEPT_STEPS", (0,))
    monkeypatch.setattr(fidelity, "STEPS", 1)
    monkeypatch.setattr(fidelity, "CLASSES", 1)
    monkeypatch.setattr(suite_fidelity, "POLICIES", ("asa", "adaspa"))
    rows = suite_fidelity.policy_rows()
    assert [(row["policy"], row["sparsity"]) for row in rows] == [
        (policy, sparsity) for policy in ("asa", "adaspa") for sparsity in suite_fidelity.SPARSITIES
    ]
    for row in rows:
        assert 0 < row["recall"] <= row["oracle"] + 1e-6 <= 1 + 1e-6
        assert 0 < row["l1"] < 2
