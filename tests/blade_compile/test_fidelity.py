"""measure and calibrate: numbers against plain attention, targets kept, files refused where they don't belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blade_compile
from blade_compile import calibration
from blade_compile.backend import split_options
from blade_compile.calibration import LEVELS, choose
from blade_compile.config import BladeConfig
from blade_compile.errors import BladeOptionError
from blade_compile.kernels import lists, observe, reference
from tests.blade_compile.models import ALWAYS, HALF, Attention, TinyDiT, inputs

GENTLE = {"block_size": 16, "probe_tokens": 8, "when": "always"}


def soft_model(seed: int = 0) -> TinyDiT:
    """A model whose attention is nearly uniform, so that dropping blocks costs little."""
    torch.manual_seed(seed)
    model = TinyDiT()
    for module in model.modules():
        if isinstance(module, Attention):
            module.to_q.weight.data.mul_(0.1)
            module.to_out.weight.data.mul_(0.3)
    return model


class OneAttention(nn.Module):
    """Nothing but attention, of which everything can be recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x)
        return out


def heads_of(model: OneAttention, x: Tensor) -> list[Tensor]:
    layers = (model.attn.to_q, model.attn.to_k, model.attn.to_v)
    return [layer(x).double().unflatten(-1, (2, -1)).transpose(1, 2) for layer in layers]


def test_measured_numbers_are_those_of_plain_attention() -> None:
    torch.manual_seed(0)
    model, x = OneAttention(), torch.randn(2, 90, 64)
    with torch.no_grad():
        report = blade_compile.measure(model, x, options=HALF)
        q, k, v = heads_of(model, x)
    num, idx = blade_compile.mask_predict(q.float(), k.float(), config={**HALF})
    keep = lists.kept_blocks(num, idx, 6).repeat_interleave(16, 2)[:, :, :90].repeat_interleave(16, 3)[..., :90]
    weights = (q @ k.mT * 32**-0.5).softmax(-1)
    recall = (weights * keep).sum((0, 2, 3)) / weights.sum((0, 2, 3))
    blocks = torch.nn.functional.pad(weights, (0, 6, 0, 6)).unflatten(3, (6, 16)).unflatten(2, (6, 16)).sum((3, 5))
    best = blocks.sort(-1, descending=True).values[..., :3].sum((0, 2, 3)) / blocks.sum((0, 2, 3))
    dense, sparse = weights @ v, reference.block_sparse_attention(q, k, v, num, idx, block_size=16)[0]
    l1 = (sparse - dense).abs().sum((0, 2, 3)) / dense.abs().sum((0, 2, 3))
    (site,) = report.sites
    assert (site.name, site.shape, site.density) == ("attn", (2, 2, 90, 90, 32), [0.5, 0.5])
    for got, want in ((site.recall, recall), (site.oracle, best), (site.l1, l1)):
        torch.testing.assert_close(torch.tensor(got), want.float(), rtol=1e-4, atol=1e-5)
    assert all(r <= o + 1e-6 for r, o in zip(site.recall, site.oracle, strict=True))
    with torch.no_grad():
        project = lambda t: model.attn.to_out(t.float().transpose(1, 2).flatten(2))  # noqa: E731
        error = (project(sparse) - project(dense)).norm() / project(dense).norm()
    assert report.error == pytest.approx(error.item(), rel=1e-3)


def test_with_every_block_nothing_is_lost() -> None:
    report = blade_compile.measure(TinyDiT(), *inputs(), options={**ALWAYS, "sparsity": 0.0})
    assert len(report.sites) == 2 and report.error < 1e-5
    for site in report.sites:
        assert site.recall == pytest.approx([1.0, 1.0]) and max(site.l1) < 1e-5 and min(site.cosine) > 0.99999


