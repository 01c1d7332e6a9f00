"""Builds the C++ kernels at first use, once per machine, and loads them.

One shared library holds every ``cpu_*.cpp`` of this folder, compiled for the best instruction set of this machine. It
has a plain C ABI (no Python or libtorch headers: a build takes seconds, and any torch can load it) and is kept in a
per-user cache under the hash of everything it depends on. Where nothing can be built, ``load`` returns None after one
warning and the ATen path is used.

Environment: ``CXX`` (compiler), ``BLADE_CACHE_DIR`` (where libraries are kept), ``BLADE_CPU_ISA`` (forces a variant).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import compat

logger = logging.getLogger("blade_compile")

SOURCE_DIR = Path(__file__).parent
UNITS = ("cpu_forward.cpp", "cpu_backward.cpp", "cpu_probe.cpp")
BUILD_SECONDS = 600  # a build takes seconds; a compiler that hangs must not hang the user's program
# Words of tensors are read as floats, bf16 pairs and integers: aliasing by type would be wrong.
COMMON_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-strict-aliasing", "-Wno-psabi", "-Wno-ignored-attributes"),
]
_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
# Best first. "plain" is the baseline of the architecture: SSE2 on x86-64, NEON on 64-bit Arm.
ISA_FLAGS = {
    "avx512_bf16": f"{_AVX512} -mavx512bf16".split(),
    "avx512": _AVX512.split(),
    "avx2": _AVX2.split(),
    "plain": [],
}
ISA_NEEDS = {
    "avx512_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "plain": set(),
}

_lock = threading.Lock()
_loaded: dict[str | None, ctypes.CDLL | None] = {}
_warned = False


class BuildError(Exception):
    """What kept the kernels from being built or loaded, as a sentence for the user."""


def load(isa: str | None = None) -> ctypes.CDLL | None:
    """The library of C++ kernels, built at the first call of the first process, or None where that is impossible.

    Args:
        isa: one of ``available_isas()``; None: ``BLADE_CPU_ISA`` if set, else the best one that compiles.

    Raises:
        ValueError: an instruction set that this machine can't run.
    """
    isa = isa or os.environ.get("BLADE_CPU_ISA") or None
    if isa is not None and isa not in available_isas():
        raise ValueError(
            f"instruction set {isa!r} (BLADE_CPU_ISA) can't run on this machine: choose one of "
            f"{', '.join(available_isas())}, or unset it for the best"
        )
    with _lock:
        if isa not in _loaded:
            try:
                _loaded[isa] = _load_first([isa] if isa else available_isas())
            except BuildError as error:
                _loaded[isa] = None
                _warn_once(str(error))
        return _loaded[isa]


def loaded_isa() -> str | None:
    """The instruction set of ``load()``'s library, None where there is none."""
    library = load()
    return None if library is None else str(library.blade_isa)


def parallel_for() -> int | None:
    """Address of libtorch's stable ``torch_parallel_for`` (torch 2.10 or newer), None where it isn't exported.

    Kernels that get None run on the calling thread.
    """
    return _parallel_for()


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Variants that this machine can run, best first."""
    if not is_x86():
        return ("plain",)
    flags = _cpu_flags()
    return tuple(name for name, needs in ISA_NEEDS.items() if needs <= flags)


@functools.cache
def is_x86() -> bool:
    """Whether this is an x86-64 machine."""
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def has_matrix_tiles() -> bool:
    """Whether the CPU multiplies 16-bit matrices in tiles (Intel AMX), which torch's dense attention then uses."""
    return "amx_bf16" in _cpu_flags()


@functools.cache
def _parallel_for() -> int | None:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _cpu_flags() -> set[str]:
    """Instruction set names as Linux spells them: from the kernel, else from torch where the kernel says nothing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    probes = {
        "_is_avx2_supported": ISA_NEEDS["avx2"],
        "_is_avx512_supported": ISA_NEEDS["avx512"],
        "_is_avx512_bf16_supported": ISA_NEEDS["avx512_bf16"],
    }
    return set().union(*(flags for name, flags in probes.items() if getattr(torch.cpu, name, bool)()))


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        logger.warning("blade's C++ kernels are not available and the slower ATen path is used: %s", reason)


def _load_first(isas: list[str] | tuple[str, ...]) -> ctypes.CDLL:
    """The first variant that builds: an old compiler may not know the newest instruction set."""
    if sys.platform == "win32":
        raise BuildError("they are built with g++ or clang++ on Linux and macOS only, this is Windows")
    compiler = _find_compiler()
    for isa in isas:
        try:
            library = _load_isa(compiler, isa)
            library.blade_isa = isa  # type: ignore[attr-defined]  # a note on the Python object, read by loaded_isa
            return library
        except BuildError:
            if isa == isas[-1]:
                raise
    raise AssertionError("no instruction set to try")


def _find_compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, else the one that Inductor would call."""
    wanted = os.environ.get("CXX")
    default = ("clang++", "g++") if sys.platform == "darwin" else ("g++", "clang++")
    for name in [wanted] if wanted else default:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    found = f"CXX={wanted!r} is not a program" if wanted else f"neither {' nor '.join(default)} is on PATH"
    raise BuildError(f"no C++ compiler found ({found}). Install g++ or clang++, or set CXX to one")


