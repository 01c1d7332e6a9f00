"""Build blade's wheel from this checkout and unpack it into a folder: ``install_wheel.py DEST``.

The build runs in a copy, because setuptools leaves ``build/`` behind and would pack stale files from it next time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("blade_compile", "passes", "kernels", "distill", "pyproject.toml", "README.md", "LICENSE")


def install_wheel(dest: Path) -> None:
    """Replace ``dest`` by what ``pip install .`` would put into site-packages. Needs no network."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "source")
        source.mkdir()
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, source / part)
        offline = ["--no-deps", "--no-index", "--no-build-isolation"]
        subprocess.run([*pip, "wheel", *offline, "--wheel-dir", scratch, str(source)], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        shutil.rmtree(dest, ignore_errors=True)
        subprocess.run([*pip, "install", *offline, "--target", str(dest), str(wheel)], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    install_wheel(Path(sys.argv[1]).resolve())
