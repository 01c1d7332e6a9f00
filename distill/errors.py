"""Errors that end a command: one line that says what was found, what is valid and what to do, and an exit code."""

from __future__ import annotations


class DistillError(ValueError):
    """Anything that stops a command of ``blade-distill`` for a reason that the user can act on."""

    exit_code = 1


class ConfigError(DistillError):
    """The run can't be done as configured: the YAML, an override, a model folder, a scheduler, a grid."""

    exit_code = 2


class DataError(DistillError):
    """The prompts or the embeddings are missing, malformed, or can't be written."""

    exit_code = 3


class DivergedError(DistillError):
    """A loss became NaN or exploded."""

    exit_code = 1
