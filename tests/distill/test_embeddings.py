"""Embeddings on disk: what is read is what was encoded, wherever the writing stopped, in any number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blade_compile.distill import config as run_config
from blade_compile.distill import embeddings, encoder, preflight
from blade_compile.distill.adapters import load_adapter
from blade_compile.distill.embeddings import Embeddings, ParquetEmbeddings, is_parquet, key_of, prepare
from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.ranks import Ranks

PROMPTS = [f"prompt number {i}" for i in range(11)]
NEGATIVE = "ugly"


def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
    """Text as rows of bytes, zero past its end, in bf16; a pooled vector; a mask; a number."""
    rows = torch.zeros(len(prompts), 24, 2, dtype=torch.bfloat16)
    for i, prompt in enumerate(prompts):
        rows[i, : len(prompt)] = torch.tensor(list(prompt.encode()))[:, None]
    return {
        "prompt_embeds": rows,
        "pooled": rows.float().mean(1),
        "mask": (rows[..., 0] != 0).long(),
        "label": torch.tensor([len(p) for p in prompts]),
    }


def made(folder: Path, prompts: Sequence[str] = PROMPTS, **given: Any) -> int:
    return prepare(folder, prompts, NEGATIVE, encode, "one", **{"shard_size": 4, "batch": 3, **given})


def assert_complete(folder: Path) -> None:
    read = Embeddings(folder, verify=True)
    assert [read.text(i) for i in range(len(read))] == PROMPTS
    wanted = encode(PROMPTS)
    got = read.batch(range(len(read)))
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(got[name], wanted[name]) and got[name].dtype == wanted[name].dtype, name
    negative = read.negative(2)
    assert all(torch.equal(negative[name], tensor) for name, tensor in encode([NEGATIVE] * 2).items())


def test_what_is_read_is_what_was_encoded(tmp_path: Path) -> None:
    assert made(tmp_path) == 12
    assert_complete(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_padding_takes_no_space(tmp_path: Path) -> None:
    made(tmp_path, ["a"])
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    long = tmp_path / "long"
    made(long, ["a" * 24])
    assert sum(path.stat().st_size for path in long.glob("*.safetensors")) - size == 2 * 2 * 23  # 23 rows of 2 x bf16


def test_a_second_time_encodes_nothing_and_new_prompts_alone(tmp_path: Path) -> None:
    made(tmp_path, PROMPTS[:5])
    calls: list[str] = []

    def noted(prompts: Sequence[str]) -> dict[str, Tensor]:
        calls.extend(prompts)
        return encode(prompts)

    assert prepare(tmp_path, PROMPTS[:5], NEGATIVE, noted, "one") == 0 and not calls
    assert prepare(tmp_path, PROMPTS, NEGATIVE, noted, "one") == 6 and calls == PROMPTS[5:]
    assert_complete(tmp_path)


def test_a_prompt_twice_or_equal_to_the_negative_one(tmp_path: Path) -> None:
    assert made(tmp_path, ["a", "a", NEGATIVE]) == 2
    read = Embeddings(tmp_path)
    assert [read.text(i) for i in range(len(read))] == ["a", NEGATIVE]


def test_ranks_share_the_work_and_the_last_writes_the_index(tmp_path: Path) -> None:
    counts = []
    for rank in (2, 0, 1):
        with pytest.raises(DataError, match=r"not finished|no embeddings"):
            Embeddings(tmp_path)
        counts.append(made(tmp_path, rank=rank, world=3))
    assert sum(counts) == 12 and all(counts)
    assert_complete(tmp_path)


def test_another_number_of_ranks_continues(tmp_path: Path) -> None:
    made(tmp_path, rank=0, world=2)
    assert made(tmp_path) == sum(int(key_of(p), 16) % 2 == 1 for p in (*PROMPTS, NEGATIVE))
    assert_complete(tmp_path)


@pytest.mark.parametrize("stop", range(1, 13, 2))
def test_stopped_anywhere_it_continues(tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before, between or after the writes of a shard and its record."""
    writes = 0
    real = embeddings._write

    def dying(path: Path, content: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == stop:
            path.with_name(f".{path.name}.999").write_bytes(content[: len(content) // 2])
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(embeddings, "_write", dying)
    try:
        made(tmp_path)
    except KeyboardInterrupt:
        assert not (tmp_path / "index.json").exists()
    monkeypatch.setattr(embeddings, "_write", real)
    made(tmp_path)
    assert_complete(tmp_path)


@pytest.mark.parametrize("size", [0, 100])
def test_a_shard_cut_short_is_made_again(tmp_path: Path, size: int) -> None:
    made(tmp_path)
    shard = next(iter(sorted(tmp_path.glob("*.safetensors"))))
    os.truncate(shard, size)
    with pytest.raises(DataError, match="missing or damaged"):
        Embeddings(tmp_path)
    assert made(tmp_path) > 0
    assert_complete(tmp_path)


def test_a_changed_byte_is_found_by_its_hash(tmp_path: Path) -> None:
    made(tmp_path)
    shard = next(iter(tmp_path.glob("*.safetensors")))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    Embeddings(tmp_path)
    with pytest.raises(DataError, match="damaged"):
        Embeddings(tmp_path, verify=True)


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(ConfigError, match="another encoder"):
        prepare(tmp_path, PROMPTS, NEGATIVE, encode, "two")
    assert Embeddings(tmp_path).encoder == "one"


def test_a_wrong_number_of_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 prompts were encoded to"):
        prepare(tmp_path, PROMPTS, NEGATIVE, lambda p: {"x": torch.zeros(1)}, "one", batch=3)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"format": 99, "prompts": [1], "shards": [1], "negative": "a"}'])
def test_a_damaged_index(tmp_path: Path, content: str) -> None:
    made(tmp_path)
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        Embeddings(tmp_path)


def test_a_folder_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no embeddings; run `blade-distill prepare`"):
        Embeddings(tmp_path / "none")


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk: the write of the shard fails."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import torch\n"
        "from blade_compile.distill.embeddings import prepare\n"
        "from blade_compile.distill.errors import DataError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try:\n"
        "    prepare(sys.argv[1], ['a', 'b'], '', lambda p: {'x': torch.ones(len(p), 100, 100)}, 'one')\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "can't be written: File too large" in out.stdout
    assert not list(tmp_path.iterdir())


# FastVideo's Parquet.


def fastvideo_row(
    i: int, rows: int, shape: Sequence[int] | None = None, dtype: str = "float32", width: int = 3
) -> dict[str, Any]:
    values = np.full((rows, width), i + 0.5, dtype="float32" if dtype == "bfloat16" else dtype)
    return {
        "id": str(i),
        "caption": f"caption {i}",
        "text_embedding_bytes": values.tobytes(),
        "text_embedding_shape": list(shape or values.shape),
        "text_embedding_dtype": dtype,
    }


class TableStandIn:
    """Answers as pyarrow's ParquetFile does, from JSON lines."""

    def __init__(self, path: Path) -> None:
        self.rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        for row in self.rows:
            row["text_embedding_bytes"] = bytes.fromhex(row["text_embedding_bytes"])

    def iter_batches(self, batch_size: int) -> Any:
        yield types.SimpleNamespace(to_pylist=lambda: self.rows)


def write_table(path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A Parquet file by pyarrow, or one for the stand-in where pyarrow isn't installed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import pyarrow
        from pyarrow import parquet

        write = parquet.write_table
    except (ImportError, AttributeError):  # not installed, or the stand-in is there already
        arrow = types.ModuleType("pyarrow")
        arrow.ArrowException = ValueError  # type: ignore[attr-defined]
        module = types.ModuleType("pyarrow.parquet")
        module.ParquetFile = TableStandIn  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "pyarrow", arrow)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
        lines = [json.dumps({**row, "text_embedding_bytes": row["text_embedding_bytes"].hex()}) for row in rows]
        path.write_text("\n".join(lines))
    else:
        write(pyarrow.Table.from_pylist(rows), path)


def test_fastvideos_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path / "a/one.parquet", [fastvideo_row(0, 4), fastvideo_row(1, 2, (1, 2, 3))], monkeypatch)
    write_table(tmp_path / "b/two.parquet", [fastvideo_row(2, 5, dtype="float16")], monkeypatch)
    read = ParquetEmbeddings(tmp_path)
    assert is_parquet(tmp_path) and len(read) == 3
    assert [read.text(i) for i in range(3)] == ["caption 0", "caption 1", "caption 2"]
    got = read.batch([1, 0])["prompt_embeds"]
    wanted = torch.zeros(2, 512, 3)
    wanted[0, :2], wanted[1, :4] = 1.5, 0.5
    assert torch.equal(got, wanted)
    with pytest.raises(DataError, match=r"no negative prompt.*cfg_scale=1"):
        read.negative()
    given = ParquetEmbeddings(tmp_path, length=8, negative={"prompt_embeds": torch.ones(8, 3)})
    assert given.negative(2)["prompt_embeds"].shape == (2, 8, 3)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (fastvideo_row(0, 4, (5, 3)), "row 1: text_embedding_shape is .5, 3. and there are 48 bytes"),
        (fastvideo_row(0, 4, (2, 2, 3)), "row 1: text_embedding_shape"),
        (fastvideo_row(0, 4, dtype="bfloat16"), "text_embedding_dtype is 'bfloat16'"),
        ({**fastvideo_row(0, 4), "text_embedding_dtype": None}, "no text_embedding_dtype"),
        (fastvideo_row(0, 600), "600 tokens; the model takes 512"),
    ],
    ids=["size", "batch", "dtype", "missing", "long"],
)
def test_parquet_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], said: str
) -> None:
    write_table(tmp_path / "one.parquet", [row], monkeypatch)
    with pytest.raises(DataError, match=said):
        ParquetEmbeddings(tmp_path / "one.parquet")


