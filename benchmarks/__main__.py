"""``python -m benchmarks``: attention, the choices of ``auto`` and compile times on this machine, one by one."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.tables import ROOT

REPORTS = ("cpu_attention", "auto_choice", "compile_time")


def main() -> int:
    """Run each report in a process of its own: threads and caches of one don't reach the next."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--quick", action="store_true", help="few sizes and rounds, into .cache/benchmarks")
    parser.add_argument("--out", type=Path, help="folder of the result files (default: benchmarks/results)")
    args = parser.parse_args()
    folder = args.out or ROOT / (".cache/benchmarks" if args.quick else "benchmarks/results")
    options = ["--out", str(folder.resolve()), *(["--quick"] if args.quick else [])]
    codes = [
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], cwd=ROOT, check=False)
        for name in REPORTS
    ]
    print(f"results in {folder}")
    return max(abs(done.returncode) for done in codes)


if __name__ == "__main__":
    sys.exit(main())
