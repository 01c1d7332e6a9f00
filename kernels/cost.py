"""The cost model: seconds of dense, block-sparse and predicted attention as sympy expressions.

One set of expressions serves the run-time choice inside the operators, the report's prediction and the crossover
length. They are linear in their constants, so that ``python -m benchmarks.calibrate_cost`` can fit these. The constants
come from a table shipped per device family (``cost_table.json``; each entry names the run it was measured in), or from
the file that the calibration writes and ``BLADE_COST_TABLE`` names. Nothing is measured in a user's process, so all
ranks of a job agree.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sympy

logger = logging.getLogger("blade_compile")

B, H, S, T, D, block, probe, density = sympy.symbols("B H S T D block probe density", positive=True)
NAMES = ("B", "H", "S", "T", "D", "block", "probe", "density")
# Constants of a table entry, in picoseconds on one core (or one device). dense: SDPA; block: the block kernel.
CONSTANTS = (
    "dense_flop",  # per multiply-add of the two products
    "dense_score",  # softmax, per score
    "dense_row",  # per query row and per key row, whatever they meet: packing, output
    "dense_call",  # per call
    "block_flop",
    "block_score",
    "block_row",
    "block_edge",  # per token and head dim of a kept block: loading it, rescaling the output
    "block_tile",  # per kept block: reading the list, starting the loops
    "block_call",
    "probe_flop",
    "probe_score",
    "probe_row",  # per sampled token: finding and gathering it
    "select_entry",  # per entry of the block map
    "probe_call",
)
_constant = {name: sympy.Symbol(name, positive=True) for name in CONSTANTS}
# What is predicted to be faster must be so by this factor, or by the smaller one that the calibration found its fit to
# need (`margin` of a table entry): a prediction that is off makes no model slower than dense.
MARGIN = 0.95


def expressions() -> dict[str, sympy.Expr]:
    """Picoseconds of ``dense`` (SDPA), ``attention`` (block kernel) and ``predict`` (probe and selection)."""
    num_q, num_k, scores, c = S / block, T / block, S * T, _constant
    tiles, samples = num_q * num_k * density, num_q * num_k * probe**2
    per_head = {
        "dense": scores * (2 * D * c["dense_flop"] + c["dense_score"]) + (S + T) * D * c["dense_row"],
        "attention": scores * density * (2 * D * c["block_flop"] + c["block_score"])
        + tiles * (block * D * c["block_edge"] + c["block_tile"])
        + (S + T) * D * c["block_row"],
        "predict": samples * (D * c["probe_flop"] + c["probe_score"])
        + (num_q + num_k) * probe * D * c["probe_row"]
        + num_q * num_k * c["select_entry"],
    }
    calls = {"dense": c["dense_call"], "attention": c["block_call"], "predict": c["probe_call"]}
    return {name: B * H * cost + calls[name] for name, cost in per_head.items()}


@functools.cache
def _compiled() -> dict[str, Callable[..., float]]:
    symbols = [sympy.Symbol(n, positive=True) for n in NAMES] + [_constant[n] for n in CONSTANTS]
    return {name: sympy.lambdify(symbols, expr, "math") for name, expr in expressions().items()}


@functools.cache
def table() -> dict[str, Any]:
    """The shipped constants with the user's calibration, if any, laid over them."""
    shipped: dict[str, Any] = json.loads((Path(__file__).parent / "cost_table.json").read_text())
    path = os.environ.get("BLADE_COST_TABLE")
    if path:
        try:
            calibrated = json.loads(Path(path).read_text())
            _check(calibrated)
            shipped.update(calibrated)
        except (OSError, ValueError) as error:
            logger.warning("BLADE_COST_TABLE=%s can't be used (%s): the shipped table is.", path, error)
    return shipped


def _check(entries: Any) -> None:
    """ValueError unless a calibration has what the expressions need: a half-written file must not stop a model."""
    if not isinstance(entries, dict) or not entries:
        raise ValueError("it is not a mapping of device families; write it with `python -m benchmarks.calibrate_cost`")
    for family, entry in entries.items():
        constants = entry.get("constants") if isinstance(entry, dict) else None
        if not isinstance(constants, dict) or "float32" not in constants:
            raise ValueError(f"{family!r} has no constants for float32")
        for dtype, values in constants.items():
            numbers = values if isinstance(values, dict) else {}
            if lacking := [name for name in CONSTANTS if not isinstance(numbers.get(name), (int, float))]:
                raise ValueError(f"{family!r}, {dtype!r} lacks {', '.join(lacking)}; calibrate again with this version")


@functools.cache
def table_hash() -> str:
    """Identifies the constants in use: compile-time decisions hang on them."""
    return hashlib.sha256(json.dumps(table(), sort_keys=True).encode()).hexdigest()


def measured(family: str) -> bool:
    """Whether the table has constants for a device family."""
    return bool(table().get(family, {}).get("constants"))


def seconds(family: str, dtype: str, what: str, **sizes: float) -> float:
    """Predicted seconds on one core of ``what`` (a key of `expressions`) for a device family and dtype name.

    NaN for a family that was never measured.
    """
    if not measured(family):
        return math.nan
    entry = table()[family]["constants"]
    constants = entry.get(dtype) or entry["float32"]
    values = [sizes.get(name, 0.0) for name in NAMES]
    return _compiled()[what](*values, *(constants[name] for name in CONSTANTS)) * 1e-12


@functools.lru_cache(maxsize=4096)
def choose(
    family: str,
    dtype: str,
    sizes: tuple[int, int, int, int, int, int],
    probe_tokens: int,
    kept: float,
) -> str:
    """``sparse``, ``full`` (block kernel, every block) or ``sdpa``: the fastest predicted.

    ``sizes``: (B, H, S, T, D, block). ``kept``: expected density. A family that was never measured stays with SDPA.
    """
    named = dict(zip(NAMES[:6], sizes, strict=True), probe=probe_tokens)

    def cost_of(what: str, density: float) -> float:
        return seconds(family, dtype, what, **named, density=density)

    sdpa, full = cost_of("dense", 1.0), cost_of("attention", 1.0)
    sparse = cost_of("attention", kept) + cost_of("predict", kept)
    margin = min(MARGIN, table().get(family, {}).get("margin", {}).get(dtype, MARGIN))
    # Each comparison is false for NaN.
    if sparse < margin * min(sdpa, full):
        return "sparse"
    return "full" if full < margin * sdpa else "sdpa"


def crossover_length(family: str, dtype: str, *, H: int, D: int, block: int, probe: int, density: float) -> int | None:
    """The shortest square length (a multiple of the block) from which sparse is chosen; None up to 2**20 tokens."""
    low, high = 1, (1 << 20) // block
    pick = lambda n: choose(family, dtype, (1, H, n * block, n * block, D, block), probe, density)  # noqa: E731
    if pick(high) != "sparse":
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pick(middle) == "sparse" else (middle + 1, high)
    return low * block