def test_parquet_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Parquet file"):
        ParquetEmbeddings(tmp_path)


# A whole model folder: a tiny T5 with a tokenizer, encoded by Wan's own pipeline.


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """A Wan folder whose text encoder and tokenizer are real and tiny."""
    import diffusers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path / "wan"
    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "ugly"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=7, d_model=20, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    transformer = {"_class_name": "WanTransformer3DModel", "in_channels": 4, "text_dim": 20}
    fast.save_pretrained(folder / "tokenizer")
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "transformer").mkdir()
    (folder / "transformer/config.json").write_text(json.dumps(transformer))
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    return folder


def run_of(folder: Path, *overrides: str) -> run_config.RunConfig:
    root = folder.parent
    given = [
        f"model.path={folder}",
        f"data.prompts={root}/prompts.txt",
        f"output_dir={root}/runs",
        "model.dtype=float32",
    ]
    return run_config.load(None, [*given, "data.negative_prompt=ugly", "data.max_sequence_length=16", *overrides])


def test_prepare_of_a_run_by_the_pipelines_own_encoder(wan: Path) -> None:
    config = run_of(wan)
    assert encoder.prepare_run(config) == 3
    read = Embeddings(config.embeddings)
    pipeline = encoder.text_pipeline(config)
    assert pipeline.transformer is None and pipeline.vae is None  # neither has weights here
    with torch.no_grad():
        wanted, negative = pipeline.encode_prompt(
            ["a cat", "a dog"], ["ugly"] * 2, max_sequence_length=16, do_classifier_free_guidance=True
        )
    torch.testing.assert_close(read.batch([0, 1])["prompt_embeds"], wanted)
    torch.testing.assert_close(read.negative(2)["prompt_embeds"], negative)
    assert not torch.allclose(wanted[0], wanted[1])
    assert encoder.prepare_run(config) == 0
    with pytest.raises(ConfigError, match="another encoder"):
        encoder.prepare_run(run_of(wan, "data.max_sequence_length=12"))


