"""Configurations: presets with the published values, YAML there and back, overrides, and every refusal in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel, ValidationError

from blade_compile.config import BladeConfig
from blade_compile.distill import presets
from blade_compile.distill.config import PRESETS, RunConfig, dump, json_schema, load, resolve
from blade_compile.distill.errors import ConfigError, DataError, DistillError, DivergedError
from blade_compile.kernels import presets as kernels

BASE = ["model.path=folder", "data.prompts=prompts.txt"]


def preset(name: str, *overrides: str) -> RunConfig:
    return load(name, ["data.prompts=prompts.txt", *overrides])


def fields(kind: type[BaseModel], at: str = "") -> list[tuple[str, Any]]:
    """Every field of every section, by dotted path."""
    found: list[tuple[str, Any]] = []
    for name, field in kind.model_fields.items():
        found.append((f"{at}{name}", field))
        options = (field.annotation, *getattr(field.annotation, "__args__", ()))
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                found += fields(option, f"{at}{name}.")
    return found


def test_every_field_is_described() -> None:
    names = [name for name, field in fields(RunConfig) if not field.description]
    assert not names and len(fields(RunConfig)) > 70


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_written_and_read_is_the_same(name: str, tmp_path: Path) -> None:
    config = preset(name)
    for commented in (True, False):
        file = tmp_path / f"{commented}.yaml"
        file.write_text(dump(config, commented))
        assert load(file) == config
        assert ("# " in file.read_text()) == commented


def test_the_written_yaml_says_where_values_come_from() -> None:
    text = dump(preset("wan2.1-1.3b"))
    lines = {line.strip().split(":")[0]: line for line in text.splitlines()}
    assert "8  # K" in lines["steps"] and lines["steps"].endswith("(BLADE's script)")
    assert "ours: not published" in lines["tau_min"]
    assert lines["gamma"].endswith("cap of min_snr")  # a default: no source
    paths = {path for path, _ in fields(RunConfig)}
    for name in PRESETS:
        assert set(PRESETS[name]) <= paths  # none is lost by a wrong path
        assert all(presets.source(name, path, value) for path, (value, _) in PRESETS[name].items())
    own = dump(preset("wan2.1-1.3b", "method.steps=4", "lora.rank=16"))
    assert "  steps: 4  # K, the student's model calls\n" in own and "  rank: 16  # rank\n" in own
    assert "  alpha: 64.0  # scale is alpha / rank (BLADE's script)\n" in own


def test_blades_published_values() -> None:
    """Hyperparameters of the released scripts (CogVideoX-5B and Wan2.1-1.3B)."""
    for name, cfg, reg, size in (("cogvideox-5b", 3.5, 0.5, (49, 480, 720)), ("wan2.1-1.3b", 5.0, 0.0, (81, 480, 832))):
        c = preset(name)
        method = c.method
        assert (method.steps, method.eta, method.cfg_scale, method.regulariser) == (8, 0.9, cfg, reg)
        assert method.intervals == "overlapping" and not method.importance_weight and method.critic_updates == 1
        assert method.tau_max == 0.98
        assert c.lora is not None and (c.lora.rank, c.lora.alpha) == (64, 64)
        assert c.lora.targets == ("to_q", "to_k", "to_v", "to_out.0")
        assert (c.optimizer.student.learning_rate, c.optimizer.critic.learning_rate) == (1e-4, 5e-4)
        assert c.optimizer.betas == (0, 0.95) and c.optimizer.weight_decay == 1e-4 and c.optimizer.clip == 1
        assert (c.optimizer.student.schedule, c.optimizer.student.warmup_steps) == ("cosine", 5)
        assert c.optimizer.critic.schedule == "constant"
        assert (c.loop.max_steps, c.loop.checkpoint_every) == (300, 15)
        assert c.loop.batch_size * c.loop.grad_accumulation * 4 == 80
        assert c.ema.decay is None and c.seed == 42
        assert (c.latent.num_frames, c.latent.height, c.latent.width) == size
        blade = BladeConfig.of(c.sparsity.options())
        assert (blade.policy, blade.block, blade.inner_order, blade.probe_tokens) == ("asa_g", 128, "gilbert", 32)
        assert {field: getattr(blade, field) for field in kernels.PRESETS[name]} == kernels.PRESETS[name]
        assert "preset" not in c.sparsity.options()  # what the YAML says is what runs
    assert preset("cogvideox-5b").method.huber_c == pytest.approx(1e-3 / (128 * (60 * 90 * 16 * 13) ** 0.5), rel=0.01)
    assert preset("wan2.1-1.3b").method.huber_c == pytest.approx(1e-3 / 128 * (16 * 21 * 60 * 104) ** 0.5, rel=0.01)


def test_tdms_published_values() -> None:
    c = preset("pixart-alpha")
    assert (c.method.steps, c.method.cfg_scale, c.method.eta, c.method.intervals) == (4, 3.5, 1, "separate")
    assert c.method.weighting == "min_snr" and c.method.gamma == 5 and c.method.importance_weight
    assert (c.optimizer.student.learning_rate, c.optimizer.critic.learning_rate) == (2e-6, 2e-5)
    assert c.loop.batch_size * c.loop.grad_accumulation == 32 and c.loop.max_steps == 500 and c.lora is None
    alpha = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).prod().sqrt()
    assert float(1 / alpha) == pytest.approx(157, rel=0.01)  # what the rounding of eps is multiplied by at t = 999
    assert (c.model.dtype, c.parallel.mixed_precision) == ("float32", "float32")


def test_guidance_distilled_models_use_their_own_guidance() -> None:
    c = preset("flux-dev")
    assert c.method.cfg_scale == 1 and c.method.embedded_guidance == 3.5


@pytest.mark.parametrize("name", PRESETS)
def test_the_backend_takes_every_presets_options(name: str) -> None:
    BladeConfig.of(preset(name).sparsity.options((2, 4, 4)))


def test_both_forms_of_guidance_are_named() -> None:
    assert "cfg_scale 5" in preset("wan2.1-1.3b").guidance and "; 4 in the form" in preset("wan2.1-1.3b").guidance


# Overrides.


def test_overrides_are_yaml_values() -> None:
    c = load(
        None, [*BASE, "method.steps=2", "method.step_choices=[1, 2, 8]", "lora=null", "method.eta=0.5", "name=a-b.c"]
    )
    assert c.method.all_steps == (1, 2, 8) and c.lora is None and c.method.eta == 0.5 and c.name == "a-b.c"
    assert load(None, [*BASE, "data.prompts=a=b.txt"]).data.prompts == "a=b.txt"


@pytest.mark.parametrize("text", ["1e-5", "1E-05", "1.0e-5", "0.00001", "'1e-5'"])
def test_exponents_that_pyyaml_reads_as_text_are_numbers(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: folder}}\ndata: {{prompts: p.txt}}\noptimizer:\n  student: {{learning_rate: {text}}}\n"
        f"sparsity:\n  blade_options: {{similarity: {text}}}\n"
    )
    c = load(tmp_path / "run.yaml", [f"optimizer.critic.learning_rate={text}"])
    assert c.optimizer.student.learning_rate == c.optimizer.critic.learning_rate == 1e-5
    assert c.sparsity.blade_options == {"similarity": 1e-5}


def test_an_override_changes_one_field_of_a_preset() -> None:
    before, after = preset("cogvideox-5b"), preset("cogvideox-5b", "lora.rank=16", "optimizer.critic.warmup_steps=3")
    assert after.lora is not None and before.lora is not None
    assert after.lora.rank == 16 and after.lora.targets == before.lora.targets
    assert after.optimizer.critic.learning_rate == before.optimizer.critic.learning_rate
    assert load(None, ["preset=cogvideox-5b", "data.prompts=prompts.txt"]) == before


def test_the_critic_keeps_its_own_default_rate() -> None:
    assert load(None, [*BASE, "optimizer.critic.warmup_steps=3"]).optimizer.critic.learning_rate == 5e-4


def test_the_file_is_over_the_preset_and_overrides_over_both(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: cogvideox-5b\nmodel: {path: mine}\ndata: {prompts: p.txt}\nmethod: {steps: 4, eta: 1.0}\n")
    c = load(file, ["method.steps=2"])
    assert (c.method.steps, c.method.eta, c.method.cfg_scale) == (2, 1.0, 3.5)
    assert c.model.path == "mine" and c.model.family == "auto"  # the preset's is of its own path


def test_a_model_of_ones_own_replaces_the_presets() -> None:
    c = load("digits", ["model.path=folder", "data.prompts=p.txt"])
    assert c.model.factory is None and c.model.path == "folder"
    other = preset("wan2.1-1.3b", "model.path=THUDM/CogVideoX-5b").model
    assert other.family == "auto" and other.dtype == "bfloat16"
    assert preset("wan2.1-1.3b", "model.path=mine", "model.family=wan").model.family == "wan"
    assert preset("wan2.1-1.3b").model.family == "wan"


def test_what_the_section_says_is_what_runs() -> None:
    c = preset("wan2.1-1.3b", "sparsity.policy=asa", "sparsity.order=none")
    blade = BladeConfig.of(c.sparsity.options())
    assert (blade.policy, blade.order, blade.max_keep, blade.probe_tokens) == ("asa", "none", 0.17, 32)
    budget = preset("wan2.1-1.3b", "sparsity.sparsity=0.8")  # a budget of one's own takes the place of the preset's
    assert budget.sparsity.blade_options == {"probe": "sample", "probe_tokens": 32, "global_window": 30}
    assert BladeConfig.of(budget.sparsity.options()).budget == 0.8
    assert preset("wan2.1-1.3b", "sparsity.schedule=[[0, 0.5], [9, 0.8]]").sparsity.at(9) == 0.8


def test_options_of_the_backend_replace_the_presets() -> None:
    assert preset("wan2.1-1.3b", "sparsity.blade_options={}").sparsity.blade_options == {}
    assert preset("wan2.1-1.3b", "sparsity.blade_options={max_keep: 0.3}").sparsity.blade_options == {"max_keep": 0.3}
    one = preset("wan2.1-1.3b", "sparsity.blade_options.max_keep=0.3").sparsity.blade_options
    assert one == preset("wan2.1-1.3b").sparsity.blade_options | {"max_keep": 0.3}
    same = load(None, ["sparsity.blade_options.max_keep=0.3", "preset=wan2.1-1.3b", "data.prompts=prompts.txt"])
    assert same.sparsity.blade_options == one


def test_the_guides_configuration_runs_as_it_says(tmp_path: Path) -> None:
    guide = Path(__file__).parents[2] / "docs/distilling.md"
    (tmp_path / "run.yaml").write_text(guide.read_text().split("```yaml\n")[1].split("```")[0])
    c = load(tmp_path / "run.yaml")
    blade = BladeConfig.of(c.sparsity.options())
    assert c.method.steps == 4 and (blade.policy, blade.budget, blade.block) == ("asa", 0.8, 128)
    assert blade.probe_tokens == BladeConfig().probe_tokens and blade.max_keep == 1


@pytest.mark.parametrize("over", ["optimizer.generator.learning_rate=2e-5", "optimizer.student.learning_rate=2e-5"])
def test_roles_have_their_other_names(over: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "preset: wan2.1-1.3b\ndata: {prompts: p.txt}\noptimizer:\n  generator: {warmup_steps: 9}\n"
        "  fake_score: {learning_rate: 3e-4}\n"
    )
    c = load(file, [over])
    assert c.optimizer.student.learning_rate == 2e-5
    assert c.optimizer.student.schedule == "cosine"  # the preset's, not lost
    assert c.optimizer.critic.learning_rate == 3e-4


def test_a_role_under_two_names_is_refused() -> None:
    given = {"model": {"path": "x"}, "data": {"prompts": "p"}, "optimizer": {"critic": {}, "fake_score": {}}}
    with pytest.raises(ConfigError, match="fake_score and critic are two names of one role"):
        resolve(given)


# Sparsity over the training.


def test_the_sparsity_follows_its_schedule() -> None:
    s = load(None, [*BASE, "sparsity.schedule=[[0, 0.0], [10, 0.5], [30, 0.8]]"]).sparsity
    assert [s.at(step) for step in (0, 9, 10, 29, 30, 1000)] == [0.0, 0.0, 0.5, 0.5, 0.8, 0.8]
    assert s.options(step=12)["sparsity"] == 0.5 and s.options()["sparsity"] == 0.8
    assert load(None, [*BASE, "sparsity.sparsity=0.7"]).sparsity.at(5) == 0.7
    assert load(None, BASE).sparsity.at(5) is None


def test_the_grid_is_the_adapters_unless_one_is_given() -> None:
    s = load(None, BASE).sparsity
    assert s.options((2, 3, 4))["grid"] == (2, 3, 4) and "grid" not in s.options()
    given = load(None, [*BASE, "sparsity.blade_options={grid: [1, 2, 3]}"]).sparsity
    assert given.options((2, 3, 4))["grid"] == [1, 2, 3]


# What is refused.


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["metod.steps=3"], r"^metod: unknown key; did you mean 'method'"),
        (["method.stepz=3"], r"^method\.stepz: unknown key; did you mean 'steps'\?; valid are steps, step_choices"),
        (["lora.rnak=3"], r"^lora\.rnak: unknown key; did you mean 'rank'"),
        (["optimizer.critic.lr=3"], r"^optimizer\.critic\.lr: unknown key.*valid are learning_rate"),
        (["method.steps=0"], r"^method\.steps: found 0; input should be greater than 0"),
        (["method.steps=x"], r"^method\.steps: found 'x'"),
        (["method.eta=.nan"], r"^method\.eta: found nan"),
        (["method.intervals=both"], r"^method\.intervals: found 'both'.*'separate' or 'overlapping'"),
        (["model.family=unet"], r"^model\.family: found 'unet'.*'wan'"),
        (["model.dtype=int8"], r"^model\.dtype: found 'int8'"),
        (["model.path=null"], r"^model: neither is given"),
        (["model.factory=a:b"], r"^model: both are given"),
        (["model.path=null", "model.factory=a"], r"factory is 'a'; valid is module:callable"),
        (["model.path=null", "model.factory=a:b"], r"code of yours; set trust_code=true"),
        (["data.prompts=null"], r"give data\.prompts or data\.embeddings"),
        (["method.step_choices=[4, 2]"], r"method\.step_choices: \[4, 2\]"),
        (["method.step_choices=[1, 2]"], r"^method: steps is 4, not one of step_choices"),
        (["method.tau_min=0.9", "method.tau_max=0.5"], r"^method: tau_min is 0\.9"),
        (["sparsity.policy=foo"], r"^sparsity: policy='foo'; valid are 'asa'"),
        (["sparsity.block_size=50"], r"^sparsity: block_size=50; valid are 16"),
        (["sparsity.sparsity=1"], r"^sparsity\.sparsity: found 1"),
        (["sparsity.schedule=[[5, 0.5]]"], r"steps \[5\]; they have to ascend from 0"),
        (["sparsity.schedule=[[0, 0.5], [9, 2]]"], r"^sparsity: sparsity=2"),
        (["sparsity.blade_options={probe_tokenz: 3}"], r"unknown option 'probe_tokenz'; did you mean 'probe_tokens'"),
        (["sparsity.blade_options={policy: asa}"], r"blade_options holds policy; set them in this section"),
        (["optimizer.betas=[0, 1]"], r"^optimizer\.betas: \[0\.0, 1\.0\]"),
        (["name=a/b"], r"^name: 'a/b'"),
        (["name=.."], r"^name: '\.\.'"),
        (["preset=wan"], r"^preset: found 'wan'; valid are digits, wan2\.1-1\.3b"),
        (["steps"], r"^override 'steps'; valid is dotted\.path=value"),
        (["a..b=1"], r"^override 'a\.\.b=1'"),
        (["method.steps=[1"], r"'\[1' is no YAML value"),
    ],
)
def test_refusals_say_where_what_and_what_to_do(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load(None, [*BASE, *overrides])
    assert caught.value.exit_code == 2


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [*BASE, "method.steps=-1", "loop.max_steps=x", "traker=none"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: [\n", "is no YAML: .*line 2"),
        ("- a\n", "holds a list; a mapping of sections is wanted"),
        ("", "holds nothing"),
        ("method: {steps: 1, steps: 2}\n", "'steps' is given twice.*line 1"),
        ("method: 3\nmodel: {path: x}\n", "method: found 3"),
        ("a: !!python/object/apply:os.system ['true']\n", "is no YAML"),
        ("1: 2\nmodel: {path: x}\n", "1: "),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*a preset .digits"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no YAML"):
        load(tmp_path / "x.yaml")


def test_nothing_can_be_changed_afterwards() -> None:
    config = preset("digits")
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]


def test_the_schema_is_for_editors() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["seed"]["description"] == "of weights and noise"


def test_exit_codes() -> None:
    codes = {kind: kind("").exit_code for kind in (DistillError, ConfigError, DataError, DivergedError)}
    assert codes == {DistillError: 1, ConfigError: 2, DataError: 3, DivergedError: 1}
    assert all(issubclass(kind, ValueError) for kind in codes)


def test_folders_of_a_run() -> None:
    c = load(None, [*BASE, "name=a", "output_dir=out"])
    assert c.folder == "out/a" and c.embeddings == "out/a/embeddings"
    assert load(None, [*BASE, "data.embeddings=elsewhere"]).embeddings == "elsewhere"
    assert yaml.safe_load(dump(c))["name"] == "a"
