"""What all tests share: isolated caches, a seed, NaN in uninitialised memory, and the gpu marker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"
# Set before torch is imported. Compiled C++ is kept between runs (its name is a hash of its content); compiled graphs
# are not, so that a test takes the same path in the first run and in the tenth. Tests of the graph cache turn it on.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(CACHE / "hypothesis"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU, Triton kernels run on CPU tensors in its interpreter. Set before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "default", derandomize=True, deadline=None, max_examples=30, database=None, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile(
    "fuzz", derandomize=False, deadline=None, max_examples=500, print_blob=True, suppress_health_check=_SLOW_IS_FINE
)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same random numbers and a clean Dynamo for each test, whatever ran before it in this process."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN (integers: the largest value), so that reading unwritten memory shows.

    torch does this itself in deterministic mode; replacing ``torch.empty`` would break Dynamo's table of functions.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