ALONE = Ranks(0, 1, torch.device("cpu"))


def opened(config: run_config.RunConfig) -> Embeddings | ParquetEmbeddings:
    return preflight.open_prompts(config, load_adapter(config.model), ALONE)


@pytest.mark.parametrize("length", [16, None])
def test_fastvideos_parquet_with_the_negative_prompt_of_the_run(
    wan: Path, length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = wan.parent / "fastvideo/one.parquet"
    write_table(table, [fastvideo_row(0, 4, width=20)], monkeypatch)
    own = ["data.prompts=null", f"data.embeddings={table.parent}"]
    config = run_of(wan, *own, f"data.max_sequence_length={'null' if length is None else length}")
    read = opened(config)
    assert read[0]["prompt_embeds"].shape == read.negative()["prompt_embeds"][0].shape == (length or 512, 20)
    assert encoder.prepare_run(config) == 0  # there already
    pipeline = encoder.text_pipeline(config)
    with torch.no_grad():
        wanted, _ = pipeline.encode_prompt(
            ["ugly"], max_sequence_length=length or 512, do_classifier_free_guidance=False
        )
    torch.testing.assert_close(read.negative()["prompt_embeds"], wanted)
    assert [path.name for path in table.parent.iterdir()] == ["one.parquet"]  # nothing is written beside the user's
    for file in (wan / "text_encoder").iterdir():
        file.unlink()
    other = run_of(wan, *own, "name=other")
    with pytest.raises(ConfigError, match=r"can't be encoded for it: .*; or set method.cfg_scale=1"):
        opened(other)
    assert len(opened(run_of(wan, *own, "name=other", "method.cfg_scale=1"))) == 1


def test_embeddings_that_do_not_fit_the_model(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = wan.parent / "one.parquet"
    write_table(table, [fastvideo_row(0, 4)], monkeypatch)
    config = run_of(wan, "data.prompts=null", f"data.embeddings={table}", "method.cfg_scale=1")
    with pytest.raises(DataError, match="prompt_embeds is 3 wide and the model takes 20"):
        opened(config)
    pooled = import_module("blade_compile.distill.adapter_sd3").ADAPTER({"joint_attention_dim": 3}, {})
    with pytest.raises(DataError, match="has no pooled_prompt_embeds, which sd3 models take; it has prompt_embeds"):
        preflight.open_prompts(config, pooled, ALONE)


def test_ready_embeddings_are_compared_with_the_encoder(wan: Path) -> None:
    config = run_of(wan)
    encoder.prepare_run(config)
    ready = ["data.prompts=null", f"data.embeddings={config.embeddings}"]
    assert len(opened(run_of(wan, *ready))) == 2
    for other in ("data.max_sequence_length=12", "model.dtype=bfloat16"):
        with pytest.raises(ConfigError, match="was made by another text encoder"):
            opened(run_of(wan, *ready, other))
    own = wan.parent / "own"  # made elsewhere, by another name
    vectors = torch.ones(1, 16, 20)
    prepare(own, ["a cat"], "ugly", lambda texts: {"prompt_embeds": vectors.repeat(len(texts), 1, 1)}, "mine")
    assert len(opened(run_of(wan, "data.prompts=null", f"data.embeddings={own}"))) == 1


def test_another_text_encoder_has_another_fingerprint(wan: Path) -> None:
    before = encoder.fingerprint(run_of(wan), "wan")
    (wan / "transformer/config.json").write_text("{}")
    assert encoder.fingerprint(run_of(wan), "wan") == before  # it doesn't depend on the transformer
    assert encoder.fingerprint(run_of(wan), "pixart") != encoder.fingerprint(run_of(wan), "ltx") != before
    file = wan / "text_encoder/config.json"
    file.write_text(file.read_text().replace('"d_ff": 16', '"d_ff": 17'))
    assert encoder.fingerprint(run_of(wan), "wan") != before


def test_a_folder_without_text_encoder(wan: Path) -> None:
    for file in (wan / "text_encoder").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="text encoder can't be loaded"):
        encoder.prepare_run(run_of(wan))


def test_a_factory_encodes_by_its_adapter(tmp_path: Path) -> None:
    source = [
        "model.factory=tests.distill.test_adapters:make_digits",
        "model.trust_code=true",
        f"output_dir={tmp_path}",
    ]
    config = run_config.load("digits", source)
    assert encoder.prepare_run(config) == 11
    read = Embeddings(config.embeddings)
    assert read.batch([3, 9])["label"].tolist() == [3, 9] and read.negative()["label"].tolist() == [10]
