"""The dry run's figures against counts made by hand, and everything that it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blade_compile.distill import config as run_config
from blade_compile.distill.adapter_digits import DigitsAdapter
from blade_compile.distill.cost import forward_cost, matmul_rate
from blade_compile.distill.digits_model import DigitsConfig, DigitsTransformer
from blade_compile.distill.dry_run import dry_run, write
from blade_compile.distill.errors import ConfigError, DataError

WAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 20,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """A model folder without weights."""
    folder = tmp_path / "wan"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer/config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **WAN}))
    diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text("{}")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    return folder


def load(folder: Path, *overrides: str) -> run_config.RunConfig:
    given = [
        f"model.path={folder}", f"data.prompts={folder.parent}/prompts.txt", f"output_dir={folder.parent}/runs",
        "latent.num_frames=9", "latent.height=64", "latent.width=96", "lora.rank=4", "sparsity.sparsity=0.75",
        "loop.batch_size=2",
    ]  # fmt: skip
    return run_config.load(None, [*given, *overrides])


def test_figures_of_a_model(wan: Path) -> None:
    report = dry_run(load(wan), rate=1e9)
    model = diffusers.WanTransformer3DModel(**WAN)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    # to_q, to_k, to_v, to_out.0 of 3 blocks x (self, cross), 32 to 32 each: rank 4 x (32 + 32)
    assert report.trained_parameters == 3 * 2 * 4 * 4 * 64
    assert report.family == "wan" and report.prediction == "flow" and report.prompts == 3
    assert report.latent_shape == (2, 4, 3, 8, 12) and report.grid == (3, 4, 6) and report.tokens == 72
    assert (report.sites, report.other_sites) == (3, 3) and "meta" in report.sites_from
    assert report.times == {4: tuple(pytest.approx(3000 * u / (1 + 2 * u)) for u in (1, 0.75, 0.5, 0.25))}
    assert report.sparsity == 0.75
    assert report.samples_per_update == 2 and ("prompts", "3, seen once in 1.5 updates of 2") in report.rows()
    assert report.memory["frozen weights"] == 2 * report.parameters  # bf16
    assert report.memory["student and critic: weights, gradients, moments"] == 2 * 16 * report.trained_parameters
    assert report.seconds_per_update == pytest.approx(report.flops_per_update / 1e9)  # type: ignore[operator]
    assert any("72, grid 3 x 4 x 6" in text for _, text in report.rows())


def test_the_report_is_json(wan: Path, tmp_path: Path) -> None:
    report = dry_run(load(wan), rate=1e9)
    write(report, tmp_path / "dry.json")
    read = json.loads((tmp_path / "dry.json").read_text())
    assert read["parameters"] == report.parameters and read["total_memory"] == report.total_memory


def test_more_ranks_share_the_weights(wan: Path) -> None:
    one, four = dry_run(load(wan), 1, rate=1e9), dry_run(load(wan), 4, rate=1e9)
    assert four.memory["frozen weights"] == one.memory["frozen weights"] // 4
    copied = dry_run(load(wan, "parallel.fsdp=false"), 4, rate=1e9)
    assert copied.memory["frozen weights"] == one.memory["frozen weights"]


def test_checkpointing_keeps_less(wan: Path) -> None:
    full = dry_run(load(wan, "parallel.activation_checkpointing=false"), rate=1e9).memory["activations"]
    less = dry_run(load(wan), rate=1e9).memory["activations"]
    assert 0 < less < full


def test_full_weights_and_average(wan: Path) -> None:
    report = dry_run(load(wan, "lora=null", "ema.decay=0.99"), rate=1e9)
    assert report.trained_parameters == report.parameters
    assert report.memory["average of the student"] == 4 * report.parameters


def test_operations_of_an_update(wan: Path) -> None:
    """(K + 3) student + (3 + 1) critic + 2 teacher forward passes, with nothing sparse and nothing recomputed."""
    plain = ("sparsity.sparsity=0", "parallel.activation_checkpointing=false")
    forward = _forward_flops(2)
    assert dry_run(load(wan, *plain), rate=1e9).flops_per_update == (4 + 3 + 4 + 2) * forward
    more = ("method.critic_updates=2", "method.regulariser=0.5", "method.cfg_scale=1", "loop.grad_accumulation=3")
    assert dry_run(load(wan, *plain, *more), rate=1e9).flops_per_update == 3 * (4 + 3 + 7 + 3) * forward


def test_sparsity_saves_its_share_of_the_attention(wan: Path) -> None:
    plain = dry_run(load(wan, "sparsity.sparsity=0"), rate=1e9).flops_per_update
    sparse = dry_run(load(wan, "sparsity.sparsity=0.75"), rate=1e9).flops_per_update
    attention = 3 * 4 * 2 * 2 * 72 * 72 * 16  # 3 sites, 4 B H S T D
    assert plain is not None and sparse is not None
    assert plain - sparse == pytest.approx((4 + 4) * 0.75 * attention, abs=2)


def _forward_flops(batch: int) -> int:
    """Of a Wan forward pass by its layers: 2 x inputs x outputs for each row, and 4 B H S T D for each attention."""
    tokens, text, width, ffn = 72, 512, 32, 32
    patches = 2 * tokens * (4 * 1 * 2 * 2) * width
    text_projection = 2 * text * (20 * width + width * width)
    time = 2 * (16 * width + width * width + width * 6 * width)
    block = 2 * tokens * (4 * width * width) + 4 * tokens * tokens * width  # self-attention
    block += 2 * (2 * tokens + 2 * text) * width * width + 4 * tokens * text * width  # cross-attention
    block += 2 * tokens * 2 * width * ffn
    out = 2 * tokens * width * (4 * 2 * 2)
    return batch * (patches + text_projection + time + 3 * block + out)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("latent.num_frames=10", "num_frames is 10"),
        ("lora.targets=[nothing]", "no linear layer of the model has such a name"),
        ("method.embedded_guidance=3.5", "takes none as an input"),
        ("output_dir=/proc/none", "can't be written|choose another"),
        ("parallel.mixed_precision=float16", "mixed_precision is float16"),
        ("model.dtype=float16", "model.dtype is float16"),
        ("tracker=trackio", "pip install 'blade-compile.trackio.'"),
        ("sparsity.blade_options={include: blocks.0.*}", "blade_options has include, which tells layers apart"),
        ("model.family=ltx", "model.family is 'ltx', but the transformer is a WanTransformer3DModel, which is 'wan'"),
    ],
)
def test_refuses_what_cannot_run(wan: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dry_run(load(wan, override), rate=1e9)


def test_refuses_prompts_that_are_not_there(wan: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        dry_run(load(wan, "data.prompts=nowhere.txt"), rate=1e9)


class WrongGrid(DigitsAdapter):
    """Says a grid that the tokens don't have."""

    def token_grid(self, latent: Any) -> tuple[int, int, int]:
        return 9, 9, 9