def test_the_report_is_a_table_a_file_and_a_picture(tmp_path: Path) -> None:
    report = blade_compile.measure(TinyDiT(), *inputs(), options=HALF)
    assert "blocks.1.attn1" in str(report) and f"{report.error:.4g}" in str(report)
    report.save(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["sites"][0]["recall"] == report.sites[0].recall and stored["options"]["sparsity"] == 0.5
    report.save_picture(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes()[:4] == b"\x89PNG"


def test_measuring_leaves_no_trace() -> None:
    model, args = TinyDiT(), inputs()
    compiled = torch.compile(model, backend="blade", options=HALF)
    with torch.no_grad():
        want = compiled(*args)
        state = torch.get_rng_state()
        blade_compile.measure(compiled, *args, options={**ALWAYS, "sparsity": 0.8})
        assert torch.equal(torch.get_rng_state(), state) and torch.equal(compiled(*args), want)


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"explain\(model"):
        blade_compile.measure(nn.Linear(4, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="did you mean 'sparsity'"):
        blade_compile.measure(TinyDiT(), *inputs(), options={"sparsty": 0.5})


@pytest.mark.parametrize("target", [0.02, 0.1])
def test_calibration_meets_its_target_on_other_inputs(target: float, tmp_path: Path) -> None:
    model = soft_model()
    batches = [(inputs(), {}) for _ in range(2)]
    path = blade_compile.calibrate(model, batches, target, options=GENTLE, path=tmp_path / "c.json")
    content = json.loads(path.read_text())
    assert content["error"] <= target and content["density"] < 0.95
    compiled = torch.compile(model, backend="blade", options={"calibration": str(path), "when": "always"})
    with torch.no_grad(), observe.record() as events:
        args = inputs()
        error = (compiled(*args) - model(*args)).norm() / model(*args).norm()
    assert 0 < error <= target
    budgets = content["sites"]["blocks.0.attn1"]["sparsity"]
    counts = events[0].kv_num_blocks.double().mean((0, 2)).tolist() if any(budgets) else []
    assert counts == [reference.keep_count(1 - sparsity, 6) for sparsity in budgets if any(budgets)]


def test_a_tighter_target_keeps_more(tmp_path: Path) -> None:
    batches = [(inputs(), {})]
    density = {}
    for target in (0.005, 0.2):
        path = blade_compile.calibrate(soft_model(), batches, target, options=GENTLE, path=tmp_path / "c.json")
        density[target] = json.loads(path.read_text())["density"]
    assert density[0.005] > density[0.2]


@pytest.mark.parametrize("optimism", [0.01, 1.0, 100.0])
def test_a_wrong_model_of_errors_is_corrected(optimism: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true squared error is ``optimism`` times the modelled one: the budgets must come out near the target."""
    flat = torch.tensor(LEVELS, dtype=torch.float64)[:, None] ** 4
    sites = {
        name: Curve(flat.repeat(1, 4) * torch.linspace(0.5, 2, 4), gain) for name, gain in (("a", 0.01), ("b", 0.1))
    }
    run = calibration._Run(None, [((), {})], sites)  # type: ignore[arg-type]

    def true_error(_: Any, budgets: dict[str, list[int]]) -> list[float]:
        return [(optimism * sum(calibration._modelled(sites[n], budgets[n]) for n in budgets)) ** 0.5]

    monkeypatch.setattr(calibration, "_errors", true_error)
    best, (error,) = calibration._search(run, 0.1)
    assert 0.5 * 0.1 < error <= calibration.MARGIN * 0.1
    assert calibration._density(run, best) < 1


class Curve:
    """A site for `choose`: work, gain, error [levels, heads], density [levels]."""

    def __init__(self, error: Tensor, gain: float) -> None:
        self.error, self.gain, self.work = error, gain, 1.0
        self.density = torch.tensor([1 - s for s in LEVELS], dtype=torch.float64)


def test_budgets_go_where_error_is_cheap() -> None:
    flat = torch.tensor(LEVELS, dtype=torch.float64)[:, None] ** 4
    sites = {"robust": Curve(flat.repeat(1, 2), 1e-3), "fragile": Curve(flat.repeat(1, 2), 10.0)}
    levels = choose(sites, 0.01)
    assert min(levels["robust"]) > max(levels["fragile"])
    modelled = sum(
        s.gain * sum(s.error[level, h].item() for h, level in enumerate(levels[n])) for n, s in sites.items()
    )
    assert 0 < modelled <= 0.01
    assert choose(sites, 0.0) == {"robust": [0, 0], "fragile": [0, 0]}


def calibrated(tmp_path: Path) -> str:
    path = blade_compile.calibrate(soft_model(), [(inputs(), {})], 0.2, options=GENTLE, path=tmp_path / "c.json")
    return str(path)


def test_a_file_of_other_sizes_or_another_model_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": calibrated(tmp_path), "when": "always"}
    with torch.no_grad():
        compiled = torch.compile(soft_model(), backend="blade", options=options)
        with pytest.raises(BladeOptionError, match=r"\(2, 96, 96, 32\), here they are \(2, 64, 64, 32\)"):
            compiled(*inputs(64))
        torch._dynamo.reset()
        other = torch.compile(TinyDiT(layers=3), backend="blade", options=options)
        with pytest.raises(BladeOptionError, match=r"no budget for 'blocks.2.attn1', it names 2 sites"):
            other(*inputs())
        torch._dynamo.reset()
        block = torch.compile(soft_model().blocks[0], backend="blade", options=options)
        with pytest.raises(BladeOptionError, match="compiled in parts"):
            block(torch.randn(2, 96, 64), torch.randn(2, 8, 64))


def test_a_file_brings_its_options_and_contradicts_others(tmp_path: Path) -> None:
    path = calibrated(tmp_path)
    assert BladeConfig(calibration=path).block == 16
    with pytest.raises(ValueError, match=r"block_size=64, but the calibration .* was made with block_size=16"):
        BladeConfig(calibration=path, block_size=64)
    with pytest.raises(ValueError, match="calibration together with sparsity"):
        BladeConfig(calibration=path, sparsity=0.5)
    with pytest.raises(BladeOptionError, match="No such file"):
        split_options(None, {"calibration": str(tmp_path / "absent.json")})
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="is no calibration file"):
        BladeConfig(calibration=str(tmp_path / "other.json"))
    content = json.loads(Path(path).read_text())
    (tmp_path / "new.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        BladeConfig(calibration=str(tmp_path / "new.json"))


@pytest.mark.slow
def test_other_sizes_are_refused_with_dynamic_shapes_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": calibrated(tmp_path), "when": "always"}
    compiled = torch.compile(soft_model(), backend="blade", options=options, dynamic=True)
    with torch.no_grad():
        compiled(*inputs())
        with pytest.raises(BladeOptionError, match=r"here they are \(2, 64, 64, 32\)"):
            compiled(*inputs(64))


def test_a_file_remembers_what_was_left_out(tmp_path: Path) -> None:
    model, batches = soft_model(), [(inputs(), {})]
    settings = {**GENTLE, "exclude": ("blocks.0.*",)}
    path = blade_compile.calibrate(model, batches, 0.2, options=settings, path=tmp_path / "c.json")
    assert list(json.loads(path.read_text())["sites"]) == ["blocks.1.attn1"]
    with torch.no_grad(), observe.record() as events:
        torch.compile(model, backend="blade", options={"calibration": str(path), "when": "always"})(*inputs())
    assert {event.site for event in events} == {"blocks.1.attn1"}


def test_a_graph_break_inside_attention_is_refused() -> None:
    class Breaking(Attention):
        def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    model = OneAttention()
    model.attn = Breaking()
    with pytest.raises(ValueError, match="graph breaks there"):
        blade_compile.calibrate(model, [((torch.randn(1, 90, 64),), {})], options=GENTLE)


@pytest.mark.parametrize("policy", ["asa", "asa_g"])
def test_masked_keys_count_in_no_recall(policy: str) -> None:
    model, args = OneMasked(), (torch.randn(1, 96, 64), torch.arange(96)[None] < 50)
    report = blade_compile.measure(model, *args, options={**HALF, "policy": policy, "global_window": 8})
    # 4 of the 6 blocks hold a visible key, 3 are kept: nearly everything that there is to keep.
    assert min(report.sites[0].oracle) > 0.75 and min(report.sites[0].recall) > 0.6


class OneMasked(OneAttention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.attn(x, mask=mask[:, None, None])
        return out


@pytest.mark.parametrize(
    ("batches", "target", "message"),
    [
        ([], 0.05, "batches is empty"),
        ([torch.ones(2)], 0.05, "valid are"),
        ([((), {})], 1.5, r"target=1.5"),
        ([((), {})], True, "target=True"),
    ],
    ids=str,
)
def test_bad_calibrations_are_refused(batches: list[Any], target: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blade_compile.calibrate(TinyDiT(), batches, target)
