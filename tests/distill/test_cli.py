"""The command line: help, exit codes, and that each command hands the right things to the right function."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from blade_compile.distill import cli, config, encoder, ranks
from blade_compile.distill.errors import DivergedError
from blade_compile.distill.prompts import Prompt

Captured = pytest.CaptureFixture[str]
COMMANDS = ("init", "prepare", "train", "export", "generate", "eval", "digits")


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["blade-distill", *args])
    return cli.main()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    """A module of another stage, whether or not this version has it."""
    made = types.ModuleType(f"blade_compile.distill.{module}")
    made.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    for name, function in functions.items():
        setattr(made, name, function)
    monkeypatch.setitem(sys.modules, made.__name__, made)


# Help.


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)
    assert "prompts alone" in text and "torchrun" in text


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("init", ["PRESET", "--out", "--list", "--json-schema", "what it means"]),
        ("prepare", ["--config", "[KEY=VALUE]", "Embed the prompts once"]),
        ("train", ["--config", "[KEY=VALUE]", "--dry-run", "--resume", "auto|never|PATH", "--dry-run"]),
        ("export", ["RUN", "--out", "--step", "--merge", "stock diffusers"]),
        ("generate", ["EXPORT", "--prompt", "--prompts", "--seed", "--sparse", "--dense"]),
        ("eval", ["EXPORT", "--vbench", "--vbench-python", "--dimension", "PSNR"]),
        ("digits", ["--quick", "--full", "--out", "--seed", "no GPU"]),
    ],
)
def test_help_of_each_command(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, command: str, wanted: list[str]
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    for word in wanted:
        assert word in text, word


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['blade-distill', 'train', '--help']\n"
        "from blade_compile.distill.cli import main\n"
        "assert main() == 0 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    "args",
    [["nonsense"], ["train", "--nonsense"], ["export"], ["digits", "--seed", "x"], ["digits", "--quick", "--full"]],
    ids=" ".join,
)
def test_wrong_use_ends_with_2(monkeypatch: pytest.MonkeyPatch, capsys: Captured, args: list[str]) -> None:
    assert run(monkeypatch, *args) == 2
    assert capsys.readouterr().err


# init.


@pytest.mark.parametrize("preset", config.PRESETS)
def test_init_writes_what_train_reads(monkeypatch: pytest.MonkeyPatch, capsys: Captured, preset: str) -> None:
    assert run(monkeypatch, "init", preset, "--out", "run.yaml", "name=mine") == 0
    written = config.load("run.yaml")
    assert written.name == "mine" and written.preset == preset
    assert "next: blade-distill train" in capsys.readouterr().out
    assert run(monkeypatch, "init", preset, "--out", "run.yaml") == 2
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_init_prints(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert run(monkeypatch, "init", "flux-dev") == 0
    assert "# K, the student's model calls" in capsys.readouterr().out
    assert run(monkeypatch, "init", "flux-dev", "--bare") == 0
    assert "#" not in capsys.readouterr().out
    assert run(monkeypatch, "init", "--list") == 0
    assert capsys.readouterr().out.split() == list(config.PRESETS)
    assert run(monkeypatch, "init", "--json-schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "RunConfig"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["init"], "preset is ''; valid are digits"),
        (["init", "wan"], "preset is 'wan'; valid are digits"),
        (["init", "digits", "methd.steps=3"], "methd: unknown key; did you mean 'method'"),
        (["init", "digits", "--out", "none/run.yaml"], "can't be written"),
        (["train"], "--config is missing"),
        (["train", "--config", "none.yaml"], "No such file"),
        (["train", "--config", "method.steps=3"], "overrides stand without an option"),
        (["train", "--config", "digits", "--resume", "nowhere"], "--resume is 'nowhere'; valid are auto, never"),
        (["prepare", "--config", "digits", "method.steps=0"], "method.steps: found 0"),
        (["export", "nowhere"], "nowhere has no config.yaml"),
        (["generate", "nowhere", "--prompt", "a"], "nowhere is no folder"),
        (["generate", "."], "give prompts either by --prompt or by --prompts"),
        (["eval", ".", "--prompts", "prompts.txt", "--vbench", "3"], "--vbench is '3'; valid are 1 and 2"),
        (["eval", ".", "--prompts", "prompts.txt", "--vbench", "1"], "needs --vbench-python"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_configuration_errors(monkeypatch: pytest.MonkeyPatch, capsys: Captured, args: list[str], said: str) -> None:
    assert run(monkeypatch, *args) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("blade-distill: ") and "Traceback" not in err


def test_data_errors_end_with_3(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    assert run(monkeypatch, "generate", ".", "--prompts", "none.txt") == 3
    assert "none.txt does not exist" in capsys.readouterr().err


# Commands and the functions that do them.


def test_train_hands_over_configuration_and_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    stand_in(monkeypatch, "trainer", train=lambda c, resume: given.append((c, resume)))
    assert run(monkeypatch, "train", "--config", "digits", "method.steps=2", "--resume", "never") == 0
    (made,) = given
    assert made[0].method.steps == 2 and made[1] == "never"


def test_train_ends_with_the_trainers_own_code(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    stand_in(monkeypatch, "trainer", train=lambda c, resume: 130)
    assert run(monkeypatch, "train", "--config", "digits") == 130

    def diverged(c: Any, resume: str) -> None:
        raise DivergedError("loss is NaN at step 7; last good checkpoint: step 5")

    stand_in(monkeypatch, "trainer", train=diverged)
    assert run(monkeypatch, "train", "--config", "digits") == 1
    assert capsys.readouterr().err == "blade-distill: loss is NaN at step 7; last good checkpoint: step 5\n"


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(c: Any, resume: str) -> None:
        raise KeyboardInterrupt

    stand_in(monkeypatch, "trainer", train=interrupted)
    assert run(monkeypatch, "train", "--config", "digits") == 130


def test_dry_run_starts_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path) -> None:
    def started(c: Any, resume: str) -> None:
        raise AssertionError

    stand_in(monkeypatch, "trainer", train=started)
    monkeypatch.setenv("WORLD_SIZE", "2")
    own = ["model.factory=tests.distill.test_dry_run:small", "model.trust_code=true"]
    assert run(monkeypatch, "train", "--config", "digits", "--dry-run", *own) == 0
    out = capsys.readouterr().out
    for said in (
        "256, grid 4 x 8 x 8",
        "2 calls can be sparse",
        "memory per rank",
        "2 ranks",
        "K = 4",
        "cfg_scale 2.5",
    ):
        assert said in out, said
    assert not (tmp_path / "runs").exists()
    assert run(monkeypatch, "train", "--config", "digits", "-n", *own, "latent.height=32") == 2
    assert "8 x 16 x 16" in capsys.readouterr().err


def test_prepare_shares_by_rank(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    given: list[Any] = []

    def prepare_run(c: Any, rank: int, world: int, progress: Any) -> int:
        progress(0, 3)
        given.append((rank, world))
        return 3

    class Four(ranks.Ranks):
        """One of four processes that have each embedded three."""

        def mean(self, values: Sequence[float]) -> list[float]:
            assert given[-1] == (self.rank, 4) and not capsys.readouterr().out  # waits before "all are in"
            return list(values)

    monkeypatch.setattr(encoder, "prepare_run", prepare_run)
    assert run(monkeypatch, "prepare", "--config", "digits") == 0
    shown = capsys.readouterr()
    assert "3 prompts embedded now; all are in runs/run/embeddings" in shown.out and "0 of 3" in shown.err
    for rank in (1, 0):
        here = Four(rank, 4, torch.device("cpu"))
        monkeypatch.setattr(ranks, "ranks", lambda here=here: contextlib.nullcontext(here))
        assert run(monkeypatch, "prepare", "--config", "digits") == 0
        assert ("12 prompts embedded now" in capsys.readouterr().out) == (rank == 0)
    assert given == [(0, 1), (1, 4), (0, 4)]


def test_prepare_of_the_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = ["model.factory=tests.distill.test_dry_run:small", "model.trust_code=true"]
    assert run(monkeypatch, "prepare", "-c", "digits", *own) == 0
    assert (tmp_path / "runs/run/embeddings/index.json").is_file()


def test_a_prompt_files_seeds_and_sizes(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path) -> None:
    """Generate takes them; eval says that it doesn't."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "seed": 7, "height": 64}\n')
    given: list[Any] = []
    stand_in(monkeypatch, "generate", generate_from_export=lambda *a, **more: given.append((*a, more)) or [])
    stand_in(monkeypatch, "evaluate", evaluate_export=lambda *a, **more: given.append((*a, more)))
    assert run(monkeypatch, "generate", ".", "--prompts", "p.jsonl", "--seed", "2", "--count", "2") == 0
    assert given[0][1] == [Prompt("a cat", seed=7, height=64)] and given[0][-1]["seeds"] == range(2, 4)
    assert run(monkeypatch, "eval", ".", "--prompts", "prompts.txt") == 0
    assert capsys.readouterr().err == ""
    assert run(monkeypatch, "eval", ".", "--prompts", "p.jsonl", "--seeds", "3", "--trust-code") == 0
    assert given[2][1] == ["a cat"] and given[2][-1]["trust_code"]
    assert "p.jsonl names seeds or sizes, which eval leaves alone" in capsys.readouterr().err


def test_digits_hands_over_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    stand_in(monkeypatch, "digits_run", run=lambda **options: given.update(options) or 0)
    assert run(monkeypatch, "digits", "--quick", "--seed", "3", "--out", "here") == 0
    assert given == {"out": Path("here"), "quick": True, "full": False, "seed": 3}


def test_sigint_from_outside_ends_with_130(tmp_path: Path) -> None:
    """The whole process, while a command is at work."""
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit none
        "from blade_compile.distill import cli\n"
        "cli._load = lambda *a: print('ready', flush=True) or time.sleep(60)\n"
        "sys.argv = ['blade-distill', 'train', '--config', 'digits']\n"
        "sys.exit(cli.main())\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
