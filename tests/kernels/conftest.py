"""Kernel tests run with NaN in uninitialised memory: a kernel that reads what it never wrote fails its test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _nan_everywhere(nan_filled_empty: None) -> None:
    """Use the fixture in every test of this folder."""
