"""Distil a model into a few-step student with sparse attention: what `blade-distill` does, from Python.

- ``python examples/distil.py``: the preset for Wan 2.1; several GPUs: torchrun --nproc-per-node=8 ...
- ``python examples/distil.py --tiny``: handwritten digits that move, two updates, a CPU
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from blade_compile.distill.config import load
from blade_compile.distill.dry_run import dry_run
from blade_compile.distill.trainer import train

# Any field of the configuration: `blade-distill init PRESET` prints them all with what they mean.
REAL = ["data.prompts=prompts.txt", "output_dir=runs", "name=wan"]
TINY = ["loop.max_steps=2", "loop.batch_size=2", "loop.sample_every=0", "method.steps=2", "name=digits"]


def main() -> int:
    """Show what the run would do, do it, and say where the student is."""
    tiny = "--tiny" in sys.argv
    config = load("digits", TINY) if tiny else load("wan2.1-1.3b", REAL)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets them
    if rank == 0:
        for name, value in dry_run(config, world=world).rows():
            print(f"{name}: {value}")
    code = train(config)  # called again, it goes on from the last checkpoint
    export = Path(config.folder) / "export"
    if rank == 0 and export.is_dir():
        print(f"{export}: {', '.join(sorted(path.name for path in export.iterdir()))}")
    return code


if __name__ == "__main__":
    sys.exit(main())
