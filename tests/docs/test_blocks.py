"""Every block of code in the pages and the README: Python runs on small stand-ins, commands and YAML are parsed."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer

from blade_compile.kernels import policies
from tests.docs import stand_ins
from tests.docs.stand_ins import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "sh", "yaml", "text", "{toctree}"}


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    """All of a page, in order."""
    found, opened, start = [], None, 0
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if opened is None:
                opened, start = line[3:].strip(), number + 1
            else:
                found.append(Block(opened, "\n".join(lines[start:number]), start + 1))
                opened = None
    assert opened is None, f"{path.name}:{start}: a block without an end"
    return found


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_language(*languages: str) -> list[Any]:
    return [pytest.param(p, id=named(p)) for p in PAGES if {block.language for block in blocks(p)} & set(languages)]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_languages_are_known(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.fixture
def workplace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    known = dict(policies.POLICIES)
    stand_ins.install(monkeypatch, tmp_path)
    stand_ins.student(tmp_path / "student")
    yield tmp_path
    policies.POLICIES.clear()
    policies.POLICIES.update(known)


@pytest.mark.parametrize("page", with_language("python"))
def test_python(page: Path, workplace: Path) -> None:
    """Blocks of a page share their names. A text block right after one begins with something that it printed."""
    names: dict[str, Any] = {"__name__": "__page__", **(readme_names() if page.name == "README.md" else {})}
    found = blocks(page)
    for i, block in enumerate(found):
        if block.language != "python":
            continue
        file = workplace / f"{page.stem}_{block.line}.py"  # a real file: Dynamo and tracebacks want source lines
        file.write_text(block.text.replace(", ...]", "]"))  # "and so on" in a list of batches
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(file.read_text(), str(file), "exec"), names)
        if i + 1 < len(found) and found[i + 1].language == "text":
            assert found[i + 1].text.splitlines()[0] in printed.getvalue().splitlines(), f"{page.name}:{block.line}"


def readme_names() -> dict[str, Any]:
    """What the README's short blocks take for granted."""
    import tiny
    from diffusers import WanPipeline

    import blade_compile

    call = {
        "hidden_states": torch.randn(1, 4, 3, 16, 16), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, tiny.TEXT),
    }  # fmt: skip
    pipe = WanPipeline.from_pretrained("any")
    return {"blade_compile": blade_compile, "pipe": pipe, "prompt": "a cat", "args": (), "kwargs": call}


def commands() -> list[Any]:
    found = []
    for page in PAGES:
        for block in blocks(page):
            lines = block.text.replace("\\\n", " ").splitlines() if block.language == "sh" else []
            found += [pytest.param(line, id=f"{page.stem}:{block.line}:{i}") for i, line in enumerate(lines)]
    return found


@pytest.mark.parametrize("line", commands())
def test_shell(line: str) -> None:
    for part in re.split(r"&&|;", line.partition("#")[0]):
        words = shlex.split(re.sub(r"<[^>]*>", "URL", part))
        if words:
            check_command(words)


def check_command(words: list[str]) -> None:
    """The program is one that the pages may use, and its arguments are ones that it knows."""
    program, *rest = words
    if program == "blade-distill":
        parses(rest)
    elif program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in rest)
    elif program in {"python", "torchrun"}:
        module = rest[rest.index("-m") + 1] if "-m" in rest else None
        if module == "blade_compile.distill.cli":
            parses(rest[rest.index("-m") + 2 :])
        elif module is not None:
            assert find_spec(module)
        else:
            assert (ROOT / next(word for word in rest if word.endswith(".py"))).is_file()
    else:
        assert program in {"pip", "git", "cd"}, program


def parses(words: list[str]) -> None:
    """``blade-distill`` takes these words. Nothing is run: the commands' contexts are made and thrown away."""
    from blade_compile.distill.cli import app

    group = typer.main.get_command(app)
    with typer.Context(group) as context:
        command = group.get_command(context, words[0])
        assert command is not None, words[0]
        command.make_context(words[0], words[1:], parent=context)


@pytest.mark.parametrize("page", with_language("yaml"))
def test_yaml_is_a_configuration(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blade_compile.distill.config import load

    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\n")
    for block in blocks(page):
        if block.language == "yaml":
            Path("run.yaml").write_text(block.text)
            assert load("run.yaml", []).name


def test_a_wrong_command_is_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        check_command(["blade-distill", "train", "--confg", "run.yaml"])
    for line in (["blade-distill", "trian"], ["make", "nothing"], ["python", "-m", "benchmarks.nothing"], ["rm", "x"]):
        with pytest.raises(AssertionError):
            check_command(line)
