"""The package holds together: layers, names, the wheel's content, and how it imports in each way of installing it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import requires
from importlib.util import resolve_name
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# Folder -> the package it is installed as, lowest layer first: each may import only from those before it.
LAYERS = {
    "kernels": "blade_compile.kernels",
    "passes": "blade_compile.passes",
    "blade_compile": "blade_compile",
    "distill": "blade_compile.distill",
}
MAPPED = ("kernels", "passes", "distill")  # no __init__.py in these, and never a top-level name


def shipped_files(folder: str) -> set[str]:
    """Everything in a folder of the checkout that has to be in the wheel, relative to the folder."""
    paths = (ROOT / folder).rglob("*") if folder in LAYERS else ()
    files = (path.relative_to(ROOT / folder) for path in paths if path.is_file())
    return {str(path) for path in files if "__pycache__" not in path.parts and path.name != "README.md"}


def imported_modules(path: Path, package: str) -> set[str]:
    """Full names of the modules that a file imports anywhere, names taken from a package included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else str(node.module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def layer_of(module: str) -> str | None:
    """The folder that a module of ours lies in; None for other people's modules."""
    parts = module.split(".")
    if parts[0] != "blade_compile":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in MAPPED else "blade_compile"


def run_python(code: str, cwd: Path, *path: Path, site: bool = True) -> str:
    """Run code in a fresh interpreter and return what it printed; ``site=False`` hides the installed blade."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *([] if site else ["-S"]), "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, by links, of site-packages without blade: what a machine has where blade is not installed."""
    folder = tmp_path_factory.mktemp("others")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "blade_compile" not in entry.name and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel: what ``pip install .`` puts into site-packages."""
    dest = tmp_path_factory.mktemp("wheel") / "site"
    subprocess.run([sys.executable, str(ROOT / "scripts/install_wheel.py"), str(dest)], check=True, timeout=300)
    return dest


@pytest.mark.parametrize("folder", LAYERS)
def test_a_layer_imports_only_from_those_below(folder: str) -> None:
    order = list(LAYERS)
    above = order[order.index(folder) + 1 :]
    for name in sorted(shipped_files(folder)):
        if name.endswith(".py"):
            modules = imported_modules(ROOT / folder / name, LAYERS[folder])
            wrong = sorted(module for module in modules if layer_of(module) in above)
            assert not wrong, f"{folder}/{name} imports {wrong}, which sit above it"


def test_nobody_imports_a_second_copy_under_the_folder_name() -> None:
    tops = [ROOT / name for name in (*LAYERS, "tests", "benchmarks", "scripts")]
    for path in (path for top in tops for path in top.rglob("*.py")):
        wrong = [name for name in imported_modules(path, "any") if name.split(".")[0] in {"passes", "distill"}]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}: the name is blade_compile.{wrong[0]}"
    ours = [name for name, module in list(sys.modules.items()) if name.split(".")[0] in MAPPED and _is_ours(module)]
    assert not ours


def _is_ours(module: object) -> bool:
    return str(getattr(module, "__file__", None) or "").startswith(str(ROOT) + os.sep)


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folders_have_no_init(folder: str) -> None:
    # With one, `import transformers` in the repo root takes our kernels/ for the PyPI package of that name.
    assert not list((ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("folder", LAYERS)
def test_the_wheel_holds_the_checkout(folder: str, wheel: Path) -> None:
    installed = wheel / LAYERS[folder].replace(".", "/")
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    found = {name for name in found if "__pycache__" not in name}
    if folder == "blade_compile":
        found = {name for name in found if Path(name).parts[0] not in MAPPED}
    assert found == shipped_files(folder)
    for name in found:
        assert (installed / name).read_bytes() == (ROOT / folder / name).read_bytes()


def test_the_wheel_installs_one_name(wheel: Path, others: Path, tmp_path: Path) -> None:
    packages = {path.name for path in wheel.iterdir() if path.is_dir() and path.suffix != ".dist-info"}
    assert packages - {"bin", "__pycache__"} == {"blade_compile"}
    code = "import blade_compile.kernels.lists as m; print(m.__file__)"
    assert run_python(code, tmp_path, wheel, others, site=False).startswith(str(wheel))
    code = "import importlib.util as u; print([u.find_spec(n) for n in ('kernels', 'passes', 'distill')])"
    assert run_python(code, tmp_path, wheel, site=False) == "[None, None, None]"


IMPORTED = "import sys, blade_compile; print(sorted({'triton', 'diffusers', 'torch._inductor'} & set(sys.modules)))"


def test_import_is_light(tmp_path: Path, others: Path) -> None:
    assert run_python(IMPORTED, tmp_path) == "[]"
    assert run_python(IMPORTED, ROOT, others, site=False) == "[]"


NAMED = """
from torch._dynamo.backends.registry import list_backends, lookup_backend
import blade_compile
assert "blade" in list_backends()
assert lookup_backend("blade") is blade_compile.blade
print(blade_compile.__file__)
"""
NAMED_LATE = "import torch._dynamo as d; assert 'blade' not in d.list_backends()\n" + NAMED


@pytest.mark.parametrize("code", ["import blade_compile\n" + NAMED, NAMED_LATE], ids=["before", "after"])
def test_the_name_works_uninstalled_whenever_it_is_imported(code: str, others: Path) -> None:
    assert run_python(code, ROOT, others, site=False) == str(ROOT / "blade_compile/__init__.py")


def test_the_name_works_from_the_wheel_without_an_import(wheel: Path, others: Path, tmp_path: Path) -> None:
    assert run_python(NAMED, tmp_path, wheel, others, site=False) == str(wheel / "blade_compile/__init__.py")


def test_the_name_works_editable_from_anywhere(tmp_path: Path) -> None:
    assert run_python(NAMED, tmp_path) == str(ROOT / "blade_compile/__init__.py")


def test_an_uninstalled_checkout_does_not_disturb_its_neighbours(others: Path) -> None:
    code = (
        "import blade_compile, diffusers, transformers; from importlib import metadata as m; m.packages_distributions()"
    )
    run_python(code, ROOT, others, site=False)


def test_every_public_name_is_there() -> None:
    import blade_compile

    assert all(getattr(blade_compile, name) is not None for name in blade_compile.__all__)
    assert set(blade_compile.__all__) <= set(dir(blade_compile))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        blade_compile.nothing  # noqa: B018


def test_every_dependency_is_pinned() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+?);?(?:\s|$)", text, re.MULTILINE))
    named = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    needed = map(Requirement, requires("blade-compile") or ())
    trackers = ("tensorboard", "trackio", "wandb")  # a user's choice; nothing here installs them
    wanted = {re.sub(r"[-_.]+", "-", one.name).lower() for one in needed if one.name not in trackers}
    assert wanted <= named
    assert not {"torchvision", "torchaudio"} & named
    assert next(iter(pins)) == "torch"


def test_each_folder_says_what_its_files_do() -> None:
    check = [sys.executable, str(ROOT / "scripts/folder_tables.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
