"""Compiles Triton launches for chips that aren't there, and reads what the compiler made of them.

A launcher runs on meta tensors with every kernel launch recorded instead of run: what is compiled is what it would
launch, sizes, strides and tiles included.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Row = dict[str, Any]
KIB = 1 << 10


@dataclass(frozen=True)
class Chip:
    """A compile target: Triton's name for it, and the shared memory that one program can have."""

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int

    @property
    def target(self) -> Any:
        """As Triton wants it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "cuda", 80, 32, 163 * KIB),
        Chip("sm_89", "cuda", 89, 32, 99 * KIB),
        Chip("sm_90", "cuda", 90, 32, 227 * KIB),
        Chip("sm_100", "cuda", 100, 32, 227 * KIB),
        Chip("sm_120", "cuda", 120, 32, 99 * KIB),
        Chip("gfx942", "hip", "gfx942", 64, 64 * KIB),
    )
}
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name, and options such as num_warps."""

    kernel: Any
    arguments: Row
    options: Row

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.fn.__name__).strip("_")


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every Triton launch is kept in the list, and not made."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        defaults = {p.name: p.default for p in kernel.params if p.has_default}
        options = {name: value for name, value in kwargs.items() if name not in names}
        launches.append(Launch(kernel, {name: (defaults | given)[name] for name in names}, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def _specialized(parameter: Any, value: Any) -> tuple[str, Any, bool]:
    """Type in the signature, constant value, and whether it is known to be divisible by 16; as a launch does it."""
    if parameter.is_constexpr or value is None:
        return "constexpr", value, False
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}", None, True
    if isinstance(value, float):
        return "fp32", None, False
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>", None, False
    assert type(value) is int, f"{parameter.name} is {value!r}: no type for it"
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", 1, False
    wide = not -(1 << 31) <= value < 1 << 31
    return ("i64" if wide else "i32"), None, value % 16 == 0 and not parameter.do_not_specialize


def compiled(launch: Launch, chip: Chip) -> Any:
    """What Triton makes of a launch for a chip."""
    import triton
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        kind, constant, divisible = _specialized(parameter, launch.arguments[parameter.name])
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(place,)] = constant
        elif divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=chip.target, options=launch.options)


def resources(made: Any, chip: Chip) -> Row:
    """Registers per thread, shared memory, stack and spills in bytes or instructions, and the matrix instructions."""
    read = _of_amd if chip.backend == "hip" else _of_nvidia
    return {"shared": made.metadata.shared, **read(made)}


def _of_nvidia(made: Any) -> Row:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        usage = _printed(tools / "cuobjdump", "-res-usage", cubin.name)
        code = _printed(tools / "nvdisasm", "-c", cubin.name)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1]
    tiles = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)", made.asm["ptx"])
    instruction = re.search(r"tcgen05\.mma|wgmma\.mma_async|mma\.sync", made.asm["ptx"])
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spill_stores": len(re.findall(r"\bSTL\b", code)),
        "spill_loads": len(re.findall(r"\bLDL\b", code)),
        "matrix": f"{instruction.group()} {max(tiles, key=_area)}" if tiles and instruction else _text(instruction),
    }


def _area(tile: str) -> int:
    m, n, _ = map(int, re.findall(r"\d+", tile))
    return m * n


def _text(found: re.Match[str] | None) -> str:
    return found.group() if found else "none"


def _of_amd(made: Any) -> Row:
    code = made.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", code)[-1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spill_stores": number("vgpr_spill_count"),
        "spill_loads": number("sgpr_spill_count"),
        "matrix": _text(re.search(r"v_mfma_\w+", code)),
    }


def _printed(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
