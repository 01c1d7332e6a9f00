"""Prompt files of every kind, and what is said about those that can't be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blade_compile.distill.errors import DataError
from blade_compile.distill.prompts import Prompt, read_prompts

FULL = Prompt("a cat, asleep", seed=7, height=480, width=832, num_frames=81)


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = write(tmp_path, "p.txt", "\ufeffa cat\r\n\n  eine Straße bei Nacht  \na dog")
    assert read_prompts(file) == [Prompt("a cat"), Prompt("eine Straße bei Nacht"), Prompt("a dog")]


def test_text_keeps_unusual_line_separators_inside_a_prompt(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "p.txt", "one\u2028still one\ntwo")) == [
        Prompt("one\u2028still one"),
        Prompt("two"),
    ]


def test_jsonl(tmp_path: Path) -> None:
    row = {"prompt": "a cat, asleep", "seed": 7, "height": 480, "width": 832.0, "num_frames": "81", "other": [1]}
    file = write(tmp_path, "p.jsonl", json.dumps(row) + '\n\n"a dog"\n{"caption": "a cow", "seed": null}\n')
    assert read_prompts(file) == [FULL, Prompt("a dog"), Prompt("a cow")]


def test_csv(tmp_path: Path) -> None:
    file = write(tmp_path, "p.csv", 'prompt,seed,height,width,num_frames\n"a cat, asleep",7,480,832,81\na dog,,,,\n')
    assert read_prompts(file) == [FULL, Prompt("a dog")]


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    file = write(tmp_path, "p.csv", "text,my_seed\na cat,5\n")
    assert read_prompts(file, {"prompt": "text", "seed": "my_seed"}) == [Prompt("a cat", seed=5)]


def test_fastvideos_validation_file(tmp_path: Path) -> None:
    items = [{"caption": "a cat, asleep", "seed": 7, "height": 480, "width": 832, "num_frames": 81, "image_path": None}]
    assert read_prompts(write(tmp_path, "v.json", json.dumps({"data": items}))) == [FULL]
    assert read_prompts(write(tmp_path, "w.json", json.dumps(items))) == [FULL]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"caption": ["a cat, asleep", "a dog"], "seed": [7, None], "height": [480, None]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == [Prompt("a cat, asleep", seed=7, height=480), Prompt("a dog")]
    damaged = write(tmp_path, "q.parquet", "no parquet")
    with pytest.raises(DataError, match="no readable Parquet"):
        read_prompts(damaged)


def test_parquet_without_pyarrow_names_the_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        read_prompts(write(tmp_path, "p.parquet", ""))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.csv", "prompt\n", "holds no prompt"),
        ("p.md", "a cat", "valid are .txt, .jsonl"),
        ("p.jsonl", '"a"\n{"prompt": ', "line 2: no JSON"),
        ("p.jsonl", '"a"\n[1]', "line 2: a list"),
        ("p.jsonl", '{"text": "a"}', "line 1: no text in prompt or caption .found text.*data.columns"),
        ("p.jsonl", '{"prompt": "  "}', "line 1: no text"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', "seed is 1.5; an integer"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "seed is True"),
        ("p.csv", "prompt,seed\na,x\n", "line 2: seed is 'x'"),
        ("p.csv", "prompt,seed\na\n", "line 2: not as many cells"),
        ("p.csv", "prompt,seed\na,1,2\n", "line 2: not as many cells"),
        ("p.json", '{"items": []}', 'FastVideo\'s {"data"'),
        ("p.json", '[\n"a",\n]', "line 3: no JSON"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_prompts(write(tmp_path, name, text))


def test_missing_files_folders_and_other_encodings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(DataError, match="does not exist"):
        read_prompts(tmp_path / "none.parquet")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="can't be read"):
        read_prompts(tmp_path / "folder.txt")
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1"))
    with pytest.raises(DataError, match="can't be read"):
        read_prompts(tmp_path / "latin.txt")


def test_unknown_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown name 'promt'; valid are prompt"):
        read_prompts(write(tmp_path, "p.txt", "a"), {"promt": "x"})
