"""The ``blade`` namespace of operators and what their schemas share; each ``ops*.py`` registers its own.

``torch.library.Library`` is used rather than ``custom_op``: a third of the overhead per call. All outputs have sizes
that follow from the inputs' sizes, so that no graph breaks and CUDA graphs can capture them.
"""

from __future__ import annotations

import torch
from torch.library import Library

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

SELECTION = (
    "float? sparsity=None, float tau=0.95, float min_keep=0.05, float max_keep=1.0, int block_size=128, "
    "int probe_tokens=16, int seed=0, str when='always', int min_tokens=2048, str site=''"
)
"""How much is kept of a row, and when: arguments of every operator that chooses blocks."""

POLICY = "str options='', float[] head_sparsity=[], SymInt[] grid=[], str order='none'"
"""How blocks are chosen beside the policy's name: its own options (JSON), budgets per head, the tokens' geometry."""

library = Library("blade", "DEF")