class WrongSize(DigitsAdapter):
    """Says latents that the model can't take."""

    def latent_shape(self, latent: Any, batch: int) -> tuple[int, ...]:
        return batch, 1, 7, 5, 3


class ReadsValues(DigitsTransformer):
    """Asks for a number, which a meta tensor doesn't have."""

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        assert float(time.max()) >= 0
        return super().forward(x, time, label)


class NamedAttention(ReadsValues):
    """Has the module names of diffusers' attention."""

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__(config)
        for block in self.blocks:
            block.to_q, block.to_k = nn.Linear(1, 1), nn.Linear(1, 1)


SMALL = DigitsConfig(width=24, depth=2, heads=1)


def small() -> tuple[nn.Module, DigitsAdapter]:
    return DigitsTransformer(SMALL), DigitsAdapter(SMALL)


def wrong_grid() -> tuple[nn.Module, DigitsAdapter]:
    return DigitsTransformer(SMALL), WrongGrid(SMALL)


def wrong_size() -> tuple[nn.Module, DigitsAdapter]:
    return DigitsTransformer(SMALL), WrongSize(SMALL)


def reads_values() -> tuple[nn.Module, DigitsAdapter]:
    return ReadsValues(SMALL), DigitsAdapter(SMALL)


def named_attention() -> tuple[nn.Module, DigitsAdapter]:
    return NamedAttention(SMALL), DigitsAdapter(SMALL)


def digits(factory: str, tmp_path: Path) -> run_config.RunConfig:
    source = [f"model.factory={__name__}:{factory}", "model.trust_code=true", f"output_dir={tmp_path}"]
    return run_config.load("digits", source)


def test_a_factory(tmp_path: Path) -> None:
    report = dry_run(digits("small", tmp_path), rate=1e9)
    assert report.sites == 2 and report.other_sites == 0 and report.tokens == 256 and report.prompts is None


def test_a_grid_that_does_not_multiply_to_the_tokens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no attention over the 729 tokens.*\(256, 256\)"):
        dry_run(digits("wrong_grid", tmp_path), rate=1e9)


def test_a_size_that_the_model_cannot_take_is_no_model_that_reads_values(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a forward pass of the model fails: .*\(WrongSize\)"):
        dry_run(digits("wrong_size", tmp_path), rate=1e9)


def test_models_that_read_values_are_counted_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="by its modules' names"):
        dry_run(digits("reads_values", tmp_path), rate=1e9)
    report = dry_run(digits("named_attention", tmp_path), rate=1e9)
    assert report.sites == 2 and "module names" in report.sites_from and report.flops_per_update is None
    assert report.rows()


def test_cost_of_one_attention() -> None:
    q = torch.empty(2, 4, 10, 8, device="meta", requires_grad=True)
    k = torch.empty(2, 2, 6, 8, device="meta")
    cost = forward_cost(lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), nn.Module())
    (call,) = cost.calls
    assert (call.queries, call.keys, call.heads, call.is_self) == (10, 6, 4, False)
    assert call.flops == cost.flops == 4 * 2 * 4 * 10 * 6 * 8
    assert cost.attention_flops == 0 and cost.saved_bytes >= 4 * (q.numel() + 2 * k.numel())


def test_saved_activations_of_a_chain() -> None:
    """Each layer keeps its input once; views and weights count nothing."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to("meta")
    x = torch.empty(5, 8, device="meta")
    cost = forward_cost(lambda: model(x), model)
    assert cost.flops == 2 * 2 * 5 * 8 * 8
    assert cost.saved_bytes == 4 * 2 * 5 * 8  # x, and tanh's output, which the second layer shares


def test_the_rate_is_measured() -> None:
    assert math.isfinite(rate := matmul_rate(torch.device("cpu"), torch.float32, 0.02)) and rate > 1e6
