"""Published configurations by name: values of ``BladeConfig`` fields (algorithms 1.4).

The constants are those of the authors' released attention code for BLADE (arXiv 2508.10774): the only source that
states all of them, and what the released weights were trained with. So ``probe_tokens`` is the code's 32, where the
paper's text says 16, which is blade's own default and costs a quarter.

Every row hits ``max_keep`` in practice, so the effective sparsity 1 - density - 1 / n is that of a fixed top-k:
0.7987 for Wan (paper: 0.798) and 0.8126 for CogVideoX (paper: 0.82), whose text blocks are protected.
"""

from __future__ import annotations

from typing import Any

_BLADE = {
    "policy": "asa_g",
    "block_size": 128,
    "tau": 0.95,
    "min_keep": 0.05,
    "probe": "sample",
    "probe_tokens": 32,
    "order": "gilbert",
}

PRESETS: dict[str, dict[str, Any]] = {
    # 21 x 30 x 52 = 32,760 tokens, no text in the self-attention
    "wan2.1-1.3b": {**_BLADE, "max_keep": 0.17, "global_window": 30},
    # 13 x 30 x 45 = 17,550 tokens and 226 of text
    "cogvideox-5b": {**_BLADE, "max_keep": 0.10, "global_window": 15},
}
