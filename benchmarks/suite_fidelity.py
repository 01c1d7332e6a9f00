"""Suite ``fidelity``: what each policy loses on the queries and keys of a small trained video transformer.

The same tensors and numbers as ``benchmarks.fidelity``, without orders, reuse and calibration. No times: the model is
too short for them. Suite ``ops`` times the same policies at the same sparsities, and the report draws both together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.registry import Case, Plan, suite
from benchmarks.suite_ops import POLICIES, SPARSITIES

BLOCK = 16
Row = dict[str, Any]


@suite("fidelity")
def cases(plan: Plan) -> Iterator[Case]:
    """Recall of attention mass and errors of the output, for every policy and sparsity."""
    about = {
        "size": "the digits teacher of blade-distill: 256 tokens in blocks of 16, 4 layers of 3 heads, 6 of 50 steps",
        "dtype": "float32",
        "weights": "trained on handwritten digits",
    }
    cpu = torch.device("cpu")
    yield Case("policies on real queries and keys", about=about, rows=policy_rows, device=cpu)


def policy_rows() -> list[Row]:
    """One row for each policy and sparsity: means over layers, heads, steps and clips."""
    from benchmarks import fidelity
    from blade_compile.config import BladeConfig
    from blade_compile.fidelity import compare

    model = fidelity.load_teacher(fidelity.TEACHER)
    found = fidelity.captures(model, BLOCK)
    rows = []
    for policy in POLICIES:
        for sparsity in SPARSITIES:
            config = BladeConfig(
                **fidelity.POLICIES[policy], sparsity=sparsity, grid=model.config.grid, block_size=BLOCK,
                probe_tokens=BLOCK,
            )  # fmt: skip
            arguments = fidelity.operator_arguments(config)
            op = torch.ops.blade.sparse_sdpa.default
            numbers = fidelity._means([compare(op, (c.q, c.k, c.v), arguments)[1] for c in found])
            about = {"policy": policy, "sparsity": sparsity}
            rows.append(
                {"arm": f"{policy}, sparsity {sparsity}", **about, **{k: round(v, 4) for k, v in numbers.items()}}
            )
    return rows
