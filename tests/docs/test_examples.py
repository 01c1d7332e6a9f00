"""Every example runs on its tiny configuration: here in this process, and (slow) as its first lines say to start it.

In this process Inductor's code generation is left out (`stand_ins.without_code_generation`), but for one example.
"""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.docs.stand_ins import EXAMPLES, ROOT, without_code_generation

PRINTS = {
    "wan_text_to_video": ["1 of 2 attention sites run sparse", "wrote wan.gif, 9 frames"],
    "cogvideox_text_to_video": ["wrote cogvideox.gif, 9 frames"],
    "flux_image": ["wrote flux.png, 256 x 256"],
    "own_module": ["2 of 2 attention sites run sparse", "relative difference from dense attention: 0.0"],
    "calibrate": ["wrote blade-calibration.json", "1 sparse sites"],
    "distil": ["sparsity: 0.75, density 0.25", "runs/digits/export: README.md, blade.json, transformer"],
    "adaspa_generation": ["wrote adaspa-0.gif, 5 frames", "wrote adaspa-1.gif, 5 frames"],
    "fsdp2_training": ["step 2: loss"],
    "ulysses": ["worst difference"],
}
"""What each has to print"""
GENERATED = {"own_module"}
RANKS = {"fsdp2_training", "ulysses"}
HELPERS = {"tiny"}


def check(name: str, printed: str) -> None:
    for text in PRINTS[name]:
        assert text in printed, f"{name} did not print {text!r}:\n{printed[-3000:]}"
    if name == "ulysses":
        found = re.findall(r"worst difference (\d\.\de[+-]\d\d)", printed)  # two ranks may write into one line
        assert len(found) == printed.count("worst difference")
        assert all(float(worst) < 1e-4 for worst in found)
    if name == "fsdp2_training":
        losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
        assert losses[-1] < losses[0]


def test_no_example_is_left_out() -> None:
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    assert files == PRINTS.keys() | HELPERS
    told = set(re.findall(r"^\| `(\w+)\.py`", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert told == files


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_options_for_a_gpu_say_always(name: str) -> None:
    """``when="auto"`` stays dense on a chip whose cost constants nobody measured."""
    text = (EXAMPLES / f"{name}.py").read_text()
    if "cuda" in text or "from_pretrained" in text:
        options = [found for found in re.findall(r"\{[^{}]*\}", text) if re.search('"sparsity"|"preset"', found)]
        options += re.findall(r"compile\(.*(\{.*\})", text)
        assert options
        assert all('"when": "always"' in found or "**" in found for found in options), options


@pytest.mark.parametrize("name", PRINTS)
def test_example(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name not in GENERATED:
        without_code_generation(monkeypatch)
    if name in RANKS:
        for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny"])
    try:
        with contextlib.suppress(SystemExit):  # of a main() that returns an exit code, which what is printed shows too
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    check(name, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRINTS if name not in RANKS])
def test_example_as_a_program(name: str, tmp_path: Path) -> None:
    check(name, run([sys.executable], name, tmp_path))


@pytest.mark.parametrize("name", [pytest.param("fsdp2_training", marks=pytest.mark.slow), "ulysses"])
def test_example_on_two_ranks(name: str, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    printed = run(torchrun, name, tmp_path)
    check(name, printed)
    assert name != "ulysses" or printed.count("worst difference") == 2


def run(program: list[str], name: str, folder: Path) -> str:
    """What an example prints as a process of its own."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*program, str(EXAMPLES / f"{name}.py"), "--tiny"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
