"""The peak probe builds with the kernels' own flags and counts its operations."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.peak import Peak
from blade_compile.kernels import cpu_build


@pytest.mark.skipif(cpu_build.load() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_runs_as_many_operations_as_it_says(dtype: torch.dtype) -> None:
    call, flops = Peak().case(dtype, flops=1e7)
    assert flops == pytest.approx(1e7 * torch.get_num_threads(), rel=0.01)
    start = time.perf_counter()
    call()
    assert flops / (time.perf_counter() - start) < 1e15  # it did something: no core does a petaflop
