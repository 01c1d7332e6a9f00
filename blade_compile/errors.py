"""The errors that users can catch."""

from __future__ import annotations

from torch._dynamo.exc import ShortenTraceback


class BladeOptionError(ShortenTraceback, ValueError):
    """An option is wrong. A ``ValueError`` that torch.compile lets through as it is."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)
