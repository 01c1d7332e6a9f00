"""Embeddings of prompts: made once by the pipeline's own encoder, kept on disk, read back by the trainer.

::

    embeddings/
      shard-<key>.safetensors    tensors "<i>.<name>" of its prompts; rows of zeros at a tensor's end are left out
      shard-<key>.json           which prompts, how long each tensor was, the shard's hash; written after the shard
      index.json                 all of it in one file, written when the last shard is there

Shards are written beside and renamed, and a shard counts once its .json is there. So ``prepare`` continues wherever
it was stopped, in any number of ranks: a prompt belongs to the rank that its hash says. Ready embeddings in FastVideo's
Parquet form are read too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blade_compile.distill.errors import ConfigError, DataError
from blade_compile.distill.prompts import read_parquet

FORMAT = 1
Encoder = Callable[[Sequence[str]], dict[str, Tensor]]
"""Prompts to tensors with one row per prompt"""


def key_of(text: str) -> str:
    """A prompt's name on disk."""
    return hashlib.sha256(text.encode()).hexdigest()


def prepare(
    folder: str | Path,
    prompts: Iterable[str],
    negative: str,
    encode: Encoder,
    encoder: str,
    *,
    shard_size: int = 64,
    batch: int = 8,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Embed prompts that aren't embedded yet.

    Args:
        folder: where the shards go.
        prompts: a text twice is embedded once.
        negative: the prompt of the unconditional input, embedded too.
        encode: from a list of prompts to tensors ``[B, ...]``.
        encoder: fingerprint of the encoder and its settings; a folder of another is refused.
        shard_size: prompts in a shard.
        batch: prompts encoded at a time.
        rank, world: this process encodes the prompts whose hash is ``rank`` modulo ``world``.
        progress: told how many of this rank's prompts are done.

    Returns:
        How many were embedded now.

    Raises:
        ConfigError: the folder holds embeddings of another encoder.
        DataError: nothing can be written there.
    """
    folder = Path(folder)
    texts = list(dict.fromkeys(prompts))
    wanted = list(dict.fromkeys((*texts, negative)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = {item["key"] for shard in _shards(folder, encoder) for item in shard["prompts"]}
        todo = [text for text in wanted if key_of(text) not in done and int(key_of(text), 16) % world == rank]
        for start in range(0, len(todo), shard_size):
            progress(start, len(todo))
            _write_shard(folder, todo[start : start + shard_size], encode, encoder, batch)
        progress(len(todo), len(todo))
        _write_index(folder, texts, negative, encoder)
    except OSError as error:
        raise DataError(
            f"{folder}: embeddings can't be written: {error.strerror or error}; free space or choose data.embeddings"
        ) from None
    return len(todo)


def _write_shard(folder: Path, texts: Sequence[str], encode: Encoder, encoder: str, batch: int) -> None:
    stored: dict[str, Tensor] = {}
    items: list[dict[str, Any]] = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        encoded = encode(part)
        if any(len(tensor) != len(part) for tensor in encoded.values()):
            sizes = {name: tuple(tensor.shape) for name, tensor in encoded.items()}
            raise ConfigError(f"{len(part)} prompts were encoded to {sizes}; one row per prompt is wanted")
        for row, text in enumerate(part):
            lengths = {}
            for name, tensor in encoded.items():
                whole = tensor[row].detach().cpu()
                lengths[name] = len(whole) if whole.dim() else None
                stored[f"{len(items)}.{name}"] = _trimmed(whole).clone(memory_format=torch.contiguous_format)
            items.append({"key": key_of(text), "text": text, "lengths": lengths})
    name = f"shard-{key_of(''.join(item['key'] for item in items))[:20]}"
    content = save(stored)
    _write(folder / f"{name}.safetensors", content)
    record = {"format": FORMAT, "encoder": encoder, "file": f"{name}.safetensors", "bytes": len(content)}
    record |= {"sha256": hashlib.sha256(content).hexdigest(), "prompts": items}
    _write(folder / f"{name}.json", json.dumps(record, ensure_ascii=False).encode())


def _trimmed(tensor: Tensor) -> Tensor:
    """Without the rows of zeros at the end, which padding to a fixed length makes."""
    if tensor.dim() < 2:
        return tensor
    filled = tensor.flatten(1).ne(0).any(1).nonzero()
    return tensor[: int(filled[-1]) + 1 if len(filled) else 0]


def _write(path: Path, content: bytes) -> None:
    """Beside and renamed: the file is whole or absent."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _shards(folder: Path, encoder: str | None) -> Iterator[dict[str, Any]]:
    """The records of finished shards; with an encoder, those of another are refused."""
    for path in sorted(folder.glob("shard-*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found, same = record["encoder"], record["format"] == FORMAT
            size = (folder / record["file"]).stat().st_size
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            continue  # its prompts are embedded again
        if size != record["bytes"]:
            continue
        if not same or (encoder is not None and found != encoder):
            raise ConfigError(
                f"{folder} holds embeddings of another encoder or of other settings; delete it, or name another folder "
                "in data.embeddings"
            )
        yield record


def _write_index(folder: Path, texts: Sequence[str], negative: str, encoder: str) -> None:
    """One file for all shards, once every prompt is embedded, whichever rank finds that first."""
    shards = list(_shards(folder, encoder))
    done = {item["key"] for shard in shards for item in shard["prompts"]}
    keys = [key_of(text) for text in texts]
    if done.issuperset((*keys, key_of(negative))):
        index = {"format": FORMAT, "encoder": encoder, "negative": key_of(negative), "prompts": keys, "shards": shards}
        _write(folder / "index.json", json.dumps(index, ensure_ascii=False).encode())


@dataclass(frozen=True)
class _Place:
    """Where one prompt's tensors are."""

    file: Path
    row: int
    text: str
    lengths: Mapping[str, int | None]


class Embeddings:
    """Embeddings that ``prepare`` wrote.

    ``len`` and indices count the prompts in the order of their file, without the negative one.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        """Open a folder.

        Args:
            folder: where ``index.json`` is.
            verify: compare every shard with its hash, which reads all of them.

        Raises:
            DataError: the folder is missing, unfinished or damaged.
        """
        self.folder = Path(folder)
        index = self._index()
        self._places: dict[str, _Place] = {}
        for shard in index["shards"]:
            self._check(shard, verify)
            for row, item in enumerate(shard["prompts"]):
                place = _Place(self.folder / shard["file"], row, item["text"], item["lengths"])
                self._places[item["key"]] = place
        self._keys, self._negative = index["prompts"], index["negative"]
        self.encoder: str = index["encoder"]  # fingerprint of what made them

    def _index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        try:
            index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            assert index["format"] == FORMAT and index["prompts"] and index["shards"] and index["negative"]
        except FileNotFoundError:
            state = "is not finished" if any(self.folder.glob("shard-*")) else "holds no embeddings"
            raise DataError(f"{self.folder} {state}; run `blade-distill prepare`") from None
        except (OSError, ValueError, KeyError, TypeError, AssertionError):
            raise DataError(f"{path} is damaged or of another version; run `blade-distill prepare` again") from None
        return index

    def _check(self, shard: Mapping[str, Any], verify: bool) -> None:
        file = self.folder / shard["file"]
        same = file.is_file() and file.stat().st_size == shard["bytes"]
        if same and verify:
            same = hashlib.sha256(file.read_bytes()).hexdigest() == shard["sha256"]
        if not same:
            raise DataError(f"{file} is missing or damaged; delete it and run `blade-distill prepare`")

    def __len__(self) -> int:
        return len(self._keys)

    def text(self, i: int) -> str:
        """The prompt."""
        return self._places[self._keys[i]].text

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """The tensors of one prompt, without a batch dimension."""
        return self._read(self._places[self._keys[i]])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of several prompts, ``[B, ...]``."""
        return stacked([self[i] for i in indices])

    def negative(self, batch: int = 1) -> dict[str, Tensor]:
        """The unconditional input, ``[B, ...]``."""
        return stacked([self._read(self._places[self._negative])] * batch)

    def _read(self, place: _Place) -> dict[str, Tensor]:
        try:
            with safe_open(place.file, "pt") as stored:
                return {
                    name: _padded(stored.get_tensor(f"{place.row}.{name}"), length)
                    for name, length in place.lengths.items()
                }
        except (SafetensorError, OSError) as error:
            raise DataError(f"{place.file}: {error}; delete it and run `blade-distill prepare`") from None


def _padded(tensor: Tensor, length: int | None) -> Tensor:
    """With rows of zeros up to a length."""
    if length is None or len(tensor) >= length:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])))


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as a batch; raises ``DataError`` where their shapes differ."""
    for name in rows[0]:
        shapes = {tuple(row[name].shape) for row in rows}
        if len(shapes) > 1:
            raise DataError(f"embeddings {name} have the shapes {sorted(shapes)}; one shape for all prompts is wanted")
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class ParquetEmbeddings:
    """Embeddings in FastVideo's Parquet: ``text_embedding_bytes``, ``_shape``, ``_dtype``, and ``caption``.

    Of the T5 kind (Wan): each prompt's rows are padded with zeros to ``length``. There is no negative prompt in these
    files; one can be given as the embedding of a prompt that the caller encodes.
    """

    def __init__(self, path: str | Path, *, length: int = 512, negative: Mapping[str, Tensor] | None = None) -> None:
        """Read all rows of a file, or of all ``*.parquet`` files of a folder, sorted by name.

        Raises:
            DataError: nothing is there, a column is missing, or a row is malformed.
        """
        root = Path(path)
        files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
        if not files or not files[0].is_file():
            raise DataError(f"data.embeddings: no Parquet file at {root}")
        self._negative, self._length = negative, length
        self._rows = [
            _parquet_row(file, i, row)
            for file in files
            for i, row in enumerate(read_parquet(file, "data.embeddings"), 1)
        ]
        if not self._rows:
            raise DataError(f"data.embeddings: {root} holds no row")
        longest = max(len(tensor) for _, tensor in self._rows)
        if longest > length:
            raise DataError(f"data.embeddings: {root} has a prompt of {longest} tokens; the model takes {length}")

    def __len__(self) -> int:
        return len(self._rows)

    def text(self, i: int) -> str:
        """The prompt."""
        return self._rows[i][0]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """The tensors of one prompt."""
        return {"prompt_embeds": _padded(self._rows[i][1], self._length)}

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of several prompts, ``[B, ...]``."""
        return stacked([self[i] for i in indices])

    def negative(self, batch: int = 1) -> dict[str, Tensor]:
        """The unconditional input. Raises ``DataError`` where none was given."""
        if self._negative is None:
            raise DataError(
                "data.embeddings is FastVideo's Parquet, which has no negative prompt: set method.cfg_scale=1, or run "
                "`blade-distill prepare`, which encodes data.negative_prompt"
            )
        return stacked([self._negative] * batch)


