"""What a run shows: plain lines in a file, one live line on a terminal, nothing on other ranks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from blade_compile.distill import progress as module
from blade_compile.distill.progress import Progress

NUMBERS = {
    "loss/critic": 0.51234, "grad_norm/critic": 0.2, "loss/student": 0.98, "grad_norm/student": 1.25,
    "sparsity": 0.75, "samples_per_second": 31.24,
}  # fmt: skip


def _console(terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=300, markup=False, highlight=False), stream


def test_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console, stream = _console(False)
    with Progress(10, console=console) as progress:
        for step, seconds in ((1, 60.0), (2, 2.0), (3, 2.5), (4, 2.0), (5, 2.0)):
            now[0] += 7.0
            progress.skip()  # a checkpoint, which is no step's time
            now[0] += seconds
            assert progress.took() == seconds
            progress.show(step, NUMBERS)
        progress.say("done")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6 and lines[-1] == "done"
    assert lines[4] == (
        "step 5/10  critic 0.5123 |g| 0.2  student 0.98 |g| 1.25  sparsity 0.75  samples/s 31.2  0:00:10 left"
    )


def test_a_terminal_has_one_live_line() -> None:
    console, stream = _console(True)
    with Progress(10, console=console) as progress:
        for step in (1, 2, 3):
            progress.took()
            progress.show(step, NUMBERS)
    shown = stream.getvalue()
    assert "step 3/10" in shown and shown.count("\n") < 3 and "\x1b[2K" in shown  # the line before is erased


def test_other_ranks_are_silent() -> None:
    console, stream = _console(False)
    with Progress(10, quiet=True, console=console) as progress:
        progress.show(1, NUMBERS)
        progress.say("something")
    assert stream.getvalue() == ""
