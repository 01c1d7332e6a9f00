"""The ``blade-distill`` command. Training is not part of this version, and the command says so."""

from __future__ import annotations

import sys

CONFIGURATION_ERROR = 2


def main() -> int:
    """Say that training is not available yet.

    Returns:
        The exit code for "this can't be run as configured", 2.
    """
    print("blade-distill: training is not part of this version of blade, so nothing was done.", file=sys.stderr)
    return CONFIGURATION_ERROR


if __name__ == "__main__":
    sys.exit(main())
