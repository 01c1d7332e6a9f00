"""The cost model: seconds of dense, block-sparse and predicted attention as sympy expressions.

One set of expressions serves the run-time choice inside the operators, the report's prediction and the crossover
length. The constants come from a table shipped per device family (``cost_table.json``; each entry names the run it was measured in), or from
the file that ``python -m benchmarks.calibrate_cost`` writes and ``BLADE_COST_TABLE`` names. Nothing is measured in a
user's process, so all ranks of a job agree.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sympy

logger = logging.getLogger("blade_compile")

B, H, S, T, D, block, probe, density = sympy.symbols("B H S T D block probe density", positive=True)
NAMES = ("B", "H", "S", "T", "D", "block", "probe", "density")
# Constants of a table entry, in picoseconds on one core (or one device).
CONSTANTS = (
    "dense_flop",  # one multiply-add of dense SDPA's two products
    "dense_score",  # softmax work per score of dense SDPA
    "block_flop",
    "block_score",
    "block_tile",  # fixed cost per kept block: reading the list, rescaling
    "probe_flop",
    "probe_score",
    "select_entry",  # selection, per entry of the block map
    "call",  # fixed cost of one operator call
)
_constant = {name: sympy.Symbol(name, positive=True) for name in CONSTANTS}


def _attention(prefix: str, kept: sympy.Expr) -> sympy.Expr:
    scores = B * H * S * T * kept
    return 2 * scores * D * _constant[f"{prefix}_flop"] + scores * _constant[f"{prefix}_score"]


def expressions() -> dict[str, sympy.Expr]:
    """Picoseconds of ``dense`` (SDPA), ``attention`` (block kernel) and ``predict`` (probe and selection)."""
    num_q, num_k = S / block, T / block
    samples = B * H * (num_q * probe) * (num_k * probe)
    return {
        "dense": _attention("dense", sympy.Integer(1)) + _constant["call"],
        "attention": _attention("block", density) + B * H * num_q * num_k * density * _constant["block_tile"] + _constant["call"],
        "predict": samples * (D * _constant["probe_flop"] + _constant["probe_score"])
        + B * H * num_q * num_k * _constant["select_entry"]
        + _constant["call"],
    }


@functools.cache
def _compiled() -> dict[str, Callable[..., float]]:
    symbols = [sympy.Symbol(n, positive=True) for n in NAMES] + [_constant[n] for n in CONSTANTS]
    return {name: sympy.lambdify(symbols, expr, "math") for name, expr in expressions().items()}


@functools.cache
def table() -> dict[str, Any]:
    """The shipped constants with the user's calibration, if any, laid over them."""
    shipped = json.loads((Path(__file__).parent / "cost_table.json").read_text())
    path = os.environ.get("BLADE_COST_TABLE")
    if path:
        try:
            shipped.update(json.loads(Path(path).read_text()))
        except (OSError, ValueError) as error:
            logger.warning("BLADE_COST_TABLE=%s can't be read (%s): the shipped table is used.", path, error)
    return shipped


@functools.cache
def table_hash() -> str:
    """Identifies the constants in use: compile-time decisions hang on them."""
    return hashlib.sha256(json.dumps(table(), sort_keys=True).encode()).hexdigest()


def seconds(family: str, dtype: str, what: str, **sizes: float) -> float:
    """Predicted seconds on one core of ``what`` (a key of `expressions`) for a device family and dtype name."""
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

    ``sizes``: (B, H, S, T, D, block). ``kept``: expected density. Sparse must win by MARGIN, so that a prediction
    that is a little off never makes a model slower than dense.
    """
    named = dict(zip(NAMES[:6], sizes, strict=True), probe=probe_tokens)
    sdpa = seconds(family, dtype, "dense", **named, density=1.0)
    full = seconds(family, dtype, "attention", **named, density=1.0)
    sparse = seconds(family, dtype, "attention", **named, density=kept) + seconds(family, dtype, "predict", **named, density=kept)
    if sparse < MARGIN * min(sdpa, full):
        return "sparse"
    return "full" if full < MARGIN * sdpa else "sdpa"


MARGIN = 0.95


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