_NUMPY_DTYPES = ("float32", "float16", "float64")


def _parquet_row(file: Path, i: int, row: Mapping[str, Any]) -> tuple[str, Tensor]:
    names = [f"text_embedding_{part}" for part in ("bytes", "shape", "dtype")]
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise DataError(f"{file}, row {i}: no {', '.join(missing)}; FastVideo's columns are {', '.join(names)}")
    content, shape, dtype = (row[name] for name in names)
    if dtype not in _NUMPY_DTYPES:
        raise DataError(f"{file}, row {i}: text_embedding_dtype is {dtype!r}; valid are {', '.join(_NUMPY_DTYPES)}")
    kind: torch.dtype = getattr(torch, dtype)
    size = [int(n) for n in shape]
    alone = len(size) == 2 or (len(size) == 3 and size[0] == 1)
    if not alone or torch.Size(size).numel() * kind.itemsize != len(content):
        raise DataError(f"{file}, row {i}: text_embedding_shape is {size} and there are {len(content)} bytes")
    tensor = torch.frombuffer(bytearray(content), dtype=kind).reshape(size[-2:])
    return str(row.get("caption") or ""), tensor


def is_parquet(path: str | Path) -> bool:
    """Whether these are FastVideo's: a file, or a folder of them that holds none of ours."""
    root = Path(path)
    return root.suffix == ".parquet" or (not (root / "index.json").exists() and any(root.rglob("*.parquet")))
