"""Signals that end a run: SIGTERM and SIGUSR1 (a cluster takes the machine back), SIGINT (Ctrl-C)."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_ENDINGS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Shutdown:
    """Inside the ``with``, a signal ends the run at once, or, while ``deferred``, after the step that is being made.

    At once means: SIGINT raises KeyboardInterrupt (exit code 130), the others ``SystemExit(0)``: there is nothing yet
    to lose. While deferred the first signal is kept in ``received`` and a second SIGINT is not waited for.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """Of a run that was checkpointed because of the signal."""
        return 130 if self.received == signal.SIGINT else 0

    def __enter__(self) -> Shutdown:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.signal(number, self._handle) for number in _ENDINGS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None and number == signal.SIGINT
        if not self.deferred or again:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(0)
        if self.received != signal.SIGINT:
            self.received = signal.Signals(number)
