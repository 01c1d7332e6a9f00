"""What a run shows: a live line on a terminal, one plain line per logged step elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.text import Text

_RECENT = 20


class Progress:
    """Shows steps, losses, gradient norms, achieved sparsity, throughput and the time that is left."""

    def __init__(self, total: int, *, quiet: bool = False, console: Console | None = None) -> None:
        """Start.

        Args:
            total: steps of the run.
            quiet: show nothing (all ranks but the first).
            console: for tests.
        """
        self.total, self.quiet = total, quiet
        self.console = console or Console(soft_wrap=not sys.stdout.isatty(), highlight=False, markup=False)
        self._live: Live | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.quiet:
            self._live = Live(Text(""), console=self.console, auto_refresh=False)
            self._live.start()
        self._last = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self.console.print(text)

    def took(self) -> float:
        """Seconds since the last call, or since the start; counted as one step's time."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._recent.append(seconds)
        return seconds

    def skip(self) -> None:
        """Leave out the time since the last step: it was spent on a checkpoint or on samples."""
        self._last = time.monotonic()

    @property
    def step_seconds(self) -> float:
        """Median of the last steps, so that compilation doesn't count."""
        ordered = sorted(self._recent)
        return ordered[len(ordered) // 2] if ordered else 0.0

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """One step's numbers."""
        if self.quiet:
            return
        line = self.line(step, numbers)
        if self._live is None:
            self.console.print(line)
        else:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def line(self, step: int, numbers: Mapping[str, float]) -> str:
        """``step 12/600  critic 0.51 |g| 0.2  student 0.98 |g| 0.4  sparsity 0.75  samples/s 31.2  0:05:10 left``."""
        parts = [f"step {step}/{self.total}"]
        parts += [
            f"{role} {numbers[f'loss/{role}']:.4g} |g| {numbers[f'grad_norm/{role}']:.3g}"
            for role in ("critic", "student")
        ]
        shown = {"sparsity": "sparsity", "samples_per_second": "samples/s"}
        parts += [f"{short} {numbers[name]:.3g}" for name, short in shown.items() if name in numbers]
        parts.append(f"{_clock((self.total - step) * self.step_seconds)} left")
        return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
