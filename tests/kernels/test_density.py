"""The density read back from an accelerator: what is expected before, while and after a copy is on its way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from blade_compile.kernels import density

DEVICE = torch.device("cuda", 0)  # only its name is used


class Copy:
    """Stands in for a CUDA event."""

    def __init__(self, *, arrived: bool) -> None:
        self.arrived = arrived

    def query(self) -> bool:
        return self.arrived


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    yield
    density._last.clear()
    density._pending.clear()


def test_initial_value_stands_in_before_the_first_copy() -> None:
    assert density.expected("a", DEVICE) == density.INITIAL


def test_a_copy_counts_once_it_has_arrived() -> None:
    copy = Copy(arrived=False)
    density._pending[density._key("a", DEVICE)] = (torch.tensor(0.125), copy)
    assert density.expected("a", DEVICE) == density.INITIAL
    copy.arrived = True
    assert density.expected("a", DEVICE) == 0.125
    assert not density._pending
    assert density.expected("a", DEVICE) == 0.125


def test_sites_and_devices_are_kept_apart() -> None:
    density._pending[density._key("a", DEVICE)] = (torch.tensor(0.125), Copy(arrived=True))
    assert density.expected("a", DEVICE) == 0.125
    assert density.expected("b", DEVICE) == density.expected("a", torch.device("cuda", 1)) == density.INITIAL


def test_nothing_is_copied_on_the_cpu() -> None:
    density.report("a", torch.ones(1, 1, 4, dtype=torch.int32), 4)
    assert not density._pending
