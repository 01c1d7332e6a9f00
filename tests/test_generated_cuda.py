"""The CUDA code that Inductor writes around blade's attention: nothing is copied, and nothing else changes.

It is generated without a GPU (`offline_cuda.py`), in a process of its own: that one believes in a GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there: tests/gpu compiles for it")
Codes = dict[str, list[str]]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `offline_cuda.py` writes: once, whichever test process asks first."""
    pytest.importorskip("triton")
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "generated_cuda.json"
    with FileLock(out.with_suffix(".lock")):
        if not out.exists():
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", "tests.offline_cuda", str(out)]
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture
def codes(generated: dict[str, Any]) -> Codes:
    """Generated modules by variant: one for inference, forward and backward for training."""
    return generated["codes"]


def kernels(code: str) -> Counter[str]:
    """The bodies of the Triton kernels, without the numbers that count them, by how often each is written."""
    bodies = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", code, re.DOTALL)
    return Counter(re.sub(r"(triton_\w+?)_\d+\b", r"\1", body[body.index("@triton.jit") :]) for body in bodies)


def ours(code: str) -> list[str]:
    """Definitions of blade's own kernels: those that Inductor launches for an operator of ours."""
    found = re.findall(r"async_compile\.triton\('\w+', '''.*?'''", code, re.DOTALL)
    return [text for text in found if "user_autotune" in text]


def wrapper(code: str) -> str:
    """The code that allocates and launches, without comments and checks of sizes."""
    lines = code[code.index("def call(self, args)") : code.index("runner = Runner")].splitlines()
    return "\n".join(line for line in lines if not re.match(r"\s*(#|assert_)", line))


def launches(code: str) -> list[str]:
    """What the wrapper runs, in order: Triton kernels, library calls, operators; without numbers."""
    found = re.findall(r"(triton_\w+)\.run\(|(extern_kernels\.\w+)\(|(torch\.ops\.[\w.]+)\(", wrapper(code))
    return [re.sub(r"_\d+$", "", next(filter(None, groups))) for groups in found]


@pytest.mark.parametrize("variant", ["opaque", "opaque training", "inlined", "inlined training"])
def test_every_other_kernel_is_inductors_own(codes: Codes, variant: str) -> None:
    plain = codes["plain training" if "training" in variant else "plain"]
    assert len(plain) == len(codes[variant])
    for code, expected in zip(codes[variant], plain, strict=True):
        extra = Counter(
            {body: n for body, n in kernels(code).items() if not any(body in definition for definition in ours(code))}
        )
        assert extra == kernels(expected)


@pytest.mark.parametrize("variant", ["opaque", "opaque training"])
def test_one_call_for_each_operator_and_nothing_else(codes: Codes, variant: str) -> None:
    for code, expected in zip(
        codes[variant], codes["plain training" if "training" in variant else "plain"], strict=True
    ):
        found = Counter(launches(code))
        blade = {name: count for name, count in found.items() if ".blade." in name}
        assert set(blade.values()) == {1}
        others = Counter({name: count for name, count in found.items() if name not in blade})
        attention = Counter({name: 1 for name in launches(expected) if "flash_attention" in name})
        assert others == Counter(launches(expected)) - attention


def test_queries_keys_values_and_output_are_read_in_place(codes: Codes) -> None:
    text = wrapper(codes["opaque"][0])
    (call,) = re.findall(r"(buf\d+) = torch\.ops\.blade\.block_sparse_attention\.default\((.*)\)", text)
    views = re.findall(r"reinterpret_tensor\((\w+), \(1, 4, 1000, 64\), \(768000, 64, 768, 1\), (\d+)\)", call[1])
    assert [offset for _, offset in views] == ["0", "256", "512"]
    assert len({buffer for buffer, _ in views}) == 1
    (out,) = re.findall(rf"(buf\d+) = {call[0]}\[0\]", text)
    readers = [line for line in text.splitlines() if re.search(rf"\b{out}\b", line) and "= " + call[0] not in line]
    assert "extern_kernels.addmm(" in readers[0]
    assert f"reinterpret_tensor({out}, (1000, 256), (256, 1), 0)" in readers[0]


@pytest.mark.parametrize("variant", ["inlined", "inlined training"])
def test_inlined_attention_is_launched_by_inductor(codes: Codes, variant: str) -> None:
    code = codes[variant][0]
    found = Counter(name for name in launches(code) if ".blade." in name)
    assert found == {"torch.ops.blade.mask_predict.default": 1}
    (definition,) = ours(code)
    name = re.search(r"async_compile\.triton\('(\w+)'", definition)[1]
    (call,) = re.findall(rf"\b{name}_\d+\.run\((.*)\)", wrapper(code))
    views = set(re.findall(r"reinterpret_tensor\((\w+), \(1, 4, 1000, 64\), \(768000, 64, 768, 1\), (\d+)\)", call))
    assert sorted(offset for _, offset in views) == ["0", "256", "512"]
    assert len({buffer for buffer, _ in views}) == 1
    # Two allocations for our results and nothing else: no clone, no fill.
    plain = wrapper(codes["plain training" if "training" in variant else "plain"][0])
    added = len(re.findall("empty_strided_cuda", wrapper(code))) - len(re.findall("empty_strided_cuda", plain))
    assert added <= 2


def test_no_python_float_reaches_a_kernel_as_fp64(codes: Codes) -> None:
    definition = ours(codes["inlined"][0])[0]
    signature = re.search(r"'signature': \{(.*?)\}", definition)[1]
    assert "*bf16" in signature
    assert "fp64" not in signature


def test_the_inlined_kernel_compiles_from_its_definition(generated: dict[str, Any]) -> None:
    assert 0 < generated["compiled"]["shared"] <= 227 << 10
    assert generated["compiled"]["wgmma"] > 0