def _load_isa(compiler: list[str], isa: str) -> ctypes.CDLL:
    units = [SOURCE_DIR / name for name in UNITS if (SOURCE_DIR / name).exists()]
    flags = COMMON_FLAGS + ISA_FLAGS[isa]
    name = f"blade_cpu_{isa}_{_cache_key(compiler, flags)}.so"
    library = _cache_dir() / name
    if (loaded := _open_checked(library)) is not None:
        return loaded
    with _file_lock(library.with_suffix(".lock")):
        # Another process may have built it while this one waited.
        if (loaded := _open_checked(library)) is not None:
            return loaded
        _compile(compiler, flags, units, library)
    if (loaded := _open_checked(library)) is None:
        raise BuildError(f"{library} was built and can't be loaded. Delete it, or point BLADE_CACHE_DIR elsewhere")
    return loaded


def _cache_key(compiler: list[str], flags: list[str]) -> str:
    """Hash of the sources, the flags, the compiler and the architecture."""
    digest = hashlib.sha256(repr((compiler, flags, platform.machine(), sys.platform)).encode())
    digest.update(_run([*compiler, "--version"]).encode())
    for source in sorted([*SOURCE_DIR.glob("cpu_*.cpp"), *SOURCE_DIR.glob("cpu_*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _cache_dir() -> Path:
    """First usable of $BLADE_CACHE_DIR, blade/ in Inductor's folder where one is set, ~/.cache/blade, a private one.

    Inductor's own function isn't asked: importing it costs seconds.
    """
    choices = [Path(wanted)] if (wanted := os.environ.get("BLADE_CACHE_DIR")) else _default_dirs()
    for folder in choices:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Code is loaded from here: a folder that someone else made in a shared place won't do, unless asked for.
            if os.access(folder, os.W_OK | os.X_OK) and (wanted or folder.stat().st_uid == os.getuid()):
                return folder
    raise BuildError(
        f"no folder for the built library (tried {', '.join(map(str, choices))}: each must be writable and your own). "
        "Set BLADE_CACHE_DIR to one"
    )


def _default_dirs() -> list[Path]:
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    private = Path(tempfile.gettempdir(), f"blade_{os.getuid()}")
    return [*([Path(inductor, "blade")] if inductor else []), Path(home, "blade").expanduser(), private]


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """One build at a time on this machine. Without a working lock several processes build: slower, still right."""
    if compat.FileLock is None:
        yield
        return
    lock = compat.FileLock(str(path), timeout=BUILD_SECONDS)
    try:
        lock.acquire()
    except (OSError, TimeoutError, NotImplementedError):
        logger.debug("no lock on %s, building without", path)
    try:
        yield
    finally:
        lock.release()


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _open_checked(library: Path) -> ctypes.CDLL | None:
    """The cached library, or None if it is missing, damaged or can't be loaded.

    The digest is compared first: mapping a truncated library can kill the process instead of raising.
    """
    try:
        if hashlib.sha256(library.read_bytes()).hexdigest() != _digest_file(library).read_text():
            return None
        return ctypes.CDLL(str(library))
    except OSError:
        return None


def _compile(compiler: list[str], flags: list[str], units: list[Path], library: Path) -> None:
    """Compile the units side by side, link them beside the library and rename, so that no process sees half a file."""
    try:
        with tempfile.TemporaryDirectory(prefix="build", dir=library.parent) as folder:
            built, digest = Path(folder, "built.so"), Path(folder, "built.sha256")
            objects = [Path(folder, unit.stem + ".o") for unit in units]
            commands = [[*compiler, *flags, "-c", str(u), "-o", str(o)] for u, o in zip(units, objects, strict=True)]
            with ThreadPoolExecutor(len(commands)) as pool:
                list(pool.map(_run, commands))
            _run([*compiler, *flags, "-shared", *map(str, objects), "-o", str(built)])
            digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
            # Another process may have the old file mapped: replace, never overwrite.
            built.replace(library)
            digest.replace(_digest_file(library))
    except OSError as error:
        raise BuildError(f"can't store {library} ({error}). Set BLADE_CACHE_DIR to another folder") from error


def _run(command: list[str]) -> str:
    """Standard output of a compiler call."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"`{shlex.join(command)}` failed: {error}. Set CXX to a working g++ or clang++") from error
    if done.returncode:
        message = done.stderr.strip()[-2000:]
        raise BuildError(
            f"`{shlex.join(command)}` failed with code {done.returncode}. Set CXX to a working g++ or clang++ "
            f"with C++17. Its last words: {message}"
        )
    return done.stdout


def _after_fork() -> None:
    """A child gets a lock that no other thread of its parent still holds."""
    global _lock
    _lock = threading.Lock()


compat.after_fork(_after_fork)
