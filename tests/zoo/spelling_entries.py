"""The hand-written spellings of attention as entries: each is a function of tensors with at most one attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.passes.spellings import LEFT_ALONE, REWRITTEN, Spelling
from tests.zoo.entry import Entry, Inputs

FAMILY = "spellings"


class Spelled(nn.Module):
    """A spelling's function as a module; modules that the function holds are registered, so that `.double()` works."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling_call = spelling.call
        cells = [cell.cell_contents for cell in getattr(spelling.call, "__closure__", None) or ()]
        held = [*cells, *(getattr(spelling.call, "__defaults__", None) or ())]
        self.held = nn.ModuleList(value for value in held if isinstance(value, nn.Module))

    def forward(self, *tensors: Tensor) -> Any:
        return self.spelling_call(*tensors)


def _entry(spelling: Spelling) -> Entry:
    def inputs(seed: int) -> Inputs:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return spelling.inputs(), {}

    return Entry(
        name=f"spelling: {spelling.name}",
        build=lambda: Spelled(spelling),  # in the mode that the spelling asks for
        inputs=inputs,
        family=FAMILY,
        codes=tuple(code for code in (spelling.code or spelling.seen,) if code is not None),
    )


ENTRIES = [_entry(spelling) for spelling in (*REWRITTEN, *LEFT_ALONE)]
