"""The build of the C++ kernels: cached, locked, repaired, and never a reason for a user's program to fail."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from blade_compile.kernels import cpu_build

SOURCE = 'extern "C" int blade_answer() { return 42; }\n'
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A one-line library in place of the kernels, an own cache, and a compiler that counts its calls.

    The fixture's value is the log, one line per compilation.
    """
    sources, log, compiler = tmp_path / "src", tmp_path / "log", tmp_path / "c++"
    sources.mkdir()
    (sources / "cpu_probe.cpp").write_text(SOURCE)
    log.touch()
    real = cpu_build._find_compiler()[0]
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *cpu_probe.cpp*) echo "$*" >> {log};; esac\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("BLADE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("BLADE_CPU_ISA", raising=False)
    monkeypatch.setattr(cpu_build, "SOURCE_DIR", sources)
    forget(monkeypatch)
    return log


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows."""
    monkeypatch.setattr(cpu_build, "_loaded", {})
    monkeypatch.setattr(cpu_build, "_warned", False)


def answer(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return library.blade_answer()


def builds(log: Path) -> int:
    return len(log.read_text().splitlines())


def library_file(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache").glob("*.so")
    return found


def test_builds_once_and_then_hits_the_cache(small, tmp_path, monkeypatch):
    assert answer(cpu_build.load()) == 42
    assert cpu_build.load() is cpu_build.load()
    forget(monkeypatch)
    assert answer(cpu_build.load()) == 42
    assert builds(small) == 1
    assert not list((tmp_path / "cache").glob("tmp*")), "temporary files were left behind"


def test_changed_header_is_a_new_library(small, tmp_path, monkeypatch):
    cpu_build.load()
    (tmp_path / "src" / "cpu_extra.h").write_text("// new\n")
    forget(monkeypatch)
    cpu_build.load()
    assert builds(small) == 2
    assert len(list((tmp_path / "cache").glob("*.so"))) == 2


@pytest.mark.parametrize("damage", ["truncated", "garbage", "no digest", "stale digest"])
def test_damaged_file_is_rebuilt_once(small, tmp_path, monkeypatch, damage):
    cpu_build.load()
    library = library_file(tmp_path)
    digest = cpu_build._digest_file(library)
    content = library.read_bytes()
    library.unlink()  # this process has the file mapped: damage a new one
    library.write_bytes({"truncated": content[:200], "garbage": b"x" * 500}.get(damage, content))
    if damage == "no digest":
        digest.unlink()
    if damage == "stale digest":
        digest.write_text("0" * 64)
    forget(monkeypatch)
    assert answer(cpu_build.load()) == 42
    assert builds(small) == 2
    forget(monkeypatch)
    assert answer(cpu_build.load()) == 42
    assert builds(small) == 2


def test_file_that_matches_its_digest_but_cannot_be_loaded_is_rebuilt(small, tmp_path, monkeypatch):
    cpu_build.load()
    # In another folder: the loader remembers a path that it has loaded.
    bad = tmp_path / "other" / library_file(tmp_path).name
    bad.parent.mkdir()
    bad.write_bytes(b"not a library")
    cpu_build._digest_file(bad).write_text(hashlib.sha256(b"not a library").hexdigest())
    monkeypatch.setenv("BLADE_CACHE_DIR", str(bad.parent))
    forget(monkeypatch)
    assert answer(cpu_build.load()) == 42
    assert builds(small) == 2


def none_with_one_warning(caplog: pytest.LogCaptureFixture) -> str:
    caplog.set_level(logging.WARNING, logger="blade_compile")
    assert cpu_build.load() is None
    assert cpu_build.load() is None
    assert cpu_build.load("plain") is None
    (record,) = caplog.records
    assert record.name == "blade_compile"
    assert "ATen" in record.getMessage()
    return record.getMessage()


def test_missing_compiler_gives_none_and_one_warning(small, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    message = none_with_one_warning(caplog)
    assert "/nowhere/c++" in message and "Install" in message


def test_empty_path_gives_none_and_one_warning(small, monkeypatch, caplog):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "g++" in none_with_one_warning(caplog)


def test_failing_build_gives_none_and_the_compilers_words(small, tmp_path, caplog):
    (tmp_path / "src" / "cpu_probe.cpp").write_text("#error this cannot be built\n")
    assert "this cannot be built" in none_with_one_warning(caplog)


def test_unwritable_cache_gives_none_and_one_warning(small, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLADE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "BLADE_CACHE_DIR" in none_with_one_warning(caplog)


def test_windows_gives_none_and_one_warning(small, monkeypatch, caplog):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Windows" in none_with_one_warning(caplog)


def test_old_compiler_gets_an_older_instruction_set(small, monkeypatch):
    isas = cpu_build.available_isas()
    if len(isas) < 2:
        monkeypatch.setattr(cpu_build, "available_isas", lambda: ("avx2", "plain"))
    monkeypatch.setitem(cpu_build.ISA_FLAGS, cpu_build.available_isas()[0], ["-mno-such-thing"])
    assert answer(cpu_build.load()) == 42


@pytest.mark.parametrize("isa", cpu_build.available_isas())
def test_forced_instruction_set(small, tmp_path, monkeypatch, isa):
    monkeypatch.setenv("BLADE_CPU_ISA", isa)
    assert answer(cpu_build.load()) == 42
    assert f"_{isa}_" in library_file(tmp_path).name
    assert cpu_build.load(isa) is cpu_build.load()


def test_instruction_set_of_another_machine_is_refused(small, monkeypatch):
    monkeypatch.setattr(cpu_build, "available_isas", lambda: ("avx2", "plain"))
    with pytest.raises(ValueError, match=r"'avx512'.*avx2, plain"):
        cpu_build.load("avx512")
    monkeypatch.setenv("BLADE_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"'sse9'.*avx2, plain"):
        cpu_build.load()


def test_cpu_without_proc_is_asked_through_torch(monkeypatch):
    def unreadable(*_args, **_kwargs):
        raise FileNotFoundError

    expected = cpu_build.available_isas()
    monkeypatch.setattr(Path, "read_text", unreadable)
    cpu_build.available_isas.cache_clear()
    try:
        assert cpu_build.available_isas() == expected
    finally:
        cpu_build.available_isas.cache_clear()


def test_threads_of_one_process_build_once(small):
    found = []
    threads = [threading.Thread(target=lambda: found.append(cpu_build.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1
    assert builds(small) == 1


def test_forked_child_can_load_while_a_parent_thread_builds(small):
    with cpu_build._lock:
        child = os.fork()
        if not child:  # the child's copy of the lock is held by nobody
            os._exit(0 if cpu_build.load() is not None else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_processes_that_start_together_build_once(small, tmp_path):
    code = (
        "from pathlib import Path; from blade_compile.kernels import cpu_build as b\n"
        f"b.SOURCE_DIR = Path({str(tmp_path / 'src')!r})\n"
        "assert b.load().blade_answer() == 42"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert builds(small) == 1


def test_import_is_light():
    code = (
        "import sys; from blade_compile.kernels import cpu_build\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'triton'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_parallel_for_runs_on_torch_threads():
    address = cpu_build.parallel_for()
    assert address, "this torch exports torch_parallel_for"
    body_type = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    ranges: list[tuple[int, int]] = []
    body = body_type(lambda begin, end, _: ranges.append((begin, end)))
    run = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3, body_type, ctypes.c_void_p)(address)
    assert run(0, 100, 1, body, None) == 0
    assert sorted(i for begin, end in ranges for i in range(begin, end)) == list(range(100))
