"""A model folder in diffusers format, from prompts to an export that stock pipelines load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from blade_compile.distill.config import RunConfig, resolve
from blade_compile.distill.export import read_record
from blade_compile.distill.generate import load_student
from blade_compile.distill.trainer import export_run, train
from tests.distill import tiny_digits
from tests.distill.tiny_families import WAN, inputs, pipeline, transformer

SIZE = {"num_frames": 9, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan folder with all its parts, all tiny, and two prompts beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    root = tmp_path_factory.mktemp("wan")
    folder = root / "model"
    pipeline("wan", transformer("wan")).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "cat", "dog", "ugly"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "tokenizer")
    sizes = {"d_model": WAN["text_dim"], "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    UMT5EncoderModel(UMT5Config(vocab_size=len(words), **sizes)).save_pretrained(folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "UMT5EncoderModel"]
    index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (root / "prompts.txt").write_text("a cat\na dog\n")
    return folder


def _config(wan: Path, out: Path, **changes: Any) -> RunConfig:
    given = tiny_digits.settings(out, **{"lora": {"rank": 4, "alpha": 8.0}, "loop__sample_every": 2, **changes})
    given["model"] = {"path": str(wan), "dtype": "float32"}
    given["data"] = {"prompts": str(wan.parent / "prompts.txt"), "negative_prompt": "ugly", "max_sequence_length": 16}
    given["latent"] = SIZE
    given["parallel"]["activation_checkpointing"] = True
    return resolve(given)


def _stock(wan: Path, export: Path) -> Any:
    """The student in the stock pipeline, loaded as its model card says."""
    record = read_record(export)
    if record["weights"] == "lora":
        pipe = diffusers.WanPipeline.from_pretrained(wan)
        pipe.load_lora_weights(export)
    else:
        model = diffusers.WanTransformer3DModel.from_pretrained(export, subfolder="transformer")
        pipe = diffusers.WanPipeline.from_pretrained(wan, transformer=model)
    pipe.scheduler = getattr(diffusers, record["scheduler"]).from_pretrained(export, subfolder="scheduler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs("wan"), return_dict=False)[0]
    return out


def _check(wan: Path, out: Path) -> None:
    """From the run in ``out``: metrics, clips, and both kinds of export in the stock pipeline."""
    lines = tiny_digits.metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(line["grad_norm/student"] > 0 for line in lines)
    clips = out / "run" / "samples" / "step_00000004"
    assert {entry["prompt"] for entry in json.loads((clips / "prompts.json").read_text())} == {"a cat", "a dog"}
    assert len([p for p in clips.iterdir() if p.suffix in {".gif", ".mp4"}]) == 2
    export = out / "run" / "export"
    assert set(load_file(export / "pytorch_lora_weights.safetensors"))
    pipe = _stock(wan, export)
    made = _output(pipe.transformer)
    assert not torch.equal(made, _output(transformer("wan")))
    merged = _stock(wan, export_run(out / "run", out=out / "merged", merge=True))
    torch.testing.assert_close(made, _output(merged.transformer), rtol=1e-4, atol=1e-5)
    frames = pipe(prompt="a cat", num_inference_steps=2, guidance_scale=1.0, output_type="np", **SIZE).frames
    assert frames.shape == (1, 9, 64, 64, 3)
    assert load_student(export, sparse=False, compiled=False, device="cpu")("a dog", 0).frames.shape == (9, 64, 64, 3)


def test_lora_from_prompts_to_the_stock_pipeline(wan: Path, tmp_path: Path) -> None:
    with tiny_digits.eager():
        assert train(_config(wan, tmp_path, **tiny_digits.EAGER)) == 0
    _check(wan, tmp_path)


@pytest.mark.slow
def test_lora_compiled_and_sparse(wan: Path, tmp_path: Path) -> None:
    with tiny_digits.kept_graphs():
        assert train(_config(wan, tmp_path)) == 0
    assert all(line["sparsity"] > 0.3 for line in tiny_digits.metrics(tmp_path))
    _check(wan, tmp_path)


def test_told_k_with_adapters_is_exported_whole(wan: Path, tmp_path: Path) -> None:
    """A file of adapters has no place for biases, so the weights are merged."""
    with tiny_digits.eager():
        changes = {**tiny_digits.EAGER, "method__step_choices": [1, 2], "ema__decay": None, "loop__sample_every": 0}
        assert train(_config(wan, tmp_path, **changes)) == 0
    export = tmp_path / "run" / "export"
    assert read_record(export)["weights"] == "merged"
    two = load_student(export, sparse=False, compiled=False, device="cpu")
    one = load_student(export, steps=1, sparse=False, compiled=False, device="cpu")
    assert not torch.equal(_output(one.pipe.transformer), _output(two.pipe.transformer))
    assert one("a cat", 0).frames.shape == (9, 64, 64, 3)


def test_base_weights_of_a_file_are_trained_from_and_exported(wan: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = {name: 0.9 * tensor for name, tensor in transformer("wan").state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    with tiny_digits.eager():
        file = str(tmp_path / "other.safetensors")
        changes = {**tiny_digits.EAGER, "loop__max_steps": 1, "loop__sample_every": 0}
        given = _config(wan, tmp_path, **changes)
        given = given.model_copy(update={"model": given.model.model_copy(update={"weights": file})})
        assert train(given) == 0
    stored = load_file(tmp_path / "run" / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(stored["patch_embedding.weight"], other["patch_embedding.weight"])
