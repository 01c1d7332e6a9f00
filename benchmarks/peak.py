"""The machine's measured instruction peak, built from ``peak.cpp`` with the flags of the kernels that are loaded."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from blade_compile.kernels import cpu_build

SOURCE = Path(__file__).parent / "peak.cpp"


class Peak:
    """Calls that keep every thread's multiply-add units busy.

    Raises:
        RuntimeError: no kernels are loaded, so there is no instruction set to take the peak of.
        subprocess.CalledProcessError: the probe can't be compiled.
    """

    def __init__(self) -> None:
        isa = cpu_build.loaded_isa()
        if isa is None:
            raise RuntimeError("the C++ kernels are not available here, so there is no peak to compare them with")
        self.isa = isa
        with tempfile.TemporaryDirectory() as folder:
            library = str(Path(folder) / "peak.so")
            flags = [*cpu_build.COMMON_FLAGS, *cpu_build.ISA_FLAGS[isa], "-shared"]
            command = [*cpu_build._find_compiler(), *flags, str(SOURCE), "-o", library]
            subprocess.run(command, check=True, capture_output=True, text=True)
            self._library = ctypes.CDLL(library)
        self._library.peak_operations.restype = ctypes.c_int64
        self._library.peak_run.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]

    def case(self, dtype: torch.dtype, flops: float = 2e9) -> tuple[Callable[[], None], float]:
        """Return a call and its floating-point operations, about ``flops`` for each thread."""
        bf16 = int(dtype == torch.bfloat16)
        operations = self._library.peak_operations(bf16)
        iterations, threads = max(1, int(flops / operations)), torch.get_num_threads()
        pool = cpu_build.parallel_for()
        return lambda: self._library.peak_run(iterations, bf16, threads, pool), float(iterations * operations * threads)
